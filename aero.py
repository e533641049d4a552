"""
AERO: which rollouts to draw, which to keep and how to weigh them (arXiv 2602.14338), beside its baselines.

GRPO draws a fixed group of rollouts per problem and standardises their rewards inside the group, so a group that is all
right or all wrong (flat) teaches nothing although it was generated and trained on. AERO, for a problem with n rollouts
drawn, c of them right, u = c / n:

  Stage I   explore: n_explore rollouts of every problem; u decides the stratum.
  Strategy 1 rescue (u <= u_res): n_extra more at a time until one of them is right or n_total are drawn.
  Strategy 2 posterior (still all wrong, or all right): success rate (c + a) / (n + a + b) under a Beta(a, b) prior, so the
             advantage is not zero; n_same of the group's rollouts are trained on.
  Strategy 3 rejection (0 < u < 1/2): all c right and k c of the wrong ones, drawn uniformly. The mean |advantage| of a group
             with c right and m wrong is 2 sqrt(c m) / (c + m), largest at m = c.
  u >= 1/2   keep everything.

An algorithm is four pure functions of one group's rewards, in the order in which the rollouts were drawn:

  first(s)                  how many rollouts to start with
  more(r, s)                how many to add now that every rollout so far is graded; 0 ends the group
  keep(r, s, rng)           indices of the rollouts to train on (sorted)
  advantage(r, kept, s)     one number for each kept rollout; final, never standardised again

Groups are index arrays of unequal size; nothing here is reshaped to (problems, N), and nothing writes into its arguments.
Letters: r (n,) rewards, n drawn, c right, u = c / n, s the settings, R trained response tokens of a micro-batch.

Where descriptions of the paper disagree, both readings are settings; the first is the default:
  posterior_advantage  zscore: (r - u~) / sqrt(u~ (1 - u~)), the binary z-score of GRPO at the posterior mean | signed: 2 u~ - 1
  rescue_budget        prompt: n_total per problem | pool: (n_total - n_explore) x problems spare rollouts for the whole step
  adv_stats            kept: mean and std of the retained rollouts, which the theorem above speaks of | drawn: of all
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch


def knob(default, help: str):
    """A dataclass field whose help text `--help` prints."""
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    """What the algorithms read. `--algo NAME` first applies NAME's published defaults, then the flags given."""

    algo: str = knob("aero", "aero, or a baseline: grpo grpo_skip drgrpo dapo pods reinforce_ada mc_grpo sign maxrl")
    n_explore: int = knob(8, "rollouts of every problem in the first round (aero, reinforce_ada)")
    n_extra: int = knob(2, "rollouts in each further round of a problem (aero, reinforce_ada)")
    n_total: int = knob(16, "most rollouts of one problem; the group size of algorithms that draw once")
    n_keep: int = knob(4, "rollouts kept of a group by the algorithms that down-sample (pods, reinforce_ada)")
    u_res: float = knob(0.0, "rescue a problem whose success rate after the first round is at most this")
    k: int = knob(1, "rejection keeps k wrong rollouts for each right one")
    n_same: int = knob(4, "rollouts kept of a flat group, weighed by the posterior")
    prior_a: float = knob(1.0, "Beta prior of the success rate: pseudo-count of right rollouts")
    prior_b: float = knob(1.0, "Beta prior of the success rate: pseudo-count of wrong rollouts")
    rescue: bool = knob(True, "strategy 1, iterative rescue")
    posterior: bool = knob(True, "strategy 2, Bayesian posterior for flat groups; without it they are not trained on")
    rejection: bool = knob(True, "strategy 3, selective rejection")
    rescue_budget: str = knob("prompt", "prompt: n_total per problem | pool: the step's spare rollouts, dealt round-robin")
    posterior_advantage: str = knob("zscore", "zscore: (r - u~) / sqrt(u~ (1 - u~)) | signed: 2 u~ - 1")
    adv_stats: str = knob("kept", "mean and std of a mixed group from its kept | drawn rollouts")
    n_reference: int = knob(16, "group size of the GRPO run that compute/saved_frac compares with")
    refill_cap: int = knob(10, "dapo: at most this many times are flat groups replaced in one step")
    loss_norm: str = knob("prompt", "mean over problems of the mean over rollouts of the mean over tokens (prompt), "
                                    "over all tokens (token), or sum / (max_new x rollouts) (constant)")
    clip_low: float = knob(0.2, "the policy ratio is clipped below 1 - clip_low")
    clip_high: float = knob(0.2, "the policy ratio is clipped above 1 + clip_high")

    def check(self):
        """Raises ValueError with one line for settings that contradict each other."""
        def need(ok, what):
            if not ok:
                raise ValueError(what)
        need_known(self.algo)
        for name, choices in (("rescue_budget", ("prompt", "pool")), ("loss_norm", LOSS_NORMS),
                              ("posterior_advantage", ("zscore", "signed")), ("adv_stats", ("kept", "drawn"))):
            value = getattr(self, name)
            need(value in choices, f"--{name} {value}: wanted one of {' '.join(choices)}")
        for name in ("n_explore", "n_extra", "n_total", "n_keep", "n_same", "k", "n_reference"):
            need(getattr(self, name) >= 1, f"--{name} {getattr(self, name)}: wanted 1 or more")
        for name in ("prior_a", "prior_b"):
            need(getattr(self, name) > 0, f"--{name} {getattr(self, name)}: wanted a positive pseudo-count")
        need(0 <= self.u_res < 0.5, f"--u_res {self.u_res}: wanted 0 <= u_res < 0.5 (above lies the stratum that keeps all)")
        need(self.refill_cap >= 0, f"--refill_cap {self.refill_cap}: wanted 0 or more")
        need(0 < self.clip_low < 1 and self.clip_high > 0,
             f"--clip_low {self.clip_low} --clip_high {self.clip_high}: wanted 0 < clip_low < 1 and clip_high > 0")
        if self.algo not in ("aero", "sign"):
            need(self.n_total >= 2, f"--n_total {self.n_total}: {self.algo} wanted 2 or more, a group of one has no baseline")
        if self.algo in ("aero", "reinforce_ada"):
            need(self.n_explore <= self.n_total, f"--n_explore {self.n_explore} is larger than --n_total {self.n_total}")
        if self.algo in ("pods", "reinforce_ada"):
            need(2 <= self.n_keep <= self.n_total, f"--n_keep {self.n_keep}: wanted 2 to --n_total {self.n_total}")
        if self.algo == "reinforce_ada":
            need(self.n_keep % 2 == 0, f"--n_keep {self.n_keep}: wanted an even number, half right and half wrong")
        if self.algo == "mc_grpo":
            need(self.n_total % 2 == 1, f"--n_total {self.n_total}: wanted an odd number, so that the median is a rollout")


