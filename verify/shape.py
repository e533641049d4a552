"""One form for the many ways to write a set, an interval, a label or an assignment."""

from verify.reals import agree, rounds_to
from verify.sets import REALS, as_set, interval, simplified
from verify.tree import (
    GREEK,
    MAX_ITEMS,
    MAX_SIGNS,
    MINUS_INFINITY,
    MINUS_ONE,
    PLUS_INFINITY,
    VALUES,
    Limit,
    Node,
    count,
    is_name,
    names,
    negative,
    never,
    rebuild,
    sym,
)
from verify.values import exact

TURNED = {">": "<", ">=": "<="}


def shape(node: Node) -> Node:
    """Expands +-, and rewrites relations, set builders and unions to the forms that are
    compared."""
    op, args = node
    if op in ("list", "either"):
        return listed(op, args)
    signs = count(node, "pm")
    if signs:
        if signs > MAX_SIGNS:
            raise Limit("signs")
        items = []
        for item in args if op == "set" else [node]:
            items += both_signs(item)
        return shape(Node("set" if op == "set" else "list", tuple(items)))
    if op == "rel":
        return relation(node)
    if op == "builder":
        return built(*args)
    if op == "sym":
        return {"mathbbR": REALS, "emptyset": Node("set", ())}.get(args[0], node)
    if op in ("union", "cap", "minus"):
        return simplified(rebuild(node, shape))
    if op == "add" and is_difference_of_sets(node):
        return shape(Node("minus", (args[0], args[1].args[1])))
    if op in ("seq", "set", "matrix", "row", "measured", "ratio"):
        return rebuild(node, shape)
    return node


def is_difference_of_sets(node: Node) -> bool:
    r"""\mathbb{R} - \{2\}"""
    second = node.args[1]
    if len(node.args) > 2 or second.op != "mul" or second.args[0] != MINUS_ONE:
        return False
    return second.args[1].op == "set"


def listed(op: str, args) -> Node:
    items = []
    for item in map(shape, args):
        items += item.args if item.op == "list" else [item]
    if len(items) > MAX_ITEMS:
        raise Limit("items")
    sets = [as_set(item) for item in items]
    variables = {item.args[0] for item in items if item.op == "named"}
    if op == "either" and all(sets) and len(variables) <= 1:
        return simplified(Node("union", tuple(sets)))  # x < 1 or x > 3
    of_sets = all(as_set(item) or item.op in VALUES for item in items)
    if len(variables) == 1 and of_sets and any(map(is_exclusion, items)):
        parts = [as_set(item) or excluded([item]) for item in items]  # x != 1, x != 2 or x != 1, 2
        value = simplified(Node("cap", tuple(parts)))
        return Node("named", (*variables, value, Node("rel", (("and",), *items))))
    return Node("list", tuple(items))


def is_exclusion(item: Node) -> bool:
    return item.op == "named" and item.args[2].args[0] == ("!=",)


def excluded(values) -> Node:
    return simplified(Node("minus", (REALS, Node("set", tuple(values)))))


def both_signs(node: Node) -> list[Node]:
    """The two readings of an item with +-, all upper signs and all lower signs; an item without
    stays itself."""

    def pick(node, upper):
        if node.op != "pm":
            return rebuild(node, lambda child: pick(child, upper))
        inner = pick(node.args[1], upper)
        return inner if (node.args[0] == "pm") == upper else negative(inner)

    return [pick(node, True), pick(node, False)] if count(node, "pm") else [node]


def built(variable: Node, conditions: Node) -> Node:
    r"""\{x | x < 1\} is the interval; \{x \in S | ...\} with another S than the reals keeps it."""
    whole = shape(conditions)
    parts = list(whole.args) if whole.op == "list" else [whole]
    if variable.op == "rel" and variable.args[0] == ("in",):
        _, name, domain = variable.args
        variable = name
        if shape(domain) != REALS:
            parts.append(shape(Node("rel", (("in",), name, domain))))
    if len(parts) == 1 and conditions.op == "either" and as_set(parts[0]):
        return parts[0]
    if len(parts) == 1 and parts[0].op == "named" and sym(parts[0].args[0]) == variable:
        value = parts[0].args[1]
        return value if as_set(value) else Node("set", (value,))
    return Node("builder", (variable, *sorted(parts, key=repr)))


# --------------------------------------------------------------------------------------------------
# Relations


