"""metrics.py: numbers of a step by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import metrics
from metrics import Clock, GroupRecord, Totals, count_flops, describe, prompt_flops, response_flops

# 2 per matrix parameter: block 4 x 4 x 4 + 3 x 4 x 8 = 160, head 4 x 10; 4 L H E = 16 per key
MODEL = SimpleNamespace(
    hidden_size=4,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=2,
    intermediate_size=8,
    vocab_size=10,
    num_hidden_layers=1,
)


def settings(**changes):
    usual = dict(problems=2, n_reference=4, updates_per_batch=1, checkpoint_activations=False)
    return SimpleNamespace(**usual | changes)


def record(rewards, kept=(), rounds=None, **changes):
    n = len(rewards)
    usual = dict(
        place=0,
        problem=7,
        prompt=3,
        rewards=rewards,
        rounds=rounds or [0] * n,
        kept=list(kept),
        advantage=[1.0] * len(kept),
        lengths=[2] * n,
        truncated=[False] * n,
        reasons=["right" if reward > 0 else "wrong" for reward in rewards],
    )
    return GroupRecord(**usual | changes)


def test_flops_by_hand():
    assert prompt_flops(MODEL, 3) == 2 * 160 * 3 + 16 * (1 + 2 + 3)  # no head
    one, two = 2 * 200 + 16 * 4, 2 * 2 * 200 + 16 * (4 + 5)  # a prompt of 3: keys 4, then 5
    assert response_flops(MODEL, 3, [1]) == one and response_flops(MODEL, 3, [2, 1]) == two + one
    prompt = prompt_flops(MODEL, 3)
    flops = count_flops(MODEL, [record([1.0, 0.0], kept=[1])], settings(problems=1))
    reference = prompt + 4 * (two + 3 * (prompt + two))
    assert flops == (prompt + 2 * two, 3 * (prompt + two), reference)


def test_a_refill_is_not_the_work_of_the_reference():
    """Of three groups for two problems, the reference has two, at their mean cost."""
    groups = [record([0.0, 1.0], kept=[0])] * 3
    twice = settings(updates_per_batch=2, checkpoint_activations=True)
    rollout, train, reference = count_flops(MODEL, groups, twice)
    single = count_flops(MODEL, groups[:1], settings(problems=1))
    assert (rollout, train) == (3 * single.rollout, 3 * single.train * 2 * 4 / 3)
    both = count_flops(MODEL, groups[:2], twice)
    assert reference == pytest.approx(both.reference)


def test_describe():
    """One group of each kind: all right, all wrong, rescued in its second round, mixed."""
    groups = [
        record([1.0, 1.0], kept=[0]),
        record([0.0, 0.0], reasons=["wrong", "unparsed"], truncated=[True, False]),
        record([0.0, 0.0, 1.0], rounds=[0, 0, 1], kept=[0, 2], lengths=[4, 2, 2]),
        record([1.0, 0.0], kept=[0, 1], reasons=["right", "timeout"]),
    ]
    totals = Totals()
    row = describe(groups, MODEL, settings(updates_per_batch=2), totals)
    assert row["reward/mean"] == pytest.approx(4 / 9)
    assert row["reward/unparsed_frac"] == row["reward/timeout_frac"] == 1 / 9
    assert row["reward/limit_frac"] == row["reward/crash_frac"] == 0
    assert row["group/flat_frac"] == 0.75 and row["group/all_right_frac"] == 0.25
    assert row["group/all_wrong_frac"] == 0.5 and row["group/rescued_frac"] == 0.25
    assert row["group/success"] == [1, 0, pytest.approx(1 / 3), 0.5]
    assert (row["rollout/drawn"], row["rollout/kept"], row["rollout/trained"]) == (9, 5, 10)
    assert (row["rollout/tokens"], row["rollout/trained_tokens"]) == (20, 2 * 12)
    assert row["response_length/max"] == 4 and row["response_length/truncated_frac"] == 1 / 9
    assert (totals.drawn, totals.trained, totals.tokens) == (9, 10, 20)
    saved = row["compute/saved_frac"]
    assert saved == totals.saved_frac == 1 - totals.flops / totals.reference_flops
    describe(groups, MODEL, settings(updates_per_batch=2), totals)
    assert totals.drawn == 18 and totals.saved_frac == pytest.approx(saved)


def test_rewards_other_than_0_and_1():
    """Right is a reward above 0: a length penalty below 1, or a wrong answer below 0, was neither
    right nor wrong."""
    groups = [record([0.9, 0.7]), record([-0.1, -0.3]), record([-0.1, 0.0, 0.4], rounds=[0, 0, 1])]
    row = describe(groups, MODEL, settings(), Totals())
    assert row["group/all_right_frac"] == pytest.approx(1 / 3)
    assert row["group/all_wrong_frac"] == pytest.approx(2 / 3)
    assert row["group/rescued_frac"] == pytest.approx(1 / 3) and row["group/flat_frac"] == 0
    assert row["group/success"] == [1, 0, pytest.approx(1 / 3)]
    assert row["reward/mean"] == pytest.approx(np.mean([0.9, 0.7, -0.1, -0.3, -0.1, 0.0, 0.4]))


def test_the_parts_of_a_step_sum_to_it(monkeypatch):
    """Seconds in which only graders were waited for were decoding until they are moved."""
    times = iter([10.0, 13.0, 14.0, 20.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(times))
    clock = Clock(torch.device("cpu"))
    clock.phase("rollout")
    clock.move(2.0, "rollout", "reward")
    clock.phase("update")
    seconds = clock.read()
    assert seconds.pop("time/step") == 10.0 == sum(seconds.values())
    assert seconds["time/rollout"] == 1.0 and seconds["time/reward"] == 2.0
    assert seconds["time/update"] == 1.0 and seconds["time/other"] == 6.0


def test_speeds():
    step = {
        "time/rollout": 3.0,
        "time/reward": 1.0,
        "time/update": 2.0,
        "rollout/tokens": 8,
        "rollout/trained_tokens": 6,
    }
    rates = metrics.speeds(step, settings(), torch.device("cpu"), world=1)
    assert rates == {"perf/gen_tokens_per_s": 2.0, "perf/train_tokens_per_s": 3.0}
