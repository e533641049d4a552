"""
Reinforcement learning with verifiable rewards, by AERO (arXiv 2602.14338) or one of its baselines: the whole story.

    python train.py                                    the embedded default: built-in task, tiny base model, CPU or one GPU
    python train.py --algo grpo                        the same with GRPO
    python train.py --base small                       a larger base model and harder problems, on a GPU
    torchrun --nproc_per_node 8 train.py --model Qwen/Qwen2.5-Math-1.5B          MATH, 8 GPUs
    python train.py settings.json                      every flag from a JSON file; `--help` explains them

One step:  data.nth -> Sampler -> Grader -> aero.choose -> packed micro-batches, FSDP2 -> Sampler.load
Two problems never wait for each other: a problem's next round is requested as soon as its own rollouts are graded, while
the sampler decodes those of the others. A decision is only taken on complete rounds; on half a round, the shorter half
would decide.

A run writes out/NAME/ and nothing else (the embedded base model is cached beside it): config.json, metrics.jsonl (one
object per step), rollouts.jsonl (samples), eval/ (every response), tb/, checkpoints/step_N/, model/ (a Hugging Face folder),
best/ (another, of the best evaluation after step 0), curves.png. The same command again continues from the last checkpoint.
Nothing that decides the result depends on the number of ranks, on micro-batches or on who finished first: random streams
hang on (seed, step, problem, rollout, position), denominators are counted once over all ranks.

Deviations from the paper, whose appendix was not public when this was written:
 1. n_explore 8, n_extra 2, n_total 16, n_same 4, Beta(1, 1) are our reading of its description.
 2. Strictly on-policy by default: one optimizer step per batch, so the ratio is exactly 1 and the clip never acts.
 3. No KL term. 4. A truncated response is wrong whatever it says, and is trained on like any other wrong one;
    evaluation grades it as it stands.

Shapes: T packed tokens, S rollouts, R trained response tokens.
"""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from transformers import HfArgumentParser

import aero
import data
import eval
import learner
import report
from aero import knob
from base import RECIPES, base_config, base_model, character_tokenizer
from learner import Trained, full_weights, make_learner, update
from model import Model, ModelConfig, find_weights, read_weights, resolve, save_folder
from reward import Grader, Verdict
from rollout import Request, Rollout, Sampler, Sampling


