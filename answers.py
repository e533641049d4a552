r"""Two final answers as text: are they equal?

    compare(r"\frac{1}{2}", "0.5", sympy=True)  ->  "equal:number"

A tokenizer and a precedence parser of our own turn both sides into small immutable trees; what the grammar does not cover
entirely is text. Then the cheapest test that decides:

    text       the same words
    number     the same fraction, at any size
    structure  lists, intervals, matrices and the like, part by part
    algebra    the same value at a random point of a prime field, which for rational functions is a proof
               (Schwartz 1980, Zippel 1979), and no difference at real points with 80 digits
    sympy      on objects that we build by calling its constructors; for a process whose clock and memory a parent watches

All but the last are bounded by construction: static limits hold before anything is computed. No text is ever run as code.
What counts as equal is listed in reward.py. A learner searches for holes here: in doubt two answers are not equal.
"""

import functools
import hashlib
import math
import random
import re
import secrets
from fractions import Fraction
from typing import NamedTuple

MAX_CHARS = 2000  # of an answer that is parsed; a longer one can still be equal as text
MAX_DEPTH = 40  # of brackets and commands
MAX_BITS = 8192  # of an integer that is computed; a larger power or factorial stays symbolic
MAX_ITEMS = 64  # of a list, set or matrix
MAX_SIGNS = 4  # of +- in one item
MIN_DIGITS = 10  # significant digits from which a decimal can stand for a value that has no finite expansion


class NotMath(Exception):
    """The text is not, or not entirely, an expression of the grammar; or the expression has no value."""


class Limit(Exception):
    """A static bound was passed before the work was done."""


class Undecided(Exception):
    """Only sympy could tell, and it may not run in this process."""


def never(what: str):
    raise NotMath(what)


# ----------------------------------------------------------------------------------------------------------------------
# Text to tokens

def words(text: str) -> list[str]:
    return text.split()


def table(text: str) -> dict[str, str]:
    return dict(zip(words(text)[::2], words(text)[1::2]))


GREEK = words("""alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigmaf sigma tau
    upsilon phi chi psi omega""")
SIGNS = table(r"""− - – - — - ∗ * ÷ / ⁄ / ∕ / × \times · \cdot ⋅ \cdot √ \sqrt ∞ \infty ≤ \le ⩽ \le ≥ \ge ⩾ \ge ≠ \ne ≈
    \approx ± \pm ∓ \mp ∪ \cup ∈ \in ∅ \emptyset ℝ \mathbb{R} ℤ \mathbb{Z} ° ^\circ ∠ \angle … \ldots ⟨ \langle ⟩ \rangle
    ⌊ \lfloor ⌋ \rfloor ⌈ \lceil ⌉ \rceil ∣ | € $ £ $ ′ ' ’ ' ″ '' ½ \frac{1}{2} ⅓ \frac{1}{3} ⅔ \frac{2}{3} ¼ \frac{1}{4}
    ¾ \frac{3}{4}""")
UNICODE = str.maketrans({sign: name + " " * name[-1].isalpha() for sign, name in SIGNS.items()}
                        | dict.fromkeys("\u00a0\u2009\u202f", " ") | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", "")
                        | {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)}  # full-width ASCII
                        | {chr(0x3B1 + i): f"\\{name} " for i, name in enumerate(GREEK)}
                        | {chr(0x391 + i): f"\\{name.capitalize()} " for i, name in enumerate(GREEK)})
SCRIPTS = [("^", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ", str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ", "0123456789-n")),
           ("_", "₀₁₂₃₄₅₆₇₈₉", str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789"))]

FONT = re.compile(r"\\(?:mathrm|mathbf|mathit|mathsf|boldsymbol|operatorname\*?|bm|mathnormal)\s*\{([^{}]*)\}")
TEXT = r"\\(?:text|mbox|hbox|textbf|textit|textrm|textnormal|texttt|textsf|emph)\s*\{([^{}]*)\}"
WRAPPED = re.compile(TEXT + r"[\s.]*")
THIN_COMMA = re.compile(r"(?<=\d)(?:\{,\}|,\s?\\!|\\!,)\s*(?=\d{3}(?!\d))|(?<=\d)\\[,;: ]\s*(?=\d{3}(?!\d))")  # 10{,}000
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
SPACED = re.compile(r"[(\[{][^)\]}]*,\s")
TOKEN = re.compile(
    r"(?P<skip>\s+|\\[,;:!>\s]|~|\\?\$|\\(?:left|right|[bB]igg?[lrm]?|middle|displaystyle|textstyle|limits|quad|qquad"
    r"|boxed|fbox|rm|bf|vec|overrightarrow|mathcal|hat)(?![A-Za-z]))"
    rf"|(?P<text>{TEXT})"
    r"|(?P<begin>\\begin\s*\{[pbB]?(?:small)?(?:matrix|array)\}(?:\{[clr|]*\})?)|(?P<fin>\\end\s*\{\w+\})"
    r"|(?P<based>(?<![A-Za-z])[0-9A-Z]*\d[0-9A-Z]*_(?:\{(?:\\text\{)?\d{1,2}\}?\}|\d{1,2}(?!\d)))"
    r"|(?P<num>\d*\.\d*\\(?:overline|bar|dot)\s*\{\d+\}|(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+(?![\w.^]))?)"
    r"|(?P<cmd>\\(?:mathbb\s*\{?\s*[A-Z]\}?|[A-Za-z]+|.))"
    r"|(?P<word>[A-Za-z]+)"
    r"|(?P<op><=|>=|!=|\*\*|\.\.\.|.)",
    re.S | re.A,
)
ALIAS = table(r"""dfrac frac tfrac frac cfrac frac dbinom binom tbinom binom le <= leq <= leqslant <= geqslant >= ge >=
    geq >= lt < gt > ne != neq != times * cdot * ast * div / lbrace \{ rbrace \} langle ( rangle ) lbrack [ rbrack ] lvert |
    rvert | vert | mid | lVert | rVert | tg tan ctg cot land and lor or wedge and vee or ldots ... dots ... cdots ...
    degree circ varepsilon epsilon varphi phi vartheta theta prime ' \ row newline row varnothing emptyset ** ^ ; ,
    asin arcsin acos arccos atan arctan infinity infty inf infty oo infty""")
RATIOS = {"tan": ("sin", "cos"), "cot": ("cos", "sin"), "sec": (None, "cos"), "csc": (None, "sin")}
TRIG = {"sin", "cos", *RATIOS}
FUNCTIONS = TRIG | {"arcsin", "arccos", "arctan", "log", "lg", "ln", "exp", "abs", "floor", "ceil"}
NAMES = set(GREEK) | {name.capitalize() for name in GREEK} | {"infty", "partial", "ell", "hbar", "emptyset", "odot", "mho"}
OPERATORS = set(words("and or in sqrt binom"))
WORDS = set(words("""yes no odd even true false not none all any both the is are at if to of one two six ten red am pm mon tue
    wed thu fri sat sun may jan feb mar apr jun jul aug sep oct nov dec"""))
STOP = set(words("""and or not no yes none all any both the is are if to one two six ten am pm more less least most than except
    but plus minus times over squared cubed about around between either neither nor maybe possible possibly only wrong from
    until approximately nothing solution solutions with without where when which that then to of out base mod negative half
    halves third thirds quarter quarters fifth fifths tenth tenths hundredth hundredths factorial
    hundred thousand million billion trillion dozen"""))
UNITS = set(words("""cm mm km dm nm kg mg lb lbs oz ft in inch feet foot yd mi mph kph kmh hr hrs hour min mins sec secs ms day
    days week year yr deg rad cent usd USD euro unit cu sq ml gram ton tons kJ eV Hz kHz MHz GHz Pa kPa atm mol kcal cal men
    boys cats dogs pens cups kids eggs cars way ways bit bits byte mile step pt pts item per each"""))
LETTER_UNITS = set(words("m s g L l J N W V A K C F h T kW"))  # only in \text or \mathrm


def clean(text: str) -> str:
    """The same answer in ASCII and LaTeX commands, without digit grouping, fonts and a final full stop."""
    if not text.isascii():
        for sign, characters, digits in SCRIPTS:
            text = re.sub(f"[{characters}]+", lambda m, s=sign, d=digits: f"{s}{{{m[0].translate(d)}}}", text)
        text = text.translate(UNICODE)
    if "\\" in text or "{" in text:
        text = FONT.sub(_without_font, THIN_COMMA.sub("", text))
    text = text.strip(" \t\r\n$")
    if text[-1:] == "." and text[-3:] != "...":
        text = text[:-1].rstrip(" $")
    if "," in text and (not re.search(r"[(\[{]", text) or SPACED.search(text)):
        text = THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)  # but (312,123) is a pair
    if " " in text and re.fullmatch(r"-?\d{1,3}(?: \d{3})+", text):
        text = text.replace(" ", "")
    return text


