"""
How fast, against which ceiling: random weights of a real shape, every rollout runs to --new tokens.

    python bench.py sampler --shape qwen2.5-math-1.5b --prompts 32 --n 16 --prompt_len 128 --new 512
    python bench.py learner --shape qwen2.5-math-1.5b --prompts 32 --n 8 --prompt_len 128 --new 512
    python bench.py step    --shape qwen2.5-math-1.5b --algo grpo,grpo_skip,aero --prompts 16 --prompt_len 128 --new 512
    torchrun --nproc_per_node 2 -- bench.py step ...    (without `--` it would take --n for one of its own)
    python bench.py plan                                memory and traffic per GPU for three sizes on 1 to 512 GPUs

`step` is a whole training step (draw, choose, update, sync) with simulated outcomes. Verdicts: a third of the problems is never
right, the success rates of the others are uniform on (0, 1), rollouts are independent. Lengths: --new tokens, or with --ragged
log-normal (sigma 0.8) with mean --new / 5, cut at --new. Several algorithms, each with its published settings, meet the same
problems, verdicts and lengths in one process; a row each, times against the first.

The last line is one JSON object with the figure, the ceiling that follows from the copy bandwidth and the bf16 matrix rate
measured in the same process, their ratio, and peak memory.
"""

import json
import sys
import time
from collections import Counter
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
from model import Model, ModelConfig, forward_flops, logits_fp32, token_logprobs
from reward import Verdict
from rollout import DRAWN, Request, Sampler, Sampling

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
    ragged: bool = knob(False, "lengths from a heavy-tailed distribution with mean new / 5 and largest value new")
    plain: bool = knob(False, "sampler, step: the plain path where the fast one could run")
    fp32: bool = knob(False, "sampler: fp32 weights and cache")
    top_p: float = knob(1.0, "sampler: nucleus of an evaluation")
    breakdown: bool = knob(False, "one more update or a few decode steps under the profiler: ms of the GPU by kind of kernel")
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
    dtype = torch.bfloat16 if device.type == "cuda" and not cfg.fp32 else torch.float32
    sampler = SetLength(model_cfg, min(cfg.slots, cfg.prompts * cfg.n), cfg.prompt_len + cfg.new, (), device, dtype, cfg.kv_gib,
                        False if cfg.plain else None)
    sampler.model.init_weights()
    sampler.ragged = cfg.ragged
    return sampler


def random_prompts(cfg, model_cfg, count: int) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(0)
    return [tuple(rng.integers(0, model_cfg.vocab_size, cfg.prompt_len).tolist()) for _ in range(count)]


# A kernel belongs to the first kind of which its name has a word.
KINDS = dict(
    attention=("attend", "combine", "flash", "fmha"), sampling=("blocks_kernel", "draw_kernel", "least_allowed"),
    logits=("statistics_kernel", "gradient_kernel"), optimizer=("adam", "lpnorm"),
    matrix=("gemm", "nvjet", "xmma", "cutlass", "splitk", "thin_kernel"), nccl=("nccl",),
    copies=("memcpy", "memset", "chunk_cat", "split_with_sizes", "copyfunctor", "copy_kernel"),
    elementwise=("triton", "elementwise", "reduce", "norm", "cat", "index", "scatter", "gather", "multi_tensor", "silu_mul"),
)


def breakdown(action, head, device, times: int = 1) -> dict:
    """
    Milliseconds of the GPU by kind of kernel, for each of `times` things that action does: `gaps` in which nothing ran, `head`,
    of which the parts are in the others, and `longest`, kernels of the kinds `elementwise` and `other`, where surprises are.
    """
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        action()
        torch.cuda.synchronize()
    spent, longest, idle, until = dict.fromkeys([*KINDS, "other"], 0.0), Counter(), 0.0, None
    for event in sorted(profiler.events(), key=lambda e: e.time_range.start):
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        start, end, name = event.time_range.start, event.time_range.end, event.name.lower()
        kind = next((k for k, words in KINDS.items() if any(w in name for w in words)), "other")
        spent[kind] += end - start
        if kind in ("elementwise", "other"):
            longest[name[:90]] += end - start
        idle += max(0.0, start - until) if until else 0.0
        until = max(until or end, end)
    spent |= {"gaps": idle, "head": times * 1e6 * median_of(head, device, 3)}

    def milliseconds(parts):
        return {name: round(us / 1e3 / times, 3) for name, us in parts if us}

    return milliseconds(spent.items()) | {"longest": milliseconds(longest.most_common(10))}


