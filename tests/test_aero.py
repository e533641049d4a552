"""
aero.py by properties: every outcome pattern of a group, the rounds, the draws, the loss, the cost; then the two functions of
train.py that carry decisions out (draw, collect) with a fake sampler and grader, and update on a tiny model.

`formulas` states what every algorithm keeps and with which advantage, in plain arithmetic on counts and independently of
aero.py. The published mistakes of other implementations (specification, section 4), and what keeps them out:

 1 gradient depends on micro-batches   test_loss_of_parts_is_loss_of_whole; through the model, and on the number of ranks:
                                       test_train.py, test_micro_batches_do_not_matter, test_two_ranks_equal_one
 2 EOS never trained                   no mask is built from ids: test_train.py, test_masks_come_from_lengths and others
 3 temperature on one side             cannot occur: one Config.temperature reaches Sampling and the forward pass, and Sampling
                                       takes nothing from a model folder; test_rollout.py compares recorded and recomputed logps
 4 truncated rollouts                  test_truncated_is_wrong_and_trained
 5 groups of unequal size              test_token_weights_of_unequal_groups, test_every_pattern: groups are index arrays
 6 a group of one                      test_every_pattern begins at n = 1, test_settings_that_contradict_each_other
 7 loops without a cap                 test_refill_stops_at_its_cap, test_rescue_budgets, test_rounds_of_every_pattern
 8 a rank with nothing to train on     test_rank_with_nothing_takes_part; with real ranks: test_train.py
"""

import collections
import copy
import doctest
import itertools
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import aero
import data
import learner
import train
from model import Model, ModelConfig
from reward import Verdict
from rollout import Rollout


def settings(algo="aero", **changes):
    """Published defaults, then changes."""
    s = aero.Settings(algo=algo, **aero.ALGORITHMS[algo].defaults | changes)
    s.check()
    return s


def rewards(right, wrong):
    return np.repeat([1.0, 0.0], [right, wrong])


# --------------------------------------------------------------------------------------------- every outcome of a group


