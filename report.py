"""
What a run counts and what a person looks at: metrics of a step, console, TensorBoard, the closing table, the model card,
and runs beside each other (`python eval.py --compare`).

Row k of metrics.jsonl describes the k-th step and the policy after k steps; row 0 holds the evaluation before training.
"""

import itertools
import json
import math
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import aero
from data import json_rows, template_text
from eval import columns
from model import flash_attn_varlen_func, forward_flops

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

# --------------------------------------------------------------------------------------------------------------------
# Count

def prompt_flops(model_cfg, n: int) -> float:
    """Forward FLOPs of a prompt of n tokens: none of them is predicted, so none goes through the head."""
    return forward_flops(model_cfg, n, n * (n + 1) / 2, predicted=0)


def response_flops(model_cfg, prompt: int, lengths) -> float:
    """Forward FLOPs of responses after a prompt whose keys are there already: token j sees prompt + j keys."""
    n = np.asarray(lengths, dtype=np.float64)
    return forward_flops(model_cfg, n.sum(), (n * prompt + n * (n + 1) / 2).sum())


def count_flops(model_cfg, records: list[dict], cfg) -> tuple[float, float, float]:
    """
    (generation, training, what GRPO at n_reference would have spent on both) for one step, from lengths alone.

    Generation: each prompt once per problem, then one forward per response token. Training: 3 forwards over prompt and
    response of each kept rollout, 4 with recomputed activations. The reference draws and trains n_reference rollouts of
    these problems' mean lengths; problems that only a refill brought in are not its work, so it has cfg.problems of them.
    """
    passes = (4 if cfg.checkpoint_activations else 3) * cfg.updates_per_batch
    rollout = train = reference = 0.0
    for r in records:
        prompt, lengths = prompt_flops(model_cfg, r["prompt"]), np.array(r["lengths"])
        rollout += prompt + response_flops(model_cfg, r["prompt"], lengths)
        kept = lengths[r["kept"]]
        train += passes * (len(kept) * prompt + response_flops(model_cfg, r["prompt"], kept))
        one = response_flops(model_cfg, r["prompt"], lengths) / len(lengths)
        reference += (prompt + cfg.n_reference * (one + passes * (prompt + one))) * cfg.problems / len(records)
    return rollout, train, reference


def describe(records: list[dict], model_cfg, cfg, totals: dict) -> dict:
    """Metrics of what was drawn and kept in one step, over all ranks. Adds to `totals`, which a checkpoint carries on."""
    rewards = np.concatenate([r["rewards"] for r in records])
    lengths = np.concatenate([r["lengths"] for r in records])
    shares = [np.mean(r["rewards"]) for r in records]
    kept = sum(len(r["kept"]) for r in records)
    trained_tokens = sum(sum(r["lengths"][i] for i in r["kept"]) for r in records)
    rollout, train, reference = count_flops(model_cfg, records, cfg)
    for name, value in (("drawn", len(lengths)), ("trained", kept * cfg.updates_per_batch), ("tokens", int(lengths.sum())),
                        ("rollout_flops", rollout), ("train_flops", train), ("reference_flops", reference)):
        totals[name] = totals.get(name, 0) + value
    return {
        "reward/mean": rewards.mean(), "reward/std": rewards.std(),
        # of the first round: what the algorithm had to deal with, before rescue
        "group/flat_frac": np.mean([aero.is_flat(first_round(r)) for r in records]),
        "group/all_right_frac": np.mean([first_round(r).min() == 1 for r in records]),
        "group/all_wrong_frac": np.mean([first_round(r).max() == 0 for r in records]),
        "group/rescued_frac": np.mean([first_round(r).max() == 0 and max(r["rewards"]) > 0 for r in records]),
        "group/problems": len(records), "group/success": shares, "response_length/all": lengths.tolist(),
        "rollout/drawn": len(lengths), "rollout/kept": kept, "rollout/trained": kept * cfg.updates_per_batch,
        "rollout/tokens": int(lengths.sum()), "rollout/trained_tokens": trained_tokens * cfg.updates_per_batch,
        "response_length/mean": lengths.mean(), "response_length/max": int(lengths.max()),
        "response_length/truncated_frac": np.concatenate([r["truncated"] for r in records]).mean(),
        "compute/rollout_flops": rollout, "compute/train_flops": train,
        "compute/saved_frac": 1 - (totals["rollout_flops"] + totals["train_flops"]) / totals["reference_flops"],
    } | {f"reward/{reason}_frac": np.mean([x == reason for r in records for x in r["reasons"]])
         for reason in ("unparsed", "limit", "timeout", "crash")}