def _without_font(match) -> str:
    content = match[1].strip(" ~")
    words = re.findall("[A-Za-z]+", content)
    unit = words and all(word in UNITS or word in LETTER_UNITS for word in words)
    return rf"\text{{{content}}}" if unit or (len(content) > 5 and content.isalpha()) else f" {content} "


def tokenize(text: str) -> list[tuple[str, str]]:
    r"""(kind, value) pairs; kinds: num based fn sym word unit text begin fin, and operators and commands as themselves."""
    tokens, formula = [], re.search(r"[-+*/^=<>_\\]", text)
    for match in TOKEN.finditer(text):
        kind, value = match.lastgroup, match[0]
        if kind in ("cmd", "op"):
            name = value[1:] if kind == "cmd" and value not in ("\\{", "\\}") else value
            name = "mathbb" + name.rstrip("} ")[-1] if name.startswith("mathbb") else ALIAS.get(name, name)
            known = "fn" if name in FUNCTIONS else "sym" if name in NAMES or name.startswith("mathbb") else name
            tokens.append((known, name))
        elif kind == "word":
            tokens += _word(ALIAS.get(value, value), formula)
        elif kind == "text":
            content = value[value.index("{") + 1 : -1].strip(" ~.,")
            tokens += [(content if content in ("and", "or", "in") else "text", content)] if content else []
        elif kind != "skip":
            tokens.append((kind, value))
    return tokens


def _word(word: str, formula) -> list[tuple[str, str]]:
    """A run of letters is a function, a unit, a word, or a product of one-letter symbols."""
    lower = word.lower()
    if word in OPERATORS or word in FUNCTIONS or word in NAMES:
        return [(word if word in OPERATORS else "fn" if word in FUNCTIONS else "sym", word)]
    if word in UNITS or (len(word) > 3 and lower in UNITS):
        return [("unit", word)]
    if len(word) > 3 or (len(word) == 3 and (word.isupper() or lower in WORDS)) or (lower in WORDS and not formula):
        return [("word", word)]
    return [("sym", letter) for letter in word]


# ----------------------------------------------------------------------------------------------------------------------
# Tokens to a tree: listing > statement (relations) > union > sum > product (also by juxtaposition) > power > operand

class Node(NamedTuple):
    """num (Fraction) - dec (Fraction, significant digits, place of the last) - sym (name) - text (words) - add mul pow root
    pct (nodes) - pm (sign, node) - call (function, nodes) - list either set union matrix row builder (nodes) -
    seq (brackets, nodes) - rel (operators, nodes) - named (name, value, relation)"""

    op: str
    args: tuple


def num(value) -> Node:
    return Node("num", (Fraction(value),))


def sym(name: str) -> Node:
    return Node("sym", (name,))


def negative(node: Node) -> Node:
    if node.op in ("num", "dec"):
        return Node(node.op, (-node.args[0], *node.args[1:]))
    return Node("mul", (MINUS_ONE, node))


def product(factors) -> Node:
    return factors[0] if len(factors) == 1 else Node("mul", tuple(factors))


def over(top: Node, bottom: Node) -> Node:
    return Node("mul", (top, Node("pow", (bottom, MINUS_ONE))))


def call(name: str, *args: Node) -> Node:
    return Node("call", (name, *args))


MINUS_ONE = num(-1)
PLUS_INFINITY, MINUS_INFINITY = sym("infty"), negative(sym("infty"))

RELATIONS = {"=", "<", ">", "<=", ">=", "!=", "in", "approx"}
SEPARATORS = {",", "and", "or"}
CLOSERS = {")", "]", "}", "\\}", "end", "rfloor", "rceil", "fin", "row", "&"}
UNIT_ENDS = CLOSERS | SEPARATORS | RELATIONS | {"|"}
ACCENTS = {"overline", "bar", "dot", "ddot", "angle", "triangle"}
JUXTAPOSED = ACCENTS | {"sym", "fn", "frac", "sqrt", "binom", "(", "[", "{", "\\{", "lfloor", "lceil", "begin", "..."}


