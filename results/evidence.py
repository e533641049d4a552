"""
The evidence: which runs were made, their numbers in one small file, and the tables and figures made of it.

    python results/evidence.py commands GROUP [--out DIR] | xargs -P 8 -I{} sh -c '{}'     each line a training run
    python results/evidence.py collect RUN_FOLDER... > results/evidence.jsonl               an object per finished run of these
    python results/evidence.py best results/tune.jsonl                                      the learning rates to put below
    python results/evidence.py report [results/evidence.jsonl]      Markdown; evidence.png and evidence_settings.png beside it

GROUP: tune (comes first, on a seed of its own), main, others, ablations, variants, timing (alone on the GPU: xargs -P 1),
and refill, on the default task and a CPU, which has a file of its own, results/refill.jsonl.
"""

import itertools
import json
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import train
from data import json_rows
from report import COSTS, STYLES, EngFormatter, band, plt, read_rows, running

GRID = (1.5e-5, 3e-5, 6e-5)
# By tune.jsonl, but for grpo: 0.896 at 1.5e-5, 0.894 at 3e-5, which is no edge. pods lacks 3e-5.
LR = {"grpo": 3e-5, "grpo_skip": 3e-5, "aero": 3e-5, "reinforce_ada": 3e-5, "pods": 1.5e-5, "dapo": 3e-5, "mc_grpo": 3e-5,
      "sign": 3e-5}  # fmt: skip
TUNE_SEED = 100

SETTINGS = {    # group: (seeds, {setting: (algorithm, flags)})
    "main": (range(5), {
        "grpo": ("grpo", "--n_total 16"),
        "grpo_skip": ("grpo_skip", "--n_total 8"),
        "aero": ("aero", ""),
    }),
    "others": (range(3), {name: (name, "") for name in ("reinforce_ada", "pods", "dapo", "mc_grpo", "sign")}),
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
        "aero-long": ("aero", "--steps 240"),           # about what grpo's 100 steps cost
        "grpo_skip-long": ("grpo_skip", "--steps 260"),
    }),
    "refill": (range(5), {      # is it the refilling that helps dapo-8, or that it weighs by tokens?
        "tiny-grpo_skip": ("grpo_skip", "--n_total 8"),
        "tiny-grpo_skip-token": ("grpo_skip", "--n_total 8 --loss_norm token"),
        "tiny-aero": ("aero", ""),
        "tiny-aero-token": ("aero", "--loss_norm token"),
        "tiny-dapo-8": ("dapo", "--n_total 8"),
        "tiny-dapo-8-prompt": ("dapo", "--n_total 8 --loss_norm prompt"),
    }),
}
GROUP = {setting: group for group, (_, settings) in SETTINGS.items() for setting in settings}
SCORES = {"avg": "avg_at_k", "pass": "pass_at_k"}
TOTALS = {"drawn": COSTS["drawn"], "trained": COSTS["trained"], "tokens": {"rollout/tokens": 1},
          "rollout_flops": {"compute/rollout_flops": 1}, "train_flops": {"compute/train_flops": 1},
          "seconds": COSTS["seconds"] | {"time/save": -1}}  # fmt: skip
# Of a step; evaluation and saving are not its work. Waiting for graders is not summed: it is their start, once, a second or
# two at the first answer that is no integer. Where one comes before the first step, 95 steps wait for 0.002 s in all.
PHASES = ("rollout", "update", "sync", "other")
# Compared beside grpo, grpo_skip and aero: longer runs with each other, the setting that is best with what comes near, and
# what makes it so.
PAIRS = [
    ("aero-long", "grpo"), ("aero-long", "grpo_skip-long"), ("grpo_skip-long", "grpo"),
    *(("dapo-8", x) for x in ("grpo", "grpo_skip", "grpo_skip-long", "aero", "aero-token", "aero-long", "dapo")),
    *((f"tiny-dapo-8{end}", f"tiny-{x}") for end in ("", "-prompt") for x in ("grpo_skip", "aero")),
    *((f"tiny-{x}-token", f"tiny-{x}") for x in ("grpo_skip", "aero")),
]  # fmt: skip
SLACK = 0.01    # "grpo's score" is its final mean less this: its curve is flat at the end
START = 5       # steps that the seconds per step leave out: kernels and graphs are made in them


# --------------------------------------------------------------------------------------------------------------------
# Before: commands. After: a line of a few kB per run.

