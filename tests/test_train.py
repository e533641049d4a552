"""
train.py: settings and bad input in the process of the tests, and whole runs in processes of their
own: resumed, killed, stopped, on two ranks. A fork server imports everything once, so that a run
costs what it computes.
"""

import ast
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SERVER
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import config
import data
import log
import report
import train
from config import Config
from hf import load_weights, read_config
from model import Model
from run import Run as Folder

ROOT = Path(train.__file__).parent
NAN = float("nan")


def parse(argv):
    return config.parse(Config, argv, train.__doc__)


# --------------------------------------------------------------------------------------------- runs

pytestmark = pytest.mark.usefixtures("server")


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
    """`python train.py` with these flags, or so many ranks of it; wait() gives the exit code of
    rank 0."""

    def __init__(self, folder, flags, ranks=1, hook=None):
        self.folder, self.output = Path(folder), Path(f"{folder}.txt")
        argv = [str(f) for f in ("--out", self.folder.parent, "--name", self.folder.name, *flags)]
        with socket.socket() as s:
            s.bind(("", 0))
            port = s.getsockname()[1]
        self.ranks = []
        for rank in range(ranks):
            where = dict(
                RANK=rank,
                LOCAL_RANK=rank,
                WORLD_SIZE=ranks,
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            )
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
        return [
            json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()
        ]

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
        "--model", student.model, "--data", student.data, "--eval_data", student.held,
        "--template", "none", "--problems", 6, "--max_new", 20, "--slots", 16, "--graders", 1,
        "--steps", 4, "--lr", 1e-3, "--warmup", 1, "--micro_tokens", 200, "--eval_every", 2,
        "--eval_k", 2, "--eval_limit", 4, "--save_every", 2,
        "--n_explore", 4, "--n_total", 8, "--n_same", 2,
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
    for name in (
        "rollouts.jsonl",
        "model/model.safetensors",
        "eval/held-step4.json",
        "eval/held-step4.jsonl",
    ):
        assert (run.folder / name).read_bytes() == (wanted.folder / name).read_bytes(), name
    assert run.checkpoints[-1] == wanted.checkpoints[-1]


# ----------------------------------------------------------------------------------------- settings


def test_defaults():
    cfg = parse([])
    assert cfg == Config(name="tiny-aero-s0")
    assert parse(["--seed", "3", "--algo", "grpo"]).name == "tiny-grpo-s3"


def test_a_flag_beats_the_algorithm_beats_the_preset_beats_config(tmp_path):
    file = tmp_path / "settings.txt"
    file.write_text(
        "--model a/b --algo dapo  # what it is about\n--lr 3e-6\n--clip_high=0.4 --no_rescue\n"
    )
    plain = parse(["--model", "a/b"])
    assert (plain.lr, plain.clip_high, plain.loss_norm) == (1e-6, 0.2, "prompt")
    assert plain.rescue and plain.data == "math"
    assert plain.compile == torch.cuda.is_available()
    assert not parse(["--model", "a/b", "--compile", "False"]).compile
    assert parse(["--algo", "dapo"]).clip_high == 0.28
    cfg = parse([f"@{file}", "--clip_high", "0.5"])
    assert (cfg.algo, cfg.loss_norm) == ("dapo", "token")  # the algorithm's
    assert (cfg.lr, cfg.rescue, cfg.clip_high) == (3e-6, False, 0.5)  # file, file, flag
    assert cfg.problems == config.PRESETS["pretrained"]["problems"] and cfg.seed == Config.seed
    assert parse([f"@{file}", "--lr", "5e-6"]).lr == 5e-6


def test_what_differs_is_named():
    assert config.differing(parse([])) == {"name": "tiny-aero-s0"}
    assert config.differing(parse(["--algo", "dapo", "--name", "x", "--k", "1"])) == {
        "algo": "dapo", "clip_high": 0.28, "loss_norm": "token", "name": "x",
    }  # fmt: skip


def test_switches():
    assert (
        not parse(["--no_rescue"]).rescue
        and not parse(["--rescue", "false"]).rescue
        and parse(["--rescue"]).rescue
    )
    assert parse(["--algo=pods"]).n_keep == 16


def test_a_json_data_file_is_no_settings_file(tmp_path):
    """Every argument that ended in .json was read as settings, the data among them."""
    file = tmp_path / "problems.json"
    file.write_text('[{"problem": "1+1", "answer": "2"}]')
    assert parse(["--data", str(file)]).data == str(file)


