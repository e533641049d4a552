"""
Avg@k and Pass@k on benchmarks, alone or from train.py.

    python eval.py --model out/tiny-aero-s0/model --data arithmetic --template none --max_new 96
    python eval.py --model Qwen/Qwen2.5-Math-1.5B --data math500 my.jsonl --k 8 --max_new 3072
    torchrun --nproc_per_node 8 eval.py ...        problems are spread over the ranks
    python -m tools.regrade FILE.jsonl ...         grades saved responses again
    python -m tools.compare RUN RUN ...            sets runs of train.py against each other

For each data set the folder --out gets NAME.jsonl, a response per line as it was graded, and then
NAME.json, the summary. A set that TERM or INT stopped leaves NAME.partial.jsonl and no summary; the
same command draws it anew and then removes that file. The last line printed is one JSON object,
{data set: summary with its settings}; a command that was stopped prints none and exits with 1.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, count
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads must not spin; read with torch

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import reward
from config import Knobs, knob, parse
from hf import load_tokenizer, load_weights, read_config, resolve, stop_ids, write_json
from model import Model
from rollout import Request, Rollout, Sampler, Sampling, graded
from run import Stop, gather, start_ranks
from scores import NO_PASS, columns, pass_at_k, summarise, table  # noqa: F401 (for importers)
from streams import stream

SETS = " ".join(["files, hub names, arithmetic,", *data.NAMED])


@dataclass
class Config(Knobs):
    """An evaluation from the command line."""

    model: str = knob("", "model folder, or OWNER/NAME on the hub")
    data: list[str] = knob([], SETS)  # noqa: RUF009
    k: int = knob(8, "responses per problem", least=1)
    temperature: float = knob(1.0, "0 is greedy, and then k is 1", least=0.0)
    top_p: float = knob(1.0, "nucleus, 1 is off", above=0.0, most=1.0)
    top_k: int = knob(0, "only the most likely so many tokens, 0 is off", least=0)
    max_new: int = knob(1024, "longest response in tokens", least=1)
    template: str = knob("qwen_math", "qwen_math, r1, none, chat, a file, or text with {question}")
    reward: str = knob("math", "math, module:function or file.py:function, see reward.py")
    limit: int = knob(0, "first problems of each data set, 0 is all", least=0)
    seed: int = knob(0, "root of the random streams")
    slots: int = knob(64, "responses in flight on each rank", least=1)
    workers: int = knob(2, "grading processes on each rank", least=1)
    out: str = knob("", "folder for responses and summaries, out/eval/MODEL-TIME if empty")

    def check(self) -> None:
        if not self.model:
            raise ValueError("--model is missing")
        if not self.data:
            raise ValueError("--data is missing")
        if self.temperature == 0 and self.k > 1:
            equal = f"--k {self.k} responses would be equal"
            raise ValueError(f"--temperature 0 is greedy, and {equal}: wanted --k 1")


# --------------------------------------------------------------------------------------------------
# Draw and grade

BEAT_S = 10.0  # seconds between two lines of an output that is a file


@contextlib.contextmanager
def heartbeat(quiet: bool, status: Callable[[], str]):
    """Prints a line now and then, whatever the block waits for; a terminal has a bar instead."""
    over = threading.Event()

    def beat():
        while not over.wait(BEAT_S):
            print(status(), flush=True)

    thread = threading.Thread(target=beat, daemon=True)
    if not quiet and not sys.stdout.isatty():
        thread.start()
    try:
        yield
    finally:
        over.set()
        if thread.is_alive():
            thread.join()


by_problem = itemgetter("problem", "sample")  # the order of saved records


def record_of(rollout: Rollout, verdict: reward.Verdict, tokenizer) -> dict:
    problem = rollout.request.problem
    return {
        "problem": problem.id,
        "sample": rollout.request.index,
        "level": problem.level,
        "question": problem.text,
        "prompt": tokenizer.decode(problem.prompt),
        "response": tokenizer.decode(rollout.tokens, skip_special_tokens=True),
        "gold": problem.gold,
        "opened": problem.opens_thought,
        "length": len(rollout.tokens),
        "truncated": rollout.truncated,
    } | vars(verdict)


def evaluate(
    sampler: Sampler, grader: reward.Grader, tokenizer, problems: list[data.Problem], k: int,
    max_new: int, sampling: Sampling, seed: int, label: str = "", stop: Stop | None = None,
) -> tuple[dict | None, list[dict]]:  # fmt: skip
    """
    k responses to each problem, graded while others are decoded. Problem i goes to rank i % world.
    Every rank calls this once, with the same arguments, and gets (summary over all ranks, its own
    records). The random stream of a response hangs on (seed, problem id, sample) alone, so the
    scores are those of one rank. A truncated response is graded as it stands: a base model that
    boxes its answer and rambles on has answered. (In training it is wrong, so that it learns to
    end.)

    label: of a progress bar, none if empty. stop: once stop.asked on any rank, all return without a
    summary (None), as soon as the slowest of them has seen it or is done. Raises ValueError for
    k < 1, no problems, greedy decoding with k > 1.
    """
    if k < 1 or not problems:
        found = f"found k {k} and {len(problems)} problems"
        raise ValueError(f"evaluation: {found}, wanted one or more of each")
    if sampling.temperature == 0 and k > 1:
        found = f"greedy decoding gives k = {k} equal responses"
        raise ValueError(f"evaluation: {found}, wanted k = 1 or a temperature above 0")
    several = dist.is_initialized()
    own = problems[dist.get_rank() :: dist.get_world_size()] if several else problems
    requests = [Request(problem, problem.id, i, max_new) for problem in own for i in range(k)]
    sampler.begin(stream(seed, "evaluation"), sampling)
    sampler.add(requests)
    records = []
    begun = time.monotonic()

    def status() -> str:
        seconds = time.monotonic() - begun
        return f"{label}: {len(records)} of {len(requests)} responses graded after {seconds:.0f} s"

    hidden = None if label else True  # None: a bar on a terminal only
    bar = tqdm(total=len(requests), desc=label, unit=" responses", leave=False, disable=hidden)
    with bar, heartbeat(not label, status):
        for rollout, verdict in graded(sampler, grader, tokenizer, stop):
            records.append(record_of(rollout, verdict, tokenizer))
            bar.update()
        records.sort(key=by_problem)
        part = None
        if len(records) == len(requests):
            # The summary needs no texts, so they do not travel.
            texts = {"question", "prompt", "response", "gold", "extracted"}
            part = [{key: r[key] for key in r.keys() - texts} for r in records]
        parts = gather(part) if several else [part]
    if None in parts:
        return None, records
    about = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_new": max_new,
        "seed": seed,
        "reward": grader.reward.spec,
        "grader": grader.reward.version,  # scores of two runs compare where it is the same
    }
    return summarise(list(chain(*parts)), grader.reward.binary) | about, records


# --------------------------------------------------------------------------------------------------
# What is saved


def free_name(name: str, taken) -> str:
    """The first of NAME, NAME-2, ... that is not taken: two sets of one name are two sets."""
    numbered = (f"{name}-{number}" for number in count(2))
    return next(candidate for candidate in chain([name], numbered) if candidate not in taken)


def keep_old(out: str, name: str) -> None:
    """Raises ValueError where `save` would write over responses, or over something else."""
    if out and Path(out, f"{name}.jsonl").exists():
        raise ValueError(f"--out {out} holds {name}.jsonl already, wanted another folder")


def write_rows(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def partial_path(folder: Path, name: str) -> Path:
    """Where the responses of a set that was stopped are kept; no other file has that name."""
    return folder / f"{name}.partial.jsonl"


def save(folder: Path, name: str, records: list[dict], summary: dict) -> None:
    """NAME.jsonl with a response per line, and NAME.json with the summary and its settings."""
    write_rows(folder / f"{name}.jsonl", records)
    write_json(folder / f"{name}.json", summary)  # a summary that is there is complete
    partial_path(folder, name).unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# The command: everything that can be wrong with the input is found before a process group, a worker
# or a GPU is touched


class Inputs(NamedTuple):
    model: Model  # on the CPU
    tokenizer: object
    sets: dict[str, data.Problems]


def prepare(cfg: Config) -> Inputs:
    """Raises ValueError or FileNotFoundError with one line."""
    scorer = reward.load_reward(cfg.reward)
    folder = resolve(cfg.model)
    model_cfg = read_config(folder)
    tokenizer = load_tokenizer(folder, model_cfg.vocab_size)
    context = model_cfg.max_position_embeddings
    if cfg.max_new >= context:
        full = f"--max_new {cfg.max_new} leaves no room for a prompt"
        raise ValueError(f"{full} in the model's context of {context} tokens")
    room = context - cfg.max_new
    sets = {}
    for spec in cfg.data:
        problems = data.load(spec, tokenizer, cfg.template, cfg.limit, room, scorer)
        name = free_name(problems.report.name, sets)
        keep_old(cfg.out, name)
        sets[name] = problems
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    with torch.device("meta"):
        model = Model(model_cfg).to(dtype)
    load_weights(model.to_empty(device="cpu"), folder)
    return Inputs(model, tokenizer, sets)


def make_sampler(cfg: Config, inputs: Inputs, device) -> Sampler:
    model, tokenizer, sets = inputs
    longest = max(len(problem.prompt) for problem in chain(*sets.values()))
    ends = stop_ids(tokenizer, model.cfg.eos_token_ids)
    dtype = next(model.parameters()).dtype
    sampler = Sampler(model.cfg, cfg.slots, cfg.max_new + longest, ends, device, dtype)
    sampler.load(model.named_parameters())
    return sampler


def keep_partial(folder: Path, name: str, records: list[dict], wanted: int) -> None:
    path = partial_path(folder, name)
    write_rows(path, records)
    print(f"stopped by a signal: {len(records)} of {wanted} responses to {name} are in {path}")


def run(cfg: Config, inputs: Inputs) -> dict[str, dict]:
    """Summaries of the sets that were not stopped, by name. Rank 0 prints and saves."""
    device = start_ranks()
    lead = dist.get_rank() == 0
    stop = Stop()
    grader = reward.Grader(cfg.reward, cfg.workers)
    if lead and grader.reward.binary is False:
        print(f"--reward {cfg.reward}: {NO_PASS}", flush=True)
    with heartbeat(not lead, lambda: "preparing the sampler"):
        sampler = make_sampler(cfg, inputs, device)
    sampling = Sampling(cfg.temperature, cfg.top_p, cfg.top_k)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(cfg.out or f"out/eval/{Path(cfg.model).resolve().name}-{stamp}")
    results = {}
    for name, problems in inputs.sets.items():
        if lead:
            print(problems.report, flush=True)
        summary, own = evaluate(
            sampler, grader, inputs.tokenizer, problems, cfg.k, cfg.max_new, sampling, cfg.seed,
            label=name if lead else "", stop=stop,
        )  # fmt: skip
        records = sorted(chain(*gather(own)), key=by_problem)
        if summary is None:
            if lead:
                keep_partial(folder, name, records, cfg.k * len(problems))
            break
        source = {"rows": problems.report.rows, "revision": problems.report.revision}
        results[name] = summary | {"model": cfg.model, "template": cfg.template} | source
        if lead:
            save(folder, name, records, results[name])
    if lead and results:
        print(f"responses saved in {folder}")
    grader.close()
    dist.barrier()  # ranks leave together, as in train.py
    dist.destroy_process_group()
    return results


def main(argv: list[str] | None = None) -> int:
    lead = os.environ.get("RANK", "0") == "0"
    try:
        cfg = parse(Config, sys.argv[1:] if argv is None else argv, __doc__)
        with heartbeat(not lead, lambda: f"reading {cfg.model} and the data"):
            inputs = prepare(cfg)
    except (ValueError, OSError) as error:
        if lead:
            print(f"error: {error}", file=sys.stderr)
        return 2
    results = run(cfg, inputs)
    stopped = len(results) < len(inputs.sets)
    if lead and results:
        print(table(results))
    if lead and not stopped:
        print(json.dumps(results))
    return int(stopped)


if __name__ == "__main__":
    sys.exit(main())
