"""Text to tokens."""

import re
import unicodedata
from fractions import Fraction

from verify.lexicon import LETTER_UNITS, PERCENT, UNITS, WORDS
from verify.tree import GREEK, words


def table(text: str) -> dict[str, str]:
    pairs = words(text)
    return dict(zip(pairs[::2], pairs[1::2]))


SIGNS = table(
    r"""− - – - — - ∗ * ÷ / ⁄ / ∕ / × \times · \cdot ⋅ \cdot √ \sqrt ∞ \infty ≤ \le ⩽ \le ≥ \ge
    ⩾ \ge ≠ \ne ≈ \approx ± \pm ∓ \mp ∪ \cup ∩ \cap ∖ \setminus ∈ \in ∅ \emptyset ℝ \mathbb{R}
    ℤ \mathbb{Z} ° ^\circ ℃ ^{\circ}C ∠ \angle △ \triangle … \ldots ⟨ \langle ⟩ \rangle ⌊ \lfloor
    ⌋ \rfloor ⌈ \lceil ⌉ \rceil ∣ | ′ ' ’ ' ″ '' ∶ : 、 , 。 . µ \mu"""
)
SIGNS |= {chr(0x3B1 + i): f"\\{name}" for i, name in enumerate(GREEK)}
SIGNS |= {chr(0x391 + i): f"\\{name.capitalize()}" for i, name in enumerate(GREEK)}
VULGAR = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"


def unicode_table() -> dict[int, str]:
    signs = {sign: f"{name} " if name[-1].isalpha() else name for sign, name in SIGNS.items()}
    for sign in VULGAR:
        value = Fraction(unicodedata.numeric(sign)).limit_denominator(9)
        signs[sign] = rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    signs |= {chr(0x2460 + i): f"({i + 1})" for i in range(20)}  # circled digits
    signs |= {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)}  # full-width ASCII
    signs |= dict.fromkeys("\u00a0\u2009\u202f\u3000", " ")
    signs |= dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", "")
    return str.maketrans(signs)


UNICODE = unicode_table()
RAISED, LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ", "₀₁₂₃₄₅₆₇₈₉"
SCRIPT = str.maketrans(RAISED + LOWERED, "0123456789-n0123456789")

FONT = r"""\\(?:math(?:rm|bf|it|sf|tt|normal|op|ord)|boldsymbol|bm|pmb|operatorname\*?|underline
    |ensuremath|text(?:bf|it|rm|sf|tt|sc|sl|up|md|normal)?|mbox|hbox|emph)"""
FONT = re.sub(r"\s", "", FONT)
STYLE = r"""\\(?:(?:display|text|script|scriptscript)style|(?:footnote|script|normal)size|tiny|small
    |large|Large|LARGE|huge|Huge|bf|it|rm|bfseries|itshape|strut|mathstrut|limits|nonumber|notag
    |boxed|fbox|hfill|q?quad)(?![A-Za-z])"""
STYLE = re.sub(r"\s", "", STYLE)
WRAPPER = re.compile(rf"(?:{FONT}(?![A-Za-z])|{STYLE})\s*")
TEXT = re.compile(FONT + r"\s*\{([^{}]*)\}")
COLOR = re.compile(  # and what else has an argument that is not printed
    r"\\(?:text)?color(?:box)?\s*(?:\[\w*\])?\s*\{[^{}]*\}|\\fcolorbox\s*\{[^{}]*\}\s*\{[^{}]*\}"
    r"|\\(?:[hv]space|[hv]?phantom|tag|label)\*?\s*\{[^{}]*\}"
)
ALIGNED = re.compile(
    r"\\(?:begin|end)\s*\{(?:align(?:ed|at)?|gather(?:ed)?|split|equation|eqnarray|cases)\*?\}"
    r"(?:\[[tbc]\])?"
)
IN_BRACES = rf"\s*\{{\s*{TEXT.pattern}\s*\}}"
UNIT_FRACTION = re.compile(rf"\\[dt]?frac{IN_BRACES}{IN_BRACES}")
PIECEWISE = re.compile(r"\\begin\s*\{cases\}[^&]*&")
NEWLINE = re.compile(r"\\\\(?:\[[^\]]*\])?")
BOLD = re.compile(r"(?:^|(?<=[=\s(]))\*\*(?=[^\s*])([^*]+)(?:\*\*|$)")
DELIMITER = re.compile(r"(?<!\\)\\[()\[\]]")  # of formulas
TRAILING = re.compile(
    r"(?:\s|(?<=[A-Z\d])\{\}|\\\\|\\[,;:! ]|(?<!\\)[$`,;:]|(?<!\.)\.(?!\.)|~|\\(?=\s*$))+$"
)
THIN_COMMA = re.compile(  # 10{,}000
    r"(?<=\d)(?:\{,\}|,\s?\\!|\\!,)\s*(?=\d{3}(?!\d))|(?<=\d)\\[,;: ]\s*(?=\d{3}(?!\d))"
)
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
SPACED = re.compile(r"[(\[{][^)\]}]*,\s")
LETTER_TIMES = re.compile(r"(?<=\d) [xX] (?=\d)")

