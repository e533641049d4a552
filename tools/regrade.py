"""
Grades saved responses again, and generates nothing.

    python -m tools.regrade out/eval/x/math500.jsonl ...        with today's verifier
    python -m tools.regrade --reward my.py:f --out new FILE     with another reward, kept in new/

Says how many scores changed and prints the table of eval.py; the last line is one JSON object, the
summaries with the settings that the responses were drawn with. Without --out nothing is written.
"""

import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

from config import Parser
from data import json_rows
from eval import free_name, keep_old, save, summarise, table
from hf import read_json
from reward import Grader, Reward, load_reward

NEEDED = {"problem", "level", "response", "gold", "score", "reason", "length", "truncated"}


class Saved(NamedTuple):
    """A set that eval.py saved."""

    file: str
    records: list[dict]
    summary: dict  # {} where only the responses are there


def read_saved(file: str, scorer: Reward) -> Saved:
    """FileNotFoundError or ValueError, one line, for what is no saved set or lacks what we need."""
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    needed = NEEDED | {"question"} if scorer.needs_problem else NEEDED
    records = list(json_rows(path))
    for number, record in enumerate(records, 1):
        missing = ", ".join(sorted(needed - record.keys()))
        if missing:
            raise ValueError(f"{path} row {number}: lacks {missing}, so it is no saved response")
    summary = path.with_suffix(".json")
    try:
        summarise(records)
        return Saved(file, records, read_json(summary) if summary.is_file() else {})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def regrade(records: list[dict], grader: Grader) -> list[dict]:
    """Saved records with the verdicts of the grader."""
    for row, record in enumerate(records):
        question, opened = record.get("question", ""), record.get("opened", False)
        grader.submit(row, record["response"], record["gold"], question, opened)
    verdicts = {}
    while len(verdicts) < len(records):
        verdicts.update(grader.wait(1.0))
    return [record | vars(verdicts[row]) for row, record in enumerate(records)]


def prepare(cfg) -> dict[str, Saved]:
    """Sets by name. ValueError or OSError, one line, for anything that is wrong with the input."""
    if cfg.workers < 1:
        raise ValueError(f"--workers {cfg.workers}: wanted 1 or more")
    scorer = load_reward(cfg.reward)
    sets = {}
    for file in cfg.files:
        name = free_name(Path(file).stem, sets)
        keep_old(cfg.out, name)
        sets[name] = read_saved(file, scorer)
    return sets


def run(cfg, sets: dict[str, Saved]) -> dict[str, dict]:
    """Summaries by name. Files are written only where --out says."""
    results = {}
    with Grader(cfg.reward, cfg.workers) as grader:
        about = {"reward": grader.reward.spec, "grader": grader.reward.version}
        for name, (file, records, before) in sets.items():
            after = regrade(records, grader)
            changed = sum(old["score"] != new["score"] for old, new in zip(records, after))
            print(f"{file}: {changed} of {len(after)} scores changed")
            results[name] = before | summarise(after, grader.reward.binary) | about
            if cfg.out:
                save(Path(cfg.out), name, after, results[name])
    return results


def main(argv: list[str] | None = None) -> int:
    if os.environ.get("RANK", "0") != "0":
        return 0  # nothing to share: under torchrun one rank works
    parser = Parser(prog="python -m tools.regrade", description="Grades saved responses again.")
    parser.add_argument("files", nargs="+", metavar="FILE.jsonl", help="as eval.py saved them")
    parser.add_argument("--reward", default="math", help="see reward.py [%(default)s]")
    parser.add_argument("--workers", type=int, default=2, help="grading processes [%(default)s]")
    parser.add_argument("--out", default="", help="folder for the new records and summaries")
    try:
        cfg = parser.parse_args(argv)
        sets = prepare(cfg)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = run(cfg, sets)
    print(table(results))
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
