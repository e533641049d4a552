"""
The learner: fp32 master weights sharded by FSDP2, packed micro-batches of equal cost.

    shard, make_learner    fully_shard over a mesh: all ranks, or nodes that are replicas
    pack_micro_batches     which rollouts each rank trains on together
    update                 one batch of rollouts, one or more optimizer steps

No gradient depends on how the work is cut: losses are sums with global denominators, gradients
are summed over ranks, and a rank without anything to train on takes part with weight zero.

Shapes: T packed tokens, S rollouts of a micro-batch, R trained response tokens.
"""

import math
import os
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor

import aero
from aero import MicroBatch
from model import Model, Packed, forward_flops, pack


class Trained(NamedTuple):
    """One rollout on its way to the learner."""

    place: int  # number of its group
    prompt: tuple[int, ...]
    tokens: list[int]
    logps: list[float]  # as the sampler recorded them
    advantage: float


class Learner(NamedTuple):
    model: Model
    optimizer: torch.optim.Optimizer
    reference: Model | None = None  # the starting model, frozen, if the loss needs it


# ------------------------------------------------------------------------------------------ weights


def node_size(world: int) -> int:
    """Ranks of this node, as torchrun says; without it, all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world))


def shards(cfg, world: int, node: int) -> int:
    """Over how many ranks one copy of the weights is spread."""
    return node if cfg.shard == "node" else world


def shard(model: Model, cfg, device) -> None:
    """FSDP2: each block, then the root with embedding, last norm and head. Reductions in fp32, bf16
    compute on CUDA. Gradients are summed over ranks, not averaged: the loss has the denominators.
    torchrun numbers the ranks of a node one after the other, so a row of the mesh is a node."""
    world = dist.get_world_size()
    size = shards(cfg, world, node_size(world))
    if size == world:
        mesh = dist.init_device_mesh(device.type, (world,))
    else:
        names = ("replicate", "shard")
        mesh = dist.init_device_mesh(device.type, (world // size, size), mesh_dim_names=names)
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if device.type == "cuda":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=cfg.reshard)
    # The root's backward pass begins with the head, at once after its forward pass.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # on NCCL too no pre-multiplied sum


def make_model(model_cfg, cfg, device, read, dtype) -> Model:
    """The sharded model in `dtype`. read(model on the meta device) yields (name, whole tensor): no
    GPU ever holds more than its shards and one tensor."""
    with torch.device("meta"):
        model = Model(model_cfg).to(dtype)
    weights = read(model)
    model.checkpoint_activations = cfg.checkpoint_activations
    if cfg.compile:
        # What stands on either side of attention, so that the compiled graphs know one varying
        # size, the number of tokens, and no sequence boundaries. All blocks share two graphs.
        for block in model.model.layers:
            block.before = torch.compile(block.before, dynamic=True)
            block.after = torch.compile(block.after, dynamic=True)
    shard(model, cfg, device)
    model.to_empty(device=device)
    missing = dict(model.named_parameters())
    with torch.no_grad():
        for name, whole in weights:
            p = missing.pop(name)
            whole = whole.to(device, p.dtype)
            part = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
            p.copy_(part)
    assert not missing, f"no weights were read for {', '.join(missing)}"
    return model


def make_learner(model_cfg, cfg, device, read) -> Learner:
    """fp32 master weights and their optimizer. For a loss that needs it also the same weights once
    more, frozen: sharded alike, in the precision of the forward pass, without optimizer."""
    model = make_model(model_cfg, cfg, device, read, torch.float32)
    reference = None
    if aero.LOSSES[cfg.loss].needs_reference:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        reference = make_model(model_cfg, cfg, device, read, dtype).requires_grad_(False)
    return Learner(model, make_optimizer(model, cfg), reference)


def make_optimizer(model, cfg) -> torch.optim.AdamW:
    """AdamW with its moments, made here and not in the first step, so that a checkpoint has the
    same entries before and after it."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    options = {"lr": cfg.lr, "weight_decay": cfg.weight_decay, "betas": (0.9, 0.95)}
    optimizer = torch.optim.AdamW(groups, **options, fused=True)
    for p in model.parameters():
        optimizer.state[p] = {
            "step": torch.zeros((), device=p.device if p.is_cuda else None),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return optimizer


def full_weights(model, dtype=torch.float32):
    """(name, whole tensor), one at a time, rounded before it travels: a collective."""
    for name, p in model.named_parameters():
        yield name, p.detach().to(dtype).full_tensor()


# ------------------------------------------------------------------------------------ micro-batches


def cost(model_cfg, prompt: int, response: int) -> float:
    """Time of one sequence, in FLOPs of matrix products: attention runs at a quarter of their rate
    (190 against 750 TFLOP/s on an H200), so each of its FLOPs counts for four. For the 1.5B shape
    that is 7617 tokens + 1356 response + tokens^2, in a unit of its own."""
    n = prompt + response
    return forward_flops(model_cfg, n, 4 * n * (n + 1) / 2, predicted=response)


def pack_micro_batches(costs, lengths, world: int, cap: int) -> list[list[list[int]]]:
    """Micro-batches for each rank: lists of indices, as many on every rank, at most `cap` tokens in
    each unless one sequence alone is longer. Dearest first, into the cheapest micro-batch that
    has room; where none has, all over again with one more for each rank.

    >>> pack_micro_batches([5, 4, 3, 3], [5, 4, 3, 3], world=2, cap=8)
    [[[0, 3]], [[1, 2]]]
    """
    bins, count = None, world * math.ceil(sum(lengths) / cap / world)
    while bins is None:
        bins = fill_bins(costs, lengths, count, cap)
        count += world
    # Rows of `world` micro-batches of about equal cost, dealt to and fro, so that no rank gets the
    # dearest of every row.
    rows = [bins[first : first + world] for first in range(0, len(bins), world)]
    for row in rows[1::2]:
        row.reverse()
    return [list(rank) for rank in zip(*rows)]


def fill_bins(costs, lengths, count: int, cap: int) -> list[list[int]] | None:
    """`count` bins of indices, the dearest bin first; None if there is no room for one of them."""
    bins = [[] for _ in range(count)]
    spent, filled = [0] * count, [0] * count
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        room = [b for b in range(count) if not bins[b] or filled[b] + lengths[i] <= cap]
        if not room:
            return None
        cheapest = min(room, key=spent.__getitem__)
        bins[cheapest].append(i)
        spent[cheapest] += costs[i]
        filled[cheapest] += lengths[i]
    return [bins[b] for b in sorted(range(count), key=lambda b: -spent[b])]


def share_of_rank(batch: list[Trained], model_cfg, cfg) -> list[list[int]]:
    """Indices of the rollouts in each micro-batch of this rank."""
    sizes = [len(x.prompt) + len(x.tokens) for x in batch]
    costs = [cost(model_cfg, len(x.prompt), len(x.tokens)) for x in batch]
    world, rank = dist.get_world_size(), dist.get_rank()
    return pack_micro_batches(costs, sizes, world, cfg.micro_tokens)[rank]


def inputs_of(indices, batch, weights, device) -> tuple[Packed, MicroBatch]:
    """A rank without anything to train on takes the shortest rollout, with weight zero."""
    if not indices:
        shortest = min(batch, key=lambda x: len(x.prompt) + len(x.tokens))
        return micro_batch([shortest], [0.0], device)
    return micro_batch([batch[i] for i in indices], weights[indices], device)


def micro_batch(rollouts: list[Trained], weight_S, device) -> tuple[Packed, MicroBatch]:
    """Input of the forward pass and of the loss. A rollout of tokens r0 r1 with weight w and
    advantage a, and one of r2 with v and b:

        weight_R = w w v,   advantage_R = a a b,   rollout_R = 0 0 1,   length_S = 2 1
    """
    length_S = [len(x.tokens) for x in rollouts]

    def tensor(values, dtype=np.float32):
        x = torch.as_tensor(np.asarray(values, dtype))
        if torch.device(device).type == "cuda":  # pinned, or the copy waits for the batch before
            x = x.pin_memory()
        return x.to(device, non_blocking=True)

    batch = MicroBatch(
        logp_R=None, entropy_R=None, behaviour_R=None,  # known after the forward pass
        sampled_R=tensor(np.concatenate([x.logps for x in rollouts])),
        advantage_R=tensor(np.repeat([x.advantage for x in rollouts], length_S)),
        weight_R=tensor(np.repeat(weight_S, length_S)),
        rollout_R=tensor(np.repeat(np.arange(len(rollouts)), length_S), np.int64),
        length_S=tensor(length_S, np.int64),
    )
    return pack([x.prompt for x in rollouts], [x.tokens for x in rollouts], device), batch


# --------------------------------------------------------------------------------------- the update


def update(learner: Learner, batch: list[Trained], lr: float, cfg) -> dict[str, float]:
    """One batch, cfg.updates_per_batch optimizer steps. `batch` is the whole step's, the same on
    every rank. A rank with less to train on than others still takes part in every collective,
    with weight zero. Returns metrics over all ranks."""
    model, optimizer, _ = learner
    device = next(model.parameters()).device
    for group in optimizer.param_groups:
        group["lr"] = lr
    lengths = [len(x.tokens) for x in batch]
    weights = aero.token_weights([x.place for x in batch], lengths, cfg.loss_norm, cfg.max_new)
    share = share_of_rank(batch, model.cfg, cfg)

    inputs, norms, sums = [], [], {}
    largest_gap = torch.zeros((), device=device)
    for number in range(cfg.updates_per_batch):
        optimizer.zero_grad()
        for m, indices in enumerate(share):
            if number == 0:  # packed while the device works on the one before
                inputs.append(inputs_of(indices, batch, weights, device))
            gather_and_reduce(model, cfg, last=m == len(share) - 1)
            packed, tokens = inputs[m]
            tokens, metrics = forward_backward(learner, packed, tokens, cfg)
            if number == 0:  # before the weights move
                inputs[m] = packed, tokens
                health, gap = sampler_against_learner(tokens)
                metrics |= health
                largest_gap = torch.maximum(largest_gap, gap)
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double()
        norms.append(optimizer_step(model, optimizer, cfg))
    optimizer.zero_grad()

    sums = over_ranks(sums)
    dist.all_reduce(largest_gap, op=dist.ReduceOp.MAX)
    norms = torch.stack(norms).tolist()
    finite = [norm for norm in norms if math.isfinite(norm)]
    measured = [name for name in sums if name.startswith("loss/")]
    return {
        "loss/policy": sums["policy"] / cfg.updates_per_batch,
        **{name: sums[name] / sums["weight"] for name in measured},
        "policy/entropy": sums["entropy"] / sum(lengths),
        "mismatch/kl": sums["kl"] / sum(lengths),
        "mismatch/max_abs": largest_gap.item(),
        "optim/lr": lr,
        "optim/grad_norm": max(finite, default=norms[-1]),
        "optim/skipped": len(norms) - len(finite),
    }


def gather_and_reduce(model, cfg, last: bool):
    """Weights are gathered once in an optimizer step; gradients are summed where they are, and
    over ranks with the last micro-batch. With --reshard, both in every micro-batch."""
    model.set_requires_all_reduce(last)
    if not cfg.reshard:
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)


