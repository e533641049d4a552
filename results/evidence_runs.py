"""
The runs of the evidence: their commands, and the compact form of a finished one. See evidence.py.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from config import Config, parse
from curves import COSTS, read_rows, running
from data import json_rows
from metrics import Clock

GRID = (1.5e-5, 3e-5, 6e-5)
# By tune.jsonl, but for grpo: 0.896 at 1.5e-5, 0.894 at 3e-5, which is no edge. pods lacks 3e-5.
LR = {
    "grpo": 3e-5, "grpo_skip": 3e-5, "aero": 3e-5, "reinforce_ada": 3e-5,
    "pods": 1.5e-5, "dapo": 3e-5, "mc_grpo": 3e-5, "sign": 3e-5,
}  # fmt: skip
TUNE_SEED = 100
REFILL_LR = 3e-4  # of the default task

SETTINGS = {  # group: (seeds, {setting: (algorithm, flags)})
    "main": (range(5), {
        "grpo": ("grpo", "--n_total 16"),
        "grpo_skip": ("grpo_skip", "--n_total 8"),
        "aero": ("aero", ""),
    }),
    "others": (range(3), {
        "reinforce_ada": ("reinforce_ada", ""),
        "pods": ("pods", ""),
        "dapo": ("dapo", ""),
        "mc_grpo": ("mc_grpo", ""),
        "sign": ("sign", ""),
    }),
    "ablations": (range(3), {
        "aero-no-rescue": ("aero", "--rescue False"),
        "aero-no-posterior": ("aero", "--posterior False"),
        "aero-no-rejection": ("aero", "--rejection False"),
        "aero-signed": ("aero", "--posterior_advantage signed"),
        "aero-pool": ("aero", "--rescue_budget pool"),
        "aero-drawn": ("aero", "--adv_stats drawn"),
        "aero-token": ("aero", "--loss_norm token"),
        "aero-k2": ("aero", "--k 2"),
        "aero-k4": ("aero", "--k 4"),
    }),
    "variants": (range(3), {
        "aero-extra8": ("aero", "--n_extra 8"),
        "aero-4+4": ("aero", "--n_explore 4 --n_extra 4"),
        "dapo-8": ("dapo", "--n_total 8"),
        "aero-long": ("aero", "--steps 240"),  # about what grpo's 100 steps cost
        "grpo_skip-long": ("grpo_skip", "--steps 260"),
    }),
    # Is it the refilling that helps dapo-8, or that it weighs by tokens?
    "refill": (range(5), {
        "tiny-grpo_skip": ("grpo_skip", "--n_total 8"),
        "tiny-grpo_skip-token": ("grpo_skip", "--n_total 8 --loss_norm token"),
        "tiny-aero": ("aero", ""),
        "tiny-aero-token": ("aero", "--loss_norm token"),
        "tiny-dapo-8": ("dapo", "--n_total 8"),
        "tiny-dapo-8-prompt": ("dapo", "--n_total 8 --loss_norm prompt"),
    }),
}  # fmt: skip
# Their flag is gone from train.py: the runs that were made are shown, and no more are.
GONE = {"aero-drawn"}
FLAGS = {setting: run for _, settings in SETTINGS.values() for setting, run in settings.items()}
GROUP = {setting: group for group, (_, settings) in SETTINGS.items() for setting in settings}

SCORES = {"avg": "avg_at_k", "pass": "pass_at_k"}
TOTALS = {
    "drawn": COSTS["drawn"],
    "trained": COSTS["trained"],
    "tokens": {"rollout/tokens": 1},
    "rollout_flops": {"compute/rollout_flops": 1},
    "train_flops": {"compute/train_flops": 1},
    "seconds": COSTS["seconds"] | {"time/save": -1},
}
START = 5  # steps that the seconds per step leave out: kernels and graphs are made in them


# ---------------------------------------------------------------------------------------- commands


def command(setting: str, algo: str, lr: float, seed: int, out: str, *flags: str, base="small"):
    words = [f"python train.py --base {base} --algo {algo} --lr {lr:g} --seed {seed}"]
    words += [f"--name {setting}-s{seed} --out {out}", *flags]
    return " ".join(filter(None, words))


def tune_commands(out: str) -> Iterator[str]:
    for algo, lr in itertools.product(LR, GRID):
        _, flags = FLAGS[algo]
        setting = f"tune-{algo}-{lr:g}"
        yield command(setting, algo, lr, TUNE_SEED, out, flags, "--eval_every 1000")


def timing_commands(out: str) -> Iterator[str]:
    """Few problems are evaluated, before the first step and after the last."""
    for seed, (name, (algo, flags)) in itertools.product(range(3), FLAGS.items()):
        is_long = "--steps" in flags  # a longer run has the steps of its twin
        if is_long or name in GONE or GROUP[name] == "refill":
            continue
        if seed == 0 or GROUP[name] == "main":
            few = "--eval_limit 8 --eval_every 1000"
            yield command(f"timing-{name}", algo, LR[algo], seed, out, flags, few)


def commands(group: str, out: str) -> Iterator[str]:
    """Lines of a shell, each a training run. ValueError for an unknown group."""
    if group == "tune":
        yield from tune_commands(out)
        return
    if group == "timing":
        yield from timing_commands(out)
        return
    if group not in SETTINGS:
        raise ValueError(f"group {group}: wanted one of tune timing {' '.join(SETTINGS)}")
    seeds, settings = SETTINGS[group]
    for seed, (name, (algo, flags)) in itertools.product(seeds, settings.items()):
        if name in GONE:
            continue
        if group == "refill":
            often = "--eval_every 30"
            yield command(name, algo, REFILL_LR, seed, out, flags, often, base="tiny")
        else:
            yield command(name, algo, LR[algo], seed, out, flags)


# ----------------------------------------------------------------------------------- finished runs


def digits(value):
    """Fractions of a JSON value to five significant digits."""
    return json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.5g}"))


def mean_or_none(values) -> float | None:
    return float(np.mean(values)) if len(values) else None


def base_policy(path: Path) -> dict:
    """What training starts from: score, lengths in tokens, and groups of eight that are flat."""
    rows = list(json_rows(path))
    groups = defaultdict(list)
    for row in rows:
        groups[row["problem"]].append(row["score"])
    rates = [np.mean(scores) for scores in groups.values()]
    first = [scores[:8] for scores in groups.values()]
    lengths = np.array([row["length"] for row in rows])
    right = np.array([row["score"] == 1 for row in rows])
    error = float(np.std(rates, ddof=1) / len(rates) ** 0.5) if len(rates) > 1 else None
    return dict(
        avg=float(np.mean(rates)),
        avg_se=error,
        length_right=mean_or_none(lengths[right]),
        length_wrong=mean_or_none(lengths[~right]),
        length_5_50_95=np.quantile(lengths, (0.05, 0.5, 0.95)).tolist(),
        problems=len(rates),
        all_right=float(np.mean([min(scores) == 1 for scores in first])),
        all_wrong=float(np.mean([max(scores) < 1 for scores in first])),
    )


def evaluations(rows: list[dict], held_out: str, totals: dict[str, dict]) -> list[dict]:
    """Scores of each evaluation, and what the run had spent until then."""
    points = []
    for row in rows:
        if f"eval/{held_out}/avg_at_k" in row:
            point = {"step": row["step"]}
            for name, key in SCORES.items():
                point[name] = row[f"eval/{held_out}/{key}"]
            for name, total in totals.items():
                point[name] = total[row["step"]]
            points.append(point)
    return points


def unusual(cfg: dict) -> dict:
    """Settings of a run that its algorithm and base do not bring; those with a column are apart."""
    own = ("algo", "base", "lr", "seed", "steps", "name", "out")
    argv = [f"--{key}={cfg[key]}" for key in ("algo", "base") if cfg.get(key)]
    usual = asdict(parse(Config, argv, ""))
    flags = {}
    for key, value in cfg.items():
        if key not in own and key in usual and usual[key] != value:
            flags[key] = value
    return flags


def record(run: Path) -> dict:
    """The compact form of a finished run. ValueError or OSError, one line, for anything else."""
    rows = read_rows(run)
    config = json.loads((run / "config.json").read_text())
    cfg = config["settings"]
    last = rows[-1]["step"] if rows else -1
    if last < cfg["steps"]:
        raise ValueError(f"{run}: found {max(last, 0)} steps of {cfg['steps']}")
    setting = cfg["name"].removesuffix(f"-s{cfg['seed']}")
    group = GROUP.get(setting, setting.split("-")[0])
    if group not in (*SETTINGS, "tune", "timing"):
        raise ValueError(f"{run}: found a run of no setting of this file")
    names = {key.split("/")[1] for row in rows for key in row if key.endswith("/avg_at_k")}
    held_out = min(names, default="")
    if not held_out and group != "timing":
        raise ValueError(f"{run}: found no evaluation")

    totals = {name: running(rows, signs) for name, signs in TOTALS.items()}
    steps = [row for row in rows if row["step"] > 0]
    timed = [row for row in rows if row["step"] > min(START, cfg["steps"] // 2)]
    seconds = {phase: sum(row[f"time/{phase}"] for row in timed) for phase in Clock.PHASES}
    flat = {}
    for key in ("all_right", "all_wrong"):
        flat[key] = [round(row[f"group/{key}_frac"], 4) for row in steps]
    error = base = None
    if held_out:
        summary = json.loads((run / "eval" / f"{held_out}-step{last}.json").read_text())
        error = summary["avg_at_k_se"]
        base = base_policy(run / "eval" / f"{held_out}-step0.jsonl")
    return digits(dict(
        setting=setting,
        group=group,
        algo=cfg["algo"],
        seed=cfg["seed"],
        lr=cfg["lr"],
        steps=cfg["steps"],
        k=cfg["eval_k"],
        flags=unusual(cfg),
        device=config["versions"]["device"],
        commit=config["versions"]["commit"],
        eval_data=held_out,
        evals=evaluations(rows, held_out, totals),
        seconds=seconds,
        flat=flat,
        timed_steps=len(timed),
        total={name: total[last] for name, total in totals.items()},
        saved_frac=steps[-1]["compute/saved_frac"],
        avg_se=error,
        reward=[round(row["reward/mean"], 4) for row in steps],
        base=base,
    ))  # fmt: skip
