"""plan.py: the rules of the formulas, measured peaks, and what is refused."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

import aero
from config import Config
from hf import config_from_dict
from plan import RESERVE, advise, must_fit, plan, plan_memory

SHAPE = config_from_dict(
    dict(
        model_type="qwen2",
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
)


def test_plan():
    """12 bytes of state per parameter and shard, 4 of gradient; what is sent by the rules of
    rings."""
    N, cfg = 1_543_714_304, Config(micro_tokens=16384)
    one, eight, nodes = (plan(SHAPE, cfg, world, min(world, 8), 1e9, 640) for world in (1, 8, 64))
    assert one.memory["weights and optimizer"] == 12 * N and one.memory["gradients"] == 4 * N
    assert one.memory["sampler"] == 2 * N + 1e9 and sum(one.traffic.values()) == 0
    assert (
        eight.memory["weights and optimizer"] == 12 * N / 8 == nodes.memory["weights and optimizer"]
    )
    assert eight.traffic == {
        "all-gather": 2 * N * 7 / 8,
        "reduce-scatter": 4 * N * 7 / 8,
        "all-reduce": 0,
        "weights to the sampler": 2 * N * 7 / 8,
    }
    assert nodes.traffic == eight.traffic | {"all-reduce": 2 * 4 * N / 8 * 7 / 8}
    world = plan(
        SHAPE, dataclasses.replace(cfg, shard="world", reshard=True), 64, 8, 0, 640, tokens=65536
    )
    assert (
        world.memory["weights and optimizer"] == 12 * N / 64
        and world.memory["gradients"] < one.memory["gradients"] / 3
    )
    assert world.traffic["all-gather"] == 2 * 4 * 2 * N * 63 / 64
    for change in (dict(compile=True), dict(checkpoint_activations=True), dict(micro_tokens=8192)):
        less = plan(SHAPE, dataclasses.replace(cfg, **change), 1, 1, 1e9, 640)
        assert less.memory["activations"] < one.memory["activations"]


MEASURED = [
    (dict(micro_tokens=16640), 1, 1, 71.15),
    (dict(micro_tokens=33280, compile=True), 1, 1, 94.08),
    (dict(micro_tokens=40960, compile=True), 1, 1, 110.14),
    (dict(micro_tokens=14080, compile=True), 2, 2, 50.16),
    (dict(micro_tokens=14080, compile=True), 2, 1, 58.77),
    (dict(micro_tokens=14080, compile=True, reshard=True), 2, 2, 44.94),
    (dict(micro_tokens=27520, compile=True, checkpoint_activations=True), 1, 1, 33.94),
]


@pytest.mark.parametrize("changes, world, node, gib", MEASURED, ids=str)
def test_plan_is_what_was_measured(changes, world, node, gib):
    planned = plan(SHAPE, Config(**changes), world, node, 0, 640, 163_840 // world).memory
    planned.pop("sampler")
    # What is there at the same time is less sharp where blocks free what they held.
    close = 0.05 if "reshard" in changes or "checkpoint_activations" in changes else 0.015
    assert sum(planned.values()) / 2**30 == pytest.approx(gib, rel=close)


def test_what_does_not_fit_is_refused_with_what_to_change():
    cfg, sizes = Config(micro_tokens=16384), (1, 1, 20 * 2**30, 4096)
    assert must_fit(140 * 2**30, SHAPE, cfg, *sizes) == plan(SHAPE, cfg, *sizes)
    with pytest.raises(
        MemoryError,
        match=r"GiB per GPU .* does not fit into 75 GiB: it would with --checkpoint_activations "
        r"True$",
    ):
        must_fit(80 * 2**30, SHAPE, cfg, *sizes)
    with pytest.raises(MemoryError, match=r"even with .*wanted more GPUs, a smaller cache"):
        must_fit(40 * 2**30, SHAPE, cfg, *sizes)
    changes, _ = advise(44 * 2**30, SHAPE, cfg, 64, 8, 20 * 2**30, 4096)
    assert changes == dict(checkpoint_activations=True, reshard=True)


@pytest.mark.parametrize("reshard", [False, True])
def test_a_frozen_reference_is_counted(monkeypatch, reshard):
    """2 bytes of a parameter over the shards, and what is gathered; nothing else changes."""
    monkeypatch.setitem(aero.LOSSES, "kl", aero.Loss(aero.clipped_loss, needs_reference=True))
    cfg, N = Config(micro_tokens=16384, reshard=reshard), 1_543_714_304
    sizes = (8, 8, 0, 640, 65536)
    without = plan(SHAPE, cfg, *sizes)
    frozen = plan(SHAPE, dataclasses.replace(cfg, loss="kl"), *sizes)
    extra = frozen.memory.pop("reference")
    assert frozen.memory == without.memory
    assert extra == 2 * N / 8 + without.memory["gathered weights"]
    more = frozen.traffic["all-gather"] / without.traffic["all-gather"]
    assert more == pytest.approx(1.5 if reshard else 1)
    wide = plan(SHAPE, dataclasses.replace(cfg, loss="kl"), *sizes, bf16=False)
    assert wide.memory["reference"] == 2 * extra


def test_the_cache_of_a_run(monkeypatch):
    """On a CPU the slots are filled, or --kv_gib holds; on a GPU the cache takes what the learner
    leaves, down to a handful of rollouts."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    cpu, cuda = SimpleNamespace(type="cpu"), SimpleNamespace(type="cuda")
    cfg, number = Config(slots=256, micro_tokens=16384), 2 * 28 * 2 * 128
    assert plan_memory(cfg, SHAPE, 640, 1, cpu)[1] == 256 * 768 * number * 4
    given = dataclasses.replace(cfg, kv_gib=1.0)
    planned, kv = plan_memory(given, SHAPE, 640, 1, cpu)
    assert kv == 2**30 and planned.memory["sampler"] == 4 * 1_543_714_304 + kv
    for gib in (140, 80):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gib=gib: (gib * 2**30, gib * 2**30))
        planned, kv = plan_memory(cfg, SHAPE, 640, 1, cuda)
        bare = math.fsum(plan(SHAPE, cfg, 1, 1, 0, 640).memory.values())
        assert kv == pytest.approx(min(256 * 768 * number * 2, gib * 2**30 - RESERVE - bare))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 * 2**30, 60 * 2**30))
    with pytest.raises(MemoryError, match="it would with --checkpoint_activations True"):
        plan_memory(cfg, SHAPE, 640, 1, cuda)