def forward_backward(learner, packed: Packed, batch: MicroBatch, cfg):
    """Adds one micro-batch's gradient. Returns (its scored tokens, {metric: sum over them})."""
    loss = aero.LOSSES[cfg.loss]
    ids_T, cu, max_len, rows_R, targets_R = packed
    inputs = (ids_T, cu, max_len, targets_R, rows_R, cfg.temperature)
    if loss.needs_reference and batch.reference_R is None:
        with torch.no_grad():
            batch = batch._replace(reference_R=learner.reference(*inputs).logp_R)
    # With one update the ratio is exactly 1, so a loss may know beforehand what multiplies each
    # log-prob's gradient: the head then makes its own in the forward pass.
    shortcut = loss.derivative and cfg.updates_per_batch == 1 and not cfg.is_cap
    coefficient_R = loss.derivative(batch, cfg) if shortcut else None
    scores = learner.model(*inputs, coefficient_R)
    batch = batch._replace(logp_R=scores.logp_R, entropy_R=scores.entropy_R)
    if batch.behaviour_R is None:
        batch = set_behaviour(batch, cfg)
    with torch.set_grad_enabled(not shortcut):
        value, metrics = loss.function(batch, cfg)
    differentiated = scores.weighted if shortcut else value
    differentiated.backward()
    sums = {"policy": value, "weight": batch.weight_R.sum()}
    sums |= {f"loss/{name}": total for name, total in metrics.items()}
    return batch._replace(logp_R=batch.logp_R.detach()), sums