def formulas(s, n, c):
    """{(right, wrong) kept: (advantage of a right one, of a wrong one)} for c right of n. With several keys, any may come."""
    w = n - c
    flat = c in (0, n)

    def zscore(right, wrong):   # a right one is above the mean wrong/(right+wrong), in units of sqrt(right wrong)/(right+wrong)
        return (0, 0) if right * wrong == 0 else (math.sqrt(wrong / right), -math.sqrt(right / wrong))

    if s.algo == "aero" and flat:
        odds_right, odds_wrong = c + s.prior_a, w + s.prior_b
        m = min(s.n_same, n) if s.posterior else 0
        if s.posterior_advantage == "signed":
            a = ((odds_right - odds_wrong) / (odds_right + odds_wrong),) * 2
        else:
            a = zscore(odds_right, odds_wrong)
        return {(m, 0) if c else (0, m): a}
    if s.algo == "aero":
        kept = (c, min(w, s.k * c)) if s.rejection and c < w else (c, w)
        return {kept: zscore(*kept) if s.adv_stats == "kept" else zscore(c, w)}
    if s.algo == "grpo":
        return {(c, w): zscore(c, w)}
    if s.algo in ("grpo_skip", "dapo"):
        return {(0, 0) if flat else (c, w): zscore(c, w)}
    if s.algo == "drgrpo":
        return {(c, w): (w / n, -c / n)}
    if s.algo == "pods":        # the variance of right + wrong = m is right wrong / m^2
        m = min(s.n_keep, n)
        possible = [(right, m - right) for right in range(max(0, m - w), min(c, m) + 1)]
        most = max(right * wrong for right, wrong in possible)
        return {kept: zscore(*kept) for kept in possible if kept[0] * kept[1] == most}
    if s.algo == "reinforce_ada":
        m = min(s.n_keep, n)
        right, wrong = min(c, m // 2), min(w, m // 2)
        right, wrong = right + min(c - right, m - right - wrong if w == wrong else 0), wrong + min(w - wrong, m - right - wrong)
        return {(0, 0) if flat else (right, wrong): (w / n, -c / n)}
    if s.algo == "mc_grpo":     # the median of an odd group is the majority's reward
        return {(c - 1, w): (0, -1)} if c > w else {(c, w - 1): (1, 0)}
    if s.algo == "sign":
        return {(c, w): (1, -1)}
    if s.algo == "maxrl":
        return {(c, w): (w / c, -1) if c else (0, 0)}


SUM_IS_ZERO = ("grpo", "grpo_skip", "dapo", "drgrpo", "pods", "maxrl")


def check_patterns(s, n, seed=0):
    """All 2^n patterns of n rollouts through aero.choose, against `formulas`. Returns how many that were."""
    patterns = (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(np.float64)    # (2^n, n)
    patterns.flags.writeable = False
    before, rng = copy.copy(s), np.random.default_rng(seed)
    chosen = [aero.choose(r, s, rng) for r in patterns]
    assert s == before
    row = np.repeat(np.arange(2**n), [len(x.kept) for x in chosen])
    column = np.concatenate([x.kept for x in chosen])
    advantage = np.concatenate([x.advantage for x in chosen])
    assert len(column) == len(advantage) and np.isfinite(advantage).all()
    assert np.issubdtype(column.dtype, np.integer) and column.min(initial=0) >= 0 and column.max(initial=0) < n
    assert (np.diff(row * n + column) > 0).all(), "kept is not sorted, or an index is kept twice"

    of_kept = patterns[row, column]
    right = np.bincount(row, of_kept, minlength=2**n)
    wrong = np.bincount(row, 1 - of_kept, minlength=2**n)
    total = np.bincount(row, advantage, minlength=2**n)
    wanted = np.full(len(row), np.nan)
    for c in range(n + 1):
        of_c = patterns.sum(1) == c
        options = formulas(s, n, c)
        found = set(zip(right[of_c], wrong[of_c]))
        assert found <= set(options), (s.algo, n, c, found, options)
        for kept, (a_right, a_wrong) in options.items():
            here = (of_c & (right == kept[0]) & (wrong == kept[1]))[row]
            wanted[here] = np.where(of_kept[here] == 1, a_right, a_wrong)
    np.testing.assert_allclose(advantage, wanted, rtol=1e-12, atol=1e-12)

    mixed = (patterns.sum(1) > 0) & (patterns.sum(1) < n)
    if s.algo in SUM_IS_ZERO:
        assert np.abs(total).max() < 1e-9
    if s.algo == "aero" and s.adv_stats == "kept":
        assert np.abs(total[mixed]).max(initial=0) < 1e-9
    if s.algo == "aero" and s.posterior:    # what flat groups are for: all right is pushed up, all wrong down
        assert total[-1] > 0 > total[0]
    return 2**n


@pytest.mark.parametrize("algo", ["aero", "grpo", "grpo_skip", "drgrpo", "pods", "reinforce_ada", "sign", "maxrl", "mc_grpo"])
def test_every_pattern(algo):
    """
    All 131,070 patterns of 1 to 16 rollouts (mc_grpo: 43,690 of odd sizes): 1,092,250 in all; dapo shares grpo_skip's hooks.
    What is kept, in numbers of right and wrong, and each advantage depend on (n, c) alone: that is permutation invariance
    over every permutation of every group; test_draws_are_uniform adds that all rollouts of a kind have equal chances.
    """
    s = settings(algo, n_keep=4)
    sizes = range(1, 17, 2 if algo == "mc_grpo" else 1)
    assert sum(check_patterns(s, n) for n in sizes) == (43690 if algo == "mc_grpo" else 131070)


@pytest.mark.parametrize("changes", [
    dict(k=2), dict(k=3, adv_stats="drawn"), dict(k=100), dict(n_same=1), dict(n_same=20), dict(prior_a=2.0, prior_b=0.5),
    dict(posterior_advantage="signed"), dict(adv_stats="drawn"), dict(rejection=False), dict(posterior=False), dict(u_res=0.2),
    dict(rescue=False), dict(rescue=False, posterior=False, rejection=False),
    dict(algo="pods", n_keep=5), dict(algo="pods", n_keep=20), dict(algo="reinforce_ada", n_keep=6),
    dict(algo="reinforce_ada", n_keep=20), dict(algo="dapo"),
], ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()))  # fmt: skip
def test_every_pattern_under_other_settings(changes):
    """All 1,022 patterns of 1 to 9 rollouts for each of 18 settings: 18,396."""
    assert sum(check_patterns(settings(**changes), n) for n in range(1, 10)) == 1022


def test_without_its_strategies_aero_is_grpo_skip():
    off = settings(rescue=False, posterior=False, rejection=False)
    for r in itertools.product([0.0, 1.0], repeat=8):
        ours, theirs = (aero.choose(r, s, np.random.default_rng(0)) for s in (off, settings("grpo_skip")))
        assert ours.kept.tolist() == theirs.kept.tolist() and ours.advantage.tolist() == theirs.advantage.tolist()


def test_figures_of_the_specification():
    rng, s = np.random.default_rng(0), settings()
    assert aero.choose(rewards(8, 0), s, rng).advantage == pytest.approx([1 / 3] * 4)           # 1/sqrt(8 + 1)
    assert aero.choose(rewards(0, 16), s, rng).advantage == pytest.approx([-1 / math.sqrt(17)] * 4)
    assert -1 / math.sqrt(17) == pytest.approx(-0.243, abs=5e-4)
    assert aero.choose(rewards(0, 16), settings(posterior_advantage="signed"), rng).advantage == pytest.approx([2 / 18 - 1] * 4)
    assert sorted(aero.choose(rewards(1, 9), s, rng).advantage) == [-1, 1]


def test_mean_advantage_is_largest_for_balanced_groups():
    """2 sqrt(c m) / (c + m): 1 for m = c and only there. Rejection with k = 1 reaches it for every 0 < u < 1/2."""
    rng = np.random.default_rng(0)
    for c, m in itertools.product(range(1, 17), repeat=2):
        mean = np.abs(aero.choose(rewards(c, m), settings("grpo"), rng).advantage).mean()
        assert mean == pytest.approx(2 * math.sqrt(c * m) / (c + m))
        assert (mean > 1 - 1e-9) == (c == m)
        if c < m:
            assert np.abs(aero.choose(rewards(c, m), settings(), rng).advantage).mean() == pytest.approx(1)


# ----------------------------------------------------------------------------------------------------------- rounds


def sizes_drawn(outcomes, s):
    """How many rollouts `first` and `more` have drawn after each round, if the problem's rollouts come out like this."""
    algo = aero.ALGORITHMS[s.algo]
    drawn = [algo.first(s)]
    while n := algo.more(outcomes[: drawn[-1]], s):
        drawn.append(drawn[-1] + n)
    return drawn


@pytest.mark.parametrize("changes", [
    dict(), dict(n_extra=3), dict(u_res=0.25), dict(rescue=False), dict(n_explore=16), dict(n_explore=1, n_extra=5),
    dict(algo="reinforce_ada", n_explore=4, n_extra=4, n_total=16), dict(algo="grpo"),
], ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()) or "default")  # fmt: skip
def test_rounds_of_every_pattern(changes):
    """Every one of the 65,536 outcomes of 16 rollouts (every 8th for other settings than aero's), against a plain loop."""
    s = settings(**changes)
    for number in range(0, 2**16, 8 if changes else 1):
        bits = [number >> i & 1 for i in range(15, -1, -1)]
        if s.algo == "grpo":
            wanted = [16]
        elif s.algo == "aero":
            wanted = [s.n_explore]
            explored = sum(bits[: s.n_explore]) / s.n_explore
            while s.rescue and explored <= s.u_res and sum(bits[s.n_explore : wanted[-1]]) == 0 and wanted[-1] < 16:
                wanted.append(min(16, wanted[-1] + s.n_extra))
        else:
            wanted = [4]
            while wanted[-1] < 16 and (bits[: wanted[-1]].count(1) < 2 or bits[: wanted[-1]].count(0) < 2):
                wanted.append(wanted[-1] + 4)
        assert sizes_drawn(np.array(bits, np.float64), s) == wanted, bits


