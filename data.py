"""
Problems: from files, the hub or the built-in task; prompt templates; the order in which training meets the problems.

    arithmetic[:train|:heldout][:COUNT][:LOW-HIGH][@SEED]     the built-in task, e.g. arithmetic:heldout:256:1-8@0
    FILE.jsonl, FILE.json, FILE.parquet, FOLDER[:SPLIT]       JSON with the standard library, the rest through `datasets`
    OWNER/NAME[:[CONFIG/]SPLIT][@REVISION]                    a data set of the Hugging Face hub, through `datasets`
    math500, gsm8k[:[CONFIG/]SPLIT][@REVISION], ...           short names for those, see NAMED

A row is an object with (of several columns the first that is not null counts)

    the problem   problem, question, or prompt: a string, or messages as TRL and verl write them
    the answer    reward_model.ground_truth, answer, final_answer, label, or solution: see parse_gold
    its level     level or difficulty, optional

No row is dropped in silence: `load(...).report` names the number and reason of each that is not used.
"""

import ast
import functools
import hashlib
import itertools
import json
import logging
import math
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jinja2

import reward

# name: (hub name, config, split, rows in that copy). Copies of a benchmark differ, so other row counts are reported.
NAMED = {
    "math500": ("HuggingFaceH4/MATH-500", None, "test", 500),  # problem, answer
    "aime24": ("HuggingFaceH4/aime_2024", None, "train", 30),  # problem, answer
    "aime25": ("math-ai/aime25", None, "test", 30),  # problem, answer
    "amc23": ("math-ai/amc23", None, "test", 40),  # question, answer
    "minerva": ("math-ai/minervamath", None, "test", 272),  # question, answer
    "olympiadbench": ("math-ai/olympiadbench", None, "test", 674),  # question, final_answer
    "gsm8k": ("openai/gsm8k", "main", "test", 1319),  # question, answer with ####
    "math": ("DigitalLearningGmbH/MATH-lighteval", None, "train", 7500),  # problem, solution with \boxed{}
}
PROBLEM_COLUMNS = ("problem", "question", "prompt")
ANSWER_COLUMNS = ("reward_model", "answer", "final_answer", "label", "solution")
SUFFIXES = (".jsonl", ".json", ".parquet")

TEMPLATES = {
    "qwen_math": "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
    # DeepSeek-R1 (2501.12948, table 1) as Dr. GRPO (2503.20783) uses it; the response begins inside the think tag
    "r1": "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. "
    "The Assistant first thinks about the reasoning process in the mind and then provides the User with the answer. "
    "The reasoning process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> tags, "
    "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>.\n"
    "User: {question}\nAssistant: <think>",
    "none": "{question}",
}


@dataclass(frozen=True)
class Problem:
    id: int  # position in the loaded set
    prompt: tuple[int, ...]  # token ids, template applied
    gold: str | list[str]  # the answer, or all that are accepted
    text: str  # the question alone
    level: str  # "" when the data have none


class Unusable(ValueError):
    """Why a row is not used. `load` collects these."""


# --------------------------------------------------------------------------------------------------------------------
# The built-in task


class Example(NamedTuple):
    text: str  # (17+25)*3
    solution: str  # 17+25=42 \n 42*3=126 \n \boxed{126}
    answer: str
    level: int  # number of operations


def is_held_out(text: str) -> bool:
    """One expression in eight, by a hash of its text alone: train and held-out sets are disjoint whatever their seeds."""
    return hashlib.sha256(text.encode()).digest()[0] % 8 == 0