# --------------------------------------------------------------------------------------------------------------------
# Shared arithmetic

def is_flat(r) -> bool:
    """All rewards equal, by comparison: a standard deviation of rounding error is not zero, equal rewards are equal."""
    return bool((r == r[:1]).all())     # true of no rewards at all


def standardise(r, stats) -> np.ndarray:
    """(r - mean) / std with the population statistics of `stats`; a flat group gets zeros, so no epsilon is needed."""
    return np.zeros(len(r)) if is_flat(stats) else (r - stats.mean()) / stats.std()


def everything(r) -> np.ndarray:
    return np.arange(len(r))


def nothing() -> np.ndarray:
    return np.arange(0)


def sample(indices, m, rng) -> np.ndarray:
    """m of `indices`, uniformly, without replacement."""
    return rng.choice(indices, size=m, replace=False)


# --------------------------------------------------------------------------------------------------------------------
# AERO

def aero_first(s) -> int:
    return s.n_explore


def unsolved(r, s) -> bool:
    """In the rescue stratum, which Stage I alone decides, and no right rollout since."""
    return bool(r[: s.n_explore].mean() <= s.u_res and not r[s.n_explore :].any())


def aero_more(r, s) -> int:
    """Strategy 1. Under `pool` too: up to n_total a problem spends its own share of the pool, and `deal` the rest."""
    return max(0, min(s.n_extra, s.n_total - len(r))) if s.rescue and unsolved(r, s) else 0


def aero_keep(r, s, rng) -> np.ndarray:
    right, wrong = np.flatnonzero(r == 1), np.flatnonzero(r == 0)
    if is_flat(r):                                                    # strategy 2
        return np.sort(sample(everything(r), min(s.n_same, len(r)), rng)) if s.posterior else nothing()
    if s.rejection and len(right) < len(wrong):                       # strategy 3, rescued problems included
        wrong = sample(wrong, min(s.k * len(right), len(wrong)), rng)
    return np.sort(np.concatenate([right, wrong]))


