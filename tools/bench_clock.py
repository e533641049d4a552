"""Seconds of an action, the ceilings of the machine, and where the time of a GPU goes."""

import time
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch


def now(device) -> float:
    """Seconds on a clock, once everything that was launched has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(action, device) -> float:
    begun = now(device)
    action()
    return now(device) - begun


def median_seconds(action, device, repeats: int) -> float:
    """After one warm-up."""
    action()
    seconds = [timed(action, device) for _ in range(repeats)]
    return float(np.median(seconds))


class Ceilings(NamedTuple):
    bandwidth: float  # bytes per second of a copy, read + write
    matrix_rate: float  # FLOP/s of a matrix product of random numbers in the compute dtype


def measure_ceilings(device) -> Ceilings:
    cuda = device.type == "cuda"
    side = 8192 if cuda else 1024
    dtype = torch.bfloat16 if cuda else torch.float32
    left = torch.randn(side, side, device=device, dtype=dtype)
    right = torch.randn(side, side, device=device, dtype=dtype)
    source = torch.randn(2**28 if cuda else 2**24, device=device)
    target = torch.empty_like(source)
    copies = [timed(lambda: target.copy_(source), device) for _ in range(10)]
    products = [timed(lambda: left @ right, device) for _ in range(20)]
    moved = 2 * source.numel() * source.element_size()
    return Ceilings(moved / min(copies), 2 * side**3 / sorted(products)[10])


# A kernel belongs to the first kind of which its name has a word.
KINDS = dict(
    attention=("attend", "combine", "flash", "fmha"),
    sampling=("blocks_kernel", "draw_kernel", "least_allowed"),
    logits=("statistics_kernel", "gradient_kernel"),
    optimizer=("adam", "lpnorm"),
    matrix=("gemm", "nvjet", "xmma", "cutlass", "splitk", "thin_kernel"),
    nccl=("nccl",),
    copies=("memcpy", "memset", "chunk_cat", "split_with_sizes", "copyfunctor", "copy_kernel"),
    elementwise=(
        "triton", "elementwise", "reduce", "norm", "cat", "index", "scatter", "gather",
        "multi_tensor", "silu_mul",
    ),
)  # fmt: skip


def kind_of(kernel: str) -> str:
    """
    >>> kind_of("void flash_fwd_kernel"), kind_of("triton_poi_fused_add_3"), kind_of("surprise")
    ('attention', 'elementwise', 'other')
    """
    for kind, words in KINDS.items():
        if any(word in kernel for word in words):
            return kind
    return "other"


class Span(NamedTuple):
    """One kernel on the GPU; times in microseconds."""

    start: float
    end: float
    name: str


def kernel_spans(action) -> list[Span]:
    """What the GPU does during the action, in the order of time."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        action()
        torch.cuda.synchronize()
    spans = []
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            time_range = event.time_range
            spans.append(Span(time_range.start, time_range.end, event.name.lower()))
    return sorted(spans)


def idle_time(spans: list[Span]) -> float:
    """
    Microseconds between the first and the last span in which none runs.

    >>> idle_time([Span(0, 4, "a"), Span(1, 2, "b"), Span(6, 7, "c")])
    2.0
    """
    idle = 0.0
    until = spans[0].start
    for span in spans:
        idle += max(0.0, span.start - until)
        until = max(until, span.end)
    return idle


def breakdown(action, head, device, times: int = 1) -> dict:
    """
    Milliseconds of the GPU by kind of kernel, for each of the `times` things that the action does.
    `gaps`: nothing runs. `head`: that action alone; its parts are in the other kinds. `longest`:
    kernels of the kinds elementwise and other, where surprises are.
    """
    spans = kernel_spans(action)
    spent = dict.fromkeys([*KINDS, "other"], 0.0)
    longest = Counter()
    for span in spans:
        kind = kind_of(span.name)
        spent[kind] += span.end - span.start
        if kind in ("elementwise", "other"):
            longest[span.name[:90]] += span.end - span.start
    spent["gaps"] = idle_time(spans)
    spent["head"] = times * 1e6 * median_seconds(head, device, 3)

    def milliseconds(parts):
        return {name: round(us / 1e3 / times, 3) for name, us in parts if us}

    longest_ms = milliseconds(longest.most_common(10))
    return milliseconds(spent.items()) | {"longest": longest_ms}
