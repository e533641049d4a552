r"""From a model's response and a gold answer to 0 or 1: is the final answer right?

    text, rule = extract(r"... so the area is \boxed{\frac{1}{2}}")
    judge(text, "0.5", sympy=True)  ->  (1.0, "equal:number")

The rules that verdicts follow:

 1. Only the text after the last `</think>` counts; a thought that never ends, opened in the
    response or by the end of the prompt, means no answer.
 2. The last `<answer>...</answer>` is the text that counts, if there is one. The last complete
    `\boxed{}` or `\fbox{}` is the answer (boxes joined only by commas or "and" are read as one
    list). Without a box: what follows the last "the answer is", `####` or `Answer:`, else the last
    number, kept whole with its sign, thousands commas, decimals, a/b, mixed number or \frac, or
    with the formula around it. A box that never closes is no answer. The dash of a list is no sign.
 3. Integers and rationals compare exactly at any size. A decimal is exact if the other side has a
    finite decimal expansion; against any other value it counts if it is that value rounded, to ten
    or more significant digits.
 4. p% equals p and p/100; p alone does not equal p/100. A unit may be left out, but two units that
    differ are different: 5 kg is 5 and not 5 g. Only a word that cannot change the value is a
    unit: 5 apples is 5; 5 millions, 3 squared and 1 sixth are not.
 5. Tuples and vectors are ordered; sets, `a, b and c` and lists of tuples are not, but must be
    complete; +- expands. Assignments go by name: (b = 2, a = 1) is a = 1, b = 2 and (1, 2).
 6. Interval ends matter; `x in S`, a chain of inequalities and the interval are one thing, and
    unions, intersections and differences are worked out. A label on the left of one `=` names the
    value and may be left out: a name, a function of symbols, a measured thing (|AB|, \angle A), a
    ratio of names. An equation in an unknown is not its right side; equations are equal up to a
    non-zero constant factor. Arithmetic that is true, 7 + 9 = 16, states its last number.
 7. Text compares case-blind where case means nothing, without \text{}. What is no expression and
    no text is equal only sign by sign. (B) 12 is B and 12. Dates and codes are no arithmetic.
    Empty, nan, undefined, unknown, proof and their kind never match anything.
 8. A verdict arrives within 5 s whatever the input, and no text is ever run as code.
 9. Against a gold answer that is a single number the answer must be a number written out: digits,
    a/b, a mixed number, a percentage, or with a power of ten. 37 + 48 is not 85 but the question
    once more; nor are sqrt(144), 2^10 and 5! answers, for "evaluate sqrt(144)" is a question as
    well. Against any other gold answer nothing needs to be worked out. `strict=False` leaves this
    rule out, as most published scores do.

Nearly always a verdict is decided at once, bounded by construction. What only sympy can tell raises
Undecided unless `sympy`: that is for a process whose clock and memory its parent watches. A learner
searches for holes here: in doubt the verdict is "wrong".

The files, each on the ones before it: tree, lexicon, tokens, values, reals, sets, shape, operands,
parse, read (a text to the tree that is compared), compare, extraction, golds.
"""

import functools
import hashlib
from pathlib import Path

from verify.compare import compare, integer
from verify.extraction import extract, opens_thought
from verify.golds import check, read_gold
from verify.tree import MAX_CHARS, Undecided

__all__ = [
    "Undecided",
    "call",
    "check",
    "digest",
    "extract",
    "instant",
    "judge",
    "opens_thought",
    "read_gold",
]


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


def call(text: str | None, gold, problem: str = "", strict: bool = True) -> tuple[float, str]:
    """The verdict in a process whose clock and memory a parent watches: sympy may run."""
    return judge(text, gold, sympy=True, strict=strict)


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
