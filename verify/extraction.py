r"""The final answer in a response.

Each rule is a name that can be left out of `rules`: the answer tag is the text that counts, a box
wins over words, the last words over earlier ones.

    think        only what follows the last </think>; a thought that never ends has no answer
    tag          the last <answer>...</answer>
    boxes        the last boxes that only commas or "and" join are one list
    boxed        the last complete \boxed{} or \fbox{}; one that never closes is no answer
    answer_is    what follows the last "the answer is",
    hashes       "####",
    answer       or "Answer:"
    last_number  the last number, kept whole, or the formula around it
"""

import re
from collections import deque

from verify.lexicon import LETTER_UNITS, UNITS, is_unit_word
from verify.read import is_math
from verify.tokens import FUNCTIONS, NAMES, OPERATORS
from verify.tree import MAX_CHARS, MAX_ITEMS

ALL = ("think", "tag", "boxes", "boxed", "answer_is", "hashes", "answer", "last_number")
END = 60_000  # characters at the end of a response in which words lead to its answer
TAIL = 4000  # and in which its last number is looked for

BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\\\(?!boxed|fbox)|\\[{}]|[{}]")
BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s*([-+]?\d+(?:\.\d+)?)")
GLUE = re.compile(
    r"[\s$]*(?:\\[)\]])?[\s$]*(?:[,;]|[,;]?\s*(?:\\text\s*\{)?\s*(?:and|or)\s*\}?)"
    r"[\s$]*(?:\\[(\[])?[\s$]*"
)
ANCHORS = {
    "answer_is": re.compile(
        r"\b(?:answers?(?:\s{1,9}to\s{1,9}[^.\n]{1,80}?)?"
        r"|(?:correct|right)\s{1,9}(?:option|choice)s?)\s{1,9}(?:is|are)\b(?!\s{1,9}not\b)",
        re.I,
    ),
    "hashes": re.compile(r"####(?!\s{0,9}[A-Za-z]{2})"),  # but no heading
    "answer": re.compile(r"\banswers?\s{0,9}(?:\*\*|__)?\s{0,9}[:=]", re.I),
}
LEAD = re.compile(  # with the dash of a list
    r"[\s:=*_}]*?(?:\n\s*[-–—•]\s+|(?=[^\s:=*_}]|$))[\s*_]*"
)
SENTENCE_END = re.compile(r"[.!?](?=\s|$|[*_]{1,2}(?:\s|$))|[。！？\n]|<\|")
FORMULA = re.compile(r"\$\$([^$]+)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)
ARITHMETIC = re.compile(r"(?:[^A-Za-z\\]|\\(?:times|cdot|div|\$)|(?<=\d )x(?= \d))*")
OPERATOR = re.compile(r"\s*[-+*/×÷=−](?=[\s\d]|$)")
EXPLANATION = re.compile(r"[\s,;:*]+(?:because|since|as|which)\b")
SIGN = (  # no sign is the dash of a list or of a sentence
    r"(?:(?<![\w.)\]}])(?:[-+–]|−\s?)|(?:(?<=[=(\d)\]%])|(?<=\b[A-Za-z])) ?[-+−–] )?"
)
WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
VULGAR = "[½⅓⅔¼¾⅕-⅞]"
NUMBER = re.compile(
    SIGN + r"(?:\\?\$|[€£])?"
    rf"(?:(?:(?<![A-Za-z0-9_.^{{}}\\])\d+\s?)?\\[dt]?frac\s?\{{-?\d+\}}\s?\{{\d+\}}"
    rf"|(?<![A-Za-z0-9_.^{{}}\\])(?:\d{{1,3}}\s\d+/\d+(?!\d|[./]\d)|(?:\d{{1,3}}\s?)?{VULGAR}"
    rf"|{WHOLE}(?:\.\d+)?(?:\s?/\s?\d+(?!\d|[./]\d))?)|(?<![A-Za-z0-9_.])\.\d+)(?:\s?\\?%)?"
)
EXCLAIMED = re.compile(r"!+(?=\s*$|\s+[A-Z\n]|\s*\n|[*_\"')\]}])")
AFTER = re.compile(r"[A-Za-z]+|[\^_(!\\{⁰¹²³⁴-⁹].?")
POWER = re.compile(r"(?<![A-Za-z])[A-Za-z]\^|\)\^")
HARMLESS = {"\\)", "\\]", "\\$", "\\ ", "\\,", "\\;", "("}


def extract(response: str, opened: bool = False, rules=ALL) -> tuple[str | None, str]:
    """The final answer in a response and the name of the rule that found it; (None, "none")
    without one. `opened`: the prompt ends inside a thought, as <think> at its end begins one."""
    text = response
    if "think" in rules:
        text = response.rpartition("</think>")[2]
        if "<think>" in text or (opened and "</think>" not in response):
            return None, "none"
    tagged = None
    if "tag" in rules and "<answer>" in text:
        tagged = last_tag(text)
        if tagged is None and "\\boxed" not in text:
            return None, "none"
        text = text if tagged is None else tagged
    if "boxed" in rules and ("\\boxed" in text or "\\fbox" in text):
        answer, rule, cut_off = last_box(text, "boxes" in rules)
        if answer is not None or cut_off:
            return answer, rule
    anchored = after_anchor(text[-END:], rules)
    if anchored:
        return anchored
    if tagged is not None:
        return whole(tagged), "tag"
    if "last_number" in rules and (answer := last_number(text[-TAIL:])):
        return answer, "last_number"
    return None, "none"


def opens_thought(prompt: str) -> bool:
    """Whether a response to this prompt begins inside a thought."""
    return prompt.rstrip().endswith("<think>")


def last_tag(text: str) -> str | None:
    """The content of the last complete answer tag that is not empty."""
    end = len(text)
    while (end := text.rfind("</answer>", 0, end)) >= 0:
        start = text.rfind("<answer>", 0, end)
        if start < 0:
            return None
        content = text[start + len("<answer>") : end].strip()
        if content:
            return content
        end = start
    return None


def whole(text: str) -> str | None:
    """The answer in a tag: all of it if it reads as mathematics or as an answer in words."""
    content = text[:MAX_CHARS].strip(" \t\r\n*_.")
    if is_math(content):
        return content
    if (head := explained(content)) is not None:
        return head
    return last_number(text[-TAIL:]) or content or None


# --------------------------------------------------------------------------------------------------
# Boxes


def last_box(text: str, joined: bool) -> tuple[str | None, str, bool]:
    """(answer, rule, whether a box stayed open)"""
    boxes, cut_off = box_spans(text)
    if boxes:
        contents = joined_boxes(text, boxes) if joined else []
        if len(contents) > 1:
            return ", ".join(contents), "boxes", cut_off
        _, start, end = boxes[-1]
        return text[start:end].strip(), "boxed", cut_off
    bare = deque(BARE_BOX.finditer(text), maxlen=1)
    if bare:
        return bare[0][1], "boxed", cut_off
    return None, "none", cut_off


def box_spans(text: str) -> tuple[list[tuple[int, int, int]], bool]:
    """All complete boxes as (start, start of the content, its end) in the order in which they
    close, and whether one stayed open."""
    first = min(i for i in (text.find("\\boxed"), text.find("\\fbox")) if i >= 0)
    open_braces, spans = [], []
    for brace in BRACE.finditer(text, first):
        if brace[0] == "{":
            open_braces.append(None)
        elif brace[0][-1] == "{" and brace[0] != "\\{":
            open_braces.append(brace.span())
        elif brace[0] == "}" and open_braces:
            box = open_braces.pop()
            if box:
                spans.append((*box, brace.start()))
    return spans, any(open_braces)


def joined_boxes(text: str, spans) -> list[str]:
    """The distinct contents of the last boxes, as far back as only a comma or an "and" stands
    between them."""
    run = [spans[-1]]
    for box in reversed(spans[:-1]):
        first = run[-1]
        if box[0] > first[0]:
            continue  # nested in the one after it
        end = box[2] + 1
        is_near = first[0] - end <= 40 and len(run) < MAX_ITEMS
        if not is_near or not GLUE.fullmatch(text, end, first[0]):
            break
        run.append(box)
    return list(dict.fromkeys(text[start:end].strip() for _, start, end in reversed(run)))


# --------------------------------------------------------------------------------------------------
# Words


def after_anchor(text: str, rules) -> tuple[str, str] | None:
    last = []
    for rule, anchor in ANCHORS.items():
        if rule in rules:
            last += ((match.end(), rule) for match in deque(anchor.finditer(text), maxlen=1))
    for end, rule in sorted(last, reverse=True):
        answer = phrase(text[end : end + MAX_CHARS])
        if answer:
            return answer, rule
    return None


def phrase(text: str) -> str | None:
    """The answer that `text` begins with: a formula, the sentence if it reads as mathematics, an
    option letter, arithmetic, or a number in the sentence."""
    text = text[LEAD.match(text).end() :]
    formula = FORMULA.match(text)
    if formula and formula[0].startswith(("$$", "\\[")):
        return formula[formula.lastindex].strip()
    text = balanced(text)
    end = SENTENCE_END.search(text)
    sentence = (text[: end.start()] if end else text).strip(" \t*_.,;:!")
    if not sentence or is_math(sentence):
        return sentence or None
    if (head := explained(sentence)) is not None:
        return head
    if formula and ("\\" in formula[0] or is_math(formula[formula.lastindex])):
        return formula[formula.lastindex].strip()
    head = ARITHMETIC.match(sentence)[0].strip(" ,;:")
    if "=" in head and is_math(head):
        return head
    if re.search(r"[\\_{}\[\]]", sentence):  # no digit out of a broken formula
        return sentence
    numbers = standing_numbers(sentence)
    if not numbers:
        return sentence
    if numbers[0].start() > 0:
        return numbers[-1][0].strip()
    is_operand = OPERATOR.match(sentence, numbers[0].end())  # 7 + 9 and then words
    return sentence if is_operand else numbers[0][0].strip()


def explained(sentence: str) -> str | None:
    """The mathematics that a sentence begins with if the rest only gives reasons: (D) because H is
    even."""
    explanation = EXPLANATION.search(sentence)
    head = sentence[: explanation.start()].strip() if explanation else ""
    return head if head and is_math(head) else None


def balanced(text: str) -> str:
    """The text up to a closing brace or delimiter of a formula that opened before it."""
    level = {"}": 0, "\\)": 0, "\\]": 0}
    opening = {"{": "}", "\\(": "\\)", "\\[": "\\]"}
    for sign in re.finditer(r"\\.|[{}]|\$", text, re.S):
        if sign[0] in opening:
            level[opening[sign[0]]] += 1
        elif sign[0] in level:
            level[sign[0]] -= 1
            if level[sign[0]] < 0:
                return text[: sign.start()]
    return text


# --------------------------------------------------------------------------------------------------
# Numbers


def last_number(text: str) -> str | None:
    numbers = standing_numbers(text, max(0, len(text) - 300)) or standing_numbers(text)
    formulas = [f for f in FORMULA.finditer(text) if re.search(r"\d", f[0])]
    if formulas and (not numbers or formulas[-1].end() > numbers[-1].start()):
        content = formulas[-1][formulas[-1].lastindex]
        if "\\" in content or is_math(content):  # $5 and $6 are two prices, no formula
            return re.split(r"(?<![<>!\\])=|\\approx(?![a-z])", content)[-1].strip(" .,;")
    return numbers[-1][0].strip() if numbers else None


def standing_numbers(text: str, start: int = 0) -> list[re.Match]:
    """The numbers that stand alone: not the head of 3x, 2^10 or 7!, though 5cm is fine. None at
    all if the last number is the head of a formula: an older number is not the answer."""
    numbers = []
    for number in NUMBER.finditer(text, start):
        after = AFTER.match(text, number.end(), number.end() + 20)
        word = after[0] if after else ""
        ends_here = not word or word in HARMLESS or EXCLAIMED.match(text, number.end())
        if ends_here or word in UNITS or is_glued_unit(word):
            numbers.append(number)
        elif word[0] in "^!²³" or word in "xyzn":
            numbers = []
    after = POWER.search(text, numbers[-1].end()) if numbers else None
    return [] if after and after[0][0] not in LETTER_UNITS else numbers


def is_glued_unit(word: str) -> bool:
    is_name = word in FUNCTIONS or word in NAMES or word in OPERATORS
    if word in ("m", "g"):
        return True
    return len(word) > 2 and word.isalpha() and not is_name and is_unit_word(word)
