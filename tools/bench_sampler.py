"""Tokens per second of the sampler, and how well its log-probs agree with the learner's forward."""

import numpy as np
import torch

from head import logits_fp32
from model import forward_flops, pack
from rollout import Request, Sampling
from tools.bench_clock import breakdown, now
from tools.bench_workload import random_problems, random_sampler


def bench_sampler(cfg, model_cfg, device, ceilings) -> dict:
    begun = now(device)
    sampler = random_sampler(cfg, model_cfg, device)
    problems = random_problems(cfg, model_cfg)
    sampler.begin(0, Sampling(cfg.temperature, cfg.top_p))
    sampler.add([Request(problems[0], place=0, index=0, max_new=1)])
    drain(sampler)  # kernels are compiled, graphs captured
    startup = now(device) - begun
    seconds = []
    for _ in range(cfg.repeats):
        fill(sampler, problems, cfg)
        begun = now(device)
        rollouts = drain(sampler)
        seconds.append(now(device) - begun)
    lengths = np.array([len(rollout.tokens) for rollout in rollouts])
    least = least_seconds(sampler, lengths, cfg, model_cfg, ceilings)
    result = dict(
        figure="tokens_per_s",
        measured=lengths.sum() / np.median(seconds),
        ceiling=lengths.sum() / least,
        seconds=float(np.median(seconds)),
        startup_s=startup,
        path=sampler.path,
        preempted=sampler.preempted,
        kv_gib=sampler.kv_bytes / 2**30,
        mean_length=lengths.mean(),
    )
    every = max(1, len(rollouts) // 32)
    result |= mismatch(sampler, rollouts[::every], cfg.temperature)
    if cfg.breakdown and device.type == "cuda":
        fill(sampler, problems, cfg)
        result["ms"] = decode_breakdown(sampler, lengths.mean() / 2, model_cfg, device)
    return result


def fill(sampler, problems, cfg) -> None:
    """The same requests again, on a sampler that remembers no prompt."""
    sampler.forget()
    sampler.begin(0, Sampling(cfg.temperature, cfg.top_p))
    for place, problem in enumerate(problems):
        sampler.add(Request(problem, place, index, cfg.new) for index in range(cfg.n))


def drain(sampler) -> list:
    rollouts = []
    while sampler.busy:
        rollouts += sampler.step()
    return rollouts


def least_seconds(sampler, lengths, cfg, model_cfg, ceilings) -> float:
    """
    Weights are read once a decode step or multiplied once a token, whichever takes longer, and each
    token reads the keys and values of all tokens before it.
    """
    parameters = list(sampler.model.parameters())
    width = parameters[0].element_size()
    weights = width * sum(p.numel() for p in parameters)
    layers, heads = model_cfg.num_hidden_layers, model_cfg.num_key_value_heads
    token = 2 * layers * heads * model_cfg.head_dim * width  # bytes of its keys and values
    steps = max(lengths.max(), lengths.sum() / sampler.slots)
    reading = steps * weights / ceilings.bandwidth
    multiplying = forward_flops(model_cfg, int(lengths.sum()), 0) / ceilings.matrix_rate
    keys_read = token * (lengths * (cfg.prompt_len + lengths / 2)).sum()
    return max(reading, multiplying) + keys_read / ceilings.bandwidth


@torch.no_grad()
def mismatch(sampler, rollouts, temperature: float) -> dict:
    """Recorded log-probs against the learner's forward over the same weights: k3, largest gap."""
    prompts = [rollout.request.problem.prompt for rollout in rollouts]
    responses = [rollout.tokens for rollout in rollouts]
    packed = pack(prompts, responses, sampler.device)
    scores = sampler.model(
        packed.ids_T,
        packed.cu,
        packed.max_len,
        targets_R=packed.targets_R,
        rows_R=packed.rows_R,
        temperature=temperature,
    )
    recorded = np.concatenate([rollout.logps for rollout in rollouts])
    gap_R = scores.logp_R - torch.tensor(recorded, dtype=torch.float32, device=sampler.device)
    return {
        "mismatch/kl": (gap_R.exp() - 1 - gap_R).mean().item(),
        "mismatch/max_abs": gap_R.abs().max().item(),
    }


def decode_breakdown(sampler, drawn: float, model_cfg, device, launches: int = 4) -> dict:
    """Of one decode step of the running rollouts, once the longest has `drawn` tokens."""
    sampler.step()
    while max(sampler.drawn_so_far()) < drawn:
        sampler.step()
    weight_VD = sampler.model.head
    rows = len(sampler.drawn_so_far())
    hidden_AD = torch.randn(rows, model_cfg.hidden_size, device=device, dtype=weight_VD.dtype)

    def decode():
        for _ in range(launches):
            sampler.step()

    def head():
        logits_fp32(hidden_AD, weight_VD)

    return breakdown(decode, head, device, launches * sampler.stride)
