"""
train.py: settings and bad input, packing and the loss in the process of the tests, and whole runs in processes of their
own: resumed, killed, stopped, on two ranks. A fork server imports everything once, so that a run costs what it computes.
"""

import ast
import dataclasses
import doctest
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import aero
import base
import bench
import data
import learner
import model as model_module
import report
import train
from learner import Trained, advise, cost, must_fit, pack, packed, plan, update
from model import Model, ModelConfig, load_weights, read_weights, token_logprobs
from train import Config, parse

ROOT = Path(train.__file__).parent
NAN = float("nan")

# ------------------------------------------------------------------------------------------------------------- runs

SERVER = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def server():
    """It gets its path from the environment: Python 3.11 to 3.13 do not hand on sys.path to what it imports first."""
    SERVER.set_forkserver_preload(["test_train"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()


def one_rank(argv, environment, output, hook):
    """What a process of a run does: `hook` first, to arrange an accident."""
    with open(output, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if hook is not draw_curves:
        report.curves = lambda *_: None  # a second of matplotlib that one run shows well enough
    if hook:
        hook()
    sys.exit(train.main(argv))


def draw_curves():
    """The hook of the run that does."""


class Run:
    """`python train.py` with these flags, or so many ranks of it; wait() gives the exit code of rank 0."""

    def __init__(self, folder, flags, ranks=1, hook=None):
        self.folder, self.output = Path(folder), Path(f"{folder}.txt")
        argv = [str(f) for f in ("--out", self.folder.parent, "--name", self.folder.name, *flags)]
        with socket.socket() as s:
            s.bind(("", 0))
            port = s.getsockname()[1]
        self.ranks = []
        for rank in range(ranks):
            where = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            environment = {k: str(v) for k, v in where.items()} if ranks > 1 else {}
            process = SERVER.Process(target=one_rank, args=(argv, environment, self.output, hook))
            process.start()
            self.ranks.append(process)

    def wait(self, seconds=90):
        end = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, end - time.monotonic()))
        hung = [rank for rank, process in enumerate(self.ranks) if process.is_alive()]
        for process in self.ranks:
            process.kill()
        assert not hung, f"ranks {hung} still run after {seconds} s:\n{self.text}"
        return self.ranks[0].exitcode

    @property
    def text(self):
        return self.output.read_text()

    @property
    def rows(self):
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def checkpoints(self):
        return sorted(p.name for p in (self.folder / "checkpoints").iterdir())


def finished(folder, flags, ranks=1, hook=None) -> Run:
    run = Run(folder, flags, ranks, hook)
    code = run.wait()
    assert code == 0, run.text
    return run


@pytest.fixture(scope="module")
def flags(student):
    """A run of four steps in about a second."""
    return [
        "--model", student.model, "--data", student.data, "--eval_data", student.held, "--template", "none", "--problems", 6,
        "--max_new", 20, "--slots", 16, "--graders", 1, "--steps", 4, "--lr", 1e-3, "--warmup", 1, "--micro_tokens", 200,
        "--eval_every", 2, "--eval_k", 2, "--eval_limit", 4, "--save_every", 2, "--n_explore", 4, "--n_total", 8, "--n_same", 2,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def reference(out, flags):
    """An uninterrupted run on one rank."""
    return finished(out / "reference", flags, hook=draw_curves)


def without_clocks(rows):
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def same_run(run, wanted):
    """Bit for bit: metrics but for clocks, samples, evaluations, both models."""
    assert without_clocks(run.rows) == without_clocks(wanted.rows)
    for name in ("rollouts.jsonl", "model/model.safetensors", "best/model.safetensors", "eval/held-step4.json",
                 "eval/held-step4.jsonl"):
        assert (run.folder / name).read_bytes() == (wanted.folder / name).read_bytes(), name
    assert run.checkpoints[-1] == wanted.checkpoints[-1]


# --------------------------------------------------------------------------------------------------------- settings


def test_defaults():
    cfg = parse([])
    assert cfg == Config(name="tiny-aero-s0")
    assert parse(["--seed", "3", "--algo", "grpo"]).name == "tiny-grpo-s3"


def test_a_flag_beats_a_file_beats_the_algorithm_beats_pretrained_beats_config(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(dict(model="a/b", algo="dapo", lr=3e-6, clip_high=0.4, rescue=False)))
    plain = parse(["--model", "a/b"])
    assert (plain.lr, plain.clip_high, plain.loss_norm, plain.rescue, plain.data) == (1e-6, 0.2, "prompt", True, "math")
    assert plain.compile == torch.cuda.is_available() and not parse(["--model", "a/b", "--compile", "False"]).compile
    assert parse(["--algo", "dapo"]).clip_high == 0.28
    cfg = parse([str(file), "--clip_high", "0.5"])
    assert (cfg.algo, cfg.loss_norm) == ("dapo", "token")              # the algorithm's
    assert (cfg.lr, cfg.rescue, cfg.clip_high) == (3e-6, False, 0.5)    # file, file, flag
    assert cfg.problems == train.PRETRAINED["problems"] and cfg.seed == Config.seed
    second = tmp_path / "more.json"
    second.write_text('{"lr": 5e-6}')
    assert parse([str(file), str(second)]).lr == 5e-6


def test_switches():
    assert not parse(["--no_rescue"]).rescue and not parse(["--rescue", "false"]).rescue and parse(["--rescue"]).rescue
    assert parse(["--algo=pods"]).n_keep == 16


def test_a_json_data_file_is_no_settings_file(tmp_path):
    """Every argument that ends in .json was read as settings, `--data problems.json` among them."""
    file = tmp_path / "problems.json"
    file.write_text('[{"problem": "1+1", "answer": "2"}]')
    assert parse(["--data", str(file)]).data == str(file)


@pytest.mark.parametrize("settings", ["[]", "3", '{"steps": [1]}', '{"steps": 2.5}', '{"rescue": 7}', "{"])
def test_settings_of_a_wrong_type(tmp_path, settings):
    file = tmp_path / "settings.json"
    file.write_text(settings)
    with pytest.raises(ValueError) as caught:
        parse([str(file)])
    assert "\n" not in str(caught.value)


def test_every_setting_is_read():
    """By the code that runs, not by check(): a flag that does nothing is worse than none."""
    read = set()
    for file in ("train.py", "learner.py", "aero.py", "report.py"):
        tree = ast.parse((ROOT / file).read_text())
        for node in ast.walk(tree):
            node.body = [n for n in node.body if getattr(n, "name", "") != "check"] if isinstance(node, ast.ClassDef) else \
                getattr(node, "body", None)  # fmt: skip
        read |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)
                 and isinstance(n.value, ast.Name) and n.value.id in ("cfg", "s")}  # fmt: skip
    assert {f.name for f in dataclasses.fields(Config)} <= read


