"""
What one sees of a run while it goes on: header, metrics.jsonl, samples, console, TensorBoard.

Row k of metrics.jsonl describes the k-th step and the policy after k steps; row 0 holds the
evaluation before training. A row is on disk before the checkpoint of its step is.
"""

import json
import math
import os
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import aero
import config
from metrics import group_flops
from model import flash_attn_varlen_func

# The order of a row's metrics, by what stands before the slash.
GROUPS = (
    "reward", "eval", "group", "rollout", "response_length", "compute",
    "loss", "policy", "mismatch", "optim", "time", "perf",
)  # fmt: skip
LABEL = 10  # width of the first column of the header
COLOURS = {"green": 32, "red": 31, "dim": 2}


def paint(text: str, colour: str) -> str:
    """In colour on a terminal, as it is in a file."""
    if not sys.stdout.isatty():
        return text
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m"


# ---------------------------------------------------------------------------------- before the run


def header(cfg, run: Path, inputs, model, sampler, planned, device) -> str:
    """
    What is about to run, before it does. inputs: problems, held_out ({name: problems}) and
    model_cfg; planned: the memory plan of learner and sampler.
    """
    lines = [
        ("run", describe_run(cfg, run)),
        ("settings", describe_settings(cfg)),
        ("model", describe_model(cfg, inputs.model_cfg, model)),
        ("problems", f"{inputs.problems.report}; template {quote(cfg.template)}"),
    ]
    for problems in inputs.held_out.values():
        lines.append(("", f"evaluated on {problems.report}, {cfg.eval_k} responses each"))
    lines += [
        ("device", describe_device(device, sampler)),
        ("memory", describe_memory(planned, device)),
        ("", describe_cache(sampler)),
        ("compute", describe_compute(cfg, inputs.model_cfg, inputs.problems)),
    ]
    if cfg.steps <= cfg.warmup:
        lines.append(("warm-up", describe_warmup(cfg)))
    return "\n".join(f"{label:<{LABEL}}{text}" for label, text in lines)


def describe_run(cfg, run: Path) -> str:
    text = f"{run}: {cfg.algo}, {cfg.steps} steps of {cfg.problems} problems, seed {cfg.seed}"
    changed = config.differing(cfg)
    for name in ("loss", "reward"):
        if name in changed:
            text += f", {name} {changed[name]}"
    return text


def describe_settings(cfg) -> str:
    """The preset, and as flags all that differs from the defaults; name and out stand above."""
    flags = []
    for name, value in config.differing(cfg).items():
        if name not in ("name", "out"):
            flags.append(f"--{name} {quote(value)}")
    if not flags:
        return f"preset {cfg.preset()}, all as by default"
    lines = [f"preset {cfg.preset()}, differing from the defaults:"]
    for flag in flags:
        if len(lines[-1]) + len(flag) < 90:
            lines[-1] += f" {flag}"
        else:
            lines.append(flag)
    return ("\n" + " " * LABEL).join(lines)


def describe_model(cfg, model_cfg, model) -> str:
    layers = model_cfg.num_hidden_layers
    sizes = f"L{layers} D{model_cfg.hidden_size} V{model_cfg.vocab_size}"
    parameters = sum(p.numel() for p in model.parameters())
    name = cfg.model or "embedded base"
    return f"{name}: {model_cfg.model_type}, {parameters:,} parameters, {sizes}"


def quote(value) -> str:
    """A setting as one would type it. A template of several lines gets on one."""
    return shlex.quote(str(value).replace("\n", "\\n").replace("\t", "\\t"))


def describe_warmup(cfg) -> str:
    return (
        f"takes {cfg.warmup} steps and the run ends after {cfg.steps}: "
        f"the learning rate does not get to {cfg.lr:g}"
    )


def describe_device(device, sampler) -> str:
    world = dist.get_world_size()
    if device.type == "cpu":
        return f"{world} x CPU, fp32; attention by SDPA; sampler by {sampler.path}"
    attention = "flash-attn" if flash_attn_varlen_func else "torch varlen and flash kernels"
    gpu = torch.cuda.get_device_name(device)
    return f"{world} x {gpu}, bf16; attention by {attention}; sampler by {sampler.path}"


def describe_memory(planned, device) -> str:
    """Of a GPU at the peak of an update; on a CPU, of a process."""
    total = sum(planned.memory.values()) / 2**30
    parts = ", ".join(f"{size / 2**30:.1f} {name}" for name, size in planned.memory.items())
    holder = "GPU" if device.type == "cuda" else "process"
    return f"{total:.1f} GiB per {holder} ({parts})"


