"""
Problems: rows of files and data sets, and the order in which training meets them.

    arithmetic[:train|:heldout][:COUNT][:LOW-HIGH][@SEED]   the built-in task,
                                                            as arithmetic:heldout:256:1-8@0
    FILE.jsonl, FILE.json, FILE.parquet, FOLDER[:SPLIT]     JSON with the standard library,
                                                            the rest through `datasets`
    OWNER/NAME[:[CONFIG/]SPLIT][@REVISION]                  a data set of the Hugging Face hub,
                                                            through `datasets`
    math500, gsm8k[:[CONFIG/]SPLIT][@REVISION], ...         short names for those, see NAMED

A row is an object with (of several columns the first that is not null counts)

    the problem   problem, question, or prompt: a string, or messages as TRL and verl write them
    the answer    reward_model.ground_truth, answer, final_answer, label, or solution
    its level     level or difficulty, optional

The reward says what an answer must look like: mathematics reads it (Reward.read_gold) and refuses
what it could not grade (Reward.check). For a reward that offers neither, the answer is taken as it
stands: text, list, object, code. No row is dropped in silence: `load(...).report` names the number
and reason of each that is not used.
"""

import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prompts import Unusable, encoder, opens_thought
from reward import Reward
from streams import generator
from tasks.arithmetic import arithmetic

# name: (hub name, config, split, rows in that copy). Copies of a benchmark differ, so other row
# counts are reported.
NAMED = {
    # problem, answer
    "math500": ("HuggingFaceH4/MATH-500", None, "test", 500),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train", 30),
    "aime25": ("math-ai/aime25", None, "test", 30),
    # question, answer
    "amc23": ("math-ai/amc23", None, "test", 40),
    "minerva": ("math-ai/minervamath", None, "test", 272),
    # question, final_answer
    "olympiadbench": ("math-ai/olympiadbench", None, "test", 674),
    # question, answer with ####
    "gsm8k": ("openai/gsm8k", "main", "test", 1319),
    # problem, solution with \boxed{}
    "math": ("DigitalLearningGmbH/MATH-lighteval", None, "train", 7500),
}
PROBLEM_COLUMNS = ("problem", "question", "prompt")
ANSWER_COLUMNS = ("reward_model", "answer", "final_answer", "label", "solution")
LEVEL_COLUMNS = ("level", "difficulty")
SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Problem:
    id: int  # position in the loaded set
    prompt: tuple[int, ...]  # token ids, template applied
    gold: Any  # of JSON; for mathematics the answer, or the list of all that are accepted
    text: str  # the question alone
    level: str  # "" when the data have none
    opens_thought: bool = False  # the prompt ends inside a thought, see `opens_thought`


# --------------------------------------------------------------------------------------------------
# Rows


@dataclass
class Report:
    """What was read and what became of it: rows = used + dropped, up to where `limit` was met."""

    name: str  # short, for metric and file names
    revision: str  # commit, digest or seed: which copy
    expected: int = 0  # rows of the known copy, 0 when none is known
    rows: int = 0
    used: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)  # reason: row numbers from 1

    def __str__(self) -> str:
        source = self.name
        if self.revision:
            source += f" @ {self.revision}"
        parts = [f"{source}: {self.used} problems of {self.rows} rows read"]
        if self.expected not in (0, self.rows):
            parts.append(f"the known copy has {self.expected} rows")
        for reason, rows in self.dropped.items():
            numbers = [str(row) for row in rows[:5]]
            if len(rows) > 5:
                numbers.append("...")
            parts.append(f"{len(rows)} left out: {reason} (row {', '.join(numbers)})")
        return "; ".join(parts)


def open_rows(spec: str) -> tuple[Report, Iterable[dict]]:
    """A fresh report and the rows of a spec. Raises ValueError or FileNotFoundError, one line."""
    path = Path(spec)
    if re.match(r"arithmetic([:@]|$)", spec):
        return arithmetic_rows(spec)
    if os.path.isfile(spec):
        if path.suffix not in SUFFIXES:
            raise ValueError(
                f"{spec}: found the suffix {path.suffix!r}, wanted {', '.join(SUFFIXES)}"
            )
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        if path.suffix == ".parquet":
            rows, _ = hub_rows(spec, "parquet", data_files=spec)
        else:
            rows = json_rows(path)
        return Report(path.stem, f"sha256 {digest}"), rows

    name, _, revision = spec.partition("@")
    name, _, split = name.partition(":")
    config, _, split = split.rpartition("/")
    if name and os.path.isdir(name):
        rows, _ = hub_rows(spec, name, config, split)
        return Report(Path(name).resolve().name, ""), rows
    if name in NAMED:
        hub_name, known_config, known_split, expected = NAMED[name]
        if split or revision:
            expected = 0
        rows, commit = hub_rows(
            spec, hub_name, config or known_config, split or known_split, revision
        )
        return Report(name, commit, expected), rows
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix not in SUFFIXES:
        rows, commit = hub_rows(spec, name, config, split, revision)
        return Report(name.split("/")[1], commit), rows
    known = " ".join(["arithmetic", *NAMED])
    raise FileNotFoundError(
        f"{spec or 'empty name'}: no such file or folder, no OWNER/NAME of the hub, "
        f"and none of: {known}"
    )


