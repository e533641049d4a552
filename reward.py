r"""From a model's response and a gold answer to 0 or 1: is the final answer right?

    score(r"... so the area is \boxed{\frac{1}{2}}", "0.5")  ->  1.0

The rules that verdicts follow:

 1. Only the text after the last `</think>` counts; an opened, never closed `<think>` means no answer.
 2. The last complete `\boxed{}` or `\fbox{}` is the answer (boxes joined only by commas or "and" are read as one list).
    Without a box: what follows "the answer is", `####` or `Answer:`, else the last number, kept whole with its sign,
    thousands commas, decimals, a/b or \frac, or with the formula around it. A box that never closes is no answer.
 3. Integers and rationals compare exactly at any size. A decimal is exact if the other side has a finite decimal
    expansion; against any other value it counts if it is that value rounded, to ten or more significant digits.
 4. p% equals p and p/100; p alone does not equal p/100. Trailing units, degree signs and currency are dropped.
 5. Tuples and vectors are ordered; sets, `a, b and c` and lists of tuples are not, but must be complete; +- expands.
 6. Interval ends matter; `x in S`, a chain of inequalities and the interval are one thing; single-letter assignments
    unwrap (x = 5 is 5), but an equation is not its right side; equations are equal up to a non-zero constant factor.
 7. Text compares case-blind without \text{}, option letters with or without brackets. Empty, nan and undefined never
    match anything.
 8. A verdict arrives within 5 s whatever the input, and no text is ever run as code.

How: our own tokenizer and precedence parser turn both sides into small immutable trees; what the grammar does not cover
entirely is text. Then the cheapest test that decides: equal text, exact fractions, the structure of lists, intervals and
matrices, a canonical form (rational functions over Q with radicals and powers), numbers with 80 digits at random points
(they only refute), and last sympy, on objects that we build by calling its constructors. All but the last are bounded by
construction; the last runs in a worker process whose clock and memory its parent watches. The learner searches for holes
here: in doubt the verdict is "wrong".
"""

import atexit
import contextlib
import functools
import itertools
import json
import math
import os
import random
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

MAX_CHARS = 2000  # of an answer that is parsed; a longer one can still be equal as text
MAX_DEPTH = 40  # of brackets, scripts and signs
MAX_BITS = 8192  # of an integer that is computed; a larger power or factorial stays symbolic
MAX_ITEMS = 64  # of a list, set or matrix
MAX_SIGNS = 4  # of +- in one item
FUEL = 20_000  # term products that one comparison may spend on canonical forms
MIN_DIGITS = 10  # significant digits from which a decimal can stand for a value that has no finite expansion
TAIL = 4000  # characters at the end of a response in which its last number is looked for


@dataclass(frozen=True)
class Verdict:
    """`rule` found `extracted`; `reason` is equal:<tier>, wrong, unparsed (no answer), limit, timeout or crash."""

    score: float
    extracted: str | None
    rule: str
    reason: str


class NotMath(Exception):
    """The text is not, or not entirely, an expression of the grammar; or the expression has no value."""


class Limit(Exception):
    """A static bound was passed before the work was done."""


class Undecided(Exception):
    """Only sympy could tell, and it may not run in this process."""


# ----------------------------------------------------------------------------------------------------------------------
# Extraction: each rule is a name that can be left out of `rules`; the first that finds something wins.

ALL = ("think", "boxes", "boxed", "answer_is", "hashes", "answer", "last_number")

BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\\\(?!boxed|fbox)|\\[{}]|[{}]")
BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s*([-+]?\d+(?:\.\d+)?)")
GLUE = re.compile(r"[\s$]*(?:\\[)\]])?[\s$]*(?:[,;]|[,;]?\s*(?:\\text\s*\{)?\s*(?:and|or)\s*\}?)[\s$]*(?:\\[(\[])?[\s$]*")
ANCHORS = {
    "answer_is": re.compile(r"\banswers?(?:\s+to\s+[^.\n]{1,80}?)?\s+(?:is|are)\b(?!\s+not\b)", re.I),
    "hashes": re.compile(r"####"),
    "answer": re.compile(r"\banswers?\s*(?:\*\*|__)?\s*[:=]", re.I),
}
SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n|<\|")
FORMULA = re.compile(r"\$\$([^$]+)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)
NUMBER = re.compile(
    r"(?:(?<![\w.)\]}])[-+−–]\s?)?(?:\\?\$|[€£])?"  # sign and currency
    r"(?:\\[dt]?frac\s?\{-?\d+\}\s?\{\d+\}"
    r"|(?<![\w.^{}\\])(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:\s?/\s?\d+(?![\d.]))?|(?<![\w.])\.\d+)(?:\\?%)?"
)


def extract(response: str, rules=ALL) -> tuple[str | None, str]:
    """The final answer in a response and the name of the rule that found it; (None, "none") without one."""
    text = response
    if "think" in rules:
        text = response.rpartition("</think>")[2]
        if "<think>" in text:
            return None, "none"
    if "boxed" in rules and ("\\boxed" in text or "\\fbox" in text):
        boxes, cut_off = _boxes(text)
        if boxes:
            joined = _joined(text, boxes) if "boxes" in rules else ()
            return (", ".join(joined), "boxes") if len(joined) > 1 else (boxes[-1][2].strip(), "boxed")
        if bare := BARE_BOX.findall(text):
            return bare[-1], "boxed"
        if cut_off:
            return None, "none"
    for rule, anchor in ANCHORS.items():
        found = deque(anchor.finditer(text), maxlen=1) if rule in rules else ()
        if found and (answer := _phrase(text[found[0].end() :])):
            return answer, rule
    if "last_number" in rules and (answer := _last_number(text[-TAIL:])):
        return answer, "last_number"
    return None, "none"


def _boxes(text: str) -> tuple[list[tuple[int, int, str]], bool]:
    """All complete boxes as (start, end, content) in the order in which they close, and whether one stayed open."""
    first = min(i for i in (text.find("\\boxed"), text.find("\\fbox")) if i >= 0)
    stack, done = [], []
    for brace in BRACE.finditer(text, first):
        if brace[0][-1] == "{" and brace[0] != "\\{":
            stack.append(brace if len(brace[0]) > 1 else None)
        elif brace[0] == "}" and stack and (box := stack.pop()):
            done.append((box.start(), brace.end(), text[box.end() : brace.start()]))
    return done, any(stack)


def _joined(text: str, boxes) -> list[str]:
    """The distinct contents of the last boxes, as far back as only a comma or an "and" stands between them."""
    run = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        if box[0] > run[0][0]:
            continue  # nested in the one after it
        if len(run) == MAX_ITEMS or run[0][0] - box[1] > 40 or not GLUE.fullmatch(text, box[1], run[0][0]):
            break
        run.insert(0, box)
    return list(dict.fromkeys(content.strip() for _, _, content in run))


def _phrase(text: str) -> str | None:
    """The answer that `text` begins with: a formula, the sentence if it reads as mathematics, or a number in it."""
    text = text[:MAX_CHARS].lstrip(" \t\r\n:=*_")
    formula = FORMULA.match(text)
    if formula and formula[0].startswith(("$$", "\\[")):
        return formula[formula.lastindex].strip()
    end = SENTENCE_END.search(text)
    sentence = (text[: end.start()] if end else text).strip(" \t*_.,;:!")
    if not sentence or is_math(sentence):
        return sentence or None
    if formula and ("\\" in formula[0] or is_math(formula[formula.lastindex])):
        return formula[formula.lastindex].strip()
    numbers = _numbers(sentence) if not re.search(r"[\\_{}\[\]]", sentence) else []  # no digit out of a broken formula
    return (numbers[0] if numbers[0].start() == 0 else numbers[-1])[0].strip() if numbers else sentence


def _last_number(text: str) -> str | None:
    numbers = _numbers(text, max(0, len(text) - 300)) or _numbers(text)
    formulas = [f for f in FORMULA.finditer(text) if re.search(r"\d", f[0])]
    if formulas and (not numbers or formulas[-1].end() > numbers[-1].start()):
        content = formulas[-1][formulas[-1].lastindex]
        if "\\" in content or is_math(content):  # $5 and $6 are two prices, no formula
            return re.split(r"(?<![<>!\\])=|\\approx(?![a-z])", content)[-1].strip(" .,;")
    return numbers[-1][0].strip() if numbers else None


def _numbers(text: str, start: int = 0) -> list[re.Match]:
    """The numbers that stand alone: not the head of 3x, 2^10 or 7!, though 5cm is fine."""
    def alone(number):
        after = re.match(r"[A-Za-z]+|[\^_(!\\{].?", text[number.end() : number.end() + 20])
        return not after or after[0] in UNITS or after[0] in ("\\)", "\\]", "\\$", "\\ ", "(")
    return [number for number in NUMBER.finditer(text, start) if alone(number)]


# ----------------------------------------------------------------------------------------------------------------------
# Text to tokens

def words(text: str) -> list[str]:
    return text.split()


def table(text: str) -> dict[str, str]:
    return dict(zip(words(text)[::2], words(text)[1::2]))


GREEK = words("""alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigmaf sigma tau
    upsilon phi chi psi omega""")
SIGNS = table(r"""− - – - — - ∗ * ÷ / ⁄ / ∕ / × \times · \cdot ⋅ \cdot √ \sqrt ∞ \infty ≤ \le ⩽ \le ≥ \ge ⩾ \ge ≠ \ne ≈
    \approx ± \pm ∓ \mp ∪ \cup ∩ \cap ∈ \in ∅ \emptyset ∖ \setminus ℝ \mathbb{R} ℤ \mathbb{Z} ℕ \mathbb{N} ℚ \mathbb{Q} °
    ^\circ ∠ \angle … \ldots ⋯ \ldots ⟨ \langle ⟩ \rangle ⌊ \lfloor ⌋ \rfloor ⌈ \lceil ⌉ \rceil ∣ | € $ £ $ ¥ $ ′ ' ’ ' ″ '' ½
    \frac{1}{2} ⅓ \frac{1}{3} ⅔ \frac{2}{3} ¼ \frac{1}{4} ¾ \frac{3}{4} ⅛ \frac{1}{8}""")
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
    r"|boxed|fbox|mathop|rm|bf|vec|overrightarrow|mathcal|hat|pounds|euro|enspace|thinspace)(?![A-Za-z]))"
    rf"|(?P<text>{TEXT})"
    r"|(?P<begin>\\begin\s*\{\w+\*?\}(?:\{[clr|]*\})?)|(?P<fin>\\end\s*\{\w+\*?\})"
    r"|(?P<based>(?<![A-Za-z])[0-9A-Z]*\d[0-9A-Z]*_(?:\{(?:\\text\{)?\(?\d{1,2}\)?\}?\}|\d{1,2}(?!\d)))"
    r"|(?P<rep>\d*\.\d*\\(?:overline|bar|dot)\s*\{\d+\})"
    r"|(?P<num>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+(?![\w.^]))?)"
    r"|(?P<cmd>\\(?:mathbb\s*\{?\s*[A-Z]\}?|[A-Za-z]+|.))"
    r"|(?P<word>[A-Za-z]+)"
    r"|(?P<op><=|>=|!=|==|:=|\*\*|\.\.\.|.)",
    re.S | re.A,
)
ALIAS = table(r"""dfrac frac tfrac frac cfrac frac dbinom binom tbinom binom le <= leq <= leqslant <= geqslant >= ge >=
    geq >= lt < gt > ne != neq != times * cdot * ast * div / lbrace \{ rbrace \} langle ( rangle ) lbrack [ rbrack ] lvert |
    rvert | vert | mid | lVert | rVert | arctg arctan tg tan ctg cot land and lor or wedge and vee or ldots ... dots
    ... cdots ... simeq approx backslash setminus degree circ textdegree circ varepsilon epsilon varphi phi vartheta theta
    prime ' equiv = \ row newline row varnothing emptyset ** ^ == = := = ; , asin arcsin acos arccos atan arctan infinity
    infty inf infty oo infty""")