def test_every_setting_is_explained(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for f in dataclasses.fields(Config):
        assert f"--{f.name} " in text and f.metadata["help"].split()[0] in text


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def refused(student, flags, tmp_path, monkeypatch, capsys):
    """refused(message, *more flags): exit code 2 and one line, before any process, group of ranks or folder is made."""

    def no_work(*_, **__):
        raise AssertionError("work began")

    monkeypatch.setattr(train, "Grader", no_work)
    monkeypatch.setattr(train, "start_ranks", no_work)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def check(message, *more, name="run"):
        there = sorted(tmp_path.rglob("*"))
        code = train.main([str(f) for f in (*flags, "--out", tmp_path / "out", "--name", name, *more)])
        printed = capsys.readouterr()
        assert code == 2 and printed.out == ""
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and message in printed.err, printed.err
        assert sorted(tmp_path.rglob("*")) == there

    return check


@pytest.mark.parametrize("message, more", [
    ("unknown --n_exlore 4; known are --", ["--n_exlore", 4]),
    ("unknown --n_explor", ["--n_explor", 4]),  # no abbreviations
    ("unknown stray", ["stray"]),
    ("--algo ppo: wanted one of aero grpo", ["--algo", "ppo"]),
    ("--n_explore 9 is larger than --n_total 8", ["--n_explore", 9]),
    ("--k 0: wanted 1 or more", ["--k", 0]),
    ("--k -1: wanted 1 or more", ["--k", -1]),
    ("argument --k: ", ["--k", "two"]),
    ("--temperature 0.0", ["--temperature", 0]),
    ("--lr nan", ["--lr", "nan"]),
    ("--weight_decay nan", ["--weight_decay", "nan"]),
    ("--temperature inf", ["--temperature", "inf"]),
    ("--shard rack: wanted one of node world", ["--shard", "rack"]),
    ("--base large: wanted one of tiny small", ["--base", "large"]),
    ("--base small --model ", ["--base", "small", "--model", "some/model"]),
    ("--is_cap -1.0: wanted 0 or more", ["--is_cap", -1]),
    ("--n_total 8: ", ["--algo", "mc_grpo"]),
    ("--name a/b: wanted a plain folder name", ["--name", "a/b"]),
    ("--name ..: wanted a plain folder name", ["--name", ".."]),
    ("model '/nonexistent/model'", ["--model", "/nonexistent/model"]),
    ("model 'nobody/nothing-of-this-name'", ["--model", "nobody/nothing-of-this-name"]),
    ("/nonexistent/data.jsonl: no such file", ["--data", "/nonexistent/data.jsonl"]),
    ("/nonexistent/held.jsonl: no such file", ["--eval_data", "/nonexistent/held.jsonl"]),
    ("settings file /nonexistent.json", ["/nonexistent.json"]),
    ("template 'qwen', or", ["--template", "qwen"]),
    ("template chat: this tokenizer has no chat template", ["--template", "chat"]),
    ("--max_new 64 leaves no room for a prompt", ["--max_new", 64]),
    ("prompt longer than 1 token", ["--max_new", 63]),
], ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "")  # fmt: skip
def test_bad_flags(refused, message, more):
    if message.startswith("template 'qwen'"):
        message = "template 'qwen': wanted"
    refused(message, *more)


@pytest.mark.parametrize("message, text", [
    ("unknown learning_rate", '{"learning_rate": 1}'),
    ("settings file", '{"lr": 1'),
    ("settings file", '["lr"]'),
])  # fmt: skip
def test_bad_settings_file(refused, tmp_path, message, text):
    (tmp_path / "settings.json").write_text(text)
    refused(message, tmp_path / "settings.json")


@pytest.mark.parametrize("message, text", [
    ("columns found: text, label2; wanted: one of problem, question, prompt", '{"text": "a1", "label2": "1"}\n'),
    ("no answer", '{"problem": "a1"}\n'),
    ("empty, wanted rows", ""),
    ("line 1: invalid JSON", "a1,1\n"),
    ("prompt longer than 44 tokens", json.dumps({"problem": "1+" * 30 + "1", "answer": "31"}) + "\n"),
])  # fmt: skip
def test_bad_data(refused, tmp_path, message, text):
    (tmp_path / "bad.jsonl").write_text(text)
    refused(message, "--data", tmp_path / "bad.jsonl")
    refused(message, "--eval_data", tmp_path / "bad.jsonl")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("message, damage", [
    ("model_type 'mistral' is not supported", lambda m: edit(m / "config.json", model_type="mistral")),
    ("holds no config.json", lambda m: (m / "config.json").unlink()),
    ("holds no tokenizer.json", lambda m: (m / "tokenizer.json").unlink()),
    ("holds neither model.safetensors nor", lambda m: (m / "model.safetensors").unlink()),
    ("model.safetensors is damaged", lambda m: os.truncate(m / "model.safetensors", 20_000)),
    ("is wanted", lambda m: edit(m / "config.json", intermediate_size=60)),
])  # fmt: skip
def test_bad_model(refused, student, tmp_path, message, damage):
    damage(Path(shutil.copytree(student.model, tmp_path / "model")))
    refused(message, "--model", tmp_path / "model")


def test_two_evaluation_sets_of_one_name(flags, student, tmp_path):
    """The second silently took the place of the first, then was refused; now it is numbered, as in eval.py."""
    (tmp_path / "held.jsonl").write_bytes(student.data.read_bytes())
    both = f"{student.held},{tmp_path / 'held.jsonl'}"
    *_, held_out = train.prepare(parse([str(f) for f in (*flags, "--eval_data", both)]))
    assert [(name, p[0].text) for name, p in held_out.items()] == [("held", "e0"), ("held-2", "a0")]


def test_a_run_from_before_a_setting_goes_on(tmp_path):
    """--base was added later: a run whose config.json lacks it is one with the default."""
    for name, settings, wanted in (("old", {}, ""), ("other", {"lr": 1.0}, "is a run with --lr 1.0")):
        cfg = parse(["--out", str(tmp_path), "--name", name])
        kept = dataclasses.asdict(cfg) | settings
        del kept["base"]
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"settings": kept}))
        if wanted:
            with pytest.raises(ValueError, match=wanted):
                train.open_run(cfg)
        else:
            assert train.open_run(cfg) == tmp_path / name


def test_output_folder_of_something_else(refused, tmp_path):
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "out" / "run" / "thesis.tex").write_text("")
    refused("holds files that are not a run's", "--steps", 1)
    (tmp_path / "out" / "file").write_text("")
    refused(str(tmp_path / "out" / "file"), name="file")


def test_output_folder_of_another_configuration(reference, flags, capsys):
    at = ["--out", str(reference.folder.parent), "--name", "reference"]
    for more, message in [(["--lr", "0.5"], "--lr 0.001, not 0.5"), (["--algo", "grpo"], "--algo aero, not grpo")]:
        assert train.main([str(f) for f in (*flags, *at, *more)]) == 2
        printed = capsys.readouterr().err
        assert message in printed and printed.count("\n") == 1
    train.open_run(parse([str(f) for f in (*flags, *at, "--steps", 9)]))  # longer is another wish for the same run


# ------------------------------------------------------------------------------------------------------------ packing


def test_doctests():
    for module in (learner, aero):
        assert doctest.testmod(module).failed == 0


def test_pack_properties():
    rng = random.Random(0)
    for _ in range(300):
        lengths = [rng.randint(1, rng.choice([5, 60, 200])) for _ in range(rng.randint(1, 40))]
        world, cap, costs = rng.choice([1, 2, 3, 8]), rng.choice([1, 50, 100, 1000]), [n * (30 + n) for n in lengths]
        ranks = pack(costs, lengths, world, cap)
        assert len(ranks) == world and len({len(rank) for rank in ranks}) == 1 and ranks[0]
        bins = [b for rank in ranks for b in rank]
        assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in b) <= cap or len(b) == 1 for b in bins)
        assert len(bins) <= world * math.ceil(2 * sum(lengths) / cap / world + 1) or max(lengths) > cap / 2


@pytest.mark.parametrize("world", [2, 8])
def test_pack_balances_ranks(world):
    """AERO keeps few rollouts of unequal length: by cost a rank has at most 3 % more than the mean, by tokens 8 %."""
    rng, model_cfg = np.random.default_rng(0), ModelConfig.from_dict(bench.SHAPES["qwen2.5-math-1.5b"])
    for _ in range(20):
        lengths = np.clip(rng.lognormal(6, 0.8, 64 * world), 1, 3072).astype(int).tolist()
        costs = [cost(model_cfg, 128, n) for n in lengths]
        ranks = pack(costs, [128 + n for n in lengths], world, 32768)
        spent = [sum(costs[i] for some in rank for i in some) for rank in ranks]
        assert max(spent) < 1.03 * np.mean(spent)


def test_cost():
    """The example of its docstring: 7617 tokens + 1356 response + tokens^2, up to the unit and a token's diagonal."""
    model_cfg = ModelConfig.from_dict(bench.SHAPES["qwen2.5-math-1.5b"])
    unit = 4 * model_cfg.num_hidden_layers * model_cfg.hidden_size * 4 / 2
    for prompt, response in [(128, 512), (100, 3000)]:
        n = prompt + response
        assert cost(model_cfg, prompt, response) / unit == pytest.approx(7617 * n + 1356 * response + n * n, rel=1e-3)


