"""
What a step is in numbers: FLOPs from lengths alone, shares of groups and rollouts, time, rates.

`describe` gets the records of all ranks, so every mean and share is over the whole step. A rollout
is right where its reward is above 0; with the verifier's rewards, 0 and 1, that is reward 1. The
README has a glossary of the names.
"""

import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

import aero
from model import forward_flops

# Dense bf16 matrix rate of the vendor's datasheet, for MFU.
PEAK_FLOPS = {
    "H100": 989e12, "H200": 989e12, "B200": 2250e12,
    "A100": 312e12, "L40S": 362e12, "4090": 165e12,
}  # fmt: skip
REASONS = ("unparsed", "limit", "timeout", "crash")  # verdicts that are counted by name


@dataclass
class GroupRecord:
    """One group of a step in plain values: n rollouts drawn, m kept. It travels between ranks."""

    place: int  # position of the problem in the step
    problem: int  # its id
    prompt: int  # tokens of its prompt
    rewards: list[float]  # (n,) in the order in which rollouts were asked for, as all below
    rounds: list[int]  # (n,) in which each was asked for, from 0
    kept: list[int]  # (m,) indices of those to train on
    advantage: list[float]  # (m,)
    lengths: list[int]  # (n,) response tokens
    truncated: list[bool]  # (n,)
    reasons: list[str]  # (n,) of the verdicts

    def first_round(self) -> np.ndarray:
        """Rewards of the first round: what the algorithm had to deal with, before rescue."""
        return np.array(self.rewards)[np.array(self.rounds) == 0]


@dataclass
class Totals:
    """What a run has drawn, trained on and spent so far. A checkpoint carries it on."""

    drawn: int = 0  # rollouts
    trained: int = 0  # rollouts, as often as an optimizer step saw them
    tokens: int = 0  # drawn, of responses
    rollout_flops: float = 0.0
    train_flops: float = 0.0
    reference_flops: float = 0.0  # what GRPO with n_reference rollouts would have spent on both

    @property
    def flops(self) -> float:
        return self.rollout_flops + self.train_flops

    @property
    def saved_frac(self) -> float:
        return 1 - self.flops / self.reference_flops


# ----------------------------------------------------------------------------------------- compute


class Flops(NamedTuple):
    rollout: float
    train: float
    reference: float


def prompt_flops(model_cfg, tokens: int) -> float:
    """Forward FLOPs of a prompt: none of its tokens is predicted, so none goes through the head."""
    return forward_flops(model_cfg, tokens, tokens * (tokens + 1) / 2, predicted=0)


def response_flops(model_cfg, prompt: int, lengths) -> float:
    """Forward FLOPs of responses after a cached prompt: token j attends to prompt + j keys."""
    n = np.asarray(lengths, dtype=np.float64)
    keys = n * prompt + n * (n + 1) / 2
    return forward_flops(model_cfg, n.sum(), keys.sum())


def group_flops(model_cfg, cfg, prompt: int, lengths, kept) -> Flops:
    """
    FLOPs of one group, from lengths alone.

    Rollout: the prompt once, then one forward per response token. Train: 3 forwards over prompt and
    response of each kept rollout, 4 with recomputed activations. Reference: GRPO draws and trains
    n_reference rollouts of this group's mean length.
    """
    passes = (4 if cfg.checkpoint_activations else 3) * cfg.updates_per_batch
    lengths = np.array(lengths)
    kept_lengths = lengths[kept]
    prompt_once = prompt_flops(model_cfg, prompt)
    responses = response_flops(model_cfg, prompt, lengths)
    kept_responses = response_flops(model_cfg, prompt, kept_lengths)
    mean_response = responses / len(lengths)
    return Flops(
        rollout=prompt_once + responses,
        train=passes * (len(kept_lengths) * prompt_once + kept_responses),
        reference=prompt_once
        + cfg.n_reference * (mean_response + passes * (prompt_once + mean_response)),
    )


def count_flops(model_cfg, records: list[GroupRecord], cfg) -> Flops:
    """
    FLOPs of one step. Problems that only a refill brought in are not the reference's work: it has
    cfg.problems of them, of the mean cost of those in `records`.
    """
    rollout = train = reference = 0.0
    for record in records:
        group = group_flops(model_cfg, cfg, record.prompt, record.lengths, record.kept)
        rollout += group.rollout
        train += group.train
        reference += group.reference * cfg.problems / len(records)
    return Flops(rollout, train, reference)


# ------------------------------------------------------------------------------------------ a step