@dataclass
class Config(aero.Settings):
    """Every setting of a run; those of the algorithm stand in aero.Settings. Defaults are those of `python train.py`."""

    # model and data
    model: str = knob("", "model folder or hub name; empty: the embedded base model, trained at first start")
    base: str = knob("tiny", "which embedded base model: tiny, or small, of 24 million parameters, which wants a GPU")
    data: str = knob("arithmetic:train:8000:1-7", "problems to train on: a file, a hub name, the built-in task (see data.py)")
    eval_data: str = knob("arithmetic:heldout:196:1-7", "comma-separated problems to evaluate on; empty: none")
    limit: int = knob(0, "problems to train on, the first so many, 0: all")
    template: str = knob("none", "prompt template: qwen_math, r1, none, chat, or a file or text with {question}")
    # sampling
    problems: int = knob(32, "problems per step, over all ranks")
    max_new: int = knob(96, "most response tokens; longer ones are cut and count as wrong")
    temperature: float = knob(1.0, "of the policy, when it samples and when it is trained")
    slots: int = knob(256, "rollouts in flight per rank, at most")
    kv_gib: float = knob(0.0, "GiB of KV cache per rank; 0: what the slots can fill, as far as the learner leaves it")
    graders: int = knob(1, "grading processes per rank")
    rescue_barrier: bool = knob(False, "start no round before all problems have finished theirs; slower, same rollouts")
    # learning
    steps: int = knob(120, "optimizer batches")
    updates_per_batch: int = knob(1, "optimizer steps on each batch; above 1 the ratio is against the sampler's log-probs")
    lr: float = knob(3e-4, "learning rate after warm-up, constant")
    warmup: int = knob(5, "steps of linear warm-up")
    weight_decay: float = knob(0.0, "of AdamW, on matrices")
    grad_clip: float = knob(1.0, "largest gradient norm")
    micro_tokens: int = knob(16384, "tokens per micro-batch, prompt and response")
    checkpoint_activations: bool = knob(False, "recompute blocks in backward: less memory, a third more training FLOPs")
    compile: bool = knob(False, "torch.compile the blocks: a tenth faster, less memory, about ten seconds of start-up")
    is_cap: float = knob(0.0, "truncated importance weights min(learner / sampler, cap) on tokens; 0: none")
    shard: str = knob("node", "weights are sharded inside a node and replicated across (node), or sharded over all (world)")
    reshard: bool = knob(False, "free gathered weights and gradients after every block: less memory, more traffic")
    # the run
    seed: int = knob(0, "root of every random stream")
    out: str = knob("out", "folder for runs and the embedded base model")
    name: str = knob("", "folder of this run under --out; empty: MODEL-ALGO-sSEED")
    eval_every: int = knob(20, "steps between evaluations; there is one before step 0 and one at the end")
    eval_k: int = knob(8, "responses per problem in an evaluation")
    eval_limit: int = knob(0, "problems per evaluation set, 0: all")
    save_every: int = knob(40, "steps between checkpoints; there is one at the end")
    show_every: int = knob(40, "steps between sample rollouts on the console")

    def check(self):
        super().check()
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"--{name} {value}: wanted a finite number")
        for name in ("problems", "max_new", "slots", "graders", "steps", "updates_per_batch", "micro_tokens", "eval_every",
                     "eval_k", "save_every", "show_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: wanted 1 or more")
        for name in ("lr", "temperature", "grad_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} {getattr(self, name)}: wanted a number above 0")
        for name in ("warmup", "weight_decay", "limit", "eval_limit", "seed", "is_cap", "kv_gib"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)}: wanted 0 or more")
        if self.base not in RECIPES:
            raise ValueError(f"--base {self.base}: wanted one of {' '.join(RECIPES)}")
        if self.model and self.base != "tiny":
            raise ValueError(f"--base {self.base} --model {self.model}: wanted one of the two")
        if self.shard not in ("node", "world"):
            raise ValueError(f"--shard {self.shard}: wanted one of node world")
        if Path(self.name).name != self.name or self.name.startswith("."):
            raise ValueError(f"--name {self.name}: wanted a plain folder name under --out {self.out}")


# What --model changes, unless a flag says otherwise: Qwen2.5-Math-1.5B on MATH with a context of 4096. Compiling takes ten
# seconds once and a tenth off every update; on a CPU a minute, for little.
PRETRAINED = dict(
    data="math", eval_data="math500", template="qwen_math", problems=128, max_new=3072, slots=256, graders=4, steps=400,
    lr=1e-6, warmup=10, micro_tokens=16384, compile=torch.cuda.is_available(), eval_every=20, eval_k=4, save_every=20,
    show_every=5,
)
# What --base small changes: problems of which a third is settled from the start, one way or the other. A dozen such runs fit
# side by side on one GPU.
SMALL = dict(
    data="arithmetic:train:16000:5-18", eval_data="arithmetic:heldout:1400:5-18", problems=16, max_new=1024, slots=1024,
    steps=100, lr=3e-5, micro_tokens=16384, save_every=100,
)


