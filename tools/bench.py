"""
How fast, against which ceiling: random weights of a real shape, every rollout runs to --new tokens.

    python -m tools.bench sampler --shape qwen2.5-math-1.5b --prompts 32 --n 16 --new 512
    python -m tools.bench learner --shape qwen2.5-math-1.5b --prompts 32 --n 8 --new 512
    python -m tools.bench step --shape qwen2.5-math-1.5b --algo grpo,grpo_skip,aero --prompts 16
    torchrun --nproc_per_node 2 -m -- tools.bench step ...        (without `--` it takes --n itself)

`step` is a whole training step (draw, choose, update, sync) with simulated outcomes. Verdicts: a
third of the problems is never right, the success rates of the others are uniform on (0, 1), and
rollouts are independent. Lengths: --new tokens, or with --ragged log-normal (sigma 0.8) with mean
--new / 5, cut at --new. Several algorithms, each with its published settings, meet the same
problems, verdicts and lengths in one process; a row each, times against the first.

The last line is one JSON object with the figure, the ceiling that follows from the copy bandwidth
and the bf16 matrix rate measured in the same process, their ratio, and peak memory.
"""

import argparse
import json
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist

import aero
from config import Config, knob, parse
from run import start_ranks
from tools.bench_clock import measure_ceilings
from tools.bench_learner import bench_learner
from tools.bench_sampler import bench_sampler
from tools.bench_step import bench_step
from tools.shapes import SHAPES, shape

MODES = {"sampler": bench_sampler, "learner": bench_learner, "step": bench_step}
ECHOED = (  # settings that the last line repeats
    "shape", "algo", "prompts", "n", "prompt_len", "new", "ragged",
    "compile", "checkpoint_activations", "micro_tokens",
)  # fmt: skip


@dataclass
class Bench(Config):
    """A measurement: the settings of a run, and these."""

    shape: str = knob("tiny", "size of the model", SHAPES)
    prompts: int = knob(16, "different prompts", least=1)
    n: int = knob(16, "rollouts of each (sampler, learner)", least=1)
    prompt_len: int = knob(128, "tokens of a prompt", least=1)
    new: int = knob(512, "tokens of every response", least=1)
    ragged: bool = knob(False, "heavy-tailed lengths with mean new / 5 and largest value new")
    plain: bool = knob(False, "sampler, step: the plain path where the fast one could run")
    fp32: bool = knob(False, "sampler: fp32 weights and cache")
    top_p: float = knob(1.0, "sampler: nucleus of an evaluation", above=0.0, most=1.0)
    breakdown: bool = knob(False, "ms of the GPU by kind of kernel (sampler, learner)")
    repeats: int = knob(2, "timed repetitions after a warm-up; the median is reported", least=1)

    def starting_values(self) -> dict:
        """The shape is no preset: it changes nothing but the size of the model."""
        return aero.ALGORITHMS[self.algo].defaults


def parse_all(argv: list[str]) -> list[Bench]:
    """One configuration for each name in --algo, with its algorithm's published settings."""
    splitter = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    splitter.add_argument("--algo", default="aero")
    known, flags = splitter.parse_known_args(argv)
    return [parse(Bench, [*flags, "--algo", name], __doc__) for name in known.algo.split(",")]


def read_command(argv: list[str]) -> tuple[str, list[Bench]]:
    """ValueError, one line, for anything that is not a measurement."""
    mode = argv[0] if argv else "nothing"
    if mode in ("-h", "--help"):
        parse_all(["--help"])
    if mode not in MODES:
        raise ValueError(f"found {mode}, wanted one of {' '.join(MODES)}")
    cfgs = parse_all(argv[1:])
    if mode != "step" and len(cfgs) > 1:
        raise ValueError(f"--algo: {mode} takes one algorithm, found {len(cfgs)}")
    return mode, cfgs


def measure(mode: str, cfgs: list[Bench], device) -> dict:
    cfg = cfgs[0]
    model_cfg = shape(cfg.shape)
    ceilings = measure_ceilings(device)
    what = cfgs if mode == "step" else cfg
    result = MODES[mode](what, model_cfg, device, ceilings)
    result |= dict(
        bench=mode,
        ratio=result["measured"] / result["ceiling"],
        bandwidth=ceilings.bandwidth,
        matrix_rate=ceilings.matrix_rate,
        world=dist.get_world_size(),
    )
    for name in ECHOED:
        result[name] = getattr(cfg, name)
    if device.type == "cuda":
        result["peak_mem_gib"] = torch.cuda.max_memory_allocated() / 2**30
        result["device"] = torch.cuda.get_device_name()
    return result


def six_digits(value):
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main(argv: list[str]) -> int:
    try:
        mode, cfgs = read_command(argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = start_ranks()
    result = measure(mode, cfgs, device)
    if dist.get_rank() == 0:
        print(json.dumps({name: six_digits(value) for name, value in result.items()}))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
