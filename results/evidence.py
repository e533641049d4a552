"""
The evidence: its runs, their numbers in one small file, tables and figures made of that.

    python results/evidence.py commands GROUP [--out DIR] | xargs -P 8 -I{} sh -c '{}'
        each line is a training run
    python results/evidence.py collect RUN_FOLDER... > results/evidence.jsonl
        an object per finished run
    python results/evidence.py best results/tune.jsonl
        the learning rates to put into evidence_runs.py
    python results/evidence.py report [results/evidence.jsonl]
        Markdown; evidence.png and evidence_settings.png beside the file

GROUP: tune (comes first, on a seed of its own), main, others, ablations, variants, timing (alone on
the GPU: xargs -P 1), and refill, on the default task and a CPU, with a file of its own,
results/refill.jsonl. The runs stand in evidence_runs.py, the arithmetic in evidence_numbers.py.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from curves import STYLES, band, tidy
from data import json_rows
from results.evidence_numbers import PHASES, Interval, Setting, interval, load, versus
from results.evidence_runs import FLAGS, SCORES, SETTINGS, commands, record

MAIN = tuple(SETTINGS["main"][1])  # grpo, grpo_skip, aero
LOOK = dict(zip(("aero", "grpo", "grpo_skip"), STYLES))
SLACK = 0.01  # "grpo's score" is its final mean less this: its curve is flat at the end
TERA = 1e12
# Compared beside grpo, grpo_skip and aero: longer runs with each other, the setting that is best
# with what comes near, and what makes it so.
PAIRS = [
    ("aero-long", "grpo"),
    ("aero-long", "grpo_skip-long"),
    ("grpo_skip-long", "grpo"),
    ("dapo-8", "grpo"),
    ("dapo-8", "grpo_skip"),
    ("dapo-8", "grpo_skip-long"),
    ("dapo-8", "aero"),
    ("dapo-8", "aero-token"),
    ("dapo-8", "aero-long"),
    ("dapo-8", "dapo"),
    ("tiny-dapo-8", "tiny-grpo_skip"),
    ("tiny-dapo-8", "tiny-aero"),
    ("tiny-dapo-8-prompt", "tiny-grpo_skip"),
    ("tiny-dapo-8-prompt", "tiny-aero"),
    ("tiny-grpo_skip-token", "tiny-grpo_skip"),
    ("tiny-aero-token", "tiny-aero"),
]


# ------------------------------------------------------------------------------------------- cells


def table(title: str, head: list[str], rows: list[list]) -> str:
    """Markdown; None is an empty cell."""
    lines = [f"**{title}**", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = ["" if cell is None else str(cell) for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def short(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def signed(gap: Interval | None, form="+.3f") -> str | None:
    """A difference with its interval."""
    if gap is None:
        return None
    middle, half = gap
    if half is None:
        return f"{middle:{form}}"
    return f"{middle:{form}} [{middle - half:{form}}, {middle + half:{form}}]"


def in_percent(gap: Interval | None) -> str:
    """The middle of a relative difference, in brackets."""
    return "" if gap is None else f" ({gap[0]:+.0%})"


def verdict(gap: Interval | None, claim: float | None) -> str | None:
    """In words. claim: the claimed change of a cost; None for a score, of which more is better."""
    if gap is None:
        return None
    middle, half = gap
    if half is None:
        return "one run decides nothing"
    if claim is None:
        if abs(middle) <= half:
            return "no difference shown"
        return "better" if middle > 0 else "worse"
    if middle - half > 0:
        return "costs more"
    if middle + half <= claim:
        return "saves as much or more"
    return "saves less than claimed"


def score_cell(setting: Setting) -> str:
    """avg@k, and the standard deviation of several seeds."""
    scores = list(setting.final("avg").values())
    if len(scores) == 1:
        return f"{scores[0]:.3f}"
    return f"{np.mean(scores):.3f} +- {np.std(scores, ddof=1):.3f}"


def seconds_cell(setting: Setting) -> str:
    return short(setting.step_seconds) + setting.mark


def cost_cell(setting: Setting, other: Setting | None) -> str:
    """TFLOPs of a run, and how much more or less than the other's."""
    cost = short(setting.mean("flops") / TERA)
    return cost + in_percent(versus(setting, other, "flops"))