def test_every_setting_is_read():
    """By the code that runs, not by its check: a flag that does nothing is worse than none."""
    read = set()
    files = ("train", "run", "learner", "aero", "plan", "log", "metrics", "report")
    for file in files:
        for node in ast.walk(ast.parse((ROOT / f"{file}.py").read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                if ast.unparse(node.value) in ("cfg", "self.cfg"):
                    read.add(node.attr)
    assert {f.name for f in dataclasses.fields(Config)} <= read


def helped(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        parse(list(argv))
    assert caught.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_every_setting_is_explained(capsys):
    text = helped(capsys, "--help")
    for f in dataclasses.fields(Config):
        assert f"--{f.name} " in text and f.metadata["help"].split()[0] in text
    assert "learning rate after warm-up, see lr_at in train.py [0.0003]" in text


def test_help_prints_what_would_run(capsys):
    """It printed the field's default while a preset or an algorithm's settings would have run."""
    text = helped(capsys, "--model", "X", "--algo", "dapo", "--clip_low", "0.1", "--help")
    wanted = dict(
        lr="1e-06", problems=128, max_new=3072, clip_high=0.28, loss_norm="token", clip_low=0.1,
        template="qwen_math",
    )  # fmt: skip
    for name, value in wanted.items():
        assert re.search(
            rf"--{name} [A-Z_\[\] ]+ [^\[]*(\[?[^\[]*)\[{re.escape(str(value))}\]", text
        ), name
    assert "[arithmetic:heldout:1400:5-18]" in helped(capsys, "--help", "--base", "small")


# ---------------------------------------------------------------------------------------- bad input


@pytest.fixture
def refused(student, flags, tmp_path, monkeypatch, capsys):
    """refused(message, *more flags): exit code 2 and one line, before any process, group of ranks
    or folder is made."""

    def no_work(*_, **__):
        raise AssertionError("work began")

    monkeypatch.setattr(train, "Grader", no_work)
    monkeypatch.setattr(train, "start_ranks", no_work)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def check(message, *more, name="run"):
        there = sorted(tmp_path.rglob("*"))
        code = train.main(
            [str(f) for f in (*flags, "--out", tmp_path / "out", "--name", name, *more)]
        )
        printed = capsys.readouterr()
        assert code == 2 and printed.out == ""
        assert (
            printed.err.startswith("error: ")
            and printed.err.count("\n") == 1
            and message in printed.err
        ), printed.err
        assert sorted(tmp_path.rglob("*")) == there

    return check


@pytest.mark.parametrize("message, more", [
    ("unknown --n_exlore 4; known are --", ["--n_exlore", 4]),
    ("unknown --n_explor", ["--n_explor", 4]),  # no abbreviations
    ("unknown stray", ["stray"]),
    ("--algo ppo: wanted one of aero grpo", ["--algo", "ppo"]),
    ("--loss ppo: wanted one of clip", ["--loss", "ppo"]),
    ("--reward nothing.py:f", ["--reward", "nothing.py:f"]),
    ("argument --rescue: found 'maybe', wanted True or False", ["--rescue", "maybe"]),
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
    ("No such file or directory: '/nonexistent'", ["@/nonexistent"]),
    ("template 'qwen', or", ["--template", "qwen"]),
    ("template chat: this tokenizer has no chat template", ["--template", "chat"]),
    ("--max_new 64 leaves no room for a prompt", ["--max_new", 64]),
    ("prompt longer than 1 token", ["--max_new", 63]),
], ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "")  # fmt: skip
def test_bad_flags(refused, message, more):
    if message.startswith("template 'qwen'"):
        message = "template 'qwen': wanted"
    refused(message, *more)


def test_bad_settings_file(refused, tmp_path):
    (tmp_path / "settings").write_text("--learning_rate 1")
    refused("unknown --learning_rate 1", f"@{tmp_path / 'settings'}")


@pytest.mark.parametrize("message, text", [
    (
        "columns found: text, label2; wanted: one of problem, question, prompt",
        '{"text": "a1", "label2": "1"}\n',
    ),
    ("no answer", '{"problem": "a1"}\n'),
    ("empty, wanted rows", ""),
    ("line 1: invalid JSON", "a1,1\n"),
    (
        "prompt longer than 44 tokens",
        json.dumps({"problem": "1+" * 30 + "1", "answer": "31"}) + "\n",
    ),
])  # fmt: skip
def test_bad_data(refused, tmp_path, message, text):
    (tmp_path / "bad.jsonl").write_text(text)
    refused(message, "--data", tmp_path / "bad.jsonl")
    refused(message, "--eval_data", tmp_path / "bad.jsonl")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("message, damage", [
    (
        "model_type 'mistral' is not supported",
        lambda m: edit(m / "config.json", model_type="mistral"),
    ),
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
    """The second silently took the place of the first, then was refused; now it is numbered, as in
    eval.py."""
    (tmp_path / "held.jsonl").write_bytes(student.data.read_bytes())
    both = f"{student.held},{tmp_path / 'held.jsonl'}"
    held_out = train.prepare(parse([str(f) for f in (*flags, "--eval_data", both)])).held_out
    assert [(name, p[0].text) for name, p in held_out.items()] == [("held", "e0"), ("held-2", "a0")]


def test_a_run_from_before_a_setting_goes_on(tmp_path):
    """--base was added later: a run whose config.json lacks it is one with the default."""
    for name, settings, wanted in (
        ("old", {}, ""),
        ("other", {"lr": 1.0}, "is a run with --lr 1.0"),
    ):
        cfg = parse(["--out", str(tmp_path), "--name", name])
        kept = dataclasses.asdict(cfg) | settings
        del kept["base"]
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"settings": kept}))
        if wanted:
            with pytest.raises(ValueError, match=wanted):
                Folder.open(cfg)
        else:
            assert Folder.open(cfg).folder == tmp_path / name


def test_a_run_of_another_version_is_refused(tmp_path):
    """Its checkpoints are other files: going on would begin at step 0 and write over its rows."""
    cfg = parse(["--out", str(tmp_path), "--name", "old"])
    (tmp_path / "old").mkdir()
    kept = {"settings": dataclasses.asdict(cfg) | {"adv_stats": "kept"}}
    (tmp_path / "old" / "config.json").write_text(json.dumps(kept))
    with pytest.raises(ValueError, match="a run of another version, with --adv_stats"):
        Folder.open(cfg)


def test_output_folder_of_something_else(refused, tmp_path):
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "out" / "run" / "thesis.tex").write_text("")
    refused("holds files that are not a run's", "--steps", 1)
    (tmp_path / "out" / "file").write_text("")
    refused(str(tmp_path / "out" / "file"), name="file")
    refused("Not a directory", "--out", tmp_path / "out" / "file")


def test_output_folder_of_another_configuration(reference, flags, capsys):
    at = ["--out", str(reference.folder.parent), "--name", "reference"]
    for more, message in [
        (["--lr", "0.5"], "--lr 0.001, not 0.5"),
        (["--algo", "grpo"], "--algo aero, not grpo"),
    ]:
        assert train.main([str(f) for f in (*flags, *at, *more)]) == 2
        printed = capsys.readouterr().err
        assert message in printed and printed.count("\n") == 1
    Folder.open(
        parse([str(f) for f in (*flags, *at, "--steps", 9)])
    )  # longer is another wish for the same run


@pytest.mark.parametrize(
    "error", [MemoryError("94 GiB does not fit"), torch.OutOfMemoryError("CUDA out of memory\nat")]
)
def test_out_of_memory_is_one_line(flags, tmp_path, monkeypatch, capsys, error):
    def start_ranks():
        raise error

    monkeypatch.setattr(train, "start_ranks", start_ranks)
    assert train.main([str(f) for f in (*flags, "--out", tmp_path, "--name", "run")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {str(error).splitlines()[0]}") and printed.count("\n") == 1
    assert ("--reshard" in printed) == isinstance(error, RuntimeError)


# -------------------------------------------------------------------------------- whole runs: files

METRICS = """
reward/mean reward/std group/flat_frac group/all_right_frac group/all_wrong_frac group/rescued_frac
rollout/drawn rollout/kept rollout/trained rollout/tokens response_length/mean response_length/max
response_length/truncated_frac compute/rollout_flops compute/train_flops compute/saved_frac
loss/policy loss/clip_frac loss/ratio_mean policy/entropy mismatch/kl mismatch/max_abs
optim/lr optim/grad_norm optim/skipped_steps
time/rollout time/reward time/update time/sync time/eval time/save time/step time/other
perf/gen_tokens_per_s perf/train_tokens_per_s
"""


@pytest.mark.slow
def test_metrics(reference):
    rows = reference.rows
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    for row in rows[1:]:
        assert not set(METRICS.split()) - row.keys()
        parts = [
            row[f"time/{part}"]
            for part in ("rollout", "reward", "update", "sync", "eval", "save", "other")
        ]
        assert sum(parts) == pytest.approx(row["time/step"], abs=1e-6) and min(parts) > -1e-6
        assert row["mismatch/max_abs"] < 1e-4 and row["loss/ratio_mean"] == pytest.approx(
            1, abs=1e-6
        )
        assert row["rollout/drawn"] >= row["rollout/kept"] == row["rollout/trained"] > 0
    for row in rows:
        assert (
            ("eval/held/avg_at_k" in row)
            == ("eval/held/pass_at_k" in row)
            == (row["step"] in (0, 2, 4))
        )
    assert (
        rows[-1]["optim/skipped_steps"] == 0
        and rows[1]["optim/lr"] == 5e-4
        and rows[2]["optim/lr"] == 1e-3
    )


@pytest.mark.slow
def test_what_a_run_leaves_behind(reference):
    found = {p.name for p in reference.folder.iterdir()}
    assert found == {
        "config.json", "metrics.jsonl", "rollouts.jsonl", "eval", "tb", "checkpoints", "model",
        "curves.png",
    }  # fmt: skip
    assert reference.checkpoints == ["step_2", "step_4"]
    kept = json.loads((reference.folder / "config.json").read_text())
    assert (
        kept["settings"]["n_total"] == 8
        and kept["versions"]["torch"] == torch.__version__
        and kept["world_size"] == 1
    )
    samples = [
        json.loads(line) for line in (reference.folder / "rollouts.jsonl").read_text().splitlines()
    ]
    wanted = {
        "problem",
        "prompt",
        "response",
        "gold",
        "extracted",
        "verdict",
        "reason",
        "advantage",
        "kept",
        "round",
    }
    assert all(wanted <= s.keys() and s["kept"] == (s["advantage"] is not None) for s in samples)
    assert {s["verdict"] for s in samples} == {"right", "wrong"} and {
        s["kept"] for s in samples
    } == {True, False}
    order = [
        data.nth(40, 0, place) for place in range(4 * 6)
    ]  # six problems a step, each step goes on in the order
    assert {s["step"]: s["problem"] for s in samples} == {
        step: order[6 * (step - 1) + step % 6] for step in range(1, 5)
    }
    assert (
        "Traceback" not in reference.text
        and "step 4/4 | reward" in reference.text
        and "avg@2" in reference.text
    )
    assert (
        "\x1b" not in reference.text and "\r" not in reference.text
    )  # neither colours nor redrawn lines in a file


@pytest.mark.slow
def test_the_board(reference):
    """Every metric, histograms and samples; rows have the groups in the order of log.GROUPS."""
    board = EventAccumulator(str(reference.folder / "tb"), size_guidance=dict(tensors=0)).Reload()
    tags = {tag for kind in ("scalars", "histograms", "tensors") for tag in board.Tags()[kind]}
    assert (
        set(METRICS.split()) | {"eval/held/avg_at_k", "group/success", "response_length/all"}
        <= tags
    )
    assert {"rollout/text_summary"} <= tags
    assert list(reference.rows[4])[1:3] == ["reward/mean", "reward/std"]
    groups = [name.partition("/")[0] for name in reference.rows[4]][1:]
    assert list(dict.fromkeys(groups)) == list(log.GROUPS)


@pytest.mark.slow
def test_transformers_loads_the_model(reference, student):
    """With equal logits and its tokenizer, and it is not the model that the run began with."""
    folder = reference.folder / "model"
    GenerationConfig.from_pretrained(folder)
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder).eval(), Model(read_config(folder))
    load_weights(ours, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "b7\n7=7\n\\boxed{7} ~ (3*4)"
    ids = tokenizer(text).input_ids
    assert ids == student.tokenizer(text).input_ids and tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == student.tokenizer.eos_token_id
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids])).logits[0]
        assert (
            ours(torch.tensor(ids), torch.tensor([0, len(ids)]).int(), len(ids)) - wanted
        ).abs().max() < 1e-5
    before, after = (
        load_file(student.model / "model.safetensors"),
        load_file(folder / "model.safetensors"),
    )
    assert before.keys() == after.keys() and not torch.equal(
        before["model.norm.weight"], after["model.norm.weight"]
    )