class Parser:
    def __init__(self, tokens):
        self.tokens, self.at, self.depth = tokens + [("end", "")] * 4, 0, 0
        self.degrees = False  # inside the argument of sin, cos, ...: 30^\circ is pi/6

    @property
    def kind(self) -> str:
        return self.tokens[self.at][0]

    def next(self) -> tuple[str, str]:
        token = self.tokens[self.at] if self.kind != "end" else never("ends too early")
        self.at += 1
        return token

    def eat(self, *kinds) -> str | None:
        return self.next()[0] if self.kind in kinds else None

    def expect(self, *kinds) -> str:
        return self.eat(*kinds) or never(f"{kinds} wanted, {self.kind} found")

    def answer(self) -> Node:
        node = self.listing()
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
        return items[0] if len(items) == 1 else Node("either" if "or" in separators else "list", tuple(items))

    def items(self) -> tuple[Node, ...]:
        node = self.listing()
        return node.args if node.op in ("list", "either") else (node,)

    def statement(self) -> Node:
        if self.kind in ("word", "text") and self.tokens[self.at + 1][0] == "=":
            self.at += 2  # Area = 12
        sides, ops = [self.union()], []
        while self.kind in RELATIONS:
            ops.append(self.next()[0])
            sides.append(self.union())
        return Node("rel", (tuple(ops), *sides)) if ops else sides[0]

    def union(self) -> Node:
        parts = [self.sum()]
        while self.eat("cup"):
            parts.append(self.sum())
        return parts[0] if len(parts) == 1 else Node("union", tuple(parts))

    def sum(self) -> Node:
        sign, terms = self.eat("pm", "mp"), []
        while sign or not terms:
            term = self.product()
            terms.append(Node("pm", (sign, term)) if sign in ("pm", "mp") else negative(term) if sign == "-" else term)
            sign = self.eat("+", "-", "pm", "mp")
        return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

    def product(self) -> Node:
        factors = [self.signed()]
        while True:
            if self.eat("*"):
                factors.append(self.signed())
            elif self.eat("/"):
                factors.append(Node("pow", (self.signed(), MINUS_ONE)))
            elif self.unit_ahead(factors):
                return self.units(product(factors))
            elif self.kind in JUXTAPOSED or (self.kind == "num" and self.power_ahead()):
                factors.append(self.power())
            else:
                return product(factors)

    def power_ahead(self) -> bool:
        """n 2^n and (n-2) 2^n: a number is a right factor only after a bracket, or with an exponent of its own."""
        before, after = self.tokens[self.at - 1][0], self.tokens[self.at + 1][0]
        return before == ")" or (before == "sym" and after == "^")

    def unit_ahead(self, factors) -> bool:
        """A unit or a word can follow a value that stands by itself or in a list; "in" only a number."""
        if self.depth > 1 or self.kind not in ("unit", "text", "word", "in"):
            return False
        if self.kind == "in" and self.tokens[self.at + 1][0] not in UNIT_ENDS | {"^", "."}:
            return False
        return self.kind != "in" or exact(product(factors)) is not None

    def units(self, value: Node) -> Node:
        """The value without what may follow it at its end, `kcal m^{-2} yr^{-1}`."""
        count = 0
        while self.kind in ("unit", "text", "word", "in"):
            for word in self.next()[1].split():
                word = word.strip("().,/~").lower()
                prose = word in STOP or (names(value) and word not in UNITS)  # "n even" is more than n
                if prose or count == 4 or not re.fullmatch(r"[a-z][a-z0-9/^\-']*", word):
                    raise NotMath("prose")
                count += 1
            if self.eat("^"):
                self.script()
            if self.tokens[self.at + 1][0] in ("unit", "text", "word"):
                self.eat("/", "*")
        if self.kind not in UNIT_ENDS:
            raise NotMath("a unit inside an expression")
        return value

    def signed(self) -> Node:
        return negative(self.power()) if self.eat("-", "+") == "-" else self.power()

    def power(self) -> Node:
        node = self.atom()
        while op := self.eat("!", "%", "circ", "^"):
            if op == "!":
                node = call("factorial", node)
            elif op == "%":
                node = Node("pct", (node,))
            else:
                node = self.exponent(node) if op == "^" else self.degree(node)
        return node

    def degree(self, node: Node) -> Node:
        return Node("mul", (node, sym("pi"), num(Fraction(1, 180)))) if self.degrees else node

    def exponent(self, base: Node) -> Node:
        ahead = next(kind for kind, _ in self.tokens[self.at :] if kind != "{")
        if ahead == "circ":
            self.raw_script()
            return self.degree(base)
        if ahead == "'":  # derivative of a symbol, or minutes and seconds of arc
            primes = self.raw_script()
            return sym(base.args[0] + primes) if base.op == "sym" else base
        power = self.script()
        if base.op == "sym" and re.fullmatch(r"C_\d+", base.args[0]) and power.op == "num":
            return call("binom", num(int_of(base.args[0][2:])), power)  # C_n^k
        return Node("pow", (base, power))

    def script(self) -> Node:
        """What ^, _ or a command takes: a group, or one token with its sign."""
        if sign := self.eat("-", "+"):
            return negative(self.script()) if sign == "-" else self.script()
        node = self.argument()
        return Node("pow", (node, self.script())) if self.eat("^") else node

    def raw_script(self) -> str:
        r"""The same as text, for names such as m_{\max}."""
        kind, value = self.next()
        level, values = int(kind == "{"), [value]
        while level:
            kind, value = self.next()
            level += (kind == "{") - (kind == "}")
            values.append(value)
        return "".join(values[1:-1] or values)

    def argument(self, one_digit=False) -> Node:
        r"""The argument of a command: a group or one token; for \frac one digit of a number (\frac12)."""
        kind, value = self.tokens[self.at]
        if kind != "num":
            return self.atom()
        if one_digit and len(value) > 1 and value.isdigit():
            self.tokens[self.at] = ("num", value[1:])
            return num(int(value[0]))
        self.at += 1
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
            index = num(2)
            if self.eat("["):
                index = self.sum()
                self.expect("]")
            return Node("root", (self.argument(), index))
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
        if kind == "unit" and len(value) == 2:  # as an operand, ml is a product
            self.tokens.insert(self.at, ("sym", value[1]))
            return self.symbol(value[0])
        if kind == "text" and not value.isalpha() and self.at == 1:
            return Parser(tokenize(clean(value))).answer()
        if kind in ("word", "text", "unit") and value.isalpha() and self.kind in CLOSERS | SEPARATORS:
            return Node("text", (value.casefold(),))
        raise NotMath(f"{kind} where an operand should be")

    def mixed(self, whole: Node) -> Node:
        r"""2\frac58 and 2 5/8: an integer before a proper fraction of integers is added, not multiplied."""
        if whole.op != "num" or whole.args[0].denominator != 1:
            return whole
        (one, top), (two, _), (three, bottom) = self.tokens[self.at : self.at + 3]
        if (one, two, three) == ("num", "/", "num") and top.isdigit() and bottom.isdigit() and 0 < int_of(top) < int_of(bottom):
            self.at += 3
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
        if bottom.op == "mul" and bottom.args[0] in DIFFERENTIALS:  # dy/dx is a name of its own: the d's do not cancel
            head = top.args[0] if top.op == "mul" else top
            if head in DIFFERENTIALS or (head.op == "pow" and head.args[0] in DIFFERENTIALS):
                return call("derivative", top, bottom)
        return over(top, bottom)

    def symbol(self, name: str) -> Node:
        while op := self.eat("_", "'"):
            name += op + self.raw_script() if op == "_" else op
        if self.kind == "(" and name in "fghFGHPQIupq" and self.tokens[self.at + 2][0] == ")":
            return call("apply " + name, self.atom())
        return sym(name)

    def accent(self, kind: str) -> Node:
        r"""\overline{AB}, \dot{x}, \angle ABC: a name of its own, in which the order of letters matters."""
        name = self.raw_script()
        while op := self.eat("_", "sym" if kind in ("angle", "triangle") else "_"):
            name += self.tokens[self.at - 1][1] if op == "sym" else "_" + self.raw_script()
        return sym(f"{kind}({name})") if re.fullmatch(r"\w+", name) else never("accent")

    def function(self, name: str) -> Node:
        base = power = None
        while op := self.eat("_", "^"):
            base, power = (self.script(), power) if op == "_" else (base, self.script())
        if base and name != "log":
            raise NotMath("subscript of a function")
        degrees, self.degrees = self.degrees, name in TRIG
        if self.kind == "(":
            argument = self.atom()
        else:  # \sin 2\pi t: the product up to the next sign, function or bracket
            factors = [self.signed()]
            while self.kind in JUXTAPOSED - {"fn", "(", "["}:
                factors.append(self.power())
            argument = product(factors)
        self.degrees = degrees
        if argument.op not in VALUES:
            raise NotMath("arguments")
        if power == MINUS_ONE and name in TRIG:
            name, power = "arc" + name, None
        if name == "exp":
            node = Node("pow", (sym("e"), argument))
        elif name in ("log", "lg"):  # a bare log has some base, the same everywhere: log 8 = 3 log 2, but not ln 8
            base = base or (num(10) if name == "lg" else sym("log"))
            node = over(call("ln", argument), call("ln", base))
        elif name in RATIOS:
            node = over(*(call(part, argument) if part else num(1) for part in RATIOS[name]))
        else:
            node = call(name, argument)
        return Node("pow", (node, power)) if power else node

    def bracket(self, opening: str) -> Node:
        if opening == "\\{" and self.eat("\\}"):
            return Node("set", ())
        items = self.items()
        if opening == "\\{" and len(items) == 1 and self.eat("|", ":"):
            builder = Node("builder", (items[0], self.listing()))
            self.expect("\\}")
            return builder
        closing = self.expect(*{"\\{": ["\\}"], "{": ["}"]}.get(opening, [")", "]"]))
        if opening == "\\{" or (opening == "{" and len(items) > 1):
            return Node("set", items)
        if len(items) == 1 and opening + closing in ("()", "[]", "{}"):
            if opening == "(" and items[0].op == "num" and self.eat("_"):  # (52)_8
                return sym(f"{items[0].args[0]}_{self.raw_script()}")
            return items[0]
        return Node("seq", (opening + closing, *items))

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


