"""
eval.py: the estimators against enumeration, the loop against a sampler of known answers, the
command end to end.
"""

import itertools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import eval as evaluation
import reward
from hf import config_from_dict, save_folder
from model import Model
from rollout import Rollout, Sampling
from streams import stream
from tasks import base
from tools import regrade

REAL = Path(os.environ.get("AERO_DATA", "/nonexistent"))


# --------------------------------------------------------------------------------------- estimators


def test_pass_at_k_is_the_exact_share_of_subsets():
    for n in range(1, 9):
        for c in range(n + 1):
            samples = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(samples, k))
                assert evaluation.pass_at_k(n, c, k) == pytest.approx(
                    sum(map(any, subsets)) / len(subsets), abs=1e-15
                )


def test_pass_at_k_is_unbiased():
    """
    Its mean over n draws of a coin is the chance that k draws of that coin hold a success: a sum
    over binomials.
    """
    for p, n, k in [(0.1, 8, 4), (0.5, 6, 6), (0.03, 32, 8), (1.0, 4, 2), (0.0, 4, 2)]:
        mean = sum(
            math.comb(n, c) * p**c * (1 - p) ** (n - c) * evaluation.pass_at_k(n, c, k)
            for c in range(n + 1)
        )
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_pass_at_k_edges():
    assert evaluation.pass_at_k(4, 1, 4) == 1.0  # drawing with replacement gives 0.684
    assert evaluation.pass_at_k(1000, 1, 500) == 0.5
    assert evaluation.pass_at_k(10**4, 1, 1) == 1e-4
    for bad in [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)]:
        with pytest.raises(ValueError, match="wanted 0 <= c <= n and 1 <= k <= n"):
            evaluation.pass_at_k(*bad)


def records_of(scores: list[list[int]], levels=None) -> list[dict]:
    return [
        {
            "problem": p,
            "level": levels[p] if levels else "",
            "score": float(s),
            "reason": "equal:text" if s else "wrong",
            "length": 10,
            "truncated": False,
        }
        for p, row in enumerate(scores)
        for s in row
    ]


def test_summary_by_hand():
    summary = evaluation.summarise(
        records_of([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], ["Level 10", "Level 9", "Level 9"])
    )
    assert summary["n"] == 3 and summary["k"] == 4
    assert summary["avg_at_k"] == pytest.approx(5 / 12) == summary["pass_at"]["1"]
    assert summary["avg_at_k_se"] == pytest.approx(statistics.stdev([1, 0.25, 0]) / math.sqrt(3))
    assert summary["pass_at"] == pytest.approx({"1": 5 / 12, "2": 0.5, "4": 2 / 3})
    assert summary["pass_at_k"] == pytest.approx(2 / 3)
    assert list(summary["by_level"].items()) == [
        ("Level 9", {"n": 2, "avg_at_k": 0.125, "pass_at_k": 0.5}),
        ("Level 10", {"n": 1, "avg_at_k": 1.0, "pass_at_k": 1.0}),
    ]
    assert summary["reasons"] == {"wrong": 7, "equal:text": 5}
    assert list(evaluation.summarise(records_of([[0] * 6]))["pass_at"]) == ["1", "2", "4", "6"]
    assert evaluation.summarise(records_of([[1]]))["avg_at_k_se"] is None
    for scores, found in [([[1, 0], [1]], "1 or 2"), ([], "no")]:
        with pytest.raises(ValueError, match=f"found {found} responses to a problem"):
            evaluation.summarise(records_of(scores))


def test_standard_error_is_that_of_problems():
    """
    The spread of the score over 2,000 benchmarks of 30 problems, 16 samples each, is what a single
    one states; taking the 480 samples for independent would state less than half of it.
    """
    rng, means, errors = random.Random(0), [], []
    for _ in range(2000):
        chances = [rng.betavariate(0.4, 0.4) for _ in range(30)]
        rates = [sum(rng.random() < p for _ in range(16)) / 16 for p in chances]
        means.append(statistics.fmean(rates))
        errors.append(statistics.stdev(rates) / math.sqrt(30))
    scores = [[int(rng.random() < p) for _ in range(16)] for p in chances]
    rates = [statistics.fmean(row) for row in scores]
    assert evaluation.summarise(records_of(scores))["avg_at_k_se"] == pytest.approx(
        statistics.stdev(rates) / math.sqrt(30)
    )
    assert statistics.fmean(errors) == pytest.approx(statistics.stdev(means), rel=0.05)
    assert math.sqrt(0.25 / 480) < 0.5 * statistics.stdev(means)