def parse(argv) -> Config:
    """Flags, and JSON files of settings, which flags override. ValueError, one line, for anything unknown or contradictory."""
    parser = HfArgumentParser(Config, description=__doc__.split("\n\n")[0], allow_abbrev=False)

    def refuse(message):
        raise ValueError(message)

    parser.error = refuse
    known, rest = Config.__dataclass_fields__, parser.parse_known_args(argv)[1]
    files, unknown = [a for a in rest if a.endswith(".json")], [a for a in rest if not a.endswith(".json")]
    if unknown:
        raise ValueError(f"unknown {' '.join(unknown)}; known are {' '.join('--' + name for name in sorted(known))}")
    given = {}
    for file in files:
        try:
            found = json.loads(Path(file).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"settings file {file}: {error}") from None
        if not isinstance(found, dict):
            raise ValueError(f"settings file {file}: found a JSON {type(found).__name__}, wanted an object")
        if found.keys() - known:
            raise ValueError(f"settings file {file}: unknown {', '.join(sorted(found.keys() - known))}")
        given |= found
    # Weakest first: Config, what a pretrained model changes, what the algorithm's authors published, files, flags. What a
    # file says goes the way of a flag, so its types are checked like a flag's.
    flags = [f"--{name}={value}" for name, value in given.items()] + [a for a in argv if a not in files]
    first = parser.parse_args(flags)
    aero.need_known(first.algo)
    start = PRETRAINED if first.model else SMALL if first.base == "small" else {}
    parser.set_defaults(**start | aero.ALGORITHMS[first.algo].defaults)
    (cfg,) = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    cfg.name = cfg.name or f"{Path(cfg.model).name or cfg.base}-{cfg.algo}-s{cfg.seed}"
    cfg.check()
    return cfg


# --------------------------------------------------------------------------------------------------------------------
# Ranks. Collectives happen in gather, collect, update, evaluate, full_weights and save_checkpoint, and never inside the
# sampler or the grader: ranks decode different numbers of steps.

def start_ranks() -> tuple[int, int, torch.device]:
    """One process is a world of one: the same path as under torchrun."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"     # objects travel over gloo
    if device.type == "cuda":
        torch.cuda.set_device(device)
    where = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, **where)
    return rank, world, device


def gather(x) -> list:
    """Every rank's x, in the order of ranks."""
    parts = [x] * dist.get_world_size()
    if len(parts) > 1:
        dist.all_gather_object(parts, x)
    return parts


class Stop:
    """TERM and INT end the run at the next safe point, with a checkpoint. A second INT kills as usual."""

    def __init__(self):
        self.asked = False
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self.ask)

    def ask(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


# --------------------------------------------------------------------------------------------------------------------
# Sample and grade

@dataclass
class Group:
    """All rollouts of one problem in one step. `place`: its position among the step's problems, the same on any world size."""

    place: int
    problem: data.Problem
    rounds: list[int] = field(default_factory=list)             # round in which rollout i was asked for
    rollouts: dict[int, Rollout] = field(default_factory=dict)  # by index; they finish in any order
    verdicts: dict[int, Verdict] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.verdicts) == len(self.rounds)

    @property
    def rewards(self) -> np.ndarray:
        """(n,) in the order in which they were asked for. A truncated rollout is wrong."""
        return np.array([self.verdicts[i].score * (not self.rollouts[i].truncated) for i in range(len(self.rounds))])

    def ask(self, n: int, max_new: int) -> list[Request]:
        first, number = len(self.rounds), self.rounds[-1] + 1 if self.rounds else 0
        self.rounds += [number] * n
        return [Request(self.place, i, self.problem.prompt, max_new) for i in range(first, first + n)]


