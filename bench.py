"""
How fast, against which ceiling: random weights of a real shape, every rollout runs to --new tokens.

    python bench.py sampler --shape qwen2.5-math-1.5b --prompts 32 --n 16 --prompt_len 128 --new 512
    python bench.py learner --shape qwen2.5-math-1.5b --prompts 32 --n 8 --prompt_len 128 --new 512
    python bench.py step    --shape qwen2.5-math-1.5b --algo aero --prompts 16 --prompt_len 128 --new 512
    torchrun --nproc_per_node 2 bench.py step ...
    python bench.py plan                                memory and traffic per GPU for three sizes on 1 to 512 GPUs

`step` is a whole training step (draw, choose, update, sync) with simulated verdicts: a third of the problems is never right,
the success rates of the others are uniform. The last line is one JSON object with the figure, the ceiling that follows from
the copy bandwidth and the bf16 matrix rate measured in the same process, their ratio, and peak memory.
"""

import json
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from transformers import HfArgumentParser

import aero
import learner
import report
import train
from aero import knob
from data import Problem
from model import Model, ModelConfig, forward_flops, token_logprobs
from reward import Verdict
from rollout import Request, Sampler, Sampling

LLAMA = dict(model_type="llama", rms_norm_eps=1e-5, rope_theta=5e5, tie_word_embeddings=False)
QWEN = dict(model_type="qwen2", rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=False)
SHAPES = {
    "tiny": dict(QWEN, vocab_size=100, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=3,
                 num_key_value_heads=1, max_position_embeddings=4096, tie_word_embeddings=True),
    "qwen2.5-math-1.5b": dict(QWEN, vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                              num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=4096,
                              tie_word_embeddings=True),
    "qwen2.5-7b": dict(QWEN, vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                       num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=32768),
    "qwen2.5-32b": dict(QWEN, vocab_size=152064, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64,
                        num_attention_heads=40, num_key_value_heads=8, max_position_embeddings=32768),
    "llama-3.1-8b": dict(LLAMA, vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                         num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32768),
}


@dataclass
class Bench(train.Config):
    shape: str = knob("tiny", f"one of {' '.join(SHAPES)}")
    prompts: int = knob(16, "different prompts")
    n: int = knob(16, "rollouts of each (sampler, learner)")
    prompt_len: int = knob(128, "tokens of a prompt")
    new: int = knob(512, "tokens of every response")
    ragged: bool = knob(False, "step: lengths from a heavy-tailed distribution with mean new / 5 and largest value new")
    breakdown: bool = knob(False, "learner: one more update under the profiler, seconds of the GPU by kind of kernel")
    repeats: int = knob(2, "timed repetitions after one warm-up; the median is reported")