def commands(group: str, out: str):
    def command(setting, algo, lr, seed, flags, base="small"):
        return (f"python train.py --base {base} --algo {algo} --lr {lr:g} --seed {seed} --name {setting}-s{seed} --out {out}"
                f" {flags}".rstrip())

    every = {name: run for _, settings in SETTINGS.values() for name, run in settings.items()}
    if group == "tune":
        for algo, lr in itertools.product(LR, GRID):
            flags = f"{every[algo][1]} --eval_every 1000".lstrip()
            yield command(f"tune-{algo}-{lr:g}", algo, lr, TUNE_SEED, flags)
    elif group == "timing":
        for seed, (name, (algo, flags)) in itertools.product(range(3), every.items()):
            # A longer run has the steps of its twin. Few problems are evaluated, before the first step and after the last.
            if "--steps" not in flags and GROUP[name] != "refill" and (seed == 0 or GROUP[name] == "main"):
                yield command(f"timing-{name}", algo, LR[algo], seed, f"{flags} --eval_limit 8 --eval_every 1000".lstrip())
    elif group in SETTINGS:
        seeds, settings = SETTINGS[group]
        for seed, (name, (algo, flags)) in itertools.product(seeds, settings.items()):
            if group == "refill":
                yield command(name, algo, 3e-4, seed, f"{flags} --eval_every 30".lstrip(), "tiny")
            else:
                yield command(name, algo, LR[algo], seed, flags)
    else:
        raise ValueError(f"group {group}: wanted one of tune timing {' '.join(SETTINGS)}")


def digits(x):
    """Fractions of a JSON value to five significant digits."""
    return json.loads(json.dumps(x), parse_float=lambda text: float(f"{float(text):.5g}"))


def base_policy(path: Path) -> dict:
    """What training starts from: score, lengths in tokens, and how many groups of eight would be flat."""
    rows, groups = list(json_rows(path)), defaultdict(list)
    for row in rows:
        groups[row["problem"]].append(row["score"])
    lengths, right = np.array([row["length"] for row in rows]), np.array([row["score"] == 1 for row in rows])
    rates, first = [np.mean(scores) for scores in groups.values()], [scores[:8] for scores in groups.values()]
    return dict(
        avg=float(np.mean(rates)), avg_se=float(np.std(rates, ddof=1) / len(rates) ** 0.5) if len(rates) > 1 else None,
        length_right=float(lengths[right].mean()) if right.any() else None,
        length_wrong=float(lengths[~right].mean()) if not right.all() else None,
        length_5_50_95=np.quantile(lengths, (0.05, 0.5, 0.95)).tolist(), problems=len(rates),
        all_right=float(np.mean([min(scores) == 1 for scores in first])),
        all_wrong=float(np.mean([max(scores) < 1 for scores in first])),
    )


