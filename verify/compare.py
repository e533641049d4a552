"""Two texts: are they equal?

    compare(r"\\frac{1}{2}", "0.5", sympy=True)  ->  "equal:number"

The cheapest test that decides:

    text       the same words
    number     the same fraction, at any size
    structure  lists, intervals, matrices and the like, part by part
    algebra    the same value at a random point of a prime field, which for rational functions is a
               proof (Schwartz 1980, Zippel 1979), and no difference at real points with 80 digits
    sympy      on objects that we build by calling its constructors; for a process whose clock and
               memory a parent watches

All but the last are bounded by construction: static limits hold before anything is computed. No
text is ever run as code. In doubt two answers are not equal.
"""

import re
from fractions import Fraction

from verify.lexicon import compatible, is_no_answer
from verify.read import prose, read
from verify.reals import agree, context, evaluated, points, proven, rounds_to
from verify.tokens import TEXT
from verify.tree import (
    MAX_CHARS,
    MIN_DIGITS,
    MINUS_ONE,
    VALUES,
    Limit,
    Node,
    NotMath,
    Undecided,
    children,
    count,
    names,
    negative,
    num,
    over,
    product,
    rebuild,
    sym,
)
from verify.values import Modular, evaluate, exact

TIERS = ("text", "number", "structure", "algebra", "sympy")
TEXTS = {"text", "raw"}
LETTERS = set("ABCDEFGHIJ")  # of options


def rational(node: Node) -> bool:
    """Whether a tree is a rational function, about which the prime field has the last word."""
    if node.op == "pow" and (exact(node.args[1]) is None or exact(node.args[1]).denominator > 1):
        return False
    return node.op in VALUES - {"call", "root"} and all(map(rational, children(node)))


def renamed(node: Node) -> Node:
    """The same formula in other variables."""
    if node.op == "sym" and names(node):
        return sym(node.args[0] + "~")
    return rebuild(node, renamed)


def ratio_of_values(f: Node, g: Node):
    """f/g at the first point where both have a value that is not 0."""
    symbols = sorted(names(f) | names(g))
    for point in points(symbols) if symbols else ():
        x = evaluated(f, point)
        y = evaluated(g, point)
        if x and y and abs(x[0]) > x[1] and abs(y[0]) > y[1]:
            return x[0] / y[0]
    return None


def has_finite_expansion(node: Node) -> bool:
    value = exact(node)
    return value is not None and 10**MAX_CHARS % value.denominator == 0


def leading(op: str, a: Node, b: Node) -> tuple[Node, Node]:
    """The two, the one of this kind first."""
    return (a, b) if a.op == op else (b, a)


def assignments(node: Node) -> dict[str, Node] | None:
    """name -> value of a list such as (x = 5, y = 3); None for any other."""
    if node.op not in ("list", "set") and (node.op != "seq" or node.args[0] != "()"):
        return None
    items = node.args[1:] if node.op == "seq" else node.args
    if any(item.op != "named" for item in items):
        return None
    by_name = {item.args[0]: item for item in items}
    return by_name if len(by_name) == len(items) > 1 else None


