"""results/evidence.py: from run folders written by hand to the numbers in its tables."""

import json
import math
import subprocess
from dataclasses import asdict

import numpy as np
import pytest

from config import Config, parse
from results import evidence
from results.evidence_numbers import T975, interval, reaches
from results.evidence_runs import GRID


def settings(argv):
    return parse(Config, argv, "")


def run_folder(root, setting, seed, scores, *flags, seconds=2.0, done=4):
    """A run of four steps, evaluated after 0, 2 and 4, each of which draws n_total rollouts at 1
    TFLOP."""
    name = f"{setting}-s{seed}"
    cfg = settings([*flags, f"--seed={seed}", f"--name={name}", "--steps=4", "--lr=1e-4"])
    run = root / cfg.name
    (run / "eval").mkdir(parents=True)
    config = dict(settings=asdict(cfg), versions=dict(commit="abc", device="a GPU"))
    (run / "config.json").write_text(json.dumps(config))
    rows = [{"step": 0}]
    for step in range(1, done + 1):
        rows.append({
            "step": step, "reward/mean": 0.123456,
            "rollout/drawn": cfg.n_total, "rollout/trained": 4, "rollout/tokens": 1234567,
            "compute/rollout_flops": cfg.n_total * 1e12, "compute/train_flops": 2e12,
            "compute/saved_frac": 0.5, "time/step": seconds + 4, "time/eval": 3.0,
            "time/save": 1.0, "time/rollout": seconds / 2, "time/update": seconds / 2,
            "time/reward": 0.0, "time/sync": 0.0, "time/other": 0.0, "group/flat_frac": 0.5,
            "group/all_right_frac": 0.1, "group/all_wrong_frac": 0.4,
        })  # fmt: skip
    for step, score in zip((0, 2, 4), scores):
        if step <= done:
            rows[step] |= {"eval/held/avg_at_k": score, "eval/held/pass_at_k": score + 0.1}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "eval" / "held-step4.json").write_text('{"avg_at_k_se": 0.0123}')
    with open(run / "eval" / "held-step0.jsonl", "w") as file:
        for problem in (0, 4, 9):
            for sample in range(9):
                score = float(problem > sample)
                length = 10 if score else 30
                row = dict(problem=problem, sample=sample, score=score, length=length)
                file.write(json.dumps(row) + "\n")
    return str(run)