DIFFERENTIALS = {sym("d"), sym("partial")}


def int_of(digits: str) -> int:
    if len(digits) > MAX_CHARS:
        raise Limit("digits")
    return int(digits)


def number(text: str) -> Node:
    r"""An integer, a decimal with what was written of it, or a repeating decimal 0.1\overline{6}."""
    if "\\" in text:
        head, _, repeated = text.partition("\\")
        whole, _, decimals = head.partition(".")
        repeated = re.sub(r"\D", "", repeated)
        nines = 10 ** len(repeated) - 1
        return num(Fraction(int_of(whole + decimals or "0") * nines + int_of(repeated), nines * 10 ** len(decimals)))
    mantissa, _, exponent = text.lower().partition("e")
    whole, point, decimals = mantissa.partition(".")
    if len(exponent) > 5 or abs(int(exponent or 0)) > MAX_CHARS:
        raise Limit("exponent")
    digits, place = int_of(whole + decimals), int(exponent or 0) - len(decimals)
    value = digits * Fraction(10) ** place
    return Node("dec", (value, len(str(digits)), place)) if point or exponent else num(value)


@functools.lru_cache(maxsize=8192)
def read(text: str) -> Node | str:
    """The tree of an answer in the shape in which answers are compared, or why it has none: "text" or "limit"."""
    if len(text) > MAX_CHARS:
        return "limit"
    text = clean(text)
    while wrapped := WRAPPED.fullmatch(text):
        text = clean(wrapped[1])
    try:
        return shape(Parser(tokenize(text)).answer())
    except NotMath:
        return "text"
    except (Limit, RecursionError):
        return "limit"


def is_math(text: str) -> bool:
    node = read(text)
    return not isinstance(node, str) and node.op != "text"


# ----------------------------------------------------------------------------------------------------------------------
# Shape: one form for the many ways to write a set, an interval or an assignment

VALUES = {"num", "dec", "sym", "add", "mul", "pow", "root", "call", "pct"}


def children(node: Node) -> list[Node]:
    return [arg for arg in node.args if isinstance(arg, Node)]


def rebuild(node: Node, change) -> Node:
    """`node` with its children changed."""
    return Node(node.op, tuple(change(arg) if isinstance(arg, Node) else arg for arg in node.args))


def count(node: Node, op: str | None = None) -> int:
    return (op is None or node.op == op) + sum(count(child, op) for child in children(node))


@functools.lru_cache(maxsize=8192)
def names(node: Node) -> frozenset:
    """The variables in a tree."""
    if node.op == "sym":
        return frozenset(node.args) - {"pi", "e", "i", "infty"}
    return frozenset().union(*map(names, children(node)))


def is_name(node: Node) -> bool:
    return node.op == "sym" and bool(names(node)) and node.args[0] != "..."


