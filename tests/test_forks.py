"""
Forks as a forker makes them: the blocks of CHANGE_IT.md, each written to a file outside
the repository, run for a few steps as a script, and its numbers checked by hand.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train
from hf import save_folder
from model import Model

ROOT = Path(train.__file__).parent
BLOCKS = dict(
    re.findall(r"```python\n# (\w+\.py)\n(.*?)```", (ROOT / "CHANGE_IT.md").read_text(), flags=re.S)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of the page, and the place for the runs."""
    folder = tmp_path_factory.mktemp("forks")
    for name, code in BLOCKS.items():
        (folder / name).write_text(code)
    return folder


@pytest.fixture(scope="module")
def flags(student):
    return [
        "--model", student.model, "--data", student.data, "--eval_data", "", "--template", "none",
        "--problems", 4, "--max_new", 20, "--slots", 16, "--steps", 2, "--lr", 1e-3, "--warmup", 0,
        "--n_total", 4, "--micro_tokens", 200, "--compile", "False",
    ]  # fmt: skip


def run(script, folder, name, *flags, ranks=1, wanted=0):
    """(rows of the steps in metrics.jsonl, what it printed) of `python SCRIPT ...`, on so many
    ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*launcher, script, "--out", folder, "--name", name, *flags]
    environment = os.environ | dict(
        PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1"
    )
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True
    )
    text = done.stdout + done.stderr
    assert done.returncode == wanted, text
    path = folder / name / "metrics.jsonl"
    return (steps_of(path) if path.is_file() else []), text


def steps_of(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row["step"] > 0]


def samples_of(folder, name):
    lines = (folder / name / "rollouts.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights_of(folder, name):
    return load_file(folder / name / "model" / "model.safetensors")


def test_every_seam_has_its_block():
    assert set(BLOCKS) == {
        "rloo.py", "kl.py", "gspo.py", "brief.py", "cosine.py", "beta.py", "mistral.py",
    }  # fmt: skip
    assert all(len(code.strip().splitlines()) <= 20 for code in BLOCKS.values())


@pytest.mark.slow
def test_an_algorithm(folder, flags):
    rows, text = run("rloo.py", folder, "rloo", *flags, "--algo", "rloo")
    assert "rloo" in text and [row["rollout/drawn"] for row in rows] == [16, 16]
    for step in (1, 2):
        group = [s for s in samples_of(folder, "rloo") if s["step"] == step]
        rewards = np.array([s["verdict"] == "right" for s in group], dtype=float)
        others = (rewards.sum() - rewards) / (len(rewards) - 1)
        assert [s["advantage"] for s in group] == pytest.approx(list(rewards - others))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_sequence_level_ratio(folder, flags, ranks):
    """Four updates a batch: the first ratio is 1, so the mean is near it and not it."""
    more = ["--loss", "gspo", "--updates_per_batch", 4, "--algo", "grpo"]
    rows, _ = run("gspo.py", folder, f"gspo-{ranks}", *flags, *more, ranks=ranks)
    assert len(rows) == 2
    for row in rows:
        assert row["optim/skipped_steps"] == 0 and row["optim/grad_norm"] > 0
        assert 1e-7 < abs(row["loss/ratio_mean"] - 1) < 0.2
        assert "loss/clip_frac" not in row
    if ranks == 2:
        one = steps_of(folder / "gspo-1" / "metrics.jsonl")
        for name in ("loss/policy", "loss/ratio_mean", "optim/grad_norm"):
            assert rows[0][name] == pytest.approx(one[0][name], rel=1e-5, abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_kl_term(folder, flags, ranks):
    """To the frozen start: nothing before the first update, then something; the plan counts it."""
    name = f"kl-{ranks}"
    rows, text = run("kl.py", folder, name, *flags, "--loss", "kl", "--algo", "grpo", ranks=ranks)
    assert rows[0]["loss/kl"] == pytest.approx(0, abs=1e-7) and rows[1]["loss/kl"] > 1e-5
    assert "reference" in text.partition("memory")[2].partition("\n")[0]
    assert all(row["optim/skipped_steps"] == 0 for row in rows)
    plain, text = run(ROOT / "train.py", folder, f"plain-{ranks}", *flags, "--algo", "grpo")
    assert "reference" not in text.partition("memory")[2].partition("\n")[0]
    # at ratio 1 and KL 0 both losses have the same gradient
    assert rows[0]["optim/grad_norm"] == pytest.approx(plain[0]["optim/grad_norm"], rel=1e-5)


@pytest.mark.slow
def test_an_own_reward(folder, flags):
    rows, text = run(
        ROOT / "train.py", folder, "brief", *flags, "--algo", "grpo", "--reward", "brief.py:score"
    )
    assert "brief.py:score" in text
    for row in rows:
        assert row["reward/mean"] < 1 and row["reward/crash_frac"] == 0
    for step in (1, 2):
        group = [s for s in samples_of(folder, "brief") if s["step"] == step]
        rewards = []
        for s in group:
            right = s["response"].endswith(f"\\boxed{{{s['gold']}}}")
            score = float(right) - 0.01 * len(s["response"])
            rewards.append(min(score, 0.0) if s["truncated"] else score)
        rewards = np.array(rewards)
        wanted = (rewards - rewards.mean()) / rewards.std()
        assert [s["advantage"] for s in group] == pytest.approx(list(wanted), abs=1e-6)


@pytest.mark.slow
def test_a_reward_that_the_algorithm_cannot_use(folder, flags):
    """Said before the start where the file says so, and in one line where it does not."""
    refused = [*flags, "--reward", "brief.py:score", "--algo", "aero", "--n_explore", 2]
    rows, text = run(ROOT / "train.py", folder, "refused", *refused, wanted=2)
    assert not rows and text.count("\n") == 1
    assert "--algo aero needs rewards of 0 or 1, --reward brief.py:score gives others" in text
    (folder / "silent.py").write_text(BLOCKS["brief.py"].replace("BINARY", "UNSAID"))
    late = [*flags, "--reward", "silent.py:score", "--algo", "aero", "--n_explore", 2]
    _, text = run(ROOT / "train.py", folder, "late", *late, wanted=1)
    assert "Traceback" not in text
    assert text.splitlines()[-1].startswith("error: --algo aero: wanted")


@pytest.mark.slow
def test_a_schedule(folder, flags):
    rows, _ = run("cosine.py", folder, "cosine", *flags, "--algo", "grpo")
    wanted = [1e-3 * (1 + math.cos(math.pi * step / 2)) / 2 for step in (0, 1)]
    assert [row["optim/lr"] for row in rows] == pytest.approx(wanted)
    rows, text = run("cosine.py", folder, "cosine", *flags, "--algo", "grpo", "--steps", 4)
    assert "--steps 2 -> 4 changes the schedule" in text
    assert rows[3]["optim/lr"] == pytest.approx(1e-3 * (1 + math.cos(math.pi * 3 / 4)) / 2)


@pytest.mark.slow
def test_a_memory(folder, flags):
    """One problem, met in every step: its Beta counts are those of all rollouts so far, and a run
    that was stopped half-way has them to the bit."""
    more = [*flags, "--algo", "beta", "--limit", 1, "--problems", 1, "--n_total", 6]
    run("beta.py", folder, "whole", *more, "--steps", 4)
    run("beta.py", folder, "halves", *more, "--steps", 2)
    run("beta.py", folder, "halves", *more, "--steps", 4)
    whole, halves = (
        json.loads((folder / name / "checkpoints" / "step_4" / "state.json").read_text())
        for name in ("whole", "halves")
    )
    samples = samples_of(folder, "whole")
    right = sum(s["verdict"] == "right" for s in samples)
    assert whole["memory"] == {"0": [1.0 + right, 1.0 + len(samples) - right]}
    assert halves == whole and samples_of(folder, "halves") == samples
    for name, weight in weights_of(folder, "whole").items():
        assert torch.equal(weight, weights_of(folder, "halves")[name])
    # the advantages of the third step know the first two
    before = [s for s in samples if s["step"] < 3]
    group = [s for s in samples if s["step"] == 3]
    a = 1 + sum(s["verdict"] == "right" for s in before + group)
    b = 1 + len(before + group) - (a - 1)
    u = a / (a + b)
    wanted = [((s["verdict"] == "right") - u) / math.sqrt(u * (1 - u)) for s in group]
    assert [s["advantage"] for s in group] == pytest.approx(wanted)


@pytest.mark.slow
def test_a_model_family(folder, flags, student, tmp_path):
    """A Mistral without windows is a Llama by another name; transformers loads the export."""
    torch.manual_seed(0)
    cfg = tiny_config(student.tokenizer, model_type="llama")
    model = Model(cfg).init_weights(0.1)
    save_folder(tmp_path / "model", cfg, model.state_dict(), student.tokenizer)
    path = tmp_path / "model" / "config.json"
    family = dict(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=None)
    path.write_text(json.dumps(json.loads(path.read_text()) | family))
    more = [*flags, "--algo", "sign", "--model", tmp_path / "model"]
    _, text = run(ROOT / "train.py", folder, "unknown", *more, wanted=2)
    assert "model_type 'mistral' is not supported" in text
    run("mistral.py", folder, "mistral", *more)
    theirs = AutoModelForCausalLM.from_pretrained(folder / "mistral" / "model").eval()
    assert type(theirs).__name__ == "MistralForCausalLM"
    model.load_state_dict(weights_of(folder, "mistral"))
    ids = torch.tensor(student.tokenizer("b7\n7=7").input_ids)
    with torch.no_grad():
        ours = model(ids, torch.tensor([0, len(ids)]).int(), len(ids))
        assert (theirs(ids[None]).logits[0] - ours).abs().max() < 1e-5