def items(*responses, advantage=1.0):
    """One Trained per list of response ids; prompts of growing length."""
    return [Trained(i, tuple(range(5, 7 + i)), list(r), [-0.5] * len(r), advantage) for i, r in enumerate(responses)]


def test_packed_example():
    """The example of its docstring, and a second rollout behind it."""
    p0, p1, p2, r0, r1 = 11, 12, 13, 21, 22
    two = [Trained(0, (p0, p1, p2), [r0, r1], [-1.0, -2.0], 0.5), Trained(1, (p0,), [r1], [-3.0], -2.0)]
    t = packed(two, [0.25, 0.125], "cpu")
    assert t["ids_T"].tolist() == [p0, p1, p2, r0, r1, p0, r1] and t["cu"].tolist() == [0, 5, 7] and t["max_len"] == 5
    assert t["rows_R"].tolist() == [2, 3, 5] and t["targets_R"].tolist() == [r0, r1, r1]
    assert t["sampled_R"].tolist() == [-1.0, -2.0, -3.0]
    assert t["adv_R"].tolist() == [0.5, 0.5, -2.0] and t["weight_R"].tolist() == [0.25, 0.25, 0.125]
    assert t["cu"].dtype == torch.int32 and t["adv_R"].dtype == torch.float32


def test_masks_come_from_lengths():
    """Id 0 is both EOS and pad here, as in Qwen2's base models: it is trained wherever it was drawn, the last one too."""
    batch = items([0], [9, 0, 0, 8, 0], [0, 0, 0])
    t = packed(batch, [1.0, 1.0, 1.0], "cpu")
    assert t["targets_R"].tolist() == [token for x in batch for token in x.tokens]
    assert torch.equal(t["ids_T"][t["rows_R"] + 1], t["targets_R"])
    assert (t["weight_R"] > 0).all()


# -------------------------------------------------------------------------------------------------------- the update


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class SGD(torch.optim.SGD):
    """Its step is the gradient. torch's fused kernel, which knows found_inf, does not take DTensors."""

    def step(self):
        found_inf, self.found_inf = self.found_inf, None
        if not found_inf:
            super().step()


@pytest.fixture
def fresh(one_process, student):
    """fresh(optimizer kind): (sharded model of one rank, optimizer), as train() makes them."""

    def make(kind=None, **changes):
        cfg = Config(**dict(dict(max_new=20, grad_clip=1e9, temperature=0.9), **changes))
        model_cfg, device = ModelConfig.from_folder(student.model), torch.device("cpu")
        model, optimizer = train.make_learner(model_cfg, cfg, device, lambda m: read_weights(m, student.model))
        return cfg, model, kind(model.parameters(), lr=1.0) if kind else optimizer

    return make


def weights_of(model):
    return {name: w.clone() for name, w in train.full_weights(model)}


def unequal_batch(seed=0):
    """Groups of 5, 1, 2 and 3 rollouts of 1 to 12 tokens."""
    rng = random.Random(seed)
    return [
        Trained(place, tuple(rng.randrange(4, 90) for _ in range(rng.randint(1, 9))),
                [rng.randrange(90) for _ in range(n)], [-rng.random() for _ in range(n)], rng.choice([-1.5, 0.3, 1.0]))
        for place, size in enumerate([5, 1, 2, 3]) for n in [rng.randint(1, 12) for _ in range(size)]
    ]  # fmt: skip


@pytest.mark.parametrize("norm", aero.LOSS_NORMS)
@pytest.mark.parametrize("seed", range(3))
def test_micro_batches_do_not_matter(fresh, norm, seed):
    """Under SGD, whose step is the gradient, here of norm 1."""
    after, metrics = [], []
    for cap in (10_000, 40, 1):
        cfg, model, optimizer = fresh(SGD, loss_norm=norm, micro_tokens=cap, grad_clip=1.0)
        metrics.append(update(model, optimizer, unequal_batch(seed), 1.0, cfg, 0, 1, torch.device("cpu")))
        after.append(weights_of(model))
    for other, m in zip(after[1:], metrics[1:]):
        for name, w in after[0].items():
            assert (other[name] - w).abs().max() < 1e-6, name
        assert m == pytest.approx(metrics[0], abs=1e-6, rel=1e-6)


def loss_by_hand(model, batch, cfg, ratio_against_sampler):
    """Straight from the formula, one rollout and one token at a time, over all logits of the packed forward."""
    groups, tokens = {}, sum(len(x.tokens) for x in batch)
    for x in batch:
        groups.setdefault(x.place, []).append(x)
    total, gaps, entropies, clipped, ratios = 0.0, [], [], 0.0, 0.0
    for x in batch:
        ids = torch.tensor([*x.prompt, *x.tokens])
        logits_TV = model(ids, torch.tensor([0, len(ids)]).int(), len(ids)) / cfg.temperature
        logp_TV = logits_TV.log_softmax(-1)
        for t, (token, sampled) in enumerate(zip(x.tokens, x.logps)):
            row = logp_TV[len(x.prompt) - 1 + t]
            weight = {
                "prompt": 1 / len(groups) / len(groups[x.place]) / len(x.tokens), "token": 1 / tokens,
                "constant": 1 / (cfg.max_new * len(batch)),
            }[cfg.loss_norm]  # fmt: skip
            ratio = torch.exp(row[token] - (sampled if ratio_against_sampler else row[token].detach()))
            bounded = min(max(ratio.item(), 1 - cfg.clip_low), 1 + cfg.clip_high)
            gain = min(ratio * x.advantage, torch.tensor(bounded * x.advantage), key=lambda v: v.item())
            total = total - weight * gain
            clipped += weight * (bounded * x.advantage < ratio.item() * x.advantage)
            ratios += weight * ratio.item()
            gaps.append(row[token].item() - sampled)
            entropies.append(-(row.exp() * row).sum().item())
    weight = 1.0 if cfg.loss_norm != "constant" else tokens / (cfg.max_new * len(batch))
    return total, {
        "loss/policy": total.item(), "loss/clip_frac": clipped / weight, "loss/ratio_mean": ratios / weight,
        "policy/entropy": np.mean(entropies), "mismatch/kl": np.mean([math.exp(g) - 1 - g for g in gaps]),
        "mismatch/max_abs": max(map(abs, gaps)),
    }


@pytest.mark.parametrize("norm", aero.LOSS_NORMS)
@pytest.mark.parametrize("updates", [1, 2])
def test_loss_by_hand(fresh, student, norm, updates):
    """Loss, gradient and metrics. With one update the ratio is 1; with two it is against the sampler's log-probs."""
    cfg, model, optimizer = fresh(SGD, loss_norm=norm, updates_per_batch=updates, clip_high=0.3)
    plain = Model(ModelConfig.from_folder(student.model))
    load_weights(plain, student.model)
    batch = []
    for x in unequal_batch():  # log-probs near the policy's own, so that some ratios are clipped and others not
        ids = torch.tensor([*x.prompt, *x.tokens])
        logp_TV = (plain(ids, torch.tensor([0, len(ids)]).int(), len(ids)) / cfg.temperature).log_softmax(-1)
        own = [logp_TV[len(x.prompt) - 1 + t, token].item() for t, token in enumerate(x.tokens)]
        batch.append(x._replace(logps=[p + 0.3 * (-1) ** t for t, p in enumerate(own)]))
    loss, wanted = loss_by_hand(plain, batch, cfg, ratio_against_sampler=updates > 1)
    loss.backward()
    rate = 0.0 if updates == 2 else 0.5  # at rate 0 both updates see the same weights
    metrics = update(model, optimizer, batch, rate, cfg, 0, 1, torch.device("cpu"))
    for name, value in wanted.items():
        assert metrics[name] == pytest.approx(value, abs=2e-6, rel=2e-5), name
    norm_by_hand = math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in plain.parameters()))
    assert metrics["optim/grad_norm"] == pytest.approx(norm_by_hand, rel=1e-5)
    if updates == 1:
        assert metrics["loss/ratio_mean"] == pytest.approx(1.0, abs=1e-6) and metrics["loss/clip_frac"] == 0
        after = weights_of(model)
        for name, p in plain.named_parameters():
            assert (after[name] - (p - rate * p.grad)).abs().max() < 2e-6, name
    else:
        assert 0 < metrics["loss/clip_frac"] < 1


