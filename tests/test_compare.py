"""Runs beside each other, on folders written by hand: curves.py and tools/compare.py."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

import curves
from tools import compare

PROMPTS = ["a", "b", "c", "d"]


def run_folder(path, name, seed, rates, drawn, **settings):
    """A run of two steps, of which each draws `drawn` rollouts; `rates`: of each prompt after step
    2, half of it before."""
    (path / "eval").mkdir(parents=True)
    config = {"settings": {"name": f"{name}-s{seed}", "seed": seed} | settings}
    (path / "config.json").write_text(json.dumps(config))
    rows = [{"step": 0, "eval/held/avg_at_k": np.mean(rates) / 2}]
    for step in (1, 2):
        rows.append({
            "step": step, "reward/mean": 0.5, "rollout/drawn": drawn, "rollout/trained": 2,
            "time/step": 3.0, "time/eval": 1.0, "compute/rollout_flops": 10.0 * drawn,
            "compute/train_flops": 5.0, "group/all_wrong_frac": 0.1, "group/all_right_frac": 0.2,
        })  # fmt: skip
    rows[-1]["eval/held/avg_at_k"] = float(np.mean(rates))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step, share in ((0, 0.5), (2, 1.0)):
        records = [
            {"prompt": prompt, "score": float(i < 8 * share * rate)}
            for prompt, rate in zip(PROMPTS, rates)
            for i in range(8)
        ]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (path / "eval" / f"held-step{step}.jsonl").write_text(lines)
    return str(path)


@pytest.fixture
def runs(tmp_path):
    return [
        run_folder(tmp_path / "a0", "grpo", 0, [1.0, 0.5, 0.25, 0.0], 16),
        run_folder(tmp_path / "b0", "aero", 0, [1.0, 1.0, 0.25, 0.0], 8),
        run_folder(tmp_path / "b1", "aero", 1, [0.75, 0.5, 0.5, 0.25], 8),
    ]


def var(*values):
    return np.var(values, ddof=1)


def test_difference_by_hand():
    """Problems are paired: a rival that is better by the same everywhere has no error over
    problems. Seeds add theirs."""
    a, b = {"p": 0.5, "q": 1.0, "r": 0.0}, {"p": 0.25, "q": 0.75, "r": -0.25}
    assert compare.difference([a], [b]) == (0.25, 0.0)
    gap, error = compare.difference([{"p": 1.0, "q": 0.5}], [{"p": 0.0, "q": 0.5}])
    assert (gap, error) == (0.5, pytest.approx(math.sqrt(0.5 / 2)))
    a = [{"p": 1.0, "q": 1.0}, {"p": 0.5, "q": 0.5}]
    gap, error = compare.difference(a, [{"p": 0.0, "q": 0.0}])
    # the variance of 1 and 0.5, over two seeds
    assert (gap, error) == (0.75, pytest.approx(math.sqrt(0.125 / 2)))
    # one of each says nothing of others; it said 0
    assert compare.difference([{"p": 1.0}], [{"p": 0.0}]) == (1.0, None)
    a = [{"p": 1.0, "q": 0.5}, {"p": 0.5, "q": 0.5}]
    b = [{"p": 0.25, "q": 0.0}, {"p": 0.5, "q": 0.75}]
    gap, error = compare.difference(a, b)
    over_problems, over_seeds = var(0.375, 0.125), [var(0.75, 0.5), var(0.125, 0.625)]
    wanted = math.sqrt((over_problems + sum(over_seeds)) / 2)
    assert (gap, error) == (0.25, pytest.approx(wanted))
    with pytest.raises(ValueError, match="not evaluated on the same prompts"):
        compare.difference([{"p": 1.0}], [{"q": 0.0}])


def test_compare(runs, tmp_path, capsys, monkeypatch):
    """The command: its table, its last line and its picture."""
    figures, savefig = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    assert compare.main([*runs, "--out", str(tmp_path)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[3].startswith("one seed of grpo: its errors lack the variance between seeds")
    assert lines[-1] == f"curves: {tmp_path / 'compare.png'}"
    results = json.loads(last)
    assert list(results) == ["grpo", "aero"]
    assert (results["grpo"]["seeds"], results["aero"]["seeds"]) == (1, 2)
    costs = [results["aero"][key] for key in ("drawn", "flops", "seconds")]
    assert costs == [16, 170, 4]
    aero = results["aero"]["eval"]["held"]
    assert aero["by_seed"] == [0.5625, 0.5] and aero["trained"] == 0.53125
    # A seed that began and ended lower is no noise of the gain: its variance over seeds is that of
    # the seeds' own gains.
    variance = var(0.4375, 0.375, 0.1875, 0.0625) / 4 + var(0.28125, 0.25) / 2
    assert aero["gain"] == [pytest.approx(0.265625), pytest.approx(math.sqrt(variance))]
    # it was [0.0, 0.0], with itself
    assert results["grpo"]["eval"]["held"]["against_first"] is None
    variance = var(-0.125, 0.25, 0.125, 0.125) / 4 + var(0.5625, 0.5) / 2
    assert aero["against_first"] == [0.09375, pytest.approx(math.sqrt(variance))]
    assert lines[1].split()[:6] == ["grpo", "held", "1", "2", "0.219", "0.438"]
    assert "(-48%)" in lines[2]

    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    axes = figures[0].axes
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == ["grpo", "aero"]
    drawn = [
        [line.get_xydata().tolist() for line in axis.lines if len(line.get_xdata())]
        for axis in axes
    ]
    # held-out score, means of the seeds, against steps, FLOPs and seconds
    assert drawn[0] == [[[0, 0.21875], [2, 0.4375]], [[0, 0.265625], [2, 0.53125]]]
    assert drawn[1] == [[[0, 0.21875], [330, 0.4375]], [[0, 0.265625], [170, 0.53125]]]
    assert drawn[2] == [[[0, 0.21875], [4, 0.4375]], [[0, 0.265625], [4, 0.53125]]]
    assert drawn[6] == [[[1, n], [2, n]] for n in (16, 2, 8, 2)]  # rollouts drawn, trained on
    assert [line.get_linestyle() for line in axes[6].lines] == ["-", "--"] * 2
    # a band where a setting has several seeds
    assert [len(axis.collections) for axis in axes] == [1] * 6 + [2, 1, 1]


def test_what_cannot_be_compared(runs, tmp_path, capsys):
    rates = [1.0, 0.5, 0.25, 0.0]
    other = run_folder(tmp_path / "c0", "other", 0, rates, 8)
    path = tmp_path / "c0" / "eval" / "held-step2.jsonl"
    path.write_text(path.read_text().replace('"a"', '"z"'))
    early = run_folder(tmp_path / "d0", "early", 0, rates, 8)
    early_rows = tmp_path / "d0" / "metrics.jsonl"
    early_rows.write_text('{"step": 0, "eval/held/avg_at_k": 0.1}\n')
    cut = run_folder(tmp_path / "e0", "cut", 0, rates, 8)
    with open(f"{cut}/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    longer = run_folder(tmp_path / "f2", "aero", 2, rates, 8)
    rows = (tmp_path / "f2" / "metrics.jsonl").read_text().splitlines()
    rows[1] = json.dumps(json.loads(rows.pop()) | {"step": 1})
    (tmp_path / "f2" / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    responses = tmp_path / "f2" / "eval" / "held-step2.jsonl"
    responses.rename(responses.with_name("held-step1.jsonl"))
    others = [run_folder(tmp_path / f"g{lr}", "grpo", 5, rates, 8, lr=lr) for lr in (1, 2)]
    for folders, message in [
        ([tmp_path], "holds no metrics.jsonl, so it is not a run"),
        ([runs[0], other], "grpo and other were not evaluated on the same prompts of held"),
        ([early], "found no evaluation after a step"),
        ([cut], f"{cut}/metrics.jsonl line 4: invalid JSON"),
        ([runs[1], longer], "aero: found last evaluations at steps 2, 1, wanted one step"),
        ([runs[1], runs[1]], f"{runs[1]}: found seed 0 of aero twice, the first in {runs[1]}"),
        (
            [runs[0], *others],
            f"{others[1]}: found other settings than in a run of the same name",
        ),
        ([], "the following arguments are required: runs"),
    ]:
        assert compare.main([*map(str, folders), "--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
        assert not (tmp_path / "compare.png").exists()


def test_a_name_with_other_settings_is_another_setting(tmp_path):
    """Runs of one name in two folders passed for two seeds of one setting, whatever they were."""
    rates = [1.0, 0.5, 0.25, 0.0]
    made = (("old", 0, 1), ("old", 1, 1), ("more", 2, 1), ("new", 0, 2))
    runs = [
        run_folder(tmp_path / parent / str(seed), "aero", seed, rates, 8, lr=lr, out=parent)
        for parent, seed, lr in made
    ]
    settings = {
        label: [str(folder) for folder, _ in seeds]
        for label, seeds in curves.by_setting(runs).items()
    }
    assert settings == {"aero": runs[:3], "new/aero": runs[3:]}


def test_without_matplotlib(runs, tmp_path, monkeypatch):
    """A run at its end says so in one line and goes on."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = curves.curves(runs, tmp_path / "curves.png")
    assert text.startswith("no curves: ") and "pip install matplotlib" in text
    assert "\n" not in text and not (tmp_path / "curves.png").exists()


def test_nothing_but_a_picture_imports_matplotlib():
    """Every rank of a training run did, for a picture that rank 0 draws at the end."""
    code = "import sys, log, report, tools.compare; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