def describe(records: list[GroupRecord], model_cfg, cfg, totals: Totals) -> dict:
    """Metrics of what all ranks drew and kept in one step. Adds the step to `totals`."""
    rewards = np.concatenate([record.rewards for record in records])
    lengths = np.concatenate([record.lengths for record in records])
    truncated = np.concatenate([record.truncated for record in records])
    kept = sum(len(record.kept) for record in records)
    kept_tokens = sum(record.lengths[i] for record in records for i in record.kept)
    flops = count_flops(model_cfg, records, cfg)

    totals.drawn += len(lengths)
    totals.trained += kept * cfg.updates_per_batch
    totals.tokens += int(lengths.sum())
    totals.rollout_flops += flops.rollout
    totals.train_flops += flops.train
    totals.reference_flops += flops.reference

    return {
        "reward/mean": rewards.mean(),
        "reward/std": rewards.std(),
        **reason_shares(records),
        **group_metrics(records),
        "rollout/drawn": len(lengths),
        "rollout/kept": kept,
        "rollout/trained": kept * cfg.updates_per_batch,
        "rollout/tokens": int(lengths.sum()),
        "rollout/trained_tokens": kept_tokens * cfg.updates_per_batch,
        "response_length/all": lengths.tolist(),
        "response_length/mean": lengths.mean(),
        "response_length/max": int(lengths.max()),
        "response_length/truncated_frac": truncated.mean(),
        "compute/rollout_flops": flops.rollout,
        "compute/train_flops": flops.train,
        "compute/saved_frac": totals.saved_frac,
    }


def reason_shares(records: list[GroupRecord]) -> dict:
    """The share of rollouts whose verdict has each of REASONS."""
    reasons = [reason for record in records for reason in record.reasons]
    return {f"reward/{name}_frac": reasons.count(name) / len(reasons) for name in REASONS}


def group_metrics(records: list[GroupRecord]) -> dict:
    """Shares of groups by how their first round came out, and the share right of each."""
    first = [record.first_round() for record in records]
    all_wrong = [rewards.max() <= 0 for rewards in first]
    solved = [max(record.rewards) > 0 for record in records]
    return {
        "group/flat_frac": np.mean([aero.is_flat(rewards) for rewards in first]),
        "group/all_right_frac": np.mean([rewards.min() > 0 for rewards in first]),
        "group/all_wrong_frac": np.mean(all_wrong),
        "group/rescued_frac": np.mean(np.logical_and(all_wrong, solved)),
        "group/problems": len(records),
        "group/success": [np.mean(np.array(record.rewards) > 0) for record in records],
    }


# ---------------------------------------------------------------------------------- time and rates


class Clock:
    """Seconds of a step by phase; `other` is what no phase claims, so the parts sum to the step."""

    PHASES = ("rollout", "reward", "update", "sync", "eval", "save", "other")

    def __init__(self, device):
        self.device = device
        self.begun = time.perf_counter()
        self.last = self.begun
        self.parts = dict.fromkeys(self.PHASES, 0.0)

    def phase(self, name: str) -> None:
        """Everything since the last call belongs to `name`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.parts[name] += now - self.last
        self.last = now

    def move(self, seconds: float, source: str, target: str) -> None:
        """Part of phase `source` was `target` in truth."""
        self.parts[source] -= seconds
        self.parts[target] += seconds

    def read(self) -> dict[str, float]:
        """time/PHASE of all phases, and time/step, their sum."""
        total = time.perf_counter() - self.begun
        claimed = sum(seconds for name, seconds in self.parts.items() if name != "other")
        parts = self.parts | {"step": total, "other": total - claimed}
        return {f"time/{name}": seconds for name, seconds in parts.items()}


def peak_flops() -> float | None:
    """The datasheet's rate of this GPU, if we know it."""
    device = torch.cuda.get_device_name()
    return next((rate for name, rate in PEAK_FLOPS.items() if name in device), None)


def speeds(metrics: dict, cfg, device, world: int) -> dict:
    """Of one step: tokens per second over all ranks, MFU of the update without recomputation."""
    decoding = metrics["time/rollout"] + metrics["time/reward"]
    updating = metrics["time/update"]
    rates = {
        "perf/gen_tokens_per_s": metrics["rollout/tokens"] / decoding,
        "perf/train_tokens_per_s": metrics["rollout/trained_tokens"] / updating,
    }
    if device.type == "cuda":
        rates["perf/peak_mem_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if peak := peak_flops():
            needed = metrics["compute/train_flops"] * (3 / 4 if cfg.checkpoint_activations else 1)
            rates["perf/mfu"] = needed / updating / peak / world
    return rates
