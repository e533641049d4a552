"""
AERO: which rollouts to draw, which to keep and how to weigh them (2602.14338), with baselines.

GRPO draws a fixed group of rollouts per problem and standardises their rewards inside the group.
So a group that is all right or all wrong (flat) teaches nothing, although it was generated and
trained on. AERO, for a problem with n rollouts drawn, c of them right, u = c / n:

  Stage I     explore: n_explore rollouts of every problem; u decides the stratum.
  Strategy 1  rescue (u <= u_res): n_extra more at a time until one is right or n_total are drawn.
  Strategy 2  posterior (still all wrong, or all right): success rate (c + a) / (n + a + b) under
              a Beta(a, b) prior, so the advantage is not zero. n_same rollouts are trained on.
  Strategy 3  rejection (0 < u < 1/2): all c right and k c of the wrong ones, drawn uniformly. The
              mean |advantage| with c right and m wrong is 2 sqrt(c m) / (c + m), largest at m = c.
  u >= 1/2    keep everything.

An algorithm is four pure functions of a group: the rewards of one problem's rollouts in the order
in which they were drawn, the problem's id, and what the run remembers of it.

  first(group, cfg)             how many rollouts to start with
  more(group, cfg)              how many to add now that every rollout so far is graded; 0 ends it
  keep(group, cfg, rng)         indices of the rollouts to train on, sorted
  advantage(group, kept, cfg)   one number for each kept rollout; final, never standardised again

Groups are index arrays of unequal size: nothing here is reshaped to (problems, N), and nothing
writes into its arguments. A fork adds a row to ALGORITHMS, or a loss to LOSSES.

Where descriptions of the paper disagree, both readings are settings; the first is the default:
  posterior_advantage  zscore: (r - u~) / sqrt(u~ (1 - u~)), the binary z-score of GRPO at the
                       posterior mean u~ | signed: 2 u~ - 1
  rescue_budget        prompt: n_total per problem | pool: (n_total - n_explore) x problems spare
                       rollouts for the whole step

Letters: n drawn, c right, u = c / n, m kept; R trained response tokens, S rollouts.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads must not spin; read with torch

import numpy as np
import torch


@dataclass
class Group:
    """What the hooks see of one problem: its rollouts so far, in the order drawn."""

    rewards: np.ndarray  # (n,) float64
    problem: int  # id
    memory: tuple[float, ...] = ()  # what `remember` made of this problem's last group

    def __post_init__(self):
        self.rewards = np.asarray(self.rewards, dtype=np.float64)


# -------------------------------------------------------------------------------- shared arithmetic


def is_flat(rewards) -> bool:
    """All equal, or none at all. By comparison: the deviation of equal numbers may be rounding."""
    return bool((rewards == rewards[:1]).all())


def standardise(rewards) -> np.ndarray:
    """(r - mean) / std of the population; a flat group gets zeros, so no epsilon is needed."""
    flat = is_flat(rewards)
    return np.zeros(len(rewards)) if flat else (rewards - rewards.mean()) / rewards.std()


def everything(group) -> np.ndarray:
    return np.arange(len(group.rewards))


def sample(indices, m, rng) -> np.ndarray:
    """m of `indices`, uniformly, without replacement."""
    return rng.choice(indices, size=m, replace=False)


# --------------------------------------------------------------------------------------------- AERO


def aero_first(group, cfg) -> int:
    return cfg.n_explore


def unsolved(group, cfg) -> bool:
    """In the rescue stratum, which Stage I alone decides, and no right rollout since."""
    explored = group.rewards[: cfg.n_explore]
    rescued = group.rewards[cfg.n_explore :].any()
    return bool(explored.mean() <= cfg.u_res and not rescued)


def aero_more(group, cfg) -> int:
    """Strategy 1. Under `pool` these rounds are a problem's own share; `deal` deals the rest."""
    if not cfg.rescue or not unsolved(group, cfg):
        return 0
    return max(0, min(cfg.n_extra, cfg.n_total - len(group.rewards)))


def aero_keep(group, cfg, rng) -> np.ndarray:
    if is_flat(group.rewards):
        if not cfg.posterior:
            return np.arange(0)
        m = min(cfg.n_same, len(group.rewards))
        return np.sort(sample(everything(group), m, rng))
    right, wrong = np.flatnonzero(group.rewards == 1), np.flatnonzero(group.rewards == 0)
    if cfg.rejection and len(right) < len(wrong):  # rescued problems included
        wrong = sample(wrong, min(cfg.k * len(right), len(wrong)), rng)
    return np.sort(np.concatenate([right, wrong]))