def draw(requests, groups, cfg, sampler, grader, tokenizer, stop) -> float:
    """
    Draws and grades `requests` and all further rounds that the algorithm asks for. Rank-local. Returns the seconds in which
    decoding had ended and grading had not. After a stop signal it returns early, with incomplete groups.
    """
    algo, by_place, ready, waited = aero.ALGORITHMS[cfg.algo], {g.place: g for g in groups}, [], 0.0
    sampler.add(requests)
    while (sampler.busy or grader.pending) and not stop.asked:
        for rollout in sampler.step():
            group = by_place[rollout.problem]
            group.rollouts[rollout.index] = rollout
            response = tokenizer.decode(rollout.tokens, skip_special_tokens=True)
            grader.submit((rollout.problem, rollout.index), response, group.problem.gold)
        begun = time.perf_counter()
        decoding = sampler.busy
        for (place, index), verdict in grader.poll() if decoding else grader.wait(0.1):
            by_place[place].verdicts[index] = verdict
            if by_place[place].complete:
                ready.append(by_place[place])
        waited += 0 if decoding else time.perf_counter() - begun
        if not cfg.rescue_barrier or not (sampler.busy or grader.pending):
            for group in ready:
                sampler.add(group.ask(algo.more(group.rewards, cfg), cfg.max_new))
            ready.clear()
    return waited


def collect(cursor, problems, cfg, rank, world, draw_all, stop) -> tuple[list[Group], int, float]:
    """
    This rank's groups of one step, complete. Problems come from an endless order of epochs, from `cursor` on: number
    `place` of the step is drawn by rank place % world. Returns (groups, new cursor, seconds waited for graders).
    """
    def take(places):
        found = [(place, data.nth(len(problems), cfg.seed, cursor + place)) for place in places]
        return [Group(place, problems[i]) for place, i in found if place % world == rank]

    def run(asked):     # [(group, further rollouts)]
        return draw_all([request for group, n in asked for request in group.ask(n, cfg.max_new)], groups)

    algo, taken = aero.ALGORITHMS[cfg.algo], cfg.problems
    groups = take(range(taken))
    waited = run([(g, algo.first(cfg)) for g in groups])

    # Rounds whose size depends on other problems: the only ones at which ranks meet.
    while cfg.algo == "aero" and cfg.rescue and cfg.rescue_budget == "pool" and not any(gather(stop.asked)):
        state = [(g.place, len(g.rounds), aero.unsolved(g.rewards, cfg)) for g in groups]
        state = sorted(itertools.chain(*gather(state)))
        waiting = [place for place, _, unsolved in state if unsolved]
        spare = cfg.problems * cfg.n_total - sum(n for _, n, _ in state)
        share = dict(zip(waiting, aero.deal(len(waiting), spare, cfg)))
        if not any(share.values()):
            break
        waited += run([(g, share[g.place]) for g in groups if share.get(g.place)])
    for _ in range(cfg.refill_cap * algo.refill):
        if any(gather(stop.asked)):     # groups may be incomplete
            break
        missing = cfg.problems - sum(gather(sum(not aero.is_flat(g.rewards) for g in groups)))
        if missing == 0:
            break
        fresh, taken = take(range(taken, taken + missing)), taken + missing
        groups += fresh
        waited += run([(g, algo.first(cfg)) for g in fresh])
    return groups, cursor + taken, waited


def choose(groups, step, cfg) -> tuple[list[Trained], list[dict]]:
    """What to train on of this rank's groups, and one plain record per group for accounting and samples."""
    batch, records = [], []
    for g in groups:
        kept, advantage = aero.choose(g.rewards, cfg, np.random.default_rng([cfg.seed, step, g.place]))
        for i, a in zip(kept, advantage):
            batch.append(Trained(g.place, g.problem.prompt, g.rollouts[i].tokens, g.rollouts[i].logps, float(a)))
        n = range(len(g.rounds))
        records.append(dict(
            place=g.place, prompt=len(g.problem.prompt), rewards=g.rewards.tolist(), rounds=g.rounds, kept=kept.tolist(),
            advantage=advantage.tolist(), lengths=[len(g.rollouts[i].tokens) for i in n],
            truncated=[g.rollouts[i].truncated for i in n], reasons=[g.verdicts[i].reason for i in n],
        ))
    return batch, records


# --------------------------------------------------------------------------------------------------------------------
# Keep

