"""The tree of an answer, its bounds, and small questions about trees."""

import functools
from fractions import Fraction
from typing import NamedTuple

MAX_CHARS = 2000  # of an answer that is parsed; a longer one can still be equal as text
MAX_DEPTH = 40  # of brackets and commands
MAX_BITS = 8192  # of an integer that is computed; a larger power or factorial stays symbolic
MAX_ITEMS = 64  # of a list, set or matrix
MAX_SIGNS = 4  # of +- in one item
MIN_DIGITS = 10  # significant digits from which a decimal can stand for a value without an end

def words(text: str) -> list[str]:
    return text.split()


GREEK = words("""alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi
    rho sigmaf sigma tau upsilon phi chi psi omega""")


class NotMath(Exception):
    """The text is not entirely an expression of the grammar, or the expression has no value."""


class Limit(Exception):
    """A static bound was passed before the work was done."""


class Undecided(Exception):
    """Only sympy could tell, and it may not run in this process."""


def never(what: str):
    raise NotMath(what)


class Node(NamedTuple):
    """num (Fraction) - dec (Fraction, significant digits, place of the last) - sym (name) -
    text (words) - raw (tokens) - add mul pow root pct (nodes) - pm (sign, node) -
    call (function, nodes) - list either set union cap minus ratio matrix row builder (nodes) -
    seq (brackets, nodes) - rel (operators, nodes) - named (name, value, relation) -
    measured (node, unit) - choice (letter, node)"""

    op: str
    args: tuple


VALUES = {"num", "dec", "sym", "add", "mul", "pow", "root", "call", "pct"}


def num(value) -> Node:
    return Node("num", (Fraction(value),))


def sym(name: str) -> Node:
    return Node("sym", (name,))


MINUS_ONE = num(-1)


def negative(node: Node) -> Node:
    if node.op in ("num", "dec"):
        return Node(node.op, (-node.args[0], *node.args[1:]))
    return measured(Node("mul", (MINUS_ONE, node)))


def measured(node: Node, unit=()) -> Node:
    """The tree with its unit, and those of its parts, on the outside; without any, the tree."""
    if node.op == "measured":
        return measured(node.args[0], tuple(sorted((*node.args[1], *unit))))
    parts = []
    for arg in node.args:
        if isinstance(arg, Node) and arg.op == "measured":
            arg, unit = arg.args[0], unit or arg.args[1]
        parts.append(arg)
    bare = Node(node.op, tuple(parts))
    return Node("measured", (bare, unit)) if unit else bare


def product(factors) -> Node:
    return factors[0] if len(factors) == 1 else Node("mul", tuple(factors))


def over(top: Node, bottom: Node) -> Node:
    return Node("mul", (top, Node("pow", (bottom, MINUS_ONE))))


def call(name: str, *args: Node) -> Node:
    return Node("call", (name, *args))


PLUS_INFINITY = sym("infty")
MINUS_INFINITY = negative(PLUS_INFINITY)


def children(node: Node) -> list[Node]:
    return [arg for arg in node.args if isinstance(arg, Node)]


def rebuild(node: Node, change) -> Node:
    """`node` with its children changed."""
    args = (change(arg) if isinstance(arg, Node) else arg for arg in node.args)
    return Node(node.op, tuple(args))


def count(node: Node, op: str | None = None) -> int:
    """How many nodes, or how many of one kind."""
    here = op is None or node.op == op
    return int(here) + sum(count(child, op) for child in children(node))


@functools.lru_cache(maxsize=8192)
def names(node: Node) -> frozenset:
    """The variables in a tree."""
    if node.op == "sym":
        return frozenset(node.args) - {"pi", "e", "i", "infty"}
    return frozenset().union(*map(names, children(node)))


def is_name(node: Node) -> bool:
    return node.op == "sym" and bool(names(node)) and node.args[0] != "..."