def goal_cells(setting: Setting, goal: float) -> list[str]:
    """TFLOPs and seconds until the mean of the seeds first scored so much."""
    flops, seconds = setting.reach("flops", goal), setting.reach("seconds", goal)
    if flops is None or seconds is None:
        return ["never", "never"]
    return [short(flops / TERA), short(seconds) + setting.mark]


# ------------------------------------------------------------------------------------------ tables


def settings_table(settings: dict[str, Setting], k: int) -> str:
    grpo, skip, _ = map(settings.get, MAIN)
    goal = grpo.mean("avg") - SLACK if grpo else np.inf
    head = ["setting", "seeds", "lr", f"avg@{k} +- sd", f"pass@{k}", "- grpo", "- grpo_skip"]
    head += ["- grpo_skip at equal FLOPs", "drawn", "trained on", "TFLOPs (against grpo)"]
    head += ["s per step", f"TFLOPs to grpo's score - {SLACK:g}", "seconds to it"]
    rows = []
    for name, setting in settings.items():
        rows.append([
            f"`{name}`",
            len(setting.runs),
            f"{setting.any_run['lr']:g}",
            score_cell(setting),
            f"{setting.mean('pass'):.3f}",
            signed(versus(setting, grpo)),
            signed(versus(setting, skip)),
            signed(versus(setting, skip, equal="flops")),
            f"{setting.mean('drawn'):,.0f}",
            f"{setting.mean('trained'):,.0f}",
            cost_cell(setting, grpo),
            seconds_cell(setting),
            *goal_cells(setting, goal),
        ])  # fmt: skip
    return table("Settings", head, rows)


def phases_table(settings: dict[str, Setting]) -> str:
    head = ["setting", *(f"{phase}, s" for phase in PHASES), "sum, s"]
    head += ["TFLOPs of generation", "of training", "saved_frac"]
    rows = []
    for name, setting in settings.items():
        steps = setting.any_run["steps"]
        saved = np.mean([run["saved_frac"] for run in setting.runs.values()])
        rows.append([
            f"`{name}`",
            *(f"{setting.phases[phase]:.3f}" for phase in PHASES),
            seconds_cell(setting),
            short(setting.mean("rollout_flops") / steps / TERA),
            short(setting.mean("train_flops") / steps / TERA),
            f"{saved:.1%}",
        ])  # fmt: skip
    return table("A step by phase", head, rows)


def claims_table(settings: dict[str, Setting], k: int) -> str:
    """aero against grpo and grpo_skip, each with a verdict."""
    grpo, skip, aero = map(settings.get, MAIN)
    head = ["of aero", "claimed", "against grpo, N = 16", "verdict"]
    head += ["against grpo_skip, N = 8", "verdict"]
    rows = [["FLOPs, generation and training", "-48%"], ["seconds per step", "-45%"]]
    for row, key, claim in zip(rows, ("flops", "step"), (-0.48, -0.45)):
        for other in (grpo, skip):
            gap = versus(aero, other, key)
            cell = signed(gap, "+.1%")
            if gap and key == "step":
                cell += aero.mark or other.mark
            row += [cell, verdict(gap, claim)]
    for what, claimed, key, equal in (
        (f"avg@{k}", "equal or better", "avg", ""),
        (f"pass@{k}", "equal or better", "pass", ""),
        (f"avg@{k} at equal rollouts drawn", "equal or better", "avg", "drawn"),
        (f"avg@{k} at equal FLOPs", "", "avg", "flops"),
    ):
        row = [what, claimed]
        for other in (grpo, skip):
            gap = versus(aero, other, key, equal)
            row += [signed(gap), verdict(gap, None)]
        rows.append(row)
    return table("The paper's claims", head, rows)


