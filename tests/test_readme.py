"""
The README fits one screen after another, and what it and results/README.md name is there.

    python tests/test_readme.py     writes counted lines and places of names into README's tables
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "results" / "README.md"
MOST_LINES = 170
NAME = re.compile(r"`([^`\s]+)`")
FILE_ROW = re.compile(r"^\| (?P<names>`[^|]+`) \| (?P<lines>[@\d,]+) \|", re.MULTILINE)
PLACE = re.compile(r"\| `(?P<name>\w+)`, `(?P<file>\w+\.py):(?P<line>\d+)` \|")
METRIC = re.compile(r"`((?:[a-z_]+|eval/SET)/[a-z_]+)`")


def file_rows() -> list[re.Match]:
    return list(FILE_ROW.finditer(README.read_text()))


def sources(row: re.Match) -> list[Path]:
    """Files of a row; a folder stands for all Python files in it."""
    files = []
    for name in NAME.findall(row["names"]):
        path = ROOT / name
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return files


def count_lines() -> None:
    def counted(row):
        lines = sum(len(path.read_text().splitlines()) for path in sources(row))
        return f"| {row['names']} | {lines:,} |"

    README.write_text(FILE_ROW.sub(counted, README.read_text()))


def line_of(name: str, file: str) -> int:
    """Where a name of the table "Change it" is defined."""
    defined = re.compile(rf"(def {name}\(|{name}(:.*)? = )")
    for number, line in enumerate((ROOT / file).read_text().splitlines(), 1):
        if defined.match(line):
            return number
    raise ValueError(f"{file} defines no {name}")


def write_places() -> None:
    def placed(row):
        return f"| `{row['name']}`, `{row['file']}:{line_of(row['name'], row['file'])}` |"

    README.write_text(PLACE.sub(placed, README.read_text()))


def test_every_place_is_where_it_says():
    rows = list(PLACE.finditer(README.read_text()))
    assert len(rows) == 6
    for row in rows:
        assert int(row["line"]) == line_of(row["name"], row["file"]), row["name"]


def test_the_example_is_one_of_those_that_are_run():
    (block,) = re.findall(r"```python\n.*?```", README.read_text(), re.DOTALL)
    assert block in (ROOT / "CHANGE_IT.md").read_text()


def test_it_is_short():
    assert len(README.read_text().splitlines()) <= MOST_LINES


def test_no_placeholder_is_left():
    assert "@@" not in README.read_text()


def test_every_file_of_the_table_is_there():
    rows = file_rows()
    assert len(rows) > 10
    for row in rows:
        assert all(path.is_file() for path in sources(row)) and sources(row), row["names"]


@pytest.mark.parametrize("page", [README, RESULTS], ids=["README", "results"])
def test_every_file_that_a_page_names_is_there(page):
    """In backquotes or in a command; what a run writes stands below out/ and is not there yet."""
    text = page.read_text()
    links = [target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text)]
    for target in links:
        if target and "://" not in target:
            assert (page.parent / target).exists(), target
    words = re.split(r"[\s`;,()]+", text)
    suffixes = (".py", ".txt", ".toml", ".md", ".png")
    names = {word for word in words if word.endswith(suffixes) and not word.startswith("out/")}
    before = {"bench.py"}  # the old name, which the page says
    written = {"curves.png", "compare.png"}
    before |= {"kl.py"}  # an example of the page itself
    for name in names - before - written:
        here = [ROOT / name, page.parent / name]
        assert any(path.exists() for path in here) or "[" in name, name
    for module in re.findall(r"-m(?: --)?\s+tools\.([a-z]+)", text):
        assert (ROOT / "tools" / f"{module}.py").is_file(), module


@pytest.mark.parametrize("page", [README, RESULTS], ids=["README", "results"])
def test_every_heading_that_is_linked_is_there(page):
    for target in re.findall(r"\]\(([^)]*#[^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        text = (page.parent / name).read_text() if name else page.read_text()
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        anchors = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
        assert anchor in anchors, target


def test_every_test_that_is_named_is_there():
    defined = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        defined |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", README.read_text()))
    assert len(named) > 8 and named <= defined, named - defined


def test_every_flag_that_is_named_is_one():
    """Of train.py, eval.py or a tool; flags of torchrun and others are left out."""
    import eval as evaluation
    from config import Config
    from tools.bench import Bench
    from tools.plan import Budget

    known = {"help", "model", "data", "out"}
    for kind in (Config, Bench, Budget, evaluation.Config):
        known |= kind.__dataclass_fields__.keys()
    others = {"nproc_per_node", "nnodes", "json-lines", "logdir"}
    gone = {"adv_stats", "compare", "regrade"}  # the results say so
    for page in (README, RESULTS):
        named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", page.read_text()))
        assert named - others - gone <= known, named - others - gone - known


def explained(page: Path) -> set[str]:
    return set(METRIC.findall(page.read_text()))


def test_the_readme_explains_what_a_run_writes():
    assert explained(README) <= explained(RESULTS)


@pytest.mark.slow
def test_every_metric_of_a_run_is_explained(student, tmp_path):
    flags = dict(
        model=student.model,
        data=student.data,
        eval_data=student.held,
        template="none",
        out=tmp_path,
        name="run",
        steps=1,
        problems=4,
        max_new=16,
        slots=32,
        eval_k=2,
        compile=False,
        graders=1,
    )
    command = [sys.executable, ROOT / "train.py"]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    written = set().union(*map(json.loads, rows)) - {"step"}
    assert len(written) > 35
    names = {re.sub("^eval/[^/]+/", "eval/SET/", name) for name in written}
    assert names <= explained(RESULTS), names - explained(RESULTS)


if __name__ == "__main__":
    count_lines()
    write_places()
