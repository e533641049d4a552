"""
The built-in task: arithmetic with left-nested brackets, as in (17+25)*3.

It needs no download, its difficulty is one number (the level: how many operations), and its train
and held-out sets are disjoint by construction.
"""

import hashlib
import operator
import random
from typing import NamedTuple

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
HIGHEST_LEVEL = 20
TRIES = 100_000  # draws without a new expression after which a level counts as used up


class Example(NamedTuple):
    text: str  # (17+25)*3
    solution: str  # 17+25=42 \n 42*3=126 \n \boxed{126}
    answer: str
    level: int  # number of operations


def is_held_out(text: str) -> bool:
    """
    One expression in eight, by a hash of its text alone: train and held-out sets are disjoint
    whatever their seeds.
    """
    return hashlib.sha256(text.encode()).digest()[0] % 8 == 0


def expression(rng: random.Random, level: int) -> Example:
    """
    `level` operations, left-nested. The first number is 1..99. What is added or taken away is at
    most 9 up to level 4, and 5 more with each level from there (29 at level 8); factors are 2..9.
    Every value on the way is in 0..99.
    """
    largest = 9 + 5 * max(0, level - 4)
    value = rng.randint(1, 99)
    text = str(value)
    lines = []
    for step in range(level):
        operands = {
            "+": (1, min(largest, 99 - value)),
            "-": (1, min(largest, value)),
            "*": (2, min(9, 99 // max(value, 1))),
        }
        signs = [sign for sign, (low, high) in operands.items() if low <= high]
        sign = rng.choice(signs)
        operand = rng.randint(*operands[sign])
        result = OPERATIONS[sign](value, operand)
        if step > 0:
            text = f"({text})"
        text = f"{text}{sign}{operand}"
        lines.append(f"{value}{sign}{operand}={result}")
        value = result
    lines.append(f"\\boxed{{{value}}}")
    return Example(text, "\n".join(lines), str(value), level)


def arithmetic(
    seed: int,
    count: int,
    levels: tuple[int, int] = (1, 8),
    held_out: bool = False,
) -> list[Example]:
    """
    `count` different examples, levels low..high in turn.

    A pure function of its arguments, the same on every machine; a larger count extends a smaller
    one. Raises ValueError when a level has no more expressions to give: level 1 has about 2,200 to
    train on and 340 held out, the others have plenty.
    """
    low, high = levels
    if not (1 <= low <= high <= HIGHEST_LEVEL and count >= 1):
        raise ValueError(
            f"arithmetic: found count {count} and levels {low}-{high}, "
            f"wanted count >= 1 and levels within 1-{HIGHEST_LEVEL}"
        )
    # random.Random seeds itself from a string through sha512, the same in every process.
    rngs = {
        level: random.Random(f"arithmetic {seed} {held_out} {level}")
        for level in range(low, high + 1)
    }
    examples = {}
    for i in range(count):
        level = low + i % (high - low + 1)
        example = new_example(rngs[level], level, held_out, examples)
        if example is None:
            part = "held-out" if held_out else "train"
            size = sum(example.level == level for example in examples.values())
            raise ValueError(
                f"arithmetic: level {level} has {size} {part} problems, "
                f"too few for {count} over levels {low}-{high}"
            )
        examples[example.text] = example
    return list(examples.values())


def new_example(rng, level: int, held_out: bool, known: dict[str, Example]) -> Example | None:
    """An example of this level and part that is not known yet, or None when none turns up."""
    for _ in range(TRIES):
        example = expression(rng, level)
        if example.text not in known and is_held_out(example.text) == held_out:
            return example
    return None
