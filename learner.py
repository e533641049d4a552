"""
The learner: fp32 master weights sharded by FSDP2, packed micro-batches of equal cost, one exact gradient; and how much memory
and traffic all of it takes, from formulas.

    shard, make_learner     fully_shard over a mesh of one dimension, or of two: sharded in a node, replicated across nodes
    pack, packed            rollouts -> micro-batches for each rank -> tensors
    update                  one batch of rollouts, one or more optimizer steps
    plan, advise            bytes of a GPU and bytes it sends in a step; which settings fit

Nothing here depends on how the work is cut: losses are sums with global denominators, gradients are summed over ranks, and
micro-batches and ranks without anything to train on take part with weight zero.

Shapes: T packed tokens, R trained response tokens, L layers, H heads, K KV heads, E head dim, D model dim, V vocabulary.
"""

import itertools
import math
import os
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor

import aero
from model import HEAD_CHUNK, Model, forward_flops


class Trained(NamedTuple):
    """One rollout on its way to the learner."""

    place: int
    prompt: tuple[int, ...]
    tokens: list[int]
    logps: list[float]
    advantage: float


# --------------------------------------------------------------------------------------------------------------------
# Weights

def node_size(world: int) -> int:
    """Ranks of this node, as torchrun says; without it, all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world))


def shards(cfg, world: int, node: int) -> int:
    """Over how many ranks one copy of the weights is spread."""
    return node if cfg.shard == "node" else world


def shard(model: Model, cfg, device) -> None:
    """
    FSDP2: each block, then the root with embedding, last norm and head. fp32 master weights and reductions; bf16 compute on
    CUDA. Gradients are summed over ranks, not averaged: the loss carries global denominators already. torchrun numbers the
    ranks of a node one after the other, so a row of the mesh is a node.
    """
    world = dist.get_world_size()
    size = shards(cfg, world, node_size(world))
    if size == world:
        mesh = dist.init_device_mesh(device.type, (world,))
    else:
        mesh = dist.init_device_mesh(device.type, (world // size, size), mesh_dim_names=("replicate", "shard"))
    bf16 = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = bf16 if device.type == "cuda" else MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=cfg.reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)    # its backward begins with the head
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)     # gloo and NCCL alike: no pre-multiplied sum


def make_learner(model_cfg, cfg, device, read) -> tuple[Model, torch.optim.AdamW]:
    """
    fp32 master weights and their optimizer. read(model on the meta device) yields (name, whole tensor): no GPU ever holds
    more than its shards and one tensor.
    """
    with torch.device("meta"):
        model = Model(model_cfg)
    weights = read(model)
    model.checkpoint_activations = cfg.checkpoint_activations
    if cfg.compile:
        # What stands on either side of attention, so that the compiled graphs know one varying size, the number of tokens,
        # and no sequence boundaries. All blocks share two graphs.
        for block in model.model.layers:
            block.before, block.after = (torch.compile(half, dynamic=True) for half in (block.before, block.after))
    shard(model, cfg, device)
    model.to_empty(device=device)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, whole in weights:
            p = own.pop(name)
            p.copy_(distribute_tensor(whole.to(device, p.dtype), p.device_mesh, p.placements, src_data_rank=None))
    assert not own, f"no weights were read for {', '.join(own)}"
    return model, make_optimizer(model, cfg)


def make_optimizer(model, cfg) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [dict(params=matrices, weight_decay=cfg.weight_decay), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=cfg.lr, betas=(0.9, 0.95), fused=True)
    # Made here and not in the first step, so that a checkpoint has the same entries before and after it.
    for p in model.parameters():
        count = torch.zeros((), device=p.device if p.is_cuda else None)
        optimizer.state[p] = dict(step=count, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    return optimizer


def full_weights(model, dtype=torch.float32):
    """(name, whole tensor), one at a time: a collective on every rank. Rounded before it travels."""
    return ((name, p.detach().to(dtype).full_tensor()) for name, p in model.named_parameters())


# --------------------------------------------------------------------------------------------------------------------
# Micro-batches

def cost(model_cfg, prompt: int, response: int) -> float:
    """
    Time of one sequence, in FLOPs of matrix products: attention runs at a quarter of their rate (190 against 750 TFLOP/s on
    an H200), so each of its FLOPs counts for four. For the 1.5B shape, 7617 tokens + 1356 response + tokens^2, in its unit.
    """
    n = prompt + response
    return forward_flops(model_cfg, n, 4 * n * (n + 1) / 2, predicted=response)


def pack(costs, lengths, world: int, cap: int) -> list[list[list[int]]]:
    """
    Micro-batches for each rank: lists of indices, as many on every rank, at most `cap` tokens in each unless one sequence
    alone is longer. Dearest first into the cheapest bin that has room; where none has, with one more round of bins.

    >>> pack([5, 4, 3, 3], [5, 4, 3, 3], world=2, cap=8)
    [[[0, 3]], [[1, 2]]]
    """
    order, n = sorted(range(len(costs)), key=lambda i: -costs[i]), world * math.ceil(sum(lengths) / cap / world)
    while True:
        bins, spent, load = [[] for _ in range(n)], [0] * n, [0] * n
        for i in order:
            room = [b for b in range(n) if not bins[b] or load[b] + lengths[i] <= cap]
            if not room:
                break
            b = min(room, key=spent.__getitem__)
            bins[b].append(i)
            spent[b] += costs[i]
            load[b] += lengths[i]
        else:
            break
        n += world
    # Rows of `world` micro-batches of about equal cost, dealt to and fro so that no rank gets the dearest of every row.
    dearest = [bins[b] for b in sorted(range(n), key=lambda b: -spent[b])]
    rows = [dearest[i : i + world] for i in range(0, n, world)]
    return [[row[rank if m % 2 == 0 else -1 - rank] for m, row in enumerate(rows)] for rank in range(world)]


def packed(items: list[Trained], weights, device) -> dict:
    """
    Tensors of one micro-batch. Row t of the forward pass predicts token t + 1, so a response r0 r1 after a prompt p0 p1 p2
    is trained through rows 2 and 3:   ids_T = p0 p1 p2 r0 r1,   rows_R = 2 3,   targets_R = r0 r1
    """
    sizes = [len(x.tokens) for x in items]
    cu = np.cumsum([0] + [len(x.prompt) + n for x, n in zip(items, sizes)])
    ids = np.fromiter(itertools.chain.from_iterable(itertools.chain(x.prompt, x.tokens) for x in items), np.int64, cu[-1])
    rows = np.concatenate([np.arange(end - n, end) for end, n in zip(cu[1:], sizes)]) - 1

    def tensor(values, dtype=np.float32):   # from pinned memory, or the copy to a GPU would wait for the batch before
        x = torch.as_tensor(np.asarray(values, dtype))
        return x.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else x

    return dict(
        ids_T=tensor(ids, np.int64), cu=tensor(cu, np.int32), max_len=int(np.diff(cu).max()), rows_R=tensor(rows, np.int64),
        targets_R=tensor(ids[rows + 1], np.int64), sampled_R=tensor([p for x in items for p in x.logps]),
        adv_R=tensor(np.repeat([x.advantage for x in items], sizes)), weight_R=tensor(np.repeat(weights, sizes)),
    )


# --------------------------------------------------------------------------------------------------------------------
# The update

def update(model, optimizer, batch: list[Trained], lr: float, cfg, rank, world, device) -> dict:
    """
    One batch, cfg.updates_per_batch optimizer steps. `batch` is the whole step's, the same on every rank. A rank with less to
    train on than others still takes part in every collective, with weight zero. A step with a gradient that is not finite is
    skipped by all ranks together, since they see the same norm. Returns metrics over all ranks.
    """
    lengths, sizes = [len(x.tokens) for x in batch], [len(x.prompt) + len(x.tokens) for x in batch]
    weights = aero.token_weights([x.place for x in batch], lengths, cfg.loss_norm, cfg.max_new)
    costs = [cost(model.cfg, len(x.prompt), len(x.tokens)) for x in batch]
    shortest, mine, micro = sizes.index(min(sizes)), pack(costs, sizes, world, cfg.micro_tokens)[rank], []
    for group in optimizer.param_groups:
        group["lr"] = lr
    sums, largest = torch.zeros(6, dtype=torch.float64, device=device), torch.zeros((), device=device)
    norms = []
    for number in range(cfg.updates_per_batch):
        optimizer.zero_grad()
        for m, some in enumerate(mine):
            if number == 0:     # packed while the device works on the one before
                micro.append(packed([batch[i] for i in some or [shortest]], weights[some] if some else [0.0], device))
            t, last = micro[m], m == len(mine) - 1
            model.set_requires_all_reduce(last)
            if not cfg.reshard:     # weights are gathered once, gradients are summed where they are until the last one
                model.set_requires_gradient_sync(last)
                model.set_reshard_after_backward(last)
            # With one update the ratio is exactly 1, at which the clip is idle: what multiplies each log-prob's gradient is
            # known before the forward pass, and the head makes its own in it. A cap on importance weights needs log-probs.
            known_R = -t["weight_R"] * t["adv_R"] if cfg.updates_per_batch == 1 and not cfg.is_cap else None
            logp_R, entropy_R = model(t["ids_T"], t["cu"], t["max_len"], t["targets_R"], t["rows_R"], cfg.temperature, known_R)
            if number == 0:
                t["before_R"] = logp_R.detach()     # under the weights that the sampler had
            behaviour_R, adv_R = t["sampled_R"], t["adv_R"]
            if cfg.updates_per_batch == 1 or cfg.is_cap:
                behaviour_R = t["before_R"]
            if cfg.is_cap:      # the clip looks at the policy's own move, this weight at the two engines
                adv_R = adv_R * (t["before_R"] - t["sampled_R"]).exp().clamp(max=cfg.is_cap)
            loss, clipped, ratio = aero.policy_loss(logp_R, behaviour_R, adv_R, t["weight_R"], cfg.clip_low, cfg.clip_high)
            loss.backward()
            with torch.no_grad():
                sums[:4] += torch.stack([loss, clipped, ratio, t["weight_R"].sum()])
                if number == 0:     # sampler against learner, before the weights move
                    gap_R, entropy_R = ((t["weight_R"] > 0) * x_R for x_R in (logp_R - t["sampled_R"], entropy_R))
                    sums[4:] += torch.stack([entropy_R.sum(), (gap_R.exp() - 1 - gap_R).sum()])
                    largest = torch.maximum(largest, gap_R.abs().max())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip).full_tensor())
        # Queued before anybody has seen the norm, so that the device does not wait: told 1 by the attribute that torch's
        # GradScaler sets, AdamW's fused kernel leaves weights, moments and its count of steps as they are.
        optimizer.found_inf = 1.0 - norms[-1].isfinite().float()
        optimizer.step()
        optimizer.found_inf = None
    optimizer.zero_grad()
    dist.all_reduce(sums)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    loss, clipped, ratio, weight, entropy, gap = sums.tolist()
    norms = torch.stack(norms).tolist()
    finite = [norm for norm in norms if math.isfinite(norm)]
    return {
        "loss/policy": loss / cfg.updates_per_batch, "loss/clip_frac": clipped / weight, "loss/ratio_mean": ratio / weight,
        "policy/entropy": entropy / sum(lengths), "mismatch/kl": gap / sum(lengths), "mismatch/max_abs": largest.item(),
        "optim/lr": lr, "optim/grad_norm": max(finite, default=norms[-1]), "optim/skipped": len(norms) - len(finite),
    }


# --------------------------------------------------------------------------------------------------------------------
# Memory and traffic

RESERVE = 5 * 2**30     # bytes of a GPU that nobody may plan with: CUDA, NCCL, cuBLAS, holes between allocations


class Plan(NamedTuple):
    memory: dict[str, float]    # bytes of one GPU at the peak of an update, by what holds them
    traffic: dict[str, float]   # bytes one GPU sends in one optimizer step (rings: the least that any algorithm can send)

    def __str__(self):
        parts = ", ".join(f"{size / 2**30:.1f} {name}" for name, size in self.memory.items())
        return f"{sum(self.memory.values()) / 2**30:.1f} GiB per GPU ({parts})"


def plan(model_cfg, cfg, world: int, node: int, kv_bytes: float, context: int, tokens: int = 1, bf16=True) -> Plan:
    """
    kv_bytes: of the sampler's cache; context: the longest sequence; tokens: of a GPU in an optimizer step.

    Per parameter and shard 12 bytes of weight and AdamW moments in fp32, and on every GPU 2 for the sampler's copy. Without
    --reshard also 2 for the gathered weights and 4 for gradients that are summed over micro-batches before they are shared;
    with it, 4 / shards and two blocks and the root of each.
    """
    with torch.device("meta"):
        model = Model(model_cfg)
    N, block = (sum(p.numel() for p in m.parameters()) for m in (model, model.model.layers[0]))
    D, I, V, L = model_cfg.hidden_size, model_cfg.intermediate_size, model_cfg.vocab_size, model_cfg.num_hidden_layers
    heads = (model_cfg.num_attention_heads * 2 + model_cfg.num_key_value_heads * 2) * model_cfg.head_dim
    s, w = shards(cfg, world, node), 2 if bf16 else 4
    root, T = N - L * block, max(cfg.micro_tokens, context)
    # What autograd keeps of a token in a block: two inputs of norms and their outputs, q, k, v and the mix, and of the MLP
    # gate, its SiLU, up and their product. Compiled, the SiLU is computed again.
    kept = 4 * D + heads + (3 if cfg.compile else 4) * I
    layers = L * D + kept if cfg.checkpoint_activations else L * kept
    gathered = 2 * block + root if cfg.reshard else N
    memory = {
        "weights and optimizer": 12 * N / s,
        "gradients": 4 * N / s + 4 * gathered if cfg.reshard else 4 * N,
        "gathered weights": w * gathered,
        "activations": w * T * layers,
        # At the peak either a chunk of logits, and the head's gradient that is summed in fp32, or a block's gradients of
        # gate, up and their product.
        "working set": max(min(T, HEAD_CHUNK) * V * (4 + w) + (8 + w) * V * D, w * T * 3 * I),
        "sampler": w * N + kv_bytes,
    }
    away, times = (s - 1) / s, math.ceil(tokens / T) if cfg.reshard else 1
    traffic = {
        "all-gather": (1 + cfg.reshard) * times * w * N * away, "reduce-scatter": times * 4 * N * away,
        "all-reduce": 8 * N / s * (1 - s / world), "weights to the sampler": w * N * away,
    }
    return Plan(memory, traffic)


# What may be changed so that a configuration fits, cheapest first, one upon the other.
CHANGES = (dict(checkpoint_activations=True), dict(reshard=True), dict(shard="world"), dict(micro_tokens=8192))


def advise(total: float, model_cfg, cfg, *sizes, **more) -> tuple[dict, Plan]:
    """(settings to change so that the plan fits into `total` bytes, the plan with them). MemoryError if nothing helps."""
    changes = {}
    for change in ({}, *CHANGES):
        changes |= {k: v for k, v in change.items() if k != "micro_tokens" or v < cfg.micro_tokens}
        found = plan(model_cfg, replace(cfg, **changes), *sizes, **more)
        if sum(found.memory.values()) + RESERVE <= total:
            return {k: v for k, v in changes.items() if v != getattr(cfg, k)}, found
    raise MemoryError(f"{found} does not fit into {(total - RESERVE) / 2**30:.0f} GiB even with {flags(changes)}: "
                      "wanted more GPUs, a smaller cache of the sampler or a smaller model")


def flags(changes: dict) -> str:
    return " ".join(f"--{name} {value}" for name, value in changes.items())


def must_fit(total: float, model_cfg, cfg, *sizes, **more) -> Plan:
    """The plan of this configuration. ValueError, one line with what to change, if `total` bytes do not hold it."""
    changes, _ = advise(total, model_cfg, cfg, *sizes, **more)
    found = plan(model_cfg, cfg, *sizes, **more)
    if changes:
        raise MemoryError(f"{found} does not fit into {(total - RESERVE) / 2**30:.0f} GiB: it would with {flags(changes)}")
    return found