class Comparison:
    def __init__(self, sympy: bool):
        self.sympy = sympy
        self.tier = 0

    def used(self, tier: str) -> bool:
        self.tier = max(self.tier, TIERS.index(tier))
        return True

    def same(self, a: Node, b: Node) -> bool:
        kinds = {a.op, b.op}
        if a == b:
            tiers = {"num": "number", "dec": "number", "text": "text", "raw": "text"}
            return self.used(tiers.get(a.op, "structure"))
        if "choice" in kinds:
            return self.choice(*leading("choice", a, b))
        if "named" in kinds:
            return self.named(a, b)
        if "measured" in kinds:
            return self.measured(a, b)
        if kinds <= VALUES:
            return self.value(a, b)
        if kinds & TEXTS:
            return False
        self.used("structure")
        if assignments(a) or assignments(b):
            return self.assigned(a, b)
        if "ratio" in kinds:
            return self.ratio(*leading("ratio", a, b))
        if kinds <= {"list", "set"} or kinds <= VALUES | {"set"}:  # {5} is 5
            return self.unordered(self.elements(a), self.elements(b))
        if kinds == {"matrix", "seq"}:
            return self.vector(*leading("matrix", a, b))
        if a.op != b.op:
            return False
        if a.op == "seq":  # with two ends, perhaps an interval: then the brackets matter
            alike = a.args[0] == b.args[0] or len(a.args) > 3
            return alike and self.ordered(a.args[1:], b.args[1:])
        if a.op == "rel":
            return self.relations(a, b)
        if a.op == "union":
            return self.unordered(a.args, b.args)
        return self.ordered(a.args, b.args)

    def elements(self, node: Node) -> list[Node]:
        if node.op == "set":
            return list(dict.fromkeys(node.args))
        return list(node.args) if node.op == "list" else [node]

    def ordered(self, a, b) -> bool:
        return len(a) == len(b) and all(self.same(x, y) for x, y in zip(a, b))

    def unordered(self, a, b) -> bool:
        if len(a) != len(b):
            return False
        unmatched = list(b)
        for x in a:
            match = next((i for i, y in enumerate(unmatched) if self.same(x, y)), None)
            if match is None:
                return False
            del unmatched[match]
        return True

    def measured(self, a: Node, b: Node) -> bool:
        """5 kg is 5, but not 5 g; written 5m, the unit may be read as a symbol."""
        if a.op == b.op:
            return compatible(a.args[1], b.args[1]) and self.same(a.args[0], b.args[0])
        (_, (value, unit)), other = leading("measured", a, b)
        if other.op == "pct":
            return False
        if other.op in VALUES and names(other) & {symbol for symbol, _ in unit}:
            factors = [Node("pow", (sym(symbol), num(power))) for symbol, power in unit]
            value = Node("mul", (value, *factors))
        return self.same(value, other)

    def choice(self, choice: Node, other: Node) -> bool:
        """(B) 12 is B, and 12, and (B) 12."""
        letter, content = choice.args
        if other.op == "choice":
            return letter == other.args[0] and bool(content) and self.same(content, other.args[1])
        if other.op == "sym" and other.args[0] in LETTERS:
            return letter == other.args[0]
        return self.same(content, other)

    def assigned(self, a: Node, b: Node) -> bool:
        """x = 5, y = 3 in any order, name by name."""
        first, second = assignments(a), assignments(b)
        if first is None or second is None:
            return self.point(first, b) if first else self.point(second, a)
        if first.keys() != second.keys():
            return False
        return all(self.same(first[name], second[name]) for name in first)

    def point(self, named: dict[str, Node], other: Node) -> bool:
        """x = 5, y = 3 is the point (5, 3): values in the order of their names; but the values of
        x_1, x_2 are a list in any order."""
        values = [named[name] for name in sorted(named)]
        if other.op == "seq":
            return other.args[0] == "()" and self.ordered(values, other.args[1:])
        if other.op not in ("list", "set"):
            return False
        stems = {name.partition("_")[0] for name in named}
        if len(stems) == 1:
            return self.unordered(values, self.elements(other))
        return self.ordered(values, other.args)

    def ratio(self, ratio: Node, other: Node) -> bool:
        parts = ratio.args
        if other.op in VALUES:
            return len(parts) == 2 and self.same(over(*parts), other)
        if other.op != "ratio" or len(parts) != len(other.args):
            return False
        for x, y in zip(parts[1:], other.args[1:]):
            if not self.same(Node("mul", (x, other.args[0])), Node("mul", (y, parts[0]))):
                return False
        return True

    def vector(self, matrix: Node, seq: Node) -> bool:
        rows = [row.args for row in matrix.args]
        items = rows[0] if len(rows) == 1 else [row[0] for row in rows if len(row) == 1]
        return seq.args[0] == "()" and self.ordered(items, seq.args[1:])

    def named(self, a: Node, b: Node) -> bool:
        if a.op == b.op:
            words = sum(node.args[0].startswith("text ") for node in (a, b))
            same_name = a.args[0] == b.args[0] or words == 1
            if same_name and self.same(a.args[1], b.args[1]):
                return True
            return self.relations(a.args[2], b.args[2])
        name, other = leading("named", a, b)
        if other.op == "rel":
            return self.relations(name.args[2], other)
        return self.same(name.args[1], other)

    def relations(self, a: Node, b: Node) -> bool:
        """Equations up to a factor, inequalities up to a positive one, chains and all else side by
        side."""
        (ops, *p), (other, *q) = a.args, b.args
        if ops != other or ops in (("in",), ("!=",)):
            return a == b
        if len(ops) > 1 or not {side.op for side in p + q} <= VALUES:
            return self.ordered(p, q)
        f = Node("add", (p[0], negative(p[1])))
        g = Node("add", (q[0], negative(q[1])))
        factor = ratio_of_values(f, g)
        if factor is None:
            return False
        positive = context().im(factor) == 0 and context().re(factor) > 0
        if ops != ("=",) and not positive:
            return False
        crossed = Node("mul", (f, renamed(g))), Node("mul", (g, renamed(f)))
        return self.identical(*crossed)  # f(x) g(y) = g(x) f(y)

    def value(self, a: Node, b: Node) -> bool:
        if "pct" in (a.op, b.op):
            return self.percent(a, b)
        x, y = exact(a), exact(b)
        if x is not None and x == y:
            return self.used("number")
        for decimal, other in ((a, b), (b, a)):
            if decimal.op == "dec" and not names(other) and not has_finite_expansion(other):
                return rounds_to(other, decimal) and self.used("number")
        return (x is None or y is None) and self.identical(a, b)

    def percent(self, a: Node, b: Node) -> bool:
        """p% is p and p/100."""
        if a.op == b.op:
            return self.value(a.args[0], b.args[0])
        percent, other = leading("pct", a, b)
        hundredth = Node("mul", (percent.args[0], num(Fraction(1, 100))))
        return self.value(percent.args[0], other) or self.value(hundredth, other)

    def identical(self, a: Node, b: Node) -> bool:
        """Two witnesses: the value in a prime field, where chance is no danger, and real values,
        where signs are right."""
        alike = evaluate(a, Modular())[:2] == evaluate(b, Modular())[:2]
        surely = rational(a) and rational(b)
        if surely and not alike:
            return False
        agreed = agree(a, b, once=surely)
        if agreed is None or (agreed and not alike and count(a) + count(b) > 150):
            raise Limit("size")
        if not agreed or alike:
            return agreed and self.used("algebra")
        if not self.sympy:
            raise Undecided
        return proven(a, b) and self.used("sympy")