# ----------------------------------------------------------------------------------------- the loop


class ScriptedSampler:
    """
    Answers from a table {(problem, sample): (text, truncated)}, one slot, one rollout every second
    step.
    """

    def __init__(self, tokenizer, script):
        self.tokenizer, self.script, self.queue, self.clock, self.begun = (
            tokenizer,
            script,
            [],
            0,
            None,
        )

    def begin(self, seed, sampling):
        assert not self.queue
        self.begun = (seed, sampling)

    def add(self, requests):
        self.queue.extend(requests)

    @property
    def busy(self):
        return bool(self.queue)

    def step(self):
        self.clock += 1
        if self.clock % 2 or not self.queue:
            return []
        r = self.queue.pop()
        text, truncated = self.script[r.problem.id, r.index]
        tokens = self.tokenizer.encode(text) + [self.tokenizer.eos_token_id] * (not truncated)
        return [Rollout(r, tokens, [0.0] * len(tokens), truncated)]


@pytest.fixture(scope="module")
def tokenizer():
    return base.character_tokenizer()


@pytest.fixture(scope="module")
def grader():
    grader = reward.Grader(workers=1)
    yield grader
    grader.close()


@pytest.fixture(scope="module")
def problems(tokenizer):
    return data.load("arithmetic:heldout:5:2-3", tokenizer, "none")


def script_for(problems, k):
    """
    Problem i is right in its first i samples; the last sample of all has no answer and is
    truncated.
    """
    script = {
        (p.id, s): (f"\\boxed{{{int(p.gold) + (s >= p.id)}}}", False)
        for p in problems
        for s in range(k)
    }
    return script | {(problems[-1].id, k - 1): ("I wonder", True)}


def test_evaluate(tokenizer, grader, problems):
    sampler = ScriptedSampler(tokenizer, script_for(problems, 5))
    summary, records = evaluation.evaluate(
        sampler, grader, tokenizer, problems, 5, 64, Sampling(0.7, 0.9), seed=3
    )
    assert sampler.begun == (stream(3, "evaluation"), Sampling(0.7, 0.9))
    assert [(r["problem"], r["sample"]) for r in records] == [
        (p, s) for p in range(5) for s in range(5)
    ]
    assert [r["score"] for r in records] == [float(s < p) for p in range(5) for s in range(5)]
    assert summary["avg_at_k"] == pytest.approx(10 / 25) and summary["pass_at_k"] == pytest.approx(
        4 / 5
    )
    assert summary["truncated_frac"] == summary["unparsed_frac"] == 1 / 25
    expected = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 0,
        "max_new": 64,
        "seed": 3,
        "n": 5,
        "k": 5,
    }
    assert expected.items() <= summary.items() and summary["grader"] == grader.reward.version
    assert records[5] | {"reason": ""} == {
        "problem": 1,
        "sample": 0,
        "level": "3",
        "prompt": problems[1].text,
        "question": problems[1].text,
        "opened": False,
        "gold": problems[1].gold,
        "response": f"\\boxed{{{problems[1].gold}}}",
        "length": len(f"{problems[1].gold}}}") + 2,
        "truncated": False,
        "score": 1.0,
        "extracted": problems[1].gold,
        "rule": "boxed",
        "reason": "",
    }
    assert json.loads(json.dumps(records)) == records
    assert set(summary["by_level"]) == {"2", "3"}


def test_evaluate_refuses(tokenizer, grader, problems):
    def run(problems, k, sampling):
        evaluation.evaluate(
            ScriptedSampler(tokenizer, {}), grader, tokenizer, problems, k, 8, sampling, 0
        )

    with pytest.raises(ValueError, match="greedy decoding gives k = 2 equal responses"):
        run(problems, 2, Sampling(temperature=0))
    with pytest.raises(ValueError, match="found k 0 and 5 problems"):
        run(problems, 0, Sampling())
    with pytest.raises(ValueError, match="found k 1 and 0 problems"):
        run([], 1, Sampling())


def test_regrade(tokenizer, grader, problems):
    """
    Verdicts come from the response and the gold alone: spoilt ones are mended, nothing else
    changes.
    """
    sampler = ScriptedSampler(tokenizer, script_for(problems, 2))
    summary, records = evaluation.evaluate(
        sampler, grader, tokenizer, problems, 2, 64, Sampling(), 0
    )
    spoilt = [
        r | {"score": 1 - r["score"], "reason": "?", "extracted": None, "rule": "?"}
        for r in records
    ]
    assert regrade.regrade(spoilt, grader) == records
    assert evaluation.summarise(records).items() <= summary.items()


