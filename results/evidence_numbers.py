"""
From the rows of evidence.jsonl to the numbers of its tables: settings, seeds and intervals.
"""

from collections import defaultdict
from pathlib import Path

import numpy as np

from data import json_rows
from results.evidence_runs import GROUP

# Of a step; evaluation and saving are not its work. Waiting for graders is not summed: it is their
# start, once, a second or two at the first answer that is no integer. Where one comes before the
# first step, 95 steps wait for 0.002 s in all.
PHASES = ("rollout", "update", "sync", "other")
# Student's t, 97.5 %, for 1 to 9 degrees of freedom. Of more seeds than ten the intervals are
# rather too wide.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Interval = tuple[float, float | None]  # mean over seeds, half of its 95 % interval


def interval(values) -> Interval:
    """None in the place of the half for a single seed."""
    n = len(values)
    mean = float(np.mean(values))
    if n == 1:
        return mean, None
    t = T975[min(n, 10) - 2]
    return mean, t * float(np.std(values, ddof=1)) / n**0.5


def reaches(xs, ys, target: float) -> float | None:
    """x at which the line through the points first reaches the target; None if it never does."""
    for i, y in enumerate(ys):
        if y >= target:
            near = slice(max(i - 1, 0), i + 1)
            return float(np.interp(target, ys[near], xs[near]))
    return None


class Setting:
    """The seeds of a setting, and those that timed it alone on the GPU, if there are any."""

    def __init__(self, runs: dict[int, dict], timing: dict[int, dict]):
        self.runs = runs
        self.any_run = next(iter(runs.values()))  # for what is the same in all of them
        self.mark = "" if timing else "*"  # seconds are those of runs side by side
        self.timed = {}  # by seed, seconds of a step by phase
        for seed, run in (timing or runs).items():
            steps = run["timed_steps"]
            self.timed[seed] = {phase: run["seconds"][phase] / steps for phase in PHASES}
        self.phases = {}  # in the mean of the seeds
        for phase in PHASES:
            by_seed = [seconds[phase] for seconds in self.timed.values()]
            self.phases[phase] = float(np.mean(by_seed))
        self.step_seconds = sum(self.phases.values())
        for run in runs.values():
            for point in run["evals"]:
                point["flops"] = point["rollout_flops"] + point["train_flops"]
                point["seconds"] = point["step"] * self.step_seconds

    def final(self, key: str) -> dict[int, float]:
        """By seed. `step`: seconds of a step."""
        if key == "step":
            return {seed: sum(phases.values()) for seed, phases in self.timed.items()}
        return {seed: run["evals"][-1][key] for seed, run in self.runs.items()}

    def mean(self, key: str) -> float:
        return float(np.mean(list(self.final(key).values())))

    def curves(self, key: str) -> list[dict[int, float]]:
        """A series for each seed, at its evaluations."""
        curves = []
        for run in self.runs.values():
            curves.append({point["step"]: point[key] for point in run["evals"]})
        return curves

    def score_at(self, cost: str, spent: float) -> dict[int, float]:
        """Score of each seed when it had spent so much."""
        scores = {}
        for seed, run in self.runs.items():
            xs = [point[cost] for point in run["evals"]]
            ys = [point["avg"] for point in run["evals"]]
            scores[seed] = float(np.interp(spent, xs, ys))
        return scores

    def reach(self, cost: str, target: float) -> float | None:
        """What the mean of the seeds had spent when it first scored so much."""
        return reaches(self.mean_curve(cost), self.mean_curve("avg"), target)

    def mean_curve(self, key: str) -> np.ndarray:
        """Over the seeds, at each evaluation."""
        return np.mean([list(curve.values()) for curve in self.curves(key)], axis=0)


def versus(a: Setting | None, b: Setting | None, key="avg", equal="") -> Interval | None:
    """
    Interval of a - b over the seeds that both have, which saw the same problems in the same order
    (but for dapo, which draws more of them). None where there is nothing to compare.

    key: "flops" and "step" give what a spends more in all, or seconds in a step, as a share of b.
    equal: a cost, at which the scores are compared, when both had spent what the cheaper spends in
    all.
    """
    if a is None or b is None or a is b:
        return None
    x, y = a.final(key), b.final(key)
    common = sorted(x.keys() & y.keys())
    if not common:
        return None
    if equal:
        least = min(a.mean(equal), b.mean(equal))
        x = a.score_at(equal, least)
        y = b.score_at(equal, least)
    if key in ("flops", "step"):
        return interval([x[seed] / y[seed] - 1 for seed in common])
    return interval([x[seed] - y[seed] for seed in common])


def load(path: Path) -> dict[str, Setting]:
    """{setting: its runs}, in the order of SETTINGS. ValueError for what does not go together."""
    runs, timing = defaultdict(dict), defaultdict(dict)
    for run in json_rows(path):
        if not {"setting", "group", "seed"} <= run.keys():
            raise ValueError(f"{path}: found a row that `collect` did not write")
        setting, seed = run["setting"], run["seed"]
        if run["group"] == "timing":
            timing[setting.removeprefix("timing-")][seed] = run
        elif run["group"] != "tune":
            if setting not in GROUP:
                raise ValueError(f"{path}: found a run of {setting}, no setting of this file")
            need_twin(path, run, runs[setting])
            runs[setting][seed] = run
    if not runs:
        raise ValueError(f"{path}: found no run to report")
    settings = {}
    for name in GROUP:
        if name in runs:
            settings[name] = Setting(runs[name], timing[name.removesuffix("-long")])
    return settings


def need_twin(path: Path, run: dict, seeds: dict[int, dict]) -> None:
    """Raises ValueError unless `run` is one more seed of these."""
    for other in seeds.values():
        same = all(run[key] == other[key] for key in ("lr", "steps", "flags"))
        if same and run["seed"] != other["seed"]:
            continue
        raise ValueError(
            f"{path}: found a second seed {run['seed']}, or other lr, steps or flags, "
            f"of {run['setting']}"
        )
