"""report.py: runs beside each other, on folders written by hand. What a run itself shows is tested in test_train.py."""

import json
import math

import numpy as np
import pytest

import eval as evaluation
import report

PROMPTS = ["a", "b", "c", "d"]


def run_folder(path, name, seed, rates, drawn):
    """A run of two steps, of which each draws `drawn` rollouts; `rates`: of each prompt after step 2, half of it before."""
    (path / "eval").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"settings": {"name": f"{name}-s{seed}", "seed": seed}}))
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
    assert report.difference([{"p": 1.0}], [{"p": 0.0}]) == (1.0, 0.0)
    with pytest.raises(ValueError, match="not evaluated on the same prompts"):
        report.difference([{"p": 1.0}], [{"q": 0.0}])


def test_compare(runs, tmp_path, capsys):
    """The command: its table, its last line and its picture."""
    assert evaluation.main(["--compare", *runs, "--out", str(tmp_path)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert list(found) == ["grpo", "aero"] and (found["grpo"]["seeds"], found["aero"]["seeds"]) == (1, 2)
    assert (found["aero"]["drawn"], found["aero"]["flops"], found["aero"]["seconds"]) == (16, 170, 4)
    aero = found["aero"]["eval"]["held"]
    assert aero["by_seed"] == [0.5625, 0.5] and aero["trained"] == 0.53125
    assert aero["against_first"] == [0.09375, pytest.approx(math.sqrt(
        np.var([-0.125, 0.25, 0.125, 0.125], ddof=1) / 4 + np.var([0.5625, 0.5], ddof=1) / 2))]  # fmt: skip
    assert lines[1].split()[:6] == ["grpo", "held", "1", "2", "0.219", "0.438"] and "(-48%)" in lines[2]
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_compared(runs, tmp_path, capsys):
    other = run_folder(tmp_path / "c0", "other", 0, [1.0, 0.5, 0.25, 0.0], 8)
    path = tmp_path / "c0" / "eval" / "held-step2.jsonl"
    path.write_text(path.read_text().replace('"a"', '"z"'))
    early = run_folder(tmp_path / "d0", "early", 0, [1.0, 0.5, 0.25, 0.0], 8)
    (tmp_path / "d0" / "metrics.jsonl").write_text('{"step": 0, "eval/held/avg_at_k": 0.1}\n')
    for folders, message in [
        ([tmp_path], "holds no metrics.jsonl, so it is not a run"),
        ([runs[0], other], "grpo and other were not evaluated on the same prompts of held"),
        ([early], "found no evaluation after a step"),
    ]:
        assert evaluation.main(["--compare", *map(str, folders), "--out", str(tmp_path)]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and message in printed.err
        assert not (tmp_path / "compare.png").exists()


def test_colour_is_for_terminals(monkeypatch):
    assert report.paint("x", "red") == "x"
    monkeypatch.setattr(report.sys.stdout, "isatty", lambda: True, raising=False)
    assert report.paint("x", "red") == "\x1b[31mx\x1b[0m"


def test_the_board_has_all_groups_in_order():
    layout = report.layout(["time/step", "reward/mean"])
    assert list(layout) == list(report.GROUPS) and layout["reward"] == {"mean": ["Multiline", ["reward/mean$"]]}
