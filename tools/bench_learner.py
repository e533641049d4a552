"""Tokens per second of an update, its MFU, and the memory that was planned beside what was used."""

import numpy as np
import torch
import torch.distributed as dist

from head import token_logprobs
from learner import Trained, node_size, update
from metrics import peak_flops, prompt_flops, response_flops
from plan import plan
from tools.bench_clock import breakdown, median_seconds, timed
from tools.bench_workload import random_learner, random_problems


def bench_learner(cfg, model_cfg, device, ceilings) -> dict:
    world = dist.get_world_size()
    learner = random_learner(cfg, model_cfg, device)
    batch = random_batch(cfg, model_cfg)
    metrics = {}

    def action():
        metrics.update(update(learner, batch, cfg.lr, cfg))

    first = timed(action, device)
    of_first_update = dict(metrics)
    seconds = median_seconds(action, device, cfg.repeats)
    tokens = len(batch) * (cfg.prompt_len + cfg.new)
    flops = update_flops(cfg, model_cfg, len(batch))
    rate = flops / seconds / world
    result = dict(
        figure="tokens_per_s",
        measured=tokens / seconds,
        ceiling=ceilings.matrix_rate * world / (flops / tokens),
        seconds=seconds,
        flops_per_s=rate,
        mfu=None,
        start_s=first - seconds,
        grad_norm=of_first_update["optim/grad_norm"],
        loss=of_first_update["loss/policy"],
        entropy=of_first_update["policy/entropy"],
        plan_gib=planned_bytes(cfg, model_cfg, tokens // world, device) / 2**30,
    )
    if cfg.compile:  # two serve all blocks
        result["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if device.type == "cuda":
        result["measured_gib"] = torch.cuda.max_memory_allocated() / 2**30
        peak = peak_flops()
        result["mfu"] = rate / peak if peak else None
        if cfg.breakdown:
            rows = len(batch) * cfg.new // world
            head = head_pass(rows, cfg, model_cfg, device)
            result["ms"] = breakdown(action, head, device)
    return result


def random_batch(cfg, model_cfg) -> list[Trained]:
    rng = np.random.default_rng(1)
    batch = []
    for place, problem in enumerate(random_problems(cfg, model_cfg)):
        for _ in range(cfg.n):
            tokens = rng.integers(0, model_cfg.vocab_size, cfg.new).tolist()
            logps = [-1.0] * cfg.new
            batch.append(Trained(place, problem.prompt, tokens, logps, rng.normal()))
    return batch


def update_flops(cfg, model_cfg, rollouts: int) -> float:
    """A forward pass and twice that backward; what is computed a second time does not count."""
    prompt = prompt_flops(model_cfg, cfg.prompt_len)
    response = response_flops(model_cfg, cfg.prompt_len, [cfg.new])
    return 3 * rollouts * (prompt + response)


def planned_bytes(cfg, model_cfg, tokens: int, device) -> float:
    """Of one GPU, by the formulas that a run starts with; there is no sampler here."""
    world = dist.get_world_size()
    planned = plan(
        model_cfg,
        cfg,
        world,
        node_size(world),
        kv_bytes=0,
        context=cfg.prompt_len + cfg.new,
        tokens=tokens,
        bf16=device.type == "cuda",
    )
    return sum(planned.memory.values()) - planned.memory["sampler"]


def head_pass(rows: int, cfg, model_cfg, device):
    """The head alone, forward and backward, over as many rows as one update has."""
    options = dict(device=device, dtype=torch.bfloat16, requires_grad=True)
    hidden_RD = torch.randn(rows, model_cfg.hidden_size, **options)
    weight_VD = torch.randn(model_cfg.vocab_size, model_cfg.hidden_size, **options)
    targets_R = torch.zeros(rows, dtype=torch.long, device=device)
    ones_R = torch.ones(rows, device=device)

    def in_one_pass():
        scores = token_logprobs(hidden_RD, weight_VD, targets_R, 1.0, coefficient_R=ones_R)
        scores.weighted.backward()

    def in_two_passes():
        scores = token_logprobs(hidden_RD, weight_VD, targets_R, 1.0)
        scores.logp_R.sum().backward()

    return in_one_pass if cfg.updates_per_batch == 1 else in_two_passes