def test_published_reinforce_ada():
    """Rounds of 8, at most 4 of them; stops at 2 right and 2 wrong, keeps 2 and 2; where one side is short, the other fills."""
    s, rng = settings("reinforce_ada"), np.random.default_rng(0)
    assert (s.n_explore, s.n_extra, s.n_total, s.n_keep) == (8, 8, 32, 4)
    for c, drawn in ((0, 32), (1, 32), (2, 8), (6, 8), (7, 32), (8, 32)):     # the later rounds bring more of the majority
        later = np.full(24, float(c > 4))
        assert sizes_drawn(np.concatenate([rewards(c, 8 - c), later]), s)[-1] == drawn
    for (c, w), kept in {(1, 31): (1, 3), (31, 1): (3, 1), (2, 6): (2, 2), (16, 16): (2, 2), (0, 32): (0, 0)}.items():
        chosen = aero.choose(rewards(c, w), s, rng)
        assert ((chosen.kept < c).sum(), (chosen.kept >= c).sum()) == kept
        assert chosen.advantage == pytest.approx([(i < c) - c / (c + w) for i in chosen.kept])


@pytest.mark.parametrize("changes, right, wrong, sets", [
    (dict(), 2, 8, 28),                                     # rejection: 2 of 8 wrong ones
    (dict(k=2), 2, 7, 35),                                  # 4 of 7
    (dict(n_same=3), 8, 0, 56),
    (dict(n_same=4), 0, 7, 35),
    (dict(algo="pods", n_keep=4), 3, 5, 3 * 10),            # ties inside both kinds
    (dict(algo="pods", n_keep=3), 3, 3, 2 * 9),             # a tie between 1 + 2 and 2 + 1 as well
    (dict(algo="reinforce_ada", n_keep=4), 3, 5, 3 * 10),
    (dict(algo="reinforce_ada", n_keep=4), 1, 7, 35),
    (dict(algo="mc_grpo"), 3, 6, 6),
])  # fmt: skip
def test_draws_are_uniform(changes, right, wrong, sets):
    """Chi-square over the kept sets, whole sets and not only single indices; the group is in shuffled order."""
    s, rng, n = settings(**changes), np.random.default_rng(11), 100 * sets
    r = np.random.default_rng(5).permutation(rewards(right, wrong))
    counts = collections.Counter(tuple(aero.choose(r, s, rng).kept) for _ in range(n))
    assert len(counts) == sets
    chi2 = sum((x - 100) ** 2 / 100 for x in counts.values())
    assert chi2 < sets - 1 + 3.5 * math.sqrt(2 * (sets - 1)), chi2      # df + 3.5 standard deviations
    again = np.random.default_rng(11)
    assert collections.Counter(tuple(aero.choose(r, s, again).kept) for _ in range(n)) == counts


# ---------------------------------------------------------------------------------------------------- other rewards

REAL = ("grpo", "grpo_skip", "drgrpo", "dapo", "pods", "mc_grpo", "maxrl")


