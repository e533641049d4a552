"""
The head: logits, and the log-probs of tokens over the whole vocabulary without ever holding the
R x V matrix.

With p = softmax(z) and z = h W^T / temperature, the gradient of a log-prob is
d logp[y] / dz = onehot(y) - p: it needs the logits again. A training step thus takes four matrix
products of size R x V x D: z, then z again, dz W and dz^T h. Where the loss is linear in the
log-probs with coefficients known beforehand, the gradients are made while z is there: three.

Shapes: R rows with a target, D model dim, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import gradient, statistics

HEAD_CHUNK = 4096  # rows whose logits exist at a time: 2.5 GB for 152k words in fp32


def mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b accumulated and returned in fp32. On CUDA the half-precision kernel writes its fp32
    accumulator out, at almost no cost; the CPU has no such kernel, so the operands are widened."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_mm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in fp32, on CUDA inside the product, which is never written to memory."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += mm_fp32(a, b)


def logits_fp32(hidden_RD: Tensor, weight_VD: Tensor, temperature: float = 1.0) -> Tensor:
    """The one place where logits come from, in training and sampling: never rounded to half."""
    logits_RV = mm_fp32(hidden_RD, weight_VD.t())
    return logits_RV if temperature == 1.0 else logits_RV.div_(temperature)


class TokenScores(NamedTuple):
    logp_R: Tensor
    entropy_R: Tensor
    weighted: Tensor | None = None  # the scalar sum_r coefficient_R[r] logp_R[r]


def token_logprobs(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    temperature: float,
    coefficient_R: Tensor | None = None,
    chunk: int = HEAD_CHUNK,
) -> TokenScores:
    """log p(targets_R) and entropy_R, in fp32, of softmax(hidden W^T / temperature).

    Works through `chunk` rows at a time: the R x V matrix never exists (of 64k rows it would be
    40 GB). Gradients of the weight are summed over chunks in fp32. R = 0 is allowed and gives zero
    gradients; the entropy carries none. Raises ValueError unless temperature > 0.

    Without coefficients logp_R carries the gradient, and the backward pass computes all logits
    again. With them (constants) logp_R carries none and `weighted` does: its gradients are made in
    the forward pass and only scaled in the backward pass, which saves one of the head's four matrix
    products. They are, to the bit, those of (coefficient_R * logp_R).sum() the other way.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, log-probabilities need one above 0")
    inputs = (hidden_RD, weight_VD, targets_R, temperature, chunk)
    if coefficient_R is None:
        return TokenScores(*TwoPasses.apply(*inputs))
    if coefficient_R.requires_grad:
        raise ValueError("coefficient_R carries a gradient, constants are wanted")
    return TokenScores(*OnePass.apply(*inputs, coefficient_R))


class TwoPasses(torch.autograd.Function):
    """-> (logp_R, entropy_R). The backward pass computes all logits again."""

    @staticmethod
    def forward(ctx, hidden_RD, weight_VD, targets_R, temperature, chunk):
        ctx.save_for_backward(hidden_RD, weight_VD, targets_R)
        ctx.settings = (temperature, chunk)
        logp_R, entropy_R, _, _ = head_pass(hidden_RD, weight_VD, targets_R, temperature, chunk)
        ctx.mark_non_differentiable(entropy_R)
        return logp_R, entropy_R

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_R, _):
        inputs = (*ctx.saved_tensors, *ctx.settings)
        _, _, d_hidden_RD, d_weight_VD = head_pass(*inputs, grad_R, ctx.needs_input_grad)
        return d_hidden_RD, d_weight_VD, None, None, None


class OnePass(torch.autograd.Function):
    """-> (logp_R, entropy_R, weighted). The gradients of `weighted` wait for the backward pass."""

    @staticmethod
    def forward(ctx, hidden_RD, weight_VD, targets_R, temperature, chunk, coefficient_R):
        inputs = (hidden_RD, weight_VD, targets_R, temperature, chunk, coefficient_R)
        logp_R, entropy_R, *gradients = head_pass(*inputs, ctx.needs_input_grad)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(logp_R, entropy_R)
        return logp_R, entropy_R, (coefficient_R * logp_R).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, _, __, grad):
        # Not in place, since the graph may be kept for another backward pass. With an axis `grad`
        # keeps its precision: torch rounds a scalar to the other operand's dtype.
        scale = grad[None]
        gradients = [None if d is None else (d * scale).to(d.dtype) for d in ctx.saved_tensors]
        return *gradients, None, None, None, None


def head_pass(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_R: Tensor,
    temperature: float,
    chunk: int,
    coefficient_R: Tensor | None = None,
    needs: tuple[bool, ...] = (False, False),
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One pass over the logits -> (logp_R, entropy_R, d_hidden_RD, d_weight_VD).

    The last two are the gradients of sum_r coefficient_R[r] logp_R[r], each None unless needed.
    """
    R = len(hidden_RD)
    logp_R = torch.empty(R, dtype=torch.float32, device=hidden_RD.device)
    entropy_R = torch.empty_like(logp_R)
    need_hidden, need_weight = needs[:2]
    d_hidden_RD = torch.empty_like(hidden_RD) if need_hidden else None
    total_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if need_weight else None
    for start in range(0, R, chunk):
        rows = slice(start, start + chunk)
        z_RV = logits_fp32(hidden_RD[rows], weight_VD, temperature)
        logp_R[rows], entropy_R[rows], lse_R = statistics(z_RV, targets_R[rows])
        if need_hidden or need_weight:
            scale_R = coefficient_R[rows] / temperature
            dz_RV = gradient(z_RV, targets_R[rows], lse_R, scale_R, weight_VD.dtype)
            del z_RV  # 2.5 GB that the products below need not stand beside
        if need_hidden:
            d_hidden_RD[rows] = dz_RV @ weight_VD
        if need_weight:
            add_mm(total_VD, dz_RV.t(), hidden_RD[rows])
    d_weight_VD = total_VD.to(weight_VD.dtype) if need_weight else None
    return logp_R, entropy_R, d_hidden_RD, d_weight_VD