def logits_again(hidden_RD, weight_VD, targets_R, temperature, known_R):
    return token_logprobs(hidden_RD, weight_VD, targets_R, temperature)


@pytest.mark.parametrize("changes", [{}, dict(clip_low=1e-9, clip_high=1e-9), dict(loss_norm="constant")], ids=str)
def test_the_gradient_is_known_beforehand(fresh, monkeypatch, changes):
    """With one update, bit for bit what autograd finds behind the loss, its clip and its minimum of two equal gains."""
    after = []
    for forget in (False, True):
        if forget:
            monkeypatch.setattr(model_module, "token_logprobs", logits_again)
        cfg, model, optimizer = fresh(SGD, micro_tokens=40, **changes)
        batch = [x._replace(advantage=a) for x, a in zip(unequal_batch(), itertools.cycle([-1.5, 0.0, 1 / 3, 2e-7]))]
        update(model, optimizer, batch, 1.0, cfg, 0, 1, torch.device("cpu"))
        after.append(weights_of(model))
    assert all(torch.equal(w, after[1][name]) and w.isfinite().all() for name, w in after[0].items())


def test_first_of_two_updates_is_on_policy(fresh):
    """With the sampler's own log-probs the first ratio is 1, so a mean other than 1 comes from the second."""
    cfg, model, optimizer = fresh(updates_per_batch=2)
    with torch.no_grad():
        batch = []
        for x in unequal_batch():
            t = packed([x], [1.0], "cpu")
            logp_R, _ = model(t["ids_T"], t["cu"], t["max_len"], t["targets_R"], t["rows_R"], cfg.temperature)
            batch.append(x._replace(logps=logp_R.tolist()))
    still = update(model, optimizer, batch, 0.0, cfg, 0, 1, torch.device("cpu"))
    assert still["loss/ratio_mean"] == pytest.approx(1, abs=1e-5) and still["mismatch/max_abs"] < 1e-5
    moving = update(model, optimizer, batch, 1e-2, cfg, 0, 1, torch.device("cpu"))
    assert abs(moving["loss/ratio_mean"] - 1) > 1e-3 and moving["mismatch/max_abs"] < 1e-5