def record(run: Path) -> dict:
    """The compact form of a finished run. ValueError or OSError, one line, for anything else."""
    rows, config = read_rows(run), json.loads((run / "config.json").read_text())
    cfg, last = config["settings"], rows[-1]["step"] if rows else -1
    if last < cfg["steps"]:
        raise ValueError(f"{run}: found {max(last, 0)} steps of {cfg['steps']}")
    setting = cfg["name"].removesuffix(f"-s{cfg['seed']}")
    group = GROUP.get(setting, setting.split("-")[0])
    if group not in (*SETTINGS, "tune", "timing"):
        raise ValueError(f"{run}: found a run of no setting of this file")
    usual = asdict(train.parse([f"--{key}={cfg[key]}" for key in ("algo", "base") if cfg.get(key)]))
    own = ("algo", "base", "lr", "seed", "steps", "name", "out")
    totals = {name: running(rows, keys) for name, keys in TOTALS.items()}
    held_out = min((key.split("/")[1] for row in rows for key in row if key.endswith("/avg_at_k")), default="")
    timed = [row for row in rows if row["step"] > min(START, cfg["steps"] // 2)]
    steps = [row for row in rows if row["step"] > 0]
    if not held_out and group != "timing":
        raise ValueError(f"{run}: found no evaluation")
    return digits(dict(
        setting=setting, group=group, algo=cfg["algo"], seed=cfg["seed"], lr=cfg["lr"],
        steps=cfg["steps"], k=cfg["eval_k"], flags={key: x for key, x in cfg.items() if key not in own and usual.get(key) != x},
        **{key: config["versions"][key] for key in ("device", "commit")}, eval_data=held_out,
        evals=[{"step": row["step"]} | {name: row[f"eval/{held_out}/{key}"] for name, key in SCORES.items()}
               | {name: total[row["step"]] for name, total in totals.items()}
               for row in rows if f"eval/{held_out}/avg_at_k" in row],
        seconds={phase: sum(row[f"time/{phase}"] for row in timed) for phase in (*train.Clock.PHASES, "other")},
        flat={key: [round(row[f"group/{key}_frac"], 4) for row in steps] for key in ("all_right", "all_wrong")},
        timed_steps=len(timed), total={name: total[last] for name, total in totals.items()},
        saved_frac=steps[-1]["compute/saved_frac"],
        avg_se=json.loads((run / "eval" / f"{held_out}-step{last}.json").read_text())["avg_at_k_se"] if held_out else None,
        reward=[round(row["reward/mean"], 4) for row in steps],
        base=base_policy(run / "eval" / f"{held_out}-step0.jsonl") if held_out else None,
    ))  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Arithmetic

# Student's t, 97.5 %, for 1 to 9 degrees of freedom; of more seeds than ten the intervals are rather too wide.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values) -> tuple[float, float | None]:
    """Mean over seeds and half of its 95 % interval, None for a single seed."""
    n = len(values)
    return float(np.mean(values)), T975[min(n, 10) - 2] * float(np.std(values, ddof=1)) / n**0.5 if n > 1 else None


def reaches(xs, ys, target: float) -> float | None:
    """x at which the line through the points first reaches the target; None if it never does."""
    i = next((i for i, y in enumerate(ys) if y >= target), None)
    return None if i is None else float(np.interp(target, ys[max(i - 1, 0) : i + 1], xs[max(i - 1, 0) : i + 1]))


class Setting:
    """The seeds of a setting, and those that timed it with the GPU to itself, if there are any."""

    def __init__(self, runs: dict[int, dict], timing: dict[int, dict]):
        self.runs, self.one, self.mark = runs, next(iter(runs.values())), "" if timing else "*"
        self.timed = {seed: {p: run["seconds"][p] / run["timed_steps"] for p in PHASES}
                      for seed, run in (timing or runs).items()}  # fmt: skip
        self.phases = {p: float(np.mean([phases[p] for phases in self.timed.values()])) for p in PHASES}
        self.step_seconds = sum(self.phases.values())
        for at in (at for run in runs.values() for at in run["evals"]):
            at |= {"flops": at["rollout_flops"] + at["train_flops"], "seconds": at["step"] * self.step_seconds}

    def final(self, key: str) -> dict[int, float]:
        if key == "step":
            return {seed: sum(phases.values()) for seed, phases in self.timed.items()}
        return {seed: run["evals"][-1][key] for seed, run in self.runs.items()}

    def mean(self, key: str) -> float:
        return float(np.mean([*self.final(key).values()]))

    def curves(self, key: str) -> list[dict[int, float]]:
        return [{at["step"]: at[key] for at in run["evals"]} for run in self.runs.values()]

    def score_at(self, cost: str, spent: float) -> dict[int, float]:
        return {seed: float(np.interp(spent, *([at[key] for at in run["evals"]] for key in (cost, "avg"))))
                for seed, run in self.runs.items()}  # fmt: skip

    def reach(self, key: str, target: float) -> float | None:
        """What the mean of the seeds had spent when it first scored so much."""
        xs, ys = (np.mean([[*curve.values()] for curve in self.curves(name)], axis=0) for name in (key, "avg"))
        return reaches(xs, ys, target)


def versus(a: Setting, b: Setting | None, key="avg", equal="") -> tuple[float, float | None] | None:
    """
    Interval of a - b over the seeds that both have, which saw the same problems in the same order (but for dapo, which draws
    more of them). equal: a cost, at which the scores are compared, when both had spent what the cheaper spends in all.
    key "flops", "step": what a spends more in all, or seconds in a step, as a share of b.
    """
    if b is None or b is a or not a.final(key).keys() & b.final(key).keys():
        return None
    least = min(a.mean(equal), b.mean(equal)) if equal else None
    x, y = (side.score_at(equal, least) if equal else side.final(key) for side in (a, b))
    pairs = [(x[seed], y[seed]) for seed in sorted(x.keys() & y.keys())]
    return interval([a / b - 1 if key in ("flops", "step") else a - b for a, b in pairs])


def load(path: Path) -> dict[str, Setting]:
    runs, timing = defaultdict(dict), defaultdict(dict)
    for run in json_rows(path):
        if run["group"] == "timing":
            timing[run["setting"].removeprefix("timing-")][run["seed"]] = run
        elif run["group"] != "tune":
            if run["setting"] not in GROUP:
                raise ValueError(f"{path}: found a run of {run['setting']}, no setting of this file")
            seeds = runs[run["setting"]]
            if run["seed"] in seeds or any(run[x] != other[x] for other in seeds.values() for x in ("lr", "steps", "flags")):
                raise ValueError(f"{path}: found a second seed {run['seed']}, or other lr, steps or flags, of {run['setting']}")
            seeds[run["seed"]] = run
    if not runs:
        raise ValueError(f"{path}: found no run to report")
    return {name: Setting(runs[name], timing[name.removesuffix("-long")]) for name in GROUP if name in runs}


# --------------------------------------------------------------------------------------------------------------------
# Tables and figures

def table(title: str, head: str, rows: list[list]) -> str:
    cells = ["| " + " | ".join("" if x is None else str(x) for x in row) + " |" for row in rows]
    return "\n".join([f"**{title}**", "", f"| {head} |", "|---" * (head.count(" | ") + 1) + "|", *cells, ""])


def short(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def signed(gap, form="+.3f") -> str | None:
    """A difference with its interval."""
    low_high = gap and gap[1] is not None and f" [{gap[0] - gap[1]:{form}}, {gap[0] + gap[1]:{form}}]"
    return gap and f"{gap[0]:{form}}{low_high or ''}"


def verdict(gap, claim: float | None) -> str | None:
    """In words. `claim`: the claimed change of a cost; None for a score, of which more is better."""
    if gap is None:
        return None
    middle, half = gap
    if half is None:
        return "one run decides nothing"
    if claim is not None:
        low, high = middle - half, middle + half
        return "costs more" if low > 0 else "saves as much or more" if high <= claim else "saves less than claimed"
    return "better" if middle > half else "worse" if middle < -half else "no difference shown"


def base_line(runs: list[dict]) -> str:
    runs = [*{run["seed"]: run for run in runs}.values()]      # every setting of a seed evaluates the same base
    b = {key: np.mean([run["base"][key] for run in runs if run["base"][key] is not None], axis=0) for key in runs[0]["base"]}
    return (
        "The base policy, {n} seeds of {problems:.0f} problems: score {avg:.3f} +- {avg_se:.3f} (over problems); median "
        "length {length_5_50_95[1]:.0f} tokens, 5 % below {length_5_50_95[0]:.0f}, 5 % above {length_5_50_95[2]:.0f}; right "
        "ones {length_right:.0f}, wrong ones {length_wrong:.0f} on average; of groups of 8, {all_right:.0%} all right and "
        "{all_wrong:.0%} all wrong. Aimed at, after Qwen2.5-Math on MATH: a third or more of the groups flat, of both kinds; "
        "100 to 1,000 tokens; wrong ones longer.\n").format(n=len(runs), **b)


def tables(found: dict[str, Setting]) -> str:
    runs, (grpo, skip, aero) = [run for s in found.values() for run in s.runs.values()], map(found.get, SETTINGS["main"][1])
    k, goal = runs[0]["k"], grpo.mean("avg") - SLACK if grpo else np.inf
    known = {key: ", ".join(sorted({str(run[key]) for run in runs})) for key in ("device", "steps", "commit", "eval_data")}
    main, phases, parts = [], [], []
    for name, s in found.items():
        scores, n = [*s.final("avg").values()], s.one["steps"]
        label, (_, flags) = f"`{name}`", SETTINGS[s.one["group"]][1][name]
        score = f"{np.mean(scores):.3f}" + (f" +- {np.std(scores, ddof=1):.3f}" if len(scores) > 1 else "")
        to_grpo, to_aero = (f" ({gap[0]:+.0%})" if (gap := versus(s, x, "flops")) else "" for x in (grpo, aero))
        seconds, cost = short(s.step_seconds) + s.mark, short(s.mean("flops") / 1e12)
        goals = [short(x / unit) + mark if (x := s.reach(key, goal)) is not None else "never"
                 for key, unit, mark in (("flops", 1e12, ""), ("seconds", 1, s.mark))]  # fmt: skip
        main.append([label, len(scores), f"{s.one['lr']:g}", score, f"{s.mean('pass'):.3f}", signed(versus(s, grpo)),
                     signed(versus(s, skip)), signed(versus(s, skip, equal="flops")), f"{s.mean('drawn'):,.0f}",
                     f"{s.mean('trained'):,.0f}", cost + to_grpo, seconds, *goals])
        phases.append([label, *(f"{s.phases[p]:.3f}" for p in PHASES), seconds, *(short(s.mean(key) / n / 1e12) for key in
                      ("rollout_flops", "train_flops")), f"{np.mean([r['saved_frac'] for r in s.runs.values()]):.1%}"])
        if name not in SETTINGS["main"][1] and s.one["algo"] == "aero":
            parts.append([label, f"`{flags}`", len(scores), score, *(signed(versus(s, x, equal=equal)) for x in (aero, skip)
                          for equal in ("", "flops")), cost + to_aero])
    rows = []
    for what, claimed, claim, key, equal in (
        ("FLOPs, generation and training", "-48%", -0.48, "flops", ""), ("seconds per step", "-45%", -0.45, "step", ""),
        (f"avg@{k}", "equal or better", None, "avg", ""), (f"pass@{k}", "equal or better", None, "pass", ""),
        (f"avg@{k} at equal rollouts drawn", "equal or better", None, "avg", "drawn"),
        (f"avg@{k} at equal FLOPs", "", None, "avg", "flops"),
    ):  # fmt: skip
        rows.append([what, claimed])
        for other in (grpo, skip):
            both = aero and other
            gap = both and versus(aero, other, key, equal)
            mark = (aero.mark or other.mark) * (key == "step") if both else ""
            rows[-1] += [gap and signed(gap, "+.3f" if claim is None else "+.1%") + mark, verdict(gap, claim)]
    pairs = [[f"`{a}` - `{b}`", *(signed(versus(found[a], found[b], equal=equal)) for equal in ("", "flops", "drawn"))]
             for a, b in PAIRS if a in found and b in found]  # fmt: skip
    hours, to_skip = sum(run["total"]["seconds"] for run in runs) / 3600, "- grpo_skip | - grpo_skip at equal FLOPs"
    return "\n".join([
        f"{len(runs)} runs of {known['steps']} steps on {known['device']}, commit {known['commit']}, evaluated on "
        f"{known['eval_data']}; their steps took {hours:.1f} hours, side by side or not. In brackets: 95 % intervals over "
        "seeds, paired. Seconds are those of runs that had the GPU alone, a longer run's those of its twin; *: of the runs "
        "themselves, side by side. A score at the end has "
        f"a standard error over problems of at most {max(run.get('avg_se', 0) for run in runs):.3f}.\n",
        base_line(runs),
        table("Settings", f"setting | seeds | lr | avg@{k} +- sd | pass@{k} | - grpo | {to_skip} | drawn | trained on | "
              f"TFLOPs (against grpo) | s per step | TFLOPs to grpo's score - {SLACK:g} | seconds to it", main),
        table("A step by phase", f"setting | {' | '.join(f'{p}, s' for p in PHASES)} | sum, s | TFLOPs of generation | "
              "of training | saved_frac", phases),
        table("The paper's claims", "of aero | claimed | against grpo, N = 16 | verdict | against grpo_skip, N = 8 | verdict",
              rows),
        table("Parts and variants of AERO", f"setting | flags | seeds | avg@{k} +- sd | - aero | at equal FLOPs | {to_skip} | "
              "TFLOPs (against aero)", parts),
        table(f"Differences of avg@{k}", "of | at the end | at equal FLOPs | at equal rollouts drawn", pairs),
    ])  # fmt: skip


LOOK = dict(zip(("aero", "grpo", "grpo_skip"), STYLES))


def plain(axis, **labels):
    axis.set(**labels)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def draw_curves(found: dict[str, Setting], png: Path) -> None:
    """Held-out scores of the main three against what they took."""
    figure, axes = plt.subplots(2, 4, figsize=(13, 6), sharey="row", sharex="col", layout="constrained")
    three, k = [(name, found[name]) for name in LOOK if name in found], next(iter(found.values())).one["k"]
    progress = {"step": "updates", "drawn": "rollouts drawn", "flops": "FLOPs, generation and training",
                "seconds": "seconds in steps, extrapolated"}  # fmt: skip
    for row, score in zip(axes, SCORES):
        row[0].set_ylabel(f"held-out {score}@{k}")
        for axis, (key, label) in zip(row, progress.items()):
            for name, setting in three:
                band(axis, setting.curves(key), setting.curves(score), LOOK[name], markevery=1)
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            plain(axis, xlim=(0, None), xlabel=label if score == "pass" else "")
    names = [f"{name}, {len(setting.runs)} seeds" for name, setting in three]
    figure.legend(axes[0, 0].lines, names, loc="outside upper center", ncols=3, frameon=False, fontsize=12)
    figure.supxlabel("line: mean of the seeds, band: their range", fontsize=9)
    figure.savefig(png, dpi=140)
    plt.close(figure)


def draw_settings(found: dict[str, Setting], png: Path) -> None:
    """Final score with its interval over seeds, and FLOPs, of every setting; the cheapest at the bottom."""
    names = sorted(found, key=lambda name: found[name].mean("flops"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 1.2 + 0.27 * len(names)), sharey=True, layout="constrained",
                                         width_ratios=(3, 2))  # fmt: skip
    for y, name in enumerate(names):
        style = dict(color="#555555", marker="o") | {x: LOOK[name][x] for x in ("color", "marker") if name in LOOK}
        middle, half = interval([*found[name].final("avg").values()])
        left.errorbar(middle, y, xerr=half, capsize=3, markersize=6, **style)
        right.plot(found[name].mean("flops"), y, markersize=6, **style)
    for name, dashes in zip(LOOK, ("-", "--", ":")):
        if name in found:
            left.axvline(found[name].mean("avg"), color=LOOK[name]["color"], linewidth=1, linestyle=dashes, zorder=0)
    left.set_yticks(range(len(names)), [f"{name} ({len(found[name].runs)})" for name in names])
    right.xaxis.set_major_formatter(EngFormatter(sep=""))
    plain(left, xlabel=f"held-out avg@{found[names[0]].one['k']} at the end, 95 % interval over (so many) seeds")
    plain(right, xlabel="FLOPs, generation and training", xlim=(0, None))
    figure.savefig(png, dpi=140)
    plt.close(figure)


def best(path: Path) -> str:
    """Table of final scores by algorithm and learning rate, and the line for LR."""
    found = defaultdict(dict)
    for run in json_rows(path):
        found[run["algo"]][run["lr"]] = run["evals"][-1]["avg"]
    rates, choice = sorted({lr for scores in found.values() for lr in scores}), {}
    rows = []
    for algo, scores in found.items():
        choice[algo] = max(scores, key=scores.get)
        edge = ", the edge of the grid" * (choice[algo] in (min(scores), max(scores)))
        rows.append([f"`{algo}`", *(f"{scores[lr]:.3f}" if lr in scores else "" for lr in rates), f"{choice[algo]:g}{edge}"])
    head = " | ".join(["algorithm", *(f"{lr:g}" for lr in rates), "best"])
    line = ", ".join(f'"{algo}": {lr:g}' for algo, lr in choice.items())
    return f"{table('Final held-out score by learning rate, one seed', head, rows)}\nLR = {{{line}}}"


def main(argv) -> int:
    try:
        match argv:
            case ["commands", group, *rest] if not rest or (len(rest) == 2 and rest[0] == "--out"):
                print(*commands(group, *rest[1:] or ["out"]), sep="\n")
            case ["collect", *folders] if folders:
                for folder in map(Path, folders):
                    try:
                        print(json.dumps(record(folder)))
                    except (ValueError, OSError) as error:
                        print(f"left out: {error}", file=sys.stderr)
            case ["best", path]:
                print(best(Path(path)))
            case ["report", *rest] if len(rest) < 2:
                path = Path(*rest or [Path(__file__).with_suffix(".jsonl")])
                found = load(path)
                print(tables(found))
                if found.keys() & LOOK:
                    draw_curves(found, path.with_suffix(".png"))
                draw_settings(found, path.with_name(path.stem + "_settings.png"))
            case _:
                raise ValueError("wanted: commands GROUP [--out DIR] | collect RUN_FOLDER... | best FILE | report [FILE]")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