def arithmetic_rows(spec: str) -> tuple[Report, list[dict]]:
    pattern = r"arithmetic(?::(train|heldout))?(?::(\d+))?(?::(\d+)-(\d+))?(?:@(\d+))?"
    match = re.fullmatch(pattern, spec)
    if not match:
        raise ValueError(f"{spec}: wanted arithmetic[:train|:heldout][:COUNT][:LOW-HIGH][@SEED]")
    part, count, low, high, seed = match.groups()
    held_out = part == "heldout"
    if count is None:
        count = 256 if held_out else 4096
    levels = (int(low or 1), int(high or 8))
    seed = int(seed or 0)
    examples = arithmetic(seed, int(count), levels, held_out)
    rows = [{"problem": e.text, "answer": e.answer, "level": e.level} for e in examples]
    return Report("arithmetic", f"seed {seed}"), rows


def json_rows(path: Path) -> Iterator[dict]:
    """The objects of a file with one per line (blank lines aside), or with one array of them."""
    with open(path, "rb") as file:
        is_array = file.read(16).decode("utf-8-sig", "ignore").lstrip().startswith("[")
        file.seek(0)
        lines = [file.read()] if is_array else file
        for number, line in enumerate(lines, 1):
            try:
                # -sig: Windows editors begin a file with a byte order mark.
                text = line.decode("utf-8-sig")
                value = json.loads(text) if text.strip() else []
            except ValueError as error:  # not UTF-8, or not JSON
                raise ValueError(f"{path} line {number}: invalid JSON: {error}") from None
            rows = value if isinstance(value, list) else [value]
            for row in rows:
                if not isinstance(row, dict):
                    excerpt = json.dumps(row)[:40]
                    raise ValueError(f"{path} line {number}: found {excerpt}, wanted an object")
                yield row


def hub_rows(
    spec: str,
    name: str,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    **options,
) -> tuple[Iterable[dict], str]:
    """Rows of one split, and the commit they come from ("" if unknown), through `datasets`."""
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{spec}: needs the package `datasets`: pip install -r requirements-data.txt"
        ) from None
    # Its errors are raised as well, and said once.
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    saved = [Path(name, "dataset_dict.json"), Path(name, "state.json")]
    try:
        if any(file.is_file() for file in saved):
            rows = datasets.load_from_disk(name)
        else:
            rows = datasets.load_dataset(
                name, config or None, revision=revision or None, **options
            )
    except Exception as error:  # its own kinds, httpx's, pyarrow's: all mean that nothing was read
        reason, *_ = str(error).splitlines() or [""]
        raise ValueError(
            f"{spec}: not read by datasets: {type(error).__name__}: {reason}"
        ) from error
    if isinstance(rows, dict):
        splits = list(rows)
        if not split and len(splits) == 1:
            split = splits[0]
        if split not in splits:
            raise ValueError(
                f"{spec}: found splits {', '.join(splits)}; "
                f"wanted one of them, as in {name}:{splits[0]}"
            )
        rows = rows[split]
    elif config or split:
        raise ValueError(f"{spec}: one data set without splits, wanted {name} alone")
    commit = re.search(r"@([0-9a-f]{40})/", " ".join(rows.info.download_checksums or ()))
    if commit:
        return rows, commit[1][:12]
    return rows, revision or ""


def first_column(row: dict, columns: tuple[str, ...]) -> str | None:
    return next((column for column in columns if row.get(column) is not None), None)