# ------------------------------------------------------------------ whole runs: stopped and resumed


def accident(name, call, kind=signal.SIGKILL, rank=None, late=False, module="train"):
    """Arranges a signal in the given call (from 1) of MODULE.NAME, before its work or after it,
    on one rank or on all."""
    *path, last = name.split(".")
    owner = functools.reduce(getattr, path, sys.modules[module])
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


def accident_name(hook) -> str:
    late = ["late"] if "late" in hook.keywords else []
    return " ".join(map(str, [*hook.args, *late]))


killed = functools.partial(functools.partial, accident, kind=signal.SIGKILL)
terminated = functools.partial(functools.partial, accident, kind=signal.SIGTERM)


def terminated_while_drawing(step, rank=None):
    """TERM between the third and the fourth token of a step's rollouts."""
    draw_step, count = train.draw_step, iter(range(1, 1000))

    def wrapped(*args):
        if next(count) == step:
            accident("Sampler.step", 4, signal.SIGTERM, rank)
        return draw_step(*args)

    train.draw_step = wrapped


@pytest.mark.slow
def test_a_complete_run_says_so(reference, flags):
    before = (reference.folder / "model" / "model.safetensors").read_bytes()
    rows = reference.rows
    again = finished(reference.folder, flags)
    assert "complete" in again.text.rpartition("resumed from")[2].partition("\n")[0]
    assert (
        again.rows == rows
        and (reference.folder / "model" / "model.safetensors").read_bytes() == before
    )


