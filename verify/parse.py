"""Tokens to a tree: listing > statement (relations) > union > ratio > sum > product (also by
juxtaposition) > power > operand. Here the upper half, in operands.py the lower."""

import re

from verify.lexicon import LETTER_UNITS, MEASURES, dimensions, is_unit_word
from verify.operands import JUXTAPOSED, RELATIONS, SEPARATORS, UNIT_ENDS, Operands
from verify.tree import (
    MAX_ITEMS,
    MINUS_ONE,
    Limit,
    Node,
    NotMath,
    call,
    measured,
    names,
    negative,
    never,
    over,
    product,
    sym,
)
from verify.values import exact

SETS = {"cup": "union", "cap": "cap", "setminus": "minus"}
UNIT_KINDS = {"unit", "text", "word", "money"}


class Parser(Operands):
    ratios = True  # a colon is a ratio, but not in \{x : x > 2\}

    def answer(self) -> Node:
        node = self.infix(self.listing())
        return node if self.kind == "end" else never(f"{self.kind} after the end of an expression")

    def listing(self) -> Node:
        """Statements separated by commas, "and" or "or"."""
        items, separators = [self.statement()], set()
        while separator := self.eat(*SEPARATORS):
            while separator:  # one, two, and three
                separators.add(separator)
                separator = self.eat(*SEPARATORS)
            items.append(self.statement())
            if len(items) > MAX_ITEMS:
                raise Limit("items")
        if len(items) == 1:
            return items[0]
        return Node("either" if "or" in separators else "list", tuple(items))

    def statement(self) -> Node:
        sides, ops = [], []
        self.start = self.position
        if self.kind in ("word", "text") and self.ahead() == "=":  # Area = 12
            sides.append(Node("text", (self.next()[1],)))
            ops.append(self.next()[0])
        sides.append(self.union())
        while self.kind in RELATIONS:
            ops.append(self.next()[0])
            sides.append(self.union())
            if len(sides) > MAX_ITEMS:
                raise Limit("relations")
        return Node("rel", (tuple(ops), *sides)) if ops else sides[0]

    def union(self) -> Node:
        node = self.ratio()
        while op := self.eat(*SETS):
            node = Node(SETS[op], (node, self.ratio()))
        return node

    def ratio(self) -> Node:
        parts = [self.sum()]
        while self.ratios and self.eat(":"):
            parts.append(self.sum())
        return parts[0] if len(parts) == 1 else Node("ratio", tuple(parts))

    def sum(self) -> Node:
        sign, terms = self.eat("pm", "mp"), []
        while sign or not terms:
            term = self.product()
            if sign in ("pm", "mp"):
                term = measured(Node("pm", (sign, term)))
            elif sign == "-":
                term = negative(term)
            terms.append(term)
            sign = self.eat("+", "-", "pm", "mp")
        return terms[0] if len(terms) == 1 else measured(Node("add", tuple(terms)))

    def product(self) -> Node:
        factors = [self.signed()]
        while True:
            self.skip_empty()
            if self.eat("*"):
                factors.append(self.signed())
            elif self.eat("/"):
                factors.append(measured(Node("pow", (self.signed(), MINUS_ONE))))
            elif self.unit_ahead(factors):
                return self.units(product(factors))
            elif self.factor_ahead():
                factors.append(self.power())
            else:
                return measured(product(factors))

    def factor_ahead(self) -> bool:
        """Whether a factor follows without a sign. A number, also in braces, is none: 2{3} prints
        23; but n 2^n and (n-2) 2^n are products."""
        distance = 0
        while self.ahead(distance) == "{":
            distance += 1
        if self.ahead(distance) != "num":
            return self.kind in JUXTAPOSED
        is_power = distance == 0 and self.ahead() == "^"
        return is_power and self.ahead(-1) in (")", "sym")

    def unit_ahead(self, factors) -> bool:
        """A unit or a word can follow a value that stands by itself or in a list; "in" and a
        currency only a number."""
        if self.depth > 1:
            return False
        if self.tokens[self.position] == ("fn", "sec") and self.ahead() in UNIT_ENDS:
            self.tokens[self.position] = ("unit", "sec")
        if self.kind == "in" and self.ahead() not in UNIT_ENDS | {"^", "."}:
            return False
        if self.kind in ("in", "money"):
            return exact(product(factors)) is not None
        return self.kind in UNIT_KINDS

    def units(self, value: Node) -> Node:
        """The value with what may follow it at its end, `kcal m^{-2} yr^{-1}`."""
        words = []
        while self.kind in UNIT_KINDS | {"in"}:
            text = self.next()[1]
            text = re.sub(r"\^\{?(-?\d)\}?", r" ^\1 ", text).replace("/", " / ")
            words += [word.strip("().,~") for word in re.split(r"[\s~*]+", text)]
            if self.eat("^"):
                sign = "-" if self.eat("-") else ""
                power = sign + self.raw_script().strip("+")
                words.append("^" + power if re.fullmatch(r"-?\d\d?", power) else never("power"))
            if self.tokens[self.position + 1][1] in LETTER_UNITS and self.ahead() == "sym":
                self.tokens[self.position + 1] = ("unit", self.tokens[self.position + 1][1])  # km/h
            if self.ahead() in UNIT_KINDS and (op := self.eat("/", "*")):
                words += ["/"] if op == "/" else []
        words = [word for word in words if word]
        plain = [word for word in words if not re.fullmatch(r"/|\^-?\d", word)]
        prose = [word for word in plain if not is_unit_word(word)]
        measures = all(unit in MEASURES for unit, _ in dimensions(plain))
        if prose or len(plain) > 4 or plain[-1:] == ["per"]:
            raise NotMath("prose")
        if names(value) and not measures:
            raise NotMath("prose: n even is more than n")
        self.skip_empty()
        if self.kind not in UNIT_ENDS:
            raise NotMath("a unit inside an expression")
        return measured(value, dimensions(words))

    def signed(self) -> Node:
        self.skip_empty()
        if sign := self.eat("-", "+"):
            return negative(self.power()) if sign == "-" else self.power()
        if self.kind == "money" and self.ahead() in ("num", "-", "frac"):
            unit = self.next()[1]
            return measured(self.signed(), ((unit, 1),))
        return self.power()

    def bracket(self, opening: str) -> Node:
        if opening == "\\{" and self.eat("\\}"):
            return Node("set", ())
        outside = self.ratios
        self.ratios = outside and opening != "\\{"
        node = self.infix(self.listing()) if opening == "{" else self.listing()
        self.ratios = outside
        if opening == "\\{" and self.eat("|", ":"):
            builder = Node("builder", (node, self.listing()))
            self.expect("\\}")
            return builder
        closing = self.expect(*{"\\{": ["\\}"], "{": ["}"]}.get(opening, [")", "]"]))
        items = node.args if node.op in ("list", "either") else (node,)
        if opening == "\\{" or (opening == "{" and len(items) > 1):
            return Node("set", items)
        if len(items) > 1 or opening + closing not in ("()", "[]", "{}"):
            return Node("seq", (opening + closing, *items))
        if opening == "(" and node.op == "num" and self.eat("_"):  # (52)_8
            return sym(f"{node.args[0]}_{self.raw_script()}")
        return node

    def infix(self, top: Node) -> Node:
        r"""{1 \over 2} and {n \choose 2}."""
        op = self.eat("over", "choose")
        if op is None:
            return top
        bottom = self.listing()
        return over(top, bottom) if op == "over" else call("binom", top, bottom)

    def matrix(self) -> Node:
        rows, row = [], [self.statement()]
        while (kind := self.expect("&", "row", "fin")) != "fin":
            if kind == "row":
                rows.append(row)
                row = []
            if self.kind != "fin":
                row.append(self.statement())
            if len(rows) * len(row) > MAX_ITEMS:
                raise Limit("matrix")
        rows += [row] if row else []
        if len({len(row) for row in rows}) != 1:
            raise NotMath("ragged matrix")
        return Node("matrix", tuple(Node("row", tuple(row)) for row in rows))
