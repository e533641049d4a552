r"""From a model's response and a gold answer to 0 or 1: is the final answer right?

    score(r"... so the area is \boxed{\frac{1}{2}}", "0.5")  ->  1.0

The rules that verdicts follow:

 1. Only the text after the last `</think>` counts; an opened, never closed `<think>` means no answer.
 2. The last complete `\boxed{}` or `\fbox{}` is the answer (boxes joined only by commas or "and" are read as one list).
    Without a box: what follows the last "the answer is", `####` or `Answer:`, else the last number, kept whole with its
    sign, thousands commas, decimals, a/b or \frac, or with the formula around it. A box that never closes is no answer.
 3. Integers and rationals compare exactly at any size. A decimal is exact if the other side has a finite decimal
    expansion; against any other value it counts if it is that value rounded, to ten or more significant digits.
 4. p% equals p and p/100; p alone does not equal p/100. Trailing units, degree signs and currency are dropped.
 5. Tuples and vectors are ordered; sets, `a, b and c` and lists of tuples are not, but must be complete; +- expands.
 6. Interval ends matter; `x in S`, a chain of inequalities and the interval are one thing; single-letter assignments
    unwrap (x = 5 is 5), but an equation is not its right side; equations are equal up to a non-zero constant factor.
 7. Text compares case-blind without \text{}, option letters with or without brackets. Empty, nan and undefined never
    match anything.
 8. A verdict arrives within 5 s whatever the input, and no text is ever run as code.
 9. Against a gold answer that is a single number the answer must be a number written out: digits, a/b, a mixed number, a
    percentage, or with a power of ten. 37 + 48 is not 85 but the question once more; nor are sqrt(144), 2^10 and 5! answers,
    for "evaluate sqrt(144)" is a question as well. Against any other gold answer nothing needs to be worked out.

answers.py tells whether two answers are equal. Nearly always that is decided in this process, bounded by construction; what
only sympy can tell runs in a worker process whose clock and memory its parent watches. A learner searches for holes here: in
doubt the verdict is "wrong".
"""

import atexit
import contextlib
import functools
import json
import os
import re
import resource
import select
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass

import answers

TAIL = 4000  # characters at the end of a response in which its last number is looked for


@dataclass(frozen=True)
class Verdict:
    """`rule` found `extracted`; `reason` is equal:<tier>, wrong, unparsed (no answer), limit, timeout or crash."""

    score: float
    extracted: str | None
    rule: str
    reason: str


# ----------------------------------------------------------------------------------------------------------------------
# Extraction: each rule is a name that can be left out of `rules`; a box wins over words, the last words over earlier ones.

ALL = ("think", "boxes", "boxed", "answer_is", "hashes", "answer", "last_number")

BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\\\(?!boxed|fbox)|\\[{}]|[{}]")
BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s*([-+]?\d+(?:\.\d+)?)")
GLUE = re.compile(r"[\s$]*(?:\\[)\]])?[\s$]*(?:[,;]|[,;]?\s*(?:\\text\s*\{)?\s*(?:and|or)\s*\}?)[\s$]*(?:\\[(\[])?[\s$]*")
ANCHORS = {
    "answer_is": re.compile(r"\banswers?(?:\s+to\s+[^.\n]{1,80}?)?\s+(?:is|are)\b(?!\s+not\b)", re.I),
    "hashes": re.compile(r"####(?!\s*[A-Za-z]{2})"),  # but no heading
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
    last = {rule: deque(anchor.finditer(text), maxlen=1) for rule, anchor in ANCHORS.items() if rule in rules}
    for rule, found in sorted(last.items(), key=lambda item: -item[1][0].end() if item[1] else 0):
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
        if len(run) == answers.MAX_ITEMS or run[0][0] - box[1] > 40 or not GLUE.fullmatch(text, box[1], run[0][0]):
            break
        run.insert(0, box)
    return list(dict.fromkeys(content.strip() for _, _, content in run))


def _phrase(text: str) -> str | None:
    """The answer that `text` begins with: a formula, the sentence if it reads as mathematics, or a number in it."""
    text = text[:answers.MAX_CHARS].lstrip(" \t\r\n:=*_")
    formula = FORMULA.match(text)
    if formula and formula[0].startswith(("$$", "\\[")):
        return formula[formula.lastindex].strip()
    end = SENTENCE_END.search(text)
    sentence = (text[: end.start()] if end else text).strip(" \t*_.,;:!")
    if not sentence or answers.is_math(sentence):
        return sentence or None
    if formula and ("\\" in formula[0] or answers.is_math(formula[formula.lastindex])):
        return formula[formula.lastindex].strip()
    numbers = _numbers(sentence) if not re.search(r"[\\_{}\[\]]", sentence) else []  # no digit out of a broken formula
    return (numbers[0] if numbers[0].start() == 0 else numbers[-1])[0].strip() if numbers else sentence


def _last_number(text: str) -> str | None:
    numbers = _numbers(text, max(0, len(text) - 300)) or _numbers(text)
    formulas = [f for f in FORMULA.finditer(text) if re.search(r"\d", f[0])]
    if formulas and (not numbers or formulas[-1].end() > numbers[-1].start()):
        content = formulas[-1][formulas[-1].lastindex]
        if "\\" in content or answers.is_math(content):  # $5 and $6 are two prices, no formula
            return re.split(r"(?<![<>!\\])=|\\approx(?![a-z])", content)[-1].strip(" .,;")
    return numbers[-1][0].strip() if numbers else None


def _numbers(text: str, start: int = 0) -> list[re.Match]:
    """The numbers that stand alone: not the head of 3x, 2^10 or 7!, though 5cm is fine."""
    def alone(number):
        after = re.match(r"[A-Za-z]+|[\^_(!\\{].?", text[number.end() : number.end() + 20])
        return not after or after[0] in answers.UNITS or after[0] in ("\\)", "\\]", "\\$", "\\ ", "(")
    return [number for number in NUMBER.finditer(text, start) if alone(number)]


# ----------------------------------------------------------------------------------------------------------------------
# Verdicts

def judge(extracted: str | None, gold, sympy: bool) -> tuple[float, str]:
    """(score, reason) of an extracted answer against a gold answer or a list of accepted ones."""
    reason, undecided = "unparsed", False
    for one in (gold if isinstance(gold, (list, tuple)) else [gold]) if extracted is not None else []:
        try:
            reason = answers.compare(extracted, str(one).strip(), sympy)
        except answers.Undecided:
            undecided = True
        if reason.startswith("equal"):
            return 1.0, reason
    if undecided:
        raise answers.Undecided
    return 0.0, reason


def grade(response: str, gold: str | list[str]) -> Verdict:
    """The verdict on a response. What only sympy can tell is asked of a watched process, so this never hangs."""
    extracted, rule = extract(response)
    try:
        points, reason = judge(extracted, gold, sympy=False)
    except answers.Undecided:
        return _ask(response, gold)
    return Verdict(points, extracted, rule, reason)


def score(response: str, gold: str | list[str]) -> float:
    return grade(response, gold).score


def check_gold(gold: str | list[str]) -> str | None:
    """None if a gold answer can be matched, else one line that says why not. For the time when data is loaded."""
    golds = [str(one) for one in (gold if isinstance(gold, (list, tuple)) else [gold])]
    for one in golds:
        if not answers.usable(one):
            return f"gold answer {one!r} is empty or undefined"
        node = answers.read(one) if answers.integer(one) is None else None
        if node == "limit":
            return f"gold answer {one[:60]!r} passes a limit of the parser"
        if node == "text" and re.search(r"[\\=^_{}<>+]", re.sub(answers.TEXT, r"\1", answers.clean(one))):
            return f"gold answer {one[:60]!r} is neither an expression that we can parse nor plain text"
    return None if golds else "gold answer is an empty list"


# ----------------------------------------------------------------------------------------------------------------------
# The grader. Workers are fresh interpreters (no torch, not the training script) that know only our files; the parent holds the
# clock and kills them. All talk is lines of JSON over a socket; who sees it close knows that the other side is gone.

BATCH = 32  # items sent to a worker at once
CACHE = 100_000  # verdicts remembered


class Worker:
    """ready: said hello. items: its batch, the first in work since `since`."""

    def __init__(self, program: str, memory_gib: float):
        self.sock, theirs = socket.socketpair()
        command = [sys.executable, program, str(theirs.fileno()), str(memory_gib)]
        # nothing is ever written to its stdin: that pipe ends with us, however we end
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                        pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()
        self.ready, self.items, self.since, self.buffer = False, deque(), 0.0, b""

    def kill(self) -> None:
        self.sock.close()
        self.process.kill()
        self.process.stdin.close()
        self.process.wait()


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
        elif (extracted is None or len(extracted) > answers.MAX_CHARS
              or (isinstance(gold, str) and answers.integer(extracted) is not None and answers.integer(gold) is not None)):
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
        for worker in self.workers if os.getpid() == self.owner else ():
            worker.kill()
        self.workers = []

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

    def _feed(self) -> None:
        """Gives queued jobs to idle workers, a batch each."""
        while len(self.workers) < self.size:
            self.workers.append(Worker(self.program, self.memory_gib))
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
        for worker in [worker for worker in self.workers if worker.items and worker.ready]:
            if now - worker.since > self.timeout_s:
                self._replace(worker, "timeout")
        if self.queue:
            self._feed()
        done = list(self.ready)
        self.ready.clear()
        self.pending -= len(done)
        return done

    def _receive(self, worker: Worker) -> None:
        """Takes in what a worker wrote: [] once, then [points, reason, time of completion] for each item in order."""
        try:
            chunk = worker.sock.recv(1 << 16)
        except OSError:
            chunk = b""
        *lines, worker.buffer = (worker.buffer + chunk).split(b"\n")
        for message in map(json.loads, lines):
            if not message:
                worker.ready, worker.since = True, time.monotonic()
            else:
                points, reason, worker.since = message
                self._settle(worker.items.popleft(), points, reason)
        if not chunk:
            self._replace(worker, "crash")

    def _replace(self, worker: Worker, reason: str) -> None:
        """The item in work scores 0; the rest of its batch goes back to the head of the queue."""
        worker.kill()
        if reason == "crash" and not worker.ready:
            raise RuntimeError(f"a grader process ended before it began to work, exit status {worker.process.returncode}")
        self.workers.remove(worker)
        if worker.items and worker.ready:
            self._settle(worker.items.popleft(), 0.0, reason)
        self.queue.extendleft(reversed(worker.items))


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
    import sympy  # noqa: F401  (before the clock runs)

    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()  # the parent is gone
    limit = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sock.sendall(b"[]\n")
    for line in sock.makefile("r"):
        for extracted, gold in json.loads(line):
            try:
                points, reason = judge(extracted, gold, sympy=True)
            except (MemoryError, RecursionError):
                points, reason = 0.0, "limit"
            except Exception:  # in sympy: counted, and the worker lives on
                points, reason = 0.0, "crash"
            sock.sendall(json.dumps([points, reason, time.monotonic()]).encode() + b"\n")


if __name__ == "__main__":
    work(socket.socket(fileno=int(sys.argv[1])), float(sys.argv[2]))
