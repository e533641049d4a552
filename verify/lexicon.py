"""Words: which of them are units, which change the value of a number, which are no answer."""

import re

from verify.tree import words

UNITS = set(
    words("""cm mm km dm nm kg mg lb lbs oz ft in inch feet foot yd mi mph kph kmh hr hrs hour min
    mins sec secs ms day days week year yr deg rad cent usd USD euro unit cu sq ml mL gram ton tons
    kJ eV Hz kHz MHz GHz Pa kPa atm mol kcal cal kW kWh men boys cats dogs pens cups kids eggs cars
    way ways bit bits byte mile step pt pts item per each""")
)
LETTER_UNITS = set(words("m s g L l J N W V A K C F h T"))  # only in \text or \mathrm

# Short words that are no product of letters.
WORDS = set(
    words("""yes no odd even true false not none all any both the is are at if to of one two six ten
    red am pm mon tue wed thu fri sat sun may jan feb mar apr jun jul aug sep oct nov dec east
    west""")
)

# The rest of a word of three letters and more that stands behind a number is taken for a unit,
# unless it says that the value is another one: words of grammar, of mathematics, and of numbers.
GRAMMAR = set(
    words("""a an and or not no nor yes none all any both the is are be was were if to of by as at
    on for from with without than then that this these those which where when while since because so
    it its into onto up off out about around between among either neither but except only also other
    more most less least fewer greater larger smaller higher lower below above under over before
    after until past short maybe perhaps possible wrong incorrect false invalid true nothing never
    am pm ago almost nearly circa approx solution solutions""")
)
MATHEMATICS = set(
    words("""plus minus times squared cubed root power powers exponent factorial choose mod modulo
    base divided multiplied raised log ln sin cos tan sine cosine tangent sqrt pi infinity infinite
    infinitely imaginary negative inverse reciprocal twice double triple repeating recurring
    remainder undefined""")
)
TENS = "twen|thir|for|fif|six|seven|eigh|nine"
NUMBER_WORD = re.compile(
    r"(?:zero|one|two|three|four|five|fif|six|seven|eight?|nine?|ten|eleven|twelve|twelf"
    rf"|(?:{TENS}|four)teen|(?:{TENS})t(?:y|ie)|hundred|thousand|[a-z]*illion|googol|lakh|crore"
    r"|mil|dozen|score|grand|half|halve|quarter|third|n)(?:th|fold)?s?|fold"
)
CHINESE_NUMBER = re.compile("[零一二三四五六七八九十百千万亿兆半分倍]")
PERCENT = {"percent", "pct"}

ORDINARY = re.compile(r"[a-z][a-z0-9'-]*|[\u3040-\u30ff\u4e00-\u9fff]+")


def is_unit_word(word: str) -> bool:
    """Whether a word behind a number may be dropped: 5 apples, but not 5 millions or 3 squared."""
    lower = word.lower()
    if word in UNITS or word in LETTER_UNITS or lower in UNITS:
        return True
    is_letter = len(word) == 1 and word.isascii()
    if is_letter or not ORDINARY.fullmatch(lower):
        return False
    if CHINESE_NUMBER.search(lower) or lower.endswith("ly"):
        return False
    parts = lower.split("-")
    return not any(p in GRAMMAR or p in MATHEMATICS or NUMBER_WORD.fullmatch(p) for p in parts)


# --------------------------------------------------------------------------------------------------
# What a unit measures: two answers with different units are different.

PREFIXES = {"kilo": "k", "centi": "c", "milli": "m", "mega": "M", "giga": "G", "nano": "n"}
BASES = words("""meter m metre m gram g liter L litre L second s watt W joule J hertz Hz volt V
    newton N pascal Pa ampere A byte byte bit bit""")