@pytest.fixture
def file(tmp_path, capsys):
    folders = [
        run_folder(tmp_path, "grpo", 0, [0.2, 0.4, 0.6], "--algo=grpo"),
        run_folder(tmp_path, "grpo", 1, [0.2, 0.5, 0.7], "--algo=grpo"),
        run_folder(tmp_path, "grpo_skip", 1, [0.2, 0.4, 0.5], "--algo=grpo_skip"),
        run_folder(tmp_path, "aero", 0, [0.2, 0.6, 0.7], "--n_total=10"),
        run_folder(tmp_path, "aero", 1, [0.2, 0.6, 0.72], "--n_total=10"),
        run_folder(tmp_path, "aero", 2, [0.2, 0.9, 0.9], "--n_total=10"),
        run_folder(tmp_path, "aero-k2", 0, [0.2, 0.3], "--k=2", done=3),
        run_folder(tmp_path, "other", 0, [0.2, 0.4, 0.6], "--algo=grpo"),
        run_folder(tmp_path, "timing-aero", 1, [], seconds=1.0),
        run_folder(tmp_path, "timing-grpo", 1, [], "--algo=grpo", seconds=4.0),
    ]
    assert evidence.main(["collect", *folders, str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        f"left out: {folders[6]}: found 3 steps of 4",
        f"left out: {folders[7]}: found a run of no setting of this file",
        f"left out: {tmp_path} holds no metrics.jsonl, so it is not a run",
    ]
    path = tmp_path / "evidence.jsonl"
    path.write_text(out)
    return path


def test_collect(file):
    run = json.loads(file.read_text().splitlines()[3])
    assert (run["setting"], run["group"], run["seed"]) == ("aero", "main", 0)
    assert (run["lr"], run["flags"]) == (1e-4, {"n_total": 10})
    assert run["evals"][1] == {
        "step": 2, "avg": 0.6, "pass": 0.7, "drawn": 20, "trained": 8, "tokens": 2469134,
        "rollout_flops": 2e13, "train_flops": 4e12, "seconds": 4.0,
    }  # fmt: skip
    assert run["reward"] == [0.1235] * 4 and run["flat"]["all_wrong"] == [0.4] * 4
    # of steps 3 and 4
    assert run["timed_steps"] == 2
    assert (run["seconds"]["rollout"], run["seconds"]["eval"]) == (2.0, 6.0)
    assert run["avg_se"] == 0.0123
    # of 0, 4 and 9 right samples in 9: among the first 8, one problem all right and one all wrong
    base = run["base"]
    rates = [0, 4 / 9, 1]
    assert base["avg"] == pytest.approx(sum(rates) / 3, abs=1e-5)
    assert base["all_right"] == base["all_wrong"] == 0.33333
    error = math.sqrt(sum((x - sum(rates) / 3) ** 2 for x in rates) / 2 / 3)
    assert base["avg_se"] == pytest.approx(error, abs=1e-5)
    assert (base["length_right"], base["length_wrong"]) == (10, 30)
    assert base["length_5_50_95"] == [10, 30, 30]


def test_a_run_of_before_has_settings_that_are_gone(file, tmp_path, capsys):
    """They are not what makes the setting."""
    run = tmp_path / "aero-s0"
    config = json.loads((run / "config.json").read_text())
    config["settings"] |= dict(adv_stats="kept", rescue_barrier=False)
    (run / "config.json").write_text(json.dumps(config))
    assert evidence.main(["collect", str(run)]) == 0
    assert json.loads(capsys.readouterr().out)["flags"] == {"n_total": 10}


def test_report(file, capsys):
    assert evidence.main(["report", str(file)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    names = ("grpo", "grpo_skip", "aero")
    grpo, skip, aero = (next(row for row in rows if row[0] == f"`{name}`") for name in names)
    # final scores: grpo 0.6, 0.7; aero 0.7, 0.72, 0.9, of which the first two have a partner:
    # differences 0.1 and 0.02
    half = 12.706 * math.sqrt(2 * 0.04**2) / math.sqrt(2)
    assert grpo[3] == "0.650 +- 0.071"
    assert aero[1:5] == ["3", "0.0001", "0.773 +- 0.110", "0.873"]
    assert aero[5] == f"+0.060 [{0.06 - half:+.3f}, {0.06 + half:+.3f}]"
    assert aero[6] == "+0.220"  # one common seed
    # equal FLOPs: grpo_skip spends 4 x 10 in all, where aero, at 12 a step, is between 24 and 48,
    # two thirds of the way
    assert aero[7] == f"{0.6 + (40 - 24) / 24 * 0.12 - 0.5:+.3f}"
    assert aero[8:12] == ["40", "16", "48 (-33%)", "1"]  # 48 against 72
    assert skip[11] == "2*"  # was not timed alone
    # aero's mean is 0.2, 0.7, 0.773: it reaches 0.64 at 0.88 of two steps, which are 24 TFLOPs, and
    # 2 s alone; grpo's 0.2, 0.45, 0.65 at 1.95 of them, 36 TFLOPs and 8 s
    assert aero[12:] == ["21.1", "1.76"] and grpo[12:] == ["70.2", "15.6"]
    assert skip[12:] == ["never", "never"]
    claims = [row for row in rows if row[1].startswith(("-48%", "-45%", "equal"))]
    flops, seconds, avg, _, _ = claims
    single = "one run decides nothing"
    assert flops[2:] == ["-33.3% [-33.3%, -33.3%]", "saves less than claimed", "+20.0%", single]
    assert seconds[2:] == ["-75.0%", single, "-50.0%*", single]
    assert avg[2:] == [aero[5], "no difference shown", "+0.220", single]
    for name in ("evidence.png", "evidence_settings.png"):
        assert (file.parent / name).read_bytes().startswith(b"\x89PNG")


def test_arithmetic():
    assert reaches([0, 10, 20], [0.1, 0.3, 0.2], 0.25) == pytest.approx(7.5)
    assert reaches([0, 10], [0.1, 0.3], 0.4) is None
    assert reaches([5, 10], [0.1, 0.3], 0.1) == 5
    half = 2.776445 * math.sqrt(2.5 / 5)
    assert interval([1, 2, 3, 4, 5]) == (3, pytest.approx(half, rel=1e-3))
    gaps = ((0.02, 0.01), (-0.02, 0.01), (0.02, 0.03), None)
    verdicts = [evidence.verdict(gap, None) for gap in gaps]
    assert verdicts == ["better", "worse", "no difference shown", None]


@pytest.mark.parametrize("df", range(1, 10))
def test_quantiles_of_t(df):
    """The share of Student's density between -t and t, by Simpson's rule, is 95 %."""
    t, n = T975[df - 1], 20000
    weights = np.full(n + 1, 2)
    weights[1::2] = 4
    weights[[0, n]] = 1
    density = (1 + (np.arange(n + 1) * t / n) ** 2 / df) ** (-(df + 1) / 2)
    scale = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
    share = 2 * scale * sum(weights * density) * t / n / 3
    assert share == pytest.approx(0.95, abs=1e-4)


def test_commands(capsys, monkeypatch, tmp_path):
    """Every setting is one that train.py takes and collect knows; xargs passes each line on as it
    is."""
    counts = dict(
        tune=24, main=15, others=15, ablations=24, variants=15, timing=25, refill=30
    )  # fmt: skip
    for group, count in counts.items():
        assert evidence.main(["commands", group, "--out", "there"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(set(lines)) == count
        for line in lines:
            cfg = settings(line.split()[2:])
            assert cfg.out == "there" and cfg.lr in (*GRID, 3e-4)
            assert cfg.name.endswith(f"-s{cfg.seed}")
    xargs = ["xargs", "-I{}", "sh", "-c", "echo '{}'"]
    passed = subprocess.run(xargs, input="\n".join(lines), capture_output=True, text=True)
    assert passed.stdout.splitlines() == lines


def test_best_and_bad_input(file, capsys):
    scores = ((3e-5, 0.5), (1e-4, 0.7), (3e-4, 0.6))
    runs = [dict(algo="aero", lr=lr, evals=[{"avg": score}]) for lr, score in scores]
    runs.append(runs[0] | {"algo": "grpo"})
    tune = file.with_name("tune.jsonl")
    tune.write_text("".join(json.dumps(run) + "\n" for run in runs))
    assert evidence.main(["best", str(tune)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[4] == "| `aero` | 0.500 | 0.700 | 0.600 | 0.0001 |"
    assert lines[5] == "| `grpo` | 0.500 |  |  | 3e-05, the edge of the grid |"
    assert lines[-1] == 'LR = {"aero": 0.0001, "grpo": 3e-05}'
    text, unknown = file.read_text(), file.with_name("unknown.jsonl")
    file.write_text(text + text.splitlines()[0])
    unknown.write_text(text.replace('"setting": "aero"', '"setting": "aero-odd"'))
    bad = [["report", str(path)] for path in (file, unknown, tune, "/nowhere")]
    for argv in (["nothing"], ["commands", "nothing"], *bad, []):
        assert evidence.main(argv) == 2
        assert capsys.readouterr().err.count("\n") == 1
