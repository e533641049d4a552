"""tools/bench.py and tools/plan.py: each mode end to end, and the work that is simulated."""

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tools import bench, bench_clock, bench_learner, bench_sampler, bench_workload, plan
from tools.shapes import SHAPES, shape

ROOT = Path(__file__).parents[1]
SMALL = ["--shape", "tiny", "--prompts", "4", "--n", "4", "--prompt_len", "16", "--new", "24"]
SMALL += ["--repeats", "1"]
EVERY_MODE = {
    "figure", "measured", "ceiling", "ratio", "bandwidth", "matrix_rate", "world", "bench",
    "shape", "algo", "prompts", "n", "prompt_len", "new", "ragged", "compile",
    "checkpoint_activations", "micro_tokens",
}  # fmt: skip


def last_line(capsys, *flags) -> dict:
    assert bench.main([*flags, *SMALL]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result.keys() >= EVERY_MODE and result["bench"] == flags[0]
    assert 0 < result["ratio"] < 1
    return result


@pytest.mark.parametrize("lengths, mean", [((), 24.0), (("--ragged", "True"), 3.0625)])
def test_sampler(capsys, lengths, mean):
    """Recorded log-probs are the learner's, and the workload is that of the published figures."""
    result = last_line(capsys, "sampler", *lengths)
    assert result["figure"] == "tokens_per_s" and result["path"] == "plain torch"
    assert result["mean_length"] == mean and result["preempted"] == 0
    assert result["mismatch/kl"] < 1e-9 and result["mismatch/max_abs"] < 1e-5
    page = 2 * 3 * 1 * 16 * 32 * 4  # bytes of 16 places: 3 layers of one KV head of 32, fp32
    assert result["kv_gib"] * 2**30 == pytest.approx(page * (16 * 4 + 1), rel=1e-5)


def test_learner(capsys):
    """The gradient of the workload as it was measured before the tools were a package."""
    result = last_line(capsys, "learner")
    assert result["grad_norm"] == pytest.approx(1.41044, rel=1e-4)
    assert result["loss"] == pytest.approx(0.0675597, rel=1e-4)
    assert result["entropy"] == pytest.approx(4.57559, rel=1e-5)
    assert result["plan_gib"] == pytest.approx(0.357, rel=0.01)
    assert result["mfu"] is None


def test_step(capsys):
    """Two algorithms meet the same problems: what is drawn and kept follows from the verdicts."""
    result = last_line(capsys, "step", "--algo", "grpo,aero", "--ragged", "True")
    rows = result["steps"]
    assert list(rows) == ["grpo", "aero"]
    drawn = {algo: (row["rollout/drawn"], row["rollout/kept"]) for algo, row in rows.items()}
    assert drawn == {"grpo": (64, 64), "aero": (40, 16)}
    assert rows["grpo"]["compute/rollout_flops"] == pytest.approx(2.0207e8)
    assert rows["aero"]["compute/saved_frac"] > rows["grpo"]["compute/saved_frac"] == 0
    for row in rows.values():
        parts = [row[f"time/{phase}"] for phase in ("rollout", "update", "sync", "other")]
        assert sum(parts) == pytest.approx(row["time/step"], rel=1e-3)
        assert row["mismatch/max_abs"] < 1e-5
    assert rows["grpo"]["time/ratio"] == 1.0
    assert result["measured"] == pytest.approx(1 / rows["grpo"]["time/step"], rel=1e-4)


@pytest.mark.slow
def test_step_on_two_ranks():
    """The command of the docstring. Verdicts hang on problem and index: counts are one rank's."""
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2 -m -- tools.bench step"
    done = subprocess.run(
        [sys.executable, *torchrun.split(), *SMALL],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    row = result["steps"]["aero"]
    assert result["world"] == 2 and (row["rollout/drawn"], row["rollout/kept"]) == (40, 16)
    assert row["compute/rollout_flops"] == pytest.approx(6.5456e8)


REFUSED = {
    "": "found nothing, wanted one of sampler learner step",
    "plan": "found plan, wanted one of sampler learner step",
    "sampler --shape huge": f"--shape huge: wanted one of {' '.join(SHAPES)}",
    "learner --algo grpo,aero": "--algo: learner takes one algorithm, found 2",
    "step --algo grpo,ppo": "--algo ppo: wanted one of ",
    "step --new 0": "--new 0: wanted 1 or more",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_refused_in_one_line(capsys, flags):
    assert bench.main(flags.split()) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {REFUSED[flags]}") and printed.count("\n") == 1


def test_every_algorithm_of_a_step_has_its_published_settings():
    first, second = ["--algo", "grpo_skip,dapo"], ["--algo", "drgrpo,dapo,aero"]
    cfgs = bench.parse_all([*first, "--new", "64", *second])
    assert [cfg.algo for cfg in cfgs] == ["drgrpo", "dapo", "aero"]
    assert [cfg.n_total for cfg in cfgs] == [8, 16, 16] and {cfg.new for cfg in cfgs} == {64}
    assert cfgs[0].loss_norm == "constant" and cfgs[1].clip_high == 0.28


def rollout(place: int, index: int):
    return SimpleNamespace(request=SimpleNamespace(place=place, index=index))


def test_verdicts_do_not_depend_on_the_order():
    """A third of the problems is never right, the others as often as their rate says."""
    keys = [(place, index) for place in range(300) for index in range(16)]
    rates = []
    for order in (keys, keys[::-1]):
        grader = bench_workload.SimulatedGrader(seed=3, count=300)
        for place, index in order:
            grader.submit(rollout(place, index), "", "0")
        assert grader.pending == len(keys)
        graded = grader.poll()
        assert grader.pending == 0
        score = {(r.request.place, r.request.index): verdict.score for r, verdict in graded}
        rates.append([np.mean([score[place, i] for i in range(16)]) for place in range(300)])
    assert rates[0] == rates[1]
    assert 0.28 < np.mean(np.array(rates[0]) == 0) < 0.45  # some of the others are unlucky
    assert np.corrcoef(rates[0], grader.rate)[0, 1] > 0.95


def test_ragged_lengths():
    """The mean is new / 5, and a rollout has the same length every time."""
    (cfg,) = bench.parse_all(["--prompts", "1", "--n", "1", "--new", "1000", "--ragged"])
    sampler = bench_workload.random_sampler(cfg, shape("tiny"), torch.device("cpu"))
    keys = [(place, index) for place in range(60) for index in range(30)]
    requests = [SimpleNamespace(place=p, index=i, max_new=1000) for p, i in keys]
    lengths = [sampler.length(request) for request in requests]
    assert lengths == [sampler.length(request) for request in requests]
    assert np.mean(lengths) == pytest.approx(200, rel=0.05) and max(lengths) <= 1000


def test_breakdown(monkeypatch):
    """Of two decode steps: what ran by kind, what did not run, and the kernels that surprise."""
    spans = [
        bench_clock.Span(0, 400, "nvjet_gemm"),
        bench_clock.Span(100, 300, "attend_kernel"),
        bench_clock.Span(500, 700, "triton_poi_fused_silu"),
        bench_clock.Span(700, 1000, "a surprise"),
    ]
    monkeypatch.setattr(bench_clock, "kernel_spans", lambda action: spans)
    parts = bench_clock.breakdown(None, lambda: None, torch.device("cpu"), times=2)
    assert parts.pop("head") >= 0
    assert parts == {
        "attention": 0.1,
        "matrix": 0.2,
        "elementwise": 0.1,
        "other": 0.15,
        "gaps": 0.05,
        "longest": {"a surprise": 0.15, "triton_poi_fused_silu": 0.1},
    }


def test_what_is_broken_down(monkeypatch):
    """On CUDA alone, so here without a profiler: four launches from the middle of the rollouts on,
    and the head forward and backward, in one pass or in two."""
    cfg, cpu, model_cfg = bench.parse_all(SMALL)[0], torch.device("cpu"), shape("tiny")
    ran = {}

    def run_both(action, head, device, times):
        ran["before"] = max(sampler.drawn_so_far())
        action()
        head()
        ran["after"] = max(sampler.drawn_so_far())
        return {"times": times}

    monkeypatch.setattr(bench_sampler, "breakdown", run_both)
    sampler = bench_workload.random_sampler(cfg, model_cfg, cpu)
    bench_sampler.fill(sampler, bench_workload.random_problems(cfg, model_cfg), cfg)
    result = bench_sampler.decode_breakdown(sampler, cfg.new / 2, model_cfg, cpu)
    assert result == {"times": 4} and ran == {"before": 12, "after": 16}
    for updates in (1, 2):
        cfg.updates_per_batch = updates
        bench_learner.head_pass(5, cfg, model_cfg, cpu)()


def test_docstrings():
    result = doctest.testmod(bench_clock)
    assert result.attempted and not result.failed


def test_the_plan_is_the_published_table():
    published = (ROOT / "results" / "README.md").read_text()
    assert plan.table(plan.Budget()) in published


def test_a_smaller_gpu_needs_other_settings(capsys):
    assert plan.main(["--gpu_gib", "79", "--kv_gib", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| qwen2.5-7b | 8 | --checkpoint_activations True --reshard True |" in lines[7]
    assert len(lines) == 2 + 3 * 4
    assert plan.main(["--gpus", "3"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown --gpus 3; known are --gpu_gib")