@pytest.mark.slow
def test_killed_and_resumed(reference, out, flags):
    """SIGKILL after step 3, one step behind the last checkpoint. What a crash may leave beside it
    is not taken for one."""
    run = Run(out / "killed", flags, hook=killed("Log.step", 3, late=True))
    assert run.wait() == -signal.SIGKILL and [row["step"] for row in run.rows] == [0, 1, 2, 3]
    assert run.checkpoints == ["step_2"]
    shutil.copytree(
        run.folder / "checkpoints" / "step_2", run.folder / "checkpoints" / "step_4.partial"
    )
    (run.folder / "model.partial").mkdir()
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "reward/me')  # the row that was being written
    again = finished(run.folder, flags)
    assert "resumed from" in again.text and "step 2 of 4" in again.text
    same_run(again, reference)


@pytest.mark.slow
@pytest.mark.parametrize("hook", [
    killed("choose_batch", 4),
    killed("dcp.save", 1, module="run"), killed("dcp.save", 2, module="run", late=True),
    killed("Run.save", 2, late=True),
    killed("Log.step", 2), killed("Log.step", 4),
    killed("eval.save", 2), killed("eval.save", 3, late=True),
    killed("Run.export", 1), killed("save_folder", 1, module="run", late=True),
], ids=accident_name)  # fmt: skip
def test_killed_anywhere(reference, out, flags, hook, request):
    """Whatever a SIGKILL interrupts, the same command goes on to the same end. Between the
    checkpoint of a step and its row in metrics.jsonl, the row was lost."""
    folder = out / f"killed-{request.node.callspec.id.replace(' ', '-')}"
    assert Run(folder, flags, hook=hook).wait() == -signal.SIGKILL
    same_run(finished(folder, flags), reference)


