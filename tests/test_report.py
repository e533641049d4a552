"""report.py: what a run leaves behind, on files written by hand. test_train.py has whole runs."""

import json
from types import SimpleNamespace

import pytest

import report
from config import Config
from metrics import Totals

TOTALS = Totals(
    drawn=8, trained=4, tokens=9, rollout_flops=1.0, train_flops=1.0, reference_flops=4.0
)
INPUTS = SimpleNamespace(problems=SimpleNamespace(report="arithmetic, 2 of 2 rows"))


def summary(avg, n=4, error=0.1, levels=()):
    by_level = {level: {"n": 2, "avg_at_k": avg, "pass_at_k": 1.0} for level in levels}
    return {
        "n": n, "avg_at_k": avg, "avg_at_k_se": error, "pass_at_k": avg / 2, "by_level": by_level
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """The folder of a run that took two seconds, without evaluations."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time/step": 2.0, "time/eval": 0.0}\n')
    (tmp_path / "config.json").write_text('{"settings": {"name": "x-s0", "seed": 0}}')
    (tmp_path / "eval").mkdir()
    return tmp_path


def evaluate(run, step, **summaries):
    for name, scores in summaries.items():
        (run / "eval" / f"{name}-step{step}.json").write_text(json.dumps(scores))


def test_a_run_without_evaluation(run):
    """Its closing table was a header over nothing, and its card explained the error of scores that
    it did not have."""
    cfg = Config(name="x", algo="grpo", model=str(run), eval_data="")
    assert report.closing_table(run, 1, TOTALS, cfg).startswith("rollouts: 8 drawn")
    card = report.model_card(run, SimpleNamespace(step=1, totals=TOTALS), cfg, INPUTS, {})
    assert "standard error" not in card
    assert "tags: [rlvr, grpo]" in card
    assert "base_model" not in card  # a folder here is no model of the hub


def test_the_closing_table(run):
    """A set, its levels where there are 2 to 12, and what it took. A reward other than 0 and 1 has
    no pass@k."""
    cfg = Config(eval_k=8, n_reference=16)
    odd = summary(0.25) | {"pass_at_k": None}
    evaluate(run, 0, held=summary(0.25, levels=("1", "2")), odd=odd)
    evaluate(run, 1, held=summary(0.5, levels=("1", "2"), error=None), odd=odd)
    head, *sets, rollouts, compute = report.closing_table(run, 1, TOTALS, cfg).splitlines()
    assert " ".join(head.split()) == ("problems avg@8: base trained +- gain pass@8: base trained")
    assert [line.split() for line in sets] == [
        ["held", "4", "0.250", "0.500", "+0.250", "0.125", "0.250"],
        ["level", "1", "2", "0.250", "0.500", "+0.250", "1.000", "1.000"],
        ["level", "2", "2", "0.250", "0.500", "+0.250", "1.000", "1.000"],
        ["odd", "4", "0.250", "0.250", "0.100", "+0.000"],
    ]
    assert rollouts == "rollouts: 8 drawn, 4 trained on, 9 tokens; 2 s in steps"
    assert compute == (
        "compute: 2 FLOPs (1 generation, 1 training), 50% less than GRPO with 16 rollouts per "
        "problem"
    )


def test_the_card(run):
    """What the hub reads stands at its head; the template in full, the settings as JSON."""
    evaluate(run, 0, held=summary(0.25))
    evaluate(run, 1, held=summary(0.5))
    cfg = Config(name="x", model="Qwen/Qwen2.5-Math-1.5B", template="r1", lr=0.001)
    state = SimpleNamespace(step=1, totals=TOTALS)
    card = report.model_card(run, state, cfg, INPUTS, {"torch": "2.13"})
    assert card.splitlines()[:6] == [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "base_model: Qwen/Qwen2.5-Math-1.5B",
        "tags: [rlvr, aero]",
        "---",
    ]
    assert "# x, step 1\n" in card and "on arithmetic, 2 of 2 rows.\n" in card
    assert report.closing_table(run, 1, TOTALS, cfg) in card
    assert "Assistant: <think>\n```\n" in card and "standard error" in card
    settings = json.loads(card.partition("```json\n")[2].rpartition("\n```")[0])
    assert settings["lr"] == 0.001 and settings["torch"] == "2.13"


def test_the_best_evaluation(run):
    """The first of equals, of steps at which all sets were evaluated. One that is no better than
    the start was announced as the best."""
    cfg = Config(steps=8, eval_k=8)
    assert report.best_line(run, cfg) == ""  # nothing was evaluated
    evaluate(run, 0, a=summary(0.5), b=summary(0.25))
    evaluate(run, 2, a=summary(0.25), b=summary(0.5))
    assert report.best_line(run, cfg) == ""  # as before training
    evaluate(run, 4, a=summary(0.5), b=summary(0.5))
    evaluate(run, 6, a=summary(1.0))  # a signal stopped it
    evaluate(run, 8, a=summary(0.75), b=summary(0.25))
    best = "best: step 4 with avg@8 0.500, the highest on the way"
    assert report.best_line(run, cfg) == best
    closing = report.close_run(run, TOTALS, cfg).splitlines()
    assert closing[-2:] == [best, f"curves: {run / 'curves.png'}"]