def interval(low: Node, high: Node, closed_low=False, closed_high=False) -> Node:
    return Node("seq", ("(["[closed_low and low != MINUS_INFINITY] + ")]"[closed_high and high != PLUS_INFINITY], low, high))


def shape(node: Node) -> Node:
    """Expands +-, and rewrites relations, set builders and unions to the forms that `Comparison` knows."""
    op, args = node
    if op in ("list", "either"):
        items = [part for item in map(shape, args) for part in (item.args if item.op == "list" else [item])]
        sets = [as_set(item) for item in items]
        if op == "either" and all(sets) and len({item.args[0] for item in items if item.op == "named"}) <= 1:
            return Node("union", tuple(sets))  # x < 1 or x > 3
        if len(items) > MAX_ITEMS:
            raise Limit("items")
        return Node("list", tuple(items))
    if signs := count(node, "pm"):
        if signs > MAX_SIGNS:
            raise Limit("signs")
        items = [signed for item in (args if op == "set" else [node]) for signed in both_signs(item)]
        return shape(Node("set" if op == "set" else "list", tuple(items)))
    if op == "rel":
        return relation(node)
    if op == "builder":
        variable, conditions = args
        conditions = conditions.args if conditions.op in ("list", "either") else [conditions]
        conditions = [shape(condition) for condition in conditions]
        if len(conditions) == 1 and conditions[0].op == "named" and sym(conditions[0].args[0]) == variable:
            value = conditions[0].args[1]
            return value if as_set(value) else Node("set", (value,))
        return Node("builder", (variable, *sorted(conditions, key=repr)))
    if op == "sym":
        return {"mathbbR": interval(MINUS_INFINITY, PLUS_INFINITY), "emptyset": Node("set", ())}.get(args[0], node)
    return rebuild(node, shape) if op in ("seq", "set", "matrix", "row", "union") else node


def as_set(node: Node) -> Node | None:
    if node.op == "named":
        return as_set(node.args[1])
    return node if (node.op == "seq" and len(node.args) == 3) or node.op in ("set", "union") else None


def both_signs(node: Node) -> list[Node]:
    """The two readings of an item with +-, all upper signs and all lower signs; an item without stays itself."""
    def pick(node, upper):
        if node.op != "pm":
            return rebuild(node, lambda child: pick(child, upper))
        inner = pick(node.args[1], upper)
        return inner if (node.args[0] == "pm") == upper else negative(inner)
    return [pick(node, True), pick(node, False)] if count(node, "pm") else [node]


def relation(node: Node) -> Node:
    """x = 5, x in S and x < 5 become (named x 5), (named x S) and (named x interval); other relations keep their sides."""
    ops, sides = node.args[0], [shape(side) for side in node.args[1:]]
    if set(ops) <= {">", ">="}:
        ops, sides = tuple({">": "<", ">=": "<="}[op] for op in reversed(ops)), sides[::-1]
    if ops == ("=",) and is_name(sides[-1]) and not is_name(sides[0]):
        sides.reverse()
    node, left, right = Node("rel", (ops, *sides)), sides[0], sides[1]
    if ops == ("in",) and is_name(left):
        return Node("named", (left.args[0], right, node))
    if ops == ("approx",) and right.op == "dec" and rounds_to(left, right, 1):
        return left
    if set(ops) == {"="}:
        if len(sides) > 2:  # x = 3/2 = 1.5
            chain = is_name(left) and exact(right) is not None and {exact(right)} == {exact(side) for side in sides[2:]}
            return relation(Node("rel", (("=",), left, right))) if chain else node
        if is_name(left) and left.args[0] not in names(right):
            curve = {"x", "y", "z"}  # y = 2x + 3 is a line, not its right side
            return node if left.args[0] in curve and names(right) & curve else Node("named", (left.args[0], right, node))
        if left.op == right.op == "seq" and all(map(is_name, left.args[1:])):
            return Node("named", (" ".join(part.args[0] for part in left.args[1:]), right, node))
    if set(ops) <= {"<", "<="}:
        readings = {1: [(MINUS_INFINITY, left, right), (left, right, PLUS_INFINITY)], 2: [sides]}
        for low, middle, high in readings.get(len(ops), ()):
            if is_name(middle) and not names(low) | names(high):
                return Node("named", (middle.args[0], interval(low, high, ops[0] == "<=", ops[-1] == "<="), node))
    if len(set(ops)) > 1 and not set(ops) <= {"<", "<="}:
        raise NotMath("relation")
    return node


# ----------------------------------------------------------------------------------------------------------------------
# Values: one walk over a tree, four kinds of arithmetic (exact, modular, 80 digits, sympy)

def evaluate(node: Node, domain):
    """The value of a tree. A domain makes numbers and symbols that know + and *, and has power, call and check."""
    op, args = node
    if op in ("num", "dec"):
        return domain.number(args[0])
    if op == "sym":
        return domain.symbol(args[0])
    if op not in VALUES:
        raise NotMath(op)
    value, *rest = (evaluate(child, domain) for child in children(node))
    if op == "call":
        value = domain.call(args[0], [value, *rest], node)
    elif op == "pct":
        value = value * domain.number(Fraction(1, 100))
    elif op in ("pow", "root"):
        q = exact(args[1])
        if op == "root":
            q = 1 / q if q else never("index")
        value = domain.power(value, domain.number(q) if op == "root" else rest[0], q, op == "root")
    for other in rest if op in ("add", "mul") else ():
        value = domain.check(value + other if op == "add" else value * other)
    return domain.check(value)


class Irrational(Exception):
    """Not a tree of rationals, or one whose value has more than MAX_BITS."""


def bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def irrational(*_):
    raise Irrational


class Exact:
    number, symbol = Fraction, irrational

    def check(self, value):
        return value if bits(value) <= MAX_BITS else irrational()

    def power(self, base, _, q, root):
        if root or q is None or q.denominator > 1:
            raise Irrational
        if base == 0 and q < 0:
            raise NotMath("division by zero")
        if base in (0, 1, -1):
            return base ** int(q % 2 or (q != 0) * 2)
        return base ** int(q) if bits(base) * abs(q) <= MAX_BITS else irrational()  # its size, before it is computed

    def call(self, name, values, node):
        if name == "factorial" and values[0].denominator == 1 and 0 <= values[0] <= 900:
            return Fraction(math.factorial(int(values[0])))
        if name == "binom" and values[0].denominator == values[1].denominator == 1 and 0 <= values[1] <= values[0] <= MAX_BITS:
            return Fraction(math.comb(*map(int, values)))
        return Fraction({"abs": abs, "floor": math.floor, "ceil": math.ceil}.get(name, irrational)(values[0]))