def ceilings(device) -> tuple[float, float]:
    """(bytes per second of a copy, read + write; FLOP/s of a matrix product of random numbers in the compute dtype)."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    copy = min(timed(lambda: target.copy_(source), device) for _ in range(10))
    product = sorted(timed(lambda: a @ b, device) for _ in range(20))[10]
    return 2 * source.numel() * 4 / copy, 2 * size**3 / product


def timed(action, device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def median_of(action, device, repeats: int) -> float:
    action()
    return float(np.median([timed(action, device) for _ in range(repeats)]))


class SetLength(Sampler):
    """
    Without stop ids every rollout runs to its max_new, and that is its length, not a truncation. `ragged`: lengths are
    log-normal with sigma 0.8 and a mean of max_new / 5, cut at max_new, the same for a (problem, index) every time.
    """

    ragged = False

    def add(self, requests):
        super().add(replace(r, max_new=self.length(r)) if self.ragged else r for r in requests)

    def length(self, request) -> int:
        rng = np.random.default_rng([self.seed, request.problem, request.index])
        return int(np.clip(rng.lognormal(np.log(request.max_new / 5) - 0.8**2 / 2, 0.8), 1, request.max_new))

    def step(self):
        finished = super().step()
        for rollout in finished:
            rollout.truncated = False
        return finished


def random_sampler(cfg, model_cfg, device) -> Sampler:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sampler = SetLength(model_cfg, min(cfg.slots, cfg.prompts * cfg.n), cfg.prompt_len + cfg.new, (), device, dtype)
    sampler.model.init_weights()
    sampler.ragged = cfg.ragged
    return sampler


def random_prompts(cfg, model_cfg, count: int) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(0)
    return [tuple(rng.integers(0, model_cfg.vocab_size, cfg.prompt_len).tolist()) for _ in range(count)]


def bench_sampler(cfg, model_cfg, device, bandwidth, rate) -> dict:
    sampler, prompts = random_sampler(cfg, model_cfg, device), random_prompts(cfg, model_cfg, cfg.prompts)

    def drain():
        sampler.prompt_kv.clear()
        sampler.begin(0, Sampling(cfg.temperature))
        sampler.add(Request(p, i, prompt, cfg.new) for p, prompt in enumerate(prompts) for i in range(cfg.n))
        while sampler.busy:
            sampler.step()

    seconds = median_of(drain, device, cfg.repeats)
    # One step of all slots at the mean context: weights are read or multiplied, whichever takes longer, and all keys are read.
    rows, context = sampler.slots, cfg.prompt_len + cfg.new / 2
    bytes_per_weight = next(sampler.model.parameters()).element_size()
    weights = sum(p.numel() for p in sampler.model.parameters()) * bytes_per_weight
    keys = 2 * model_cfg.num_hidden_layers * model_cfg.num_key_value_heads * model_cfg.head_dim * bytes_per_weight
    step = max(weights / bandwidth, forward_flops(model_cfg, rows, 0) / rate) + rows * context * keys / bandwidth
    return dict(figure="tokens_per_s", measured=cfg.prompts * cfg.n * cfg.new / seconds, ceiling=rows / step, seconds=seconds)


def random_batch(cfg, model_cfg) -> list[learner.Trained]:
    rng, batch = np.random.default_rng(1), []
    for place, prompt in enumerate(random_prompts(cfg, model_cfg, cfg.prompts)):
        for _ in range(cfg.n):
            tokens = rng.integers(0, model_cfg.vocab_size, cfg.new).tolist()
            batch.append(learner.Trained(place, prompt, tokens, [-1.0] * cfg.new, rng.normal()))
    return batch


def random_learner(cfg, model_cfg, device):
    def read(_):
        torch.manual_seed(0)
        with device:
            return Model(model_cfg).init_weights().named_parameters()

    return learner.make_learner(model_cfg, cfg, device, read)


KINDS = dict(
    attention=("flash", "fmha"), logits=("statistics_kernel", "gradient_kernel"), optimizer=("adam", "lpnorm"),
    matrix=("gemm", "nvjet", "xmma", "cutlass", "splitk"), nccl=("nccl",),
    copies=("memcpy", "memset", "chunk_cat", "split_with_sizes", "copyfunctor", "copy_kernel"),
    elementwise=("triton", "elementwise", "reduce", "norm", "cat", "index", "scatter", "gather", "multi_tensor"),
)


def breakdown(action, hidden_RD, weight_VD) -> dict:
    """
    Seconds of the GPU by kind of kernel, by their names; `other` and the five longest of it, so that a new name is seen.
    head: log-probs of so many rows forward and backward, its matrix products and `logits` together.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        action()
        torch.cuda.synchronize()
    spent, unknown = dict.fromkeys([*KINDS, "other"], 0.0), {}
    for event in profiler.key_averages():
        kind = next((k for k, words in KINDS.items() if any(w in event.key.lower() for w in words)), "other")
        spent[kind] += event.self_device_time_total / 1e6
        if kind == "other":
            unknown[event.key[:60]] = event.self_device_time_total / 1e6

    def head():
        targets_R = torch.zeros(len(hidden_RD), dtype=torch.long, device=hidden_RD.device)
        token_logprobs(hidden_RD, weight_VD, targets_R, 1.0)[0].sum().backward()

    spent["head"] = median_of(head, hidden_RD.device, 3)
    longest = sorted(unknown.items(), key=lambda item: -item[1])[:5]
    return {name: round(seconds, 4) for name, seconds in [*spent.items(), *longest]}