def terminated_while_evaluating(call, rank=None):
    """TERM at the third token of the call-th evaluation (from 1: before step 0, after step 2, after
    step 4)."""
    evaluate, count = train.eval.evaluate, iter(range(1, 1000))

    def wrapped(*args, **kwargs):
        if next(count) == call:
            accident("Sampler.step", 3, signal.SIGTERM, rank)
        return evaluate(*args, **kwargs)

    train.eval.evaluate = wrapped


@pytest.mark.slow
@pytest.mark.parametrize("hook, at", [
    (functools.partial(terminated_while_evaluating, 1), 0),
    (functools.partial(terminated_while_evaluating, 2), 2),
    (functools.partial(terminated_while_evaluating, 3), 4),
    (functools.partial(terminated_while_drawing, 3), 2),
    (terminated("update", 2), 2),
    (terminated("update", 4), 4),
], ids=[
    "evaluating the base", "evaluating step 2", "evaluating the last step", "drawing step 3",
    "updating step 2", "updating the last step",
])  # fmt: skip
def test_terminated_and_resumed(reference, out, flags, hook, at, request):
    """The steps that were done are saved under their own number, the last one too; an evaluation
    that was cut short is done again by the same command, which then writes the row of its step."""
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
    run = Run(
        out / "dapo",
        [*flags, "--algo", "dapo"],
        hook=functools.partial(terminated_while_drawing, 1),
    )
    assert run.wait() == 0 and "stopped by a signal at step 0" in run.text, run.text


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both(out, flags):
    """Rank 0 asked whether it had got the signal itself: it exported while the other saved a
    checkpoint, and both hung."""
    run = Run(
        out / "one-signal",
        flags,
        ranks=2,
        hook=functools.partial(terminated_while_drawing, 2, rank=1),
    )
    assert run.wait(30) == 0, run.text
    assert "stopped by a signal at step 1 of 4" in run.text and run.checkpoints == ["step_1"]


