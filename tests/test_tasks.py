"""tasks/: the built-in arithmetic, and the recipes of the base models that are made here."""

import ast
import doctest
import inspect
import operator
import os
import random
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import reward
from tasks import base
from tasks.arithmetic import arithmetic

ROOT = Path(__file__).parent.parent
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def value(node, seen):
    """Value of an expression's syntax tree; `seen` collects every number on the way."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    result = OPERATORS[type(node.op)](value(node.left, seen), value(node.right, seen))
    seen.append(result)
    return result


def test_arithmetic_is_right():
    """
    Solutions against Python's own grammar and exact fractions: order of operations, every line, the
    box, the bounds.
    """
    for example in arithmetic(3, 800) + arithmetic(3, 200, held_out=True):
        seen = []
        assert value(ast.parse(example.text, mode="eval").body, seen) == Fraction(example.answer)
        assert len(seen) == example.level and all(0 <= v <= 99 for v in seen)
        *steps, last = example.solution.split("\n")
        assert last == f"\\boxed{{{example.answer}}}"
        for step, expected in zip(steps, seen, strict=True):
            left, _, right = step.partition("=")
            assert value(ast.parse(left, mode="eval").body, []) == Fraction(right) == expected
        assert reward.score(example.solution, example.answer) == 1.0


def test_arithmetic_operands_grow_with_the_level():
    for level in range(1, 9):
        largest = 9 + 5 * max(0, level - 4)
        for example in arithmetic(0, 200, (level, level)):
            tree = ast.parse(example.text, mode="eval").body
            while isinstance(tree, ast.BinOp):
                operand = tree.right.value
                assert (
                    2 <= operand <= 9 if isinstance(tree.op, ast.Mult) else 1 <= operand <= largest
                )
                tree = tree.left
            assert 1 <= tree.value <= 99


def test_train_and_held_out_are_disjoint():
    train = {e.text for seed in range(20) for e in arithmetic(seed, 400)}
    held = {e.text for seed in range(20, 40) for e in arithmetic(seed, 200, held_out=True)}
    assert len(train) > 6000 and len(held) > 2000 and not train & held


def test_arithmetic_is_a_pure_function_of_the_seed():
    first = arithmetic(7, 100, (2, 5))
    random.seed(1)  # the global stream does not enter
    assert arithmetic(7, 100, (2, 5)) == first == arithmetic(7, 300, (2, 5))[:100]
    assert arithmetic(8, 100, (2, 5)) != first
    assert [e.level for e in first[:8]] == [2, 3, 4, 5, 2, 3, 4, 5]
    assert len({e.text for e in arithmetic(0, 4000)}) == 4000
    # another process with another hash seed draws the same
    code = "from tasks.arithmetic import arithmetic; print(arithmetic(7, 100, (2, 5))[99].text)"
    env = os.environ | {"PYTHONHASHSEED": "123", "PYTHONPATH": str(ROOT)}
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == first[99].text


def test_arithmetic_says_when_a_level_is_used_up():
    with pytest.raises(
        ValueError, match=r"level 1 has \d+ held-out problems, too few for 4000 over levels 1-2"
    ):
        arithmetic(0, 4000, (1, 2), held_out=True)
    with pytest.raises(ValueError, match="levels within 1-20"):
        arithmetic(0, 10, (0, 3))


# ------------------------------------------------------------------------------------ base models


def short_recipe():
    from tasks import base

    for recipe in base.RECIPES.values():
        recipe.update(steps=4, batch=4, corpus=recipe["corpus"] | dict(problems=40, seeds=1))
    base.RECIPES["tiny"]["corpus"]["levels"] = (1, 2)
    base.RECIPES["small"]["shape"] |= dict(
        hidden_size=96, intermediate_size=128, num_attention_heads=3, num_key_value_heads=1
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out")


def finished(out, name, flags):
    """What `python train.py` with these flags and the short recipes prints."""
    code = (
        f"{inspect.getsource(short_recipe)}\n"
        "import sys, train\nshort_recipe()\nsys.exit(train.main(sys.argv[1:]))"
    )
    argv = [sys.executable, "-c", code, "--out", out, "--name", name, *flags]
    run = subprocess.run(
        [str(a) for a in argv], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "small"])
def test_the_embedded_base(out, name):
    """No --model: made at first start, cached under --out, the same for the next run."""
    flags = [
        "--base",
        name,
        "--steps",
        1,
        "--problems",
        2,
        "--max_new",
        8,
        "--eval_limit",
        2,
        "--eval_k",
        1,
    ]
    if name == "tiny":
        flags += ["--data", "arithmetic:train:50:1-2", "--eval_data", "arithmetic:heldout:20:1-2"]
    first, second = (
        finished(out, f"embedded-{name}-{seed}", [*flags, "--seed", seed]) for seed in (0, 1)
    )
    assert "base model: " in first and "base model: " not in second
    (folder,) = out.glob(f"base-{name}-*")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("1+2").input_ids == base.character_tokenizer(name)("1+2").input_ids


def test_the_examples_in_the_docstrings():
    tried = doctest.testmod(base)
    assert tried.attempted == 2 and tried.failed == 0


def test_worked_solutions_of_the_bases():
    """
    Every whole line is worth what the line before it was; a slip changes the answer and is
    consistent to the end.
    """
    for example in arithmetic(5, 100, (2, 18)):
        right = base.with_slips(example.solution, 0.0, 0, random.Random(1))
        assert right == example.solution
        *lines, boxed = base.in_whole_lines(right).split("\n")
        assert boxed == f"\\boxed{{{example.answer}}}" and {eval(line) for line in lines} == {
            eval(example.text)
        }
        assert [len(re.findall(r"[-+*]", line)) for line in lines] == [
            *reversed(range(example.level))
        ]
        sure = base.with_slips(example.solution, 1.0, 4, random.Random(1)).split("\n")
        assert sure[:5] == example.solution.split("\n")[:5] or example.level < 5
        *lines, boxed = base.in_whole_lines("\n".join(sure)).split("\n")
        if example.level >= 6:
            assert boxed == f"\\boxed{{{lines[-1]}}}" and len({eval(line) for line in lines}) > 1