def expression(rng: random.Random, level: int) -> Example:
    """
    `level` operations, left-nested. The first number is 1..99. What is added or taken away is at most 9 up to level 4,
    and 5 more with each level from there (29 at level 8); factors are 2..9. Every value on the way is in 0..99.
    """
    largest = 9 + 5 * max(0, level - 4)
    value = rng.randint(1, 99)
    text, lines = str(value), []
    for step in range(level):
        ranges = {"+": (1, min(largest, 99 - value)), "-": (1, min(largest, value)), "*": (2, min(9, 99 // max(value, 1)))}
        operator = rng.choice([o for o, (low, high) in ranges.items() if low <= high])
        operand = rng.randint(*ranges[operator])
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[operator]
        text = f"({text}){operator}{operand}" if step else f"{text}{operator}{operand}"
        lines.append(f"{value}{operator}{operand}={result}")
        value = result
    return Example(text, "\n".join([*lines, f"\\boxed{{{value}}}"]), str(value), level)


def arithmetic(seed: int, count: int, levels: tuple[int, int] = (1, 8), held_out: bool = False) -> list[Example]:
    """
    `count` different examples, levels low..high in turn. A pure function of its arguments, the same on every machine;
    a larger count extends a smaller one. Raises ValueError when a level has no more expressions to give (level 1 has
    about 2,200 to train on and 340 held out, the others have plenty).
    """
    low, high = levels
    if not (1 <= low <= high <= 20 and count >= 1):
        raise ValueError(f"arithmetic: found count {count} and levels {low}-{high}, wanted count >= 1 and levels within 1-20")
    # random.Random seeds itself from a string through sha512, the same in every process
    rngs = [random.Random(f"arithmetic {seed} {held_out} {level}") for level in range(21)]
    examples = {}
    for i in range(count):
        level = low + i % (high - low + 1)
        for _ in range(100_000):
            example = expression(rngs[level], level)
            if example.text not in examples and is_held_out(example.text) == held_out:
                break
        else:
            had = f"{sum(e.level == level for e in examples.values())} {'held-out' if held_out else 'train'} problems"
            raise ValueError(f"arithmetic: level {level} has {had}, too few for {count} over levels {low}-{high}")
        examples[example.text] = example
    return list(examples.values())


# --------------------------------------------------------------------------------------------------------------------
# Rows


@dataclass
class Report:
    """What was read, and what became of it: rows = used + dropped, up to the row where `limit` was met."""

    name: str  # short, for metric and file names
    revision: str  # commit, digest or seed: which copy
    expected: int = 0  # rows of the known copy, 0 when none is known
    rows: int = 0
    used: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)  # reason: row numbers from 1

    def __str__(self) -> str:
        parts = [f"{self.name}{self.revision and ' @ '}{self.revision}: {self.used} problems of {self.rows} rows read"]
        if self.expected not in (0, self.rows):
            parts.append(f"the known copy has {self.expected} rows")
        for reason, rows in self.dropped.items():
            parts.append(f"{len(rows)} left out: {reason} (row {', '.join(map(str, rows[:5]))}{', ...' * (len(rows) > 5)})")
        return "; ".join(parts)


def open_rows(spec: str) -> tuple[Report, Iterable[dict]]:
    """A fresh report and the rows behind a spec. Raises ValueError or FileNotFoundError, one line."""
    if spec.partition(":")[0].partition("@")[0] == "arithmetic":
        match = re.fullmatch(r"arithmetic(?::(train|heldout))?(?::(\d+))?(?::(\d+)-(\d+))?(?:@(\d+))?", spec)
        if not match:
            raise ValueError(f"{spec}: wanted arithmetic[:train|:heldout][:COUNT][:LOW-HIGH][@SEED]")
        part, count, low, high, seed = match.groups()
        count = int(count or (256 if part == "heldout" else 4096))
        examples = arithmetic(int(seed or 0), count, (int(low or 1), int(high or 8)), part == "heldout")
        rows = [{"problem": e.text, "answer": e.answer, "level": e.level} for e in examples]
        return Report("arithmetic", f"seed {seed or 0}"), rows
    path = Path(spec)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{spec}: found the suffix {path.suffix!r}, wanted {', '.join(SUFFIXES)}")
        rows = hub_rows(spec, "parquet", data_files=spec)[0] if path.suffix == ".parquet" else json_rows(path)
        return Report(path.stem, "sha256 " + hashlib.sha256(path.read_bytes()).hexdigest()[:12]), rows
    name, _, revision = spec.partition("@")
    name, _, split = name.partition(":")
    config, _, split = split.rpartition("/")
    if name and Path(name).is_dir():
        return Report(Path(name).resolve().name, ""), hub_rows(spec, name, config, split)[0]
    if name in NAMED:
        hub, own_config, own_split, expected = NAMED[name]
        rows, commit = hub_rows(spec, hub, config or own_config, split or own_split, revision)
        return Report(name, commit, 0 if split or revision else expected), rows
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix not in SUFFIXES:
        rows, commit = hub_rows(spec, name, config, split, revision)
        return Report(name.split("/")[1], commit), rows
    known = " ".join(["arithmetic", *NAMED])
    raise FileNotFoundError(f"{spec or 'empty name'}: no such file or folder, no OWNER/NAME of the hub, and none of: {known}")


def json_rows(path: Path) -> Iterator[dict]:
    """The objects of a file with one per line (blank lines aside), or with one array of them."""
    with open(path, "rb") as file:
        is_array = file.read(16).decode("utf-8-sig", "ignore").lstrip().startswith("[")
        file.seek(0)
        for number, line in enumerate([file.read()] if is_array else file, 1):
            try:
                text = line.decode("utf-8-sig")  # -sig: Windows editors begin a file with a byte order mark
                found = json.loads(text) if text.strip() else []
            except ValueError as error:  # not UTF-8, or not JSON
                raise ValueError(f"{path} line {number}: invalid JSON: {error}") from None
            for row in found if isinstance(found, list) else [found]:
                if not isinstance(row, dict):
                    raise ValueError(f"{path} line {number}: found {json.dumps(row)[:40]}, wanted an object")
                yield row


def hub_rows(spec: str, name: str, config=None, split=None, revision=None, **options) -> tuple[Iterable[dict], str]:
    """Rows of one split, and the commit they come from ("" if unknown), through the optional library `datasets`."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{spec}: needs the package `datasets`: pip install -r requirements-data.txt") from None
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # its errors are raised as well, and said once
    try:
        if Path(name, "dataset_dict.json").is_file() or Path(name, "state.json").is_file():
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, config or None, revision=revision or None, **options)
    except Exception as error:  # its own kinds, httpx's, pyarrow's: each means that nothing was read
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{spec}: not read by datasets: {type(error).__name__}: {reason}") from error
    if isinstance(found, dict):
        split = split or (next(iter(found)) if len(found) == 1 else None)
        if split not in found:
            raise ValueError(f"{spec}: found splits {', '.join(found)}; wanted one of them, as in {name}:{next(iter(found))}")
        found = found[split]
    elif config or split:
        raise ValueError(f"{spec}: one data set without splits, wanted {name} alone")
    commit = re.search(r"@([0-9a-f]{40})/", " ".join(found.info.download_checksums or ()))
    return found, commit[1][:12] if commit else revision or ""


def parse_row(row: dict) -> tuple[str | list[dict], str | list[str], str]:
    """(question or messages, gold, level). Raises Unusable with the reason."""
    asked = next((c for c in PROBLEM_COLUMNS if row.get(c) is not None), None)
    told = next((c for c in ANSWER_COLUMNS if row.get(c) is not None), None)
    if asked is None or told is None:
        raise Unusable("no problem" if asked is None else "no answer")
    question, gold = row[asked], row[told]
    if told == "reward_model":
        gold = gold.get("ground_truth") if isinstance(gold, dict) else None
    if told == "solution" and asked != "prompt" and not re.search(r"####|\\boxed|\\fbox", str(gold)):
        raise Unusable("no \\boxed{} in the solution")  # a bare answer in `solution` is TRL's habit, beside `prompt`
    level = next((row[c] for c in ("level", "difficulty") if row.get(c) is not None), "")
    return question, parse_gold(gold), f"{level:g}" if isinstance(level, float) else str(level)


def parse_gold(gold) -> str | list[str]:
    """
    The answer, or the list of accepted answers, as strings. Raises Unusable with the reason.

    27.0 -> "27"; "025" -> "25", as AIME pads; "9*2=18\\n#### 1,234" -> "1,234"; "so \\boxed{7}" -> "7";
    ["8\\n", "8"] -> "8"; "['8', '10']" -> ["8", "10"]; "[8, 10]" stays as it is, an interval. "['8' '10']", as numpy prints
    lists, is refused: Python reads it as ["810"].
    """
    if isinstance(gold, str) and re.match(r"""\s*\[\s*['"]""", gold):
        # a list written as a string; in Python's notation LaTeX has its backslashes doubled, in a careless one it has not
        careless = re.search(r"""(?<!\\)\\(?:[^\\'"n]|n[a-z])""", gold)
        literal = gold.replace("\\", "\\\\") if careless else gold
        if re.search(r"_\s*_", re.sub(r"""(['"])(?:\\.|(?!\1)[^\\])*\1""", "_", literal)):
            raise Unusable("answer is a list without commas")
        try:
            gold = ast.literal_eval(literal.strip())
        except (ValueError, SyntaxError):
            raise Unusable("answer is a damaged list") from None
    if isinstance(gold, list):
        golds = [parse_gold(g) for g in gold]
        if not golds or not all(isinstance(g, str) for g in golds):
            raise Unusable("answer is a list of lists" if golds else "no answer")
        return golds[0] if len(set(golds)) == 1 else list(dict.fromkeys(golds))
    if isinstance(gold, bool) or not isinstance(gold, str | int | float):
        raise Unusable("no answer" if gold is None else f"answer of type {type(gold).__name__}")
    if isinstance(gold, float):
        if not math.isfinite(gold):
            raise Unusable("answer is not finite")
        gold = int(gold) if gold.is_integer() else gold
    text = str(gold)
    if "####" in text:
        text = text.rpartition("####")[2]
    elif "\\boxed" in text or "\\fbox" in text:
        text, _ = reward.extract(text, ("boxed", "boxes"))
        if text is None:
            raise Unusable("a \\boxed{} that never closes")
    text = text.strip()
    if not text:
        raise Unusable("no answer")
    return text.lstrip("0") or "0" if re.fullmatch(r"0\d{1,2}", text) else text


# --------------------------------------------------------------------------------------------------------------------
# Prompts


def template_text(template: str) -> str:
    """The text with its {question} slot behind a template's name or file, or the format string itself."""
    text = TEMPLATES.get(template, template)
    if "{question}" not in text and Path(text).is_file():
        text = Path(text).read_text(encoding="utf-8")
    if text.count("{question}") != 1:
        known = ", ".join([*TEMPLATES, "chat"])
        raise ValueError(f"template {template!r}: wanted {known}, or a file or a format string with one {{question}} in it")
    return text


def encoder(tokenizer, template: str) -> Callable[[str | list[dict]], tuple[int, ...]]:
    """
    A function from a question, or from messages [{"role": ..., "content": ...}], to the token ids of the prompt.

    Special tokens come from the template alone: text of the data is tokenised as plain text, so a question that spells
    <|im_end|> cannot end its turn. Under "chat" the tokenizer's own template writes the messages; the others have one
    slot, so they take one user turn. Raises ValueError for a template that is unknown or not for this tokenizer.
    """
    special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    splitter = re.compile("|".join(f"({re.escape(s)})" for s in sorted(special, key=len, reverse=True)) or "(?!)")
    bos = [i for i in tokenizer("").input_ids[:1] if i == tokenizer.bos_token_id]  # Llama begins every text with it
    if template == "chat" and not tokenizer.chat_template:
        raise ValueError("template chat: this tokenizer has no chat template, wanted another template")
    fixed = "" if template == "chat" else template_text(template)
    unknown = sorted(set(re.findall(r"<\|\w+\|>", fixed)) - set(special))
    if unknown:
        raise ValueError(f"template {template!r}: {' '.join(unknown)} not among the special tokens of this tokenizer")

    def encode(question):
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
        are_turns = isinstance(messages, list) and all(isinstance(m, dict) for m in messages)
        if not are_turns or not all(isinstance(m.get("content"), str) for m in messages):
            raise Unusable("problem is neither text nor messages of text")
        roles = [m.get("role") for m in messages]
        if roles[-1:] != ["user"] or not set(roles) <= {"system", "user", "assistant"}:
            raise Unusable("messages that do not end with the user's, or with roles beyond system, user, assistant")
        if fixed and len(messages) > 1:
            raise Unusable("messages of several turns, which need the template chat")
        if not messages[-1]["content"].strip():
            raise Unusable("no problem")
        # the template is written around slots (private-use characters, which no template has), then cut at its special
        # tokens; each piece between two of them is tokenised in one call, so that a slot leaves no seam
        slots = {f"\ue000{i}\ue001": m["content"].strip() for i, m in enumerate(messages)}
        pattern = fixed.replace("{question}", next(iter(slots)))
        if not fixed:
            turns = [{"role": role, "content": slot} for role, slot in zip(roles, slots)]
            try:
                pattern = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            except jinja2.TemplateError as error:
                raise Unusable(f"the chat template refuses it: {error}") from None
        ids = []
        for piece in filter(None, splitter.split(pattern)):
            if piece in special:
                ids.append(special[piece])
            else:
                text = re.sub("\ue000\\d+\ue001", lambda slot: slots[slot[0]], piece)
                found = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False,
                                  return_offsets_mapping=True)
                read = set(itertools.chain(*itertools.starmap(range, found.offset_mapping)))
                lost = [c for i, c in enumerate(text) if i not in read and unicodedata.category(c)[0] not in "CMZ"]
                if lost:    # and nothing was put in their place; white space, controls and accents are a normaliser's business
                    raise Unusable("characters that the tokenizer does not know")
                ids += found.input_ids
        if not ids:
            raise Unusable("prompt of no tokens")
        return tuple(ids if ids[:1] == bos else bos + ids)

    return encode


def stop_ids(tokenizer, eos_ids: Iterable[int] = ()) -> tuple[int, ...]:
    """Every id that ends a response: the model's, and the ends of turn this tokenizer knows. The config of Qwen2.5-Math
    names <|endoftext|> alone, while a ChatML turn ends in <|im_end|>."""
    ends = {"<|im_end|>", "<|eot_id|>", tokenizer.eos_token}
    return tuple(sorted({i for i, token in tokenizer.added_tokens_decoder.items() if str(token) in ends} | set(eos_ids)))


# --------------------------------------------------------------------------------------------------------------------
# Loading, and the order


class Problems(list):
    """A list of Problem; `report` says what became of the other rows."""

    report: Report


def load(spec: str, tokenizer, template: str = "qwen_math", limit: int = 0, max_prompt: int = 0) -> Problems:
    """
    The problems behind `spec` (see the head of this file), ids from 0 in the order of the rows.

    template: qwen_math, r1, none, chat, a file, or a format string with {question}; limit: how many at most, 0 is all;
    max_prompt: tokens of the longest prompt, 0 is any. Left out, with a note in the report: rows without a usable
    answer, too long prompts, and all but the first of rows with the same prompt. Raises ValueError or
    FileNotFoundError, one line, for what cannot be read, and when no row is usable.
    """
    encode = encoder(tokenizer, template)
    report, rows = open_rows(spec)
    problems, golds, columns = Problems(), {}, {}
    problems.report = report
    for row in rows:
        report.rows += 1
        columns.update(dict.fromkeys(row))
        try:
            question, gold, level = parse_row(row)
            if complaint := reward.check_gold(gold):
                raise Unusable(re.sub(r"""(['"]).*\1 """, "", complaint))  # without the quoted answer, so that rows group
            prompt = encode(question)
            if max_prompt and len(prompt) > max_prompt:
                raise Unusable(f"prompt longer than {max_prompt} tokens")
            if prompt in golds:
                raise Unusable("duplicate" if golds[prompt] == gold else "duplicate with another answer")
        except Unusable as reason:
            report.dropped.setdefault(str(reason), []).append(report.rows)
            continue
        golds[prompt] = gold
        text = question if isinstance(question, str) else question[-1]["content"]
        problems.append(Problem(len(problems), prompt, gold, text.strip(), level))
        if len(problems) == limit:
            report.expected = 0  # the rest was not read
            break
    report.used = len(problems)
    if not problems:
        found = str(report) if report.rows else "empty, wanted rows"
        if {"no problem", "no answer"} & report.dropped.keys():
            found += f"; columns found: {', '.join(columns)}; wanted: one of {', '.join(PROBLEM_COLUMNS)}"
            found += f" and one of {', '.join(ANSWER_COLUMNS)}"
        raise ValueError(f"{spec}: {found}")
    return problems


@functools.lru_cache(maxsize=4)
def order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The permutation of 0..count-1 in which `epoch` meets the problems. Nothing else enters it."""
    return tuple(random.Random(f"order {seed} {epoch}").sample(range(count), count))


def nth(count: int, seed: int, cursor: int) -> int:
    """
    The problem at position `cursor` of an endless walk, epoch after epoch: the same on every rank of every world size. A
    step across the border of two epochs may meet a problem twice, as two groups: random streams hang on the place in the step.
    """
    epoch, at = divmod(cursor, count)
    return order(count, seed, epoch)[at]