TOKEN = re.compile(
    rf"(?P<skip>\s+|\\[,;:!>\s]|~|\$|\\(?:left|right|middle)\s*\.|{FONT}(?=\s*\{{[^{{}}]*[\\{{$])"
    rf"|{STYLE}|\\(?:left|right|[bB]igg?[lrm]?|middle|vec|overrightarrow|mathcal|hat)(?![A-Za-z]))"
    r"|(?P<money>\\\$|[€£])"
    rf"|(?P<text>{FONT}\s*\{{[^{{}}]*\}})"
    r"|(?P<begin>\\begin\s*\{[pbB]?(?:small)?(?:matrix|array)\}(?:\{[clr|]*\})?)"
    r"|(?P<fin>\\end\s*\{[pbB]?(?:small)?(?:matrix|array)\})"
    r"|(?P<based>(?<![A-Za-z])[0-9A-Z]*\d[0-9A-Z]*_(?:\{(?:\\text\{)?\d{1,2}\}?\}|\d{1,2}(?!\d)))"
    r"|(?P<num>\d*\.\d*\\(?:overline|bar)\s*(?:\{\d+\}|\d)"
    r"|\d*\.\d*\\dot\s*(?:\{\d\}|\d)(?:\d*\\dot\s*(?:\{\d\}|\d))?"
    r"|(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+(?![\w.^]))?)"
    r"|(?P<cmd>\\(?:mathbb\s*\{?\s*[A-Z]\}?|[A-Za-z]+|.))"
    r"|(?P<word>[A-Za-z]+|[\u3040-\u30ff\u4e00-\u9fff]+)"
    r"|(?P<op><=|>=|!=|\*\*|\.\.\.|.)",
    re.S | re.A,
)
ALIAS = table(
    r"""dfrac frac tfrac frac cfrac frac dbinom binom tbinom binom le <= leq <= leqslant <=
    geqslant >= ge >= geq >= lt < gt > ne != neq != times * cdot * ast * div / lbrace \{ rbrace \}
    langle ( rangle ) lbrack [ rbrack ] lvert | rvert | vert | mid | lVert | rVert | colon :
    tg tan ctg cot arctg arctan land and lor or wedge and vee or ldots ... dots ... cdots ...
    degree circ varepsilon epsilon varphi phi vartheta theta prime ' \ row newline row
    varnothing emptyset ** ^ ; , asin arcsin acos arccos atan arctan infinity infty inf infty
    oo infty backslash setminus smallsetminus setminus"""
)
RATIOS = {"tan": ("sin", "cos"), "cot": ("cos", "sin"), "sec": (None, "cos"), "csc": (None, "sin")}
TRIG = {"sin", "cos", *RATIOS}
FUNCTIONS = TRIG | set(words("arcsin arccos arctan log lg ln exp abs floor ceil"))
NAMES = set(GREEK) | {name.capitalize() for name in GREEK}
NAMES |= set(words("infty partial ell hbar emptyset odot mho"))
OPERATORS = set(words("and or in sqrt binom"))
MONEY = {"\\$": "usd", "€": "euro", "£": "lb"}


def closes(text: str) -> int:
    """Where the brace that opens `text` is closed; -1 if it is not."""
    level = 0
    for brace in re.finditer(r"\\.|[{}]", text, re.S):
        if brace[0] in "{}":
            level += 1 if brace[0] == "{" else -1
            if level == 0:
                return brace.start()
    return -1


def unwrapped(text: str) -> str:
    r"""The content of `\textbf{...}` and the like around the whole text."""
    while True:
        inner = text
        if match := WRAPPER.match(text):
            body = text[match.end() :]
            end = closes(body) if body[:1] == "{" else -1
            if end == len(body) - 1 and end > 0:
                inner = body[1:-1]
            elif body[:1] != "{":
                inner = body
        if inner == text:
            return text
        text = TRAILING.sub("", inner.lstrip(" \t\r\n$"))


def lines_joined(text: str) -> str:
    r"""`\begin{aligned} x &= 1 \\ y &= 2 \end{aligned}` as "x = 1, y = 2"; a line that begins with
    a relation goes on with the one before it."""
    rows = [row.strip() for row in NEWLINE.split(ALIGNED.sub(" ", text).replace("&", " "))]
    joined = ""
    for row in filter(None, rows):
        goes_on = joined == "" or re.match(r"=|<|>|\\(?:le|ge|approx)", row)
        joined += f" {row}" if goes_on else f", {row}"
    return joined