def aero_advantage(r, kept, s) -> np.ndarray:
    if not is_flat(r):
        return standardise(r[kept], r[kept] if s.adv_stats == "kept" else r)
    # Posterior mean from everything drawn. With a = b = 1 the z-score is +1/sqrt(n+1) (all right) or -1/sqrt(n+1).
    u = (r.sum() + s.prior_a) / (len(r) + s.prior_a + s.prior_b)
    if s.posterior_advantage == "signed":
        return np.full(len(kept), 2 * u - 1)
    return (r[kept] - u) / np.sqrt(u * (1 - u))


# --------------------------------------------------------------------------------------------------------------------
# Baselines: what differs from GRPO stands in the table below

def draw_total(s) -> int:
    return s.n_total


def draw_once(r, s) -> int:
    return 0


def keep_all(r, s, rng) -> np.ndarray:
    return everything(r)


def keep_mixed(r, s, rng) -> np.ndarray:
    """Flat groups are neither trained nor counted."""
    return nothing() if is_flat(r) else everything(r)


def zscore_kept(r, kept, s) -> np.ndarray:
    return standardise(r[kept], r[kept])


def centred_on_drawn(r, kept, s) -> np.ndarray:
    return r[kept] - r.mean()


def centred_on_median(r, kept, s) -> np.ndarray:
    return r[kept] - np.median(r)


def signs(r, kept, s) -> np.ndarray:
    """No group statistics: the control for 'any signal on flat groups' (2605.07689)."""
    return 2 * r[kept] - 1


def over_mean(r, kept, s) -> np.ndarray:
    return (r[kept] - r.mean()) / r.mean() if r.any() else np.zeros(len(kept))


def pods_keep(r, s, rng) -> np.ndarray:
    """The n_keep rollouts whose rewards vary most: some from the top and the rest from the bottom (2504.13818, theorem 1)."""
    shuffled = rng.permutation(len(r))                                # equal rewards, equal chances
    order = shuffled[np.argsort(r[shuffled], kind="stable")]
    m = min(s.n_keep, len(r))
    i, top = np.arange(m), np.arange(m + 1)[:, None]
    split = order[np.where(i < m - top, i, i + len(r) - m)]           # (m + 1, m): row `top` has that many from the top
    var = r[split].var(axis=1)
    best = np.flatnonzero(var >= var.max() * (1 - 1e-9))              # equal splits as well, whatever rounding says
    return np.sort(split[rng.choice(best)])


def ada_more(r, s) -> int:
    """Further rounds until half of n_keep are right and half are wrong, or n_total are drawn (2510.04996, balanced)."""
    balanced = min(r.sum(), len(r) - r.sum()) >= s.n_keep / 2
    return 0 if balanced else min(s.n_extra, s.n_total - len(r))


