r"""
What a response is worth, and the processes that find it out.

    score(r"... so the area is \boxed{\frac{1}{2}}", "0.5")  ->  1.0

A reward is named on the command line, `--reward NAME`:

    math                the answer in the response against the gold answer, 0 or 1 (see verify/)
    module:function     a function of yours, in a module that can be imported
    file.py:function    the same in a file; tasks/exact.py is an example

The function is f(response: str, gold, problem: str) -> float. The response is the decoded text, the
gold answer is what the row of the data holds (text, number, list or object), the problem is the
question alone. Any finite number will do, and it must hang on the arguments alone: equal ones are
asked once and then remembered. Its module may also offer

    check(gold) -> str | None   one line that says why a gold answer is of no use, for loading data
    BINARY = True or False      whether all scores are 0 or 1; what needs that (pass@k, some
                                algorithms) can then say so before a run starts

A call that raises, takes longer than 5 s or needs more than 2 GiB (of address space: torch takes
more) scores 0 and is counted; a run goes on. These are bounds, no sandbox: the function has the
rights of the run. It must not execute what a model wrote unless it isolates that itself.
"""

import atexit
import contextlib
import functools
import hashlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass
from typing import NamedTuple

import scoring
import verify
from scoring import WHOLE, Reward, load_reward  # noqa: F401 (Reward is for who imports us)


@dataclass(frozen=True)
class Verdict:
    """
    `rule` found `extracted` in the response: None without an answer, or where all of it was judged.
    reason: equal:<tier>, wrong, unparsed (no answer), scored (by a function), limit (of memory),
    timeout or crash.
    """

    score: float
    extracted: str | None
    rule: str
    reason: str


# --------------------------------------------------------------------------------------------------
# The grader. Workers are fresh interpreters that run scoring.py: no torch, no training script. The
# parent holds the clock and kills them. All talk is lines of JSON over a socket; who sees it close
# knows that the other side is gone.

BATCH = 32  # jobs sent to a worker at once, at most
BATCH_CHARS = 100_000  # a batch that has so many is full: what a socket holds does not block
CACHE = 100_000  # verdicts remembered


class Job(NamedTuple):
    digest: bytes  # by which its verdict is remembered: responses are long
    line: str  # [text, gold, problem] as JSON


class Worker:
    """A grading process. ready: it said hello. jobs: its batch, the first in work since `since`."""

    def __init__(self, program: str, memory_gib: float, spec: str, timeout_s: float):
        self.sock, other_end = socket.socketpair()
        self.sock.settimeout(timeout_s)  # of a send to a process that stands still
        modules = os.pathsep.join(map(os.path.abspath, sys.path))
        self.process = subprocess.Popen(
            [sys.executable, program, str(other_end.fileno()), str(memory_gib), spec],
            stdin=subprocess.PIPE,  # nothing is written to it: it ends with us, however we end
            stdout=subprocess.DEVNULL,
            pass_fds=[other_end.fileno()],
            env=os.environ | {"PYTHONPATH": modules},  # it finds the modules that we find
            start_new_session=True,
        )
        other_end.close()
        self.ready = False
        self.jobs = deque()
        self.since = 0.0
        self.buffer = b""

    @property
    def idle(self) -> bool:
        return self.ready and not self.jobs

    def give(self, batch: list[Job]) -> None:
        self.jobs.extend(batch)
        self.since = time.monotonic()
        lines = ",".join(job.line for job in batch)
        with contextlib.suppress(OSError):  # a dead worker shows when it is read from
            self.sock.sendall(f"[{lines}]\n".encode())

    def kill(self) -> None:
        """And all processes that it started."""
        self.sock.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.stdin.close()
        self.process.wait()


