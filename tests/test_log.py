"""log.py: what one sees of a run. Whole runs are in test_train.py."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import log
from config import Config
from metrics import GroupRecord

SHORT = SimpleNamespace(steps=4, show_every=4)


def row_of(**changes):
    return {
        "reward/mean": 0.5,
        "compute/saved_frac": 0.5,
        "perf/gen_tokens_per_s": 1e3,
        "time/step": 2.0,
    } | changes


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def scalars(run):
    """{name: {step: value}} on the board."""
    board = EventAccumulator(str(run / "tb"), size_guidance=dict(tensors=0, scalars=0)).Reload()
    return {
        name: {event.step: round(event.value, 6) for event in board.Scalars(name)}
        for name in board.Tags()["scalars"]
    }


def scores_of(value):
    return {"held": {"avg_at_k": value}}, {"eval/held/avg_at_k": value}


# ----------------------------------------------------------------------------------- rows and lines


def test_the_log(tmp_path, capsys):
    """The time left counted the evaluation before step 0, and the score before training stood in
    the closing table alone."""
    board = log.Log(tmp_path, 0, SHORT, rank=0)
    scores, metrics = scores_of(0.1)
    board.evaluation(0, metrics, scores)
    board.step(1, row_of(), scores)
    board.step(2, row_of(**{"loss/policy": 0.0, "time/step": 4.0}), {})
    board.step(4, row_of(), {})
    board.close()
    out = capsys.readouterr().out
    assert out.startswith("step 0/4 | held 0.100\n")
    assert "step 1/4 | reward 0.500 | held 0.100 | 1.0k tokens/s | saved 50% | 00:06 left" in out
    assert [row["step"] for row in rows_of(tmp_path)] == [0, 1, 2, 4]
    assert scalars(tmp_path)["time/step"] == {1: 2, 2: 4, 4: 2}
    assert scalars(tmp_path)["loss/policy"] == {2: 0}


def test_a_run_without_evaluation_has_a_row_of_step_0(tmp_path, capsys):
    board = log.Log(tmp_path, 0, SHORT, rank=0)
    board.evaluation(0, {}, {})
    board.close()
    assert rows_of(tmp_path) == [{"step": 0}] and not capsys.readouterr().out


def test_other_ranks_are_silent(tmp_path, capsys):
    board = log.Log(tmp_path, 0, SHORT, rank=1)
    scores, metrics = scores_of(0.1)
    board.evaluation(0, metrics, scores)
    board.step(1, row_of(), scores)
    board.rollouts(1, ["a group"], [], None)
    board.say("text")
    board.close()
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_a_step_whose_evaluation_was_stopped(tmp_path, capsys):
    """Its row is written without scores, which come when the run goes on: as if nothing had
    happened, in the file and on the board."""
    scores, metrics = scores_of(0.7)
    for folder, stopped in (("whole", False), ("stopped", True)):
        run = tmp_path / folder
        run.mkdir()
        board = log.Log(run, 0, SHORT, rank=0)
        board.step(1, row_of(), {})
        if stopped:
            board.step(2, row_of(), None)
            board.close()
            with open(run / "metrics.jsonl", "a") as file:
                file.write('{"step": 3, "torn')
            capsys.readouterr()
            board = log.Log(run, 2, SHORT, rank=0)
            board.evaluation(2, metrics, scores)
            assert capsys.readouterr().out == "step 2/4 | held 0.700\n"
            board.evaluation(2, metrics, scores)  # the same resume again
            assert not capsys.readouterr().out
        else:
            board.step(2, row_of(**metrics), scores)
        board.step(3, row_of(), {})
        board.close()
    names = ("whole", "stopped")
    whole, amended = [(tmp_path / name / "metrics.jsonl").read_text() for name in names]
    assert amended == whole
    assert scalars(tmp_path / "stopped") == scalars(tmp_path / "whole")
    assert not list(tmp_path.glob("*/*.partial"))


def test_an_amended_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    board = log.Log(tmp_path, 0, SHORT, rank=0)
    board.step(1, row_of(), {})
    before = (tmp_path / "metrics.jsonl").read_text()

    def killed(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(log.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        board.amend(1, {"eval/held/avg_at_k": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_resumed_run_forgets_what_it_does_again(tmp_path, monkeypatch):
    """Rows and evaluations of later steps go, and a row that a kill cut short. From step 0 it also
    evaluates again."""
    (tmp_path / "eval").mkdir()
    steps = {log_step: tmp_path / "eval" / f"a-step{log_step}.json" for log_step in (0, 2, 4)}
    for path in steps.values():
        path.write_text("{}")
        path.with_suffix(".jsonl").write_text("")
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        lines = [json.dumps({"step": step}) + "\n" for step in range(5)]
        (tmp_path / name).write_text("".join(lines) + '{"step": 5, "rew')
    purged = []
    board = SimpleNamespace(close=lambda: None)

    def writer(path, purge_step):
        purged.append(purge_step)
        return board

    monkeypatch.setattr(log, "SummaryWriter", writer)
    for start, kept in ((2, [0, 1, 2]), (0, [])):
        log.Log(tmp_path, start, SHORT, rank=0).close()
        assert [row["step"] for row in rows_of(tmp_path)] == kept
        assert len((tmp_path / "rollouts.jsonl").read_text().splitlines()) == len(kept)
        assert {step for step, path in steps.items() if path.exists()} == {0, *kept} - {1}
    assert purged == [3, 1]


def test_the_bar_is_where_the_terminal_is(tmp_path, capsys, monkeypatch):
    """Whether stdout is a terminal decided about a bar on stderr: `2> file` got it, redrawn line
    after line."""
    monkeypatch.setattr(log.sys.stdout, "isatty", lambda: True, raising=False)
    board = log.Log(tmp_path, 0, SHORT, rank=0)
    board.step(1, row_of(), {})
    board.close()
    out, err = capsys.readouterr()
    assert "1/4" in out and "left" in out and not err


def test_colour_is_for_terminals(monkeypatch):
    assert log.paint("x", "red") == "x"
    monkeypatch.setattr(log.sys.stdout, "isatty", lambda: True, raising=False)
    assert log.paint("x", "red") == "\x1b[31mx\x1b[0m"


def test_a_row_is_in_the_order_of_groups():
    """A metric of a group that nobody knows, of a fork say, comes last."""
    names = ["mine/x", "time/step", "loss/kl", "reward/std", "eval/a/b", "reward/mean"]
    assert list(log.in_order(dict.fromkeys(names))) == [
        "reward/std", "reward/mean", "eval/a/b", "loss/kl", "time/step", "mine/x"
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------ samples


def sample_group(place=3):
    """Three rollouts: right and kept; right but truncated, so wrong; wrong."""
    problem = SimpleNamespace(id=11, prompt=(1, 2), gold=["7"], level="2")
    rollouts, verdicts = {}, {}
    for index, (score, truncated) in enumerate([(1.0, False), (1.0, True), (0.0, False)]):
        reason = "right" if score else "wrong"
        rollouts[index] = SimpleNamespace(tokens=[5, 6], truncated=truncated)
        verdicts[index] = SimpleNamespace(score=score, extracted="7", rule="boxed", reason=reason)
    group = SimpleNamespace(place=place, problem=problem, rollouts=rollouts, verdicts=verdicts)
    record = GroupRecord(
        place=place,
        problem=11,
        prompt=2,
        rewards=[1.0, 0.0, 0.0],
        rounds=[0, 0, 1],
        kept=[0, 2],
        advantage=[1.5, -0.5],
        lengths=[2, 2, 2],
        truncated=[False, True, False],
        reasons=["right", "right", "wrong"],
    )
    return group, record


TOKENIZER = SimpleNamespace(decode=lambda ids, **options: " ".join(map(str, ids)))


def test_samples(tmp_path, capsys):
    """One group of a step, by its place: records are those of all ranks."""
    board = log.Log(tmp_path, 0, SHORT, rank=0)
    group, record = sample_group()
    _, other = sample_group(place=2)
    other.rewards = [0.0] * 3
    for step in (1, 2):
        board.rollouts(step, [group], [other, record], TOKENIZER)
    board.close()
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and rows[0] == {
        "step": 1, "problem": 11, "level": "2", "round": 0, "sample": 0, "prompt": "1 2",
        "response": "5 6", "gold": ["7"], "extracted": "7", "verdict": "right", "rule": "boxed",
        "reason": "right", "length": 2, "truncated": False, "kept": True, "advantage": 1.5,
    }  # fmt: skip
    shown = [(row["verdict"], row["reason"], row["kept"], row["advantage"]) for row in rows[1:3]]
    assert shown == [("wrong", "truncated", False, None), ("wrong", "wrong", True, -0.5)]
    title = "step 1, problem 11: right (right), gold ['7'], found 7, kept, advantage +1.50"
    assert capsys.readouterr().out == f"--- {title}\n1 2\n5 6\n---\n"  # of step 1, not of 2
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance=dict(tensors=0)).Reload()
    text = [e.tensor_proto.string_val[0].decode() for e in events.Tensors("rollout/text_summary")]
    assert text[0] == f"    {title}\n    \n    1 2\n    5 6" and len(text) == 2


# ------------------------------------------------------------------------------------------- header


@pytest.fixture
def show(monkeypatch):
    """The header of these settings, as {label: text}."""
    monkeypatch.setattr(log.dist, "get_world_size", lambda: 2)
    problem = SimpleNamespace(prompt=(1, 2, 3))
    problems = type("Problems", (list,), {"report": "arithmetic, 8 rows"})([problem])
    shape = SimpleNamespace(
        model_type="qwen2", hidden_size=4, num_attention_heads=2, num_key_value_heads=2,
        head_dim=2, intermediate_size=8, vocab_size=10, num_hidden_layers=1,
    )  # fmt: skip
    inputs = SimpleNamespace(model_cfg=shape, problems=problems, held_out={"held": problems})
    sampler = SimpleNamespace(
        path="eager steps", kv_bytes=2**30, cache_tokens=4096, slots=256, context=99
    )
    planned = SimpleNamespace(memory={"weights": 2**30, "sampler": 2**31})

    def header(cfg, device="cpu"):
        device = torch.device(device)
        model = torch.nn.Linear(10, 123, bias=False)
        text = log.header(cfg, "out/x", inputs, model, sampler, planned, device)
        labels, lines = [], {}
        for line in text.splitlines():
            labels.append(line[:10].strip() or labels[-1])
            lines.setdefault(labels[-1], []).append(line[10:])
        return {label: "\n".join(texts) for label, texts in lines.items()}

    return header


def test_the_header(show):
    lines = show(Config(name="x"))
    assert lines["run"] == "out/x: aero, 120 steps of 32 problems, seed 0"
    assert lines["settings"] == "preset tiny, all as by default"
    assert lines["model"] == "embedded base: qwen2, 1,230 parameters, L1 D4 V10"
    assert lines["problems"] == (
        "arithmetic, 8 rows; template none\nevaluated on arithmetic, 8 rows, 8 responses each"
    )
    assert lines["device"] == "2 x CPU, fp32; attention by SDPA; sampler by eager steps"
    assert lines["memory"] == (
        "3.0 GiB per process (1.0 weights, 2.0 sampler)\n"
        "1.00 GiB of it are KV cache: 4,096 tokens, at most 256 rollouts of at most 99"
    )
    assert "warm-up" not in lines and "GPU" not in "".join(lines.values())
    assert lines["compute"].endswith("16 rollouts of 96 tokens to a problem, all trained on")


def test_the_header_names_what_differs(show):
    """Preset, loss, reward, every setting that is not the default; a template of several lines on
    one, as one would type it."""
    cfg = Config(
        name="x", model="Qwen/X", lr=1e-6, template="Q: {question}\nA:", reward="mine.py:f",
        algo="dapo", steps=3, warmup=10,
    )  # fmt: skip
    lines = show(cfg)
    assert lines["run"] == "out/x: dapo, 3 steps of 32 problems, seed 0, reward mine.py:f"
    assert lines["settings"].splitlines() == [
        "preset pretrained, differing from the defaults: --model Qwen/X",
        "--template 'Q: {question}\\nA:' --reward mine.py:f --algo dapo --steps 3 --lr 1e-06",
        "--warmup 10",
    ]
    assert lines["problems"].startswith("arithmetic, 8 rows; template 'Q: {question}\\nA:'\n")
    assert lines["compute"].endswith("all trained on, and no refill")
    assert lines["warm-up"] == (
        "takes 10 steps and the run ends after 3: the learning rate does not get to 1e-06"
    )


def test_a_run_that_just_leaves_its_warm_up(show):
    assert "warm-up" in show(Config(steps=5, warmup=5))
    assert "warm-up" not in show(Config(steps=6, warmup=5))


def test_a_gpu_is_named(show, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    lines = show(Config(), "cuda")
    assert lines["device"].startswith("2 x NVIDIA H200, bf16; attention by ")
    assert lines["memory"].startswith("3.0 GiB per GPU (")


def test_numbers_of_numpy_are_written_as_they_are(tmp_path):
    board = log.Log(tmp_path, 0, SHORT, rank=0)
    third = np.mean([0.0, 0.0, 1.0])
    board.step(1, row_of(**{"group/flat_frac": third, "group/success": [third]}), {})
    board.close()
    (row,) = rows_of(tmp_path)
    assert row["group/flat_frac"] == 1 / 3 and row["group/success"] == [1 / 3]