def describe_cache(sampler) -> str:
    return (
        f"{sampler.kv_bytes / 2**30:.2f} GiB of it are KV cache: {sampler.cache_tokens:,} tokens, "
        f"at most {sampler.slots} rollouts of at most {sampler.context}"
    )


def describe_compute(cfg, model_cfg, problems) -> str:
    """A bound on the FLOPs of a step: every rollout of every problem drawn, full length, kept."""
    prompt = max(len(problem.prompt) for problem in problems)
    n = cfg.n_total
    group = group_flops(model_cfg, cfg, prompt, lengths=[cfg.max_new] * n, kept=[*range(n)])
    most = cfg.problems * (group.rollout + group.train)
    text = (
        f"at most {most:.2g} FLOPs a step, with {n} rollouts of {cfg.max_new} tokens to a problem, "
        "all trained on"
    )
    if aero.ALGORITHMS[cfg.algo].refill:
        text += ", and no refill"
    return text


# ------------------------------------------------------------------------------------ rows on disk


def rewrite(path: Path, lines: list[str]) -> None:
    """The file with these lines, complete or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text("".join(f"{line}\n" for line in lines))
    os.replace(partial, path)


def keep_rows_until(path: Path, step: int) -> None:
    """Drops rows of later steps, and a last one that a kill cut short."""
    if path.is_file():
        *whole, _ = path.read_text().split("\n")
        rewrite(path, [line for line in whole if json.loads(line)["step"] <= step])


def forget_after(run: Path, step: int) -> None:
    """Rows and evaluations of steps that a run resumed at `step` will do again are dropped."""
    last_row = step if step else -1  # from step 0 it also evaluates again
    keep_rows_until(run / "metrics.jsonl", last_row)
    keep_rows_until(run / "rollouts.jsonl", last_row)
    for path in (run / "eval").glob("*-step*.json*"):
        if int(path.stem.rpartition("-step")[2]) > step:
            path.unlink()


def in_order(metrics: dict) -> dict:
    """In the order of GROUPS, those of other groups at the end."""
    places = {group: place for place, group in enumerate(GROUPS)}

    def place(name):
        return places.get(name.partition("/")[0], len(GROUPS))

    return {name: metrics[name] for name in sorted(metrics, key=place)}


def sample_rows(step: int, group, record, tokenizer) -> list[dict]:
    """Rows of rollouts.jsonl: every rollout of one group, what was decided about it and why."""
    advantages = dict(zip(record.kept, record.advantage))
    prompt = tokenizer.decode(group.problem.prompt)
    rows = []
    for i, reward in enumerate(record.rewards):
        rollout = group.rollouts[i]
        verdict = group.verdicts[i]
        # A truncated rollout counts as wrong in training, whatever it says.
        overruled = verdict.score > 0 and reward <= 0
        rows.append({
            "step": step,
            "problem": group.problem.id,
            "level": group.problem.level,
            "round": record.rounds[i],
            "sample": i,
            "prompt": prompt,
            "response": tokenizer.decode(rollout.tokens, skip_special_tokens=True),
            "gold": group.problem.gold,
            "extracted": verdict.extracted,
            "verdict": "right" if reward > 0 else "wrong",
            "rule": verdict.rule,
            "reason": "truncated" if overruled else verdict.reason,
            "length": len(rollout.tokens),
            "truncated": rollout.truncated,
            "kept": i in advantages,
            "advantage": advantages.get(i),
        })  # fmt: skip
    return rows


def sample_title(row: dict) -> str:
    verdict = row["verdict"]
    if row["reason"] != "wrong":
        verdict += f" ({row['reason']})"
    fate = f"kept, advantage {row['advantage']:+.2f}" if row["kept"] else "rejected"
    return (
        f"step {row['step']}, problem {row['problem']}: {verdict}, gold {row['gold']}, "
        f"found {row['extracted']}, {fate}"
    )


# ------------------------------------------------------------------------------------------- a run


class Log:
    """Everything a person looks at while a run goes on, on rank 0; silent on the others."""

    QUIET = 10  # seconds between two lines where there is no terminal to redraw one on

    def __init__(self, run: Path, start: int, cfg, rank: int):
        """start: steps done, 0 for a new run."""
        self.cfg = cfg
        self.rank = rank
        self.tty = sys.stdout.isatty()
        self.said = -math.inf  # when the last line of a step was printed
        self.seconds = []  # of each step of this process
        self.path = run / "metrics.jsonl"
        if rank == 0:
            forget_after(run, start)
            self.rows = open(self.path, "a", buffering=1)  # noqa: SIM115
            self.samples = open(run / "rollouts.jsonl", "a", buffering=1)  # noqa: SIM115
            self.board = SummaryWriter(run / "tb", purge_step=start + 1)
        self.bar = tqdm(
            total=cfg.steps,
            initial=start,
            disable=rank > 0 or not self.tty or start >= cfg.steps,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format="{n_fmt}/{total_fmt} {bar:10} {desc}",
        )

    def say(self, text: str) -> None:
        if text and self.rank == 0:
            tqdm.write(text)

    def write(self, step: int, metrics: dict) -> None:
        """A row of metrics.jsonl, and the same on the board."""
        self.rows.write(json.dumps({"step": step} | in_order(metrics)) + "\n")
        self.plot(step, metrics)

    def step(self, step: int, metrics: dict, scores: dict[str, dict] | None) -> None:
        """
        A step that is done: its row, and a line on the console. scores: {evaluation set: summary}
        of the last evaluation, of any step; None if a signal has stopped that of this one.
        """
        if self.rank:
            return
        self.write(step, metrics)
        total = self.cfg.steps
        self.seconds.append(metrics["time/step"])
        left = tqdm.format_interval(np.mean(self.seconds) * (total - step))
        parts = [
            f"reward {metrics['reward/mean']:.3f}",
            *score_texts(scores or {}),
            f"{metrics['perf/gen_tokens_per_s'] / 1000:.1f}k tokens/s",
            f"saved {metrics['compute/saved_frac']:.0%}",
            f"{left} left",
        ]
        line = " | ".join(parts)
        self.bar.n = step
        self.bar.set_description_str(line)
        evaluated = any(name.startswith("eval/") for name in metrics)
        silence = time.monotonic() - self.said
        if not self.tty and (evaluated or step == total or silence > self.QUIET):
            self.said = time.monotonic()
            self.say(f"step {step}/{total} | {line}")

    def evaluation(self, step: int, metrics: dict, scores: dict[str, dict]) -> None:
        """
        The evaluation with which a run begins: before training, or, where a signal had stopped the
        last one, that of the step it goes on from. A line of its own, on a terminal too.
        """
        if self.rank:
            return
        if step == 0:
            self.write(step, metrics)
            new = True
        else:
            new = self.amend(step, metrics)
        if scores and new:
            self.say(" | ".join([f"step {step}/{self.cfg.steps}", *score_texts(scores)]))

    def amend(self, step: int, metrics: dict) -> bool:
        """
        Adds metrics to the row of a step that is written already: the file is the old one or the
        new one, whatever happens. False if the row had them.
        """
        lines = self.path.read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        number = steps.index(step)
        row = json.loads(lines[number])
        if metrics.keys() <= row.keys():
            return False
        del row["step"]
        lines[number] = json.dumps({"step": step} | in_order(row | metrics))
        self.rows.close()
        rewrite(self.path, lines)
        self.rows = open(self.path, "a", buffering=1)  # noqa: SIM115
        self.plot(step, metrics)
        return True

    def plot(self, step: int, metrics: dict) -> None:
        """To the board: numbers as curves, lists as histograms."""
        for name, value in in_order(metrics).items():
            if isinstance(value, list):
                self.board.add_histogram(name, np.array(value), step)
            else:
                self.board.add_scalar(name, value, step)

    def rollouts(self, step: int, groups, records, tokenizer) -> None:
        """
        One group of each step to rollouts.jsonl, its first rollout to the board, and every
        show_every steps to the console. groups: of this rank; records: of these at least.
        """
        if self.rank or not groups:
            return
        group = groups[step % len(groups)]
        (record,) = (record for record in records if record.place == group.place)
        rows = sample_rows(step, group, record, tokenizer)
        self.samples.writelines(json.dumps(row) + "\n" for row in rows)
        first = rows[0]
        title = sample_title(first)
        text = f"    {title}\n\n{first['prompt']}\n{first['response']}"
        self.board.add_text("rollout", text.replace("\n", "\n    "), step)
        if (step - 1) % self.cfg.show_every == 0:
            title = paint(f"--- {title}", "green" if first["verdict"] == "right" else "red")
            self.say(f"{title}\n{paint(first['prompt'], 'dim')}\n{first['response']}\n---")

    def close(self) -> None:
        self.bar.close()
        if self.rank == 0:
            self.board.close()
            self.rows.close()
            self.samples.close()


def score_texts(scores: dict[str, dict]) -> list[str]:
    return [f"{name} {summary['avg_at_k']:.3f}" for name, summary in scores.items()]
