"""Tokens to a tree: listing > statement (relations) > union > ratio > sum > product (also by
juxtaposition) > power > operand."""

import re
from fractions import Fraction

from verify.lexicon import MEASURES, dimensions, fold, is_unit_word
from verify.tokens import RATIOS, TRIG
from verify.tree import (
    MAX_CHARS,
    MAX_DEPTH,
    MAX_ITEMS,
    MINUS_ONE,
    VALUES,
    Limit,
    Node,
    NotMath,
    call,
    measured,
    names,
    negative,
    never,
    num,
    over,
    product,
    sym,
)
from verify.values import exact

RELATIONS = {"=", "<", ">", "<=", ">=", "!=", "in", "approx"}
SEPARATORS = {",", "and", "or"}
SETS = {"cup": "union", "cap": "cap", "setminus": "minus"}
CLOSERS = {")", "]", "}", "\\}", "end", "rfloor", "rceil", "fin", "row", "&"}
UNIT_ENDS = CLOSERS | SEPARATORS | RELATIONS | {"|"}
UNIT_KINDS = {"unit", "text", "word", "money"}
ACCENTS = {"overline", "bar", "dot", "ddot", "angle", "triangle"}
OPENERS = {"(", "[", "{", "\\{", "lfloor", "lceil", "begin"}
JUXTAPOSED = ACCENTS | OPENERS | {"sym", "fn", "frac", "sqrt", "binom", "..."}
DIFFERENTIALS = {sym("d"), sym("partial")}


class Stream:
    """The tokens, read from left to right."""

    def __init__(self, tokens):
        self.tokens = tokens + [("end", "")] * 4
        self.position = 0

    @property
    def kind(self) -> str:
        return self.tokens[self.position][0]

    def ahead(self, distance: int = 1) -> str:
        return self.tokens[min(self.position + distance, len(self.tokens) - 1)][0]

    def next(self) -> tuple[str, str]:
        if self.kind == "end":
            raise NotMath("ends too early")
        self.position += 1
        return self.tokens[self.position - 1]

    def eat(self, *kinds) -> str | None:
        return self.next()[0] if self.kind in kinds else None

    def expect(self, *kinds) -> str:
        return self.eat(*kinds) or never(f"{kinds} wanted, {self.kind} found")

    def raw_script(self) -> str:
        r"""A group or one token as text, for names such as m_{\max}."""
        kind, value = self.next()
        level = 1 if kind == "{" else 0
        values = [value]
        while level:
            kind, value = self.next()
            if kind in "{}":
                level += 1 if kind == "{" else -1
            values.append(value)
        return "".join(values[1:-1] or values)