def ada_keep(r, s, rng) -> np.ndarray:
    """n_keep rollouts, half right and half wrong; where one kind is short the other fills up. Flat groups teach nothing."""
    if is_flat(r):
        return nothing()
    right, wrong = np.flatnonzero(r == 1), np.flatnonzero(r == 0)
    m = min(s.n_keep, len(r))
    c = max(min(len(right), m // 2), m - len(wrong))
    return np.sort(np.concatenate([sample(right, c, rng), sample(wrong, m - c, rng)]))


def median_keep(r, s, rng) -> np.ndarray:
    """All but the one rollout that is the median of the odd group: its advantage is zero (2601.22582)."""
    return np.delete(everything(r), rng.choice(np.flatnonzero(r == np.median(r))))


class Algorithm(NamedTuple):
    first: Callable
    more: Callable
    keep: Callable
    advantage: Callable
    rewards: str            # which it has a meaning for; others are refused, see ALLOWED
    defaults: dict          # published settings that differ from Settings
    refill: bool = False    # flat groups are replaced by fresh problems


ALGORITHMS = {
    #                          first       more       keep         advantage          rewards      published defaults
    "aero": Algorithm(         aero_first, aero_more, aero_keep,   aero_advantage,    "0 or 1",    {}),  # 2602.14338
    "grpo": Algorithm(         draw_total, draw_once, keep_all,    zscore_kept,       "finite",    {}),  # 2402.03300
    "grpo_skip": Algorithm(    draw_total, draw_once, keep_mixed,  zscore_kept,       "finite",    {"n_total": 8}),
    "drgrpo": Algorithm(       draw_total, draw_once, keep_all,    centred_on_drawn,  "finite",
                               {"n_total": 8, "loss_norm": "constant"}),  # 2503.20783
    "dapo": Algorithm(         draw_total, draw_once, keep_mixed,  zscore_kept,       "finite",
                               {"clip_high": 0.28, "loss_norm": "token"}, refill=True),  # 2503.14476
    "pods": Algorithm(         draw_total, draw_once, pods_keep,   zscore_kept,       "finite",
                               {"n_total": 64, "n_keep": 16}),  # 2504.13818
    "reinforce_ada": Algorithm(aero_first, ada_more,  ada_keep,    centred_on_drawn,  "0 or 1",
                               {"n_explore": 8, "n_extra": 8, "n_total": 32, "n_keep": 4}),  # 2510.04996
    "mc_grpo": Algorithm(      draw_total, draw_once, median_keep, centred_on_median, "finite",    {"n_total": 9}),
    "sign": Algorithm(         draw_total, draw_once, keep_all,    signs,             "0 or 1",    {"n_total": 8}),
    "maxrl": Algorithm(        draw_total, draw_once, keep_all,    over_mean,         "0 or more", {}),  # 2602.02710
}
ALLOWED = {"finite": np.isfinite, "0 or 1": lambda r: (r == 0) | (r == 1), "0 or more": lambda r: np.isfinite(r) & (r >= 0)}


def need_known(algo: str):
    if algo not in ALGORITHMS:
        raise ValueError(f"--algo {algo}: wanted one of {' '.join(ALGORITHMS)}")


class Chosen(NamedTuple):
    kept: np.ndarray        # (m,) indices of the rollouts to train on
    advantage: np.ndarray   # (m,)


def choose(rewards, s, rng) -> Chosen:
    """What to train on of one complete group. ValueError for rewards that the algorithm has no meaning for."""
    r, algo = np.asarray(rewards, dtype=np.float64), ALGORITHMS[s.algo]
    if not (known := ALLOWED[algo.rewards](r)).all():
        raise ValueError(f"--algo {s.algo}: wanted rewards that are {algo.rewards}, found {r[~known][0]:g}")
    kept = algo.keep(r, s, rng)
    return Chosen(kept, algo.advantage(r, kept, s))


def deal(waiting: int, spare: int, s) -> list[int]:
    """`--rescue_budget pool`: one round of spare rollouts for the problems still without success, in their order.

    >>> deal(3, 5, Settings(n_extra=2))
    [2, 2, 1]
    """
    return [max(0, min(s.n_extra, spare - i * s.n_extra)) for i in range(waiting)]


# --------------------------------------------------------------------------------------------------------------------
# The loss

LOSS_NORMS = ("prompt", "token", "constant")


def token_weights(group_S, length_S, norm: str, max_new: int) -> np.ndarray:
    """
    Weight of each token of trained rollout s, such that the loss of the whole optimizer step, over all ranks and
    micro-batches, is the plain sum of weight x token loss. Counting once here is what makes the gradient independent of
    micro-batch and world size.

      prompt    mean over problems of the mean over their rollouts of the mean over tokens (GRPO's objective, the default)
      token     mean over all tokens                       constant   sum / (max_new x rollouts)

    group_S: which problem each trained rollout belongs to; length_S: its response tokens, EOS included. Pruning 1 right and
    7 wrong to 1 + 1 multiplies the problem's share of the gradient by 0.38 under `token` and by 1.51 under `prompt`.
    """
    length_S = np.asarray(length_S, dtype=np.float64)
    if norm == "token":
        return np.full(len(length_S), 1 / length_S.sum())
    if norm == "constant":
        return np.full(len(length_S), 1 / (max_new * len(length_S)))
    _, inverse, size = np.unique(group_S, return_inverse=True, return_counts=True)
    return 1 / (len(size) * size[inverse] * length_S)


def policy_loss(logp_R, behaviour_R, adv_R, weight_R, clip_low: float, clip_high: float):
    """
    Clipped policy-gradient loss (PPO, 1707.06347 eq. 7), summed with the global weights of `token_weights`.

    logp_R: log-probs of the trained tokens under the weights being updated; behaviour_R: under those that the ratio is
    taken against. With one update per batch these are logp_R.detach(), so that the ratio is exactly 1 and no second forward
    pass is made. Returns (loss, share of tokens clipped (weighted), mean ratio (weighted)), all sums over R.
    """
    ratio_R = torch.exp(logp_R - behaviour_R)
    clipped_R = ratio_R.clamp(1 - clip_low, 1 + clip_high)
    gain_R = torch.minimum(ratio_R * adv_R, clipped_R * adv_R)
    with torch.no_grad():
        clip_frac = ((clipped_R * adv_R < ratio_R * adv_R) * weight_R).sum()
        ratio_mean = (ratio_R * weight_R).sum()
    return -(weight_R * gain_R).sum(), clip_frac, ratio_mean
