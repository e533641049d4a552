"""
Whole training steps (draw, choose, update, sync) of several algorithms in one process, on the same
problems, simulated verdicts and lengths. A row each; times are compared with the first.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch.distributed as dist

from data import Problem
from learner import Learner, full_weights, update
from metrics import Clock, describe
from rollout import Sampling
from run import State
from tools.bench_workload import (
    NeverStop,
    NoTokenizer,
    SetLength,
    SimulatedGrader,
    random_learner,
    random_problems,
    random_sampler,
)
from train import Engine, choose_batch, draw_step

COUNTS = (
    "rollout/drawn", "rollout/kept", "rollout/tokens", "rollout/trained_tokens",
    "compute/rollout_flops", "compute/train_flops", "compute/saved_frac",
    "mismatch/kl", "mismatch/max_abs",
)  # fmt: skip


class Bed(NamedTuple):
    """What all algorithms share."""

    sampler: SetLength
    learner: Learner
    problems: list[Problem]
    model_cfg: object
    device: object


def bench_step(cfgs, model_cfg, device, ceilings) -> dict:
    """cfgs: one configuration for each algorithm."""
    cfgs = [replace(cfg, problems=cfg.prompts, max_new=cfg.new, n=cfg.n_total) for cfg in cfgs]
    widest = max(cfgs, key=lambda cfg: cfg.n)
    narrowest = min(cfgs, key=lambda cfg: cfg.n)
    bed = Bed(
        random_sampler(widest, model_cfg, device),
        random_learner(cfgs[0], model_cfg, device),
        random_problems(cfgs[0], model_cfg),
        model_cfg,
        device,
    )
    one_step(bed, narrowest, 0, State())  # kernels are compiled, graphs captured
    rows = {}
    for cfg in cfgs:
        state = State()
        steps = [one_step(bed, cfg, step, state) for step in range(1, cfg.repeats + 1)]
        row = median_row(steps)
        first = next(iter(rows.values()), row)
        row["time/ratio"] = row["time/step"] / first["time/step"]
        rows[cfg.algo] = {name: float(f"{value:.5g}") for name, value in row.items()}
        if dist.get_rank() == 0:
            print(console_line(cfg.algo, rows[cfg.algo]), flush=True)
    first = rows[cfgs[0].algo]
    flops = first["compute/rollout_flops"] + first["compute/train_flops"]
    return dict(
        figure="steps_per_s",
        measured=1 / first["time/step"],
        ceiling=ceilings.matrix_rate * dist.get_world_size() / flops,
        steps=rows,
    )


def one_step(bed: Bed, cfg, step: int, state: State) -> dict:
    """Seconds by phase and what was drawn. `step` decides verdicts and lengths."""
    sampler = bed.sampler
    grader = SimulatedGrader(step, 64 * cfg.prompts)
    clock = Clock(bed.device)
    dtype = next(sampler.model.parameters()).dtype
    sampler.load(full_weights(bed.learner.model, dtype))
    clock.phase("sync")
    sampler.begin(step, Sampling(cfg.temperature))
    engine = Engine(sampler, grader, NoTokenizer(), NeverStop())
    groups, _ = draw_step(bed.problems, state, cfg, engine)
    clock.phase("rollout")
    batch, records = choose_batch(groups, step, cfg)
    metrics = describe(records, bed.model_cfg, cfg, state.totals)
    clock.phase("other")
    if batch:
        metrics |= update(bed.learner, batch, cfg.lr, cfg)
    clock.phase("update")
    counts = {name: metrics[name] for name in COUNTS if name in metrics}
    return clock.read() | counts


def median_row(steps: list[dict]) -> dict:
    """The median of each number, without phases that took no time; savings are of all steps."""
    row = {}
    for name in steps[-1]:
        median = float(np.median([step.get(name, 0.0) for step in steps]))
        if median or "time" not in name:
            row[name] = median
    row["compute/saved_frac"] = steps[-1]["compute/saved_frac"]
    return row


def console_line(algo: str, row: dict) -> str:
    numbers = [f"{name.partition('/')[2]} {value:g}" for name, value in row.items()]
    return f"{algo:13s}" + ", ".join(numbers)
