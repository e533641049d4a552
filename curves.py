"""
Runs as curves: grouped by setting, in the mean of their seeds with the range as a band.

A series is {step: value}. matplotlib is imported when a picture is drawn; a run without it goes on.
"""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data import json_rows

# Okabe and Ito's colours, which the colour-blind can tell apart. Markers and widths do in grey.
STYLES = [
    {"color": "#0072B2", "marker": "o", "linewidth": 2.6},
    {"color": "#D55E00", "marker": "s", "linewidth": 1.7},
    {"color": "#009E73", "marker": "^", "linewidth": 1.0},
    {"color": "#CC79A7", "marker": "D", "linewidth": 2.6},
    {"color": "#E69F00", "marker": "v", "linewidth": 1.7},
    {"color": "#56B4E9", "marker": "P", "linewidth": 1.0},
    {"color": "#000000", "marker": "X", "linewidth": 2.6},
]

# What a run takes, as sums over its steps of sign x metric.
FLOPS = {"compute/rollout_flops": 1, "compute/train_flops": 1}
SECONDS = {"time/step": 1, "time/eval": -1}
COSTS = {
    "drawn": {"rollout/drawn": 1},
    "trained": {"rollout/trained": 1},
    "flops": FLOPS,
    "seconds": SECONDS,
}

# The columns of the first two rows of the picture: what is on the x axis.
PROGRESS = (
    ("steps", None),
    ("FLOPs, generation and training", FLOPS),
    ("seconds, without evaluation", SECONDS),
)
# The third row, against steps.
SHARES = (
    ("rollout/drawn", "rollouts a step (dashed: trained on)"),
    ("group/all_wrong_frac", "share of problems all wrong at first"),
    ("group/all_right_frac", "share of problems all right at first"),
)


# -------------------------------------------------------------------------------------------- runs