@functools.lru_cache(maxsize=8192)
def exact(node: Node) -> Fraction | None:
    """The value of a tree of rationals; None for any other, and for one of more than MAX_BITS."""
    if node.op in ("num", "dec"):
        return node.args[0]
    try:
        return evaluate(node, Exact())
    except Irrational:
        return None


# 2 M + 1 = P, both prime, and P = -1 modulo 8 and each prime to 151: the squares modulo P form a group of prime order M that
# holds these primes. So each square has one k-th root for each k, roots of products are products of roots, and exponents are
# numbers modulo M, in which sums, products and quotients work as they do in formulas.
P = (2**55 + 332) * 8 * math.prod(n for n in range(3, 152) if all(n % d for d in range(2, n))) - 1
M = P // 2
SALT = secrets.token_hex()  # nobody can look for a formula that vanishes at our random point


class Residue(NamedTuple):
    """The image of a number: re + im i modulo P for where it is a base, and modulo M for where it is an exponent."""

    re: int
    im: int
    exponent: int

    def __add__(self, other):
        return Residue((self.re + other.re) % P, (self.im + other.im) % P, (self.exponent + other.exponent) % M)

    def __mul__(self, other):
        (a, b, x), (c, d, y) = self, other
        return Residue((a * c - b * d) % P, (a * d + b * c) % P, x * y % M)

    def __pow__(self, n: int):
        (a, b, x), out = self, Residue(1, 0, 1)
        if n < 0:
            norm = (a * a + b * b) % P
            if norm == 0 or x == 0:
                raise NotMath("division by zero")
            inverse = pow(norm, -1, P)
            return Residue(a * inverse % P, -b * inverse % P, pow(x, -1, M)) ** -n
        if b == 0:
            return Residue(pow(a, n, P), 0, pow(x, n, M))
        for bit in f"{n % (P * P - 1):b}":
            out = out * out * (self if bit == "1" else Residue(1, 0, 1))
        return out._replace(exponent=pow(x, n, M))


class Modular:
    """Symbols and whatever else has no value here are random, the same for the same name and arguments."""

    def random(self, *key) -> Residue:
        digest = hashlib.shake_256(repr((SALT, *key)).encode()).digest(80)
        return Residue(pow(int.from_bytes(digest[:40]), 2, P), 0, int.from_bytes(digest[40:]) % M)  # a square, thus positive

    def number(self, value):
        top, bottom = (Residue(n % P, 0, n % M) for n in (value.numerator, value.denominator))
        return top * bottom**-1 if value.denominator > 1 else top

    def symbol(self, name):
        return self.random(name)._replace(**{"re": 0, "im": 1} if name == "i" else {})

    def check(self, value):
        return value

    def power(self, base, exponent, q, root=False):
        if q is not None and q.denominator == 1:
            return base ** int(q)
        positive = pow(base.re, M, P) == 1
        if base.im or not base.re or not (positive or (q and (q.denominator == 2 or q.denominator % 2))):
            return self.random("power", base, exponent)
        base = base if positive else base * self.number(-1)
        value = self.random("power", base.exponent, exponent.exponent)._replace(re=pow(base.re, exponent.exponent, P))
        return value if positive else value * (self.number(-1) if q.denominator % 2 else self.symbol("i")) ** q.numerator

    def call(self, name, values, node):
        if (q := exact(node)) is not None:
            return self.number(q)
        if name in ("sin", "cos"):  # by Euler's formula, so that the theorems on sums and squares hold
            i, minus, half = self.symbol("i"), self.number(-1), self.number(Fraction(1, 2))
            up = self.power(self.symbol("e"), i * values[0], None)
            return (up + up**-1) * half if name == "cos" else (up + minus * up**-1) * half * i**-1
        return self.random(name, *values)


@functools.cache
def context():
    import mpmath

    mp = mpmath.mp.clone()
    mp.dps = 80
    return mp


SPELLED = table("ln log abs fabs binom binomial arcsin asin arccos acos arctan atan")
CALLS = {"sin", "cos", "ln", "abs", "factorial", "binom", "arcsin", "arccos", "arctan", "floor", "ceil"}


class Reals:
    """80 digits at a point {symbol: real value}. Errors are judged by the largest magnitude met on the way."""

    def __init__(self, point):
        self.point, self.largest = point, 1

    def number(self, value):
        return context().mpf(value.numerator) / value.denominator

    def symbol(self, name):
        mp = context()
        return self.point[name] if name in self.point else +{"pi": mp.pi, "e": mp.e, "i": mp.j}.get(name, mp.nan)

    def check(self, value):
        size = abs(value)
        if not size < context().mpf(10) ** 10**6:  # nan, too
            raise Limit("magnitude")
        self.largest = max(self.largest, size)
        return value

    def real(self, value):
        """Where a formula with symbols takes a root, symbolic power or logarithm of a negative number it has no value."""
        return never("negative") if self.point and context().im(value) == 0 and context().re(value) < 0 else value

    def power(self, base, exponent, q, root):
        mp = context()
        if base == 0:
            return mp.mpf(0) if mp.re(exponent) > 0 else never("division by zero")
        if abs(exponent) * (1 + abs(mp.log(abs(base)))) > 2 * 10**6:
            raise Limit("magnitude")
        if q is not None and q.denominator == 1:
            return base ** int(q)
        if q is None and mp.isint(exponent):
            return base ** int(mp.re(exponent))
        if root and q and q.denominator % 2 and mp.im(base) == 0 and mp.re(base) < 0:
            return -((-base) ** exponent)
        return self.real(base) ** exponent

    def call(self, name, values, node):
        mp = context()
        if name in ("ln", "abs"):
            return mp.log(self.real(values[0])) if name == "ln" else abs(values[0])
        if name not in CALLS:  # some function, the same for the same name and arguments
            return mp.mpf(random.Random(" ".join([name, *(mp.nstr(value, 40) for value in values)])).random())
        if any(abs(value) > 10**5 for value in values):
            raise Limit(name)
        return getattr(mp, SPELLED.get(name, name))(*values)