FUNCTIONS = set(words("""sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth log lg ln exp
    abs floor ceil min max gcd lcm"""))
NAMES = set(GREEK) | {name.capitalize() for name in GREEK} | {"infty", "ell", "hbar", "emptyset", "odot", "mho"}
WORDS = set(words("""yes no odd even true false not none all any both the is are at if to of one two six ten red am pm mon
    tue wed thu fri sat sun may jan feb mar apr jun jul aug sep oct nov dec"""))
STOP = set(words("""and or not no yes none all any both the is are if to one two six ten am pm more less least most than
    except but plus minus times over squared cubed about around between either neither nor maybe possible possibly only
    wrong from until approximately nothing solution solutions with without where when which that then to of out
    base mod negative half halves third thirds quarter quarters fifth fifths tenth tenths hundredth hundredths factorial"""))
SCALE = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
UNITS = set(words("""cm mm km dm nm kg mg lb lbs oz ft in inch inches foot feet yd yard yards mile miles mi mph kph kmh hr
    hrs hour hours min mins minute minutes sec secs second seconds ms day days week weeks month months year years yr degree
    degrees deg rad rads radian radians cent cents dollar dollars usd USD euro euros pound pounds rupees yuan pence percent
    unit units square cubic sq cu meter meters metre metres centimeter centimeters centimetre centimetres kilometer
    kilometers millimeter millimeters liter liters litre litres ml gallon gallons gram grams kilogram kilograms ton tons
    joule joules kJ eV Hz kHz MHz GHz Pa kPa atm mol moles kcal cal kelvin newton newtons watt watts volt volts ohm ohms amp
    amps erg ergs men boys girls cats dogs pens cups kids eggs cars way ways bit bits byte bytes people step steps point
    points pt pts item items per each"""))
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
    r"""(kind, value) pairs; kinds: num rep based fn sym word unit text begin fin, and operators and commands as themselves."""
    tokens, formula = [], re.search(r"[-+*/^=<>_\\]", text)
    for match in TOKEN.finditer(text):
        kind, value = match.lastgroup, match[0]
        if kind in ("cmd", "op"):
            name = value[1:] if kind == "cmd" and value not in ("\\{", "\\}") else value
            name = ALIAS.get(name, name)
            if name.startswith("mathbb"):
                tokens.append(("sym", "mathbb" + name.rstrip("} ")[-1]))
            else:
                tokens.append(("fn" if name in FUNCTIONS else "sym" if name in NAMES else name, name))
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
    if word in ("and", "or", "in", "sqrt", "cbrt", "binom"):
        return [(word, word)]
    if word in FUNCTIONS or word in NAMES:
        return [("fn" if word in FUNCTIONS else "sym", word)]
    if lower in SCALE or word in UNITS or (len(word) > 3 and lower in UNITS):
        return [("unit", word)]
    for head in ("sin", "cos", "tan", "cot", "log", "ln", "pi"):
        if word.startswith(head) and len(word) == len(head) + 1:  # sinx
            return [("fn" if head != "pi" else "sym", head), ("sym", word[-1])]
    if len(word) > 3 or (len(word) == 3 and (word.isupper() or lower in WORDS)) or (lower in WORDS and not formula):
        return [("word", word)]
    return [("sym", letter) for letter in word]


# ----------------------------------------------------------------------------------------------------------------------
# Tokens to a tree: statement (relations) > union > sum > product (also by juxtaposition) > power > atom