# --------------------------------------------------------------------------------------------------
# Two texts

INTEGER = re.compile(r"[-+]?(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)")


def integer(text: str) -> str | None:
    """The normal form of an integer of any size, as text; None if it is not one."""
    text = text.strip(" $")
    if not INTEGER.fullmatch(text):
        return None
    digits = text.lstrip("+-").replace(",", "").lstrip("0") or "0"
    return "-" + digits if text[0] == "-" and digits != "0" else digits


def power_of_ten(node: Node) -> bool:
    return node.op == "pow" and node.args[0] == num(10) and node.args[1].op == "num"


def written(node: Node) -> bool:
    """Whether a tree is a number with nothing left to carry out: digits, a/b, mixed, percent, or
    with a power of ten."""
    literal = ("num", "dec")
    if node.op == "mul" and len(node.args) == 2:
        left, right = node.args
        if left == MINUS_ONE and written(right):
            return True
        bottom = right.args[0] if right.op == "pow" and right.args[1] == MINUS_ONE else None
        quotient = bottom and (bottom.op in literal or power_of_ten(bottom))
        return left.op in literal and bool(quotient or power_of_ten(right))
    if node.op == "pct":
        return written(node.args[0])
    return node.op in literal or power_of_ten(node)


def alone(node: Node) -> Node:
    """The value in a label, a unit, an option or a set of one."""
    while True:
        if node.op in ("named", "choice") and node.args[1]:
            node = node.args[1]
        elif node.op == "measured" or (node.op in ("set", "list") and len(node.args) == 1):
            node = node.args[0]
        else:
            return node


def number_before_symbols(node: Node) -> Node:
    """5 in 5 m/s"""
    factors = list(node.args) if node.op == "mul" else [node]
    while len(factors) > 1 and names(factors[-1]):
        factors.pop()
    return product(factors)


def restated(answer: Node, gold: Node) -> bool:
    """Whether the gold answer is a number and the answer still an exercise: 37 + 48 for 85,
    sqrt(144) for 12."""
    answer, gold = number_before_symbols(alone(answer)), alone(gold)
    if answer.op == "ratio":
        return written(gold) and not all(map(written, answer.args))
    if not written(gold) or answer.op not in VALUES - {"sym"} or written(answer):
        return False
    is_long = gold.op == "dec" and gold.args[1] >= MIN_DIGITS
    return not (is_long and exact(answer) is None)  # pi for 3.141592654 is no exercise


def usable(text: str) -> bool:
    """Whether a text is an answer at all: neither empty nor the place of one."""
    words = prose(text.replace("_", " "))
    if words and not any(word[0].isdigit() for word in words) and is_no_answer(words):
        return False
    return bool(re.search(r"[^\W_]|[∞∅]|\\\{\s*\\\}", TEXT.sub(r" \1 ", text)))


def compare(answer: str, gold: str, sympy: bool, strict: bool = True) -> str:
    """The reason of the verdict on one pair of answers: equal:<tier>, wrong, unparsed (no answer)
    or limit. Raises Undecided without `sympy` where only that could tell.

    strict: against a gold number an exercise with that result is no answer."""
    x, y = integer(answer), integer(gold)
    if x is not None and y is not None:
        return "equal:number" if x == y else "wrong"
    if max(len(answer), len(gold)) > 10 * MAX_CHARS:
        return "limit"
    if not usable(answer) or not usable(gold):
        return "wrong" if usable(answer) else "unparsed"
    a, b = read(answer), read(gold)
    if a is None or b is None:
        words = prose(gold)
        same = answer == gold or (words is not None and words == prose(answer))
        return "equal:text" if same else "limit"
    comparison = Comparison(sympy)
    try:
        if strict and restated(a, b):
            return "wrong"
        if comparison.same(a, b):
            return "equal:" + TIERS[comparison.tier]
    except NotMath:
        pass  # one of them has no value: 1/0
    except (Limit, RecursionError, MemoryError, OverflowError):
        return "limit"
    words = prose(gold) if "text" in (a.op, b.op) else None
    return "equal:text" if words and words == prose(answer) else "wrong"
