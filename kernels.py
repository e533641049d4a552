"""
What the learner does in Triton on CUDA and in torch elsewhere: what torch does in many passes.

statistics, gradient    One pass over a chunk of fp32 logits each way: log-sum-exp, log-prob and
    entropy, and the gradient of the log-prob. A chunk of 4096 rows over 152k words is 2.5 GB, which
    torch's operations read or write 21 times: half the time of the head's matrix products (H200).
    No row needs another, so a result does not depend on the chunk it came in.

rotate    Rotary positions. torch.compile computes both halves of the concatenation for every
    element, ten times slower than reading and writing it.

Shapes: R rows, V vocabulary, T tokens, H heads, E head dim.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's builds for the CPU come without it
    triton = None

BLOCK = 4096  # columns of the logits that one program holds at a time


def statistics(z_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log p(target), entropy, log-sum-exp) of softmax(z), each (R,) in fp32.

    The entropy is lse - E_p[z].
    """
    R, V = z_RV.shape
    if not z_RV.is_cuda:
        lse_R = z_RV.logsumexp(-1)
        logp_R = z_RV.gather(1, targets_R[:, None])[:, 0] - lse_R
        mean_R = z_RV.softmax(-1).mul_(z_RV).sum(-1)
        return logp_R, lse_R - mean_R, lse_R
    logp_R = torch.empty(R, device=z_RV.device)
    entropy_R = torch.empty_like(logp_R)
    lse_R = torch.empty_like(logp_R)
    outputs = logp_R, entropy_R, lse_R
    statistics_kernel[(R,)](z_RV, targets_R, *outputs, V, BLOCK=BLOCK, num_warps=8)
    return outputs


def gradient(
    z_RV: Tensor,
    targets_R: Tensor,
    lse_R: Tensor,
    scale_R: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """scale (onehot(target) - softmax(z)) in `dtype`; z may be overwritten."""
    R, V = z_RV.shape
    if not z_RV.is_cuda:
        dz_RV = z_RV.sub_(lse_R[:, None]).exp_().mul_(-scale_R[:, None])
        dz_RV.scatter_add_(1, targets_R[:, None], scale_R[:, None])
        return dz_RV.to(dtype)
    dz_RV = torch.empty_like(z_RV, dtype=dtype)
    grid = R, triton.cdiv(V, BLOCK)
    gradient_kernel[grid](z_RV, targets_R, lse_R, scale_R, dz_RV, V, BLOCK=BLOCK, num_warps=8)
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
    """Rotates the pairs (i, i + E/2) of each head. cos and sin of the angles: (T, 1, E/2), fp32."""
    return Rotate.apply(x_THE, cos, sin)


def turn(x_THE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    T, H, E = x_THE.shape
    x_THE = x_THE.contiguous()
    is_power_of_two = E & (E - 1) == 0  # a kernel's tiles have powers of two
    if not x_THE.is_cuda or not is_power_of_two:
        a, b = x_THE.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x_THE.dtype)
    out_THE = torch.empty_like(x_THE)
    rotate_kernel[(T,)](x_THE, cos, sin, out_THE, H, E, triton.next_power_of_2(H), num_warps=2)
    return out_THE


if triton:

    @triton.jit
    def rotate_kernel(x, cos, sin, out, H: tl.constexpr, E: tl.constexpr, HEADS: tl.constexpr):
        """All heads of one token per program."""
        t = tl.program_id(0).to(tl.int64)
        half = tl.arange(0, E // 2)[None, :]
        head = tl.arange(0, HEADS)[:, None]
        c = tl.load(cos + t * (E // 2) + half)
        s = tl.load(sin + t * (E // 2) + half)
        first = (t * H + head) * E + half
        second = first + E // 2
        real = head < H
        a = tl.load(x + first, real, 0.0).to(tl.float32)
        b = tl.load(x + second, real, 0.0).to(tl.float32)
        tl.store(out + first, (a * c - b * s).to(out.dtype.element_ty), real)
        tl.store(out + second, (b * c + a * s).to(out.dtype.element_ty), real)

    @triton.jit
    def statistics_kernel(z, targets, logp, entropy, lse, V, BLOCK: tl.constexpr):
        """A row per program. Every lane keeps, of its own columns, the maximum m, and
        sum exp(z - m) and sum z exp(z - m)."""
        row = tl.program_id(0).to(tl.int64)
        z += row * V
        m = tl.full([BLOCK], -1e30, tl.float32)  # finite: -inf - -inf is nan
        s = tl.zeros([BLOCK], tl.float32)
        u = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(z + columns, mask=columns < V, other=-1e30)
            top = tl.maximum(m, x)
            shrink = tl.exp(m - top)
            p = tl.exp(x - top)
            s = s * shrink + p
            u = u * shrink + p * x
            m = top
        top = tl.max(m, 0)
        shrink = tl.exp(m - top)  # 0 for a lane without a column, whose u is of the size of 1e30
        total = tl.sum(s * shrink, 0)
        log_sum = top + tl.log(total)
        tl.store(lse + row, log_sum)
        mean = tl.sum(u * shrink, 0) / total
        tl.store(entropy + row, log_sum - mean)
        target = tl.load(targets + row)
        tl.store(logp + row, tl.load(z + target) - log_sum)

    @triton.jit
    def gradient_kernel(z, targets, lse, scale, dz, V, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(z + row * V + columns, mask=columns < V, other=0.0)
        p = tl.exp(x - tl.load(lse + row))
        hit = tl.where(columns == tl.load(targets + row), 1.0, 0.0)
        d = (hit - p) * tl.load(scale + row)
        tl.store(dz + row * V + columns, d.to(dz.dtype.element_ty), mask=columns < V)