def set_behaviour(batch: MicroBatch, cfg) -> MicroBatch:
    """What the policy ratio is taken against in all updates. With one update that is the policy
    itself, and no second forward pass is made; with several, the sampler. With --is_cap the clip
    looks at the policy's own move, and a weight on every token at the gap of the two engines."""
    policy_R = batch.logp_R.detach()
    if cfg.is_cap:
        importance_R = (policy_R - batch.sampled_R).exp().clamp(max=cfg.is_cap)
        batch = batch._replace(advantage_R=batch.advantage_R * importance_R)
    on_policy = cfg.updates_per_batch == 1 or cfg.is_cap
    return batch._replace(behaviour_R=policy_R if on_policy else batch.sampled_R)


def sampler_against_learner(batch: MicroBatch) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Sums over trained tokens: entropy, and the divergence of the sampler's policy from the
    learner's, by its estimator r - 1 - log r; and the largest gap of a log-prob."""
    trained_R = batch.weight_R > 0  # a token of weight zero is there for its rank to take part
    gap_R = trained_R * (batch.logp_R - batch.sampled_R)
    kl = (gap_R.exp() - 1 - gap_R).sum()
    entropy = (trained_R * batch.entropy_R).sum()
    return {"kl": kl, "entropy": entropy}, gap_R.abs().max()


def optimizer_step(model, optimizer, cfg) -> torch.Tensor:
    """Clips the gradient, steps, and returns the norm before clipping, on the device. A gradient
    that is not finite is no step, on all ranks together, since they see the same norm."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip).full_tensor()
    # Queued before anybody has seen the norm. Where GradScaler's attribute is 1, the fused kernel
    # leaves weights, moments and its count of steps as they are.
    optimizer.found_inf = 1.0 - norm.isfinite().float()
    optimizer.step()
    optimizer.found_inf = None
    return norm


def over_ranks(sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """Summed over ranks by name. All ranks run the same loss, so they have the same names."""
    names = sorted(sums)
    vector = torch.stack([sums[name] for name in names])
    dist.all_reduce(vector)
    return dict(zip(names, vector.tolist()))
