r"""Sets of real numbers: unions, intersections and differences of intervals and of points.

    (0, 5) \cup (3, 9)        is  (0, 9)
    \mathbb{R} \setminus {2}  is  (-\infty, 2) \cup (2, \infty)
"""

from typing import NamedTuple

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


class Piece(NamedTuple):
    """An interval, or a point: low = high. The ends as real numbers and as written."""

    low: object
    high: object
    closed_low: bool
    closed_high: bool
    low_node: Node
    high_node: Node


def interval(low: Node, high: Node, closed_low=False, closed_high=False) -> Node:
    opening = "[" if closed_low and low != MINUS_INFINITY else "("
    closing = "]" if closed_high and high != PLUS_INFINITY else ")"
    return Node("seq", (opening + closing, low, high))


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
        return written(merged(pieces(node)))
    except NotMath:
        if node.op != "union":
            return node
        parts = []
        for part in node.args:
            parts += part.args if part.op == "union" else [part]
        return Node("union", tuple(parts))


def pieces(node: Node) -> list[Piece]:
    node = as_set(node)
    if node is None:
        raise NotMath("no set")
    if node.op == "set":
        ends = [(end(item), item) for item in node.args]
        found = [Piece(value, value, True, True, item, item) for value, item in ends]
    elif node.op == "seq":
        brackets, low, high = node.args
        if interval(low, high, brackets[0] == "[", brackets[1] == "]") != node:
            raise NotMath("closed at infinity")
        found = [Piece(end(low), end(high), brackets[0] == "[", brackets[1] == "]", low, high)]
    else:
        first, *others = map(pieces, node.args)
        for other in others:
            if node.op == "union":
                first = first + other
            else:
                first = common(first, other if node.op == "cap" else complement(other))
        found = first
    if len(found) > MAX_ITEMS:
        raise Limit("pieces")
    return [piece for piece in found if not is_empty(piece)]


def end(node: Node):
    mp = context()
    if node in (PLUS_INFINITY, MINUS_INFINITY):
        return mp.inf if node == PLUS_INFINITY else -mp.inf
    if node.op == "add" and len(node.args) == 1:
        return end(node.args[0])
    if node.op not in VALUES or names(node):
        raise NotMath("no real number")
    value = evaluated(node, {})
    if value is None or mp.im(value[0]) != 0:
        raise NotMath("no real number")
    return mp.re(value[0])


def equal(x, y) -> bool:
    mp = context()
    if x == y or mp.isinf(x) or mp.isinf(y):
        return x == y
    return abs(x - y) <= (1 + abs(x)) * mp.mpf(10) ** -50


def is_empty(piece: Piece) -> bool:
    if equal(piece.low, piece.high):
        return not (piece.closed_low and piece.closed_high)
    return piece.low > piece.high


def common(a: list[Piece], b: list[Piece]) -> list[Piece]:
    parts = []
    for p in a:
        for q in b:
            low = p if p.low > q.low else q
            high = p if p.high < q.high else q
            closed_low, closed_high = low.closed_low, high.closed_high
            if equal(p.low, q.low):
                closed_low = p.closed_low and q.closed_low
            if equal(p.high, q.high):
                closed_high = p.closed_high and q.closed_high
            nodes = low.low_node, high.high_node
            parts.append(Piece(low.low, high.high, closed_low, closed_high, *nodes))
    if len(parts) > MAX_ITEMS**2:
        raise Limit("pieces")
    return [part for part in parts if not is_empty(part)]


def complement(parts: list[Piece]) -> list[Piece]:
    gaps = []
    low, low_node, closed = -context().inf, MINUS_INFINITY, False
    for part in merged(parts):
        gaps.append(Piece(low, part.low, closed, not part.closed_low, low_node, part.low_node))
        low, low_node, closed = part.high, part.high_node, not part.closed_high
    gaps.append(Piece(low, context().inf, closed, False, low_node, PLUS_INFINITY))
    return [gap for gap in gaps if not is_empty(gap)]


def merged(parts: list[Piece]) -> list[Piece]:
    """Sorted, with pieces that touch or overlap made one."""
    result = []
    for part in sorted(parts, key=lambda part: (part.low, not part.closed_low)):
        last = result[-1] if result else None
        touches = last and equal(last.high, part.low) and (last.closed_high or part.closed_low)
        if last and (touches or (last.high > part.low and not equal(last.high, part.low))):
            if equal(last.high, part.high):
                closed = last.closed_high or part.closed_high
                result[-1] = last._replace(closed_high=closed)
            elif part.high > last.high:
                high = dict(high=part.high, high_node=part.high_node)
                result[-1] = last._replace(closed_high=part.closed_high, **high)
        else:
            result.append(part)
    return result


def written(parts: list[Piece]) -> Node:
    points, intervals = [], []
    for part in parts:
        if equal(part.low, part.high):
            points.append(part.low_node)
        else:
            ends = part.closed_low, part.closed_high
            intervals.append(interval(part.low_node, part.high_node, *ends))
    if points or not intervals:
        intervals.append(Node("set", tuple(points)))
    return intervals[0] if len(intervals) == 1 else Node("union", tuple(intervals))