def learner_state(model, optimizer) -> dict:
    """What a checkpoint holds of the learner, by parameter name: shards stay shards, so any number of ranks can load it."""
    named = dict(model.named_parameters())
    return {"weights": {n: p.detach() for n, p in named.items()}} | {
        key: {n: optimizer.state[p][key] for n, p in named.items()} for key in ("step", "exp_avg", "exp_avg_sq")
    }


def save_checkpoint(run: Path, progress: dict, model, optimizer, rank: int) -> None:
    """A fresh folder, renamed when all of it is on disk; then all but the last two are removed."""
    final = run / "checkpoints" / f"step_{progress['step']}"
    if gather(final.is_dir())[0]:   # stopped right after a resume: the same state is there
        return
    partial = final.with_suffix(".partial")
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    dcp.save(learner_state(model, optimizer), checkpoint_id=partial)
    if rank == 0:
        with open(partial / "progress.json", "w") as file:
            json.dump(progress, file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(final)
        for old in checkpoints(run)[:-2]:
            shutil.rmtree(old)
    dist.barrier()


def checkpoints(run: Path) -> list[Path]:
    """Complete ones, oldest first."""
    return sorted((p.parent for p in run.glob("checkpoints/step_*/progress.json") if p.parent.suffix != ".partial"),
                  key=lambda p: int(p.name.removeprefix("step_")))


def load_checkpoint(folder: Path, model, optimizer) -> dict:
    dcp.load(learner_state(model, optimizer), checkpoint_id=folder)
    return json.loads((folder / "progress.json").read_text())


def open_run(cfg: Config) -> Path:
    """
    The run's folder. What is there must be of the same configuration, but for `steps`: a run can be made longer. ValueError
    names the first setting that differs.
    """
    run, now = Path(cfg.out) / cfg.name, asdict(cfg)
    if (run / "config.json").is_file():
        before = asdict(Config()) | json.loads((run / "config.json").read_text())["settings"]   # an older run lacks newer ones
        for key in now:
            if key not in ("steps", "out") and before.get(key) != now[key]:
                raise ValueError(f"{run} is a run with --{key} {before.get(key)}, not {now[key]}: give this one another --name")
        done = [int(folder.name.removeprefix("step_")) for folder in checkpoints(run)]
        if done and done[-1] > cfg.steps:
            raise ValueError(f"{run} has done {done[-1]} steps, --steps {cfg.steps} is less: give this one another --name")
    elif run.exists() and any(run.iterdir()):
        raise ValueError(f"{run} holds files that are not a run's: give this one another --name")
    return run


def versions() -> dict:
    """What a figure of this run depends on beside its settings."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return dict(commit=git.stdout.strip() or "unknown", torch=torch.__version__, python=sys.version.split()[0], device=gpu)


def write_json(path: Path, value: dict) -> None:
    """Complete or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.rename(path)


def export(folder: Path, model, model_cfg, tokenizer, card: str, rank: int) -> None:
    """A Hugging Face folder of the policy, in the dtype of the model that the run began with."""
    weights = {name: w.cpu() if rank == 0 else None for name, w in full_weights(model)}
    if rank == 0:
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        kind = model_cfg.raw.get("dtype") or model_cfg.raw.get("torch_dtype") or "float32"
        save_folder(partial, model_cfg, weights, tokenizer, getattr(torch, kind))
        (partial / "README.md").write_text(card, encoding="utf-8")
        old = folder.with_suffix(".old")    # renamed, so that a kill during the slow removal leaves a whole folder
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------------------
# The run

class Clock:
    """Seconds of a step by phase; `other` is what no phase claims, so that the parts sum to the step."""

    PHASES = ("rollout", "reward", "update", "sync", "eval", "save")

    def __init__(self, device):
        self.device, self.begun, self.parts = device, time.perf_counter(), dict.fromkeys(self.PHASES, 0.0)
        self.last = self.begun

    def phase(self, name: str) -> None:
        """Everything since the last call belongs to `name`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.parts[name] = self.parts.get(name, 0.0) + now - self.last
        self.last = now

    def read(self) -> dict:
        total = time.perf_counter() - self.begun
        parts = self.parts | {"step": total, "other": total - sum(self.parts[p] for p in self.PHASES)}
        return {f"time/{name}": seconds for name, seconds in parts.items()}


def prepare(cfg: Config):
    """(config, tokenizer, problems, {name: problems to evaluate on}). All that can be wrong with the input is found here."""
    if cfg.model:
        model_cfg = ModelConfig.from_folder(resolve(cfg.model))
        with torch.device("meta"):
            find_weights(Model(model_cfg), resolve(cfg.model))
        tokenizer = eval.load_tokenizer(resolve(cfg.model), model_cfg.vocab_size)
    else:
        tokenizer = character_tokenizer(cfg.base)
        model_cfg = base_config(cfg.base, tokenizer)
    room = model_cfg.max_position_embeddings - cfg.max_new
    if room < 1:
        raise ValueError(f"--max_new {cfg.max_new} leaves no room for a prompt in the model's context of "
                         f"{model_cfg.max_position_embeddings} tokens")
    problems = data.load(cfg.data, tokenizer, cfg.template, cfg.limit, max_prompt=room)
    held_out = {}
    for spec in filter(None, cfg.eval_data.split(",")):
        some = data.load(spec, tokenizer, cfg.template, cfg.eval_limit, max_prompt=room)
        held_out[eval.free_name(some.report.name, held_out)] = some
    return model_cfg, tokenizer, problems, held_out


def evaluate(folder: Path, step: int, held_out, cfg, sampler, grader, tokenizer, rank, world, stop) -> dict[str, dict] | None:
    """{name: summary} of the policy after `step` steps; a set whose summary is on disk already is not drawn again. None after
    a stop signal."""
    scores = {}
    for name, some in held_out.items():
        path = folder / f"{name}-step{step}.json"
        known = gather(json.loads(path.read_text()) if rank == 0 and path.is_file() else None)[0]
        if known:
            scores[name] = known
            continue
        # a seed that no training step has, and the same one every time: differences are the policy's
        summary, mine = eval.evaluate(sampler, grader, tokenizer, some, cfg.eval_k, cfg.max_new, Sampling(cfg.temperature),
                                      -1 - cfg.seed, rank, world, f"{name}, step {step}" if rank == 0 else "", stop)
        if summary is None:
            return None
        source = {"rows": some.report.rows, "revision": some.report.revision}
        scores[name] = summary | {"template": cfg.template, "step": step} | source
        responses = sorted(itertools.chain(*gather(mine)), key=lambda r: (r["problem"], r["sample"]))
        if rank == 0:
            eval.save(folder, path.stem, responses, scores[name])
    return scores


def eval_metrics(scores: dict[str, dict]) -> dict:
    return {f"eval/{name}/{key}": s[key] for name, s in scores.items() for key in ("avg_at_k", "pass_at_k")}


def plan_memory(cfg, model_cfg, context: int, world: int, device) -> tuple[learner.Plan, float]:
    """
    (plan of learner and sampler on each GPU, bytes of KV cache in it): --kv_gib, or what the slots can fill if the learner
    leaves as much. MemoryError, one line, before any work on a GPU that cannot hold it.
    """
    bf16 = device.type == "cuda"
    token = 2 * model_cfg.num_hidden_layers * model_cfg.num_key_value_heads * model_cfg.head_dim * (2 if bf16 else 4)
    kv = token * min(cfg.slots * (context + 128), cfg.kv_gib * 2**30 / token or math.inf)     # 128: two pages begun
    sizes = (model_cfg, cfg, world, learner.node_size(world))
    if not bf16:
        return learner.plan(*sizes, kv, context, bf16=False), kv
    total = torch.cuda.mem_get_info()[0]
    if not cfg.kv_gib:      # requests wait for a smaller cache, down to one that holds a handful
        kv = min(kv, max(token * 8 * context, total - learner.RESERVE - sum(learner.plan(*sizes, 0, context).memory.values())))
    return learner.must_fit(total, *sizes, kv, context), kv


def train(cfg: Config, run: Path, grader: Grader, rank: int, world: int, device, model_cfg, tokenizer, problems, held_out):
    torch.manual_seed(cfg.seed)     # nothing below draws from it; a fork that does is reproducible
    context = cfg.max_new + max(len(p.prompt) for p in itertools.chain(problems, *held_out.values()))
    planned, kv_bytes = plan_memory(cfg, model_cfg, context, world, device)
    if not cfg.model and rank == 0:
        base_model(cfg.base, Path(cfg.out), device)
    dist.barrier()
    folder = resolve(cfg.model) if cfg.model else base_model(cfg.base, Path(cfg.out), device)

    model, optimizer = make_learner(model_cfg, cfg, device, lambda model: read_weights(model, folder))
    parameters = sum(p.numel() for p in model.parameters())
    stop_ids = data.stop_ids(tokenizer, model_cfg.eos_token_ids)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sampler = Sampler(model_cfg, cfg.slots, context, stop_ids, device, dtype, kv_bytes / 2**30)

    # progress is all that a checkpoint needs beside weights and optimizer: random streams are functions of the step
    progress, found = dict(step=0, cursor=0, totals={}, skipped=0, in_a_row=0, best=None, row=None), checkpoints(run)
    if found:
        progress |= load_checkpoint(found[-1], model, optimizer)     # one of an older version may lack a key
    step = progress["step"]     # optimizer batches done
    stop, log = Stop(), report.Log(run, step, cfg, rank, pending=bool(progress["row"]))
    if rank == 0:
        write_json(run / "config.json", dict(settings=asdict(cfg), versions=versions(), world_size=world))
    log.say(report.header(cfg, run, model_cfg, parameters, problems, held_out, world, device, sampler, planned))
    if found:
        log.say(f"resumed from {found[-1]}: step {step} of {cfg.steps}" + ", complete" * (step == cfg.steps))

    def score(step) -> dict[str, dict] | None:
        return evaluate(run / "eval", step, held_out, cfg, sampler, grader, tokenizer, rank, world, stop)

    def keep_model(name):
        card = report.model_card(run, step, progress["totals"], cfg, problems, versions()) if rank == 0 else ""
        export(run / name, model, model_cfg, tokenizer, card, rank)

    def close_step(metrics, evaluated):
        """The row of a step that is done; the policy is kept if its held-out score is the best so far."""
        log.step(step, metrics | (eval_metrics(scores) if evaluated else {}), scores)
        if evaluated and scores:
            held_out = float(np.mean([s["avg_at_k"] for s in scores.values()]))
            if progress["best"] is None or held_out > progress["best"]["score"]:
                progress["best"] = dict(step=step, score=held_out)
                keep_model("best")

    def draw_all(requests, groups):
        return draw(requests, groups, cfg, sampler, grader, tokenizer, stop)

    sampler.load(full_weights(model, dtype))
    scores = score(step)
    if scores is not None and step == 0:
        log.metrics(0, eval_metrics(scores))
    elif scores is not None and progress["row"]:
        close_step(progress["row"], evaluated=True)
        progress["row"] = None
    clock = Clock(device)
    while step < cfg.steps and scores is not None:
        # Sample and grade. The policy does not move until the update, so a signal in here costs only this step's rollouts.
        sampler.begin(cfg.seed * 2**32 + step, Sampling(cfg.temperature))
        groups, cursor, waited = collect(progress["cursor"], problems, cfg, rank, world, draw_all, stop)
        clock.phase("rollout")
        clock.parts["rollout"] -= waited
        clock.parts["reward"] += waited
        if any(gather(stop.asked)):
            break

        # Keep and weigh. Every rank gets the whole batch and takes its share of it: balanced whatever the groups' sizes.
        batch, records = choose(groups, step, cfg)
        log.rollouts(step + 1, groups, records, tokenizer, show=step % cfg.show_every == 0)
        batch = sorted(itertools.chain(*gather(batch)), key=lambda x: x.place)      # stable: kept order within a group
        records = sorted(itertools.chain(*gather(records)), key=lambda r: r["place"])
        metrics = report.describe(records, model_cfg, cfg, progress["totals"])
        clock.phase("other")

        # Learn. A batch without a single kept rollout (all groups flat under grpo_skip, say) is no error: it is logged.
        if batch:
            lr = cfg.lr * min(1.0, (step + 1) / (cfg.warmup + 1))
            metrics |= update(model, optimizer, batch, lr, cfg, rank, world, device)
            skipped = metrics.pop("optim/skipped")
            progress["skipped"] += skipped
            progress["in_a_row"] = progress["in_a_row"] + skipped if skipped == cfg.updates_per_batch else 0
            if progress["in_a_row"] >= 5:
                raise RuntimeError(f"{progress['in_a_row']} updates in a row had a gradient that is not finite "
                                   f"(the last norm: {metrics['optim/grad_norm']}); the last checkpoint is good")
        metrics["optim/skipped_steps"] = progress["skipped"]
        clock.phase("update")
        sampler.load(full_weights(model, dtype))
        clock.phase("sync")

        step += 1
        progress |= dict(step=step, cursor=cursor)
        evaluated = step % cfg.eval_every == 0 or step == cfg.steps
        if evaluated:
            scores = score(step)
        clock.phase("eval")
        metrics |= clock.read()
        metrics |= report.speeds(metrics, cfg, device, world)
        if scores is None:      # a signal during the evaluation: the row waits in the checkpoint for its scores
            progress["row"] = metrics
            break
        clock = Clock(device)   # The row is on disk before the checkpoint is, or a kill between them would lose it: the
        close_step(metrics, evaluated)                          # time of saving belongs to the next row.
        is_best = progress["best"] and progress["best"]["step"] == step     # best/ and progress agree after a kill too
        if step % cfg.save_every == 0 or step == cfg.steps or is_best:
            save_checkpoint(run, progress, model, optimizer, rank)
        clock.phase("save")
    log.close()

    if step < cfg.steps or scores is None:
        save_checkpoint(run, progress, model, optimizer, rank)
        log.say(f"stopped by a signal at step {step} of {cfg.steps}; the same command goes on from there")
    else:
        keep_model("model")
        if rank == 0:
            log.say(report.close_run(run, progress["totals"], progress["best"], cfg))
            log.say(f"written: {run}/model, best, curves.png, metrics.jsonl, rollouts.jsonl, eval, tb")


def main(argv=None) -> int:
    lead = os.environ.get("RANK", "0") == "0"
    try:
        cfg = parse(sys.argv[1:] if argv is None else argv)
        run = open_run(cfg)
        inputs = prepare(cfg)
    except (ValueError, OSError) as error:
        if lead:
            print(f"error: {error}", file=sys.stderr)
        return 2
    run.mkdir(parents=True, exist_ok=True)
    grader = Grader(cfg.graders)        # its processes start before CUDA does
    try:
        rank, world, device = start_ranks()
        train(cfg, run, grader, rank, world, device, *inputs)
    except (MemoryError, torch.OutOfMemoryError) as error:
        hint = ("; smaller --micro_tokens or --slots, --checkpoint_activations True and --reshard True need less, and the last "
                "checkpoint is good") * isinstance(error, torch.OutOfMemoryError)
        print(f"error: {str(error).splitlines()[0]}{hint}", file=sys.stderr)
        return 2
    finally:
        grader.close()
    dist.destroy_process_group()        # not after an error: the other ranks would be waited for
    return 0


if __name__ == "__main__":
    sys.exit(main())
