"""A text to the tree that is compared."""

import functools
import re

from verify.lexicon import fold
from verify.parse import Parser
from verify.sets import REALS
from verify.shape import excluded, shape
from verify.tokens import FONT, TEXT, clean, tokenize
from verify.tree import MAX_CHARS, Limit, Node, NotMath, num, sym

SPACE = r"(?:\s|~|\\[,;:! ]|\\q?quad(?![A-Za-z]))*"
LETTER = re.compile(  # \textbf{(B)} and (\text{B}) without the font
    rf"{FONT}\s*\{{{SPACE}((?:option|choice)?{SPACE}[(\[]?[A-J][)\].:]?{SPACE})\}}"
    rf"|(?<=\(){FONT}\{{([A-J])\}}(?=\))"
)
CHOICE = re.compile(  # (B) 12, B. 12, option B
    rf"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer){SPACE})?"
    rf"(?:[(\[](?P<a>[A-J])[)\]]|(?P<b>[A-J])(?:[).:](?=[\s\\~]|$)|$))"
    rf"(?:\*\*)?(?P<space>{SPACE}[.:]?{SPACE})(?P<content>.*)",
    re.S,
)
OPERATOR = re.compile(
    r"[-+*/^=<>,;:!|_(){}&'\[\]]|\\(?:cdot|times|cup|cap|text\s*\{\s*(?:and|or)\b)|(?:and|or)\b"
)
LABELS = re.compile(r"(?:\(\d{1,2}\)\s*){2,}")  # the statements (1)(3), no product
CODE = re.compile(  # dates, telephone numbers, times
    r"\d+(?:-\d+){2,}|\d{1,2}([-/.])\d{1,2}\1\d{4}|\d{4}([-/.])\d{1,2}\2\d{1,2}"
    r"|(?=.*\b0\d)\d+(?:[-/:]\d+)+"
)
ALL_REALS = re.compile(
    r"(?:the set of )?(?:(?:all|any|every) (?:the )?real|(?:the )?real(?=s| number))"
    r"(?:s| numbers?)?(?: [a-z])?(?:,? (?:except|but|other than)(?: for)? (?P<holes>.+))?"
)


@functools.lru_cache(maxsize=8192)
def read(text: str) -> Node | None:
    """The tree of an answer in the shape in which answers are compared: (text words) for prose,
    (raw tokens) for what the grammar does not cover, None for what passes a limit."""
    if len(text) > MAX_CHARS:
        return None
    try:
        return special(clean(text)) or parsed(clean(text))
    except (Limit, RecursionError):
        return None


def parsed(text: str) -> Node:
    tokens = tokenize(text)
    try:
        if CODE.fullmatch(text):
            raise NotMath("a code")
        return shape(Parser(tokens).answer())
    except NotMath:
        words = prose(text)
        return Node("text", words) if words else Node("raw", tuple(tokens))


def special(text: str) -> Node | None:
    """What the grammar would take for something else."""
    if LABELS.fullmatch(text):
        return Node("list", tuple(num(int(label)) for label in re.findall(r"\d+", text)))
    if match := CHOICE.fullmatch(LETTER.sub(r"\1\2", text)):
        letter, content = match["a"] or match["b"], match["content"]
        if not OPERATOR.match(content) and (match["space"] or not content):
            return Node("choice", (letter, parsed(content))) if content else sym(letter)
    if "real" in text.casefold():
        words = TEXT.sub(r" \1 ", text).replace("$", " ").casefold().split()
        match = ALL_REALS.fullmatch(" ".join(words))
        if match and match["holes"]:
            holes = read(match["holes"])
            return excluded(holes.args if holes and holes.op in ("list", "set") else [holes])
        return REALS if match else None
    return None


def is_math(text: str) -> bool:
    node = read(text)
    return node is not None and node.op not in ("text", "raw")


def prose(text: str) -> tuple[str, ...] | None:
    r"""Words and signs of a text without \text{}, dollars and a final stop, letter case where it
    can mean something; None for a formula."""
    text = re.sub(r"\\[,;:! ]|[$~]|\\(?:left|right)(?![a-z])", " ", TEXT.sub(r" \1 ", text))
    if re.search(r"[\\^_=<>+*{}|]", text) or not re.search(r"[^\W\d_]", text):
        return None
    text = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", text, flags=re.I)
    words = re.findall(r"[^\W\d_]+|\d+(?:\.\d+)?|\S", text)
    while words and words[-1] in ".,;:":
        words.pop()
    if words and len(words[0]) == 1:  # A necessary condition
        words[0] = words[0].casefold()
    return tuple(map(fold, words))