class Node(NamedTuple):
    """num (Fraction) - dec (Fraction, significant digits, place of the last) - sym (name) - text (words) - add mul pow root
    pct (nodes) - pm (sign, node) - call (function, nodes) - list either set union cap setminus matrix row builder (nodes) -
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


MINUS_ONE = num(-1)
PLUS_INFINITY, MINUS_INFINITY = sym("infty"), negative(sym("infty"))

RELATIONS = {"=", "<", ">", "<=", ">=", "!=", "in", "approx"}
SEPARATORS = {",", "and", "or"}
CLOSERS = {")", "]", "}", "\\}", "end", "rfloor", "rceil", "fin", "row", "&"}
UNIT_ENDS = CLOSERS | SEPARATORS | RELATIONS | {"|"}
ACCENTS = {"overline", "bar", "dot", "ddot", "angle", "triangle"}
JUXTAPOSED = ACCENTS | {"sym", "fn", "frac", "sqrt", "cbrt", "binom", "(", "[", "{", "\\{", "lfloor", "lceil", "begin", "..."}
TRIG = {"sin", "cos", "tan", "cot", "sec", "csc"}


class Parser:
    def __init__(self, tokens):
        self.tokens, self.at, self.depth = tokens + [("end", "")] * 4, 0, 0
        self.bars = True  # whether a bar may open |x| where a product could go on
        self.degrees = False  # inside the argument of sin, cos, ...: 30^\circ is pi/6

    @property
    def kind(self) -> str:
        return self.tokens[self.at][0]

    def next(self) -> tuple[str, str]:
        token = self.tokens[self.at]
        if token[0] == "end":
            raise NotMath("ends too early")
        self.at += 1
        return token

    def eat(self, *kinds) -> str | None:
        return self.next()[0] if self.kind in kinds else None

    def expect(self, *kinds) -> str:
        return self.eat(*kinds) or never(f"{kinds} wanted, {self.kind} found")

    @contextlib.contextmanager
    def inside(self, **state):
        """One level deeper; attributes named in `state` hold for this level only."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Limit("depth")
        before = {name: getattr(self, name) for name in state}
        vars(self).update(state)
        yield
        vars(self).update(before)
        self.depth -= 1

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
        if self.kind in ("word", "text") and self.tokens[self.at + 1][0] in ("=", ":"):
            self.at += 2  # Area = 12
        sides, ops = [self.union()], []
        while self.kind in RELATIONS:
            ops.append(self.next()[0])
            sides.append(self.union())
        return Node("rel", (tuple(ops), *sides)) if ops else sides[0]

    def union(self) -> Node:
        node = self.sum()
        while op := self.eat("cup", "cap", "setminus"):
            node = Node("union" if op == "cup" else op, (node, self.sum()))
        return node

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
                return product([*factors, num(self.units())])
            elif self.kind in JUXTAPOSED or (self.kind == "|" and self.bars) or (self.kind == "num" and self.power_ahead()):
                factors.append(self.power())
            else:
                return product(factors)

    def power_ahead(self) -> bool:
        """n 2^n and (n-2) 2^n: a number is a right factor only after a bracket, or with an exponent of its own."""
        before, after = self.tokens[self.at - 1][0], self.tokens[self.at + 1][0]
        return before == ")" or (before == "sym" and after == "^")

    def unit_ahead(self, factors) -> bool:
        """A unit can follow a value that stands by itself or in a list; an unknown word or "in" only a number."""
        if self.depth > 1 or self.kind not in ("unit", "text", "word", "in"):
            return False
        if self.kind == "in" and self.tokens[self.at + 1][0] not in UNIT_ENDS | {"^", "."}:
            return False
        return self.kind in ("unit", "text") or exact(product(factors)) is not None

    def units(self) -> int:
        """Skips what may follow a value at its end, `kcal m^{-2} yr^{-1}`; returns the factor of million and the like."""
        scale, count = 1, 0
        while self.kind in ("unit", "text", "word", "in"):
            for word in self.next()[1].split():
                word = word.strip("().,/~").lower()
                if word in STOP or not re.fullmatch(r"[a-z][a-z0-9/^\-']*", word):
                    raise NotMath("prose")
                scale *= SCALE.get(word, 1)
                count += 1
            if self.eat("^"):
                self.script()
            if self.tokens[self.at + 1][0] in ("unit", "text", "word"):
                self.eat("/", "*")
        if count > 4 or self.kind not in UNIT_ENDS:
            raise NotMath("a unit inside an expression")
        return scale

    def signed(self) -> Node:
        sign = self.eat("-", "+")
        if not sign:
            return self.power()
        with self.inside():
            return negative(self.signed()) if sign == "-" else self.signed()

    def power(self) -> Node:
        node = self.atom()
        while op := self.eat("!", "%", "circ", "^"):
            if op == "!":
                node = Node("call", ("factorial", node))
            elif op == "%":
                node = Node("pct", (node,))
            else:
                node = self.exponent(node) if op == "^" else self.degree(node)
        return node

    def degree(self, node: Node) -> Node:
        return Node("mul", (node, sym("pi"), num(Fraction(1, 180)))) if self.degrees else node

    def exponent(self, base: Node) -> Node:
        ahead = [kind for kind, _ in self.tokens[self.at : self.at + 3] if kind != "{"]
        if ahead[0] == "circ":
            self.raw_script()
            return self.degree(base)
        if ahead[0] == "'":  # derivative of a symbol, or minutes and seconds of arc
            primes = self.raw_script()
            return sym(base.args[0] + primes) if base.op == "sym" else base
        power = self.script()
        if base.op == "sym" and re.fullmatch(r"C_\d+", base.args[0]) and power.op == "num":
            return Node("call", ("binom", num(int_of(base.args[0][2:])), power))  # C_n^k
        return Node("pow", (base, power))

    def script(self) -> Node:
        """What ^, _ or a command takes: a group, or one token with its sign."""
        with self.inside():
            if sign := self.eat("-", "+"):
                return negative(self.script()) if sign == "-" else self.script()
            node = number(self.next()[1]) if self.kind in ("num", "rep") else self.atom()
            return Node("pow", (node, self.script())) if self.eat("^") else node

    def raw_script(self) -> str:
        r"""The same as text, for names such as m_{\max}."""
        kind, value = self.next()
        if kind != "{":
            return value
        level, values = 1, []
        while level:
            kind, value = self.next()
            level += (kind == "{") - (kind == "}")
            values.append(value)
        return "".join(values[:-1])

    def argument(self) -> Node:
        r"""The argument of \frac and \sqrt: a group, one token, or for \frac one digit of a number (\frac12)."""
        with self.inside():
            return number(self.next()[1]) if self.kind in ("num", "rep") else self.atom()

    def digit(self) -> Node:
        kind, value = self.tokens[self.at]
        if kind == "num" and len(value) > 1 and value.isdigit():
            self.tokens[self.at] = ("num", value[1:])
            return num(int(value[0]))
        return self.argument()

    def atom(self) -> Node:
        with self.inside():
            kind, value = self.next()
            if kind in ("num", "rep"):
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
            if kind == "cbrt":
                return Node("root", (self.argument(), num(3)))
            if kind == "fn":
                return self.function(value)
            if kind == "binom":
                return Node("call", ("binom", self.digit(), self.digit()))
            if kind == "|":
                with self.inside(bars=False):
                    node = Node("call", ("abs", self.sum()))
                self.expect("|")
                return node
            if kind in ("lfloor", "lceil"):
                node = Node("call", (kind[1:], self.sum()))
                self.expect("r" + kind[1:])
                return node
            if kind == "begin":
                return self.matrix(value)
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
        return Node("add" if literal and 0 < (exact(part) or 0) < 1 else "mul", (whole, part))

    def fraction(self) -> Node:
        start, top, middle, bottom = self.at, self.digit(), self.at, self.digit()
        names = [[t for t in self.tokens[a:b] if t[0] not in "{}"] for a, b in ((start, middle), (middle, self.at))]
        d = names[1][:1]
        if d in ([("sym", "d")], [("partial", "partial")]) and names[0][:1] == d and "sym" in [k for k, _ in names[1][1:2]] \
                and [k for k, _ in names[1][2:]] in ([], ["^", "num"]):
            return sym("/".join("".join(value for _, value in part) for part in names))  # dy/dx: the d's do not cancel
        return Node("mul", (top, Node("pow", (bottom, MINUS_ONE))))

    def symbol(self, name: str) -> Node:
        while op := self.eat("_", "'"):
            name += op + self.raw_script() if op == "_" else op
        if self.kind == "(" and name in "fghFGHPQIupq" and self.tokens[self.at + 2][0] == ")":
            self.next()
            argument = self.sum()
            self.expect(")")
            return Node("call", ("apply " + name, argument))
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
        if name in ("log", "lg"):  # a bare log has some base, the same everywhere: log 8 = 3 log 2, but not ln 8
            base = base or (num(10) if name == "lg" else sym("log"))
        with self.inside(degrees=name in TRIG, bars=True):
            if self.eat("("):
                items = self.items()
                self.expect(")")
            else:  # \sin 2\pi t: the product up to the next sign, function or bracket
                factors = [self.signed()]
                while self.kind in JUXTAPOSED - {"fn", "(", "["}:
                    factors.append(self.power())
                items = (product(factors),)
        if name in ("min", "max", "gcd", "lcm"):
            items = tuple(sorted(items, key=repr))
        elif len(items) != 1:
            raise NotMath("arguments")
        if power == MINUS_ONE and name in TRIG:
            name, power = "arc" + name, None
        if name == "exp":
            node = Node("pow", (sym("e"), *items))
        else:
            node = Node("call", ("log", *items, base) if base else (name, *items))
        return Node("pow", (node, power)) if power else node

    def bracket(self, opening: str) -> Node:
        set_braces = opening == "\\{"
        if set_braces and self.eat("\\}"):
            return Node("set", ())
        self.bars, bars = not set_braces, self.bars
        items = self.items()
        self.bars = True
        if set_braces and len(items) == 1 and self.eat("|", ":"):
            items = Node("builder", (items[0], self.listing()))
        self.bars = bars
        closing = self.expect(*{"\\{": ["\\}"], "{": ["}"]}.get(opening, [")", "]"]))
        if isinstance(items, Node):
            return items
        if set_braces or (opening == "{" and len(items) > 1):
            return Node("set", items)
        if len(items) == 1 and opening + closing in ("()", "[]", "{}"):
            if opening == "(" and items[0].op == "num" and self.eat("_"):  # (52)_8
                return sym(f"{items[0].args[0]}_{self.raw_script()}")
            return items[0]
        if opening + closing == "[]" and len({(i.op, len(i.args), i.args[0]) for i in items}) == 1 and items[0].args[0] == "[]":
            return Node("matrix", tuple(Node("row", row.args[1:]) for row in items))
        return Node("seq", (opening + closing, *items))

    def matrix(self, value: str) -> Node:
        if not re.search(r"\{([pbB]?matrix|array|smallmatrix)", value):
            raise NotMath(value)
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