SYMBOLS = dict(zip(BASES[::2], BASES[1::2]))
SYMBOLS |= {p + b: PREFIXES[p] + SYMBOLS[b] for p in PREFIXES for b in BASES[::2]}
SYNONYMS = words("""kilo kg l L ml mL pound lb lbs lb ounce oz inch in foot ft feet ft yard yd mile
    mi hour h hr h hrs h minute min mins min sec s secs s year yr dollar usd usd usd degree deg
    radian rad celsius C fahrenheit F kelvin K people person men man women woman children child kmh
    km/h kph km/h mph mi/h""")
SYMBOLS |= dict(zip(SYNONYMS[::2], SYNONYMS[1::2]))
MEASURES = set(SYMBOLS.values()) | UNITS - set(words("men boys cats dogs pens kids eggs cars"))
GENERIC = {"unit", "way", "item", "each", "step", "total"}
POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}


def singular(word: str) -> str:
    if word.endswith("ies"):
        return word[:-3] + "y"
    if re.search("(?:ch|sh|x|ss)es$", word):
        return word[:-2]
    return word[:-1] if re.search("[^su]s$", word) and len(word) > 2 else word


def dimensions(phrase: list[str]) -> tuple[tuple[str, int], ...]:
    """What a phrase of units measures, in one spelling: (unit, power) pairs, sorted.

    ["miles", "per", "hour"] and ["mph"] -> (("h", -1), ("mi", 1)); ["square", "cm"] and
    ["cm", "^2"] -> (("cm", 2),); ["/"] is "per", and "units" measure nothing."""
    powers = {}
    sign, exponent, last = 1, 1, None
    for word in phrase:
        if word in ("per", "/"):
            sign = -1
        elif word[0] == "^":
            if last:
                powers[last] *= int(word[1:])
        elif word.lower() in POWERS:
            exponent = POWERS[word.lower()]
        else:
            lower = singular(word.lower())
            known = lower if lower in SYMBOLS or word not in MEASURES else word
            known = word if word in LETTER_UNITS else known
            symbol, _, divisor = SYMBOLS.get(known, known).partition("/")
            powers[symbol] = powers.get(symbol, 0) + sign * exponent
            if divisor:
                powers[divisor] = -1
            sign, exponent, last = 1, 1, symbol
    return tuple(sorted(item for item in powers.items() if item[0] not in GENERIC))


def compatible(a, b) -> bool:
    """Whether two dimensions can be those of one answer: the same measures, and no other things;
    5 red apples are 5 apples."""

    def measures(dimensions):
        return {item for item in dimensions if item[0] in MEASURES}

    things_a = set(a) - measures(a)
    things_b = set(b) - measures(b)
    return measures(a) == measures(b) and (things_a <= things_b or things_b <= things_a)


# --------------------------------------------------------------------------------------------------
# Prose

NO_ANSWER = re.compile(
    r"(?:the )?(?:(?:proof|answer|solution|value|result)s? )?(?:is )?"
    r"(?:nan|null|n a|na|qed|q e d|todo|placeholder|missing|omitted|pending|proof|prove[dn]?"
    r"|un(?:known|defined|available|specified|answered|solved)|tb[acd]|t b [acd]"
    r"|(?:no|none|not) ?(?:found|available|given|provided|applicable|specified|known|stated)"
    r"|not ?defined|to be (?:determined|decided|done|added|announced)|(?:may|will|can) vary)"
    r"(?: (?:answer|solution|value|result)s?)?"
    r"|(?:see|proof|prove|no answer)\b.*|no (?:response|result)s?(?: found)?"
    r"|(?:the )?(?:answer|solution)"
)


def is_no_answer(words) -> bool:
    """Whether these words hold the place of an answer: unknown, proof, not found."""
    letters = " ".join(re.findall(r"[^\W\d_]+", " ".join(words).casefold()))
    return NO_ANSWER.fullmatch(letters) is not None


def fold(word: str) -> str:
    """A word without its case, unless the case may tell symbols apart: CO is not Co."""
    is_regular = word.islower() or word.isupper() or word.istitle()
    is_long = len(word) > 4 or word.lower() in WORDS or re.fullmatch("[A-Z]?[a-z]{2,}", word)
    return word.casefold() if is_regular and is_long else word