@torch.no_grad()
def mismatch(sampler, rollouts) -> dict:
    """Recorded log-probs against the learner's forward over the same weights: k3 estimate and largest difference."""
    ids, rows, lengths = [], [], []
    for r in rollouts:
        rows += range(len(ids) + len(r.prompt) - 1, len(ids) + len(r.prompt) + len(r.tokens) - 1)
        ids += [*r.prompt, *r.tokens]
        lengths.append(len(r.prompt) + len(r.tokens))
    ids_T, rows_R = torch.tensor(ids, device=sampler.device), torch.tensor(rows, device=sampler.device)
    cu = torch.tensor([0, *lengths], device=sampler.device).cumsum(0).int()
    logp_R, _ = sampler.model(ids_T, cu, max(lengths), ids_T[rows_R + 1], rows_R, sampler.sampling.temperature or 1.0)
    gap_R = logp_R - torch.tensor([p for r in rollouts for p in r.logps], device=sampler.device)
    return {"mismatch/kl": (gap_R.exp() - 1 - gap_R).mean().item(), "mismatch/max_abs": gap_R.abs().max().item()}


def bench_sampler(cfg, model_cfg, device, bandwidth, rate) -> dict:
    begun = time.perf_counter()
    sampler, prompts = random_sampler(cfg, model_cfg, device), random_prompts(cfg, model_cfg, cfg.prompts)

    def fill():
        sampler.forget()
        sampler.begin(0, Sampling(cfg.temperature, cfg.top_p))
        sampler.add(Request(p, i, prompt, cfg.new) for p, prompt in enumerate(prompts) for i in range(cfg.n))

    def drain() -> list:
        return [rollout for _ in iter(lambda: sampler.busy, False) for rollout in sampler.step()]

    sampler.begin(0, Sampling(cfg.temperature, cfg.top_p))
    sampler.add([Request(0, 0, prompts[0], 1)])
    drain()             # kernels are compiled, graphs captured
    startup, times = time.perf_counter() - begun, []
    for _ in range(cfg.repeats):
        fill()
        begun = time.perf_counter()
        rollouts = drain()
        times.append(time.perf_counter() - begun)
    seconds, lengths = float(np.median(times)), np.array([len(r.tokens) for r in rollouts])
    # Weights are read once a step or multiplied once a token, whichever takes longer, and all keys of a token are read.
    width = next(sampler.model.parameters()).element_size()
    weights = sum(p.numel() for p in sampler.model.parameters()) * width
    keys = 2 * model_cfg.num_hidden_layers * model_cfg.num_key_value_heads * model_cfg.head_dim * width
    steps = max(lengths.max(), lengths.sum() / sampler.slots)
    read = keys * (lengths * (cfg.prompt_len + lengths / 2)).sum()
    floor = max(steps * weights / bandwidth, forward_flops(model_cfg, int(lengths.sum()), 0) / rate) + read / bandwidth
    result = dict(figure="tokens_per_s", measured=lengths.sum() / seconds, ceiling=lengths.sum() / floor, seconds=seconds,
                  startup_s=startup, path=sampler.path, preempted=sampler.preempted,
                  kv_gib=sampler.cache.numel() * width / 2**30, mean_length=lengths.mean())
    result |= mismatch(sampler, rollouts[:: max(1, len(rollouts) // 32)])
    if cfg.breakdown and device.type == "cuda":
        fill()
        while sampler.state_B[DRAWN].max() < lengths.mean() / 2:
            sampler.step()
        hidden_AD = torch.randn(len(sampler.active), model_cfg.hidden_size, device=device, dtype=sampler.cache.dtype)
        result["ms"] = breakdown(lambda: [sampler.step() for _ in range(4)], lambda: logits_fp32(hidden_AD, sampler.model.head),
                                 device, 4 * sampler.stride)
    return result


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
            targets_R = torch.zeros(len(hidden_RD), dtype=torch.long, device=device)
            known_R = torch.ones(len(hidden_RD), device=device) if cfg.updates_per_batch == 1 else None

            def head():
                token_logprobs(hidden_RD, weight_VD, targets_R, 1.0, known_R)[0].sum().backward()

            more["ms"] = breakdown(action, head, device)
    return dict(figure="tokens_per_s", measured=tokens / seconds, ceiling=rate * world / (flops / tokens), seconds=seconds,
                flops_per_s=flops / seconds / world, mfu=flops / seconds / world / peak if peak else None,
                start_s=first - seconds, grad_norm=metrics["optim/grad_norm"], loss=metrics["loss/policy"],
                entropy=metrics["policy/entropy"], plan_gib=sum(planned.values()) / 2**30) | more


def plan_table(total=139.8 * 2**30, tokens=65536, kv=20 * 2**30, context=4096) -> str:
    """The README's: of an H200, 64k tokens per GPU and update, 20 GiB of KV cache, compiled; the first settings that fit."""
    rows = ["| shape | GPUs | settings | GiB per GPU | learner's state | activations | sampler | GB sent per step |",
            "|---|---|---|---|---|---|---|---|"]
    for shape in ("qwen2.5-math-1.5b", "qwen2.5-7b", "qwen2.5-32b"):
        model_cfg = ModelConfig.from_dict(SHAPES[shape])
        for gpus in (1, 8, 64, 512):
            try:
                changes, found = learner.advise(total, model_cfg, Bench(compile=True), gpus, min(gpus, 8), kv, context, tokens)
            except MemoryError:
                rows.append(f"| {shape} | {gpus} | does not fit | | | | | |")
                continue
            m = {name: size / 2**30 for name, size in found.memory.items()}
            state = m["weights and optimizer"] + m["gradients"] + m["gathered weights"]
            rows.append(f"| {shape} | {gpus} | {learner.flags(changes)} | {sum(m.values()):.0f} | {state:.0f} | "
                        f"{m['activations'] + m['working set']:.0f} | {m['sampler']:.0f} | "
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


def bench_step(cfgs, model_cfg, device, bandwidth, rate) -> dict:
    rank, world = dist.get_rank(), dist.get_world_size()
    cfgs = [replace(cfg, problems=cfg.prompts, max_new=cfg.new, n=cfg.n_total) for cfg in cfgs]
    sampler = random_sampler(max(cfgs, key=lambda cfg: cfg.n), model_cfg, device)
    model, optimizer = random_learner(cfgs[0], model_cfg, device)
    prompts = random_prompts(cfgs[0], model_cfg, cfgs[0].prompts)
    problems = [Problem(i, prompt, "0", "", "") for i, prompt in enumerate(prompts)]

    def one(cfg, step, totals) -> dict:
        """Seconds by phase and what was drawn; `step` decides verdicts and lengths."""
        clock, grader = train.Clock(device), SimulatedGrader(step, 64 * cfg.prompts)
        sampler.load(train.full_weights(model, next(sampler.model.parameters()).dtype))
        clock.phase("sync")
        sampler.begin(step, Sampling(cfg.temperature))

        def draw_all(requests, groups):
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
        wanted = ("rollout/drawn", "rollout/kept", "rollout/tokens", "rollout/trained_tokens", "compute/rollout_flops",
                  "compute/train_flops", "compute/saved_frac", "mismatch/kl", "mismatch/max_abs")
        return clock.read() | {key: metrics[key] for key in wanted if key in metrics}

    one(min(cfgs, key=lambda cfg: cfg.n), 0, {})    # kernels are compiled, graphs captured
    rows = {}
    for cfg in cfgs:
        totals = {}
        steps = [one(cfg, step, totals) for step in range(1, cfg.repeats + 1)]
        row = {key: float(np.median([s.get(key, 0.0) for s in steps])) for key in steps[-1]}
        row |= {"compute/saved_frac": steps[-1]["compute/saved_frac"]}      # of all steps
        row |= {"time/ratio": row["time/step"] / next(iter(rows.values()), row)["time/step"]}
        rows[cfg.algo] = row = {key: float(f"{x:.5g}") for key, x in row.items() if x or "time" not in key}
        if rank == 0:
            print(f"{cfg.algo:13s}" + ", ".join(f"{key.partition('/')[2]} {x:g}" for key, x in row.items()), flush=True)
    first = rows[cfgs[0].algo]
    floor = (first["compute/rollout_flops"] + first["compute/train_flops"]) / rate / world
    return dict(figure="steps_per_s", measured=1 / first["time/step"], ceiling=1 / floor, steps=rows)


def parse(argv) -> list[Bench]:
    """One configuration for each name in --algo, with its algorithm's published settings."""
    first, _ = HfArgumentParser(Bench, allow_abbrev=False).parse_known_args(argv)
    if first.shape not in SHAPES:
        raise ValueError(f"--shape {first.shape}: wanted one of {' '.join(SHAPES)}")
    cfgs = []
    for algo in first.algo.split(","):
        aero.need_known(algo)
        parser = HfArgumentParser(Bench, allow_abbrev=False)
        parser.set_defaults(**aero.ALGORITHMS[algo].defaults)
        cfgs += parser.parse_args_into_dataclasses([*argv, f"--algo={algo}"])     # of two the last one counts
        cfgs[-1].check()
    return cfgs


def main() -> int:
    modes = {"sampler": bench_sampler, "learner": bench_learner, "step": bench_step}
    if sys.argv[1:] == ["plan"]:
        print(plan_table())
        return 0
    if len(sys.argv) < 2 or sys.argv[1] not in modes:
        print(f"error: found {' '.join(sys.argv[1:2]) or 'nothing'}, wanted one of {' '.join(modes)} plan", file=sys.stderr)
        return 2
    try:
        cfgs = parse(sys.argv[2:])
        if len(cfgs) > 1 and sys.argv[1] != "step":
            raise ValueError(f"--algo: {sys.argv[1]} takes one algorithm, found {len(cfgs)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    cfg, model_cfg = cfgs[0], ModelConfig.from_dict(SHAPES[cfgs[0].shape])
    rank, world, device = train.start_ranks()
    bandwidth, rate = ceilings(device)
    result = modes[sys.argv[1]](cfgs if sys.argv[1] == "step" else cfg, model_cfg, device, bandwidth, rate)
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