def never(what: str):
    raise NotMath(what)


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
    return Node("dec", (value, len(str(digits)), place)) if point or exponent else Node("num", (value,))


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

def children(node: Node) -> list[Node]:
    return [arg for arg in node.args if isinstance(arg, Node)]


def rebuild(node: Node, new) -> Node:
    """`node` with its children replaced in order."""
    new = iter(new)
    return Node(node.op, tuple(next(new) if isinstance(arg, Node) else arg for arg in node.args))


def count(node: Node, op: str | None = None) -> int:
    return (op is None or node.op == op) + sum(count(child, op) for child in children(node))


@functools.lru_cache(maxsize=8192)
def names(node: Node) -> frozenset:
    """The variables in a tree."""
    if node.op == "sym":
        return frozenset(node.args) - {"pi", "e", "i", "infty"}
    return frozenset().union(*(names(child) for child in children(node)))


def is_name(node: Node) -> bool:
    return node.op == "sym" and bool(names(node)) and node.args[0] != "..."


def interval(low: Node, high: Node, closed_low=False, closed_high=False) -> Node:
    return Node("seq", ("(["[closed_low and low != MINUS_INFINITY] + ")]"[closed_high and high != PLUS_INFINITY], low, high))


REALS = interval(MINUS_INFINITY, PLUS_INFINITY)


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
        if variable.op == "rel" and variable.args[0] == ("in",):
            variable = variable.args[1]
        conditions = conditions.args if conditions.op in ("list", "either") else [conditions]
        conditions = [shape(c) for c in conditions if c != Node("rel", (("in",), variable, sym("mathbbR")))]
        if len(conditions) == 1 and conditions[0].op == "named" and sym(conditions[0].args[0]) == variable:
            value = conditions[0].args[1]
            return value if as_set(value) else Node("set", (value,))
        return Node("builder", (variable, Node("list", tuple(sorted(conditions, key=repr)))))
    if op == "union":
        return Node("union", tuple(part for arg in map(shape, args) for part in (arg.args if arg.op == "union" else [arg])))
    if op == "setminus":
        whole, points = map(shape, args)
        return holes(points.args) if whole == REALS and points.op == "set" and points.args else Node(op, (whole, points))
    if op == "sym":
        return {"mathbbR": REALS, "emptyset": Node("set", ())}.get(args[0], node)
    return rebuild(node, map(shape, children(node))) if op in ("seq", "set", "matrix", "row", "cap") else node


def as_set(node: Node) -> Node | None:
    if node.op == "named":
        return as_set(node.args[1])
    return node if (node.op == "seq" and len(node.args) == 3) or node.op in ("set", "union") else None


def both_signs(node: Node) -> list[Node]:
    """The two readings of an item with +-, all upper signs and all lower signs; an item without stays itself."""
    def pick(node, upper):
        if node.op != "pm":
            return rebuild(node, [pick(child, upper) for child in children(node)])
        inner = pick(node.args[1], upper)
        return inner if (node.args[0] == "pm") == upper else negative(inner)
    return [pick(node, True), pick(node, False)] if count(node, "pm") else [node]


def holes(points) -> Node:
    """The real line without some rational points, as a union of open intervals."""
    if any(exact(point) is None for point in points):
        raise NotMath("hole")
    ends = [MINUS_INFINITY, *sorted(points, key=exact), PLUS_INFINITY]
    return Node("union", tuple(interval(low, high) for low, high in itertools.pairwise(ends)))


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
    if ops == ("!=",) and is_name(left) and exact(right) is not None:
        return Node("named", (left.args[0], holes([right]), node))
    if ops == ("approx",) and right.op == "dec" and rounds_to(left, right, 1):
        return left
    if set(ops) == {"="}:
        if len(sides) > 2:  # x = 3/2 = 1.5
            chain = is_name(left) and all(same(right, side) for side in sides[2:])
            return relation(Node("rel", (("=",), left, right))) if chain else node
        if is_name(left) and left.args[0] not in names(right):
            curve = {"x", "y", "z"}  # y = 2x + 3 is a line, not its right side
            return node if left.args[0] in curve and names(right) & curve else Node("named", (left.args[0], right, node))
        if left.op == right.op == "seq" and all(map(is_name, left.args[1:])):
            return Node("named", (" ".join(part.args[0] for part in left.args[1:]), right, node))
        return node
    if set(ops) <= {"<", "<="}:
        readings = {1: [(MINUS_INFINITY, left, right), (left, right, PLUS_INFINITY)], 2: [sides]}
        for low, middle, high in readings.get(len(ops), ()):
            if is_name(middle) and not names(low) | names(high):
                return Node("named", (middle.args[0], interval(low, high, ops[0] == "<=", ops[-1] == "<="), node))
        return node
    raise NotMath("relation")


# ----------------------------------------------------------------------------------------------------------------------
# Exact numbers

def bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def exact(node: Node) -> Fraction | None:
    """The value of a tree of rationals; None for any other, and for one of more than MAX_BITS."""
    op, args = node
    if op in ("num", "dec"):
        return args[0]
    values = [exact(child) for child in children(node)] if op in ("add", "mul", "pow", "pct", "call") else [None]
    if None in values:
        return None
    if op == "pow":
        return rational_power(values[0], values[1].numerator) if values[1].denominator == 1 else None
    if op == "pct":
        return values[0] / 100
    if op == "call":
        return EXACT_CALLS[args[0]](*values) if args[0] in EXACT_CALLS else None
    total = values[0]
    for value in values[1:]:
        total = total + value if op == "add" else total * value
        if bits(total) > MAX_BITS:
            return None
    return total


