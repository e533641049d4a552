"""report.py: runs beside each other, on folders written by hand. What a run itself shows is tested in test_train.py."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import base
import data
import eval as evaluation
import report
from train import Config

PROMPTS = ["a", "b", "c", "d"]


def run_folder(path, name, seed, rates, drawn, **settings):
    """A run of two steps, of which each draws `drawn` rollouts; `rates`: of each prompt after step 2, half of it before."""
    (path / "eval").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"settings": {"name": f"{name}-s{seed}", "seed": seed} | settings}))
    rows = [{"step": 0, "eval/held/avg_at_k": np.mean(rates) / 2}]
    for step in (1, 2):
        rows.append({"step": step, "reward/mean": 0.5, "rollout/drawn": drawn, "rollout/trained": 2, "time/step": 3.0,
                     "time/eval": 1.0, "compute/rollout_flops": 10.0 * drawn, "compute/train_flops": 5.0,
                     "group/all_wrong_frac": 0.1, "group/all_right_frac": 0.2})  # fmt: skip
    rows[-1]["eval/held/avg_at_k"] = float(np.mean(rates))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step, share in ((0, 0.5), (2, 1.0)):
        records = [{"prompt": p, "score": float(i < 8 * share * rate)} for p, rate in zip(PROMPTS, rates) for i in range(8)]
        (path / "eval" / f"held-step{step}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


@pytest.fixture
def runs(tmp_path):
    return [
        run_folder(tmp_path / "a0", "grpo", 0, [1.0, 0.5, 0.25, 0.0], 16),
        run_folder(tmp_path / "b0", "aero", 0, [1.0, 1.0, 0.25, 0.0], 8),
        run_folder(tmp_path / "b1", "aero", 1, [0.75, 0.5, 0.5, 0.25], 8),
    ]


def test_difference_by_hand():
    """Problems are paired: a rival that is better by the same everywhere has no error over problems. Seeds add theirs."""
    a, b = {"p": 0.5, "q": 1.0, "r": 0.0}, {"p": 0.25, "q": 0.75, "r": -0.25}
    assert report.difference([a], [b]) == (0.25, 0.0)
    gap, error = report.difference([{"p": 1.0, "q": 0.5}], [{"p": 0.0, "q": 0.5}])
    assert (gap, error) == (0.5, pytest.approx(math.sqrt(0.5 / 2)))
    gap, error = report.difference([{"p": 1.0, "q": 1.0}, {"p": 0.5, "q": 0.5}], [{"p": 0.0, "q": 0.0}])
    assert (gap, error) == (0.75, pytest.approx(math.sqrt(0.125 / 2)))  # the variance of 1 and 0.5, over two seeds
    assert report.difference([{"p": 1.0}], [{"p": 0.0}]) == (1.0, None)  # one of each says nothing of others; it said 0
    gap, error = report.difference([{"p": 1.0, "q": 0.5}, {"p": 0.5, "q": 0.5}], [{"p": 0.25, "q": 0.0}, {"p": 0.5, "q": 0.75}])
    over_problems, over_seeds = np.var([0.375, 0.125], ddof=1), [np.var([0.75, 0.5], ddof=1), np.var([0.125, 0.625], ddof=1)]
    assert (gap, error) == (0.25, pytest.approx(math.sqrt((over_problems + sum(over_seeds)) / 2)))
    with pytest.raises(ValueError, match="not evaluated on the same prompts"):
        report.difference([{"p": 1.0}], [{"q": 0.0}])


def test_compare(runs, tmp_path, capsys, monkeypatch):
    """The command: its table, its last line and its picture."""
    figures = []
    monkeypatch.setattr(report.plt, "close", figures.append)
    assert evaluation.main(["--compare", *runs, "--out", str(tmp_path)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[3].startswith("one seed of grpo: its errors lack the variance between seeds")
    found = json.loads(last)
    assert list(found) == ["grpo", "aero"] and (found["grpo"]["seeds"], found["aero"]["seeds"]) == (1, 2)
    assert (found["aero"]["drawn"], found["aero"]["flops"], found["aero"]["seconds"]) == (16, 170, 4)
    aero = found["aero"]["eval"]["held"]
    assert aero["by_seed"] == [0.5625, 0.5] and aero["trained"] == 0.53125
    # a seed that began and ended lower is no noise of the gain: its variance over seeds is that of the seeds' own gains
    assert aero["gain"] == [pytest.approx(0.265625), pytest.approx(math.sqrt(
        np.var([0.4375, 0.375, 0.1875, 0.0625], ddof=1) / 4 + np.var([0.28125, 0.25], ddof=1) / 2))]  # fmt: skip
    assert found["grpo"]["eval"]["held"]["against_first"] is None  # it was [0.0, 0.0], with itself
    assert aero["against_first"] == [0.09375, pytest.approx(math.sqrt(
        np.var([-0.125, 0.25, 0.125, 0.125], ddof=1) / 4 + np.var([0.5625, 0.5], ddof=1) / 2))]  # fmt: skip
    assert lines[1].split()[:6] == ["grpo", "held", "1", "2", "0.219", "0.438"] and "(-48%)" in lines[2]
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    axes = figures[0].axes
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["grpo", "aero"]
    drawn = [[line.get_xydata().tolist() for line in axis.lines if len(line.get_xdata())] for axis in axes]
    assert drawn[0] == [[[0, 0.21875], [2, 0.4375]], [[0, 0.265625], [2, 0.53125]]]  # held-out score: means of the seeds
    assert drawn[1] == [[[0, 0.21875], [330, 0.4375]], [[0, 0.265625], [170, 0.53125]]]  # against FLOPs
    assert drawn[2] == [[[0, 0.21875], [4, 0.4375]], [[0, 0.265625], [4, 0.53125]]]  # against seconds
    assert drawn[6] == [[[1, n], [2, n]] for n in (16, 2, 8, 2)]  # rollouts drawn, trained on
    assert [line.get_linestyle() for line in axes[6].lines] == ["-", "--"] * 2
    assert [len(axis.collections) for axis in axes] == [1] * 6 + [2, 1, 1]  # a band where a setting has several seeds


def test_what_cannot_be_compared(runs, tmp_path, capsys):
    other = run_folder(tmp_path / "c0", "other", 0, [1.0, 0.5, 0.25, 0.0], 8)
    path = tmp_path / "c0" / "eval" / "held-step2.jsonl"
    path.write_text(path.read_text().replace('"a"', '"z"'))
    early = run_folder(tmp_path / "d0", "early", 0, [1.0, 0.5, 0.25, 0.0], 8)
    (tmp_path / "d0" / "metrics.jsonl").write_text('{"step": 0, "eval/held/avg_at_k": 0.1}\n')
    cut = run_folder(tmp_path / "e0", "cut", 0, [1.0, 0.5, 0.25, 0.0], 8)
    with open(f"{cut}/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    longer = run_folder(tmp_path / "f2", "aero", 2, [1.0, 0.5, 0.25, 0.0], 8)
    rows = (tmp_path / "f2" / "metrics.jsonl").read_text().splitlines()
    rows[1] = json.dumps(json.loads(rows.pop()) | {"step": 1})
    (tmp_path / "f2" / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "f2" / "eval" / "held-step2.jsonl").rename(tmp_path / "f2" / "eval" / "held-step1.jsonl")
    others = [run_folder(tmp_path / f"g{lr}", "grpo", 5, [1.0, 0.5, 0.25, 0.0], 8, lr=lr) for lr in (1, 2)]
    for folders, message in [
        ([tmp_path], "holds no metrics.jsonl, so it is not a run"),
        ([runs[0], other], "grpo and other were not evaluated on the same prompts of held"),
        ([early], "found no evaluation after a step"),
        ([cut], f"{cut}/metrics.jsonl line 4: invalid JSON"),
        ([runs[1], longer], "aero: found last evaluations at steps 2, 1, wanted one step"),
        ([runs[1], runs[1]], f"{runs[1]}: found seed 0 of aero twice, the first in {runs[1]}"),
        ([runs[0], *others], f"{others[1]}: found other settings than in a run of the same name"),
    ]:
        assert evaluation.main(["--compare", *map(str, folders), "--out", str(tmp_path)]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and message in printed.err
        assert not (tmp_path / "compare.png").exists()


def test_a_name_with_other_settings_is_another_setting(tmp_path):
    """Runs of one name in two folders passed for two seeds of one setting, whatever they were."""
    rates = [1.0, 0.5, 0.25, 0.0]
    runs = [run_folder(tmp_path / parent / str(seed), "aero", seed, rates, 8, lr=lr, out=parent)
            for parent, seed, lr in (("old", 0, 1), ("old", 1, 1), ("more", 2, 1), ("new", 0, 2))]  # fmt: skip
    found = report.by_setting(runs)
    assert {label: [str(folder) for folder, _ in seeds] for label, seeds in found.items()} == {
        "aero": runs[:3], "new/aero": runs[3:]}  # fmt: skip


def row_of(**more):
    return {"reward/mean": 0.5, "compute/saved_frac": 0.5, "perf/gen_tokens_per_s": 1e3, "time/step": 2.0} | more


def test_the_log(tmp_path, capsys, monkeypatch):
    """The board's layout was that of the first row, so what a later row brought stood in no chart. The time left counted the
    evaluation before step 0. After a signal in an evaluation, the row of its step was written below the purged steps."""
    log = report.Log(tmp_path, 0, SimpleNamespace(steps=4), 0, pending=False)
    log.metrics(0, {"eval/held/avg_at_k": 0.1})
    log.step(1, row_of(), {})
    log.step(2, row_of(**{"loss/policy": 0.0, "time/step": 4.0}), {})
    log.step(4, row_of(), {})
    log.close()
    out = capsys.readouterr().out
    assert "step 1/4 | reward 0.500 | 1.0k tokens/s | saved 50% | 00:06 left" in out
    board = EventAccumulator(str(tmp_path / "tb"), size_guidance=dict(tensors=0)).Reload()
    *_, last = board.Tensors("custom_scalars__config__")
    assert b"loss/policy$" in last.tensor_proto.string_val[0] and b"time/step$" in last.tensor_proto.string_val[0]
    purged = []
    monkeypatch.setattr(report, "SummaryWriter", lambda path, purge_step: purged.append(purge_step))
    for pending in (True, False):
        report.Log(tmp_path, 2, SimpleNamespace(steps=4), 0, pending)
    assert purged == [2, 3]


def test_the_bar_is_where_the_terminal_is(tmp_path, capsys, monkeypatch):
    """Whether stdout is a terminal decided about a bar on stderr: `2> file` got it, redrawn line after line."""
    monkeypatch.setattr(report.sys.stdout, "isatty", lambda: True, raising=False)
    log = report.Log(tmp_path, 0, SimpleNamespace(steps=4), 0, pending=False)
    log.step(1, row_of(), {})
    log.close()
    out, err = capsys.readouterr()
    assert "1/4" in out and "left" in out and not err


def test_a_run_without_evaluation(tmp_path):
    """Its closing table was a header over nothing, and its card explained the error of scores that it did not have."""
    totals = dict(rollout_flops=1.0, train_flops=1.0, reference_flops=4.0, drawn=8, trained=4, tokens=9)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time/step": 2.0, "time/eval": 0.0}\n')
    cfg = Config(name="x", algo="grpo", model=str(tmp_path), eval_data="")
    assert report.closing_table(tmp_path, 1, totals, cfg).startswith("rollouts: 8 drawn")
    problems = data.load("arithmetic:train:2", base.character_tokenizer(), "none")
    card = report.model_card(tmp_path, 1, totals, cfg, problems, {})
    assert "standard error" not in card
    assert "tags: [rlvr, grpo]" in card


def test_colour_is_for_terminals(monkeypatch):
    assert report.paint("x", "red") == "x"
    monkeypatch.setattr(report.sys.stdout, "isatty", lambda: True, raising=False)
    assert report.paint("x", "red") == "\x1b[31mx\x1b[0m"


def test_the_board_has_all_groups_in_order():
    layout = report.layout(["time/step", "reward/mean"])
    assert list(layout) == list(report.GROUPS) and layout["reward"] == {"mean": ["Multiline", ["reward/mean$"]]}