def clean(text: str) -> str:
    """The same answer in ASCII and LaTeX commands, without digit grouping, colours, wrappers and
    final punctuation."""
    if not text.isascii():
        text = re.sub(f"[{RAISED}]+", lambda m: f"^{{{m[0].translate(SCRIPT)}}}", text)
        text = re.sub(f"[{LOWERED}]+", lambda m: f"_{{{m[0].translate(SCRIPT)}}}", text)
        text = text.translate(UNICODE)
    if "\\" in text or "{" in text:
        text = COLOR.sub(" ", THIN_COMMA.sub("", DELIMITER.sub(" ", text)))
        text = re.sub(r"\\not\s*=", r"\\ne ", UNIT_FRACTION.sub(unit_fraction, text))
        if ALIGNED.search(text) and not PIECEWISE.search(text):
            text = lines_joined(text)
    if "**" in text:
        text = BOLD.sub(r"\1", text)
    text = text.replace("per cent", "percent")
    text = unwrapped(TRAILING.sub("", text.lstrip(" \t\r\n$`")))
    if "," in text and (not re.search(r"[(\[{]", text) or SPACED.search(text)):
        text = THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)  # but (312,123) is a pair
    if " " in text:
        text = LETTER_TIMES.sub(r" \\times ", text)
        if re.fullmatch(r"-?\d{1,3}(?: \d{3})+", text):
            text = text.replace(" ", "")
    return text


def unit_fraction(match) -> str:
    """m/s, where both are units"""
    top, bottom = match[1].strip(" ~"), match[2].strip(" ~")
    is_unit = {top, bottom} <= UNITS | LETTER_UNITS
    return rf"\text{{{top}/{bottom}}}" if is_unit else match[0]


def tokenize(text: str) -> list[tuple[str, str]]:
    r"""(kind, value) pairs; kinds: num based fn sym word unit text money begin fin, and operators
    and commands as themselves."""
    tokens = []
    formula = re.search(r"[-+*/^=<>_\\]", text) is not None
    for match in TOKEN.finditer(text):
        kind, value = match.lastgroup, match[0]
        if kind in ("cmd", "op"):
            tokens.append(command(kind, value))
        elif kind == "word":
            after_words = bool(tokens) and tokens[-1][0] in ("word", "unit", "text")
            tokens += word_tokens(ALIAS.get(value, value), formula, after_words)
        elif kind == "text":
            content = value[value.index("{") + 1 : -1]
            tokens += text_tokens(content, formula, is_font="\\math" in value or "oper" in value)
        elif kind == "money":
            tokens.append((kind, MONEY[value]))
        elif kind != "skip":
            tokens.append((kind, value))
    return tokens


def command(kind: str, value: str) -> tuple[str, str]:
    name = value
    if kind == "cmd" and value not in ("\\{", "\\}"):
        name = value[1:]
    if name.startswith("mathbb"):
        return "sym", "mathbb" + name.rstrip("} ")[-1]
    name = ALIAS.get(name, name)
    if name in FUNCTIONS:
        return "fn", name
    return ("sym" if name in NAMES else name), name


def word_tokens(word: str, formula: bool, after_words: bool = False) -> list[tuple[str, str]]:
    """A run of letters is a function, a unit, a word, or a product of one-letter symbols."""
    lower = word.lower()
    if word in OPERATORS:
        return [(word, word)]
    if word in FUNCTIONS:
        return [("fn", word)]
    if word in NAMES:
        return [("sym", word)]
    if lower in PERCENT:
        return [("%", word)]
    if word in UNITS or (len(word) > 3 and lower in UNITS):
        return [("unit", word)]
    short_word = len(word) == 3 and (word.isupper() or lower in WORDS or after_words)
    if len(word) > 3 or short_word or (lower in WORDS and not formula) or not word.isascii():
        return [("word", word)]
    return [("sym", letter) for letter in word]


def text_tokens(content: str, formula: bool, is_font: bool) -> list[tuple[str, str]]:
    r"""The tokens of \text{...} or \mathrm{...}: prose is one token, all else a group."""
    content = content.strip(" ~.,")
    known = ALIAS.get(content, content)
    if known in OPERATORS or known in FUNCTIONS or known in NAMES or content.lower() in PERCENT:
        return word_tokens(known, formula) if content.lower() not in PERCENT else [("%", content)]
    if len(content) == 1 and content.isalpha() and content.isascii():
        return [("text" if content in LETTER_UNITS else "sym", content)]
    runs = re.findall(r"[^\W\d_]+", content)
    has_words = any(len(run) > 1 or not run.isascii() for run in runs)
    units = content[:1].isalpha() and all(run in UNITS | LETTER_UNITS for run in runs)
    letters = is_font and len(content) <= 5 and content.isalpha()  # a product of symbols
    if content and not units and (letters or not has_words or content[0].isdigit()):
        return [("{", "{"), *tokenize(content), ("}", "}")]
    return [("text", content)] if content else []