def rational_power(base: Fraction, power: int) -> Fraction | None:
    """base^power, None beyond MAX_BITS: the size is estimated before anything is computed."""
    if base == 0 and power < 0:
        raise NotMath("division by zero")
    if base in (0, 1, -1):
        return base ** (power % 2 or (power != 0) * 2)
    return base**power if bits(base) * abs(power) <= MAX_BITS else None


def _factorial(n):
    return Fraction(math.factorial(n.numerator)) if n.denominator == 1 and 0 <= n <= 900 else None


def _binomial(n, k):
    whole = n.denominator == k.denominator == 1 and 0 <= k <= n <= MAX_BITS
    return Fraction(math.comb(n.numerator, k.numerator)) if whole else None


EXACT_CALLS = {"factorial": _factorial, "binom": _binomial, "abs": abs, "floor": lambda x: Fraction(math.floor(x)),
               "ceil": lambda x: Fraction(math.ceil(x)), "min": lambda *x: min(x), "max": lambda *x: max(x)}


def decimal_of(node: Node) -> Node | None:
    """The decimal literal that a node consists of; 3.1 x 10^-5 is one, too."""
    if node.op == "mul" and len(node.args) == 2 and node.args[0].op == "dec" and node.args[1].op == "pow":
        (value, digits, place), (base, power) = node.args[0].args, (exact(arg) for arg in node.args[1].args)
        if base == 10 and power is not None and power.denominator == 1 and abs(power) <= MAX_CHARS:
            return Node("dec", (value * Fraction(10) ** power.numerator, digits, place + power.numerator))
    return node if node.op == "dec" else None


def rounds_to(node: Node, decimal: Node, digits: int = MIN_DIGITS) -> bool:
    """Whether the decimal is the value of `node` rounded to the digits written, at least `digits` significant ones."""
    value, written, place = decimal.args
    if written < digits or names(node):
        return False
    half = Fraction(10) ** place / 2
    if (rational := exact(node)) is not None:
        return abs(rational - value) <= half
    try:
        approx, error = Numeric({}).value(node)
    except (Limit, NotMath, ArithmeticError, ValueError):
        return False
    mp = context()
    return bool(abs(approx - mp.mpf(value.numerator) / value.denominator) + error <= mp.mpf(half.numerator) / half.denominator)


# ----------------------------------------------------------------------------------------------------------------------
# Canonical form

ONE = {(): Fraction(1)}
ODD, EVEN = {"sin", "arcsin", "arctan", "sinh", "tanh"}, {"cos", "cosh", "abs"}


