'''
A reward beside mathematics: the answer as it is written, less a little for every word.

    python train.py --reward tasks/exact.py:exact --algo grpo ...

    exact("I add. \\n Answer: Paris ", "paris", "")       ->  1 - 0.0005 * 4 = 0.998
    exact("The capital is Lyon", "Paris", "")             ->  0

It is meant to be copied. The scores are not 0 or 1, so pass@k is left out, and aero, reinforce_ada
and sign refuse it; grpo and most others take it.

A reward that runs the code a model wrote against tests is not shipped on purpose. The time and
memory bounds of a grading process are no isolation: such code has your files, network and keys, and
training rewards whatever finds a hole. At your own risk, let the function hand code and tests over
to an isolation of your own (a container or virtual machine without network, mounts and privileges,
started anew each time) with a time limit below that of the grader, and return what that says.
'''

import re

BINARY = False
PER_WORD = 0.0005  # so that of two right responses the shorter one is better
MOST = 0.5  # of a right answer's 1 is never taken away: right stays better than wrong

ANSWER = re.compile(r"\banswer\s*:", re.IGNORECASE)


def answer_of(response: str) -> str:
    """What follows the last "Answer:" in its line, else the last line that is not empty."""
    lines = [line.strip() for line in response.splitlines() if line.strip()]
    marked = [line for line in lines if ANSWER.search(line)]
    if marked:
        return ANSWER.split(marked[-1])[-1].strip()
    return lines[-1] if lines else ""


def check(gold) -> str | None:
    """Why a gold answer can never be matched, or None."""
    if not isinstance(gold, str | int | float) or isinstance(gold, bool):
        return f"gold answer of type {type(gold).__name__}, wanted a text or a number"
    if not str(gold).strip():
        return "gold answer is empty"
    return None


def exact(response: str, gold, problem: str) -> float:
    """1 for the gold answer, case aside, less PER_WORD for each word of the response; else 0."""
    answer = answer_of(response).casefold()
    if answer != str(gold).strip().casefold():
        return 0.0
    return 1.0 - min(MOST, PER_WORD * len(response.split()))