def parts_table(settings: dict[str, Setting], k: int) -> str:
    _, skip, aero = map(settings.get, MAIN)
    head = ["setting", "flags", "seeds", f"avg@{k} +- sd", "- aero", "at equal FLOPs"]
    head += ["- grpo_skip", "- grpo_skip at equal FLOPs", "TFLOPs (against aero)"]
    rows = []
    for name, setting in settings.items():
        if name not in MAIN and setting.any_run["algo"] == "aero":
            _, flags = FLAGS[name]
            rows.append([
                f"`{name}`",
                f"`{flags}`",
                len(setting.runs),
                score_cell(setting),
                signed(versus(setting, aero)),
                signed(versus(setting, aero, equal="flops")),
                signed(versus(setting, skip)),
                signed(versus(setting, skip, equal="flops")),
                cost_cell(setting, aero),
            ])  # fmt: skip
    return table("Parts and variants of AERO", head, rows)


def pairs_table(settings: dict[str, Setting], k: int) -> str:
    head = ["of", "at the end", "at equal FLOPs", "at equal rollouts drawn"]
    rows = []
    for a, b in PAIRS:
        if a in settings and b in settings:
            gaps = [versus(settings[a], settings[b], equal=cost) for cost in ("", "flops", "drawn")]
            rows.append([f"`{a}` - `{b}`", *map(signed, gaps)])
    return table(f"Differences of avg@{k}", head, rows)


def runs_text(runs: list[dict]) -> str:
    """What was run, and how to read the tables."""
    known = {}
    for key in ("steps", "device", "commit", "eval_data"):
        known[key] = ", ".join(sorted({str(run[key]) for run in runs}))
    hours = sum(run["total"]["seconds"] for run in runs) / 3600
    error = max(run.get("avg_se", 0) for run in runs)
    return (
        f"{len(runs)} runs of {known['steps']} steps on {known['device']}, "
        f"commit {known['commit']}, evaluated on {known['eval_data']}; their steps took "
        f"{hours:.1f} hours, side by side or not. In brackets: 95 % intervals over seeds, paired. "
        "Seconds are those of runs that had the GPU alone, a longer run's those of its twin; "
        "*: of the runs themselves, side by side. A score at the end has a standard error over "
        f"problems of at most {error:.3f}.\n"
    )


BASE = (
    "The base policy, {n} seeds of {problems:.0f} problems: score {avg:.3f} +- {avg_se:.3f} "
    "(over problems); median length {length_5_50_95[1]:.0f} tokens, 5 % below "
    "{length_5_50_95[0]:.0f}, 5 % above {length_5_50_95[2]:.0f}; right ones {length_right:.0f}, "
    "wrong ones {length_wrong:.0f} on average; of groups of 8, {all_right:.0%} all right and "
    "{all_wrong:.0%} all wrong. Aimed at, after Qwen2.5-Math on MATH: a third or more of the "
    "groups flat, of both kinds; 100 to 1,000 tokens; wrong ones longer.\n"
)


def base_text(runs: list[dict]) -> str:
    """Every setting of a seed evaluates the same base."""
    bases = {run["seed"]: run["base"] for run in runs}
    means = {}
    for key in runs[0]["base"]:
        values = [base[key] for base in bases.values() if base[key] is not None]
        means[key] = np.mean(values, axis=0)
    return BASE.format(n=len(bases), **means)


def report(settings: dict[str, Setting]) -> str:
    """All tables."""
    runs = [run for setting in settings.values() for run in setting.runs.values()]
    k = runs[0]["k"]
    return "\n".join([
        runs_text(runs),
        base_text(runs),
        settings_table(settings, k),
        phases_table(settings),
        claims_table(settings, k),
        parts_table(settings, k),
        pairs_table(settings, k),
    ])  # fmt: skip


# ----------------------------------------------------------------------------------------- figures


