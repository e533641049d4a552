"""
What a run counts and what a person looks at: metrics of a step, console, TensorBoard, the closing table, curves.

    python report.py out/tiny-aero-s0 out/tiny-grpo-s0 ...      curves of several runs in one PNG, seeds as mean and band

Row k of metrics.jsonl describes the k-th step and the policy after k steps; row 0 holds the evaluation before training.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import aero
from model import flash_attn_varlen_func, forward_flops

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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


def header(cfg, run, model_cfg, parameters, problems, held_out, world, device, sampler, planned) -> str:
    """What is about to run, before it does."""
    gpu = f"{torch.cuda.get_device_name(device)}, bf16" if device.type == "cuda" else "CPU, fp32"
    cache = sampler.cache.numel() * sampler.cache.element_size() / 2**30
    attention = "SDPA" if device.type == "cpu" else "flash-attn" if flash_attn_varlen_func else "torch varlen and flash kernels"
    sizes = f"L{model_cfg.num_hidden_layers} D{model_cfg.hidden_size} V{model_cfg.vocab_size}"
    sets = ", ".join(f"{name} ({len(p)})" for name, p in held_out.items()) or "nothing"
    return "\n".join([
        f"run       {run}: {cfg.algo}, {cfg.steps} steps of {cfg.problems} problems, seed {cfg.seed}",
        f"model     {cfg.model or 'embedded base'}: {model_cfg.model_type}, {parameters:,} parameters, {sizes}",
        f"problems  {problems.report}",
        f"          template {cfg.template}, evaluated on {sets}, {cfg.eval_k} responses each",
        f"device    {world} x {gpu}; attention by {attention}, sampler: {sampler.path}",
        f"memory    {planned}",
        f"          {cache:.2f} GiB of the sampler's are KV cache: {sampler.pages * sampler.page:,} tokens, for {cfg.slots} slots "
        f"of at most {sampler.context}",
    ])


def keep_rows_until(path: Path, step: int) -> None:
    """Rows of steps that a resumed run will do again are dropped, and a last one that a kill cut short."""
    if path.is_file():
        whole = path.read_text().split("\n")[:-1] if step else []      # from step 0 it also evaluates again
        partial = path.with_suffix(".partial")
        partial.write_text("".join(f"{row}\n" for row in whole if json.loads(row)["step"] <= step))
        partial.rename(path)


class Log:
    """Everything a person looks at while a run goes on, on rank 0; silent on the others."""

    def __init__(self, run: Path, start: int, cfg, rank: int):
        self.rank, self.tty = rank, sys.stdout.isatty()
        if rank == 0:
            for name in ("metrics.jsonl", "rollouts.jsonl"):
                keep_rows_until(run / name, start)
            for path in (run / "eval").glob("*-step*.json*"):       # of a policy that is about to be trained again
                if int(path.stem.rpartition("-step")[2]) > start:
                    path.unlink()
            self.rows, self.samples = (open(run / name, "a", buffering=1) for name in ("metrics.jsonl", "rollouts.jsonl"))  # noqa: SIM115
            self.board = SummaryWriter(run / "tb", purge_step=start + 1)
        hidden = rank > 0 or not self.tty or start >= cfg.steps
        self.bar = tqdm(total=cfg.steps, initial=start, unit="step", disable=hidden, dynamic_ncols=True)

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)

    def metrics(self, step: int, metrics: dict) -> None:
        if self.rank:
            return
        for name, value in metrics.items():
            if isinstance(value, list):
                self.board.add_histogram(name, np.array(value), step)
            else:
                self.board.add_scalar(name, value, step)
        row = {"step": step} | {k: v.item() if isinstance(v, np.generic) else v for k, v in metrics.items()}
        self.rows.write(json.dumps(row) + "\n")

    def step(self, step: int, metrics: dict, scores: dict) -> None:
        self.metrics(step, metrics)
        held_out = "".join(f" | {name} {s['avg_at_k']:.3f}" for name, s in scores.items())
        line = (f"reward {metrics['reward/mean']:.3f}{held_out} | flat {metrics['group/flat_frac']:.2f} | "
                f"drawn {metrics['rollout/drawn']} trained {metrics['rollout/trained']} | "
                f"{metrics['perf/gen_tokens_per_s'] / 1000:.1f}k tok/s | saved {metrics['compute/saved_frac']:.0%}")
        self.bar.set_description_str(line, refresh=False)
        self.bar.update()
        if not self.tty:
            self.say(f"step {step}/{self.bar.total} | {line} | {metrics['time/step']:.1f} s")

    def rollouts(self, step: int, groups, records, tokenizer, show: bool) -> None:
        """All rollouts of one group per step go to rollouts.jsonl; now and then one of them to the console."""
        if self.rank or not groups:
            return
        which = step % len(groups)
        g, r = groups[which], records[which]
        advantage = dict(zip(r["kept"], r["advantage"]))
        prompt = tokenizer.decode(g.problem.prompt)
        for i, rollout in sorted(g.rollouts.items()):
            verdict = g.verdicts[i]
            row = dict(
                step=step, problem=g.problem.id, level=g.problem.level, prompt=prompt, sample=i, round=r["rounds"][i],
                response=tokenizer.decode(rollout.tokens, skip_special_tokens=True), gold=g.problem.gold,
                extracted=verdict.extracted, rule=verdict.rule, score=r["rewards"][i], reason=verdict.reason,
                truncated=rollout.truncated, kept=i in advantage, advantage=advantage.get(i),
            )
            self.samples.write(json.dumps(row) + "\n")
            if i == 0:
                text = f"{prompt}\n{row['response']}"
                self.board.add_text("rollout", f"    {text}".replace("\n", "\n    "), step)
                if show:
                    verdict = "right" if row["score"] else f"wrong, wanted {row['gold']}"
                    self.say(f"--- a rollout of step {step} ({verdict})\n{text}\n---")

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


def closing_table(before: dict, after: dict, totals: dict, cfg, seconds: float) -> str:
    """Base against trained for each evaluation set and level, then what it took. `before`, `after`: {name: summary}."""
    lines = [["", "problems", f"avg@{cfg.eval_k}: base", "trained", "gain", f"pass@{cfg.eval_k}: base", "trained"]]
    for name, end in after.items():
        start = before[name]
        pairs = [(name, start, end)]
        if 2 <= len(end["by_level"]) <= 12:
            pairs += [(f"  level {level}", start["by_level"][level], part) for level, part in end["by_level"].items()]
        for label, a, b in pairs:
            lines.append([label, str(b["n"]), f"{a['avg_at_k']:.3f}", f"{b['avg_at_k']:.3f}",
                          f"{b['avg_at_k'] - a['avg_at_k']:+.3f}", f"{a['pass_at_k']:.3f}", f"{b['pass_at_k']:.3f}"])
    widths = [max(map(len, column)) for column in zip(*lines)]
    rows = ["  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]) for line in lines]
    spent = totals["rollout_flops"] + totals["train_flops"]
    rows.append(f"rollouts: {totals['drawn']:,} drawn, {totals['trained']:,} trained on, {totals['tokens']:,} tokens; "
                f"{seconds:.0f} s in steps")
    rows.append(f"compute: {spent:.3g} FLOPs ({totals['rollout_flops']:.3g} generation, {totals['train_flops']:.3g} training), "
                f"{1 - spent / totals['reference_flops']:.0%} less than GRPO with {cfg.n_reference} rollouts per problem")
    return "\n".join(rows)


def close_run(run: Path, cfg) -> str:
    """The closing table of a finished run, read back from its files; draws curves.png beside them."""
    curves([run], run / "curves.png")
    _, rows = read_run(run)
    totals = json.loads((run / "checkpoints" / f"step_{cfg.steps}" / "progress.json").read_text())["totals"]
    before, after = ({path.name.rpartition("-step")[0]: json.loads(path.read_text()) for path in sorted(
        (run / "eval").glob(f"*-step{step}.json"))} for step in (0, cfg.steps))
    seconds = sum(row["time/step"] - row["time/eval"] for row in rows if "time/step" in row)
    return closing_table(before, after, totals, cfg, seconds)


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")   # Okabe and Ito


def read_run(folder: Path) -> tuple[str, list[dict]]:
    """(label of its setting, rows of metrics.jsonl). FileNotFoundError, one line, if this is not a run."""
    if not (folder / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{folder} holds no metrics.jsonl, so it is not a run")
    settings = json.loads((folder / "config.json").read_text())["settings"]
    label = settings["name"].removesuffix(f"-s{settings['seed']}")
    return label, [json.loads(line) for line in open(folder / "metrics.jsonl")]


def series(rows: list[dict], key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in rows if key in row}


def band(axis, xs, ys, colour, **style):
    """Mean of several seeds, and their range. xs, ys: one {step: value} per seed; drawn at the steps all of them have."""
    steps = sorted(set.intersection(*(set(y) & set(x) for x, y in zip(xs, ys))))
    if not steps:
        return
    x = np.mean([[x[s] for s in steps] for x in xs], axis=0)
    y = np.array([[y[s] for s in steps] for y in ys])
    axis.plot(x, y.mean(0), color=colour, **style)
    if len(ys) > 1:
        axis.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15, linewidth=0)


def smooth(values: dict[int, float], width: int = 5) -> dict[int, float]:
    """Trailing mean over `width` steps."""
    steps = sorted(values)
    return {s: float(np.mean([values[t] for t in steps[max(0, i - width + 1) : i + 1]])) for i, s in enumerate(steps)}


def curves(folders: list[Path], png: Path) -> None:
    """Held-out score against steps, compute and time; training reward; rollouts; flat groups."""
    settings = defaultdict(list)
    for folder in folders:
        label, rows = read_run(Path(folder))
        settings[label].append(rows)
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for (label, runs), colour in zip(settings.items(), COLOURS * 9):
        score = next((k for row in runs[0] for k in row if k.startswith("eval/") and k.endswith("/avg_at_k")), None)
        steps = [{row["step"]: row["step"] for row in rows} for rows in runs]
        spent = [running(rows, {"compute/rollout_flops": 1, "compute/train_flops": 1}) for rows in runs]
        clock = [running(rows, {"time/step": 1, "time/eval": -1}) for rows in runs]
        for axis, xs in zip(axes[0], (steps, spent, clock)):
            if score:
                band(axis, xs, [series(rows, score) for rows in runs], colour, marker="o", markersize=4)
        axes[0, 0].plot([], [], color=colour, label=label)
        for axis, key, style in ((axes[1, 0], "reward/mean", "-"), (axes[1, 1], "rollout/drawn", "-"),
                                 (axes[1, 1], "rollout/trained", "--"), (axes[1, 2], "group/all_wrong_frac", "-"),
                                 (axes[1, 2], "group/all_right_frac", "--")):
            band(axis, steps, [smooth(series(rows, key)) for rows in runs], colour, linestyle=style)
    held_out = f"held-out avg@k, {score.split('/')[1]}" if score else ""
    labels = (("steps", held_out), ("FLOPs, generation and training", ""), ("seconds without evaluation", ""),
              ("steps", "reward of what was drawn"), ("steps", "rollouts per step (dashed: trained)"),
              ("steps", "all wrong at first (dashed: right)"))
    for axis, (x, y) in zip(axes.flat, labels):
        axis.set(xlabel=x, ylabel=y)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1, 1].set_ylim(bottom=0)
    figure.legend(loc="outside upper center", ncols=len(settings), frameon=False)
    figure.savefig(png, dpi=120)
    plt.close(figure)


def running(rows: list[dict], signs: dict[str, int]) -> dict[int, float]:
    """{step: sum over the steps so far of sign x key}."""
    values = [sum(sign * row.get(key, 0) for key, sign in signs.items()) for row in rows]
    return dict(zip([row["step"] for row in rows], np.cumsum(values).tolist()))


if __name__ == "__main__":
    try:
        curves([Path(a) for a in sys.argv[1:]], Path("curves.png"))
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    print("curves.png")