def test_table():
    one = evaluation.summarise(records_of([[1, 1, 1, 1], [1, 0, 0, 0]], ["Level 1", "Level 2"]))
    another = evaluation.summarise(records_of([[1, 0]]))
    results = {
        name: s | {"seed": 7, "grader": "abc"} for name, s in [("one", one), ("another", another)]
    }
    assert evaluation.table(results).split("\n") == [
        "data       problems  k  avg@k     +-  pass@1  pass@2  pass@4  truncated  unparsed  length",
        "one               2  4  0.625  0.375   0.625   0.750   1.000      0.000     0.000      10",
        "  level 1         1     1.000                          1.000",
        "  level 2         1     0.250                          1.000",
        "another           1  2  0.500          0.500   1.000              0.000     0.000      10",
        "seed 7, grader abc",
    ]
    results["another"]["seed"] = (
        8  # the line was that of the last set, whatever the others were drawn with
    )
    assert evaluation.table(results).split("\n")[-2:] == [
        "one: seed 7, grader abc",
        "another: seed 8, grader abc",
    ]


# -------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A tiny random model with the characters' tokenizer."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    raw = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
    }
    cfg = config_from_dict(raw)
    torch.manual_seed(0)
    save_folder(path, cfg, dict(Model(cfg).init_weights().named_parameters()), tokenizer)
    return path


ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
ROOT = Path(evaluation.__file__).parent


def command_line(*arguments, ranks=1) -> list[str]:
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        if ranks > 1
        else []
    )
    return [sys.executable, *torchrun, evaluation.__file__, *map(str, arguments)]


def command(*arguments, ranks=1):
    line = command_line(*arguments, ranks=ranks)
    return subprocess.run(line, capture_output=True, text=True, env=ENV, timeout=120, check=False)