def points(symbols):
    """Points at which formulas are compared. Each symbol is negative at some while the others are not: sqrt(x^2) is not x.
    Some are odd integers, at which a negative number has a power: nor is sqrt(x^2)^n equal to x^n."""
    rng, mp = random.Random(7), context()
    for scale in (0, 0.25, 100) if symbols else (0,):
        for negative in (None, *symbols):
            values = {symbol: rng.uniform(1, 3) * scale if scale else rng.randrange(11, 60, 2) for symbol in symbols}
            yield {symbol: mp.mpf(-value if symbol == negative else value) for symbol, value in values.items()}


def evaluated(node: Node, point):
    """(value, bound of its error), or None where the node has no value or too large a one."""
    domain = Reals(point)
    try:
        return evaluate(node, domain), domain.largest * context().mpf(10) ** -60
    except (NotMath, Limit, ArithmeticError, ValueError):
        return None


def agree(a: Node, b: Node, once: bool) -> bool | None:
    """False if a and b differ at a point by more than rounding can explain, True if not, None if they have no values.
    `once`: one point with values is enough."""
    verdict = None
    for point in points(sorted(names(a) | names(b))):
        x, y = evaluated(a, point), evaluated(b, point)
        if x and y:
            if abs(x[0] - y[0]) > x[1] + y[1]:
                return False
            verdict = True
            if once:
                break
    return verdict


class Sympy:
    def __init__(self):
        import sympy

        self.sympy = sympy

    def number(self, value):
        return self.sympy.Rational(value.numerator, value.denominator)

    def symbol(self, name):
        return {"pi": self.sympy.pi, "e": self.sympy.E, "i": self.sympy.I}.get(name) or self.sympy.Symbol(name)

    def check(self, value):
        return value

    def power(self, base, exponent, q, root):
        if q is not None and max(abs(q.numerator), q.denominator) > 300:
            raise Limit("exponent")
        real = root and base.is_negative and q.denominator % 2
        return self.sympy.real_root(base, 1 / exponent) if real else self.sympy.Pow(base, exponent)

    def call(self, name, values, node):
        if name not in CALLS or any(abs(exact(arg) or 0) > 300 for arg in node.args[1:]):
            raise Limit("call")
        return getattr(self.sympy, {"abs": "Abs", "ceil": "ceiling"}.get(name, SPELLED.get(name, name)))(*values)


def proven(a: Node, b: Node) -> bool:
    """Whether sympy proves a = b. May take long: only for a process that its parent watches."""
    domain = Sympy()
    difference = evaluate(a, domain) - evaluate(b, domain)
    if not difference.free_symbols and difference.is_algebraic:
        x = domain.symbol("x")
        return domain.sympy.minimal_polynomial(difference, x) == x
    return difference.equals(0) is True


# ----------------------------------------------------------------------------------------------------------------------
# Decimals

def rounds_to(node: Node, decimal: Node, digits: int = MIN_DIGITS) -> bool:
    """Whether the decimal is the value of `node` rounded to the digits written, at least `digits` significant ones."""
    value, written, place = decimal.args
    if written < digits or names(node):
        return False
    half = Fraction(10) ** place / 2
    if (rational := exact(node)) is not None:
        return abs(rational - value) <= half
    found, number = evaluated(node, {}), Reals({}).number
    return bool(found) and bool(abs(found[0] - number(value)) + found[1] <= number(half))


# ----------------------------------------------------------------------------------------------------------------------
# Comparison of two shaped trees

TIERS = ("text", "number", "structure", "algebra", "sympy")


def rational(node: Node) -> bool:
    """Whether a tree is a rational function, about which the prime field has the last word."""
    if node.op == "pow" and (exact(node.args[1]) is None or exact(node.args[1]).denominator > 1):
        return False
    return node.op in VALUES - {"call", "root"} and all(map(rational, children(node)))


def renamed(node: Node) -> Node:
    """The same formula in other variables."""
    return sym(node.args[0] + "~") if node.op == "sym" and names(node) else rebuild(node, renamed)


class Comparison:
    def __init__(self, sympy: bool):
        self.sympy, self.tier = sympy, 0

    def used(self, tier: str) -> bool:
        self.tier = max(self.tier, TIERS.index(tier))
        return True

    def same(self, a: Node, b: Node) -> bool:
        kinds = {a.op, b.op}
        if a == b:
            return self.used("text" if a.op == "text" else "number" if a.op in ("num", "dec") else "structure")
        if "named" in kinds:
            return self.named(a, b)
        if kinds <= VALUES:
            return self.value(a, b)
        if "text" in kinds:
            return kinds <= {"text", "sym"} and plain(a.args[0]) == plain(b.args[0]) and self.used("text")
        self.used("structure")
        if kinds <= {"list", "set"} or kinds <= VALUES | {"set"}:  # {5} is 5
            return self.unordered(self.elements(a), self.elements(b))
        if kinds == {"list", "seq"}:
            return self.point(*((a, b) if a.op == "list" else (b, a)))
        if kinds == {"matrix", "seq"}:
            matrix, seq = (a, b) if a.op == "matrix" else (b, a)
            rows = [row.args for row in matrix.args]
            vector = rows[0] if len(rows) == 1 else [row[0] for row in rows] if len(rows[0]) == 1 else []
            return seq.args[0] == "()" and self.ordered(vector, seq.args[1:])
        if a.op != b.op:
            return False
        if a.op == "seq":  # with two ends, perhaps an interval: then the brackets matter
            return (a.args[0] == b.args[0] or len(a.args) > 3) and self.ordered(a.args[1:], b.args[1:])
        if a.op == "rel":
            return self.relations(a, b)
        return (self.unordered if a.op == "union" else self.ordered)(a.args, b.args)

    def elements(self, node: Node) -> list[Node]:
        return list(dict.fromkeys(node.args)) if node.op == "set" else list(node.args) if node.op == "list" else [node]

    def ordered(self, a, b) -> bool:
        return len(a) == len(b) and all(self.same(x, y) for x, y in zip(a, b))

    def unordered(self, a, b) -> bool:
        rest = list(b)
        for x in a if len(a) == len(b) else [None]:
            match = next((i for i, y in enumerate(rest) if x and self.same(x, y)), None)
            if match is None:
                return False
            del rest[match]
        return True

    def point(self, assignments: Node, seq: Node) -> bool:
        """x = 5, y = 3 is the point (5, 3): values in the order of their names."""
        if seq.args[0] != "()" or any(item.op != "named" for item in assignments.args):
            return False
        by_name = {item.args[0]: item.args[1] for item in assignments.args}
        return len(by_name) == len(assignments.args) and self.ordered([by_name[name] for name in sorted(by_name)], seq.args[1:])

    def named(self, a: Node, b: Node) -> bool:
        if a.op == b.op:
            return (a.args[0] == b.args[0] and self.same(a.args[1], b.args[1])) or self.relations(a.args[2], b.args[2])
        name, other = (a, b) if a.op == "named" else (b, a)
        return self.relations(name.args[2], other) if other.op == "rel" else self.same(name.args[1], other)

    def relations(self, a: Node, b: Node) -> bool:
        """Equations up to a factor, inequalities up to a positive one, chains and all else side by side."""
        (ops, *p), (other, *q) = a.args, b.args
        if ops != other or ops in (("in",), ("!=",)):
            return a == b
        if len(ops) > 1 or not {side.op for side in p + q} <= VALUES:
            return self.ordered(p, q)
        f, g = (Node("add", (left, negative(right))) for left, right in (p, q))
        for point in points(sorted(names(f) | names(g))):
            x, y = evaluated(f, point), evaluated(g, point)
            if point and x and y and abs(x[0]) > x[1] and abs(y[0]) > y[1]:
                factor = x[0] / y[0]
                positive = context().im(factor) == 0 and context().re(factor) > 0
                constant = (Node("mul", (f, renamed(g))), Node("mul", (g, renamed(f))))  # f(x) g(y) = g(x) f(y)
                return (ops == ("=",) or positive) and self.identical(*constant)
        return False

    def value(self, a: Node, b: Node) -> bool:
        if "pct" in (a.op, b.op):
            if a.op == b.op:
                return self.value(a.args[0], b.args[0])
            percent, other = (a, b) if a.op == "pct" else (b, a)
            hundredth = Node("mul", (percent.args[0], num(Fraction(1, 100))))
            return self.value(percent.args[0], other) or self.value(hundredth, other)
        x, y = exact(a), exact(b)
        if x is not None and x == y:
            return self.used("number")
        for decimal, other, value in ((a, b, y), (b, a, x)):
            if decimal.op == "dec" and not (value is not None and 10**MAX_CHARS % value.denominator == 0) and not names(other):
                return rounds_to(other, decimal) and self.used("number")
        return (x is None or y is None) and self.identical(a, b)

    def identical(self, a: Node, b: Node) -> bool:
        """Two witnesses: the value in a prime field, where chance is no danger, and real values, where signs are right."""
        x, y = evaluate(a, Modular()), evaluate(b, Modular())
        alike, surely = x[:2] == y[:2], rational(a) and rational(b)
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