class Grader:
    """
    Grades in `workers` processes. A job that takes longer than `timeout_s` seconds from the start
    of work on it, or needs more than `memory_gib`, scores 0; the others of its batch are graded
    elsewhere.

    counts: graded, right (above 0), cached, unparsed, limit, timeout, crash. pending: submitted,
    not yet returned by poll or wait. waited: seconds in which a caller could do nothing but wait
    for verdicts; the caller keeps it.
    """

    program = os.path.abspath(scoring.__file__)

    def __init__(self, reward_spec="math", workers=2, timeout_s=5.0, memory_gib=2.0):
        self.reward = load_reward(reward_spec)
        self.size = workers
        self.timeout_s = timeout_s
        self.memory_gib = memory_gib
        self.pending = 0
        self.waited = 0.0
        self.counts = Counter()
        self.workers = []
        self.queue = deque()  # jobs that no worker has
        self.waiting = {}  # digest of a job -> [(key, extracted, rule)] of all who wait for it
        self.cache = OrderedDict()  # digest of a job -> (score, reason)
        self.done = []  # (key, verdict) that nobody fetched yet
        self.owner = os.getpid()
        atexit.register(self.close)

    def submit(self, key, response: str, gold, problem: str = "", opened: bool = False) -> None:
        """Queues a response under any `key`. opened: its prompt ends inside a thought. Never
        blocks."""
        text, rule = self.reward.extract(response, opened)
        waiter = key, None if rule == WHOLE else text, rule
        self.pending += 1
        if outcome := self.reward.instant(text, gold):
            self._finish(waiter, *outcome)
            return
        line = json.dumps([text, gold, problem if self.reward.needs_problem else ""])
        job = Job(hashlib.blake2b(line.encode(), digest_size=16).digest(), line)
        if job.digest in self.cache:
            self.counts["cached"] += 1
            self.cache.move_to_end(job.digest)
            self._finish(waiter, *self.cache[job.digest])
        elif job.digest in self.waiting:
            self.counts["cached"] += 1
            self.waiting[job.digest].append(waiter)
        else:
            self.waiting[job.digest] = [waiter]
            self.queue.append(job)
            if len(self.workers) < self.size or any(worker.idle for worker in self.workers):
                self._feed()

    def poll(self) -> list[tuple]:
        """The (key, verdict) pairs finished since the last call. Never blocks."""
        return self._collect(0)

    def wait(self, timeout_s: float) -> list[tuple]:
        """Like poll, but blocks until there is a verdict, nothing is pending, or time is up."""
        until = time.monotonic() + timeout_s
        done = self._collect(0)
        while not done and self.pending and (left := until - time.monotonic()) > 0:
            done = self._collect(min(left, 0.1))
        return done

    def close(self) -> None:
        """Ends all processes."""
        atexit.unregister(self.close)
        if os.getpid() == self.owner:  # not those of a parent that forked us
            for worker in self.workers:
                worker.kill()
        self.workers = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _finish(self, waiter: tuple, points: float, reason: str) -> None:
        key, extracted, rule = waiter
        self.counts["graded"] += 1
        if points > 0:
            self.counts["right"] += 1
        if reason in ("unparsed", "limit", "timeout", "crash"):
            self.counts[reason] += 1
        self.done.append((key, Verdict(points, extracted, rule, reason)))

    def _settle(self, job: Job, points: float, reason: str) -> None:
        self.cache[job.digest] = points, reason
        if len(self.cache) > CACHE:
            self.cache.popitem(last=False)
        for waiter in self.waiting.pop(job.digest):
            self._finish(waiter, points, reason)

    def _feed(self) -> None:
        """Starts the workers that are missing, and gives each idle one a batch."""
        while len(self.workers) < self.size:
            bounds = self.memory_gib, self.reward.spec, self.timeout_s
            self.workers.append(Worker(self.program, *bounds))
        for worker in self.workers:
            if self.queue and worker.idle:
                worker.give(self._batch())

    def _batch(self) -> list[Job]:
        """The next jobs, no more than a fair share of the queue."""
        most = max(1, min(BATCH, len(self.queue) // self.size))
        batch = []
        chars = 0
        while self.queue and len(batch) < most and chars < BATCH_CHARS:
            batch.append(self.queue.popleft())
            chars += len(batch[-1].line)
        return batch

    def _collect(self, timeout_s: float) -> list[tuple]:
        if self.waiting:
            by_socket = {worker.sock: worker for worker in self.workers}
            readable, _, _ = select.select(by_socket, [], [], 0 if self.done else timeout_s)
            for sock in readable:
                self._receive(by_socket[sock])
        now = time.monotonic()
        for worker in list(self.workers):
            if worker.ready and worker.jobs and now - worker.since > self.timeout_s:
                self._replace(worker, "timeout")
        if self.queue:
            self._feed()
        done = self.done
        self.done = []
        self.pending -= len(done)
        return done

    def _receive(self, worker: Worker) -> None:
        """Takes in what a worker wrote: [] once, then [score, reason, time] for each job."""
        try:
            chunk = worker.sock.recv(1 << 16)
        except OSError:
            chunk = b""
        *lines, worker.buffer = (worker.buffer + chunk).split(b"\n")
        for message in map(json.loads, lines):
            if message:
                points, reason, worker.since = message
                self._settle(worker.jobs.popleft(), points, reason)
            else:
                worker.ready = True
        if not chunk:
            self._replace(worker, "crash")

    def _replace(self, worker: Worker, reason: str) -> None:
        """The job in work scores 0; the rest of its batch goes back to the head of the queue."""
        worker.kill()
        if not worker.ready:
            status = f"exit status {worker.process.returncode}"
            raise RuntimeError(f"a grading process ended before it began to work, {status}")
        self.workers.remove(worker)
        if worker.jobs:
            self._settle(worker.jobs.popleft(), 0.0, reason)
        self.queue.extendleft(reversed(worker.jobs))


# --------------------------------------------------------------------------------------------------
# Mathematics, one response at a time

_lock = threading.Lock()


@functools.cache
def _private_grader() -> Grader:
    return Grader(workers=1, timeout_s=3.0)  # started on first use


def grade(response: str, gold: str | list[str]) -> Verdict:
    """The verdict on a response. What only sympy can tell is asked of a watched process, so this
    never hangs."""
    extracted, rule = verify.extract(response)
    try:
        points, reason = verify.judge(extracted, gold, sympy=False)
        return Verdict(points, extracted, rule, reason)
    except verify.Undecided:
        pass
    with _lock:
        grader = _private_grader()
        grader.submit(None, response, gold)
        done = []
        while not done:
            done = grader.wait(1)
        return done[0][1]


def score(response: str, gold: str | list[str]) -> float:
    return grade(response, gold).score