def first_round(record) -> np.ndarray:
    return np.array(record["rewards"])[np.array(record["rounds"]) == 0]


# --------------------------------------------------------------------------------------------------------------------
# Show

# Dense bf16 matrix rate of the vendor's datasheet, for MFU.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def paint(text: str, colour: str) -> str:
    """In colour on a terminal, as it is in a file."""
    return f"\x1b[{dict(green=32, red=31, dim=2)[colour]}m{text}\x1b[0m" if sys.stdout.isatty() else text


def header(cfg, run, model_cfg, parameters, problems, held_out, world, device, sampler, planned) -> str:
    """What is about to run, before it does."""
    gpu = f"{torch.cuda.get_device_name(device)}, bf16" if device.type == "cuda" else "CPU, fp32"
    cache = sampler.cache.numel() * sampler.cache.element_size() / 2**30
    attention = "SDPA" if device.type == "cpu" else "flash-attn" if flash_attn_varlen_func else "torch varlen and flash kernels"
    sizes = f"L{model_cfg.num_hidden_layers} D{model_cfg.hidden_size} V{model_cfg.vocab_size}"
    n, prompt = cfg.n_total, max(len(p.prompt) for p in problems)
    longest = dict(prompt=prompt, lengths=[cfg.max_new] * n, kept=[*range(n)])
    most = cfg.problems * sum(count_flops(model_cfg, [longest], cfg)[:2])
    sets = [f"          evaluated on {p.report}, {cfg.eval_k} responses each" for p in held_out.values()]
    return "\n".join([
        f"run       {run}: {cfg.algo}, {cfg.steps} steps of {cfg.problems} problems, seed {cfg.seed}",
        f"model     {cfg.model or 'embedded base'}: {model_cfg.model_type}, {parameters:,} parameters, {sizes}",
        f"problems  {problems.report}; template {cfg.template!r}",
        *sets,
        f"device    {world} x {gpu}; attention by {attention}; sampler by {sampler.path}",
        f"memory    {planned}",
        f"          {cache:.2f} GiB of it are KV cache: {sampler.pages * sampler.page:,} tokens, at most {cfg.slots} rollouts "
        f"of at most {sampler.context}",
        f"compute   at most {most:.2g} FLOPs a step, with {n} rollouts of {cfg.max_new} tokens to a problem, all trained on"
        + ", and no refill" * aero.ALGORITHMS[cfg.algo].refill,
    ])


def keep_rows_until(path: Path, step: int) -> None:
    """Rows of steps that a resumed run will do again are dropped, and a last one that a kill cut short."""
    if path.is_file():
        whole = path.read_text().split("\n")[:-1]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(f"{row}\n" for row in whole if json.loads(row)["step"] <= step))
        partial.rename(path)


GROUPS = ("reward", "eval", "group", "rollout", "response_length", "compute", "loss", "policy", "mismatch", "optim", "time",
          "perf")


def layout(names) -> dict:
    """TensorBoard's tab of custom scalars, which keeps this order of groups; its other tabs sort them by name."""
    charts = {group: {} for group in GROUPS}
    charts["eval"] = {key: ["Multiline", [f"eval/.*/{key}$"]] for key in ("avg_at_k", "pass_at_k")}
    for name in names:
        group, _, key = name.partition("/")
        charts[group].setdefault(key, ["Multiline", [f"{name}$"]])
    return charts


