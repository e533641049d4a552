r"""Sets of real numbers: unions, intersections and differences of intervals and of points.

    (0, 5) \cup (3, 9)        is  (0, 9)
    \mathbb{R} \setminus {2}  is  (-\infty, 2) \cup (2, \infty)

All ends that occur, in order, cut the line into atoms: the gap before the first, the first, the gap
between it and the second, the second, ..., the gap after the last. A set of atoms is a list of
truths, and runs of them are intervals again.
"""

from itertools import groupby

from verify.reals import context, evaluated
from verify.tree import (
    MAX_ITEMS,
    MINUS_INFINITY,
    PLUS_INFINITY,
    VALUES,
    Limit,
    Node,
    NotMath,
    names,
)


def interval(low: Node, high: Node, closed_low=False, closed_high=False) -> Node:
    opening = "[" if closed_low and low != MINUS_INFINITY else "("
    closing = "]" if closed_high and high != PLUS_INFINITY else ")"
    return Node("seq", (opening + closing, low, high))


JOINED = {
    "union": lambda x, y: x or y,
    "cap": lambda x, y: x and y,
    "minus": lambda x, y: x and not y,
}
REALS = interval(MINUS_INFINITY, PLUS_INFINITY)


def as_set(node: Node) -> Node | None:
    """The set that a node is or names; None if it is none."""
    if node.op == "named":
        return as_set(node.args[1])
    is_interval = node.op == "seq" and len(node.args) == 3
    return node if is_interval or node.op in ("set", "union", "cap", "minus") else None


def simplified(node: Node) -> Node:
    """The union of disjoint intervals and points that a node is, if its ends are real numbers;
    else the node, with unions in unions opened."""
    try:
        line = Line(node)
        return line.written(line.atoms(node))
    except NotMath:
        if node.op != "union":
            return node
        parts = []
        for part in node.args:
            parts += part.args if part.op == "union" else [part]
        return Node("union", tuple(parts))


class Line:
    """The real line, cut at the ends of the intervals and at the points in a tree of sets."""

    def __init__(self, node: Node):
        self.values, self.nodes = [], []
        by_value = [(real(end), end) for end in ends(node)]
        for value, end in sorted(by_value, key=lambda pair: pair[0]):
            if not self.values or not equal(self.values[-1], value):
                self.values.append(value)
                self.nodes.append(end)
        if len(self.values) > 2 * MAX_ITEMS:
            raise Limit("ends of sets")

    def atom(self, end: Node) -> int:
        """The number of the atom that is this end; the ends at infinity lie outside."""
        if end in (MINUS_INFINITY, PLUS_INFINITY):
            return -1 if end == MINUS_INFINITY else 2 * len(self.values) + 1
        value = real(end)
        return next(2 * i + 1 for i, other in enumerate(self.values) if equal(value, other))

    def atoms(self, node: Node) -> list[bool]:
        node = as_set(node)
        count = 2 * len(self.values) + 1
        if node.op == "set":
            points = {self.atom(item) for item in node.args}
            return [i in points for i in range(count)]
        if node.op == "seq":
            brackets, low, high = node.args
            first = self.atom(low) if brackets[0] == "[" else self.atom(low) + 1
            last = self.atom(high) if brackets[1] == "]" else self.atom(high) - 1
            return [first <= i <= last for i in range(count)]
        atoms, *others = map(self.atoms, node.args)
        for other in others:
            atoms = [JOINED[node.op](x, y) for x, y in zip(atoms, other)]
        return atoms

    def written(self, atoms: list[bool]) -> Node:
        ends = [MINUS_INFINITY, *self.nodes, PLUS_INFINITY]
        points, parts = [], []
        for covered, run in groupby(range(len(atoms)), key=atoms.__getitem__):
            run = list(run)
            closed_low, closed_high = run[0] % 2 == 1, run[-1] % 2 == 1
            low, high = ends[(run[0] + 1) // 2], ends[run[-1] // 2 + 1]
            if covered and len(run) == 1 and closed_low:
                points.append(low)
            elif covered:
                parts.append(interval(low, high, closed_low, closed_high))
        if points or not parts:
            parts.append(Node("set", tuple(points)))
        return parts[0] if len(parts) == 1 else Node("union", tuple(parts))


def ends(node: Node) -> list[Node]:
    """The finite ends of intervals, and the points, in a tree of sets."""
    node = as_set(node)
    if node is None:
        raise NotMath("no set")
    if node.op == "set":
        return list(node.args)
    if node.op == "seq":
        brackets, low, high = node.args
        if interval(low, high, brackets[0] == "[", brackets[1] == "]") != node:
            raise NotMath("closed at infinity")
        return [end for end in (low, high) if end not in (MINUS_INFINITY, PLUS_INFINITY)]
    return [end for part in node.args for end in ends(part)]


def real(node: Node):
    value = evaluated(node, {}) if node.op in VALUES and not names(node) else None
    if value is None or context().im(value[0]) != 0:
        raise NotMath("no real number")
    return context().re(value[0])


def equal(x, y) -> bool:
    return abs(x - y) <= (1 + abs(x)) * context().mpf(10) ** -50