def relation(node: Node) -> Node:
    """x = 5, x in S and x < 5 become (named x 5), (named x S) and (named x interval), arithmetic
    that is true becomes its result; other relations keep their sides."""
    ops = node.args[0]
    sides = [shape(side) for side in node.args[1:]]
    if set(ops) != {"="}:
        sides = [side.args[0] if side.op == "measured" else side for side in sides]
    if set(ops) <= set(TURNED):
        ops = tuple(TURNED[op] for op in reversed(ops))
        sides.reverse()
    if set(ops) == {"="}:
        return equation(sides)
    node = Node("rel", (ops, *sides))
    left, right = sides[:2]
    if ops == ("in",) and is_name(left):
        return Node("named", (left.args[0], right, node))
    if ops == ("!=",) and is_name(left) and not names(right) and right.op in VALUES:
        return Node("named", (left.args[0], excluded([right]), node))
    if ops == ("approx",) and right.op == "dec" and rounds_to(left, right, 1):
        return left
    if set(ops) <= {"<", "<="}:
        return inequality(node)
    return node if len(set(ops)) == 1 else never("relation")


def inequality(node: Node) -> Node:
    ops, *sides = node.args
    readings = [sides] if len(ops) == 2 else []
    if len(ops) == 1:
        readings = [(MINUS_INFINITY, *sides), (*sides, PLUS_INFINITY)]
    for low, middle, high in readings:
        if is_name(middle) and not names(low) | names(high):
            value = interval(low, high, ops[0] == "<=", ops[-1] == "<=")
            return Node("named", (middle.args[0], value, node))
    return node


def equation(sides: list[Node]) -> Node:
    node = Node("rel", (("=",) * (len(sides) - 1), *sides))
    if is_true(sides):  # 7 + 9 = 16
        return sides[-1]
    name = label(sides[0])
    if len(sides) > 2:  # x = 3/2 = 1.5, d = |AB| = 5
        values = [side for side in sides[1:] if is_name(side) or label(side) is None]
        return equation([sides[0], sides[-1]]) if name and is_true(values) else node
    left, right = sides
    if name is None and label(right):
        left, right, name = right, left, label(right)
        node = Node("rel", (("=",), left, right))
    if left.op == right.op == "seq" and len(left.args) == len(right.args):
        if all(map(is_name, left.args[1:])):  # (x, y) = (5, 3)
            pairs = zip(left.args[1:], right.args[1:])
            return Node("list", tuple(equation(list(pair)) for pair in pairs))
    if name and not is_unknown(left, right):
        return Node("named", (name, right, node))
    return node


def bare(node: Node) -> Node:
    return node.args[0] if node.op == "measured" else node


def is_true(sides: list[Node]) -> bool:
    """Whether sides without variables are all the same number."""
    values = [bare(side) for side in sides]
    if any(value.op not in VALUES or names(value) for value in values):
        return False
    return all(is_same_number(value, values[-1]) for value in values[:-1])


def is_same_number(a: Node, b: Node) -> bool:
    x, y = exact(a), exact(b)
    return x == y if x is not None and y is not None else bool(agree(a, b, once=True))


def label(node: Node) -> str | None:
    """The name that the left of an equation gives to the right, which may be left out: a name, a
    function of symbols, a measured thing, a ratio of names."""
    if node.op == "text":
        return "text " + node.args[0].casefold()
    if is_name(node):
        return node.args[0]
    is_function = node.op == "call" and node.args[0].startswith("apply ")
    is_ratio = node.op == "ratio" and all(is_name(part) or is_part(part) for part in node.args)
    return repr(node) if is_function or is_ratio or is_figure(node) else None


def is_figure(node: Node) -> bool:
    r"""|AB|, the segment AB, m\angle A, \sin A, AB/CD: names of points are capitals."""
    if node.op == "call":
        inner = node.args[1]
        is_angle = node.args[0] != "abs" and inner.op == "sym" and inner.args[0] in GREEK
        return node.args[0] in ("abs", "sin", "cos") and (is_part(inner) or is_angle)
    if node.op == "mul":
        factors = node.args[1:] if node.args[0] == sym("m") else node.args
        return all(map(is_part, factors))
    if node.op == "pow":
        return node.args[1] == MINUS_ONE and is_part(node.args[0])
    return node.op == "sym" and node.args[0].startswith(("angle(", "overline(", "triangle("))


def is_part(node: Node) -> bool:
    is_symbol = node.op == "sym" and len(node.args[0].rstrip("'").split("_")[0]) == 1
    return is_figure(node) or (is_symbol and node.args[0].isupper())


def is_unknown(left: Node, right: Node) -> bool:
    """Whether the left of an equation is no label but part of an equation in unknowns."""
    if right.op == "text":
        return left.op == "mul" or (left.op == "text" and left.args[0].isupper())  # SRAC = LRAC
    if left.op in ("mul", "pow"):
        return bool(names(right))  # PV = nRT
    if left.op == "sym":
        name = left.args[0]
        return bool({name, name.rstrip("'")} & names(right))
    return False
