r"""From a model's response and a gold answer to 0 or 1: is the final answer right?"""

import functools
import hashlib
from pathlib import Path

from verify.compare import compare, integer
from verify.extraction import extract
from verify.golds import check, read_gold
from verify.tree import MAX_CHARS, Undecided

__all__ = ["Undecided", "call", "check", "digest", "extract", "instant", "judge", "read_gold"]


def judge(text: str | None, gold, sympy: bool, strict: bool = True) -> tuple[float, str]:
    """(score, reason) of an extracted answer against a gold answer or a list of accepted ones."""
    golds = gold if isinstance(gold, list | tuple) else [gold]
    reason = "unparsed"
    undecided = False
    for accepted in golds if text is not None else ():
        try:
            reason = compare(text, str(accepted).strip(), sympy, strict)
        except Undecided:
            undecided = True
        if reason.startswith("equal"):
            return 1.0, reason
    if undecided:
        raise Undecided
    return 0.0, reason


def call(text: str | None, gold: str | list[str], problem: str = "") -> tuple[float, str]:
    """The verdict in a process whose clock and memory a parent watches: sympy may run."""
    return judge(text, gold, sympy=True)


def instant(text: str | None, gold: str | list[str]) -> tuple[float, str] | None:
    """The verdict where it is cheaper than a trip to a worker, else None."""
    long = text is None or len(text) > MAX_CHARS
    if long or (isinstance(gold, str) and integer(text) is not None and integer(gold) is not None):
        return judge(text, gold, sympy=False)
    return None


@functools.cache
def digest() -> str:
    """Of the sources: verdicts of two runs compare when they print the same one."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
