"""
What a reward is, mathematics or a function of yours, and the process that calls it.

How to write one and what its bounds are stands in reward.py, whose Grader starts these processes.
"""

import contextlib
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import verify

WHOLE = "whole_response"  # the rule of a reward that extracts nothing


def whole(response: str, opened: bool) -> tuple[str, str]:
    return response, WHOLE


def nothing(*arguments) -> None:
    return None


@dataclass(frozen=True)
class Reward:
    """What a grader, the loading of data and an evaluation need to know of a reward."""

    spec: str
    call: Callable  # (text, gold, problem) -> score or (score, reason), in a grading process
    version: str  # digest of its source: scores compare where they are of one version
    binary: bool | None = None  # whether all scores are 0 or 1; None: nobody said
    check: Callable = nothing  # gold -> None, or one line that says why it is of no use
    read_gold: Callable | None = None  # what a row holds -> gold, ValueError with the reason
    extract: Callable = whole  # (response, opened) -> (the text that is judged, rule)
    instant: Callable = nothing  # (text, gold) -> (score, reason) where a trip costs more, or None
    needs_problem: bool = True  # otherwise a verdict hangs on text and gold alone
    warm_up: Callable = nothing  # what a grading process does before its clock runs


def digest(*sources: bytes) -> str:
    return hashlib.sha256(b"".join(sources)).hexdigest()[:12]


def mathematics() -> Reward:
    def warm_up():
        import sympy  # noqa: F401

    sources = [Path(__file__).with_name(name).read_bytes() for name in ("reward.py", "scoring.py")]
    return Reward(
        "math",
        verify.call,
        digest(*sources, verify.digest().encode()),
        binary=True,
        check=verify.check,
        read_gold=verify.read_gold,
        extract=verify.extract,
        instant=verify.instant,
        needs_problem=False,
        warm_up=warm_up,
    )


@functools.cache
def load_reward(spec: str) -> Reward:
    """The reward of that name, see the head of this file. ValueError, one line, without one."""
    if spec == "math":
        return mathematics()
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise ValueError(f"--reward {spec}: wanted math, MODULE:FUNCTION or FILE.py:FUNCTION")
    module = import_source(spec, source)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"--reward {spec}: {source} has no function {name}")
    try:
        inspect.signature(function).bind("response", "gold", "problem")
        version = digest(Path(inspect.getfile(module)).read_bytes())
    except (TypeError, ValueError) as error:
        wanted = f"wanted {name}(response, gold, problem)"
        raise ValueError(f"--reward {spec}: {wanted}, found: {error}") from None
    binary = getattr(module, "BINARY", None)
    if binary not in (True, False, None):
        raise ValueError(f"--reward {spec}: BINARY is {binary!r}, wanted True or False")
    check = checked(getattr(module, "check", nothing))
    return Reward(spec, function, version, binary, check)


def checked(check: Callable) -> Callable:
    """A check(gold) that also refuses what no process can be sent, and never raises."""

    def complaint(gold) -> str | None:
        try:
            json.dumps(gold)
            found = check(gold)
        except Exception as error:  # of a function of yours: the row is reported
            found = f"check raised {type(error).__name__}: {error}"
        return one_line(found) if found else None

    return complaint


def one_line(value) -> str:
    return " ".join(str(value).split())


def import_source(spec: str, source: str):
    """The module of that name, or in that file. ValueError, one line, whatever its code raises."""
    path = Path(source)
    if path.suffix == ".py" and not path.is_file():
        raise ValueError(f"--reward {spec}: no such file: {source}")
    try:
        if path.suffix != ".py":
            return importlib.import_module(source)
        sys.path.append(str(path.resolve().parent))  # what it imports from beside it
        # A name of its own: a file data.py must not take the place of ours.
        found = importlib.util.spec_from_file_location(f"reward_file_{path.stem}", path)
        module = importlib.util.module_from_spec(found)
        sys.modules[found.name] = module
        found.loader.exec_module(module)
        return module
    except (Exception, SystemExit) as error:
        why = one_line(f"{type(error).__name__}: {error}")
        raise ValueError(f"--reward {spec}: {why}") from error


# --------------------------------------------------------------------------------------------------
# The process: python scoring.py SOCKET MEMORY_GIB REWARD


def judge(reward: Reward, text, gold, problem) -> tuple[float, str]:
    """(score, reason) of one job; ValueError for a score that is not finite."""
    value = reward.call(text, gold, problem)
    points, reason = value if isinstance(value, tuple) else (value, "scored")
    if not math.isfinite(float(points)):
        raise ValueError(f"the score is {points}, wanted a finite number")
    return float(points), str(reason)


def end_with_parent() -> None:
    """Our stdin ends when the parent does; then so do we, and what we started."""
    sys.stdin.read()
    os.killpg(os.getpgrp(), signal.SIGKILL)


def work(sock: socket.socket, memory_gib: float, spec: str) -> None:
    """Judges each job of each line and answers with a line; ends when the socket closes."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    reward = load_reward(spec)
    reward.warm_up()
    limit = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ConnectionError):  # the parent is gone, in the middle of a batch
        serve(sock, reward)


def serve(sock: socket.socket, reward: Reward) -> None:
    silent = False  # the first exception is shown
    sock.sendall(b"[]\n")
    for line in sock.makefile("r"):
        for job in json.loads(line):
            try:
                points, reason = judge(reward, *job)
            except (MemoryError, RecursionError):
                points, reason = 0.0, "limit"
            except Exception:  # counted, and the worker lives on
                points, reason = 0.0, "crash"
                if not silent:
                    traceback.print_exc()
                silent = True
            sock.sendall(json.dumps([points, reason, time.monotonic()]).encode() + b"\n")


if __name__ == "__main__":
    work(socket.socket(fileno=int(sys.argv[1])), float(sys.argv[2]), sys.argv[3])