class Parser(Stream):
    def __init__(self, tokens):
        super().__init__(tokens)
        self.depth = 0
        self.degrees = False  # inside the argument of sin, cos, ...: 30^\circ is pi/6
        self.start = 0  # of the statement
        self.ratios = True  # a colon is a ratio, but not in \{x : x > 2\}

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
            if self.eat("*"):
                factors.append(self.signed())
            elif self.eat("/"):
                factors.append(measured(Node("pow", (self.signed(), MINUS_ONE))))
            elif self.kind == "{" and self.ahead() == "}":  # {} prints nothing
                self.position += 2
            elif self.unit_ahead(factors):
                return self.units(product(factors))
            elif self.kind in JUXTAPOSED or (self.kind == "num" and self.power_ahead()):
                factors.append(self.power())
            else:
                return measured(product(factors))

    def power_ahead(self) -> bool:
        """n 2^n and (n-2) 2^n: a number is a right factor only after a bracket, or with an
        exponent of its own."""
        before = self.ahead(-1)
        return before == ")" or (before == "sym" and self.ahead() == "^")

    def unit_ahead(self, factors) -> bool:
        """A unit or a word can follow a value that stands by itself or in a list; "in" and a
        currency only a number."""
        if self.depth > 1:
            return False
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
                words.append("^" + self.raw_script())
            if self.ahead() in UNIT_KINDS and (op := self.eat("/", "*")):
                words += ["/"] if op == "/" else []
        words = [word for word in words if word]
        plain = [word for word in words if not re.fullmatch(r"/|\^-?\d", word)]
        prose = [word for word in plain if not is_unit_word(word)]
        measures = all(unit in MEASURES for unit, _ in dimensions(plain))
        if prose or len(plain) > 4 or (names(value) and not measures):  # "n even" is more than n
            raise NotMath("prose")
        if self.kind not in UNIT_ENDS:
            raise NotMath("a unit inside an expression")
        return measured(value, dimensions(words))

    def signed(self) -> Node:
        while self.kind == "{" and self.ahead() == "}":
            self.position += 2
        if sign := self.eat("-", "+"):
            return negative(self.power()) if sign == "-" else self.power()
        if self.kind == "money" and self.ahead() in ("num", "-", "frac"):
            unit = self.next()[1]
            return measured(self.signed(), ((unit, 1),))
        return self.power()

    def power(self) -> Node:
        node = self.atom()
        while op := self.eat("!", "%", "circ", "^"):
            if op == "!":
                node = call("factorial", node)
            elif op == "%":
                node = Node("pct", (node,))
            elif op == "circ":
                node = self.degree(node)
            else:
                node = self.exponent(node)
        return node

    def degree(self, node: Node) -> Node:
        if self.degrees:
            return Node("mul", (node, sym("pi"), num(Fraction(1, 180))))
        unit = "deg"
        if self.tokens[self.position][1] in ("C", "F") and self.ahead() in UNIT_ENDS:
            unit = self.next()[1]
        whole_value = self.depth <= 1 and self.kind in UNIT_ENDS
        return measured(node, ((unit, 1),)) if whole_value else node

    def exponent(self, base: Node) -> Node:
        after = next(kind for kind, _ in self.tokens[self.position :] if kind != "{")
        if after == "circ":
            self.raw_script()
            return self.degree(base)
        if after == "'":  # derivative of a symbol, or minutes and seconds of arc
            primes = self.raw_script()
            return sym(base.args[0] + primes) if base.op == "sym" else base
        power = self.script()
        if base.op == "sym" and re.fullmatch(r"C_\d+", base.args[0]) and power.op == "num":
            return call("binom", num(int_of(base.args[0][2:])), power)  # C_n^k
        if base.op == "sym" and power == MINUS_ONE and self.is_applied(base.args[0], leads=True):
            return call(f"apply {base.args[0]}^-1", *self.arguments())
        return Node("pow", (base, power))

    def script(self) -> Node:
        """What ^, _ or a command takes: a group, or one token with its sign."""
        if sign := self.eat("-", "+"):
            return negative(self.script()) if sign == "-" else self.script()
        node = self.argument()
        return Node("pow", (node, self.script())) if self.eat("^") else node

    def argument(self, one_digit=False) -> Node:
        r"""The argument of a command: a group or one token; for \frac one digit of a number, as
        in \frac12."""
        kind, value = self.tokens[self.position]
        if kind != "num":
            return self.atom()
        if one_digit and len(value) > 1 and value.isdigit():
            self.tokens[self.position] = ("num", value[1:])
            return num(int(value[0]))
        self.position += 1
        return number(value)

    def atom(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Limit("depth")
        node = self.operand(*self.next())
        self.depth -= 1
        return node

    def operand(self, kind: str, value: str) -> Node:
        if kind == "num":
            return self.mixed(number(value))
        if kind == "based":
            digits, base = value.split("_")
            return sym(f"{digits.lstrip('0') or '0'}_{re.sub('[^0-9]', '', base)}")
        if kind == "sym":
            return self.symbol(value)
        if kind in ("(", "[", "\\{", "{"):
            return self.bracket(kind)
        if kind == "frac":
            return self.fraction()
        if kind == "sqrt":
            return self.root()
        if kind == "fn":
            return self.function(value)
        if kind == "binom":
            return call("binom", self.argument(True), self.argument(True))
        if kind in ("|", "lfloor", "lceil"):
            node = call("abs" if kind == "|" else kind[1:], self.sum())
            self.expect("|" if kind == "|" else "r" + kind[1:])
            return node
        if kind == "begin":
            return self.matrix()
        if kind in ACCENTS:
            return self.accent(kind)
        if kind == "...":
            return sym("...")
        return self.word(kind, value)

    def word(self, kind: str, value: str) -> Node:
        if len(value) == 1 and kind == "text":
            return self.symbol(value)
        if kind == "unit" and len(value) == 2:  # as an operand, ml is a product
            self.tokens.insert(self.position, ("sym", value[1]))
            return self.symbol(value[0])
        alone = self.kind in CLOSERS | SEPARATORS
        if kind in ("word", "text", "unit") and value.isalpha() and alone:
            return Node("text", (fold(value),))
        raise NotMath(f"{kind} where an operand should be")

    def mixed(self, whole: Node) -> Node:
        r"""2\frac58 and 2 5/8: an integer before a proper fraction of integers is added, not
        multiplied."""
        if whole.op != "num" or whole.args[0].denominator != 1:
            return whole
        (a, top), (b, _), (c, bottom) = self.tokens[self.position : self.position + 3]
        if (a, b, c) == ("num", "/", "num") and top.isdigit() and bottom.isdigit():
            if 0 < int_of(top) < int_of(bottom):
                self.position += 3
                return num(whole.args[0] + Fraction(int_of(top), int_of(bottom)))
        if not self.eat("frac"):
            return whole
        part = self.fraction()
        literal = part.op == "mul" and part.args[0].op == part.args[1].args[0].op == "num"
        if literal and 0 < (exact(part) or 0) < 1:
            return num(whole.args[0] + exact(part))
        return Node("mul", (whole, part))

    def fraction(self) -> Node:
        top, bottom = self.argument(True), self.argument(True)
        if bottom.op == "mul" and bottom.args[0] in DIFFERENTIALS:
            head = top.args[0] if top.op == "mul" else top
            base = head.args[0] if head.op == "pow" else head
            if base in DIFFERENTIALS:  # dy/dx is a name of its own: the d's do not cancel
                return call("derivative", top, bottom)
        return over(top, bottom)

    def root(self) -> Node:
        index = num(2)
        if self.eat("["):
            index = self.sum()
            self.expect("]")
        return Node("root", (self.argument(), index))

    def symbol(self, name: str) -> Node:
        leads = self.position == self.start + 1
        while op := self.eat("_", "'"):
            name += op + self.raw_script() if op == "_" else op
        if self.is_applied(name, leads):
            return call("apply " + name, *self.arguments())
        return sym(name)

    def is_applied(self, name: str, leads: bool) -> bool:
        """Whether a name before a bracket is a function of it: f(x), and at the left of an
        equation C(h) = and f(x, y) = as well."""
        if self.kind != "(":
            return False
        end = self.position + 1
        while self.tokens[end][0] in ("sym", "num", ",", "_"):
            end += 1
        if self.tokens[end][0] != ")" or end == self.position + 1:
            return False
        one = end == self.position + 2
        return (one and name in "fghFGHPQIupq") or (leads and self.tokens[end + 1][0] == "=")

    def arguments(self) -> tuple[Node, ...]:
        node = self.atom()
        return node.args[1:] if node.op == "seq" else (node,)

    def accent(self, kind: str) -> Node:
        r"""\overline{AB}, \dot{x}, \angle ABC: a name of its own, in which the order of letters
        matters."""
        name = self.raw_script()
        while op := self.eat("_", "sym" if kind in ("angle", "triangle") else "_"):
            name += self.tokens[self.position - 1][1] if op == "sym" else "_" + self.raw_script()
        return sym(f"{kind}({name})") if re.fullmatch(r"\w+", name) else never("accent")

    def function(self, name: str) -> Node:
        base = power = None
        while op := self.eat("_", "^"):
            if op == "_":
                base = self.script()
            else:
                power = self.script()
        if base and name != "log":
            raise NotMath("subscript of a function")
        argument = self.function_argument(name in TRIG)
        if power == MINUS_ONE and name in TRIG:
            name, power = "arc" + name, None
        node = applied(name, argument, base)
        return Node("pow", (node, power)) if power else node

    def function_argument(self, degrees: bool) -> Node:
        outside, self.degrees = self.degrees, degrees
        if self.kind == "(":
            argument = self.atom()
        else:  # \sin 2\pi t: the product up to the next sign, function or bracket
            factors = [self.signed()]
            while self.kind in JUXTAPOSED - {"fn", "(", "["}:
                factors.append(self.power())
            argument = product(factors)
        self.degrees = outside
        return argument if argument.op in VALUES else never("arguments")

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


def applied(name: str, argument: Node, base: Node | None) -> Node:
    if name == "exp":
        return Node("pow", (sym("e"), argument))
    if name in ("log", "lg"):  # a bare log has some base, the same everywhere: log 8 = 3 log 2
        base = base or (num(10) if name == "lg" else sym("log"))
        return over(call("ln", argument), call("ln", base))
    if name in RATIOS:
        top, bottom = RATIOS[name]
        return over(call(top, argument) if top else num(1), call(bottom, argument))
    return call(name, argument)


def int_of(digits: str) -> int:
    if len(digits) > MAX_CHARS:
        raise Limit("digits")
    return int(digits)


def number(text: str) -> Node:
    r"""An integer, a decimal with what was written of it, or a repeating decimal: 0.1\overline{6},
    0.\dot{1}4285\dot{7}."""
    if "\\" in text:
        head, _, tail = text.partition("\\")
        whole, _, decimals = head.partition(".")
        repeated = re.sub(r"\D", "", tail)
        nines = 10 ** len(repeated) - 1
        value = int_of(whole + decimals or "0") * nines + int_of(repeated)
        return num(Fraction(value, nines * 10 ** len(decimals)))
    mantissa, _, exponent = text.lower().partition("e")
    whole, point, decimals = mantissa.partition(".")
    if len(exponent) > 5 or abs(int(exponent or 0)) > MAX_CHARS:
        raise Limit("exponent")
    digits = int_of(whole + decimals)
    place = int(exponent or 0) - len(decimals)
    value = digits * Fraction(10) ** place
    return Node("dec", (value, len(str(digits)), place)) if point or exponent else num(value)