@pytest.mark.slow
def test_a_signal_to_one_rank_in_an_evaluation_stops_both(out, flags, reference):
    """The other rank has all its records and no signal; the score is drawn again, and its row
    written once."""
    run = Run(
        out / "one-evaluating",
        flags,
        ranks=2,
        hook=functools.partial(terminated_while_evaluating, 2, rank=1),
    )
    assert run.wait(30) == 0, run.text
    assert "stopped by a signal at step 2 of 4" in run.text and run.checkpoints == ["step_2"]
    assert [row["step"] for row in run.rows] == [0, 1, 2]
    assert "eval/held/avg_at_k" not in run.rows[2]
    again = finished(run.folder, flags, ranks=2)
    same_numbers(again.rows, reference.rows, 1e-4)


@pytest.mark.slow
def test_a_longer_wish_goes_on(reference, out, flags):
    """Two steps, then four: the run of four steps."""
    finished(out / "longer", [*flags, "--steps", 2])
    same_run(finished(out / "longer", flags), reference)


@pytest.mark.slow
def test_a_shorter_wish_is_answered(out, flags, reference):
    """A run that has done four steps, asked for three: said, not a traceback over a file that was
    never written."""
    shutil.copytree(reference.folder, out / "shorter")
    run = Run(out / "shorter", [*flags, "--steps", 3])
    code = run.wait()
    assert "Traceback" not in run.text and code in (0, 2), run.text


# ----------------------------------------------------------------------- whole runs: ranks and data

SAME_ON_ALL_WORLDS = (
    "loss/policy",
    "optim/grad_norm",
    "reward/mean",
    "policy/entropy",
    "eval/held/avg_at_k",
)


def same_numbers(a, b, tolerance=1e-6):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert (x.get("rollout/drawn"), x.get("rollout/kept")) == (
            y.get("rollout/drawn"),
            y.get("rollout/kept"),
        )
        for name in SAME_ON_ALL_WORLDS:
            assert (name in x) == (name in y)
            assert x.get(name, 0) == pytest.approx(y.get(name, 0), rel=tolerance, abs=tolerance), (
                x["step"],
                name,
            )