def aero_advantage(group, kept, cfg) -> np.ndarray:
    rewards = group.rewards
    if not is_flat(rewards):
        return standardise(rewards[kept])
    # The posterior mean of everything drawn. With a = b = 1 the z-score of a flat group is
    # +1 / sqrt(n + 1) if it is right and -1 / sqrt(n + 1) if it is wrong.
    u = (rewards.sum() + cfg.prior_a) / (len(rewards) + cfg.prior_a + cfg.prior_b)
    if cfg.posterior_advantage == "signed":
        return np.full(len(kept), 2 * u - 1)
    return (rewards[kept] - u) / np.sqrt(u * (1 - u))


def deal(waiting: int, spare: int, cfg) -> list[int]:
    """`--rescue_budget pool`: one round of spare rollouts for the problems still without success,
    in their order. With n_extra = 2, 3 waiting and 5 spare: [2, 2, 1]."""
    return [max(0, min(cfg.n_extra, spare - i * cfg.n_extra)) for i in range(waiting)]


# ---------------------------------------------------------------------------------------- baselines


def draw_total(group, cfg) -> int:
    return cfg.n_total


def draw_once(group, cfg) -> int:
    return 0


def keep_all(group, cfg, rng) -> np.ndarray:
    return everything(group)


def keep_mixed(group, cfg, rng) -> np.ndarray:
    """Flat groups are neither trained nor counted."""
    return np.arange(0) if is_flat(group.rewards) else everything(group)


def zscore_kept(group, kept, cfg) -> np.ndarray:
    return standardise(group.rewards[kept])


def centred_on_drawn(group, kept, cfg) -> np.ndarray:
    return group.rewards[kept] - group.rewards.mean()


def centred_on_median(group, kept, cfg) -> np.ndarray:
    return group.rewards[kept] - np.median(group.rewards)


def signs(group, kept, cfg) -> np.ndarray:
    """No group statistics: the control for "any signal on flat groups" (2605.07689)."""
    return 2 * group.rewards[kept] - 1


def over_mean(group, kept, cfg) -> np.ndarray:
    mean = group.rewards.mean()
    return (group.rewards[kept] - mean) / mean if mean else np.zeros(len(kept))


def pods_keep(group, cfg, rng) -> np.ndarray:
    """The n_keep of largest variance: some highest, the others lowest (2504.13818, theorem 1)."""
    n = len(group.rewards)
    m = min(cfg.n_keep, n)
    shuffled = rng.permutation(n)  # equal rewards, equal chances
    ascending = shuffled[np.argsort(group.rewards[shuffled], kind="stable")]
    splits, variances = [], []
    for highest in range(m + 1):
        splits.append(np.concatenate([ascending[: m - highest], ascending[n - highest :]]))
        variances.append(group.rewards[splits[-1]].var())
    # Whatever rounding says, splits of equal variance have equal chances.
    best = np.flatnonzero(np.array(variances) >= max(variances) * (1 - 1e-9))
    return np.sort(splits[rng.choice(best)])


def ada_more(group, cfg) -> int:
    """Rounds until half of n_keep are right and half wrong, or n_total drawn (2510.04996)."""
    n, c = len(group.rewards), group.rewards.sum()
    if min(c, n - c) >= cfg.n_keep / 2:
        return 0
    return min(cfg.n_extra, cfg.n_total - n)


