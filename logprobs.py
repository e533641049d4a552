"""
One pass over a chunk of fp32 logits each way: log-sum-exp, log-prob and entropy forward, the gradient of the log-prob backward.

A chunk of 4096 rows over 152k words is 2.5 GB. Written in torch operations the forward pass reads or writes it 13 times and
the backward pass 8 times, on an H200 half as long as the matrix products of the head; the kernels read it once. Rows are
independent and nothing is summed in a changing order, so a result does not depend on the chunk it came in.

Shapes: R rows, V vocabulary.
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


if triton:
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