@pytest.mark.parametrize("algo", REAL)
def test_rewards_that_are_not_binary(algo):
    """Distinct real rewards: a permutation of the group permutes what is kept; advantages against their definition."""
    s, rng = settings(algo, n_keep=4), np.random.default_rng(0)
    for n in (3, 5, 9):
        r = np.random.default_rng(n).random(n)
        kept, advantage = aero.choose(r, s, rng)
        order = np.random.default_rng(n + 1).permutation(n)
        other = aero.choose(r[order], s, rng)
        assert dict(zip(order[other.kept], other.advantage)) == pytest.approx(dict(zip(kept, advantage)), rel=1e-12)

        x, mean = r[kept].tolist(), math.fsum(r) / n
        middle = math.fsum(x) / len(x)
        std = math.sqrt(math.fsum((v - middle) ** 2 for v in x) / len(x))
        wanted = {"drgrpo": [v - mean for v in x], "maxrl": [(v - mean) / mean for v in x],
                  "mc_grpo": [v - sorted(r)[n // 2] for v in x]}.get(algo, [(v - middle) / std for v in x])
        assert advantage == pytest.approx(wanted, rel=1e-9, abs=1e-12)
        if algo == "pods":      # theorem 1 of 2504.13818 against all subsets
            best = max(itertools.combinations(range(n), min(4, n)), key=lambda subset: np.var(r[list(subset)]))
            assert kept.tolist() == list(best)
        assert len(kept) == {"pods": min(4, n), "mc_grpo": n - 1}.get(algo, n)


@pytest.mark.parametrize("algo", REAL)
def test_equal_rewards_are_flat_whatever_their_value(algo):
    """0.1 + 0.1 + 0.1 is not 3 x 0.1: the std of equal rewards is rounding error, and must not become an advantage."""
    for value in (0.1, 1 / 3, 0.7):
        for n in (1, 3, 7, 9):
            chosen = aero.choose(np.full(n, value), settings(algo, n_keep=4), np.random.default_rng(0))
            assert np.abs(chosen.advantage).max(initial=0) < 1e-15
            if algo in ("grpo_skip", "dapo"):
                assert len(chosen.kept) == 0


@pytest.mark.parametrize("algo, value", [
    *itertools.product(["aero", "reinforce_ada", "sign"], [0.5, -1.0, math.nan]), ("maxrl", -1.0), ("maxrl", math.nan),
    ("grpo", math.inf), ("pods", math.nan),
])  # fmt: skip
def test_rewards_are_refused_by_name(algo, value):
    with pytest.raises(ValueError, match=f"--algo {algo}: wanted rewards that are .*, found {value:g}") as error:
        aero.choose([0.0, value, 1.0], settings(algo), np.random.default_rng(0))
    assert "\n" not in str(error.value)


def test_results_do_not_alias_the_rewards():
    for algo in aero.ALGORITHMS:
        r = rewards(3, 6)
        for result in aero.choose(r, settings(algo, n_keep=4), np.random.default_rng(0)):
            assert not np.shares_memory(result, r)


def test_posterior_as_a_reward_would_teach_nothing():
    """
    A re-implementation wrote the posterior mean back as the group's reward and standardised afterwards: equal numbers, so
    zero. Here the advantage of a flat group is final.
    """
    r, s = rewards(0, 8), settings()
    u = (r.sum() + 1) / (len(r) + 2)
    assert not np.any(aero.standardise(np.full(8, u), np.full(8, u)))
    assert np.all(aero.choose(r, s, np.random.default_rng(0)).advantage < 0)


# --------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("changes, words", [
    (dict(algo="ppo"), "--algo ppo: wanted one of aero grpo"),
    (dict(rescue_budget="half"), "--rescue_budget half: wanted one of prompt pool"),
    (dict(posterior_advantage="z"), "--posterior_advantage z: wanted one of zscore signed"),
    (dict(adv_stats="all"), "--adv_stats all: wanted one of kept drawn"),
    (dict(loss_norm="mean"), "--loss_norm mean: wanted one of prompt token constant"),
    *((({name: 0}), f"--{name} 0: wanted 1 or more")
      for name in ("n_explore", "n_extra", "n_total", "n_keep", "n_same", "k", "n_reference")),
    (dict(prior_a=0.0), "--prior_a 0.0"), (dict(prior_b=-1.0), "--prior_b -1.0"),
    (dict(u_res=0.5), "--u_res 0.5"), (dict(u_res=-0.1), "--u_res -0.1"), (dict(u_res=math.nan), "--u_res nan"),
    (dict(refill_cap=-1), "--refill_cap -1"), (dict(clip_low=1.0), "--clip_low 1.0"), (dict(clip_high=0.0), "--clip_high 0.0"),
    (dict(n_explore=17), "--n_explore 17 is larger than --n_total 16"),
    (dict(algo="reinforce_ada", n_explore=33), "--n_explore 33 is larger than --n_total 32"),
    (dict(algo="pods", n_keep=65), "--n_keep 65: wanted 2 to --n_total 64"),
    (dict(algo="pods", n_keep=1), "--n_keep 1: wanted 2 to --n_total 64"),
    (dict(algo="reinforce_ada", n_keep=34), "--n_keep 34: wanted 2 to --n_total 32"),
    (dict(algo="reinforce_ada", n_keep=5), "--n_keep 5: wanted an even number"),
    (dict(algo="mc_grpo", n_total=8), "--n_total 8: wanted an odd number"),
    *((dict(algo=algo, n_total=1, n_explore=1), "--n_total 1: .* a group of one has no baseline")
      for algo in aero.ALGORITHMS if algo not in ("aero", "sign")),
], ids=lambda x: ",".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "")  # fmt: skip
def test_settings_that_contradict_each_other(changes, words):
    with pytest.raises(ValueError, match=words) as error:
        settings(**changes) if changes.get("algo") != "ppo" else aero.Settings(**changes).check()
    assert "\n" not in str(error.value)


def test_published_defaults():
    for algo in aero.ALGORITHMS:
        settings(algo)      # pass their own check
    s = settings("dapo")
    assert (s.n_total, s.clip_low, s.clip_high, s.loss_norm, s.refill_cap) == (16, 0.2, 0.28, "token", 10)
    s = settings()
    assert (s.n_explore, s.n_extra, s.n_total, s.u_res, s.k, s.prior_a, s.prior_b, s.n_same) == (8, 2, 16, 0, 1, 1, 1, 4)
    assert (s.rescue_budget, s.posterior_advantage, s.adv_stats, s.loss_norm) == ("prompt", "zscore", "kept", "prompt")
    assert [settings(a).n_total for a in ("grpo", "grpo_skip", "mc_grpo")] == [16, 8, 9]
    assert [a for a, x in aero.ALGORITHMS.items() if x.refill] == ["dapo"]
    assert aero.ALGORITHMS["dapo"][:4] == aero.ALGORITHMS["grpo_skip"][:4]


def test_deal():
    """Round-robin: n_extra each in order, the last one what is left; never more than there is."""
    assert doctest.testmod(aero).failed == 0
    for waiting, spare, n_extra in itertools.product(range(6), range(12), (1, 2, 5)):
        share = aero.deal(waiting, spare, settings(n_extra=n_extra, n_total=16))
        assert len(share) == waiting and sum(share) == min(spare, waiting * n_extra)
        assert share == sorted(share, reverse=True) and all(0 <= x <= n_extra for x in share)
    for n in (16, 17, 40):      # a group that the pool let grow past n_total asks for nothing by itself
        assert aero.ALGORITHMS["aero"].more(rewards(0, n), settings(rescue_budget="pool")) == 0


# --------------------------------------------------------------------------------------------------------- the loss


def test_token_weights_of_unequal_groups():
    group, length = [4, 9, 4, 4, 7], [3, 10, 1, 6, 2]
    loss = [[math.sin(10 * s + t) for t in range(n)] for s, n in enumerate(length)]     # any token losses

    def total(norm):
        weights = aero.token_weights(group, length, norm, 50)
        return sum(w * x for w, row in zip(weights, loss) for x in row)

    mean = [sum(row) / len(row) for row in loss]
    assert total("prompt") == pytest.approx(((mean[0] + mean[2] + mean[3]) / 3 + mean[1] + mean[4]) / 3)
    assert total("token") == pytest.approx(sum(map(sum, loss)) / 22)
    assert total("constant") == pytest.approx(sum(map(sum, loss)) / (50 * 5))


def test_pruning_changes_a_problem_s_share_of_the_gradient():
    """Equal lengths, one problem of many with 1 right and 7 wrong, pruned to 1 + 1: 0.38 under `token`, 1.51 under `prompt`."""
    others, length = 999, 8

    def share(pruned, norm):
        s = settings("aero" if pruned else "grpo")
        sizes, advantages = [], []
        for r in [rewards(1, 7)] + [rewards(4, 4)] * others:
            chosen = aero.choose(r, s, np.random.default_rng(0))
            sizes.append(len(chosen.kept))
            advantages.append(np.abs(chosen.advantage))
        weights = aero.token_weights(np.repeat(np.arange(others + 1), sizes), [length] * sum(sizes), norm, 100)
        pull = weights * length * np.concatenate(advantages)
        return pull[: sizes[0]].sum() / pull.sum()

    assert share(True, "token") / share(False, "token") == pytest.approx(0.38, abs=5e-3)
    assert share(True, "prompt") / share(False, "prompt") == pytest.approx(1.51, abs=5e-3)


def test_policy_loss_by_hand():
    """Six tokens: ratio 1, above and below the clip, for either sign. Gradients are zero just where the clip holds."""
    ratio = torch.tensor([1.0, 1.5, 0.5, 1.0, 1.5, 0.5], dtype=torch.float64)
    adv = torch.tensor([2.0, 2.0, 2.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    weight = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=torch.float64)
    behaviour = torch.tensor([-1.0, -0.2, -3.0, -0.7, -2.0, -0.1], dtype=torch.float64)
    logp = (behaviour + ratio.log()).requires_grad_()
    loss, clipped, mean = aero.policy_loss(logp, behaviour, adv, weight, 0.2, 0.28)
    loss.backward()
    gains = [2 * 1.0, 2 * 1.28, 2 * 0.5, -1.0, -1.5, -0.8]
    assert loss.item() == pytest.approx(-sum(w * g for w, g in zip(weight.tolist(), gains)))
    wanted = [-0.1 * 2, 0, -0.3 * 2 * 0.5, 0.4, 0.5 * 1.5, 0]       # d loss / d logp = -weight adv ratio
    assert logp.grad.tolist() == pytest.approx(wanted)
    assert clipped.item() == pytest.approx(0.2 + 0.6)
    assert mean.item() == pytest.approx((weight * ratio).sum().item())


def test_loss_of_parts_is_loss_of_whole():
    """Weights are counted once, so any cut of the batch into micro-batches or ranks has the same gradient in sum."""
    generator = torch.Generator().manual_seed(0)
    group, length = [0, 0, 1, 2, 2, 2], [3, 5, 2, 7, 1, 4]
    weight = torch.tensor(aero.token_weights(group, length, "prompt", 9)).repeat_interleave(torch.tensor(length))
    logp, adv = (torch.randn(22, generator=generator, dtype=torch.float64) for _ in range(2))
    behaviour = logp + torch.randn(22, generator=generator, dtype=torch.float64) / 4
    gradients = []
    for cut in ([22], [3, 19], [8, 2, 12], [1] * 22):
        x = logp.clone().requires_grad_()
        parts = zip(*(v.split(cut) for v in (x, behaviour, adv, weight)))
        sum(aero.policy_loss(*part, 0.2, 0.2)[0] for part in parts).backward()
        gradients.append(x.grad)
    assert all(torch.equal(g, gradients[0]) for g in gradients)


# ------------------------------------------------------------------------------------- through training, on a tiny model

V, EOS = 16, 0


def group(place, outcomes, truncated=(), seed=0):
    """A finished group of one problem: random responses that end in EOS, graded."""
    rng = np.random.default_rng([seed, place])
    g = train.Group(place, data.Problem(place, (3, 1 + place, 5), "", "", ""))
    for request in g.ask(len(outcomes), 20):
        tokens = [*rng.integers(0, V, rng.integers(1, 9)).tolist(), EOS]
        i = request.index
        g.rollouts[i] = Rollout(place, i, request.prompt, tokens, [-2.5] * len(tokens), i in truncated)
        g.verdicts[i] = Verdict(float(outcomes[i]), None, "none", "wrong")
    return g


@pytest.fixture
def tiny(monkeypatch):
    """() -> (model, optimizer) on one rank, always the same; sharded as in training."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model_cfg = ModelConfig.from_dict(dict(
        model_type="qwen2", vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, rms_norm_eps=1e-6, tie_word_embeddings=True, eos_token_id=EOS,
    ))  # fmt: skip

    def make(cfg):
        torch.manual_seed(0)
        with torch.no_grad():
            model = Model(model_cfg).init_weights(0.2)
        learner.shard(model, cfg, torch.device("cpu"))
        return model, learner.make_optimizer(model, cfg)

    yield make
    dist.destroy_process_group()


def learn(tiny, groups, rank=0, world=1, **changes):
    """choose and update. Returns (metrics, parameters before, after, log-prob of the trained tokens before, after)."""
    cfg = train.Config(**{"lr": 1e-2, "max_new": 20, "algo": "aero"} | changes)
    model, optimizer = tiny(cfg)
    batch, _ = train.choose(groups, 0, cfg)
    t = learner.packed(batch, [1.0] * len(batch), "cpu")

    def look():     # parameters first: a forward pass without backward leaves them gathered
        parameters = torch.cat([p.detach().full_tensor().flatten() for p in model.parameters()])
        with torch.no_grad():
            logp_R, _ = model(t["ids_T"], t["cu"], t["max_len"], t["targets_R"], t["rows_R"])
        return parameters, logp_R.mean().item()

    before, logp_before = look()
    metrics = train.update(model, optimizer, batch, cfg.lr, cfg, rank, world, torch.device("cpu"))
    after, logp_after = look()
    return metrics, before, after, logp_before, logp_after


@pytest.mark.parametrize("right", [True, False])
def test_flat_groups_are_learned_from(tiny, right):
    """A batch of flat groups alone: aero raises what was right and lowers what was wrong; grpo leaves every bit in place."""
    groups = [group(place, [right] * n) for place, n in enumerate((8, 16, 8))]
    metrics, before, after, logp_before, logp_after = learn(tiny, groups)
    assert metrics["optim/grad_norm"] > 1e-3 and not torch.equal(before, after)
    assert (logp_after > logp_before) == right
    metrics, before, after, _, _ = learn(tiny, groups, algo="grpo")
    assert metrics["optim/grad_norm"] == 0 and torch.equal(before, after)
    for algo in ("grpo_skip", "dapo", "reinforce_ada"):
        assert train.choose(groups, 0, train.Config(algo=algo))[0] == []
    assert train.choose(groups, 0, train.Config(algo="aero", posterior=False))[0] == []


def test_rank_with_nothing_takes_part(tiny):
    """One rollout for two ranks: both get one micro-batch, the second with weight zero and a gradient of zero."""
    one = [group(0, [1])]
    lengths = [len(x.prompt) + len(x.tokens) for x in train.choose(one, 0, train.Config())[0]]
    assert learner.pack(lengths, lengths, 2, 100) == [[[0]], [[]]]
    metrics, before, after, _, _ = learn(tiny, one, rank=0, world=2)
    assert metrics["optim/grad_norm"] > 0 and not torch.equal(before, after)
    # alone, this rank would divide by the trained weight of all ranks, of which it has none: only the weights are looked at
    cfg = train.Config(lr=1e-2, max_new=20)
    model, _ = tiny(cfg)
    batch, _ = train.choose(one, 0, cfg)
    t = learner.packed([batch[0]], [0.0], "cpu")
    logp_R, _ = model(t["ids_T"], t["cu"], t["max_len"], t["targets_R"], t["rows_R"])
    aero.policy_loss(logp_R, logp_R.detach(), t["adv_R"], t["weight_R"], 0.2, 0.2)[0].backward()
    assert all(not p.grad.full_tensor().any() for p in model.parameters())      # there, and zero


def test_truncated_is_wrong_and_trained():
    """All 8 say the right answer, 2 are cut: 6 of 8 are right, the 2 are kept, with their tokens, and pushed down."""
    g = group(0, [1] * 8, truncated=(2, 5))
    assert g.rewards.tolist() == [1, 1, 0, 1, 1, 0, 1, 1]
    batch, (record,) = train.choose([g], 0, train.Config())
    assert record["kept"] == list(range(8)) and sum(record["truncated"]) == 2
    assert batch[2].advantage == batch[5].advantage == pytest.approx(-math.sqrt(3)) and batch[2].tokens == g.rollouts[2].tokens


# ------------------------------------------------------------------------------------------------------ what it costs

DISTRIBUTIONS = {   # success rates of problems: Beta(a, b), and the share of problems that are never right
    "uniform": (1, 1, 0), "U-shaped": (0.5, 0.5, 0), "hard": (0.5, 1.5, 0), "easy": (1.5, 0.5, 0),
    "a third hopeless": (0.5, 1.5, 1 / 3),
}  # fmt: skip


def leaves(s):
    """(number of orders, rewards) for all ways in which the rounds of a group can go; inside a round only counts matter."""
    algo, open_groups = aero.ALGORITHMS[s.algo], [(1, np.zeros(0), aero.ALGORITHMS[s.algo].first(s))]
    while open_groups:
        orders, r, n = open_groups.pop()
        for c in range(n + 1):
            grown = np.concatenate([r, rewards(c, n - c)])
            further = algo.more(grown, s)
            if further:
                open_groups.append((orders * math.comb(n, c), grown, further))
            else:
                yield orders * math.comb(n, c), grown


def expected_cost(s, a, b, hopeless):
    """Generation 2 and training 6 units per rollout, exactly: E[p^c (1-p)^w] under Beta(a, b) is B(a+c, b+w) / B(a, b)."""
    def log_beta(x, y):
        return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)
    rng, total, mass = np.random.default_rng(0), 0.0, 0.0
    for orders, r in leaves(s):
        c, w = r.sum(), len(r) - r.sum()
        chance = (1 - hopeless) * orders * math.exp(log_beta(a + c, b + w) - log_beta(a, b)) + hopeless * (c == 0)
        total += chance * (2 * len(r) + 6 * len(aero.choose(r, s, rng).kept))
        mass += chance
    assert mass == pytest.approx(1)
    return total


def test_cost_table():
    """
    Against grpo at 16 rollouts aero saves about 60 %; against grpo_skip at 8 it costs from 3 % less to 14 % more (first four
    rows). Where a third of the problems is never right it costs 44 % more: grpo_skip trains on nothing there, aero draws 16
    rollouts and trains on 4. `pytest -s` prints the table.
    """
    algos = [settings(algo) for algo in ("aero", "grpo", "grpo_skip")]
    rows = {name: [expected_cost(s, *d) for s in algos] for name, d in DISTRIBUTIONS.items()}
    print("\nunits per problem    aero  grpo 16  grpo_skip 8   against grpo   against grpo_skip")
    for name, (ours, grpo, skip) in rows.items():
        print(f"{name:18} {ours:6.1f} {grpo:8.1f} {skip:12.1f} {ours / grpo - 1:14.1%} {ours / skip - 1:+19.1%}")
    saved = {name: 1 - ours / grpo for name, (ours, grpo, _) in rows.items()}
    against_skip = {name: ours / skip - 1 for name, (ours, _, skip) in rows.items()}
    assert all(0.59 < x < 0.63 for x in saved.values()), saved
    first_four = list(against_skip.values())[:4]
    assert min(first_four) == pytest.approx(-0.03, abs=0.01) and max(first_four) == pytest.approx(0.14, abs=0.01), against_skip
    assert against_skip["a third hopeless"] == pytest.approx(0.44, abs=0.01)


@pytest.mark.parametrize("algo", ["aero", "grpo_skip"])
def test_cost_by_simulation(algo):
    """4,000 problems of each distribution through first, more and choose: the same as the exact expectation."""
    s, hooks = settings(algo), aero.ALGORITHMS[algo]
    for number, (a, b, hopeless) in enumerate(DISTRIBUTIONS.values()):
        rng = np.random.default_rng([2, number])
        costs = []
        for p in rng.beta(a, b, 4000) * (rng.random(4000) >= hopeless):
            r = (rng.random(hooks.first(s)) < p).astype(float)
            while n := hooks.more(r, s):
                r = np.concatenate([r, rng.random(n) < p])
            costs.append(2 * len(r) + 6 * len(aero.choose(r, s, rng).kept))
        error = np.std(costs) / math.sqrt(len(costs))
        assert abs(np.mean(costs) - expected_cost(s, a, b, hopeless)) < 4 * error


# ------------------------------------------------------------------------------------------------- streaming and rounds

COUNT = 12      # problems of the fake data set, from never right to always right


def outcome(problem, place, index, max_new):
    """(right, length) of a rollout, a pure function as with the real sampler. Right ones are short, wrong ones long."""
    rng = np.random.default_rng([3, place, index])
    right = rng.random() < (problem / (COUNT - 1)) ** 2
    return right, int(min(max_new, rng.integers(1, 4) if right else rng.integers(2, 40)))


class FakeSampler:
    """`slots` rollouts in flight, one token each per step; what ends in the same step comes back in scrambled order."""

    def __init__(self, slots, log):
        self.slots, self.log, self.queue, self.active, self.rng = slots, log, [], [], np.random.default_rng(slots)

    @property
    def busy(self):
        return bool(self.queue or self.active)

    def add(self, requests):
        for q in requests:
            self.log.append(("asked", q.problem, q.index))
            self.queue.append(q)

    def step(self):
        while self.queue and len(self.active) < self.slots:
            q = self.queue.pop(0)
            right, length = outcome(q.prompt[0], q.problem, q.index, q.max_new)
            rollout = Rollout(q.problem, q.index, q.prompt, [int(right)] * length, [0.0] * length, length == q.max_new)
            self.active.append([length, rollout])
        for entry in self.active:
            entry[0] -= 1
        done = [rollout for left, rollout in self.active if left == 0]
        self.active = [entry for entry in self.active if entry[0]]
        return [done[i] for i in self.rng.permutation(len(done))]


class FakeGrader:
    """Verdicts come 0 to `delay` polls later, in any order."""

    def __init__(self, delay, log):
        self.delay, self.log, self.jobs, self.rng = delay, log, [], np.random.default_rng(delay)

    @property
    def pending(self):
        return len(self.jobs)

    def submit(self, key, response, gold):
        self.jobs.append([self.rng.integers(0, self.delay + 1), key, float(response == gold)])

    def poll(self):
        ready = [job for job in self.jobs if job[0] == 0]
        self.jobs = [[left - 1, *rest] for left, *rest in self.jobs if left]
        self.log += [("graded", *key) for _, key, _ in ready]
        return [(ready[i][1], Verdict(ready[i][2], None, "none", "wrong")) for i in self.rng.permutation(len(ready))]

    def wait(self, timeout_s):
        while not (found := self.poll()):
            pass
        return found


TOKENIZER = SimpleNamespace(decode=lambda tokens, skip_special_tokens: "right" if tokens[0] else "wrong")
PROBLEMS = [data.Problem(i, (i,), "right", "", "") for i in range(COUNT)]


def run_step(cfg, slots=16, delay=3, rank=0, world=1, stop=None):
    """One step's sampling: (groups, new cursor, log of what was asked and graded)."""
    log, stop = [], stop or SimpleNamespace(asked=False)
    sampler, grader = FakeSampler(slots, log), FakeGrader(delay, log)

    def draw_all(requests, groups):
        return train.draw(requests, groups, cfg, sampler, grader, TOKENIZER, stop)

    groups, cursor, waited = train.collect(5, PROBLEMS, cfg, rank, world, draw_all, stop)
    assert stop.asked or not (sampler.busy or grader.pending)
    assert waited >= 0
    return groups, cursor, log


def drawn(groups, cfg):
    """All that training may depend on: for each place the problem, rounds, rewards, lengths, and what is kept."""
    batch, records = train.choose(groups, 4, cfg)
    kept = collections.defaultdict(list)
    for x in batch:
        kept[x.place].append((x.advantage, x.tokens))
    return {r["place"]: (g.problem.id, g.rounds, g.rewards.tolist(), r["lengths"], r["kept"], kept[g.place])
            for g, r in zip(groups, records)}


def config(algo="aero", **changes):
    return train.Config(**dict(algo=algo, problems=COUNT, max_new=30) | aero.ALGORITHMS[algo].defaults | changes)


@pytest.fixture
def ranks(monkeypatch):
    """(cfg, world) -> all ranks' groups; ranks are threads, and gather waits for all of them: a missing one fails the test."""
    monkeypatch.setattr(train, "gather", lambda x: [x])

    def run(cfg, world, **options):
        local, parts, barrier = threading.local(), [None] * world, threading.Barrier(world, timeout=20)
        results = [None] * world

        def gather(x):
            parts[local.rank] = x
            barrier.wait()
            found = list(parts)
            barrier.wait()
            return found

        def of_rank(rank):
            local.rank = rank
            results[rank] = run_step(cfg, rank=rank, world=world, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "gather", gather)
            threads = [threading.Thread(target=of_rank, args=(rank,)) for rank in range(world)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len({cursor for _, cursor, _ in results}) == 1
        return sorted(itertools.chain(*(groups for groups, _, _ in results)), key=lambda g: g.place)

    return run


def one_by_one(cfg):
    """The rounds of each place by the plainest loop: one problem after the other, and for the pool, round after round."""
    algo, found = aero.ALGORITHMS[cfg.algo], {}
    for place in range(cfg.problems):
        problem = data.nth(COUNT, cfg.seed, 5 + place)

        def rewards_of(n, place=place, problem=problem):
            all_of = (outcome(problem, place, i, cfg.max_new) for i in range(n))
            return np.array([float(right and length < cfg.max_new) for right, length in all_of])

        rounds = [0] * algo.first(cfg)
        while cfg.rescue_budget == "prompt" and (n := algo.more(rewards_of(len(rounds)), cfg)):
            rounds += [rounds[-1] + 1] * n
        found[place] = rounds, rewards_of
    spare = cfg.problems * (cfg.n_total - cfg.n_explore)
    while cfg.rescue_budget == "pool" and spare:
        waiting = [place for place, (rounds, rewards_of) in found.items() if not rewards_of(len(rounds)).any()]
        for place in waiting:
            rounds, n = found[place][0], min(spare, cfg.n_extra)
            rounds += [rounds[-1] + 1] * n
            spare -= n
        if not waiting:
            break
    return {place: (rounds, rewards_of(len(rounds)).tolist()) for place, (rounds, rewards_of) in found.items()}


STREAMED = [dict(), dict(rescue_budget="pool"), dict(algo="reinforce_ada"), dict(u_res=0.2), dict(n_extra=1)]


@pytest.mark.parametrize("changes", STREAMED, ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()) or "default")
def test_streaming_draws_what_a_barrier_draws(ranks, changes):
    """
    Lengths tell right from wrong here, so a decision on half a round would show. Streamed or with a barrier after every
    round, for any number of slots, slow or fast graders, one rank or three: the same rollouts, kept with the same advantages,
    and those that the plainest loop draws.
    """
    cfg, barrier = config(**changes), config(**changes, rescue_barrier=True)
    groups, cursor, log = run_step(cfg)
    wanted = drawn(groups, cfg)
    assert {place: x[1:3] for place, x in wanted.items()} == one_by_one(cfg) and cursor == 5 + COUNT
    assert any(max(g.rounds) > 0 for g in groups)
    for options in (dict(slots=1, delay=0), dict(slots=3, delay=9), dict(slots=1000, delay=0)):
        assert drawn(run_step(cfg, **options)[0], cfg) == wanted
        assert drawn(run_step(barrier, **options)[0], barrier) == wanted
    for world in (2, 3, COUNT + 1):
        assert drawn(ranks(cfg, world), cfg) == wanted
        assert drawn(ranks(barrier, world), barrier) == wanted

    # It does stream: a problem's second round is asked for while others wait for their first. With the barrier it is not.
    def overtakes(log):
        first = {("graded", g.place, i) for g in groups for i, number in enumerate(g.rounds) if number == 0}
        later = {("asked", g.place, i) for g in groups for i, number in enumerate(g.rounds) if number == 1}
        return min(log.index(x) for x in later) < max(log.index(x) for x in first)

    assert overtakes(log) and not overtakes(run_step(barrier)[2])


@pytest.mark.parametrize("changes", STREAMED, ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()) or "default")
def test_decisions_are_taken_on_whole_rounds(ranks, monkeypatch, changes):
    """Whatever a problem was asked for is graded before `more` sees it, in the order asked, once per round."""
    cfg, seen, algo = config(**changes), [], aero.ALGORITHMS[changes.get("algo", "aero")]

    def more(r, s):
        seen.append(r.tolist())
        return algo.more(r, s)

    monkeypatch.setitem(aero.ALGORITHMS, cfg.algo, algo._replace(more=more))
    groups, _, _ = run_step(cfg, slots=5, delay=6)
    wanted = [g.rewards[np.array(g.rounds) <= k].tolist() for g in groups for k in range(max(g.rounds) + 1)]
    assert sorted(seen) == sorted(wanted)


def test_half_a_round_would_favour_short_answers(monkeypatch):
    """The comparison has teeth: with one verdict of a round still out, other rollouts are drawn than by the plain loop."""
    graded = property(lambda g: np.array([g.verdicts[i].score for i in sorted(g.verdicts)]))
    whole = {g.place: len(g.rounds) for g in run_step(config())[0]}
    monkeypatch.setattr(train.Group, "complete", property(lambda g: len(g.verdicts) >= len(g.rounds) - 1))
    monkeypatch.setattr(train.Group, "rewards", graded)
    assert {g.place: len(g.rounds) for g in run_step(config(), slots=4)[0]} != whole


@pytest.mark.parametrize("n_extra", [1, 2, 3, 5])
def test_rescue_budgets(ranks, n_extra):
    """
    prompt: a group grows to n_total exactly, if nothing is right. pool: the step draws n_total per problem at most, and
    exactly that many while a problem is without success; the problems that wait are dealt to evenly.
    """
    for g in run_step(config(n_extra=n_extra))[0]:
        assert len(g.rounds) <= 16 and (len(g.rounds) == 16 or g.rewards.any())
        assert np.diff(g.rounds).max() <= 1 and max(collections.Counter(g.rounds).values()) == 8
    groups, _, _ = run_step(config(n_extra=n_extra, rescue_budget="pool"))
    waiting = [len(g.rounds) for g in groups if not g.rewards.any()]
    assert waiting, "the fake data need a problem that is never right"
    assert sum(len(g.rounds) for g in groups) == COUNT * 16 and max(waiting) > 16
    assert max(waiting) - min(waiting) <= 2 * n_extra
    for g in groups:
        if g.rewards.any():     # what came after the round that succeeded: nothing
            assert g.rewards[: 8].any() or not g.rewards[np.array(g.rounds) < max(g.rounds)].any()


def test_refill_replaces_flat_groups(ranks):
    cfg = config("dapo", problems=8)
    groups, cursor, _ = run_step(cfg)
    mixed = [g for g in groups if not aero.is_flat(g.rewards)]
    assert len(mixed) == 8 < len(groups) and cursor == 5 + len(groups)
    assert [g.place for g in groups] == list(range(len(groups)))
    assert {x.place for x in train.choose(groups, 0, cfg)[0]} == {g.place for g in mixed}
    for world in (2, 3):
        assert drawn(ranks(cfg, world), cfg) == drawn(groups, cfg)


def test_refill_stops_at_its_cap(ranks, monkeypatch):
    """Nothing is ever right: the refills end, the batch is empty and the run goes on."""
    monkeypatch.setattr(train, "draw", draw := count_calls(train.draw))
    monkeypatch.setitem(globals(), "outcome", lambda problem, place, index, max_new: (False, 3))
    for cap in (0, 1, 10):
        draw.calls = 0
        cfg = config("dapo", problems=4, refill_cap=cap)
        groups, cursor, _ = run_step(cfg)
        assert len(groups) == 4 * (cap + 1) and cursor == 5 + len(groups) and draw.calls == cap + 1
        assert train.choose(groups, 0, cfg)[0] == []


def count_calls(function):
    def counted(*arguments):
        counted.calls += 1
        return function(*arguments)
    counted.calls = 0
    return counted


@pytest.mark.parametrize("changes", [dict(), dict(rescue_budget="pool"), dict(algo="dapo"), dict(rescue_barrier=True)],
                         ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()) or "default")  # fmt: skip
def test_a_signal_ends_sampling_in_the_middle(ranks, changes):
    """Groups are incomplete then and are not looked at: the step is drawn again after the resumption."""
    for after in (0, 1, 7, 60):
        class Stop:
            left = after

            @property
            def asked(self):
                self.left -= 1
                return self.left < 0

        run_step(config(**changes), stop=Stop())
