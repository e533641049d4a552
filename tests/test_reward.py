"""
The grading processes: under fire, in time, without a word of mathematics; and rewards of one's own.
"""

import ast
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import verify_cases as cases

import reward
import scoring

ROOT = Path(reward.__file__).resolve().parent


def boxed(answer: str) -> str:
    return rf"so the answer is $\boxed{{{answer}}}$."


# --------------------------------------------------------------------------------------------------
# The grader

FIRE = """
import os, sys, time
sys.path.insert(0, {root!r})
import scoring, socket, verify
calm = verify.judge
def judge(extracted, gold, sympy, strict=True):
    if "hang" in extracted: time.sleep(1000)
    if "spin" in extracted:
        while True: pass
    if "digits" in extracted: return 1.0, str(len(str(pow(7, 10**9))))
    if "memory" in extracted: return 1.0, str(len(bytearray(2**34)))
    if "depth" in extracted: return judge(extracted, gold, sympy)
    if "exit" in extracted: os._exit(3)
    if "kill" in extracted: os.kill(os.getpid(), 9)
    if "raise" in extracted: raise ValueError("x")
    if "modules" in extracted: return 1.0, "torch" if "torch" in sys.modules else "clean"
    return calm(extracted, gold, sympy, strict)
verify.judge = judge
scoring.work(socket.socket(fileno=int(sys.argv[1])), float(sys.argv[2]), sys.argv[3])
"""


@pytest.fixture
def burning(tmp_path, monkeypatch):
    """A Grader whose workers obey answers such as "hang" and "exit"."""
    program = tmp_path / "fire.py"
    program.write_text(FIRE.format(root=str(ROOT)))
    monkeypatch.setattr(reward.Grader, "program", str(program))


def collect(grader, limit=60):
    done, until = {}, time.monotonic() + limit
    while grader.pending and time.monotonic() < until:
        for key, verdict in grader.wait(1):
            assert key not in done
            done[key] = verdict
    return done