class Algebra:
    """Ratios (numerator, denominator) of polynomials over Q. A polynomial is {monomial: coefficient}, a monomial is
    ((generator, exponent), ...) with positive rational exponents. Generators are symbols, "#p" for the roots of a prime p, and
    "~..." for what is opaque, such as sin(key) or the root of a polynomial. Equal forms are equal; different ones differ unless
    `opaque` has something. Symbols under a root are taken as positive, sqrt(xy) = sqrt(x) sqrt(y), yet sqrt(x^2) is opaque."""

    def __init__(self):
        self.fuel, self.opaque = FUEL, {}  # opaque generator -> (polynomial, n) if its n-th power is that polynomial

    def equal(self, a: Node, b: Node) -> bool:
        (n1, d1), (n2, d2) = self.ratio(a), self.ratio(b)
        return self.times(n1, d2) == self.times(n2, d1)

    def factor(self, a: Node, b: Node) -> Fraction | None:
        """The constant c != 0 with a = c b, if there is one."""
        (n1, d1), (n2, d2) = self.ratio(a), self.ratio(b)
        p, q = self.times(n1, d2), self.times(n2, d1)
        quotients = {p[m] / q[m] for m in p} if p.keys() == q.keys() else ()
        return quotients.pop() if len(quotients) == 1 else None

    def burn(self, amount: int) -> None:
        self.fuel -= amount
        if self.fuel < 0:
            raise Limit("fuel")

    # polynomials

    def plus(self, p, q):
        self.burn(1 + len(q))
        out = dict(p)
        for m, c in q.items():
            out[m] = out.get(m, 0) + c
        return {m: c for m, c in out.items() if c}

    def times(self, p, q):
        if p == ONE or q == ONE:
            return q if p == ONE else p
        out = {}
        for m, a in p.items():
            for n, b in q.items():
                self.burn(1 + (bits(a) + bits(b)) // 256)
                exponents = dict(m)
                for g, e in n:
                    exponents[g] = exponents.get(g, 0) + e
                for mono, c in self.reduced(exponents).items():
                    out[mono] = out.get(mono, 0) + a * b * c
        return {m: c for m, c in out.items() if c}

    def reduced(self, exponents):
        """A monomial as a polynomial in which i^2, sqrt(2)^2, sin^2 and the like are worked out."""
        coefficient, factors = Fraction(1), []
        for g, e in exponents.items():
            if g == "i" and e > 1:
                coefficient *= -1 if e % 4 > 1 else 1
                exponents[g] = e % 2
            elif g[0] == "#" and not 0 <= e < 1:
                power = rational_power(Fraction(int(g[1:])), math.floor(e))
                if power is None:
                    raise Limit("bits")
                coefficient *= power
                exponents[g] = e % 1
            elif g[0] == "~" and e >= 1 and self.opaque[g]:
                polynomial, n = self.opaque[g]
                if e // n > 50:
                    raise Limit("power")
                factors += [polynomial] * (e // n)
                exponents[g] = e % n
        out = {tuple(sorted((g, e) for g, e in exponents.items() if e)): coefficient}
        for polynomial in factors:
            out = self.times(out, polynomial)
        return out

    def key(self, r) -> str:
        """A name for a ratio."""
        bottom = r[1]
        lead = bottom[min(bottom)]
        texts = [" ".join(f"{c / lead}*{m}" for m, c in sorted(p.items())) for p in r]
        return texts[0] if len(bottom) == 1 and () in bottom else "/".join(texts)

    # ratios

    def product(self, r, s):
        return self.times(r[0], s[0]), self.times(r[1], s[1])

    def invert(self, r):
        return (r[1], r[0]) if r[0] else never("division by zero")

    def constant(self, c):
        return ({(): c} if c else {}), ONE

    def rational(self, r) -> Fraction | None:
        top, bottom = r
        return top.get((), Fraction(0)) / bottom[()] if top.keys() <= {()} and bottom.keys() == {()} else None

    def generator(self, name: str, power=None):
        self.opaque.setdefault("~" + name, power)
        return {(("~" + name, 1),): Fraction(1)}, ONE

    def ratio(self, node: Node):
        """The ratio that a tree stands for; Limit where it grows too large."""
        op, args = node
        self.burn(1)
        if op in ("num", "dec"):
            return self.constant(args[0])
        if op == "sym":
            return {((args[0], 1),): Fraction(1)}, ONE
        if op == "call":
            return self.call(args[0], args[1:])
        if op not in ("add", "mul", "pow", "root", "pct"):
            raise NotMath(op)
        first, *rest = (self.ratio(arg) for arg in args)
        if op == "pct":
            return self.product(first, self.constant(Fraction(1, 100)))
        if op in ("pow", "root"):
            return self.power(first, rest[0] if op == "pow" else self.invert(rest[0]))
        for r in rest:
            if op == "mul":
                first = self.product(first, r)
            elif first[1] == r[1]:
                first = self.plus(first[0], r[0]), r[1]
            else:
                first = self.plus(self.times(first[0], r[1]), self.times(r[0], first[1])), self.times(first[1], r[1])
        return first

    def power(self, base, exponent):
        q = self.rational(exponent)
        if q is None:
            return self.symbolic_power(base, exponent)
        if q < 0:
            base, q = self.invert(base), -q
        out = self.whole_power(base, math.floor(q))
        if q % 1:
            root = tuple(self.root(p, (q % 1).denominator) for p in base)
            out = self.product(out, self.whole_power(root, (q % 1).numerator))
        return out

    def whole_power(self, base, n: int):
        if (value := self.rational(base)) is not None:
            value = rational_power(value, n)
            if value is not None:
                return self.constant(value)
        elif len(base[0]) == len(base[1]) == 1 and n <= 10**6:
            return tuple(self.monomial_power(p, n) for p in base)
        elif n <= 64:
            out = ONE, ONE
            for bit in f"{n:b}":
                out = self.product(out, out)
                out = self.product(out, base) if bit == "1" else out
            return out
        return self.generator(f"pow({self.key(base)},{n})")  # too large to compute, yet equal towers are equal

    def monomial_power(self, p, n):
        ((mono, c),) = p.items()
        c = rational_power(c, n)
        if c is None:
            raise Limit("bits")
        return self.times({(): c}, self.reduced({g: e * n for g, e in mono}))

    def root(self, p, k: int):
        """The k-th root of a polynomial."""
        if p in ({}, ONE):
            return p
        q = Fraction(1, k)
        if len(p) == 1:
            ((mono, c),) = p.items()
            if all(g[0] == "#" or g in ("pi", "e") or (g.startswith("~pow") and c > 0)
                   or (Fraction(e).numerator % 2 and g[0] != "~" and g != "i") for g, e in mono):
                return self.times(self.rational_root(c, k), self.reduced({g: e * q for g, e in mono}))
        content = Fraction(math.gcd(*(c.numerator for c in p.values())), math.lcm(*(c.denominator for c in p.values())))
        inner = {m: c / content for m, c in p.items()}
        top, _ = self.generator(f"root({self.key((inner, ONE))},{k})", (inner, k))
        return self.times(self.rational_root(content, k), top)

    def rational_root(self, c: Fraction, k: int):
        """By prime factors; odd roots of negative numbers are real, sqrt(-1) is i."""
        if c < 0 and k % 2 == 0 and k > 2:
            raise NotMath("root")
        sign = ONE if c > 0 else {(("i", 1),): Fraction(1)} if k == 2 else {(): Fraction(-1)}
        return self.times(sign, self.reduced({f"#{prime}": e * Fraction(1, k) for prime, e in self.factors(abs(c)).items()}))

    def factors(self, c: Fraction) -> dict[int, int]:
        """Prime factors with their exponents, by trial division up to 2000; a larger rest counts as one prime."""
        out = {}
        for n, sign in ((c.numerator, 1), (c.denominator, -1)):
            p = 2
            while p * p <= n and p < 2000:
                while n % p == 0:
                    n, out[p] = n // p, out.get(p, 0) + sign
                p += 1 + p % 2
            self.burn(n.bit_length() // 8 + p // 50)
            if n > p * p:
                self.opaque.setdefault("~rest", None)  # perhaps no prime: different forms may still be equal
            root = math.isqrt(n)
            if n > 1:
                out[root if root * root == n else n] = sign * (2 if root * root == n else 1)
        return out

    def symbolic_power(self, base, exponent):
        """base^(sum of c m): for each monomial m a generator base^m, with the exponent c."""
        top, bottom = exponent
        if bottom.keys() != {()}:
            return self.generator(f"pow({self.key(base)},{self.key(exponent)})")
        out = ONE, ONE
        for mono, c in top.items():
            c /= bottom[()]
            if not mono:
                out = self.product(out, self.power(base, self.constant(c)))
                continue
            for name, e in self.bases(base):
                ((power, _),) = self.generator(f"pow({name},{mono})")[0].items()
                factor = {((power[0][0], abs(c * e)),): Fraction(1)}
                out = self.product(out, (factor, ONE) if c * e > 0 else (ONE, factor))
        return out

    def bases(self, base) -> list[tuple[str, int]]:
        """The generators of a base with their exponents: 12x is 2^2 3 x."""
        out = []
        for p, sign in ((base[0], 1), (base[1], -1)):
            ((mono, c),) = p.items() if len(p) == 1 else [((), 0)]
            if c > 0 and all(g[0] != "~" and g != "i" for g, _ in mono):
                out += [(f"#{prime}", sign * e) for prime, e in self.factors(c).items()] + [(g, sign * e) for g, e in mono]
            elif p != ONE:
                out.append((self.key((p, ONE)), sign))
        return out

    def call(self, name: str, args):
        value = exact(Node("call", (name, *args)))
        if value is not None:
            return self.constant(value)
        ratios = [self.ratio(arg) for arg in args]
        if name in ("ln", "log"):
            out, *base = map(self.log, ratios)
            return self.product(out, self.invert(base[0])) if base else out
        if name in ("tan", "cot", "sec", "csc"):
            sin, cos, one = self.call("sin", args), self.call("cos", args), (ONE, ONE)
            top, bottom = {"tan": (sin, cos), "cot": (cos, sin), "sec": (one, cos), "csc": (one, sin)}[name]
            return self.product(top, self.invert(bottom))
        (top, bottom), sign = ratios[0], 1
        if name in ODD | EVEN and top and top[min(top)] / bottom[min(bottom)] < 0:
            ratios[0], sign = ({m: -c for m, c in top.items()}, bottom), -1 if name in ODD else 1
        key, square = ";".join(map(self.key, ratios)), None
        if name == "sin":  # sin^2 = 1 - cos^2
            ((cos, _),) = self.generator(f"cos({key})")[0].items()
            square = {(): Fraction(1), ((cos[0][0], 2),): Fraction(-1)}, 2
        top, bottom = self.generator(f"{name}({key})", square)
        return {m: sign * c for m, c in top.items()}, bottom

    def log(self, r):
        """ln of a product of primes, symbols and powers of e is a sum; of anything else opaque."""
        out = {}
        for p, sign in zip(r, (1, -1)):
            ((mono, c),) = p.items() if len(p) == 1 else [((), 0)]
            if c <= 0 or any(g != "e" and g[0] != "#" and (e != 1 or g[0] == "~" or g == "i") for g, e in mono):
                return self.generator(f"ln({self.key(r)})")
            for g, e in [*mono, *((f"#{prime}", e) for prime, e in self.factors(c).items())]:
                out = self.plus(out, {() if g == "e" else ((f"ln({g})", 1),): Fraction(sign * e)})
        return out, ONE


# ----------------------------------------------------------------------------------------------------------------------
# Numbers with 80 digits, to refute

@functools.cache
def context():
    import mpmath

    mp = mpmath.mp.clone()
    mp.dps = 80
    return mp


class Numeric:
    """Evaluates a tree at a point {symbol: value}; errors are judged by the largest magnitude met on the way."""

    def __init__(self, point):
        self.point, self.largest = point, 1

    def value(self, node: Node):
        """(value, bound of its error)"""
        return self.walk(node), self.largest * context().mpf(10) ** -60

    def walk(self, node: Node):
        value = self.apply(node)
        if not abs(value) < context().mpf(10) ** 10**6:  # nan, too
            raise Limit("magnitude")
        self.largest = max(self.largest, abs(value))
        return value

    def apply(self, node: Node):
        mp, (op, args) = context(), node
        if op in ("num", "dec"):
            return mp.mpf(args[0].numerator) / args[0].denominator
        if op == "sym":
            return self.point[args[0]] if args[0] in self.point else +{"pi": mp.pi, "e": mp.e, "i": mp.j}.get(args[0], mp.nan)
        values = [self.walk(child) for child in children(node)]
        if op == "add":
            return mp.fsum(values)
        if op == "mul":
            return mp.fprod(values)
        if op == "pct":
            return values[0] / 100
        if op == "call":
            return self.call(args[0], *values)
        if op not in ("pow", "root"):
            raise NotMath(op)
        base, power = values[0], values[1] if op == "pow" else 1 / values[1]
        if op == "root" and mp.im(base) == 0 and mp.re(base) < 0 and values[1] % 2 == 1:
            return -((-base) ** power)
        if base == 0:
            return mp.mpf(0) if mp.re(power) > 0 else never("division by zero")
        if abs(power) * (1 + abs(mp.log(abs(base)))) > 2 * 10**6:
            raise Limit("magnitude")
        return base**power

    def call(self, name, x, y=None):
        mp = context()
        if abs(x) > 10**5 or (y is not None and abs(y) > 10**5):
            raise Limit(name)
        if name in ("floor", "ceil"):
            return getattr(mp, name)(mp.re(x)) if mp.im(x) == 0 else never("floor")
        simple = {"ln": mp.log, "abs": abs, "factorial": mp.factorial, "binom": mp.binomial, "log": mp.log}
        spelled = "a" + name[3:] if name.startswith("arc") else name
        if name not in simple and name not in FUNCTIONS - {"min", "max", "gcd", "lcm"}:
            raise NotMath(name)
        return simple.get(name, getattr(mp, spelled, None))(*[x, y][: 1 + (y is not None)])


def refuted(a: Node, b: Node) -> bool:
    """Whether a and b differ at a random point by more than rounding can explain. Agreement proves nothing."""
    mp, rng, symbols = context(), random.Random(7), sorted(names(a) | names(b))
    for trial in range(3 if symbols else 1):
        point = {}
        for symbol in symbols:
            value = mp.mpf(rng.randrange(10**6, 3 * 10**6)) / 10**6
            point[symbol] = [value, value * rng.choice([-17, 13, -1]), value + mp.j * rng.random()][trial]
        try:
            (x, dx), (y, dy) = Numeric(point).value(a), Numeric(point).value(b)
        except Limit:
            if not symbols:
                raise
            continue
        except (NotMath, ArithmeticError, ValueError):
            continue
        if abs(x - y) > dx + dy:
            return True
    return False


# ----------------------------------------------------------------------------------------------------------------------
# The last tier: sympy, from the tree by constructors alone

SYMPY_NAMES = table("""ln log abs Abs ceil ceiling binom binomial arcsin asin arccos acos arctan atan arccot acot arcsec asec
    arccsc acsc""")
SYMPY_CALLS = FUNCTIONS - {"min", "max", "gcd", "lcm"} | {"factorial", "binom"}


def to_sympy(node: Node):
    import sympy

    op, args = node
    if op in ("num", "dec"):
        return sympy.Rational(args[0].numerator, args[0].denominator)
    if op == "sym":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I}.get(args[0]) or sympy.Symbol(args[0])
    if op in ("pow", "root", "call") and any(abs(exact(child) or 0) > 300 for child in children(node)[op != "call" :]):
        raise Limit("exponent")
    values = [to_sympy(child) for child in children(node)]
    if op in ("add", "mul", "pow"):
        return {"add": sympy.Add, "mul": sympy.Mul, "pow": sympy.Pow}[op](*values)
    if op == "pct":
        return sympy.Mul(values[0], sympy.Rational(1, 100))
    if op == "root":
        return (sympy.real_root if values[0].is_negative and values[1].is_odd else sympy.root)(*values)
    if op != "call" or args[0] not in SYMPY_CALLS:
        raise NotMath(op)
    return getattr(sympy, SYMPY_NAMES.get(args[0], args[0]))(*values)


def proven(a: Node, b: Node) -> bool:
    """Whether sympy proves a = b. May take long: only for a process that its parent watches."""
    import sympy

    difference = sympy.Add(to_sympy(a), sympy.Mul(-1, to_sympy(b)))
    if not difference.free_symbols and difference.is_algebraic:
        x = sympy.Symbol("x")
        return sympy.minimal_polynomial(difference, x) == x
    return difference.equals(0) is True


# ----------------------------------------------------------------------------------------------------------------------
# Comparison of two shaped trees

TIERS = ("text", "number", "structure", "algebra", "sympy")
VALUES = {"num", "dec", "sym", "add", "mul", "pow", "root", "call", "pct"}


class Comparison:
    def __init__(self, sympy: bool):
        self.sympy, self.tier, self.fuel = sympy, 0, FUEL

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
        if node.op != "set":
            return list(node.args) if node.op == "list" else [node]
        distinct = []
        for item in node.args:
            if not any(self.same(item, other) for other in distinct):
                distinct.append(item)
        return distinct

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
        c = Algebra().factor(*(Node("add", (left, negative(right))) for left, right in (p, q)))
        return c is not None and (ops == ("=",) or c > 0) and self.used("algebra")

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
        for decimal, other, value in ((decimal_of(a), b, y), (decimal_of(b), a, x)):
            if decimal and not (value is not None and 10**MAX_CHARS % value.denominator == 0) and not names(other):
                return rounds_to(other, decimal) and self.used("number")
        if x is not None and y is not None:
            return False
        algebra = Algebra()
        algebra.fuel = self.fuel
        try:
            if algebra.equal(a, b):
                return self.used("algebra")
            if not algebra.opaque:
                return False
        except Limit:
            pass  # perhaps numbers can still refute
        finally:
            self.fuel = max(algebra.fuel, 0)
        if refuted(a, b):
            return False
        if count(a) + count(b) > 150:
            raise Limit("size")
        if not self.sympy:
            raise Undecided
        return proven(a, b) and self.used("sympy")


def same(a: Node, b: Node) -> bool:
    try:
        return Comparison(sympy=False).same(a, b)
    except (NotMath, Limit, Undecided):
        return False


# ----------------------------------------------------------------------------------------------------------------------
# Verdicts

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


def usable(text: str) -> bool:
    return " ".join(plain(text)) not in NEVER and bool(re.search(r"[^\W_]|[∞∅]|\\\{\s*\\\}", text))


def compare(answer: str, gold: str, sympy: bool) -> str:
    """The reason of the verdict on one pair of answers."""
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
        if comparison.same(a, b):
            return "equal:" + TIERS[comparison.tier]
    except NotMath:
        pass  # one of them has no value: 1/0
    except (Limit, RecursionError, MemoryError, OverflowError):
        return "limit"
    words = len(answer) > 2 and answer.isalpha() and answer.casefold() == gold.casefold()  # Red and red
    return "equal:text" if words else "wrong"


def judge(extracted: str | None, gold, sympy: bool) -> tuple[float, str]:
    """(score, reason) of an extracted answer against a gold answer or a list of accepted ones."""
    reason, undecided = "unparsed", False
    for one in (gold if isinstance(gold, (list, tuple)) else [gold]) if extracted is not None else []:
        try:
            reason = compare(extracted, str(one).strip(), sympy)
        except Undecided:
            undecided = True
        if reason.startswith("equal"):
            return 1.0, reason
    if undecided:
        raise Undecided
    return 0.0, reason


def grade(response: str, gold: str | list[str]) -> Verdict:
    """The verdict on a response. What only sympy can tell is asked of a watched process, so this never hangs."""
    extracted, rule = extract(response)
    try:
        points, reason = judge(extracted, gold, sympy=False)
    except Undecided:
        return _ask(response, gold)
    return Verdict(points, extracted, rule, reason)


def score(response: str, gold: str | list[str]) -> float:
    return grade(response, gold).score


def check_gold(gold: str | list[str]) -> str | None:
    """None if a gold answer can be matched, else one line that says why not. For the time when data is loaded."""
    golds = [str(one) for one in (gold if isinstance(gold, (list, tuple)) else [gold])]
    for one in golds:
        if not usable(one):
            return f"gold answer {one!r} is empty or undefined"
        node = read(one) if integer(one) is None else None
        if node == "limit":
            return f"gold answer {one[:60]!r} passes a limit of the parser ({MAX_CHARS} characters, {MAX_DEPTH} levels)"
        if node == "text" and re.search(r"[\\=^_{}<>+]", re.sub(TEXT, r"\1", clean(one))):
            return f"gold answer {one[:60]!r} is neither an expression that we can parse nor plain text"
    return None if golds else "gold answer is an empty list"


# ----------------------------------------------------------------------------------------------------------------------
# The grader. A clean server process (no torch, not the training script, sympy imported once) forks workers and kills them; the
# parent holds the clock. All talk is lines of JSON over sockets, and a socket that closes means that the other side is gone:
# workers end with the server, and the server with the parent, however that ends.

BATCH = 32  # items sent to a worker at once
CACHE = 100_000  # verdicts remembered


class Worker:
    """pid: 0 until it said hello. items: its batch, the first in work since `since`."""

    def __init__(self, sock):
        self.sock, self.pid, self.items, self.since, self.buffer = sock, 0, deque(), 0.0, b""


class Grader:
    """Grades in `workers` processes. An item that takes longer than `timeout_s` seconds from the start of work on it, or needs
    more than `memory_gib`, scores 0; the other items of its batch are graded elsewhere.

    counts: graded, right, cached, unparsed, limit, timeout, crash. pending: submitted, not yet returned by poll or wait."""

    program = os.path.abspath(__file__)

    def __init__(self, workers: int = 2, timeout_s: float = 5.0, memory_gib: float = 2.0):
        self.size, self.timeout_s, self.memory_gib = workers, timeout_s, memory_gib
        self.pending, self.counts = 0, Counter()
        self.queue, self.ready, self.workers = deque(), deque(), []
        self.waiting, self.cache = {}, OrderedDict()  # (extracted, gold) -> who waits for it; its verdict
        self.server = self.control = None
        self.owner = os.getpid()
        atexit.register(self.close)

    def submit(self, key, response: str, gold) -> None:
        """Queues a response under any `key`. Never blocks."""
        extracted, rule = extract(response)
        gold = tuple(map(str, gold)) if isinstance(gold, (list, tuple)) else str(gold)
        job = extracted, gold
        self.pending += 1
        if job in self.cache:
            self.counts["cached"] += 1
            self.cache.move_to_end(job)
            self._finish(key, rule, job, *self.cache[job])
        elif job in self.waiting:
            self.counts["cached"] += 1
            self.waiting[job].append((key, rule))
        elif (extracted is None or len(extracted) > MAX_CHARS
              or (isinstance(gold, str) and integer(extracted) is not None and integer(gold) is not None)):
            self._finish(key, rule, job, *judge(extracted, gold, sympy=False))  # cheaper than a trip to a worker
        else:
            self.waiting[job] = [(key, rule)]
            self.queue.append(job)
            if len(self.workers) < self.size or any(not worker.items for worker in self.workers):
                self._feed()

    def poll(self) -> list[tuple]:
        """The (key, verdict) pairs finished since the last call. Never blocks."""
        return self._collect(0)

    def wait(self, timeout_s: float) -> list[tuple]:
        """Like poll, but blocks until there is a verdict, nothing is pending, or the time is up."""
        until, done = time.monotonic() + timeout_s, self._collect(0)
        while not done and self.pending and (left := until - time.monotonic()) > 0:
            done = self._collect(min(left, 0.1))
        return done

    def close(self) -> None:
        """Ends all processes."""
        atexit.unregister(self.close)
        if self.server and os.getpid() == self.owner:
            self.control.close()  # the server kills its workers and goes
            for worker in self.workers:
                worker.sock.close()
            try:
                self.server.wait(5)
            except subprocess.TimeoutExpired:
                self.server.kill()
                self.server.wait()
        self.workers, self.server = [], None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _finish(self, key, rule, job, points, reason):
        self.counts["graded"] += 1
        self.counts["right"] += points > 0
        if reason in ("unparsed", "limit", "timeout", "crash"):
            self.counts[reason] += 1
        self.ready.append((key, Verdict(points, job[0], rule, reason)))

    def _settle(self, job, points, reason):
        self.cache[job] = points, reason
        if len(self.cache) > CACHE:
            self.cache.popitem(last=False)
        for key, rule in self.waiting.pop(job):
            self._finish(key, rule, job, points, reason)

    def _start_worker(self, old_pid: int = 0) -> None:
        """Has the server kill `old_pid`, if given, and fork a fresh worker."""
        ours, theirs = socket.socketpair()
        for last_try in (False, True):
            if self.server is None or self.server.poll() is not None:
                self._start_server()
            try:
                socket.send_fds(self.control, [old_pid.to_bytes(4, "little")], [theirs.fileno()])
                break
            except OSError:  # the server was lost
                self.server.kill()
                self.server.wait()
                if last_try:
                    raise
        theirs.close()
        self.workers.append(Worker(ours))

    def _start_server(self) -> None:
        if self.control:
            self.control.close()
        self.control, theirs = socket.socketpair()
        command = [sys.executable, self.program, str(theirs.fileno()), str(self.memory_gib)]
        self.server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                       pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()

    def _feed(self) -> None:
        """Gives queued jobs to idle workers, a batch each."""
        while len(self.workers) < self.size:
            self._start_worker()
        for worker in self.workers:
            if self.queue and not worker.items:
                share = max(1, min(BATCH, len(self.queue) // self.size))
                worker.items.extend(self.queue.popleft() for _ in range(share))
                worker.since = time.monotonic()
                with contextlib.suppress(OSError):  # a dead worker shows when it is read from
                    worker.sock.sendall(json.dumps(list(worker.items)).encode() + b"\n")

    def _collect(self, timeout: float) -> list[tuple]:
        if self.waiting:
            readable, _, _ = select.select([worker.sock for worker in self.workers], [], [], 0 if self.ready else timeout)
            for worker in [worker for worker in self.workers if worker.sock in readable]:
                self._receive(worker)
        now = time.monotonic()
        for worker in [worker for worker in self.workers if worker.items and worker.pid]:
            if now - worker.since > self.timeout_s:
                self._replace(worker, "timeout")
        if self.queue:
            self._feed()
        done = list(self.ready)
        self.ready.clear()
        self.pending -= len(done)
        return done

    def _receive(self, worker: Worker) -> None:
        """Takes in what a worker wrote: [pid] once, then [points, reason, time of completion] for each item in order."""
        try:
            chunk = worker.sock.recv(1 << 16)
        except OSError:
            chunk = b""
        *lines, worker.buffer = (worker.buffer + chunk).split(b"\n")
        for message in map(json.loads, lines):
            if len(message) == 1:
                worker.pid, worker.since = message[0], time.monotonic()
            else:
                points, reason, worker.since = message
                self._settle(worker.items.popleft(), points, reason)
        if not chunk:
            self._replace(worker, "crash")

    def _replace(self, worker: Worker, reason: str) -> None:
        """The item in work scores 0; the rest of its batch goes back to the head of the queue."""
        worker.sock.close()
        self.workers.remove(worker)
        if worker.items and worker.pid:
            self._settle(worker.items.popleft(), 0.0, reason)
        self.queue.extendleft(reversed(worker.items))
        self._start_worker(worker.pid)


_lock = threading.Lock()


@functools.cache
def _private_grader() -> Grader:
    return Grader(workers=1, timeout_s=3.0)


def _ask(response: str, gold) -> Verdict:
    """One verdict from a grader of our own, started on first use."""
    with _lock:
        grader = _private_grader()
        grader.submit(None, response, gold)
        while not (done := grader.wait(1)):
            pass
        return done[0][1]


def work(sock: socket.socket, memory_gib: float) -> None:
    """A worker: judges each job of each line and answers with a line; ends when the socket closes."""
    limit = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sock.sendall(b"[%d]\n" % os.getpid())
    for line in sock.makefile("r"):
        for extracted, gold in json.loads(line):
            try:
                points, reason = judge(extracted, gold, sympy=True)
            except (MemoryError, RecursionError):
                points, reason = 0.0, "limit"
            except Exception:  # in sympy: counted, and the worker lives on
                points, reason = 0.0, "crash"
            sock.sendall(json.dumps([points, reason, time.monotonic()]).encode() + b"\n")


def serve(control: socket.socket, memory_gib: float) -> None:
    """The fork server: each message is a pid to kill (or 0) and the socket of a worker to fork."""
    import sympy  # noqa: F401  (so that workers are born with it)

    context()
    workers = set()
    while True:
        message, fds, _, _ = socket.recv_fds(control, 4, 1)
        old = int.from_bytes(message, "little")
        for pid in workers & {old} if message else list(workers):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            workers.remove(pid)
        if not message:
            return  # the parent is gone
        pid = os.fork()
        if pid == 0:
            control.close()
            try:
                work(socket.socket(fileno=fds[0]), memory_gib)
            finally:
                os._exit(0)
        os.close(fds[0])
        workers.add(pid)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), float(sys.argv[2]))
