"""
How much memory and traffic a step of training takes, from formulas, and which settings fit a GPU.

    plan           bytes of one GPU at the peak of an update, and bytes that it sends in a step
    advise         what to change so that a configuration fits
    plan_memory    the same for a run, with the sampler's cache; refuses what does not fit

The formulas were held against measured peaks: tests/test_plan.py.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch

import aero
from learner import node_size, shards
from model import HEAD_CHUNK, Model

RESERVE = 5 * 2**30  # bytes of a GPU that nobody may plan with: CUDA, NCCL, cuBLAS, and holes

# What may be changed so that a configuration fits, cheapest first, one upon the other.
CHANGES = (
    {"checkpoint_activations": True},
    {"reshard": True},
    {"shard": "world"},
    {"micro_tokens": 8192},
)


class Plan(NamedTuple):
    memory: dict[str, float]  # bytes of one GPU at the peak of an update, by what holds them
    traffic: dict[str, float]  # bytes one GPU sends in an optimizer step; rings, which send least

    def __str__(self):
        parts = ", ".join(f"{size / 2**30:.1f} {name}" for name, size in self.memory.items())
        return f"{total(self) / 2**30:.1f} GiB per GPU ({parts})"


def total(planned: Plan) -> float:
    return sum(planned.memory.values())


def plan(
    model_cfg, cfg, world: int, node: int, kv_bytes: float, context: int, tokens: int = 1, bf16=True
) -> Plan:
    """kv_bytes: of the sampler's cache; context: the longest sequence; tokens: of a GPU in an
    optimizer step.

    Per parameter and shard 12 bytes of weight and AdamW moments in fp32, and on every GPU 2 for
    the sampler's copy. Without --reshard also 2 for the gathered weights and 4 for gradients that
    are summed over micro-batches before they are shared; with it, 4 / shards, and two blocks and
    the root of each. A frozen reference has 2 per shard, and what is gathered of it.
    """
    with torch.device("meta"):
        model = Model(model_cfg)
    N = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    root = N - model_cfg.num_hidden_layers * block
    D, I, V = model_cfg.hidden_size, model_cfg.intermediate_size, model_cfg.vocab_size
    parts = shards(cfg, world, node)
    width = 2 if bf16 else 4  # bytes of a number in the forward pass
    T = max(cfg.micro_tokens, context)
    gathered = 2 * block + root if cfg.reshard else N
    has_reference = aero.LOSSES[cfg.loss].needs_reference

    memory = {
        "weights and optimizer": 12 * N / parts,
        "gradients": 4 * N / parts + 4 * gathered if cfg.reshard else 4 * N,
        "gathered weights": width * gathered,
        "activations": width * T * kept_of_a_token(model_cfg, cfg),
        # At the peak either a chunk of logits, and the head's gradient that is summed in fp32, or
        # a block's gradients of gate, up and their product.
        "working set": max(
            min(T, HEAD_CHUNK) * V * (4 + width) + (8 + width) * V * D,
            width * T * 3 * I,
        ),
        "sampler": width * N + kv_bytes,
    }
    if has_reference:
        memory["reference"] = width * (N / parts + gathered)

    # Without --reshard the model is gathered once in a step, and the reference once in a run.
    gathers = 1
    micro_batches = 1
    if cfg.reshard:
        gathers = 3 if has_reference else 2
        micro_batches = math.ceil(tokens / T)
    away = (parts - 1) / parts
    traffic = {
        "all-gather": gathers * micro_batches * width * N * away,
        "reduce-scatter": micro_batches * 4 * N * away,
        "all-reduce": 8 * N / parts * (1 - parts / world),
        "weights to the sampler": width * N * away,
    }
    return Plan(memory, traffic)


def kept_of_a_token(model_cfg, cfg) -> int:
    """Numbers that autograd keeps of a token in all blocks: of each two inputs of norms and their
    outputs, q, k, v and the mix, and of the MLP gate, its SiLU, up and their product. Compiled,
    the SiLU is computed again. With checkpoints, of all blocks but one only their input."""
    heads = 2 * (model_cfg.num_attention_heads + model_cfg.num_key_value_heads)
    of_mlp = 3 if cfg.compile else 4
    D, L = model_cfg.hidden_size, model_cfg.num_hidden_layers
    kept = 4 * D + heads * model_cfg.head_dim + of_mlp * model_cfg.intermediate_size
    return L * D + kept if cfg.checkpoint_activations else L * kept


def advise(memory: float, model_cfg, cfg, *sizes, **options) -> tuple[dict, Plan]:
    """(settings to change so that the plan fits into `memory` bytes, the plan with them). sizes
    and options as in `plan`. MemoryError, one line, if nothing helps."""
    changes = {}
    for change in ({}, *CHANGES):
        if change.get("micro_tokens", 0) < cfg.micro_tokens:
            changes |= change
        planned = plan(model_cfg, replace(cfg, **changes), *sizes, **options)
        if total(planned) + RESERVE <= memory:
            needed = {name: x for name, x in changes.items() if x != getattr(cfg, name)}
            return needed, planned
    raise MemoryError(
        f"{planned} does not fit into {(memory - RESERVE) / 2**30:.0f} GiB even with "
        f"{flags(changes)}: wanted more GPUs, a smaller cache of the sampler or a smaller model"
    )


def flags(changes: dict) -> str:
    return " ".join(f"--{name} {value}" for name, value in changes.items())


def must_fit(memory: float, model_cfg, cfg, *sizes, **options) -> Plan:
    """The plan of this configuration. MemoryError, one line with what to change, if `memory` bytes
    do not hold it."""
    changes, _ = advise(memory, model_cfg, cfg, *sizes, **options)
    planned = plan(model_cfg, cfg, *sizes, **options)
    if changes:
        raise MemoryError(
            f"{planned} does not fit into {(memory - RESERVE) / 2**30:.0f} GiB: "
            f"it would with {flags(changes)}"
        )
    return planned


def plan_memory(cfg, model_cfg, context: int, world: int, device) -> tuple[Plan, float]:
    """(plan of learner and sampler on each GPU, bytes of KV cache in it): --kv_gib, or what the
    slots can fill if the learner leaves as much. MemoryError, one line, before any work on a GPU
    that cannot hold it."""
    bf16 = device.type == "cuda"
    numbers = model_cfg.num_hidden_layers * model_cfg.num_key_value_heads * model_cfg.head_dim
    token = 2 * numbers * (2 if bf16 else 4)
    kv = token * cfg.slots * (context + 128)  # 128: two pages begun
    if cfg.kv_gib:
        kv = min(kv, cfg.kv_gib * 2**30)
    sizes = (model_cfg, cfg, world, node_size(world))
    if not bf16:
        return plan(*sizes, kv, context, bf16=False), kv
    memory = torch.cuda.mem_get_info()[0]
    if not cfg.kv_gib:
        # Requests wait for a smaller cache, down to one that holds a handful.
        left = memory - RESERVE - total(plan(*sizes, 0, context))
        kv = min(kv, max(token * 8 * context, left))
    return must_fit(memory, *sizes, kv, context), kv