def test_command_on_one_and_two_ranks(folder, tmp_path):
    """
    Two data sets of sizes that ranks do not divide; the records of two ranks with other slots are
    those of one.
    """
    extra = tmp_path / "mine.jsonl"
    extra.write_text(
        "".join(
            json.dumps({"question": f"{i}+{i}", "answer": f"so\n#### {2 * i}"}) + "\n"
            for i in range(3)
        )
    )
    flags = [
        "--model",
        folder,
        "--data",
        "arithmetic:heldout:5",
        extra,
        "--template",
        "none",
        "--k",
        3,
        "--max_new",
        10,
    ]
    one = command(*flags, "--slots", 4, "--out", tmp_path / "one")
    two = command(*flags, "--slots", 3, "--out", tmp_path / "two", ranks=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    for name in ("arithmetic.jsonl", "arithmetic.json", "mine.jsonl", "mine.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert one.stdout.split("\n")[-2] == two.stdout.split("\n")[-2]
    results = json.loads(one.stdout.split("\n")[-2])
    assert (
        list(results) == ["arithmetic", "mine"]
        and results["mine"]["rows"] == 3
        and results["mine"]["template"] == "none"
    )
    assert (
        results["arithmetic"]["n"] == 5
        and len((tmp_path / "one" / "arithmetic.jsonl").read_text().splitlines()) == 15
    )
    assert "data        problems  k  avg@k" in one.stdout
    assert (
        one.stdout.replace(str(tmp_path / "one"), str(tmp_path / "two")) == two.stdout
    )  # rank 1 prints nothing

    line = [sys.executable, "-m", "tools.regrade", str(tmp_path / "one" / "mine.jsonl")]
    again = subprocess.run(
        line, capture_output=True, text=True, env=ENV, cwd=ROOT, timeout=120, check=False
    )
    assert again.returncode == 0 and "0 of 9 scores changed" in again.stdout
    assert json.loads(again.stdout.split("\n")[-2]) == {"mine": results["mine"]}


def test_names_are_free():
    """The third of a-3, a, a was called a-3 as well, and took the place of the first."""
    taken = []
    for name in ("a-3", "a", "a", "a"):
        taken.append(evaluation.free_name(name, taken))
    assert taken == ["a-3", "a", "a-2", "a-4"]


def test_regrade_of_two_files_of_one_name(tmp_path, capsys, monkeypatch):
    """
    The second one's scores stood in the place of the first's, and --out wrote over what it was to
    regrade. Under torchrun every rank graded and wrote.
    """
    for folder, answer in (("a", "1"), ("b", "2")):
        record = records_of([[0]])[0] | {
            "sample": 0,
            "prompt": "q",
            "response": "\\boxed{1}",
            "gold": answer,
        }
        evaluation.save(tmp_path / folder, "x", [record], {"seed": 3})
    files = [str(tmp_path / folder / "x.jsonl") for folder in "ab"]
    monkeypatch.setenv("RANK", "1")
    assert regrade.main([*files, "--out", str(tmp_path / "new")]) == 0
    assert not capsys.readouterr().out and not (tmp_path / "new").exists()
    monkeypatch.delenv("RANK")
    assert regrade.main([*files, "--out", str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    assert {name: s["avg_at_k"] for name, s in json.loads(out.splitlines()[-1]).items()} == {
        "x": 1.0,
        "x-2": 0.0,
    }
    assert (
        f"{files[0]}: 1 of 1 scores changed" in out
        and len(list((tmp_path / "new").glob("*.jsonl"))) == 2
    )
    before = Path(files[0]).read_bytes()
    assert "holds x.jsonl already" in refused(
        capsys, *files, "--out", tmp_path / "a", main=regrade.main
    )
    assert Path(files[0]).read_bytes() == before
    for rows, found in (([[1, 0], [1]], "1 or 2"), ([], "no")):
        (tmp_path / "r.jsonl").write_text(
            "".join(json.dumps(record | r) + "\n" for r in records_of(rows))
        )
        assert f"r.jsonl: found {found} responses to a problem" in refused(
            capsys, tmp_path / "r.jsonl", main=regrade.main
        )


def refused(capsys, *arguments, main=evaluation.main) -> str:
    assert main([*map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and not out
    return err


def test_bad_input_is_one_line_before_any_work(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        evaluation.reward, "Grader", None
    )  # neither workers nor a sampler are started
    monkeypatch.setattr(evaluation, "Sampler", None)
    good = [
        "--model",
        folder,
        "--data",
        "arithmetic:heldout:8",
        "--template",
        "none",
        "--max_new",
        20,
    ]
    (tmp_path / "arithmetic.jsonl").write_text("{}\n")
    (tmp_path / "columns.jsonl").write_text('{"a": 1}\n')
    for extra, message in [
        (["--model", tmp_path / "absent"], "neither a folder nor an owner/name on the hub"),
        (["--model", tmp_path], "holds no config.json"),
        (["--data", "absent.jsonl"], "absent.jsonl: no such file or folder"),
        (
            ["--data", tmp_path / "columns.jsonl"],
            "columns found: a; wanted: one of problem, question, prompt",
        ),
        (["--depth", "3"], "unknown --depth 3; known are --model --data"),
        (["--temp", "3"], "unknown --temp 3"),  # no abbreviations
        (["--k", "many"], "argument --k: invalid int value: 'many'"),
        (["--k", "0"], "--k 0: wanted 1 or more"),
        (["--limit", "-1"], "--limit -1: wanted 0 or more"),
        (
            ["--temperature", "0"],
            "--temperature 0 is greedy, and --k 8 responses would be equal: wanted --k 1",
        ),
        (["--temperature", "-1"], "--temperature -1.0: wanted 0 or more"),
        (["--temperature", "nan"], "--temperature nan: wanted a finite number"),
        (["--data", ""], "empty name: no such file or folder"),
        (["--top_p", "0"], "--top_p 0.0: wanted a number above 0"),
        (
            ["--max_new", "128"],
            "--max_new 128 leaves no room for a prompt in the model's context of 128 tokens",
        ),
        (["--max_new", "126"], "left out: prompt longer than 2 tokens"),
        (["--template", "alpaca"], "template 'alpaca': wanted qwen_math, r1, none, chat"),
        (["--template", "chat"], "no chat template"),
        (["--out", tmp_path], "holds arithmetic.jsonl already"),
        (["--reward", "maths"], "--reward maths: wanted math, MODULE:FUNCTION or FILE.py:FUNCTION"),
        (["--reward", "absent.py:f"], "--reward absent.py:f: no such file: absent.py"),
    ]:
        assert message in refused(capsys, *good, *extra), extra
    for arguments, message in [
        ([tmp_path / "absent.jsonl"], "no such file"),
        ([tmp_path / "columns.jsonl"], "row 1: lacks gold, length, level"),
        ([], "the following arguments are required: FILE.jsonl"),
        ([tmp_path / "columns.jsonl", "--workers", "0"], "--workers 0: wanted 1 or more"),
    ]:
        assert message in refused(capsys, *arguments, main=regrade.main), arguments
    assert "--data is missing" in refused(capsys, "--model", folder)
    assert "--model is missing" in refused(capsys, "--data", "arithmetic")


def test_damaged_model_folders(capsys, folder, tmp_path):
    flags = ["--data", "arithmetic:heldout:8", "--template", "none", "--max_new", 20]
    for name, wrong, message in [
        ("model.safetensors", b"nonsense", "damaged"),
        ("model.safetensors", None, "neither model.safetensors nor"),
        ("tokenizer.json", None, "holds no tokenizer.json"),
        ("tokenizer.json", b"{", "tokenizer.json is damaged"),
    ]:
        copy = tmp_path / f"{name}-{wrong}"
        copy.mkdir()
        for path in folder.iterdir():
            if path.name != name or wrong is not None:
                (copy / path.name).write_bytes(path.read_bytes() if path.name != name else wrong)
        assert message in refused(capsys, "--model", copy, *flags)
    config = json.loads((folder / "config.json").read_text())
    (copy / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 90}))
    assert "has ids up to 99, the model's vocabulary ends before 90" in refused(
        capsys, "--model", copy, *flags
    )


# -------------------------------------------------------------------- other rewards, files, signals


def test_summary_of_a_reward_that_is_not_0_or_1():
    """
    Its mean is all there is. That nothing can pass is known from the reward, or seen in the scores.
    """
    records = [
        r | {"score": s}
        for r, s in zip(records_of([[0, 0], [0, 0]], ["1", "2"]), (0.25, -0.5, 1, 2))
    ]
    for binary in (None, False, True):
        summary = evaluation.summarise(records, binary)
        assert summary["avg_at_k"] == pytest.approx(2.75 / 4) and summary["pass_at"] == {}
        assert summary["avg_at_k_se"] == pytest.approx(
            statistics.stdev([-0.125, 1.5]) / math.sqrt(2)
        )
        assert summary["pass_at_k"] is None and summary["pass_at_k_se"] is None
        assert summary["by_level"]["2"] == {"n": 1, "avg_at_k": 1.5, "pass_at_k": None}
    whole = records_of([[1, 0], [1, 1]])
    assert evaluation.summarise(whole, False)["pass_at_k"] is None
    assert (
        evaluation.summarise(whole, None)
        == evaluation.summarise(whole, True)
        == evaluation.summarise(whole)
    )
    assert evaluation.table(
        {"x": summary | {"reward": "a.py:f"}, "y": evaluation.summarise(whole)}
    ).split("\n") == [
        "data       problems  k   avg@k     +-  pass@1  pass@2  truncated  unparsed  length",
        "x                 2  2   0.688  0.812                      0.000     0.000      10",
        "  level 1         1     -0.125",
        "  level 2         1      1.500",
        "y                 2  2   0.750  0.250   0.750   1.000      0.000     0.000      10",
        "pass@k is left out: it counts right responses, and the reward is not only 0 or 1",
        "x: reward a.py:f",
        "y: ",
    ]


REWARD = """
def share(response, gold, problem):
    return len(gold["accepted"]) + len(problem) / 100 + response.count("x") / 1000
def check(gold):
    return None if "accepted" in gold else "nothing is accepted"
"""


def test_a_reward_of_ones_own(folder, tmp_path):
    """
    The gold answers are objects, one of them of no use; the responses are graded again by another
    version.
    """
    (tmp_path / "mine.py").write_text(REWARD)
    golds = [{"accepted": ["a"]}, {"refused": 1}, {"accepted": [1, {"b": None}]}]
    rows = [{"question": f"{i}+{i}", "answer": gold} for i, gold in enumerate(golds)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        "--model",
        folder,
        "--template",
        "none",
        "--k",
        2,
        "--max_new",
        10,
        "--out",
        tmp_path / "out",
    ]
    done = command(*flags, "--data", tmp_path / "d.jsonl", "--reward", f"{tmp_path}/mine.py:share")
    assert done.returncode == 0, done.stderr
    assert (
        "1 left out: nothing is accepted (row 2)" in done.stdout
        and "pass@k is left out" in done.stdout
    )
    summary = json.loads(done.stdout.split("\n")[-2])["d"]
    records = [json.loads(line) for line in (tmp_path / "out" / "d.jsonl").read_text().splitlines()]
    assert [r["gold"] for r in records] == [golds[0]] * 2 + [golds[2]] * 2 and summary[
        "pass_at_k"
    ] is None
    expected = [
        len(r["gold"]["accepted"]) + 0.03 + r["response"].count("x") / 1000 for r in records
    ]
    assert [r["score"] for r in records] == pytest.approx(expected)
    assert summary["avg_at_k"] == pytest.approx(statistics.fmean(expected)) and summary[
        "reasons"
    ] == {"scored": 4}
    assert summary["reward"] == f"{tmp_path}/mine.py:share" and {
        r["extracted"] for r in records
    } == {None}

    (tmp_path / "other.py").write_text(REWARD + "BINARY = False\n")
    again = [
        sys.executable,
        "-m",
        "tools.regrade",
        str(tmp_path / "out" / "d.jsonl"),
        "--reward",
        f"{tmp_path}/other.py:share",
    ]
    again = subprocess.run(
        again, capture_output=True, text=True, env=ENV, cwd=ROOT, timeout=120, check=False
    )
    assert "0 of 4 scores changed" in again.stdout, again.stderr
    result = json.loads(again.stdout.split("\n")[-2])["d"]
    assert result["avg_at_k"] == summary["avg_at_k"] and result["grader"] != summary["grader"]


def test_an_output_that_is_a_file_gets_lines(tokenizer, grader, problems, capsys, monkeypatch):
    """However long a response takes: the line comes by the clock, not by what has ended."""
    monkeypatch.setattr(evaluation, "BEAT_S", 0.1)
    sampler = ScriptedSampler(tokenizer, script_for(problems, 1))
    step, naps = sampler.step, iter([0.35])
    monkeypatch.setattr(sampler, "step", lambda: (time.sleep(next(naps, 0)), step())[1])
    evaluation.evaluate(sampler, grader, tokenizer, problems, 1, 64, Sampling(), 0, label="set")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 3 and lines[0] == "set: 0 of 5 responses graded after 0 s"
    evaluation.evaluate(sampler, grader, tokenizer, problems, 1, 64, Sampling(), 0)
    assert not capsys.readouterr().out


class StopsAfter:
    """A stop that is asked for when it was looked at some times."""

    def __init__(self, looks):
        self.looks = looks

    @property
    def asked(self):
        self.looks -= 1
        return self.looks < 0


def test_a_stop_returns_what_was_graded(tokenizer, grader, problems):
    sampler = ScriptedSampler(tokenizer, script_for(problems, 4))
    summary, records = evaluation.evaluate(
        sampler, grader, tokenizer, problems, 4, 64, Sampling(), 0, stop=StopsAfter(16)
    )
    assert summary is None and 5 <= len(records) < 20
    ids = [(r["problem"], r["sample"]) for r in records]
    assert ids == sorted(ids)


@pytest.mark.parametrize("ranks, number", [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_keeps_what_was_graded(folder, tmp_path, ranks, number):
    """No summary is written or printed, and the same command draws the set anew and clears up."""
    out = tmp_path / "out"
    flags = ["--model", folder, "--template", "none", "--max_new", 90, "--out", out, "--slots", 4]
    line = command_line(*flags, "--data", "arithmetic:heldout:64:1-2", "--k", 400, ranks=ranks)
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV
    )
    assert "64 problems of 64 rows" in process.stdout.readline()
    time.sleep(4)
    process.send_signal(number)
    shown, errors = process.communicate(timeout=60)
    assert process.returncode != 0, shown
    partial = out / "arithmetic.partial.jsonl"
    records = [json.loads(text) for text in partial.read_text().splitlines()]
    assert (
        f"stopped by a signal: {len(records)} of {64 * 400} responses to arithmetic "
        f"are in {partial}" in shown
    ), errors
    assert 0 < len(records) < 64 * 400 and [path.name for path in out.iterdir()] == [partial.name]
    assert not shown.rstrip().endswith("}")
    if ranks == 1:
        again = command(*flags, "--data", "arithmetic:heldout:4:1-2", "--k", 1)
        assert again.returncode == 0, again.stderr
        assert sorted(path.name for path in out.iterdir()) == [
            "arithmetic.json",
            "arithmetic.jsonl",
        ]
