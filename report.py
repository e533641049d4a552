"""
What a run leaves behind for a reader: the closing table and the card of an exported model.

Both are made from the files of the run, eval/SET-stepN.json and metrics.jsonl, and from its totals.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from curves import curves, read_rows
from eval import columns
from metrics import Totals
from prompts import template_text

LEVELS = range(2, 13)  # a set with so many levels gets a line for each


def read_evaluations(run: Path) -> dict[int, dict[str, dict]]:
    """{step: {evaluation set: summary}}, both in order."""
    evaluations = {}
    for path in sorted((run / "eval").glob("*-step*.json")):
        name, _, step = path.stem.rpartition("-step")
        evaluations.setdefault(int(step), {})[name] = json.loads(path.read_text())
    return dict(sorted(evaluations.items()))


# ------------------------------------------------------------------------------- the closing table


@dataclass
class ScoreRow:
    """An evaluation set, or one of its levels, before training and after."""

    label: str
    problems: int
    base_avg: float
    avg: float
    error: float | None  # standard error of avg; none for a level, or for a single problem
    base_pass: float | None  # none for rewards other than 0 and 1
    pass_at_k: float | None

    def cells(self) -> list[str]:
        return [
            self.label,
            str(self.problems),
            f"{self.base_avg:.3f}",
            f"{self.avg:.3f}",
            decimals(self.error),
            f"{self.avg - self.base_avg:+.3f}",
            decimals(self.base_pass),
            decimals(self.pass_at_k),
        ]


def decimals(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def score_row(label: str, before: dict, after: dict) -> ScoreRow:
    """before, after: the summaries of a set, or of a level."""
    return ScoreRow(
        label=label,
        problems=after["n"],
        base_avg=before["avg_at_k"],
        avg=after["avg_at_k"],
        error=after.get("avg_at_k_se"),
        base_pass=before["pass_at_k"],
        pass_at_k=after["pass_at_k"],
    )


def score_rows(before: dict[str, dict], after: dict[str, dict]) -> list[ScoreRow]:
    """For each evaluation set its row, then those of its levels where there are 2 to 12."""
    rows = []
    for name, summary in after.items():
        rows.append(score_row(name, before[name], summary))
        if len(summary["by_level"]) in LEVELS:
            for level, part in summary["by_level"].items():
                rows.append(score_row(f"  level {level}", before[name]["by_level"][level], part))
    return rows


def closing_table(run: Path, step: int, totals: Totals, cfg) -> str:
    """Base against the policy after `step` steps on each set, then what it took so far."""
    lines = []
    evaluations = read_evaluations(run)
    if step in evaluations:
        k = cfg.eval_k
        head = ["", "problems", f"avg@{k}: base", "trained", "+-", "gain"]
        head += [f"pass@{k}: base", "trained"]
        rows = score_rows(evaluations[0], evaluations[step])
        lines.append(columns([head, *(row.cells() for row in rows)]))
    seconds = sum(
        row["time/step"] - row["time/eval"] for row in read_rows(run) if 0 < row["step"] <= step
    )
    lines.append(
        f"rollouts: {totals.drawn:,} drawn, {totals.trained:,} trained on, "
        f"{totals.tokens:,} tokens; {seconds:.0f} s in steps"
    )
    lines.append(
        f"compute: {totals.flops:.3g} FLOPs ({totals.rollout_flops:.3g} generation, "
        f"{totals.train_flops:.3g} training), {totals.saved_frac:.0%} less than GRPO with "
        f"{cfg.n_reference} rollouts per problem"
    )
    return "\n".join(lines)


def best_line(run: Path, cfg) -> str:
    """
    The evaluation with the highest avg@k in the mean over all sets, the first of equals. Empty
    where none is above that before training. The largest of several noisy numbers: it flatters.
    """
    evaluations = read_evaluations(run)
    scores = {}
    for step, summaries in evaluations.items():
        if summaries.keys() == evaluations[0].keys():  # a signal may leave some sets out
            values = [summary["avg_at_k"] for summary in summaries.values()]
            scores[step] = sum(values) / len(values)
    best = max(scores, key=scores.get, default=0)
    if best == 0:
        return ""
    return f"best: step {best} with avg@{cfg.eval_k} {scores[best]:.3f}, the highest on the way"


def close_run(run: Path, totals: Totals, cfg) -> str:
    """What a finished run says at its end; draws curves.png."""
    lines = [closing_table(run, cfg.steps, totals, cfg), best_line(run, cfg)]
    lines.append(curves([run], run / "curves.png"))
    return "\n".join(filter(None, lines))


# ---------------------------------------------------------------------------------- the model card

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
{origin}tags: [rlvr, {algo}]
---

# {name}, step {step}

{model} after {step} of {steps} steps of reinforcement learning with verifiable rewards by \
`{algo}` (see [AERO](https://arxiv.org/abs/2602.14338)) on {problems}.

```
{table}
```

{notes}

```
{template}
```

Settings and versions:

```json
{settings}
```
"""


def model_card(run: Path, state, cfg, inputs, versions: dict) -> str:
    """
    README.md of an exported folder, with the header that the hub reads. state: step and totals;
    inputs: the problems it was trained on.
    """
    from_hub = cfg.model and not Path(cfg.model).exists()
    notes = (
        f"Responses have at most {cfg.max_new} tokens, at temperature {cfg.temperature}, "
        "to prompts in this template:"
    )
    if cfg.eval_data:
        notes = f"The standard error, +-, is that over problems. {notes}"
    return CARD.format(
        origin=f"base_model: {cfg.model}\n" if from_hub else "",
        algo=cfg.algo,
        name=cfg.name,
        step=state.step,
        steps=cfg.steps,
        model=cfg.model or "The embedded base model",
        problems=inputs.problems.report,
        table=closing_table(run, state.step, state.totals, cfg),
        notes=notes,
        template=cfg.template if cfg.template == "chat" else template_text(cfg.template),
        settings=json.dumps(asdict(cfg) | versions, indent=1),
    )