@pytest.mark.slow
def test_torchrun_equals_one_process(reference, out, flags):
    """The command of the README, on two ranks."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        2,
        ROOT / "train.py",
    ]
    command += [*flags, "--steps", 2, "--out", out, "--name", "torchrun"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(out / "torchrun.txt", "w") as file:
        ranks = subprocess.Popen(
            [str(c) for c in command], stdout=file, stderr=subprocess.STDOUT, env=environment
        )
        try:
            code = ranks.wait(120)
        finally:
            ranks.terminate()  # it takes its ranks with it
    assert code == 0, (out / "torchrun.txt").read_text()
    rows = [
        json.loads(line) for line in (out / "torchrun" / "metrics.jsonl").read_text().splitlines()
    ]
    same_numbers(rows, reference.rows[:3])


@pytest.mark.slow
@pytest.mark.parametrize("more", [
    ["--slots", 3], ["--checkpoint_activations"], ["--micro_tokens", 60], ["--graders", 2],
], ids=lambda more: more[0][2:])  # fmt: skip
def test_what_only_changes_the_speed(reference, out, flags, more):
    same_numbers(finished(out / f"speed-{more[0][2:]}", [*flags, *more]).rows, reference.rows)


@pytest.mark.slow
def test_one_temperature(out, flags):
    """Of the sampler and the learner: their log-probs agree at 0.7."""
    run = finished(out / "cool", [*flags, "--temperature", 0.7, "--steps", 2, "--eval_limit", 2])
    assert all(
        row["mismatch/max_abs"] < 1e-5 and abs(row["mismatch/kl"]) < 1e-8 for row in run.rows[1:]
    )


RAGGED = {
    "grpo-token": ["--algo", "grpo", "--loss_norm", "token", "--n_total", 4],
    "ada-constant": [
        "--algo",
        "reinforce_ada",
        "--loss_norm",
        "constant",
        "--n_extra",
        3,
        "--n_keep",
        4,
    ],
    "aero-pool-two-updates": [
        "--rescue_budget",
        "pool",
        "--updates_per_batch",
        2,
        "--micro_tokens",
        90,
    ],
    "dapo": ["--algo", "dapo", "--n_total", 4, "--refill_cap", 2],
    "one-rollout": [
        "--problems",
        1,
        "--max_new",
        1,
        "--n_same",
        1,
    ],  # a rank has nothing to train on
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

    def wrapped(learner, batch, *rest):
        if next(count) in calls and rank in (None, int(os.environ.get("RANK", 0))):
            batch = [x._replace(advantage=NAN) for x in batch]
        return inner(learner, batch, *rest)

    train.update = wrapped


@pytest.mark.slow
def test_a_bad_gradient_on_one_rank_is_skipped_by_both(out, flags, student):
    more = [*flags, "--steps", 2, "--eval_data", ""]
    run = finished(out / "nan", more, ranks=2, hook=functools.partial(bad_advantages, [1], rank=1))
    assert [row.get("optim/skipped_steps") for row in run.rows] == [None, 1, 1]
    assert math.isnan(run.rows[1]["optim/grad_norm"]) and math.isfinite(
        run.rows[2]["optim/grad_norm"]
    )


@pytest.mark.slow
def test_five_bad_gradients_in_a_row_end_the_run(out, flags):
    """With the cause, and with the steps before them kept; none of the bad ones is."""
    more = [*flags, "--steps", 9, "--eval_data", "", "--save_every", 1]
    run = Run(out / "nans", more, hook=functools.partial(bad_advantages, [2, *range(4, 20)]))
    assert run.wait() == 1 and "Traceback" not in run.text
    assert "5 updates in a row had a gradient that is not finite" in run.text
    assert (
        run.rows[-1]["step"] == 7 and run.rows[-1]["optim/skipped_steps"] == 5
    )  # the eighth has no row and no checkpoint
    assert all(
        math.isnan(row["optim/grad_norm"]) == (row["step"] in (2, 4, 5, 6, 7))
        for row in run.rows[1:]
    )
    assert run.checkpoints == ["step_6", "step_7"]


@pytest.mark.slow
def test_nothing_to_learn_from(out, flags, student):
    """Responses of one token are cut, so wrong: grpo_skip has nothing to train on and goes on; aero
    trains on it."""
    more = [*flags, "--max_new", 1, "--steps", 2, "--eval_limit", 2]
    skip, posterior = (
        Run(out / "flat-skip", [*more, "--algo", "grpo_skip"]),
        Run(out / "flat-aero", more),
    )
    for run in (skip, posterior):
        assert run.wait() == 0 and "Traceback" not in run.text, run.text
        assert run.checkpoints[-1] == "step_2" and (run.folder / "model" / "config.json").is_file()
        assert all(
            row["response_length/truncated_frac"] > 0.9 and row["group/all_wrong_frac"] == 1
            for row in run.rows[1:]
        )
    before = load_file(student.model / "model.safetensors")
    after = [load_file(run.folder / "model" / "model.safetensors") for run in (skip, posterior)]
    assert all(torch.equal(w, before[name]) for name, w in after[0].items())
    assert any(not torch.equal(w, before[name]) for name, w in after[1].items())
    assert [row["rollout/trained"] for row in skip.rows[1:]] == [0, 0]
    assert all(
        row["rollout/trained"] == 12 for row in posterior.rows[1:]
    )  # n_same of each of 6 problems
