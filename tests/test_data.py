"""data.py: every convention of rows, what cannot be used, and the order."""

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_prompts import make_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import data
import reward
from prompts import Unusable, encoder
from tasks.arithmetic import arithmetic
from tasks.base import character_tokenizer

MATH = reward.load_reward("math")
REAL = Path(os.environ.get("AERO_DATA", "/nonexistent"))
needs_real = pytest.mark.skipif(
    not REAL.is_dir(), reason="AERO_DATA names no folder of benchmark files"
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text(
            "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows),
            encoding="utf-8",
        )
        return str(path)

    return write


def load(spec, tokenizer, template="qwen_math", **options):
    return data.load(spec, tokenizer, template, reward=MATH, **options)


def test_arithmetic_specs(tokenizer):
    assert len(load("arithmetic", tokenizer, "none")) == 4096
    held = load("arithmetic:heldout", tokenizer, "none")
    assert [p.text for p in held] == [e.text for e in arithmetic(0, 256, held_out=True)]
    some = load("arithmetic:train:12:3-4@5", tokenizer, "none")
    examples = arithmetic(5, 12, (3, 4))
    assert [(p.text, p.gold, p.level) for p in some] == [
        (e.text, e.answer, str(e.level)) for e in examples
    ]
    assert some.report.name == "arithmetic" and some.report.revision == "seed 5"
    with pytest.raises(ValueError, match=r"arithmetic:test: wanted arithmetic\[:train\|:heldout\]"):
        load("arithmetic:test", tokenizer)


# ------------------------------------------------------------------------------------- conventions

CONVENTIONS = {
    "MATH": ({"problem": "q", "answer": "\\frac{1}{2}"}, "\\frac{1}{2}"),
    "MATH solution": (
        {"problem": "q", "level": "Level 5", "solution": "so $\\boxed{\\frac{1}{2}}$."},
        "\\frac{1}{2}",
    ),
    "AIME": ({"id": 1, "problem": "q", "answer": "025", "solution": "long"}, "25"),
    "zero": ({"problem": "q", "answer": "000"}, "0"),
    "GSM8K": ({"question": "q", "answer": "9*2=<<9*2=18>>18\n#### 1,234"}, "1,234"),
    "OlympiadBench": ({"question": "q", "final_answer": ["$2$"], "solution": ["steps"]}, "$2$"),
    "TRL answer": ({"prompt": "q", "answer": "4"}, "4"),
    "TRL solution": ({"prompt": [{"role": "user", "content": "q"}], "solution": "$4$"}, "$4$"),
    "TRL worked solution": ({"prompt": "q", "solution": "thus \\boxed{4}"}, "4"),
    "verl": ({
        "data_source": "x", "prompt": [{"role": "user", "content": "q"}], "ability": "math",
        "reward_model": {"ground_truth": "34", "style": "rule"}, "extra_info": {"index": 1},
    }, "34"),
    "slime": ({"prompt": "q", "label": "5"}, "5"),
    "int": ({"problem": "q", "answer": 12}, "12"),
    "whole float": ({"problem": "q", "answer": 27.0}, "27"),
    "float": ({"problem": "q", "answer": 2.5}, "2.5"),
    "list": ({"problem": "q", "answer": ["9.6\n"]}, "9.6"),
    "accepted answers": ({"problem": "q", "answer": ["0.01\n", "0.02"]}, ["0.01", "0.02"]),
    "list as string": ({"problem": "q", "answer": "['8', '10']"}, ["8", "10"]),
    "list as JSON": ({"problem": "q", "answer": '["8", "10"]'}, ["8", "10"]),
    "list as string, repr": ({"problem": "q", "answer": repr(["\\frac{1}{2}\n"])}, "\\frac{1}{2}"),
    "list as string, raw": ({"problem": "q", "answer": "['\\frac{1}{2}', '\\nu', '\\{1\\}']"},
                            ["\\frac{1}{2}", "\\nu", "\\{1\\}"]),
    "interval": ({"problem": "q", "answer": "[8, 10]"}, "[8, 10]"),
    "null columns": (
        {"problem": None, "question": "q", "answer": None, "solution": "\\boxed{3}"}, "3"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONVENTIONS)
def test_conventions(kind, tokenizer, write):
    row, gold = CONVENTIONS[kind]
    (problem,) = load(write([row]), tokenizer, "none")
    assert problem == data.Problem(0, tuple(tokenizer.encode("q")), gold, "q", row.get("level", ""))


def test_levels(tokenizer, write):
    rows = [
        {"problem": str(i), "answer": "1", "difficulty": d}
        for i, d in enumerate([2.0, 4.625, 3, "hard", None])
    ]
    assert [p.level for p in load(write(rows), tokenizer, "none")] == [
        "2",
        "4.625",
        "3",
        "hard",
        "",
    ]


def test_every_row_is_accounted_for(tokenizer, write):
    rows = [
        {"problem": "a", "answer": "1"},
        {"problem": "a", "answer": "1"},
        {"problem": "a", "answer": "2"},
        {"problem": "b", "answer": ""},
        {"problem": "c", "answer": None},
        {"problem": "d", "solution": "no box"},
        {"problem": "e", "solution": "\\boxed{1"},
        {"problem": "f", "answer": {"x": 1}},
        {"problem": " ", "answer": "1"},
        {"problem": "g", "answer": float("nan")},
        {"problem": "h " * 50, "answer": "1"},
        {"problem": ["i"], "answer": "1"},
        {"problem": "j", "answer": True},
        {"problem": "k", "answer": "['8', "},
        {"problem": "l", "answer": [["1", "2"]]},
        {"problem": "m", "answer": []},
        {
            "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "answer": "1",
        },
        {"problem": "z", "answer": "9"},
    ]
    problems = load(write(rows), tokenizer, "none", max_prompt=20)
    assert [(p.id, p.text) for p in problems] == [(0, "a"), (1, "z")]
    assert problems.report.rows == 18 and problems.report.used == 2
    assert problems.report.dropped == {
        "duplicate": [2],
        "duplicate with another answer": [3],
        "no answer": [4, 5, 16],
        "no \\boxed{} in the solution": [6],
        "a \\boxed{} that never closes": [7],
        "answer of type dict": [8],
        "no problem": [9],
        "answer is not finite": [10],
        "prompt longer than 20 tokens": [11],
        "problem is neither text nor messages of text": [12],
        "answer of type bool": [13],
        "answer is a damaged list": [14],
        "answer is a list of lists": [15],
        "messages that do not end with the user's, or with roles beyond system, user, assistant": [
            17
        ],
    }
    text = str(problems.report)
    assert (
        "2 problems of 18 rows read" in text
        and "3 left out: no answer (row 4, 5, 16)" in text
        and "\n" not in text
    )


def test_a_duplicate_is_one_of_a_row_in_use(tokenizer, write):
    """
    A row without an answer took the place of the good one behind it; "a", " a" and messages of "a"
    are one prompt.
    """
    turns = [{"role": "user", "content": "a"}]
    rows = [
        {"problem": "a", "answer": "\\text{}"},
        {"problem": "a", "answer": "2"},
        {"problem": " a", "answer": "2"},
        {"prompt": turns, "answer": "3"},
    ]
    problems = load(write(rows), tokenizer, "none")
    assert [p.gold for p in problems] == ["2"] and list(problems.report.dropped.values())[1:] == [
        [3],
        [4],
    ]
    assert list(problems.report.dropped)[1:] == ["duplicate", "duplicate with another answer"]


def test_lists_as_numpy_prints_them(tokenizer, write):
    """Python joins strings with nothing between them: the gold of "['8' '10']" was 810."""
    golds = ["['8' '10']", "['a'\n \"b\"]", "['\\' \\'']", "['it''s']", "['x', ' ', 'y']", "['1']"]
    problems = load(
        write([{"problem": str(i), "answer": g} for i, g in enumerate(golds)]), tokenizer, "none"
    )
    assert problems.report.dropped["answer is a list without commas"] == [1, 2, 4]
    assert problems[-1].gold == "1"


def test_prompts_that_lose_their_text(write):
    """
    A tokenizer without an unknown token says nothing for what it lacks: "3 % 2" became "3  2", and
    a prompt of such characters alone had no tokens, on which the sampler failed. What only a
    normaliser changes is no loss.
    """
    letters = character_tokenizer()
    rows = [{"problem": q, "answer": "1"} for q in ("1+1", "3 \u20ac 2", "\u03c0\u221a")]
    problems = load(write(rows), letters, "none")
    assert [p.text for p in problems] == ["1+1"]
    assert problems.report.dropped == {"characters that the tokenizer does not know": [2, 3]}
    core = Tokenizer(models.WordLevel({"x": 0, "cafe": 1}, unk_token="x"))
    core.normalizer = normalizers.Sequence([normalizers.BertNormalizer(), normalizers.Strip()])
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    lower = PreTrainedTokenizerFast(tokenizer_object=core)
    assert encoder(lower, "none")("Cafe\u0301\u200b  caf\u00e9\t") == (1, 1)
    with pytest.raises(Unusable, match="prompt of no tokens"):
        encoder(lower, "none")("\u200b")
    core = Tokenizer(models.BPE())
    core.normalizer, core.pre_tokenizer = (
        normalizers.NFC(),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        ["e"], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
    )
    bytes_ = encoder(PreTrainedTokenizerFast(tokenizer_object=core), "none")
    assert bytes_("e\u0301  \u6570\u5b66 \U0001d54f\n\n  x") == bytes_(
        "\u00e9  \u6570\u5b66 \U0001d54f\n\n  x"
    )


def test_golds_of_another_reward(tokenizer, write):
    """Code, objects and lists are a gold answer as they stand; mathematics dropped them."""
    golds = [
        {"tests": ["assert f(1) == 2"], "entry": None},
        ["a", ["b"]],
        "def f(x):\n    return x + 1\n",
        "",
        True,
        " 025 ",
        "['8', '10']",
    ]
    columns = ["answer", "label", "final_answer", "solution", "reward_model", "answer", "answer"]
    rows = [{"problem": f"q{i}", c: g} for i, (c, g) in enumerate(zip(columns, golds))]
    rows[4]["reward_model"] = {"ground_truth": True}
    rows += [{"problem": "a", "answer": None}, {"problem": "b", "reward_model": "no object"}]
    for other in (None, reward.Reward("mine.py:f", len, "")):
        problems = data.load(write(rows), tokenizer, "none", reward=other)
        assert [p.gold for p in problems] == golds
        assert problems.report.dropped == {"no answer": [8, 9]}


def test_golds_beyond_json(tokenizer, monkeypatch):
    """A Parquet file may hold dates: the grading processes could not be sent one."""
    rows = [{"problem": "a", "answer": datetime(2026, 1, 1)}, {"problem": "b", "answer": [1]}]
    monkeypatch.setattr(data, "open_rows", lambda spec: (data.Report("x", ""), rows))
    problems = data.load("x", tokenizer, "none")
    assert [p.gold for p in problems] == [[1]]
    reason = "answer beyond JSON: Object of type datetime is not JSON serializable"
    assert problems.report.dropped == {reason: [1]}


def test_duplicates_with_golds_that_have_no_hash(tokenizer, write):
    golds = [{"tests": [1]}, {"tests": [1]}, {"tests": [2]}, [1]]
    problems = data.load(write([{"problem": "q", "answer": g} for g in golds]), tokenizer, "none")
    assert [p.gold for p in problems] == [{"tests": [1]}]
    assert problems.report.dropped == {"duplicate": [2], "duplicate with another answer": [3, 4]}


def test_a_reward_may_check_golds_and_may_read_them(tokenizer, write):
    def check(gold):
        return None if "tests" in gold else f"gold {gold!r} has no tests"

    def read_gold(raw):
        if raw == "bad":
            raise ValueError("no gold at all")
        return raw.upper()

    rows = [{"problem": str(i), "answer": g} for i, g in enumerate(["tests 1", "x", "y"])]
    problems = data.load(
        write(rows), tokenizer, "none", reward=reward.Reward("m:f", len, "", check=check)
    )
    assert [p.gold for p in problems] == ["tests 1"]
    assert problems.report.dropped == {"gold has no tests": [2, 3]}
    rows = [{"problem": str(i), "answer": g} for i, g in enumerate(["a", "bad"])]
    own = reward.Reward("m:f", len, "", read_gold=read_gold)
    problems = data.load(write(rows), tokenizer, "none", reward=own)
    assert [p.gold for p in problems] == ["A"]
    assert problems.report.dropped == {"no gold at all": [2]}


def test_problems_know_that_their_prompt_opens_a_thought(tokenizer, write):
    path = write([GOOD])
    assert [load(path, tokenizer, t)[0].opens_thought for t in ("none", "r1")] == [False, True]


def test_limit_and_report(tokenizer, write):
    path = write([{"problem": str(i), "answer": "1"} for i in range(9)])
    problems = load(path, tokenizer, "none", limit=4)
    assert [p.id for p in problems] == [0, 1, 2, 3] and problems.report.rows == 4
    assert str(problems.report).startswith("rows @ sha256 ")


def test_file_forms(tokenizer, tmp_path):
    """
    An array, a byte order mark, blank lines, Windows line ends, and U+2028, which ends a line for
    str.splitlines only.
    """
    row = json.dumps({"problem": "a\u2028b", "answer": 1}, ensure_ascii=False)
    for i, text in enumerate(
        [
            f"[{row}]",
            f" [\n{row}\n]\n",
            f"\ufeff{row}\n",
            f"\ufeff[\n{row}]",
            f"\n{row}\r\n\r\n",
            row,
        ]
    ):
        path = tmp_path / f"{i}.{'json' if '[' in text else 'jsonl'}"
        path.write_bytes(text.encode())
        assert [p.text for p in load(str(path), tokenizer, "none")] == ["a\u2028b"]


# --------------------------------------------------------------------------------------- bad input

GOOD = {"problem": "q", "answer": "1"}
BAD = {
    "empty": ([], r"rows.jsonl: empty, wanted rows"),
    "blank": (["", " "], r"rows.jsonl: empty, wanted rows"),
    "JSON": ([GOOD, '{"problem": '], r"rows.jsonl line 2: invalid JSON: Expecting value"),
    "no object": ([GOOD, "3"], r"rows.jsonl line 2: found 3, wanted an object"),
    "columns": (
        [{"text": "q", "target": "1"}],
        r"rows.jsonl: .* 0 problems of 1 rows read; 1 left out: no problem \(row 1\); "
        r"columns found: text, target; wanted: one of problem, question, prompt "
        r"and one of reward_model, answer, final_answer, label, solution",
    ),
    "answer column": (
        [{"problem": "q", "target": "1"}],
        r"no answer \(row 1\); columns found: problem, target; wanted: one",
    ),
    "unusable": (
        [{"problem": str(i), "answer": ""} for i in range(7)],
        r"7 left out: no answer \(row 1, 2, 3, 4, 5, ...\)",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files(kind, tokenizer, write):
    rows, message = BAD[kind]
    with pytest.raises(ValueError, match=message) as error:
        load(write(rows), tokenizer, "none")
    assert "\n" not in str(error.value)


def test_bad_specs(tokenizer, tmp_path):
    for spec in ("absent.jsonl", "a/b/c", "gsm8kk", str(tmp_path / "absent.parquet")):
        with pytest.raises(
            FileNotFoundError,
            match=r"no such file or folder, no OWNER/NAME .* none of: arithmetic math500",
        ):
            load(spec, tokenizer, "none")
    with pytest.raises(FileNotFoundError):  # longer than a file name may be: was an OSError
        load("x" * 300, tokenizer, "none")
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(
        ValueError, match=r"found the suffix '.csv', wanted .jsonl, .json, .parquet"
    ):
        load(str(tmp_path / "x.csv"), tokenizer, "none")
    (tmp_path / "x.jsonl").write_bytes(b'{"problem": "\xff"}')
    with pytest.raises(ValueError, match=r"x.jsonl line 1: invalid JSON: 'utf-8' codec"):
        load(str(tmp_path / "x.jsonl"), tokenizer, "none")
    with pytest.raises(ValueError, match="longer than 2 tokens"):
        load("arithmetic:train:8", tokenizer, "qwen_math", max_prompt=2)


def test_without_datasets(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "x.parquet").write_bytes(b"")
    for spec in (str(tmp_path / "x.parquet"), str(tmp_path), "math500", "owner/name:train@abc"):
        with pytest.raises(
            ValueError, match=r"needs the package `datasets`: pip install -r requirements-data.txt"
        ):
            load(spec, tokenizer, "none")


# ---------------------------------------------------------------------------------------- datasets


def test_hub_specs(tokenizer, monkeypatch):
    """
    What is asked of `datasets` for each form of a name; the library itself is replaced, so nothing
    is downloaded.
    """
    asked = []

    class Rows(list):
        info = SimpleNamespace(
            download_checksums={f"hf://datasets/o/n@{'0123456789' * 4}/x.parquet": {}}
        )

    class Fake:
        @staticmethod
        def load_dataset(name, config, revision, **options):
            asked.append((name, config, revision, options))
            return {"train": Rows([GOOD]), "test": Rows([GOOD | {"problem": "t"}])}

    monkeypatch.setitem(sys.modules, "datasets", Fake)

    def loaded(spec):
        problems = load(spec, tokenizer, "none")
        return problems[0].text, problems.report.name, problems.report.revision, *asked.pop()

    assert loaded("o/n:test@v1") == ("t", "n", "012345678901", "o/n", None, "v1", {})
    assert loaded("o/n:main/train") == ("q", "n", "012345678901", "o/n", "main", None, {})
    assert loaded("gsm8k") == ("t", "gsm8k", "012345678901", "openai/gsm8k", "main", None, {})
    assert loaded("gsm8k:train@v2") == (
        "q",
        "gsm8k",
        "012345678901",
        "openai/gsm8k",
        "main",
        "v2",
        {},
    )
    assert loaded("aime24")[0] == "q"
    assert "the known copy has 30 rows" in str(load("aime24", tokenizer, "none").report)
    assert "known copy" not in str(load("aime24", tokenizer, "none", limit=1).report)
    with pytest.raises(
        ValueError, match=r"o/n: found splits train, test; wanted one of them, as in o/n:train"
    ):
        loaded("o/n")

    def fail(*args, **kwargs):
        raise RuntimeError("no route\nto host")

    Fake.load_dataset = fail
    with pytest.raises(ValueError, match=r"^o/n: not read by datasets: RuntimeError: no route$"):
        loaded("o/n")


def test_parquet_and_folders(tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = [
        row | {"problem": f"q{i}"}
        for i, (row, _) in enumerate(CONVENTIONS.values())
        if isinstance(row.get("answer"), str)
    ]
    table = datasets.Dataset.from_list(
        [{"problem": r["problem"], "answer": r["answer"]} for r in rows]
    )
    table.to_parquet(tmp_path / "x.parquet")
    table.save_to_disk(tmp_path / "disk")
    (tmp_path / "folder").mkdir()
    table.to_parquet(tmp_path / "folder" / "test-00000-of-00001.parquet")
    (tmp_path / "both").mkdir()
    table.to_parquet(tmp_path / "both" / "test.parquet")
    table.to_parquet(tmp_path / "both" / "train.parquet")
    verl = [
        {
            "prompt": [{"role": "user", "content": "q"}],
            "reward_model": {"ground_truth": "34", "style": "rule"},
        }
    ]
    datasets.Dataset.from_list(verl).to_parquet(tmp_path / "verl.parquet")
    golds = [MATH.read_gold(r["answer"]) for r in rows]
    for spec in ("x.parquet", "disk", "folder", "folder:test", "both:test"):
        problems = load(str(tmp_path / spec), tokenizer, "none")
        assert [p.gold for p in problems] == golds and problems.report.rows == len(rows)
    with pytest.raises(
        ValueError, match=r"disk:test: one data set without splits, wanted .*disk alone"
    ):
        load(f"{tmp_path / 'disk'}:test", tokenizer, "none")  # the split was ignored
    assert load(str(tmp_path / "verl.parquet"), tokenizer, "none")[0].gold == "34"
    with pytest.raises(ValueError, match="both: found splits train, test; wanted one"):
        load(str(tmp_path / "both"), tokenizer, "none")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(ValueError, match=r"bad.parquet: not read by datasets") as error:
        load(str(tmp_path / "bad.parquet"), tokenizer, "none")
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------- real files


# What the files themselves do not give. Two rows of gaokao2023en end their problem with the answer
# and have none beside it; the gold answer of one of olympiadbench is prose ("f(x)=ax+b, where b is
# an arbitrary integer, and a is ...").
UNUSABLE = {"gaokao2023en": {168, 193}, "olympiadbench": {74}}


@needs_real
@pytest.mark.parametrize("path", sorted(REAL.glob("*.jsonl")), ids=lambda path: path.stem)
def test_real_files(path, tokenizer):
    """
    Every row loads, whatever its convention, and each accepted answer is graded right against the
    gold it belongs to.
    """
    problems = load(str(path), tokenizer, "qwen_math")
    assert {row for rows in problems.report.dropped.values() for row in rows} <= UNUSABLE.get(
        path.stem, set()
    )
    assert problems.report.rows == sum(bool(line.strip()) for line in path.open("rb"))
    accepted = [
        (a, p.gold) for p in problems for a in (p.gold if isinstance(p.gold, list) else [p.gold])
    ]
    assert [
        (a, gold)
        for a, gold in accepted
        if reward.score(f"The answer is $\\boxed{{{a}}}$.", gold) != 1.0
    ] == []


@needs_real
@pytest.mark.parametrize("name", ["gsm8k_test", "gsm8k_train", "minerva_full"])
def test_worked_solutions_are_right(name):
    """
    A solution that ends in #### or in a box is a response: graded against the gold that was read
    from it, it is right.
    """
    for number, row in enumerate(data.json_rows(REAL / f"{name}.jsonl"), 1):
        _, gold, _ = data.parse_row(row, MATH)
        assert reward.score(row.get("solution") or row["answer"], gold) == 1.0, number


# ------------------------------------------------------------------------------------------- order


def test_order_is_a_permutation_of_seed_and_epoch():
    for count in (1, 2, 7, 100):
        assert sorted(data.order(count, 0, 0)) == list(range(count))
    assert (
        data.order(100, 0, 0)
        == data.order(100, 0, 0)
        != data.order(100, 0, 1)
        != data.order(100, 1, 0)
    )


def test_the_walk_meets_every_problem_once_an_epoch():
    for count in (1, 2, 7, 100):
        walk = [data.nth(count, 3, cursor) for cursor in range(3 * count)]
        assert walk == [i for epoch in range(3) for i in data.order(count, 3, epoch)]


ORDER_OF_NINE = (8, 0, 6, 7, 2, 3, 1, 4, 5)  # epoch 2 of seed 1


def test_the_order_hangs_on_nothing_but_its_arguments():
    """Another process with another hash seed draws the same, and so will every later version."""
    assert data.order(9, 1, 2) == ORDER_OF_NINE
    env = os.environ | {"PYTHONHASHSEED": "123", "PYTHONPATH": str(Path(data.__file__).parent)}
    code = "import data; print(data.order(9, 1, 2))"
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert out.stdout.strip() == str(ORDER_OF_NINE)