def parse_row(row: dict, reward: Reward | None = None) -> tuple[str | list[dict], Any, str]:
    """(question or messages, gold, level). Raises Unusable with the reason."""
    problem_column = first_column(row, PROBLEM_COLUMNS)
    if problem_column is None:
        raise Unusable("no problem")
    answer_column = first_column(row, ANSWER_COLUMNS)
    if answer_column is None:
        raise Unusable("no answer")
    answer = row[answer_column]
    if answer_column == "reward_model":
        answer = answer.get("ground_truth") if isinstance(answer, dict) else None
    if reward and reward.read_gold and answer_column == "solution" and problem_column != "prompt":
        # A worked solution. A bare answer in this column is TRL's habit, beside `prompt`.
        if not re.search(r"####|\\boxed|\\fbox", str(answer)):
            raise Unusable("no \\boxed{} in the solution")
    level_column = first_column(row, LEVEL_COLUMNS)
    level = row[level_column] if level_column else ""
    if isinstance(level, float):
        level = f"{level:g}"
    return row[problem_column], parse_gold(answer, reward), str(level)


def parse_gold(answer, reward: Reward | None) -> Any:
    """The gold answer as the reward wants it. Raises Unusable with the reason."""
    if answer is None:
        raise Unusable("no answer")
    gold = answer
    if reward and reward.read_gold:
        try:
            gold = reward.read_gold(answer)
        except ValueError as error:
            raise Unusable(str(error)) from None
    try:
        json.dumps(gold)  # it travels to the grading processes, and into files
    except TypeError as error:
        raise Unusable(f"answer beyond JSON: {error}") from None
    complaint = reward.check(gold) if reward and reward.check else None
    if complaint:
        # Without the quoted answer, so that rows group.
        raise Unusable(re.sub(r"""(['"]).*\1 """, "", complaint))
    return gold


# --------------------------------------------------------------------------------------------------
# Loading, and the order


class Problems(list):
    """A list of Problem; `report` says what became of the other rows."""

    report: Report


def load(
    spec: str,
    tokenizer,
    template: str = "qwen_math",
    limit: int = 0,
    max_prompt: int = 0,
    reward: Reward | None = None,
) -> Problems:
    """
    The problems behind `spec` (see the head of this file), ids from 0 in the order of the rows.

    template: see prompts.py; limit: how many at most, 0 is all; max_prompt: tokens of the longest
    prompt, 0 is any; reward: reads and checks the answers. Left out, with a note in the report:
    rows without a usable answer, too long prompts, and all but the first of rows with the same
    prompt. Raises ValueError or FileNotFoundError, one line, for what cannot be read, and when no
    row is usable.
    """
    encode = encoder(tokenizer, template)
    in_thought = opens_thought(tokenizer, template)
    report, rows = open_rows(spec)
    problems = Problems()
    problems.report = report
    golds = {}  # prompt: gold
    columns = {}  # a set in order
    for row in rows:
        report.rows += 1
        columns.update(dict.fromkeys(row))
        try:
            question, gold, level = parse_row(row, reward)
            prompt = encode(question)
            if max_prompt and len(prompt) > max_prompt:
                raise Unusable(f"prompt longer than {max_prompt} tokens")
            if prompt in golds:
                same = golds[prompt] == gold
                raise Unusable("duplicate" if same else "duplicate with another answer")
        except Unusable as reason:
            report.dropped.setdefault(str(reason), []).append(report.rows)
            continue
        golds[prompt] = gold
        text = question if isinstance(question, str) else question[-1]["content"]
        problems.append(Problem(len(problems), prompt, gold, text.strip(), level, in_thought))
        if len(problems) == limit:
            report.expected = 0  # the rest was not read
            break
    report.used = len(problems)
    if not problems:
        raise ValueError(f"{spec}: {why_empty(report, columns)}")
    return problems


def why_empty(report: Report, columns: Iterable[str]) -> str:
    if report.rows == 0:
        return "empty, wanted rows"
    text = str(report)
    if report.dropped.keys() & {"no problem", "no answer"}:
        text += f"; columns found: {', '.join(columns)}"
        text += f"; wanted: one of {', '.join(PROBLEM_COLUMNS)}"
        text += f" and one of {', '.join(ANSWER_COLUMNS)}"
    return text


@functools.lru_cache(maxsize=4)
def order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The permutation of 0..count-1 in which `epoch` meets the problems. Nothing else enters it."""
    return tuple(generator(seed, "order", epoch).permutation(count).tolist())


def nth(count: int, seed: int, cursor: int) -> int:
    """
    The problem at position `cursor` of an endless walk, epoch after epoch: the same on every rank
    of every world size.

    A step across the border of two epochs may meet a problem twice, as two groups: random streams
    hang on the place in the step.
    """
    epoch, position = divmod(cursor, count)
    return order(count, seed, epoch)[position]