@pytest.mark.parametrize("updates", [1, 2])
def test_truncated_importance_weights(fresh, updates):
    """Every token weighs min(learner / sampler, cap); the ratio is against the learner's own log-probs, so it begins at 1."""
    def once(**changes):
        cfg, model, optimizer = fresh(SGD, updates_per_batch=updates, micro_tokens=40, **changes)
        return update(model, optimizer, batch, 0.0, cfg, 0, 1, torch.device("cpu")), model, cfg

    batch = [x._replace(logps=[-3.0] * len(x.tokens)) for x in unequal_batch()]
    capped, model, cfg = once(is_cap=2.0)
    assert capped["loss/ratio_mean"] == pytest.approx(1, abs=1e-6) and capped["loss/clip_frac"] == 0
    weights = aero.token_weights([x.place for x in batch], [len(x.tokens) for x in batch], "prompt", 20)
    wanted = 0.0
    for x, weight in zip(batch, weights):
        t = packed([x], [1.0], "cpu")
        with torch.no_grad():
            logp_R, _ = model(t["ids_T"], t["cu"], t["max_len"], t["targets_R"], t["rows_R"], cfg.temperature)
        wanted -= weight * x.advantage * (logp_R - t["sampled_R"]).exp().clamp(max=2.0).sum().item()
    assert capped["loss/policy"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_compiled_equals_eager(fresh, monkeypatch):
    """And all blocks and all numbers of tokens share two graphs, or four where forward passes are also done again. Inductor
    is left out: a CPU takes a minute for it."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    after = []
    for changes in ({}, dict(compile=True, reshard=True), dict(compile=True, checkpoint_activations=True)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        cfg, model, optimizer = fresh(SGD, micro_tokens=40, grad_clip=1.0, **changes)
        update(model, optimizer, unequal_batch(), 1.0, cfg, 0, 1, torch.device("cpu"))
        after.append(weights_of(model))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 * cfg.compile * (1 + cfg.checkpoint_activations)
    assert all((other[name] - w).abs().max() < 1e-6 for other in after[1:] for name, w in after[0].items())


def test_eos_is_trained(fresh, student):
    """A response that is EOS alone, with a positive advantage: EOS grows likelier after its prompt."""
    cfg, model, optimizer = fresh(SGD)
    eos, prompt = student.tokenizer.eos_token_id, (40, 41)

    def chance():
        with torch.no_grad():
            ids = torch.tensor(prompt)
            return model(ids, torch.tensor([0, 2]).int(), 2)[-1].softmax(-1)[eos].item()

    before = chance()
    update(model, optimizer, [Trained(0, prompt, [eos], [-1.0], 1.0)], 0.1, cfg, 0, 1, torch.device("cpu"))
    assert chance() > before


@pytest.mark.parametrize("bad", [NAN, math.inf, 1e38])
def test_a_gradient_that_is_not_finite_changes_nothing(fresh, bad):
    cfg, model, optimizer = fresh()
    batch = unequal_batch()
    update(model, optimizer, batch, 1e-3, cfg, 0, 1, torch.device("cpu"))
    weights, state = weights_of(model), [{k: v.clone() for k, v in s.items()} for s in optimizer.state.values()]
    batch[3] = batch[3]._replace(advantage=bad)
    metrics = update(model, optimizer, batch, 1e-3, cfg, 0, 1, torch.device("cpu"))
    assert metrics["optim/skipped"] == 1 and not math.isfinite(metrics["optim/grad_norm"])
    assert all(torch.equal(w, weights[name]) for name, w in train.full_weights(model))
    for now, before in zip(optimizer.state.values(), state):
        assert all(torch.equal(v.full_tensor() if hasattr(v, "full_tensor") else v,
                               before[k].full_tensor() if hasattr(v, "full_tensor") else before[k]) for k, v in now.items())
    assert update(model, optimizer, unequal_batch(), 1e-3, cfg, 0, 1, torch.device("cpu"))["optim/skipped"] == 0


def test_a_poisoned_weight_is_no_step(fresh):
    cfg, model, optimizer = fresh()
    with torch.no_grad():
        model.model.norm.weight.to_local()[0] = math.inf
    before = weights_of(model)
    assert update(model, optimizer, unequal_batch(), 1e-3, cfg, 0, 1, torch.device("cpu"))["optim/skipped"] == 1
    assert all(torch.equal(w, before[name]) for name, w in train.full_weights(model))


# -------------------------------------------------------------------------------------------------- ranks of a learner


def join(rank, world, node, port, folder, changes):
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(node)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    cfg = Config(**dict(dict(max_new=20, grad_clip=1.0, micro_tokens=40), **changes))
    device = torch.device("cpu")
    model, _ = learner.make_learner(ModelConfig.from_folder(folder), cfg, device, lambda m: read_weights(m, folder))
    return cfg, device, model


def learn_on(rank, world, node, port, folder, output, changes):
    """One update under SGD, whose step is the gradient, on this rank; rank 0 saves weights and metrics."""
    if changes.pop("logits_again", False):
        model_module.token_logprobs = logits_again
    cfg, device, model = join(rank, world, node, port, folder, changes)
    optimizer = SGD(model.parameters(), lr=1.0)
    metrics = update(model, optimizer, unequal_batch(), 1.0, cfg, rank, world, device)
    assert {p.device_mesh.size(-1) for p in model.parameters()} == {node if cfg.shard == "node" else world}
    weights = weights_of(model)
    if rank == 0:
        torch.save((weights, metrics), output)
    dist.destroy_process_group()


def no_rows_on(rank, world, node, port, folder, output, changes):
    """A backward pass to which only rank 0 brings rows to train, with their coefficients known and not."""
    _, _, model = join(rank, world, node, port, folder, {})
    ids_T, rows_R, found = torch.arange(4, 13), torch.arange(2, 7) if rank == 0 else torch.empty(0, dtype=torch.long), []
    for known_R in (None, torch.ones(len(rows_R))):
        model.zero_grad()
        model(ids_T, torch.tensor([0, 9]).int(), 9, ids_T[rows_R + 1], rows_R, 0.9, known_R)[0].sum().backward()
        found.append([p.grad.full_tensor() for p in model.parameters()])
    if rank == 0:
        torch.save(found, output)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one_rank_learns(student, tmp_path_factory):
    return learned(student, tmp_path_factory.mktemp("one") / "weights.pt", 1, 1)


def learned(student, output, world, node, learn=learn_on, **changes):
    with socket.socket() as s:
        s.bind(("", 0))
        port = s.getsockname()[1]
    ranks = [SERVER.Process(target=learn, args=(rank, world, node, port, student.model, output, changes))
             for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    return torch.load(output)


@pytest.mark.parametrize("world, node, changes", [
    (2, 2, {}),
    (2, 2, dict(reshard=True)),
    (2, 1, {}),                     # two nodes of one: replicated, all-reduced
    (2, 1, dict(reshard=True)),
    (2, 1, dict(shard="world")),
    (2, 2, dict(logits_again=True)),
    (2, 2, dict(micro_tokens=1)),
    (2, 2, dict(micro_tokens=10_000)),
    (4, 2, dict(reshard=True)),     # two nodes of two
    (1, 1, dict(reshard=True)),
], ids=str)  # fmt: skip
def test_ranks_do_not_matter(student, one_rank_learns, tmp_path, world, node, changes):
    """Groups of 5, 1, 2 and 3 rollouts: the same gradient and metrics however they are sharded, replicated and cut."""
    weights, metrics = learned(student, tmp_path / "weights.pt", world, node, **changes)
    assert all((weights[name] - w).abs().max() < 1e-6 for name, w in one_rank_learns[0].items())
    assert metrics == pytest.approx(one_rank_learns[1], abs=1e-6, rel=1e-6)


def test_a_rank_without_rows(student, tmp_path):
    one, two = (learned(student, tmp_path / f"{world}.pt", world, world, no_rows_on) for world in (1, 2))
    for grads in zip(*one, *two):
        assert all((g - grads[0]).abs().max() < 1e-6 * max(1, grads[0].abs().max()) for g in grads[1:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_learner_on_cuda(student):
    """bf16: the same gradient norm and entropy within rounding whatever only changes speed and memory."""
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found, model_cfg, device = [], ModelConfig.from_folder(student.model), torch.device("cuda", 0)
        for changes in ({}, dict(micro_tokens=40), dict(reshard=True), dict(checkpoint_activations=True), dict(compile=True)):
            cfg = Config(**dict(dict(max_new=20, micro_tokens=80), **changes))
            model, optimizer = learner.make_learner(model_cfg, cfg, device, lambda m: read_weights(m, student.model))
            found.append([update(model, optimizer, unequal_batch(), 1e-3, cfg, 0, 1, device) for _ in range(2)])
        for other in found[1:]:
            for name in ("optim/grad_norm", "policy/entropy"):
                assert [m[name] for m in other] == pytest.approx([m[name] for m in found[0]], rel=2e-2), name
        before, bad = weights_of(model), [x._replace(advantage=NAN) for x in unequal_batch()]
        assert update(model, optimizer, bad, 1e-3, cfg, 0, 1, device)["optim/skipped"] == 1
        assert all(torch.equal(w, before[name]) for name, w in train.full_weights(model))
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------ memory plan

SHAPE = ModelConfig.from_dict(bench.SHAPES["qwen2.5-math-1.5b"])


def test_plan():
    """12 bytes of state per parameter and shard, 4 of gradient; what is sent by the rules of rings."""
    N, cfg = 1_543_714_304, Config(micro_tokens=16384)
    one, eight, nodes = (plan(SHAPE, cfg, world, min(world, 8), 1e9, 640) for world in (1, 8, 64))
    assert one.memory["weights and optimizer"] == 12 * N and one.memory["gradients"] == 4 * N
    assert one.memory["sampler"] == 2 * N + 1e9 and sum(one.traffic.values()) == 0
    assert eight.memory["weights and optimizer"] == 12 * N / 8 == nodes.memory["weights and optimizer"]
    assert eight.traffic == {"all-gather": 2 * N * 7 / 8, "reduce-scatter": 4 * N * 7 / 8, "all-reduce": 0,
                             "weights to the sampler": 2 * N * 7 / 8}  # fmt: skip
    assert nodes.traffic == eight.traffic | {"all-reduce": 2 * 4 * N / 8 * 7 / 8}
    world = plan(SHAPE, dataclasses.replace(cfg, shard="world", reshard=True), 64, 8, 0, 640, tokens=65536)
    assert world.memory["weights and optimizer"] == 12 * N / 64 and world.memory["gradients"] < one.memory["gradients"] / 3
    assert world.traffic["all-gather"] == 2 * 4 * 2 * N * 63 / 64
    for change in (dict(compile=True), dict(checkpoint_activations=True), dict(micro_tokens=8192)):
        less = plan(SHAPE, dataclasses.replace(cfg, **change), 1, 1, 1e9, 640)
        assert less.memory["activations"] < one.memory["activations"]


# Measured peaks in GiB of `bench.py learner --shape qwen2.5-math-1.5b` on H200: (settings, ranks, of a node, GiB). See LOG.md.
# micro_tokens: as many as the fullest micro-batch had, which are evened.
MEASURED = [
    (dict(micro_tokens=16640), 1, 1, 71.15), (dict(micro_tokens=33280, compile=True), 1, 1, 94.08),
    (dict(micro_tokens=40960, compile=True), 1, 1, 110.14), (dict(micro_tokens=14080, compile=True), 2, 2, 50.16),
    (dict(micro_tokens=14080, compile=True), 2, 1, 58.77), (dict(micro_tokens=14080, compile=True, reshard=True), 2, 2, 44.94),
    (dict(micro_tokens=27520, compile=True, checkpoint_activations=True), 1, 1, 33.94),
]  # fmt: skip


@pytest.mark.parametrize("changes, world, node, gib", MEASURED, ids=str)
def test_plan_is_what_was_measured(changes, world, node, gib):
    planned = plan(SHAPE, Config(**changes), world, node, 0, 640, 163_840 // world).memory
    planned.pop("sampler")
    # What is there at the same time is less sharp where blocks free what they held.
    close = 0.05 if "reshard" in changes or "checkpoint_activations" in changes else 0.015
    assert sum(planned.values()) / 2**30 == pytest.approx(gib, rel=close)


def test_what_does_not_fit_is_refused_with_what_to_change():
    cfg, sizes = Config(micro_tokens=16384), (1, 1, 20 * 2**30, 4096)
    assert must_fit(140 * 2**30, SHAPE, cfg, *sizes) == plan(SHAPE, cfg, *sizes)
    with pytest.raises(MemoryError, match=r"GiB per GPU .* does not fit into 75 GiB: it would with --checkpoint_activations "
                                          r"True$"):
        must_fit(80 * 2**30, SHAPE, cfg, *sizes)
    with pytest.raises(MemoryError, match=r"even with .*wanted more GPUs, a smaller cache"):
        must_fit(40 * 2**30, SHAPE, cfg, *sizes)
    changes, _ = advise(44 * 2**30, SHAPE, cfg, 64, 8, 20 * 2**30, 4096)
    assert changes == dict(checkpoint_activations=True, reshard=True)


@pytest.mark.parametrize("error", [MemoryError("94 GiB does not fit"), torch.OutOfMemoryError("CUDA out of memory\nat")])
def test_out_of_memory_is_one_line(flags, tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(train, "start_ranks", lambda: (_ for _ in ()).throw(error))
    assert train.main([str(f) for f in (*flags, "--out", tmp_path, "--name", "run")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {str(error).splitlines()[0]}") and printed.count("\n") == 1
    assert ("--reshard" in printed) == isinstance(error, RuntimeError)


# -------------------------------------------------------------------------------------------------- whole runs: files

METRICS = """
reward/mean reward/std group/flat_frac group/all_right_frac group/all_wrong_frac group/rescued_frac
rollout/drawn rollout/kept rollout/trained rollout/tokens response_length/mean response_length/max
response_length/truncated_frac compute/rollout_flops compute/train_flops compute/saved_frac
loss/policy loss/clip_frac loss/ratio_mean policy/entropy mismatch/kl mismatch/max_abs
optim/lr optim/grad_norm optim/skipped_steps time/rollout time/reward time/update time/sync time/eval time/save time/step
time/other perf/gen_tokens_per_s perf/train_tokens_per_s
"""


@pytest.mark.slow
def test_metrics(reference):
    rows = reference.rows
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    for row in rows[1:]:
        assert not set(METRICS.split()) - row.keys()
        parts = [row[f"time/{part}"] for part in ("rollout", "reward", "update", "sync", "eval", "save", "other")]
        assert sum(parts) == pytest.approx(row["time/step"], abs=1e-6) and min(parts) > -1e-6
        assert row["mismatch/max_abs"] < 1e-4 and row["loss/ratio_mean"] == pytest.approx(1, abs=1e-6)
        assert row["rollout/drawn"] >= row["rollout/kept"] == row["rollout/trained"] > 0
    for row in rows:
        assert ("eval/held/avg_at_k" in row) == ("eval/held/pass_at_k" in row) == (row["step"] in (0, 2, 4))
    assert rows[-1]["optim/skipped_steps"] == 0 and rows[1]["optim/lr"] == 5e-4 and rows[2]["optim/lr"] == 1e-3


@pytest.mark.slow
def test_what_a_run_leaves_behind(reference):
    found = {p.name for p in reference.folder.iterdir()}
    assert found == {"config.json", "metrics.jsonl", "rollouts.jsonl", "eval", "tb", "checkpoints", "model", "best",
                     "curves.png"}
    assert reference.checkpoints == ["step_2", "step_4"]
    kept = json.loads((reference.folder / "config.json").read_text())
    assert kept["settings"]["n_total"] == 8 and kept["versions"]["torch"] == torch.__version__ and kept["world_size"] == 1
    samples = [json.loads(line) for line in (reference.folder / "rollouts.jsonl").read_text().splitlines()]
    wanted = {"problem", "prompt", "response", "gold", "extracted", "verdict", "reason", "advantage", "kept", "round"}
    assert all(wanted <= s.keys() and s["kept"] == (s["advantage"] is not None) for s in samples)
    assert {s["verdict"] for s in samples} == {"right", "wrong"} and {s["kept"] for s in samples} == {True, False}
    order = [data.nth(40, 0, place) for place in range(4 * 6)]  # six problems a step, each step goes on in the order
    assert {s["step"]: s["problem"] for s in samples} == {step: order[6 * (step - 1) + step % 6] for step in range(1, 5)}
    assert "Traceback" not in reference.text and "step 4/4 | reward" in reference.text and "avg@2" in reference.text
    assert "\x1b" not in reference.text and "\r" not in reference.text  # neither colours nor redrawn lines in a file


@pytest.mark.slow
def test_the_best_model_is_kept(reference):
    """That of the highest score after step 0, the first of equals, with its own scores on its card."""
    scores = {row["step"]: row["eval/held/avg_at_k"] for row in reference.rows if "eval/held/avg_at_k" in row and row["step"]}
    best = max(scores, key=scores.get)
    card = (reference.folder / "best" / "README.md").read_text()
    assert f"# reference, step {best}\n" in card and f"  {scores[best]:.3f}  " in card and '"lr": 0.001' in card
    assert f"best: step {best} with avg@2 {scores[best]:.3f}" in reference.text
    last, kept = (load_file(reference.folder / name / "model.safetensors") for name in ("model", "best"))
    assert torch.equal(last["model.norm.weight"], kept["model.norm.weight"]) == (best == 4)


@pytest.mark.slow
def test_the_board(reference):
    """Every metric, histograms, samples, and a layout of groups in the order of report.GROUPS."""
    board = EventAccumulator(str(reference.folder / "tb"), size_guidance=dict(tensors=0)).Reload()
    tags = {tag for kind in ("scalars", "histograms", "tensors") for tag in board.Tags()[kind]}
    assert set(METRICS.split()) | {"eval/held/avg_at_k", "group/success", "response_length/all"} <= tags
    assert {"rollout/text_summary", "custom_scalars__config__"} <= tags
    assert list(reference.rows[4])[1:3] == ["reward/mean", "reward/std"]
    groups = [name.partition("/")[0] for name in reference.rows[4]][1:]
    assert list(dict.fromkeys(groups)) == list(report.GROUPS)


@pytest.mark.slow
def test_transformers_loads_the_model(reference, student):
    """With equal logits and its tokenizer, and it is not the model that the run began with."""
    folder = reference.folder / "model"
    GenerationConfig.from_pretrained(folder)
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder).eval(), Model(ModelConfig.from_folder(folder))
    load_weights(ours, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "b7\n7=7\n\\boxed{7} ~ (3*4)"
    ids = tokenizer(text).input_ids
    assert ids == student.tokenizer(text).input_ids and tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == student.tokenizer.eos_token_id
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids])).logits[0]
        assert (ours(torch.tensor(ids), torch.tensor([0, len(ids)]).int(), len(ids)) - wanted).abs().max() < 1e-5
    before, after = load_file(student.model / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys() and not torch.equal(before["model.norm.weight"], after["model.norm.weight"])


# ------------------------------------------------------------------------------------- whole runs: stopped and resumed


def accident(name, call, kind=signal.SIGKILL, rank=None, late=False):
    """Arranges a signal in the given call (from 1) of train.NAME, before its work or after it, on one rank or on all."""
    *path, last = name.split(".")
    owner = functools.reduce(getattr, path, train)
    inner, count = getattr(owner, last), iter(range(1, 1000))

    def wrapped(*args, **kwargs):
        now = next(count) == call and rank in (None, int(os.environ.get("RANK", 0)))
        if now and not late:
            os.kill(os.getpid(), kind)
        result = inner(*args, **kwargs)
        if now and late:
            os.kill(os.getpid(), kind)
        return result

    setattr(owner, last, wrapped)


killed = functools.partial(functools.partial, accident, kind=signal.SIGKILL)
terminated = functools.partial(functools.partial, accident, kind=signal.SIGTERM)


def terminated_while_drawing(step, rank=None):
    """TERM between the third and the fourth token of a step's rollouts."""
    draw, count = train.draw, iter(range(1, 1000))

    def wrapped(*args):
        if next(count) == step:
            accident("Sampler.step", 4, signal.SIGTERM, rank)
        return draw(*args)

    train.draw = wrapped


@pytest.mark.slow
def test_a_complete_run_says_so(reference, flags):
    before = (reference.folder / "model" / "model.safetensors").read_bytes()
    rows = reference.rows
    again = finished(reference.folder, flags)
    assert "complete" in again.text.rpartition("resumed from")[2].partition("\n")[0]
    assert again.rows == rows and (reference.folder / "model" / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_killed_and_resumed(reference, out, flags):
    """SIGKILL after step 3, one step behind the last checkpoint. What a crash may leave beside it is not taken for one."""
    run = Run(out / "killed", flags, hook=killed("report.Log.step", 3, late=True))
    assert run.wait() == -signal.SIGKILL and [row["step"] for row in run.rows] == [0, 1, 2, 3]
    assert run.checkpoints == ["step_2"]
    shutil.copytree(run.folder / "checkpoints" / "step_2", run.folder / "checkpoints" / "step_4.partial")
    (run.folder / "model.partial").mkdir()
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "reward/me')  # the row that was being written
    path = run.folder / "checkpoints" / "step_2" / "progress.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "row"}))  # of an older version
    again = finished(run.folder, flags)
    assert "resumed from" in again.text and "step 2 of 4" in again.text
    same_run(again, reference)


@pytest.mark.slow
def test_best_and_its_checkpoint_agree(out, flags):
    """best/ was a step's of which no checkpoint knew until the next one was due."""
    run = Run(out / "best", [*flags, "--save_every", 9], hook=killed("report.Log.step", 3))
    assert run.wait() == -signal.SIGKILL and run.checkpoints == ["step_2"]
    progress = json.loads((run.folder / "checkpoints" / "step_2" / "progress.json").read_text())
    assert progress["best"]["step"] == 2 and "# best, step 2\n" in (run.folder / "best" / "README.md").read_text()
    assert sorted(p.name for p in run.folder.glob("best*")) == ["best"]


@pytest.mark.slow
@pytest.mark.parametrize("hook", [
    killed("choose", 4),
    killed("dcp.save", 1), killed("dcp.save", 2, late=True), killed("save_checkpoint", 2, late=True),
    killed("report.Log.step", 2), killed("report.Log.step", 4),
    killed("eval.save", 2), killed("eval.save", 3, late=True), killed("export", 1), killed("save_folder", 1, late=True),
], ids=lambda hook: " ".join(map(str, [*hook.args, *["late"] * hook.keywords.get("late", False)])))  # fmt: skip
def test_killed_anywhere(reference, out, flags, hook, request):
    """Whatever a SIGKILL interrupts, the same command goes on to the same end. Between the checkpoint of a step and its row
    in metrics.jsonl, the row was lost."""
    folder = out / f"killed-{request.node.callspec.id.replace(' ', '-')}"
    assert Run(folder, flags, hook=hook).wait() == -signal.SIGKILL
    same_run(finished(folder, flags), reference)


def terminated_while_evaluating(call, rank=None):
    """TERM at the third token of the call-th evaluation (from 1: before step 0, after step 2, after step 4)."""
    evaluate, count = train.eval.evaluate, iter(range(1, 1000))

    def wrapped(*args):
        if next(count) == call:
            accident("Sampler.step", 3, signal.SIGTERM, rank)
        return evaluate(*args)

    train.eval.evaluate = wrapped


@pytest.mark.slow
@pytest.mark.parametrize("hook, at", [
    (functools.partial(terminated_while_evaluating, 1), 0),
    (functools.partial(terminated_while_evaluating, 2), 2),
    (functools.partial(terminated_while_evaluating, 3), 4),
    (functools.partial(terminated_while_drawing, 3), 2),
    (terminated("update", 2), 2),
    (terminated("update", 4), 4),
], ids=["evaluating the base", "evaluating step 2", "evaluating the last step", "drawing step 3", "updating step 2",
        "updating the last step"])  # fmt: skip
def test_terminated_and_resumed(reference, out, flags, hook, at, request):
    """The steps that were done are saved under their own number, the last one too; an evaluation that was cut short is done
    again by the same command, which then writes the row of its step."""
    folder, more = out / request.node.callspec.id.replace(" ", "-"), [*flags, "--save_every", 9]
    run = finished(folder, more, hook=hook)
    assert run.checkpoints[-1] == f"step_{at}"
    assert f"stopped by a signal at step {at} of 4; the same command goes on from there" in run.text
    assert not (run.folder / "model").exists()
    same_run(finished(folder, more), reference)


@pytest.mark.slow
def test_terminated_from_outside(out, flags):
    """A long run ends within seconds of TERM, with a checkpoint; at most two are kept."""
    run = Run(out / "long", [*flags, "--steps", 10_000, "--save_every", 1, "--eval_every", 9999])
    metrics, end = run.folder / "metrics.jsonl", time.monotonic() + 60
    while not metrics.is_file() or metrics.read_text().count("\n") < 5:
        assert time.monotonic() < end and run.ranks[0].is_alive(), run.text
        time.sleep(0.05)
    begun = time.monotonic()
    run.ranks[0].terminate()
    assert run.wait(20) == 0, run.text
    print(f"{time.monotonic() - begun:.1f} s from TERM to the exit")
    last = run.rows[-1]["step"]
    assert f"stopped by a signal at step {last} of 10000" in run.text
    assert sorted(run.checkpoints, key=lambda n: int(n[5:])) == [f"step_{last - 1}", f"step_{last}"]
    assert not (run.folder / "model").exists()


@pytest.mark.slow
def test_a_refilling_algorithm_can_be_stopped(out, flags):
    """dapo looks at groups after each drawing; after a signal they are incomplete."""
    run = Run(out / "dapo", [*flags, "--algo", "dapo"], hook=functools.partial(terminated_while_drawing, 1))
    assert run.wait() == 0 and "stopped by a signal at step 0" in run.text, run.text


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both(out, flags):
    """Rank 0 asked whether it had got the signal itself: it exported while the other saved a checkpoint, and both hung."""
    run = Run(out / "one-signal", flags, ranks=2, hook=functools.partial(terminated_while_drawing, 2, rank=1))
    assert run.wait(30) == 0, run.text
    assert "stopped by a signal at step 1 of 4" in run.text and run.checkpoints == ["step_1"]


@pytest.mark.slow
def test_a_signal_to_one_rank_in_an_evaluation_stops_both(out, flags, reference):
    """The other rank has all its records and no signal; the score is drawn again, and its row written once."""
    run = Run(out / "one-evaluating", flags, ranks=2, hook=functools.partial(terminated_while_evaluating, 2, rank=1))
    assert run.wait(30) == 0, run.text
    assert "stopped by a signal at step 2 of 4" in run.text and run.checkpoints == ["step_2"]
    assert [row["step"] for row in run.rows] == [0, 1]
    again = finished(run.folder, flags, ranks=2)
    same_numbers(again.rows, reference.rows, 1e-4)


@pytest.mark.slow
def test_a_longer_wish_goes_on(reference, out, flags):
    """Two steps, then four: the run of four steps."""
    finished(out / "longer", [*flags, "--steps", 2])
    same_run(finished(out / "longer", flags), reference)


@pytest.mark.slow
def test_a_shorter_wish_is_answered(out, flags, reference):
    """A run that has done four steps, asked for three: said, not a traceback over a file that was never written."""
    shutil.copytree(reference.folder, out / "shorter")
    run = Run(out / "shorter", [*flags, "--steps", 3])
    code = run.wait()
    assert "Traceback" not in run.text and code in (0, 2), run.text


# ----------------------------------------------------------------------------------------- whole runs: ranks and data

SAME_ON_ALL_WORLDS = ("loss/policy", "optim/grad_norm", "reward/mean", "policy/entropy", "eval/held/avg_at_k")


def same_numbers(a, b, tolerance=1e-6):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert (x.get("rollout/drawn"), x.get("rollout/kept")) == (y.get("rollout/drawn"), y.get("rollout/kept"))
        for name in SAME_ON_ALL_WORLDS:
            assert (name in x) == (name in y)
            assert x.get(name, 0) == pytest.approx(y.get(name, 0), rel=tolerance, abs=tolerance), (x["step"], name)


@pytest.mark.slow
def test_torchrun_equals_one_process(reference, out, flags):
    """The command of the README, on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, ROOT / "train.py"]
    command += [*flags, "--steps", 2, "--out", out, "--name", "torchrun"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(out / "torchrun.txt", "w") as file:
        ranks = subprocess.Popen([str(c) for c in command], stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            code = ranks.wait(120)
        finally:
            ranks.terminate()  # it takes its ranks with it
    assert code == 0, (out / "torchrun.txt").read_text()
    rows = [json.loads(line) for line in (out / "torchrun" / "metrics.jsonl").read_text().splitlines()]
    same_numbers(rows, reference.rows[:3])


@pytest.mark.slow
@pytest.mark.parametrize("more", [
    ["--slots", 3], ["--rescue_barrier"], ["--checkpoint_activations"], ["--micro_tokens", 60], ["--graders", 2],
], ids=lambda more: more[0][2:])  # fmt: skip
def test_what_only_changes_the_speed(reference, out, flags, more):
    same_numbers(finished(out / f"speed-{more[0][2:]}", [*flags, *more]).rows, reference.rows)


@pytest.mark.slow
def test_one_temperature(out, flags):
    """Of the sampler and the learner: their log-probs agree at 0.7."""
    run = finished(out / "cool", [*flags, "--temperature", 0.7, "--steps", 2, "--eval_limit", 2])
    assert all(row["mismatch/max_abs"] < 1e-5 and abs(row["mismatch/kl"]) < 1e-8 for row in run.rows[1:])


RAGGED = {
    "grpo-token": ["--algo", "grpo", "--loss_norm", "token", "--n_total", 4],
    "ada-constant": ["--algo", "reinforce_ada", "--loss_norm", "constant", "--n_extra", 3, "--n_keep", 4],
    "aero-pool-two-updates": ["--rescue_budget", "pool", "--updates_per_batch", 2, "--micro_tokens", 90],
    "dapo": ["--algo", "dapo", "--n_total", 4, "--refill_cap", 2],
    "one-rollout": ["--problems", 1, "--max_new", 1, "--n_same", 1],  # a rank has nothing to train on
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RAGGED)
def test_two_ranks_equal_one(out, flags, name):
    more = [*flags, "--steps", 2, "--eval_limit", 2, *RAGGED[name]]
    one, two = Run(out / f"{name}-1", more), Run(out / f"{name}-2", more, ranks=2)
    for run in (one, two):
        assert run.wait() == 0, run.text
    same_numbers(one.rows[:2], two.rows[:2])
    same_numbers(one.rows, two.rows, 1e-5)  # the norm's rounding went through Adam once
    weights = [load_file(run.folder / "model" / "model.safetensors") for run in (one, two)]
    # Adam divides a gradient by its size, so where that is rounding the step is not: hence not 1e-6
    assert all((w - weights[1][n]).abs().mean() < 1e-4 for n, w in weights[0].items())
    if name == "aero-pool-two-updates":
        assert any(abs(row["loss/ratio_mean"] - 1) > 1e-6 for row in one.rows[1:])
        assert all(row["rollout/trained"] == 2 * row["rollout/kept"] for row in one.rows[1:])


@pytest.mark.slow
def test_resumed_on_another_number_of_ranks(reference, out, flags):
    """Two steps on two ranks, the rest on one."""
    first = finished(out / "reshard", [*flags, "--steps", 2], ranks=2)
    assert first.checkpoints == ["step_2"]
    same_numbers(finished(out / "reshard", flags).rows, reference.rows, 1e-5)


def bad_advantages(calls, rank=None):
    """NaN in place of the advantages of these updates (from 1)."""
    inner, count = train.update, iter(range(1, 1000))

    def wrapped(model, optimizer, batch, *rest):
        if next(count) in calls and rank in (None, int(os.environ.get("RANK", 0))):
            batch = [x._replace(advantage=NAN) for x in batch]
        return inner(model, optimizer, batch, *rest)

    train.update = wrapped


@pytest.mark.slow
def test_a_bad_gradient_on_one_rank_is_skipped_by_both(out, flags, student):
    more = [*flags, "--steps", 2, "--eval_data", ""]
    run = finished(out / "nan", more, ranks=2, hook=functools.partial(bad_advantages, [1], rank=1))
    assert [row.get("optim/skipped_steps") for row in run.rows] == [None, 1, 1]
    assert math.isnan(run.rows[1]["optim/grad_norm"]) and math.isfinite(run.rows[2]["optim/grad_norm"])


@pytest.mark.slow
def test_five_bad_gradients_in_a_row_end_the_run(out, flags):
    """With the cause, and with the steps before them kept; none of the bad ones is."""
    more = [*flags, "--steps", 9, "--eval_data", "", "--save_every", 1]
    run = Run(out / "nans", more, hook=functools.partial(bad_advantages, [2, *range(4, 20)]))
    assert run.wait() not in (0, None)
    assert "5 updates in a row had a gradient that is not finite" in run.text
    assert run.rows[-1]["step"] == 7 and run.rows[-1]["optim/skipped_steps"] == 5  # the eighth has no row and no checkpoint
    assert all(math.isnan(row["optim/grad_norm"]) == (row["step"] in (2, 4, 5, 6, 7)) for row in run.rows[1:])
    assert run.checkpoints == ["step_6", "step_7"]


@pytest.mark.slow
def test_nothing_to_learn_from(out, flags, student):
    """Responses of one token are cut, so wrong: grpo_skip has nothing to train on and goes on; aero trains on it."""
    more = [*flags, "--max_new", 1, "--steps", 2, "--eval_limit", 2]
    skip, posterior = Run(out / "flat-skip", [*more, "--algo", "grpo_skip"]), Run(out / "flat-aero", more)
    for run in (skip, posterior):
        assert run.wait() == 0 and "Traceback" not in run.text, run.text
        assert run.checkpoints[-1] == "step_2" and (run.folder / "model" / "config.json").is_file()
        assert all(row["response_length/truncated_frac"] > 0.9 and row["group/all_wrong_frac"] == 1 for row in run.rows[1:])
    before = load_file(student.model / "model.safetensors")
    after = [load_file(run.folder / "model" / "model.safetensors") for run in (skip, posterior)]
    assert all(torch.equal(w, before[name]) for name, w in after[0].items())
    assert any(not torch.equal(w, before[name]) for name, w in after[1].items())
    assert [row["rollout/trained"] for row in skip.rows[1:]] == [0, 0]
    assert all(row["rollout/trained"] == 12 for row in posterior.rows[1:])  # n_same of each of 6 problems


def short_recipe():
    for recipe in base.RECIPES.values():
        recipe.update(steps=4, batch=4, corpus=recipe["corpus"] | dict(problems=40, seeds=1))
    base.RECIPES["tiny"]["corpus"]["levels"] = (1, 2)
    base.RECIPES["small"]["shape"] |= dict(hidden_size=96, intermediate_size=128, num_attention_heads=3, num_key_value_heads=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "small"])
def test_the_embedded_base(out, name):
    """No --model: made at first start, cached under --out, the same for the next run."""
    more = ["--base", name, "--steps", 1, "--problems", 2, "--max_new", 8, "--eval_limit", 2, "--eval_k", 1]
    if name == "tiny":
        more += ["--data", "arithmetic:train:50:1-2", "--eval_data", "arithmetic:heldout:20:1-2"]
    first, second = (finished(out / f"embedded-{name}-{seed}", [*more, "--seed", seed], hook=short_recipe) for seed in (0, 1))
    assert "base model: " in first.text and "base model: " not in second.text
    (folder,) = out.glob(f"base-{name}-*")
    assert AutoTokenizer.from_pretrained(folder)("1+2").input_ids == base.character_tokenizer(name)("1+2").input_ids


def test_worked_solutions_of_the_bases():
    """Every whole line is worth what the line before it was; a slip changes the answer and is consistent to the end."""
    for example in data.arithmetic(5, 100, (2, 18)):
        right = base.with_slips(example.solution, 0.0, 0, random.Random(1))
        assert right == example.solution
        *lines, boxed = base.in_whole_lines(right).split("\n")
        assert boxed == f"\\boxed{{{example.answer}}}" and {eval(line) for line in lines} == {eval(example.text)}
        assert [len(re.findall(r"[-+*]", line)) for line in lines] == [*reversed(range(example.level))]
        sure = base.with_slips(example.solution, 1.0, 4, random.Random(1)).split("\n")
        assert sure[:5] == example.solution.split("\n")[:5] or example.level < 5
        *lines, boxed = base.in_whole_lines("\n".join(sure)).split("\n")
        if example.level >= 6:
            assert boxed == f"\\boxed{{{lines[-1]}}}" and len({eval(line) for line in lines}) > 1