def bench_learner(cfg, model_cfg, device, bandwidth, rate) -> dict:
    rank, world = dist.get_rank(), dist.get_world_size()
    model, optimizer = random_learner(cfg, model_cfg, device)
    batch = random_batch(cfg, model_cfg)

    def action():
        return learner.update(model, optimizer, batch, cfg.lr, cfg, rank, world, device)

    begun = time.perf_counter()
    metrics = action()
    first = time.perf_counter() - begun
    seconds = median_of(action, device, cfg.repeats)
    tokens, peak = len(batch) * (cfg.prompt_len + cfg.new), report.peak_flops() if device.type == "cuda" else None
    forward = report.prompt_flops(model_cfg, cfg.prompt_len) + report.response_flops(model_cfg, cfg.prompt_len, [cfg.new])
    flops = 3 * len(batch) * forward
    planned = learner.plan(model_cfg, cfg, world, learner.node_size(world), 0, cfg.prompt_len + cfg.new, tokens // world,
                           device.type == "cuda").memory
    planned.pop("sampler")      # there is none here
    more = {"graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]} if cfg.compile else {}   # two serve all blocks
    if device.type == "cuda":
        more["measured_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if cfg.breakdown:
            size = (len(batch) * cfg.new // world, model_cfg.hidden_size)
            hidden_RD, weight_VD = (torch.randn(s, device=device, dtype=torch.bfloat16, requires_grad=True)
                                    for s in (size, (model_cfg.vocab_size, model_cfg.hidden_size)))
            more["breakdown"] = breakdown(action, hidden_RD, weight_VD)
    return dict(figure="tokens_per_s", measured=tokens / seconds, ceiling=rate * world / (flops / tokens), seconds=seconds,
                flops_per_s=flops / seconds / world, mfu=flops / seconds / world / peak if peak else None,
                start_s=first - seconds, grad_norm=metrics["optim/grad_norm"], loss=metrics["loss/policy"],
                entropy=metrics["policy/entropy"], plan_gib=sum(planned.values()) / 2**30) | more


def plan_table(total=139.8 * 2**30, tokens=65536, kv=20 * 2**30, context=4096) -> str:
    """The README's: of an H200, 64k tokens per GPU and update, 20 GiB of KV cache; the first settings that fit."""
    rows = ["| shape | GPUs | settings | GiB per GPU | learner's state | activations, logits | sampler | GB sent per step |",
            "|---|---|---|---|---|---|---|---|"]
    for shape in ("qwen2.5-math-1.5b", "qwen2.5-7b", "qwen2.5-32b"):
        model_cfg = ModelConfig.from_dict(SHAPES[shape])
        for gpus in (1, 8, 64, 512):
            try:
                changes, found = learner.advise(total, model_cfg, Bench(), gpus, min(gpus, 8), kv, context, tokens)
            except MemoryError:
                rows.append(f"| {shape} | {gpus} | does not fit | | | | | |")
                continue
            m = {name: size / 2**30 for name, size in found.memory.items()}
            state = m["weights and optimizer"] + m["gradients"] + m["gathered weights"]
            rows.append(f"| {shape} | {gpus} | {learner.flags(changes)} | {sum(m.values()):.0f} | {state:.0f} | "
                        f"{m['activations'] + m['logits']:.0f} | {m['sampler']:.0f} | "
                        f"{sum(found.traffic.values()) / 1e9:.0f} |")
    return "\n".join(rows)


class SimulatedGrader:
    """Verdicts by a coin whose bias is the problem's, the same whatever the order: what `step` needs of reward.Grader."""

    def __init__(self, seed: int, count: int):
        rng = np.random.default_rng(seed)
        self.seed, self.done = seed, []
        self.rate = np.where(rng.random(count) < 1 / 3, 0.0, rng.random(count))

    pending = property(lambda self: len(self.done))

    def submit(self, key, response, gold):
        place, index = key
        right = np.random.default_rng([self.seed, place, index]).random() < self.rate[place]
        self.done.append((key, Verdict(float(right), None, "simulated", "equal:simulated" if right else "wrong")))

    def poll(self):
        done, self.done = self.done, []
        return done

    def wait(self, timeout_s):
        return self.poll()


class NoTokenizer:
    """Random tokens have no text."""

    def decode(self, tokens, skip_special_tokens=True):
        return ""


class NeverStop:
    asked = False


def bench_step(cfg, model_cfg, device, bandwidth, rate) -> dict:
    rank, world = dist.get_rank(), dist.get_world_size()
    cfg.problems, cfg.max_new, cfg.n = cfg.prompts, cfg.new, cfg.n_total
    sampler = random_sampler(cfg, model_cfg, device)
    model, optimizer = random_learner(cfg, model_cfg, device)
    prompts = random_prompts(cfg, model_cfg, cfg.prompts)
    problems = [Problem(i, prompt, "0", "", "") for i, prompt in enumerate(prompts)]
    times, totals = [], {}
    for step in range(cfg.repeats + 1):
        clock, grader = train.Clock(device), SimulatedGrader(step, 64 * cfg.prompts)
        sampler.load(train.full_weights(model, next(sampler.model.parameters()).dtype))
        clock.phase("sync")
        sampler.begin(step, Sampling(cfg.temperature))

        def draw_all(requests, groups, grader=grader):
            return train.draw(requests, groups, cfg, sampler, grader, NoTokenizer(), NeverStop())

        groups, _, _ = train.collect(0, problems, cfg, rank, world, draw_all, NeverStop())
        clock.phase("rollout")
        batch, records = train.choose(groups, step, cfg)
        batch = sorted((x for part in train.gather(batch) for x in part), key=lambda x: x.place)
        records = sorted((r for part in train.gather(records) for r in part), key=lambda r: r["place"])
        metrics = report.describe(records, model_cfg, cfg, totals)
        clock.phase("other")
        metrics |= train.update(model, optimizer, batch, cfg.lr, cfg, rank, world, device) if batch else {}
        clock.phase("update")
        times.append(clock.read() | {k: metrics[k] for k in ("rollout/drawn", "rollout/kept", "compute/rollout_flops",
                                                             "compute/train_flops", "mismatch/kl", "mismatch/max_abs")})
    last = {key: float(np.median([t[key] for t in times[1:]])) for key in times[0] if key != "time/eval"}
    floor = (last["compute/rollout_flops"] + last["compute/train_flops"]) / rate / world
    last["saved_frac"] = metrics["compute/saved_frac"]
    return dict(figure="steps_per_s", measured=1 / last["time/step"], ceiling=1 / floor) | last


def main() -> int:
    modes = {"sampler": bench_sampler, "learner": bench_learner, "step": bench_step}
    if sys.argv[1:] == ["plan"]:
        print(plan_table())
        return 0
    if len(sys.argv) < 2 or sys.argv[1] not in modes:
        print(f"error: found {' '.join(sys.argv[1:2]) or 'nothing'}, wanted one of {' '.join(modes)} plan", file=sys.stderr)
        return 2
    parser = HfArgumentParser(Bench, allow_abbrev=False)
    first, _ = parser.parse_known_args(sys.argv[2:])
    try:
        if first.shape not in SHAPES:
            raise ValueError(f"--shape {first.shape}: wanted one of {' '.join(SHAPES)}")
        aero.need_known(first.algo)
        parser.set_defaults(**aero.ALGORITHMS[first.algo].defaults)
        (cfg,) = parser.parse_args_into_dataclasses(sys.argv[2:])
        cfg.check()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    model_cfg = ModelConfig.from_dict(SHAPES[cfg.shape])
    rank, world, device = train.start_ranks()
    bandwidth, rate = ceilings(device)
    result = modes[sys.argv[1]](cfg, model_cfg, device, bandwidth, rate)
    result |= dict(bench=sys.argv[1], ratio=result["measured"] / result["ceiling"], bandwidth=bandwidth, matrix_rate=rate,
                   world=world)
    for name in ("shape", "algo", "prompts", "n", "prompt_len", "new", "ragged", "rescue_barrier", "compile",
                 "checkpoint_activations", "micro_tokens"):
        result[name] = getattr(cfg, name)
    if device.type == "cuda":
        result |= dict(peak_mem_gib=torch.cuda.max_memory_allocated() / 2**30, device=torch.cuda.get_device_name())
    if rank == 0:
        print(json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in result.items()}))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
