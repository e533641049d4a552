"""
What the learner does in Triton on CUDA and in torch elsewhere: passes over memory that torch makes many of.

statistics, gradient: one pass over a chunk of fp32 logits each way, log-sum-exp, log-prob and entropy, and the gradient of the
log-prob. A chunk of 4096 rows over 152k words is 2.5 GB; torch operations read or write it 21 times, on an H200 half as long as
the matrix products of the head. Rows are independent and nothing is summed in a changing order, so a result does not depend
on the chunk it came in.

rotate: rotary positions. torch.compile computes both halves of the concatenation for every element, ten times slower than
reading and writing it.

Shapes: R rows, V vocabulary, T tokens, H heads, E head dim.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:     # torch's builds for the CPU come without it
    triton = None


def statistics(z_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log p(target), entropy, log-sum-exp) of softmax(z), each (R,) in fp32. Entropy: lse - E_p[z]."""
    if not z_RV.is_cuda:
        lse_R = z_RV.logsumexp(-1)
        logp_R = z_RV.gather(1, targets_R[:, None])[:, 0] - lse_R
        return logp_R, lse_R - z_RV.softmax(-1).mul_(z_RV).sum(-1), lse_R
    logp_R, entropy_R, lse_R = (torch.empty(len(z_RV), device=z_RV.device) for _ in range(3))
    statistics_kernel[len(z_RV),](z_RV, targets_R, logp_R, entropy_R, lse_R, z_RV.shape[1], BLOCK=4096, num_warps=8)
    return logp_R, entropy_R, lse_R


def gradient(z_RV: Tensor, targets_R: Tensor, lse_R: Tensor, scale_R: Tensor, dtype: torch.dtype) -> Tensor:
    """scale (onehot(target) - softmax(z)) in `dtype`; z may be overwritten."""
    if not z_RV.is_cuda:
        dz_RV = z_RV.sub_(lse_R[:, None]).exp_().mul_(-scale_R[:, None])
        return dz_RV.scatter_add_(1, targets_R[:, None], scale_R[:, None]).to(dtype)
    (R, V), dz_RV = z_RV.shape, torch.empty_like(z_RV, dtype=dtype)
    gradient_kernel[R, triton.cdiv(V, 4096)](z_RV, targets_R, lse_R, scale_R, dz_RV, V, BLOCK=4096, num_warps=8)
    return dz_RV


class Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx, x_THE, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turn(x_THE, cos, sin)

    @staticmethod
    def backward(ctx, grad_THE):
        cos, sin = ctx.saved_tensors
        return turn(grad_THE, cos, -sin), None, None


def rotate(x_THE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (i, i + E/2) of each head by angles whose cos and sin are (T, 1, E/2), in fp32."""
    return Rotate.apply(x_THE, cos, sin)


def turn(x_THE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (T, H, E), x_THE = x_THE.shape, x_THE.contiguous()
    if not x_THE.is_cuda or E & (E - 1):    # a kernel's tiles have powers of two
        a, b = x_THE.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x_THE.dtype)
    out_THE = torch.empty_like(x_THE)
    rotate_kernel[T,](x_THE, cos, sin, out_THE, H, E, triton.next_power_of_2(H), num_warps=2)
    return out_THE


if triton:
    @triton.jit
    def rotate_kernel(x, cos, sin, out, H: tl.constexpr, E: tl.constexpr, HEADS: tl.constexpr):
        """All heads of one token per program."""
        t, half = tl.program_id(0).to(tl.int64), tl.arange(0, E // 2)[None, :]
        head = tl.arange(0, HEADS)[:, None]
        c, s = tl.load(cos + t * (E // 2) + half), tl.load(sin + t * (E // 2) + half)
        at, real = (t * H + head) * E + half, head < H
        a, b = tl.load(x + at, real, 0.0).to(tl.float32), tl.load(x + at + E // 2, real, 0.0).to(tl.float32)
        tl.store(out + at, (a * c - b * s).to(out.dtype.element_ty), real)
        tl.store(out + at + E // 2, (b * c + a * s).to(out.dtype.element_ty), real)

    @triton.jit
    def statistics_kernel(z, targets, logp, entropy, lse, V, BLOCK: tl.constexpr):
        """A row per program; every lane keeps the maximum m, sum exp(z - m) and sum z exp(z - m) of its own columns."""
        row = tl.program_id(0).to(tl.int64)
        z += row * V
        m = tl.full([BLOCK], -1e30, tl.float32)     # finite: -inf - -inf is nan
        s, u = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(z + columns, mask=columns < V, other=-1e30)
            top = tl.maximum(m, x)
            shrink, p = tl.exp(m - top), tl.exp(x - top)
            s, u, m = s * shrink + p, u * shrink + p * x, top
        top = tl.max(m, 0)
        shrink = tl.exp(m - top)    # 0 for a lane without a column, whose u is of the size of 1e30
        total = tl.sum(s * shrink, 0)
        log_sum = top + tl.log(total)
        tl.store(lse + row, log_sum)
        tl.store(entropy + row, log_sum - tl.sum(u * shrink, 0) / total)
        tl.store(logp + row, tl.load(z + tl.load(targets + row)) - log_sum)

    @triton.jit
    def gradient_kernel(z, targets, lse, scale, dz, V, BLOCK: tl.constexpr):
        row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(z + row * V + columns, mask=columns < V, other=0.0)
        hit = tl.where(columns == tl.load(targets + row), 1.0, 0.0)
        d = (hit - tl.exp(x - tl.load(lse + row))) * tl.load(scale + row)
        tl.store(dz + row * V + columns, d.to(dz.dtype.element_ty), mask=columns < V)