def ada_keep(group, cfg, rng) -> np.ndarray:
    """n_keep rollouts, half right and half wrong; where one kind is short the other fills up."""
    if is_flat(group.rewards):
        return np.arange(0)
    right, wrong = np.flatnonzero(group.rewards == 1), np.flatnonzero(group.rewards == 0)
    m = min(cfg.n_keep, len(group.rewards))
    c = max(min(len(right), m // 2), m - len(wrong))
    return np.sort(np.concatenate([sample(right, c, rng), sample(wrong, m - c, rng)]))


def median_keep(group, cfg, rng) -> np.ndarray:
    """All but the one rollout that is the median of the odd group: its advantage is zero."""
    medians = np.flatnonzero(group.rewards == np.median(group.rewards))
    return np.delete(everything(group), rng.choice(medians))


# ------------------------------------------ settings that contradict each other (bounds: config.py)


def need(condition: bool, message: str):
    if not condition:
        raise ValueError(message)


def no_check(cfg):
    """All settings go together."""


def check_rounds(cfg):
    total = cfg.n_total
    need(cfg.n_explore <= total, f"--n_explore {cfg.n_explore} is larger than --n_total {total}")


def check_aero(cfg):
    check_rounds(cfg)
    wanted = "wanted 0 <= u_res < 0.5 (above lies the stratum that keeps all)"
    need(0 <= cfg.u_res < 0.5, f"--u_res {cfg.u_res}: {wanted}")


def check_total(cfg):
    wanted = f"{cfg.algo} wanted 2 or more, a group of one has no baseline"
    need(cfg.n_total >= 2, f"--n_total {cfg.n_total}: {wanted}")


def check_pods(cfg):
    check_total(cfg)
    wanted = f"wanted 2 to --n_total {cfg.n_total}"
    need(2 <= cfg.n_keep <= cfg.n_total, f"--n_keep {cfg.n_keep}: {wanted}")


def check_ada(cfg):
    check_rounds(cfg)
    check_pods(cfg)
    wanted = "wanted an even number, half right and half wrong"
    need(cfg.n_keep % 2 == 0, f"--n_keep {cfg.n_keep}: {wanted}")


def check_median(cfg):
    check_total(cfg)
    wanted = "wanted an odd number, so that the median is a rollout"
    need(cfg.n_total % 2 == 1, f"--n_total {cfg.n_total}: {wanted}")


class Algorithm(NamedTuple):
    first: Callable
    more: Callable
    keep: Callable
    advantage: Callable
    rewards: str  # which it has a meaning for, see ALLOWED; others are refused
    defaults: dict = {}  # noqa: RUF012  published settings that differ from Config
    refill: bool = False  # flat groups are replaced by fresh problems
    check: Callable = no_check  # (cfg): raises ValueError for settings that contradict each other
    # (group, cfg) -> the problem's new memory, which its next group brings along; None: no memory.
    remember: Callable | None = None


GRPO = Algorithm(draw_total, draw_once, keep_all, zscore_kept, "finite", check=check_total)
ALGORITHMS = {
    "aero": Algorithm(  # 2602.14338
        aero_first, aero_more, aero_keep, aero_advantage, "0 or 1", check=check_aero),
    "grpo": GRPO,  # 2402.03300
    "grpo_skip": GRPO._replace(keep=keep_mixed, defaults={"n_total": 8}),  # no flat groups
    "drgrpo": GRPO._replace(  # 2503.20783
        advantage=centred_on_drawn, defaults={"n_total": 8, "loss_norm": "constant"}),
    "dapo": GRPO._replace(  # 2503.14476
        keep=keep_mixed, refill=True, defaults={"clip_high": 0.28, "loss_norm": "token"}),
    "pods": GRPO._replace(  # 2504.13818
        keep=pods_keep, check=check_pods, defaults={"n_total": 64, "n_keep": 16}),
    "reinforce_ada": Algorithm(  # 2510.04996
        aero_first, ada_more, ada_keep, centred_on_drawn, "0 or 1", check=check_ada,
        defaults={"n_explore": 8, "n_extra": 8, "n_total": 32, "n_keep": 4}),
    "mc_grpo": GRPO._replace(  # 2601.22582
        keep=median_keep, advantage=centred_on_median, check=check_median, defaults={"n_total": 9}),
    "sign": GRPO._replace(  # 2605.07689
        advantage=signs, rewards="0 or 1", check=no_check, defaults={"n_total": 8}),
    "maxrl": GRPO._replace(advantage=over_mean, rewards="0 or more"),  # 2602.02710
}
ALLOWED = {
    "finite": np.isfinite,
    "0 or 1": lambda rewards: (rewards == 0) | (rewards == 1),
    "0 or more": lambda rewards: np.isfinite(rewards) & (rewards >= 0),
}


class RewardError(ValueError):
    """Rewards that the algorithm has no meaning for."""


def need_rewards(cfg, rewards) -> None:
    """Raises RewardError, one line, with the first reward that the algorithm does not take."""
    rewards = np.asarray(rewards, dtype=np.float64)
    kind = ALGORITHMS[cfg.algo].rewards
    bad = rewards[~ALLOWED[kind](rewards)]
    if len(bad):
        raise RewardError(f"--algo {cfg.algo}: wanted rewards that are {kind}, found {bad[0]:g}")


class Chosen(NamedTuple):
    kept: np.ndarray  # (m,) indices of the rollouts to train on
    advantage: np.ndarray  # (m,)


def choose(group: Group, cfg, rng) -> Chosen:
    """What to train on of one complete group. Raises RewardError."""
    need_rewards(cfg, group.rewards)
    algorithm = ALGORITHMS[cfg.algo]
    kept = algorithm.keep(group, cfg, rng)
    return Chosen(kept, algorithm.advantage(group, kept, cfg))


# ----------------------------------------------------------------------------------------- the loss

LOSS_NORMS = ("prompt", "token", "constant")


def token_weights(group_S, length_S, norm: str, max_new: int) -> np.ndarray:
    """
    Weight of each token of trained rollout s, such that the loss of the whole optimizer step, over
    all ranks and micro-batches, is the plain sum of weight x token loss. Counting once, here, is
    what makes the gradient independent of micro-batch and world size.

      prompt    mean over problems of the mean over rollouts of the mean over tokens (GRPO's)
      token     mean over all tokens
      constant  sum / (max_new x rollouts)

    group_S: which problem a rollout belongs to; length_S: its response tokens, EOS included.
    Pruning 1 right and 7 wrong to 1 + 1 multiplies the problem's share of the gradient by 0.38
    under `token` and by 1.51 under `prompt`.
    """
    length_S = np.asarray(length_S, dtype=np.float64)
    if norm == "token":
        return np.full(len(length_S), 1 / length_S.sum())
    if norm == "constant":
        return np.full(len(length_S), 1 / (max_new * len(length_S)))
    problems, problem_S, size = np.unique(group_S, return_inverse=True, return_counts=True)
    return 1 / (len(problems) * size[problem_S] * length_S)


class MicroBatch(NamedTuple):
    """The trained tokens of a few rollouts, one after the other, each rollout whole."""

    logp_R: torch.Tensor | None  # under the weights being updated; None before the forward pass
    entropy_R: torch.Tensor | None  # of the next token's distribution; to look at: no gradient
    behaviour_R: torch.Tensor | None  # log-probs that the policy ratio is taken against
    sampled_R: torch.Tensor  # log-probs that the sampler recorded
    advantage_R: torch.Tensor
    weight_R: torch.Tensor  # see token_weights; a loss is a sum with them
    rollout_R: torch.Tensor  # which rollout of this micro-batch a token belongs to, 0 to S - 1
    length_S: torch.Tensor  # tokens of each rollout
    reference_R: torch.Tensor | None = None  # log-probs under the starting model, if needed


class Loss(NamedTuple):
    """
    function(batch, cfg) -> (loss, {metric: tensor}), all of them sums over R with batch.weight_R,
    and the same metrics in every call. Metrics are added up over micro-batches and ranks, divided
    by the sum of all weights and logged as loss/<metric>; the loss itself is loss/policy.
    """

    function: Callable
    # (batch, cfg) -> d loss / d logp_R at a ratio of 1, without looking at logp_R. A loss that
    # knows it lets the head make its gradient in the forward pass and saves one product of four.
    derivative: Callable | None = None
    needs_reference: bool = False  # the learner fills reference_R from a frozen starting model


def clipped_loss(batch: MicroBatch, cfg) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped policy gradient (PPO, 1707.06347 eq. 7), and the share of tokens that it clips."""
    ratio_R = torch.exp(batch.logp_R - batch.behaviour_R)
    clipped_R = ratio_R.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    free_R = ratio_R * batch.advantage_R
    bounded_R = clipped_R * batch.advantage_R
    loss = -(batch.weight_R * torch.minimum(free_R, bounded_R)).sum()
    clip_frac = ((bounded_R < free_R) * batch.weight_R).sum()
    ratio_mean = (ratio_R * batch.weight_R).sum()
    return loss, {"clip_frac": clip_frac, "ratio_mean": ratio_mean}


def on_policy_derivative(batch: MicroBatch, cfg) -> torch.Tensor:
    """At a ratio of 1 the clip is idle, and the ratio is its own derivative."""
    return -batch.weight_R * batch.advantage_R


def check_derivative(name: str, cfg) -> None:
    """
    ValueError, one line, for a loss whose `derivative` is not that of its `function`: a fork that
    changes one of the two would train the other. Tried on a few made-up tokens at a ratio of 1.
    """
    loss = LOSSES[name]
    if loss.derivative is None:
        return
    rng = np.random.default_rng(0)
    logp_R, advantage_R, weight_R = torch.tensor(rng.normal(size=(3, 7)))
    weight_R = weight_R.abs()
    batch = MicroBatch(
        logp_R=logp_R.clone().requires_grad_(),
        entropy_R=logp_R.abs(),
        behaviour_R=logp_R,
        sampled_R=logp_R,
        advantage_R=advantage_R,
        weight_R=weight_R,
        rollout_R=torch.tensor([0, 0, 0, 1, 1, 2, 2]),
        length_S=torch.tensor([3, 2, 2]),
        reference_R=logp_R,
    )
    value, _ = loss.function(batch, cfg)
    (wanted_R,) = torch.autograd.grad(value, batch.logp_R)
    if not torch.allclose(loss.derivative(batch, cfg), wanted_R):
        raise ValueError(
            f"--loss {name}: its derivative is not that of its function at a ratio of 1: "
            "wanted one of its own, or none"
        )


LOSSES = {"clip": Loss(clipped_loss, derivative=on_policy_derivative)}