def draw_curves(settings: dict[str, Setting], png: Path) -> None:
    """Held-out scores of the main three against what they took."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(13, 6), layout="constrained")
    axes = figure.subplots(2, 4, sharey="row", sharex="col")
    shown = {name: settings[name] for name in LOOK if name in settings}
    k = next(iter(settings.values())).any_run["k"]
    progress = {
        "step": "updates",
        "drawn": "rollouts drawn",
        "flops": "FLOPs, generation and training",
        "seconds": "seconds in steps, extrapolated",
    }
    for row, score in zip(axes, SCORES):
        row[0].set_ylabel(f"held-out {score}@{k}")
        for axis, cost in zip(row, progress):
            for name, setting in shown.items():
                xs, ys = setting.curves(cost), setting.curves(score)
                band(axis, xs, ys, LOOK[name], markevery=1)
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            tidy(axis, xlim=(0, None))
    for axis, label in zip(axes[-1], progress.values()):
        axis.set_xlabel(label)
    labels = [f"{name}, {len(setting.runs)} seeds" for name, setting in shown.items()]
    lines = axes[0, 0].lines
    figure.legend(lines, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=12)
    figure.supxlabel("line: mean of the seeds, band: their range", fontsize=9)
    figure.savefig(png, dpi=140)


def draw_settings(settings: dict[str, Setting], png: Path) -> None:
    """Final score with its interval over seeds, and FLOPs, of each setting; the cheapest below."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    names = sorted(settings, key=lambda name: settings[name].mean("flops"))
    figure = Figure(figsize=(9, 1.2 + 0.27 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for y, name in enumerate(names):
        style = {"color": "#555555", "marker": "o"}
        if name in LOOK:
            style = {key: LOOK[name][key] for key in style}
        middle, half = interval(list(settings[name].final("avg").values()))
        left.errorbar(middle, y, xerr=half, capsize=3, markersize=6, **style)
        right.plot(settings[name].mean("flops"), y, markersize=6, **style)
    for name, dashes in zip(LOOK, ("-", "--", ":")):
        if name in settings:
            colour = LOOK[name]["color"]
            x = settings[name].mean("avg")
            left.axvline(x, color=colour, linewidth=1, linestyle=dashes, zorder=0)
    left.set_yticks(range(len(names)), [f"{name} ({len(settings[name].runs)})" for name in names])
    right.xaxis.set_major_formatter(EngFormatter(sep=""))
    k = settings[names[0]].any_run["k"]
    tidy(left, xlabel=f"held-out avg@{k} at the end, 95 % interval over (so many) seeds")
    tidy(right, xlabel="FLOPs, generation and training", xlim=(0, None))
    figure.savefig(png, dpi=140)


# ------------------------------------------------------------------------------------ the commands


def best(path: Path) -> str:
    """Table of final scores by algorithm and learning rate, and the line for LR."""
    scores = defaultdict(dict)
    for run in json_rows(path):
        scores[run["algo"]][run["lr"]] = run["evals"][-1]["avg"]
    rates = sorted({lr for by_rate in scores.values() for lr in by_rate})
    rows, choice = [], []
    for algo, by_rate in scores.items():
        lr = max(by_rate, key=by_rate.get)
        edge = ", the edge of the grid" if lr in (min(by_rate), max(by_rate)) else ""
        cells = [f"{by_rate[rate]:.3f}" if rate in by_rate else "" for rate in rates]
        rows.append([f"`{algo}`", *cells, f"{lr:g}{edge}"])
        choice.append(f'"{algo}": {lr:g}')
    head = ["algorithm", *(f"{rate:g}" for rate in rates), "best"]
    shown = table("Final held-out score by learning rate, one seed", head, rows)
    return f"{shown}\nLR = {{{', '.join(choice)}}}"


def collect(folders: list[str]) -> None:
    for folder in folders:
        try:
            print(json.dumps(record(Path(folder))))
        except (ValueError, OSError) as error:
            print(f"left out: {error}", file=sys.stderr)


def report_file(path: Path) -> None:
    settings = load(path)
    print(report(settings))
    if settings.keys() & LOOK.keys():
        draw_curves(settings, path.with_suffix(".png"))
    draw_settings(settings, path.with_name(path.stem + "_settings.png"))


USAGE = "commands GROUP [--out DIR] | collect RUN_FOLDER... | best FILE | report [FILE]"


def main(argv: list[str]) -> int:
    try:
        match argv:
            case ["commands", group]:
                print(*commands(group, "out"), sep="\n")
            case ["commands", group, "--out", out]:
                print(*commands(group, out), sep="\n")
            case ["collect", _, *_]:
                collect(argv[1:])
            case ["best", path]:
                print(best(Path(path)))
            case ["report"]:
                report_file(Path(__file__).with_suffix(".jsonl"))
            case ["report", path]:
                report_file(Path(path))
            case _:
                raise ValueError(f"wanted: {USAGE}")
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