# ----------------------------------------------------------------------------------------------------------------------
# Two texts

NEVER = {"", "nan", "undefined", "null", "n / a", "?"}
INTEGER = re.compile(r"[-+]?(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)")


def integer(text: str) -> str | None:
    """The normal form of an integer of any size, as text; None if it is not one."""
    text = text.strip(" $")
    if not INTEGER.fullmatch(text):
        return None
    digits = text.lstrip("+-").replace(",", "").lstrip("0") or "0"
    return "-" * (text[0] == "-" and digits != "0") + digits


def plain(text: str) -> tuple[str, ...]:
    r"""Words and signs of a text, case-blind, without \text{}, dollars, a final stop and the brackets of an option letter."""
    text = re.sub(TEXT, r" \1 ", FONT.sub(r" \1 ", text)).casefold()
    text = re.sub(r"\\[,;:! ]|[$~{}]|\\(?:left|right)(?![a-z])", " ", text)
    words = re.findall(r"[^\W\d_]+|\d+(?:\.\d+)?|\S", re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", text))
    while words and words[-1] in ".,;:":
        words.pop()
    if 1 < len(words) <= 4 and words[0] in ("option", "choice", "answer"):
        words = [word for word in words[1:] if word not in "():"]
    return tuple(words[1:2] if len(words) == 3 and words[0] in "([" and words[2] in ")]" else words)


def power_of_ten(node: Node) -> bool:
    return node.op == "pow" and node.args[0] == num(10) and node.args[1].op == "num"


def written(node: Node) -> bool:
    """Whether a tree is a number with nothing left to carry out: digits, a/b, mixed, percent, or with a power of ten."""
    literal = ("num", "dec")
    if node.op == "mul" and len(node.args) == 2:
        left, right = node.args
        bottom = right.args[0] if right.op == "pow" and right.args[1] == MINUS_ONE else None
        quotient = power_of_ten(right) or (bottom and (bottom.op in literal or power_of_ten(bottom)))
        return bool(left.op in literal and quotient) or (left == MINUS_ONE and written(right))
    return written(node.args[0]) if node.op == "pct" else node.op in literal or power_of_ten(node)


def restated(answer: Node, gold: Node) -> bool:
    """Whether the gold answer is a number and the answer still an exercise: 37 + 48 for 85, sqrt(144) for 12."""
    def alone(node):
        while node.op == "named" or (node.op in ("set", "list") and len(node.args) == 1):
            node = node.args[node.op == "named"]
        return node
    answer, gold = alone(answer), alone(gold)
    rounded = gold.op == "dec" and gold.args[1] >= MIN_DIGITS and exact(answer) is None  # pi for 3.141592654 is no exercise
    return written(gold) and answer.op in VALUES and not written(answer) and not rounded


def usable(text: str) -> bool:
    return " ".join(plain(text)) not in NEVER and bool(re.search(r"[^\W_]|[∞∅]|\\\{\s*\\\}", text))


def compare(answer: str, gold: str, sympy: bool) -> str:
    """The reason of the verdict on one pair of answers: equal:<tier>, wrong, unparsed (no answer) or limit. Raises Undecided
    without `sympy` where only that could tell."""
    x, y = integer(answer), integer(gold)
    if x is not None and y is not None:
        return "equal:number" if x == y else "wrong"
    if max(len(answer), len(gold)) > 10 * MAX_CHARS:
        return "limit"
    if not usable(answer) or not usable(gold):
        return "wrong" if usable(answer) else "unparsed"
    a, b = read(answer), read(gold)
    if isinstance(a, str) or isinstance(b, str):
        return "equal:text" if plain(answer) == plain(gold) else "limit" if a == "limit" else "wrong"
    comparison = Comparison(sympy)
    try:
        if restated(a, b):
            return "wrong"
        if comparison.same(a, b):
            return "equal:" + TIERS[comparison.tier]
    except NotMath:
        pass  # one of them has no value: 1/0
    except (Limit, RecursionError, MemoryError, OverflowError):
        return "limit"
    words = len(answer) > 2 and answer.isalpha() and answer.casefold() == gold.casefold()  # Red and red
    return "equal:text" if words else "wrong"