class Log:
    """Everything a person looks at while a run goes on, on rank 0; silent on the others."""

    QUIET = 10      # seconds between two lines where there is no terminal to redraw one on

    def __init__(self, run: Path, start: int, cfg, rank: int, pending: bool):
        """start: steps done; pending: the row of the last of them is still to be written."""
        self.rank, self.tty, self.said, self.seconds, self.names = rank, sys.stdout.isatty(), -math.inf, [], {}
        if rank == 0:
            for name, rows in (("metrics.jsonl", start - pending), ("rollouts.jsonl", start)):
                keep_rows_until(run / name, rows if start else -1)      # from step 0 it also evaluates again
            for path in (run / "eval").glob("*-step*.json*"):       # of a policy that is about to be trained again
                if int(path.stem.rpartition("-step")[2]) > start:
                    path.unlink()
            self.rows, self.samples = (open(run / name, "a", buffering=1) for name in ("metrics.jsonl", "rollouts.jsonl"))  # noqa: SIM115
            self.board = SummaryWriter(run / "tb", purge_step=start + 1 - pending)
        hidden = rank > 0 or not self.tty or start >= cfg.steps
        self.bar = tqdm(total=cfg.steps, initial=start, disable=hidden, dynamic_ncols=True, file=sys.stdout,
                        bar_format="{n_fmt}/{total_fmt} {bar:10} {desc}")

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)

    def metrics(self, step: int, metrics: dict) -> None:
        """A row of metrics.jsonl, and the same on the board, in the order of GROUPS."""
        if self.rank:
            return
        row = dict(sorted(metrics.items(), key=lambda item: GROUPS.index(item[0].partition("/")[0])))
        names = self.names | {name: None for name, value in row.items() if not isinstance(value, list)}
        if names != self.names:     # a step without a kept rollout, say, has no loss: the layout grows when one comes
            self.names = names
            self.board.add_custom_scalars(layout(names))
        for name, value in row.items():
            if isinstance(value, list):
                self.board.add_histogram(name, np.array(value), step)
            else:
                self.board.add_scalar(name, value, step)
        self.rows.write(json.dumps({"step": step} | row) + "\n")

    def step(self, step: int, metrics: dict, scores: dict) -> None:
        self.metrics(step, metrics)
        now, total = time.monotonic(), self.bar.total
        self.seconds.append(metrics["time/step"])
        left = tqdm.format_interval(np.mean(self.seconds) * (total - step))
        held_out = "".join(f" | {name} {s['avg_at_k']:.3f}" for name, s in scores.items())
        line = (f"reward {metrics['reward/mean']:.3f}{held_out} | {metrics['perf/gen_tokens_per_s'] / 1000:.1f}k tokens/s | "
                f"saved {metrics['compute/saved_frac']:.0%} | {left} left")
        self.bar.n = step
        self.bar.set_description_str(line)
        evaluated = any(name.startswith("eval/") for name in metrics)
        if not self.tty and (evaluated or step == total or now - self.said > self.QUIET):
            self.said = now
            self.say(f"step {step}/{total} | {line}")

    def rollouts(self, step: int, groups, records, tokenizer, show: bool) -> None:
        """All rollouts of one group per step go to rollouts.jsonl; now and then one of them to the console."""
        if self.rank or not groups:
            return
        which = step % len(groups)
        g, r = groups[which], records[which]
        advantage = dict(zip(r["kept"], r["advantage"]))
        prompt = tokenizer.decode(g.problem.prompt)
        for i, rollout in sorted(g.rollouts.items()):
            verdict, right = g.verdicts[i], r["rewards"][i] > 0
            row = dict(
                step=step, problem=g.problem.id, level=g.problem.level, round=r["rounds"][i], sample=i, prompt=prompt,
                response=tokenizer.decode(rollout.tokens, skip_special_tokens=True), gold=g.problem.gold,
                extracted=verdict.extracted, verdict="right" if right else "wrong", rule=verdict.rule,
                reason="truncated" if verdict.score and not right else verdict.reason, length=len(rollout.tokens),
                truncated=rollout.truncated, kept=i in advantage, advantage=advantage.get(i),
            )
            self.samples.write(json.dumps(row) + "\n")
            if i == 0:
                fate = f"kept, advantage {advantage[i]:+.2f}" if i in advantage else "rejected"
                why = "" if row["reason"] == "wrong" else f" ({row['reason']})"
                title = (f"step {step}, problem {g.problem.id}: {row['verdict']}{why}, gold {row['gold']}, "
                         f"found {row['extracted']}, {fate}")
                self.board.add_text("rollout", f"    {title}\n\n{prompt}\n{row['response']}".replace("\n", "\n    "), step)
                if show:
                    title = paint(f"--- {title}", "green" if right else "red")
                    self.say(f"{title}\n{paint(prompt, 'dim')}\n{row['response']}\n---")

    def close(self) -> None:
        self.bar.close()
        if self.rank == 0:
            self.board.close()
            self.rows.close()
            self.samples.close()