def alive(pids):
    def running(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            return False

    return [pid for pid in pids if running(pid)]


def pids_of(grader):
    return [worker.process.pid for worker in grader.workers]


def test_grader_under_fire_loses_no_item(burning):
    traps = {
        "hang": "timeout",
        "spin": "timeout",
        "memory": "limit",
        "depth": "limit",
        "exit": "crash",
        "kill": "crash",
        "raise": "crash",
    }
    rng = random.Random(0)
    items = [(f"{trap} {i}", "0", trap) for trap in traps for i in range(2)] + [
        (f"x+{i}", f"{i}+x", "") for i in range(300)
    ]
    rng.shuffle(items)
    with reward.Grader(workers=2, timeout_s=0.7, memory_gib=1.0) as grader:
        for key, (answer, gold, _) in enumerate(items):
            grader.submit(key, boxed(answer), gold)
        done = collect(grader)
        seen = pids_of(grader)
        assert grader.pending == 0 and set(done) == set(range(len(items)))
        for key, (_, _, trap) in enumerate(items):
            assert done[key].reason == (traps[trap] if trap else "equal:algebra"), (
                items[key],
                done[key],
            )
            assert done[key].score == (0 if trap else 1)
        counts = grader.counts
        assert (counts["graded"], counts["right"]) == (len(items), 300)
        assert (counts["timeout"], counts["limit"], counts["crash"]) == (4, 4, 6)
    assert not alive(seen)


def test_a_hang_costs_only_itself(burning):
    """
    The clock of an item starts when work on it starts, not in the queue: with one worker and many
    slow-ish batches none but the hanging item times out.
    """
    with reward.Grader(workers=1, timeout_s=1.0) as grader:
        for i in range(40):
            grader.submit(i, boxed("hang" if i == 20 else f"x+{i}"), f"x+{i}")
        done = collect(grader)
        assert [k for k, v in done.items() if v.score == 0] == [20] and done[20].reason == "timeout"
        time.sleep(1.2)  # idle, and slow to poll: no clock runs
        grader.submit(99, boxed("y+1"), "1+y")
        time.sleep(1.2)
        assert collect(grader)[99].score == 1


def test_workers_know_nothing_of_torch(burning):
    with reward.Grader(workers=1) as grader:
        grader.submit(0, boxed("modules"), "x")
        assert collect(grader)[0].reason == "clean"


def test_grader_agrees_with_grade_and_keeps_its_counts():
    table = [r for r in cases.RESPONSES if isinstance(r[1], str)]
    with reward.Grader(workers=2) as grader:
        for key, (response, gold, _, _) in enumerate(table):
            grader.submit(key, response, gold)
        grader.submit("golds", boxed("3"), ["2", "3"])
        assert grader.pending == len(table) + 1
        done = collect(grader)
        assert done["golds"].score == 1
        for key, (response, gold, score, rule) in enumerate(table):
            assert (done[key].score, done[key].rule) == (score, rule)
            assert done[key] == reward.grade(response, gold)
        assert grader.counts["graded"] == len(table) + 1
        assert grader.counts["unparsed"] == sum(v.reason == "unparsed" for v in done.values())
        before = grader.counts["cached"]
        grader.submit("again", boxed(r"\frac{1}{2}"), "0.5")
        collect(grader)
        grader.submit("again", boxed(r"\frac{1}{2}"), "0.5")
        assert len(grader.poll()) == 1 and grader.counts["cached"] > before


def test_sixteen_samples_of_one_answer_are_graded_once():
    with reward.Grader(workers=1) as grader:
        for i in range(16):
            grader.submit(i, f"take {i}: " + boxed("x^2-1"), "(x-1)(x+1)")
        done = collect(grader)
        assert (
            len(done) == 16
            and all(v.score == 1 for v in done.values())
            and grader.counts["cached"] == 15
        )


def test_a_thought_that_the_prompt_opened():
    """What stands in it is no answer, and it never closed. A function of yours gets it all."""
    response = "I think \\boxed{42}, but"
    with reward.Grader(workers=1) as grader:
        for opened in (False, True):
            grader.submit(opened, response, "42", opened=opened)
        grader.submit("closed", response + "</think> \\boxed{42}", "42", opened=True)
        scores = {}
        while len(scores) < 3:
            scores.update({key: verdict.score for key, verdict in grader.wait(1.0)})
    assert scores == {False: 1.0, True: 0.0, "closed": 1.0}


def test_submit_and_poll_are_cheap():
    """One step's worth of responses; generous bounds, for a shared machine."""
    responses = ["Let us think. " * 200 + boxed(rf"\frac{{{i}}}{{7}}x+{i % 5}") for i in range(512)]
    with reward.Grader(workers=2) as grader:
        grader.submit(-1, boxed("x"), "y")
        grader.wait(30)
        began = time.perf_counter()
        for i, response in enumerate(responses):
            grader.submit(i, response, r"\frac{x}{7}+1")
        assert time.perf_counter() - began < 1
        slowest = 0.0
        while grader.pending:
            began = time.perf_counter()
            grader.poll()
            slowest = max(slowest, time.perf_counter() - began)
            time.sleep(0.002)
        assert slowest < 0.5


def test_grade_is_safe_from_many_threads():
    hard = [
        (r"\cos\frac{\pi}{12}", r"\frac{\sqrt6+\sqrt2}{4}", 1),
        (r"\arctan 1", r"\frac{\pi}{4}", 1),
        (r"\cos\frac{\pi}{12}", r"\frac{\sqrt6-\sqrt2}{4}", 0),
    ]
    wrong = []

    def run():
        wrong.extend((a, b) for a, b, score in hard * 2 if reward.score(boxed(a), b) != score)

    threads = [threading.Thread(target=run) for _ in range(16)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def script(tmp_path, body):
    path = tmp_path / "script.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + textwrap.dedent(body))
    return [sys.executable, str(path)]


def test_a_script_without_a_main_guard_runs_once(tmp_path):
    command = script(
        tmp_path,
        r"""
        import reward
        print("top", flush=True)
        grader = reward.Grader()
        grader.submit(1, r"\boxed{x+1}", "1+x")
        print(grader.wait(30)[0][1].score, reward.score(r"\boxed{\arctan 1}", r"\pi/4"))
        """,
    )  # nothing is closed
    out = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (out.stdout.split(), out.stderr, out.returncode) == (["top", "1.0", "1.0"], "", 0)


def test_a_killed_parent_leaves_no_process(tmp_path, burning):
    command = script(
        tmp_path,
        f"""
        import reward, time
        reward.Grader.program = {reward.Grader.program!r}
        grader = reward.Grader(workers=2, timeout_s=100)
        for i, word in enumerate(["spin", "hang"]):
            grader.submit(i, f"\\\\boxed{{{{{{word}}}}}}", "x")
        while not all(w.ready for w in grader.workers):
            grader.wait(0.1)
        print(*(w.process.pid for w in grader.workers), flush=True)
        time.sleep(100)
        """,
    )
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(alive(pids)) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 10
    while alive(pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(pids)


def test_a_lost_worker_is_replaced(burning):
    with reward.Grader(workers=1, timeout_s=5) as grader:
        grader.submit(0, boxed("x"), "x+0")
        assert collect(grader)[0].score == 1
        os.kill(grader.workers[0].process.pid, signal.SIGKILL)
        grader.workers[0].process.wait()
        grader.submit(1, boxed("exit"), "y")
        grader.submit(2, boxed("z+1"), "1+z")
        grader.submit(3, boxed("z+2"), "2+z")
        done = collect(grader)
        assert (done[2].score, done[3].score) == (1, 1)
        assert done[1].reason == "crash"


# --------------------------------------------------------------------------------------------------
# What the file itself imports


def test_the_source_names_no_evaluator():
    """
    A reward of one's own is imported by the name that stands on the command line; nothing else
    becomes code.
    """
    nodes = [
        n
        for m in (reward, scoring)
        for n in ast.walk(ast.parse(Path(m.__file__).read_text(encoding="utf-8")))
    ]
    used = {getattr(node, "id", getattr(node, "attr", None)) for node in nodes}
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    imported = {alias.name for node in imports for alias in node.names}
    assert not used & {
        "eval",
        "exec",
        "__import__",
        "sympify",
        "parse_expr",
        "parse_latex",
        "simplify",
        "lambdify",
    }
    assert not imported & {"pickle", "torch", "multiprocessing", "parse_expr", "parse_latex"}
    loader = next(n for n in nodes if isinstance(n, ast.FunctionDef) and n.name == "import_source")
    inside = {id(node) for node in ast.walk(loader)}
    assert all(
        id(n) in inside
        for n in nodes
        if isinstance(n, ast.Attribute) and n.attr in ("import_module", "exec_module")
    )


# --------------------------------------------------------------------------------------------------
# Rewards of one's own

MINE = """
import os, time
BINARY = False
def check(gold):
    return None if gold else "gold answer is empty"
def f(response, gold, problem):
    if response == "raise": raise KeyError("x")
    if response == "hang": time.sleep(1000)
    if response == "memory": return len(bytearray(2**34))
    if response == "depth": return f(response, gold, problem)
    if response == "exit": os._exit(3)
    if response == "nan": return float("nan")
    if response == "none": return None
    if response == "text": return "0.25"
    if response == "pair": return 0.75, "nearly"
    if response == "once":
        with open(gold["log"], "a") as file: file.write(problem + " ")
        return 1
    return -0.5 if problem in gold["wrong"] else len(response) / gold["long"]
lambda_f = lambda response: 1.0
number = 7
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return f"{path}:f"


def test_a_function_of_ones_own_is_graded_within_the_same_bounds(mine):
    """
    The gold answer is opaque, the whole response and the problem reach the function, and what fails
    is counted.
    """
    gold = {"wrong": ["p1", ["nested"]], "long": 10}
    expected = {
        "abc": (0.3, "scored"),
        "raise": (0.0, "crash"),
        "hang": (0.0, "timeout"),
        "memory": (0.0, "limit"),
        "depth": (0.0, "limit"),
        "exit": (0.0, "crash"),
        "nan": (0.0, "crash"),
        "none": (0.0, "crash"),
        "text": (0.25, "scored"),
        "pair": (0.75, "nearly"),
    }
    with reward.Grader(mine, workers=2, timeout_s=0.7, memory_gib=1.0) as grader:
        for response in expected:
            grader.submit(response, response, gold, "p0")
        grader.submit("wrong", "abc", gold, "p1")
        done = collect(grader)
        assert {key: (v.score, v.reason) for key, v in done.items()} == expected | {
            "wrong": (-0.5, "scored")
        }
        assert done["abc"].extracted is None and done["abc"].rule == "whole_response"
        counts = grader.counts
        assert (counts["graded"], counts["right"], counts["cached"]) == (11, 3, 0)
        assert (counts["timeout"], counts["limit"], counts["crash"]) == (1, 2, 4)


def test_a_function_is_asked_once_for_equal_arguments(mine, tmp_path):
    log = tmp_path / "log"
    golds = [{"log": str(log)}, {"log": str(log), "other": 1}]
    with reward.Grader(mine, workers=1) as grader:
        for i in range(8):
            grader.submit(i, "once", golds[i % 2], f"p{i // 4}")
        collect(grader)
        grader.submit("again", "once", golds[0], "p0")
        assert collect(grader)["again"].score == 1 and grader.counts["cached"] == 5
    assert sorted(log.read_text().split()) == ["p0", "p0", "p1", "p1"]


def test_long_responses_do_not_block(mine):
    """
    A worker that still starts does not read: two megabytes at once would have waited for it in
    submit().
    """
    gold = {"wrong": [], "long": 100_000}
    with reward.Grader(mine, workers=1) as grader:
        began = time.perf_counter()
        for i in range(20):
            grader.submit(i, str(i % 10) * 100_000 + "!" * i, gold)
        assert time.perf_counter() - began < 0.5
        done = collect(grader)
        assert {key: v.score for key, v in done.items()} == {i: 1 + i / 100_000 for i in range(20)}


def test_a_process_that_a_function_started_ends_with_it(tmp_path):
    (tmp_path / "child.py").write_text(
        textwrap.dedent("""
        import subprocess, time
        def f(response, gold, problem):
            child = subprocess.Popen(["sleep", "1000"])
            with open(gold, "w") as file: file.write(str(child.pid))
            time.sleep(1000)
        """)
    )
    with reward.Grader(f"{tmp_path}/child.py:f", workers=1, timeout_s=0.7) as grader:
        grader.submit(0, "x", str(tmp_path / "pid"))
        assert collect(grader)[0].reason == "timeout"
        until = time.monotonic() + 5
        while alive(pids := [int((tmp_path / "pid").read_text())]) and time.monotonic() < until:
            time.sleep(0.05)
        assert not alive(pids)


def test_a_module_is_found_by_name_and_a_file_by_path(mine, tmp_path, monkeypatch):
    """
    The workers find what the parent finds, also beside the file and on a path that only the parent
    knows.
    """
    (tmp_path / "helper.py").write_text(
        "def f(response, gold, problem):\n    return gold['long']\n"
    )
    (tmp_path / "outer.py").write_text("from helper import f\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for spec in ("outer:f", f"{tmp_path}/outer.py:f"):
        with reward.Grader(spec, workers=1) as grader:
            grader.submit(0, "x", {"long": 4})
            assert collect(grader)[0].score == 4
    monkeypatch.chdir(tmp_path)
    loaded = reward.load_reward("mine.py:f")
    assert (loaded.binary, loaded.check({}), loaded.check({"a": 1})) == (
        False,
        "gold answer is empty",
        None,
    )
    assert loaded.version == reward.load_reward(mine).version != reward.load_reward("math").version
    assert (
        reward.load_reward("outer:f").binary is None
        and reward.load_reward("outer:f").check(None) is None
    )


def test_a_wrong_reward_is_one_line_before_any_process(mine, tmp_path, monkeypatch):
    monkeypatch.setattr(reward, "Worker", None)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "syntax.py").write_text("def f(\n")
    (tmp_path / "ends.py").write_text("import sys\nsys.exit('bye')\n")
    (tmp_path / "odd.py").write_text("BINARY = 'yes'\ndef f(response, gold, problem): return 1\n")
    file = mine.removesuffix(":f")
    for spec, message in [
        ("maths", "wanted math, MODULE:FUNCTION or FILE.py:FUNCTION"),
        ("a:", "wanted math"),
        (":a", "wanted math"),
        (f"{tmp_path}/absent.py:f", "no such file"),
        ("nothing_of_that_name:f", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        (f"{tmp_path}/broken.py:f", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        (f"{tmp_path}/syntax.py:f", "SyntaxError"),
        (f"{tmp_path}/ends.py:f", "SystemExit: bye"),
        (f"{file}:g", "has no function g"),
        (f"{file}:number", "has no function number"),
        (
            f"{file}:lambda_f",
            "wanted lambda_f(response, gold, problem), found: too many positional arguments",
        ),
        (f"{tmp_path}/odd.py:f", "BINARY is 'yes', wanted True or False"),
        ("builtins:pow", "wanted pow(response"),
    ]:
        with pytest.raises(ValueError, match=r"^--reward ") as caught:
            reward.Grader(spec)
        assert message in str(caught.value) and "\n" not in str(caught.value), spec


def test_a_gold_answer_that_cannot_be_sent_or_checked_is_one_line(mine, tmp_path):
    assert "set is not JSON serializable" in reward.load_reward(mine).check({1, 2})
    (tmp_path / "c.py").write_text(MINE + "def check(gold):\n    return gold['a'] + '\\nb'\n")
    loaded = reward.load_reward(f"{tmp_path}/c.py:f")
    assert loaded.check({}) == "check raised KeyError: 'a'" and loaded.check({"a": "x"}) == "x b"


def test_the_shipped_reward():
    from tasks import exact

    assert exact.exact("I add. \n Answer: Paris ", "paris", "") == pytest.approx(1 - 0.0005 * 4)
    assert exact.exact("The capital is Lyon", "Paris", "") == 0 == exact.exact("", "Paris", "")
    assert exact.exact("so it is\n\n 42 \n", 42, "") == pytest.approx(1 - 0.0005 * 4)
    assert exact.exact("word " * 5000 + "\nParis", "Paris", "") == 0.5
    assert [bool(exact.check(gold)) for gold in ("x", 4, " ", None, True, ["x"])] == [
        False,
        False,
        True,
        True,
        True,
        True,
    ]
    with reward.Grader(
        "tasks/exact.py:exact" if Path.cwd() == ROOT else f"{ROOT}/tasks/exact.py:exact", workers=1
    ) as grader:
        grader.submit(0, "Answer: b", "b")
        assert collect(grader)[0].score == pytest.approx(1 - 0.0005 * 2)


def test_the_exception_of_a_function_is_shown_once(mine, capfd):
    with reward.Grader(mine, workers=1) as grader:
        for i in range(3):
            grader.submit(i, "raise", {"i": i})
        assert all(v.reason == "crash" for v in collect(grader).values())
    assert capfd.readouterr().err.count("KeyError: 'x'") == 1
