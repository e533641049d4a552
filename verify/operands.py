"""Powers and operands: numbers, symbols, functions, fractions, roots."""

import re
from fractions import Fraction

from verify.lexicon import fold
from verify.tokens import RATIOS, TRIG
from verify.tree import (
    MAX_CHARS,
    MAX_DEPTH,
    MINUS_ONE,
    VALUES,
    Limit,
    Node,
    NotMath,
    call,
    measured,
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
CLOSERS = {")", "]", "}", "\\}", "end", "rfloor", "rceil", "fin", "row", "&"}
UNIT_ENDS = CLOSERS | SEPARATORS | RELATIONS | {"|"}
ACCENTS = {"overline", "bar", "dot", "ddot", "angle", "triangle"}
OPENERS = {"(", "[", "{", "\\{", "lfloor", "lceil", "begin"}
JUXTAPOSED = ACCENTS | OPENERS | {"sym", "fn", "frac", "sqrt", "binom", "..."}
ARGUMENT = {"sym", "num", ",", "_", "=", "<", ">", "<=", ">=", "|"}  # of a label
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

    def skip_empty(self) -> None:
        """{} prints nothing."""
        while self.kind == "{" and self.ahead() == "}":
            self.position += 2

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


class Operands(Stream):
    """The lower half of the grammar; the upper half, in parse.py, adds what stands in brackets."""

    def __init__(self, tokens):
        super().__init__(tokens)
        self.depth = 0
        self.start = 0  # of the statement
        self.degrees = False  # inside the argument of sin, cos, ...: 30^\circ is pi/6

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
        self.skip_empty()
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
        equation C(h) = and P(X > 2) = as well."""
        if self.kind != "(":
            return False
        end = self.position + 1
        while self.tokens[end][0] in ARGUMENT:
            end += 1
        if self.tokens[end][0] != ")" or end == self.position + 1:
            return False
        is_short = end == self.position + 2 and self.ahead() in ("sym", "num")
        return (is_short and name in "fghFGHPQIupq") or (leads and self.tokens[end + 1][0] == "=")

    def arguments(self) -> tuple[Node, ...]:
        end = self.position
        while self.tokens[end][0] != ")":
            end += 1
        inside = self.tokens[self.position + 1 : end]
        if any(kind in RELATIONS or kind == "|" for kind, _ in inside):  # P(A | B)
            self.position = end + 1
            return (sym("".join(value for _, value in inside)),)
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
            self.skip_empty()
            while self.factor_ahead() and self.kind not in ("num", "fn", "(", "["):
                factors.append(self.power())
            argument = product(factors)
        self.degrees = outside
        return argument if argument.op in VALUES else never("arguments")


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