def read_rows(run: Path) -> list[dict]:
    """Rows of metrics.jsonl. FileNotFoundError or ValueError if it is missing or damaged."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{run} holds no metrics.jsonl, so it is not a run")
    return list(json_rows(path))


def by_setting(folders: Iterable) -> dict[str, list[tuple[Path, list[dict]]]]:
    """
    {setting: [(folder, rows) of each seed]}, in the order of `folders`. A setting is called by its
    run's name, with the parent folder before it where that name stands for other settings already.
    ValueError if that does too, or for a seed twice.
    """
    settings, runs = {}, {}
    for folder in map(Path, folders):
        rows = read_rows(folder)
        cfg = json.loads((folder / "config.json").read_text())["settings"]
        name, seed = cfg["name"], cfg["seed"]
        own = {key: value for key, value in cfg.items() if key not in ("name", "out", "seed")}
        label = name.removesuffix(f"-s{seed}")
        if settings.setdefault(label, own) != own:
            label = f"{folder.resolve().parent.name}/{label}"
        if settings.setdefault(label, own) != own:
            raise ValueError(
                f"{folder}: found other settings than in a run of the same name, "
                "wanted a --name for each"
            )
        seeds = runs.setdefault(label, {})
        if seed in seeds:
            first, _ = seeds[seed]
            raise ValueError(f"{folder}: found seed {seed} of {label} twice, the first in {first}")
        seeds[seed] = folder, rows
    return {label: list(seeds.values()) for label, seeds in runs.items()}


def series(rows: list[dict], key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in rows if key in row}


def running(rows: list[dict], signs: dict[str, int]) -> dict[int, float]:
    """{step: sum over the steps so far of sign x metric}"""
    steps, values = [], []
    for row in rows:
        steps.append(row["step"])
        values.append(sum(sign * row.get(key, 0) for key, sign in signs.items()))
    return dict(zip(steps, np.cumsum(values).tolist()))


def smooth(values: dict[int, float], width: int = 10) -> dict[int, float]:
    """Trailing mean over `width` steps."""
    steps = sorted(values)
    means = {}
    for i, step in enumerate(steps):
        window = steps[max(0, i - width + 1) : i + 1]
        means[step] = float(np.mean([values[s] for s in window]))
    return means


# ----------------------------------------------------------------------------------------- drawing


def band(axis, xs: list[dict], ys: list[dict], style: dict, **options) -> None:
    """Mean over seeds and their range, at the steps that all have. xs, ys: a series per seed."""
    common = [set(y) & set(x) for x, y in zip(xs, ys)]
    steps = sorted(set.intersection(*common))
    if not steps:
        return
    x = np.mean([[series[step] for step in steps] for series in xs], axis=0)
    y = np.array([[series[step] for step in steps] for series in ys])
    marks = {"markevery": max(1, len(steps) // 8), "markersize": 5}
    axis.plot(x, y.mean(0), **style | marks | options)
    if len(ys) > 1:
        axis.fill_between(x, y.min(0), y.max(0), color=style["color"], alpha=0.15, linewidth=0)


def tidy(axis, **labels) -> None:
    """Labels, a faint grid, no frame above and to the right."""
    axis.set(**labels)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def score_key(settings: dict[str, list[list[dict]]]) -> str:
    """avg@k of the evaluation set that is drawn: the first by name."""
    keys = set()
    for rows in itertools.chain.from_iterable(settings.values()):
        keys.update(*rows)
    scores = [key for key in keys if key.endswith("/avg_at_k")]
    return min(scores, default="eval/nothing/avg_at_k")


def draw_setting(axes, runs: list[list[dict]], score: str, style: dict) -> None:
    """One setting on all nine panels. runs: the rows of each seed."""
    steps = [series(rows, "step") for rows in runs]
    scores = [series(rows, score) for rows in runs]
    rewards = [smooth(series(rows, "reward/mean")) for rows in runs]
    for column, (_, cost) in enumerate(PROGRESS):
        xs = [running(rows, cost) for rows in runs] if cost else steps
        band(axes[0, column], xs, scores, style, markevery=1)
        band(axes[1, column], xs, rewards, style)
    for column, (key, _) in enumerate(SHARES):
        band(axes[2, column], steps, [smooth(series(rows, key)) for rows in runs], style)
    # In front and with hollow marks, so that it is seen where all that is drawn is trained on.
    trained = [smooth(series(rows, "rollout/trained")) for rows in runs]
    band(axes[2, 0], steps, trained, style, linestyle="--", markerfacecolor="white", zorder=3)


def draw(settings: dict[str, list[list[dict]]], png: Path) -> None:
    """Held-out score and reward against steps, compute and time; rollouts; flat groups."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(11, 9.6), layout="constrained")
    axes = figure.subplots(3, 3)
    for row in axes[:2]:
        row[1].sharey(row[0])
        row[2].sharey(row[0])
    score = score_key(settings)
    for (label, runs), style in zip(settings.items(), itertools.cycle(STYLES)):
        axes[0, 0].plot([], [], label=label, **style)
        draw_setting(axes, runs, score, style)
    for column, (label, _) in enumerate(PROGRESS):
        tidy(axes[0, column], xlabel=label)
        tidy(axes[1, column], xlabel=label)
    for column, (_, label) in enumerate(SHARES):
        tidy(axes[2, column], xlabel="steps", ylabel=label, ylim=(0, None))
    axes[0, 0].set_ylabel(f"held-out avg@k, {score.split('/')[1]}")
    axes[1, 0].set_ylabel("reward of all that was drawn")
    for axis in axes[:2, 1]:
        axis.xaxis.set_major_formatter(EngFormatter())  # 2 T for 2e12
    columns = min(4, len(settings))
    figure.legend(loc="outside upper center", ncols=columns, frameon=False, fontsize=12)
    if any(len(runs) > 1 for runs in settings.values()):
        figure.supxlabel(
            "line: mean of the seeds, band: their range; below the first row: mean of ten steps",
            fontsize=9,
        )
    figure.savefig(png, dpi=140)


def curves(folders: Iterable, png: Path) -> str:
    """Draws these runs, and says where, or why not, in a line."""
    settings = {}
    for label, seeds in by_setting(folders).items():
        settings[label] = [rows for _, rows in seeds]
    try:
        draw(settings, png)
    except ImportError as error:
        return f"no curves: {error} (pip install matplotlib)"
    return f"curves: {png}"