def peak_flops() -> float | None:
    """The datasheet's rate of this GPU, if we know it."""
    return next((rate for name, rate in PEAK_FLOPS.items() if name in torch.cuda.get_device_name()), None)


def speeds(metrics: dict, cfg, device, world: int) -> dict:
    """Rates of one step. Tokens per second over all ranks; MFU of the update, without what is computed a second time."""
    decode = metrics["time/rollout"] + metrics["time/reward"]
    rates = {"perf/gen_tokens_per_s": metrics["rollout/tokens"] / decode,
             "perf/train_tokens_per_s": metrics["rollout/trained_tokens"] / metrics["time/update"]}
    if device.type == "cuda":
        rates["perf/peak_mem_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if peak := peak_flops():
            needed = metrics["compute/train_flops"] * (3 / 4 if cfg.checkpoint_activations else 1)
            rates["perf/mfu"] = needed / metrics["time/update"] / peak / world
    return rates


# --------------------------------------------------------------------------------------------------------------------
# What a run leaves behind

def closing_table(run: Path, step: int, totals: dict, cfg) -> str:
    """Base against the policy after `step` steps for each evaluation set and level, then what it took so far."""
    before, after = ({path.name.rpartition("-step")[0]: json.loads(path.read_text()) for path in sorted(
        (run / "eval").glob(f"*-step{at}.json"))} for at in (0, step))
    lines = [["", "problems", f"avg@{cfg.eval_k}: base", "trained", "+-", "gain", f"pass@{cfg.eval_k}: base", "trained"]]
    for name, end in after.items():
        start = before[name]
        pairs = [(name, start, end)]
        if 2 <= len(end["by_level"]) <= 12:
            pairs += [(f"  level {level}", start["by_level"][level], part) for level, part in end["by_level"].items()]
        for label, a, b in pairs:
            error = b.get("avg_at_k_se")    # none for a level, or for a single problem
            lines.append([label, str(b["n"]), f"{a['avg_at_k']:.3f}", f"{b['avg_at_k']:.3f}", f"{error:.3f}" if error else "",
                          f"{b['avg_at_k'] - a['avg_at_k']:+.3f}", f"{a['pass_at_k']:.3f}", f"{b['pass_at_k']:.3f}"])
    spent = totals["rollout_flops"] + totals["train_flops"]
    seconds = sum(row["time/step"] - row["time/eval"] for row in read_rows(run) if 0 < row["step"] <= step)
    return "\n".join([
        *[columns(lines)] * bool(after),
        f"rollouts: {totals['drawn']:,} drawn, {totals['trained']:,} trained on, {totals['tokens']:,} tokens; "
        f"{seconds:.0f} s in steps",
        f"compute: {spent:.3g} FLOPs ({totals['rollout_flops']:.3g} generation, {totals['train_flops']:.3g} training), "
        f"{1 - spent / totals['reference_flops']:.0%} less than GRPO with {cfg.n_reference} rollouts per problem",
    ])


def close_run(run: Path, totals: dict, best: dict | None, cfg) -> str:
    """The closing table of a finished run; draws curves.png."""
    curves([run], run / "curves.png")
    lines = [closing_table(run, cfg.steps, totals, cfg)]
    if best:    # the largest of several noisy numbers, so it flatters
        lines.append(f"best: step {best['step']} with avg@{cfg.eval_k} {best['score']:.3f}, the highest on the way")
    return "\n".join(lines)


def model_card(run: Path, step: int, totals: dict, cfg, problems, versions: dict) -> str:
    """README.md of an exported folder, with the header that the hub reads: origin, scores, prompt and settings."""
    hub = [f"base_model: {cfg.model}"] if cfg.model and not Path(cfg.model).exists() else []
    template = cfg.template if cfg.template == "chat" else template_text(cfg.template)
    return "\n".join([
        "---", "library_name: transformers", "pipeline_tag: text-generation", *hub, f"tags: [rlvr, {cfg.algo}]", "---", "",
        f"# {cfg.name}, step {step}", "",
        f"{cfg.model or 'The embedded base model'} after {step} of {cfg.steps} steps of reinforcement learning with "
        f"verifiable rewards by `{cfg.algo}` (see [AERO](https://arxiv.org/abs/2602.14338)) on {problems.report}.", "",
        "```", closing_table(run, step, totals, cfg), "```", "",
        "The standard error, +-, is that over problems. " * bool(cfg.eval_data)
        + f"Responses have at most {cfg.max_new} tokens, at temperature {cfg.temperature}, to prompts in this template:", "",
        "```", template, "```", "", "Settings and versions:", "",
        "```json", json.dumps(asdict(cfg) | versions, indent=1), "```", "",
    ])


# --------------------------------------------------------------------------------------------------------------------
# Runs beside each other

# Okabe and Ito's colours, which the colour-blind can tell apart; in grey print markers and widths do.
STYLES = [dict(color=color, marker=marker, linewidth=width) for color, marker, width in zip(
    ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"), "os^DvPX", (2.6, 1.7, 1.0) * 3)]


def read_rows(run: Path) -> list[dict]:
    """Rows of metrics.jsonl. FileNotFoundError or ValueError, one line, if this is not a run or its file is damaged."""
    if not (run / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{run} holds no metrics.jsonl, so it is not a run")
    return list(json_rows(run / "metrics.jsonl"))


def by_setting(folders) -> dict[str, list[tuple[Path, list[dict]]]]:
    """
    {setting: [(folder, rows) of each seed]}, in the order of `folders`. A setting is called by its run's name, with the parent
    folder before it where that name stands for other settings already. ValueError if that does too, or for a seed twice.
    """
    settings, runs = {}, {}
    for folder in map(Path, folders):
        rows, cfg = read_rows(folder), json.loads((folder / "config.json").read_text())["settings"]
        label = cfg["name"].removesuffix(f"-s{cfg['seed']}")
        rest = {key: value for key, value in cfg.items() if key not in ("name", "out", "seed")}
        if settings.setdefault(label, rest) != rest:
            label = f"{folder.resolve().parent.name}/{label}"
        if settings.setdefault(label, rest) != rest:
            raise ValueError(f"{folder}: found other settings than in a run of the same name, wanted a --name for each")
        seeds = runs.setdefault(label, {})
        if cfg["seed"] in seeds:
            raise ValueError(f"{folder}: found seed {cfg['seed']} of {label} twice, the first in {seeds[cfg['seed']][0]}")
        seeds[cfg["seed"]] = folder, rows
    return {label: list(seeds.values()) for label, seeds in runs.items()}


def series(rows: list[dict], key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in rows if key in row}


def running(rows: list[dict], signs: dict[str, int]) -> dict[int, float]:
    """{step: sum over the steps so far of sign x key}."""
    values = [sum(sign * row.get(key, 0) for key, sign in signs.items()) for row in rows]
    return dict(zip([row["step"] for row in rows], np.cumsum(values).tolist()))


FLOPS, SECONDS = {"compute/rollout_flops": 1, "compute/train_flops": 1}, {"time/step": 1, "time/eval": -1}


def smooth(values: dict[int, float], width: int = 10) -> dict[int, float]:
    """Trailing mean over `width` steps."""
    steps = sorted(values)
    return {s: float(np.mean([values[t] for t in steps[max(0, i - width + 1) : i + 1]])) for i, s in enumerate(steps)}


def band(axis, xs, ys, style, **more):
    """Mean of several seeds, and their range. xs, ys: one {step: value} per seed; drawn at the steps all of them have."""
    steps = sorted(set.intersection(*(set(y) & set(x) for x, y in zip(xs, ys))))
    if not steps:
        return
    x = np.mean([[x[s] for s in steps] for x in xs], axis=0)
    y = np.array([[y[s] for s in steps] for y in ys])
    axis.plot(x, y.mean(0), **style | dict(markevery=max(1, len(steps) // 8), markersize=5) | more)
    if len(ys) > 1:
        axis.fill_between(x, y.min(0), y.max(0), color=style["color"], alpha=0.15, linewidth=0)


def curves(folders, png: Path) -> None:
    """Held-out score and reward against steps, compute and time; rollouts drawn and trained; flat groups."""
    settings = {label: [rows for _, rows in seeds] for label, seeds in by_setting(folders).items()}
    names = {key for runs in settings.values() for rows in runs for row in rows for key in row if key.endswith("/avg_at_k")}
    score = min(names, default="eval/nothing/avg_at_k")
    progress = (("steps", {}), ("FLOPs, generation and training", FLOPS), ("seconds, without evaluation", SECONDS))
    last = (("rollout/drawn", "rollouts a step (dashed: trained on)"),
            ("group/all_wrong_frac", "share of problems all wrong at first"),
            ("group/all_right_frac", "share of problems all right at first"))
    figure, axes = plt.subplots(3, 3, figsize=(11, 9.6), layout="constrained")
    for row in axes[:2]:
        row[1].sharey(row[0])
        row[2].sharey(row[0])
    for (label, runs), style in zip(settings.items(), itertools.cycle(STYLES)):
        axes[0, 0].plot([], [], label=label, **style)
        for column, (_, keys) in enumerate(progress):
            xs = [running(rows, keys) if keys else series(rows, "step") for rows in runs]
            band(axes[0, column], xs, [series(rows, score) for rows in runs], style, markevery=1)
            band(axes[1, column], xs, [smooth(series(rows, "reward/mean")) for rows in runs], style)
        xs = [series(rows, "step") for rows in runs]
        for column, (key, _) in enumerate(last):
            band(axes[2, column], xs, [smooth(series(rows, key)) for rows in runs], style)
        trained = [smooth(series(rows, "rollout/trained")) for rows in runs]
        band(axes[2, 0], xs, trained, style, linestyle="--", markerfacecolor="white", zorder=3)  # seen where all are trained on
    for column, ((x, _), (_, y)) in enumerate(zip(progress, last)):
        axes[0, column].set(xlabel=x)
        axes[1, column].set(xlabel=x)
        axes[2, column].set(xlabel="steps", ylabel=y, ylim=(0, None))
    for axis in axes[:2, 1]:
        axis.xaxis.set_major_formatter(EngFormatter())      # 2 T for 2e12
    axes[0, 0].set(ylabel=f"held-out avg@k, {score.split('/')[1]}")
    axes[1, 0].set(ylabel="reward of all that was drawn")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=min(4, len(settings)), frameon=False, fontsize=12)
    if any(len(runs) > 1 for runs in settings.values()):
        figure.supxlabel("line: mean of the seeds, band: their range; below the first row: mean of ten steps", fontsize=9)
    figure.savefig(png, dpi=140)
    plt.close(figure)


def difference(a, b) -> tuple[float, float | None]:
    """
    Mean of `a` minus that of `b`, one {prompt: share right} per seed, and its standard error, from two parts: over problems,
    paired, since both sides were asked the same ones, and over the seeds of each side that has several. With several seeds
    on both sides it is rather too large, since both parts hold some noise of sampling. A side of one seed adds nothing for
    seeds, and the error is too small. None where there is nothing to tell it from. ValueError for different prompts.
    """
    if len({frozenset(seed) for seed in (*a, *b)}) > 1:
        raise ValueError("were not evaluated on the same prompts")
    x, y = (np.array([[seed[prompt] for prompt in a[0]] for seed in side]) for side in (a, b))      # (seeds, problems)
    gap = x.mean(0) - y.mean(0)
    parts = [gap] * (len(gap) > 1) + [side.mean(1) for side in (x, y) if len(side) > 1]
    return float(gap.mean()), math.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)) if parts else None


def last_evaluation(run: Path, rows: list[dict]) -> tuple[int, dict[str, list[dict]]]:
    """(its step, {evaluation set: [{prompt: share of its responses that are right} before training, the same then]})"""
    names = {row["step"]: [key.split("/")[1] for key in row if key.endswith("/avg_at_k")] for row in rows}
    last = max((step for step in names if names[step]), default=0)
    if last == 0:
        raise ValueError(f"{run}: found no evaluation after a step, wanted one to compare")
    found = {name: [] for name in sorted(names[last])}
    for name, step in itertools.product(found, (0, last)):
        scores = defaultdict(list)
        for record in json_rows(run / "eval" / f"{name}-step{step}.jsonl"):
            scores[record["prompt"]].append(record["score"])
        found[name].append({prompt: float(np.mean(values)) for prompt, values in scores.items()})
    return last, found


COSTS = {"drawn": {"rollout/drawn": 1}, "trained": {"rollout/trained": 1}, "flops": FLOPS, "seconds": SECONDS}


def compare(folders, png: Path) -> tuple[str, dict]:
    """
    Draws `png` and returns (table, {setting: its numbers}): each setting at its last evaluation, in the mean of its seeds,
    and against the first. Raises ValueError or FileNotFoundError, one line, for what is no run or cannot be compared.
    """
    lines = [["", "data", "seeds", "steps", "base", "trained", "gain", "+-", "against the first", "+-", "drawn", "trained on",
              "FLOPs", "seconds"]]
    results, first, reference = {}, None, None
    for label, seeds in by_setting(folders).items():
        steps, rates = zip(*(last_evaluation(*seed) for seed in seeds))
        if len(set(steps)) > 1:
            raise ValueError(f"{label}: found last evaluations at steps {', '.join(map(str, steps))}, wanted one step")
        first, reference = first or label, reference or rates
        r = results[label] = {"seeds": len(seeds), "steps": steps[0], "eval": {}}
        for key, parts in COSTS.items():
            r[key] = float(np.mean([running(rows, parts)[at] for (_, rows), at in zip(seeds, steps)]))
        cost = [f"{r['drawn']:,.0f}", f"{r['trained']:,.0f}"] + [
            f"{r[key]:.3g}" + f" ({r[key] / results[first][key] - 1:+.0%})" * (label != first) for key in ("flops", "seconds")]
        for name in reference[0]:
            try:
                base, trained = zip(*(seed[name] for seed in rates))
                gains = [{p: after[p] - before[p] for p in before | after} for before, after in zip(base, trained)]
                gain = difference(gains, [dict.fromkeys(gains[0], 0.0)])    # paired by seed too
                gap = difference(trained, [seed[name][1] for seed in reference])
            except (KeyError, ValueError) as error:
                raise ValueError(f"{first} and {label} were not evaluated on the same prompts of {name}") from error
            by_seed = [float(np.mean([*seed.values()])) for seed in trained]
            score = float(np.mean(by_seed))
            r["eval"][name] = {"trained": score, "by_seed": by_seed, "gain": gain,
                               "against_first": None if label == first else gap}
            cells = [f"{x:{sign}.3f}" if x is not None else "" for x, sign in zip((*gain, *gap), ("+", "", "+", ""))]
            lines.append([label, name, str(r["seeds"]), str(r["steps"]), f"{score - gain[0]:.3f}", f"{score:.3f}",
                          *cells[:2], *(["", ""] if label == first else cells[2:]), *cost])
    png.parent.mkdir(parents=True, exist_ok=True)
    curves(folders, png)
    single = [label for label, r in results.items() if r["seeds"] == 1]
    note = (f"\none seed of {', '.join(single)}: its errors lack the variance between seeds. With a standard deviation of 0.03 "
            "between seeds, 38 % of\nsimulated comparisons of equals came out two errors apart") * bool(single)
    return f"{columns(lines)}{note}\ncurves: {png}", results
