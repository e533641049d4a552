r"""Gold answers: read from a row of data, and whether they can be graded at all."""

import ast
import math
import re

from verify.compare import integer, usable
from verify.extraction import extract
from verify.read import read
from verify.tokens import TEXT, clean

FORMULA = re.compile(r"[\\=^_{}<>+]")
STRING = re.compile(r"""(['"])(?:\\.|(?!\1)[^\\])*\1""")
CARELESS = re.compile(r"""(?<!\\)\\(?:[^\\'"nu]|n[a-z]|u(?![0-9a-fA-F]{4}))""")


def check(gold: str | list[str]) -> str | None:
    """None if a gold answer can be matched, else one line that says why not."""
    golds = list(gold) if isinstance(gold, list | tuple) else [gold]
    for accepted in map(str, golds):
        if not usable(accepted):
            return f"gold answer {accepted[:60]!r} is empty, undefined or the place of an answer"
        if integer(accepted) is not None:
            continue
        node = read(accepted)
        if node is None:
            return f"gold answer {accepted[:60]!r} passes a limit of the parser"
        if node.op == "raw" and FORMULA.search(TEXT.sub(r"\1", clean(accepted))):
            return (
                f"gold answer {accepted[:60]!r} is neither an expression that we can parse"
                " nor plain text"
            )
    return None if golds else "gold answer is an empty list"


def read_gold(raw) -> str | list[str]:
    r"""The answer, or the list of accepted answers, as strings. Raises ValueError with the reason.

    27.0 -> "27"; "025" -> "25", as AIME pads; "9*2=18\n#### 1,234" -> "1,234"; "so \boxed{7}" ->
    "7"; ["8\n", "8"] -> "8"; "['8', '10']" -> ["8", "10"]; "[8, 10]" stays as it is, an interval.
    "['8' '10']", as numpy prints lists, is refused: Python reads it as ["810"]."""
    if isinstance(raw, str) and re.match(r"""\s*\[\s*['"]""", raw):
        raw = read_list(raw)
    if isinstance(raw, list):
        golds = [read_gold(item) for item in raw]
        if not golds or not all(isinstance(gold, str) for gold in golds):
            raise ValueError("answer is a list of lists" if golds else "no answer")
        distinct = list(dict.fromkeys(golds))
        return golds[0] if len(distinct) == 1 else distinct
    if isinstance(raw, bool) or not isinstance(raw, str | int | float):
        raise ValueError("no answer" if raw is None else f"answer of type {type(raw).__name__}")
    if isinstance(raw, float):
        if not math.isfinite(raw):
            raise ValueError("answer is not finite")
        raw = int(raw) if raw.is_integer() else raw
    text = str(raw)
    if "####" in text:
        text = text.rpartition("####")[2]
    elif "\\boxed" in text or "\\fbox" in text:
        text, _ = extract(text, rules=("boxed", "boxes"))
        if text is None:
            raise ValueError("a \\boxed{} that never closes")
    text = text.strip()
    if not text:
        raise ValueError("no answer")
    return text.lstrip("0") or "0" if re.fullmatch(r"0\d{1,2}", text) else text


def read_list(text: str) -> list:
    """A list written as a string. In Python's notation LaTeX has its backslashes doubled, in a
    careless one it has not."""
    literal = text.strip()
    if CARELESS.search(literal):
        literal = literal.replace("\\", "\\\\")
    if re.search(r"_\s*_", STRING.sub("_", literal)):
        raise ValueError("answer is a list without commas")
    try:
        return ast.literal_eval(literal)
    except (ValueError, SyntaxError):
        raise ValueError("answer is a damaged list") from None
