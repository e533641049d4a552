"""
The sampler: continuous batching over a paged KV cache.

    add() ──▶ queue ──▶ admit: a free slot, the prompt's pages ──▶ decode steps for all active slots ──▶ finished rollouts
                          ▲                                             │    ▲
                          └── prompt pages, computed once per prompt    └────┘

The cache holds pages of 64 places (16 on the plain path), (L, 2, pages, K, page, E). A slot's row of the page table says
where its keys are; here pages of 4 places, prompt p of 7 tokens and response r (. unused):

    table                       page 7    page 3    page 9    page 4    page 5
    slot 0   7 9 .      ┌────▶  p p p p   p p . .   p p r r   p p r r   r . . .
    slot 1   7 4 5   ───┘       both      template  slot 0    slot 1    slot 1
    slot 2   . . .

The full pages of a prompt are shared by its group; the rest of it is a template that every slot copies and continues. All
of the prompt but its last token is computed beforehand: that token is the input of the slot's first decode step, so the
first response token is drawn on the same path as every other. Memory follows what is written: a slot gets a page when it
reaches one. A request that finds too few waits; when running rollouts find none, the youngest goes back to the queue and
is drawn again, to the same tokens up to rounding, since its random stream hangs on nothing else. The cache never grows.

Active slots are always the first A of B. The host owns their state between launches, a launch is a few decode steps
(`stride`), and the device stops a slot by itself when its rollout ends.

Two paths draw the same rollouts up to rounding. Plain: torch operations, any device. Fast, on CUDA with Triton: a step is
one replay of a CUDA graph, captured for some numbers of slots, of fused kernels; A is rounded up to the next graph.

Randomness: token t of rollout i of problem p is drawn with Philox4x32-10 noise whose key is a hash of (seed, p, i) and
whose counter is (word / 4, t). It depends on nothing else: not on the batch, the slot, the order of admission or the number
of ranks. Everything here is local to a rank: ranks stop at different steps, so there is no collective.

Letters: A active slots, B slots, N pages in a row of the table, L layers, H heads, K KV heads, E head dim, D model dim,
V vocabulary, P prompt tokens, T packed tokens.
"""

import hashlib
import math
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from model import Model, ModelConfig, attend_packed, logits_fp32, mm_fp32, positions, rope_tables

try:
    import triton
    import triton.language as tl
except ImportError:     # no build for this platform: the plain path is all there is
    triton = None


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Explicit here, never inherited from a model folder's generation_config."""

    temperature: float = 1.0    # 0: greedy
    top_p: float = 1.0          # smallest set of most likely words with at least this probability; 1: off
    top_k: int = 0              # the most likely k words; 0: off

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(f"sampling: wanted temperature >= 0, 0 < top_p <= 1, top_k >= 0, found {self}")

    @property
    def cuts(self) -> bool:
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0)


@dataclass(frozen=True)
class Request:
    problem: int                # with `index` and the seed: the random stream
    index: int                  # which rollout of the problem
    prompt: tuple[int, ...]
    max_new: int                # response tokens at most, EOS included


@dataclass
class Rollout:
    problem: int
    index: int
    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)     # the response; ends in EOS unless truncated
    logps: list[float] = field(default_factory=list)    # log-prob of each token after temperature, before top-p and top-k, fp32
    truncated: bool = False


# --------------------------------------------------------------------------------------------------------------------
# Random numbers and the draw

MASK32 = 0xFFFFFFFF
BLOCK = 4096        # words that are drawn from together, see draw()
LOWEST = -2139095041    # rank of -inf among fp32 numbers, see least_allowed()


def stream_key(seed: int, problem: int, index: int) -> int:
    """63-bit Philox key of one rollout's random stream."""
    digest = hashlib.blake2b(f"{seed} {problem} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def philox(c0, c1, c2, key, rounds: int = 10):
    """
    Philox4x32 (Salmon et al., SC 2011) on int64 tensors that broadcast: four 32-bit words for the counter (c0, c1, c2, 0)
    and a 64-bit key.
    """
    c0, c1, c2 = torch.broadcast_tensors(c0, c1, c2)
    c3 = torch.zeros_like(c0)
    k0, k1 = key & MASK32, (key >> 32) & MASK32
    for _ in range(rounds):
        # int64 products wrap, their 64 bits are those of the unsigned product
        low, high = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = ((high >> 32) & MASK32) ^ c1 ^ k0, high & MASK32, ((low >> 32) & MASK32) ^ c3 ^ k1, low & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def gumbel_noise(key_A, position_A, n: int, block_A=None):
    """
    (A, n) fp32 Gumbel noise of words block * BLOCK, ...; without block_A of the blocks themselves. Word v takes output
    v % 4 of counter (v // 4, position, 0), block b takes output b % 4 of counter (b // 4, position, 1).
    """
    first_A = torch.zeros_like(key_A) if block_A is None else block_A * (BLOCK // 4)
    counter = first_A[:, None] + torch.arange((n + 3) // 4, device=key_A.device)
    kind = torch.full_like(counter[:1, :1], int(block_A is None))
    words = torch.stack(philox(counter, position_A[:, None], kind, key_A[:, None]), dim=-1).flatten(1)[:, :n]
    # w in (0, 1]; -log1p(-w) is exponential down to 2^-33, so that the far tail of the vocabulary can still be drawn.
    # Where fp32 rounds w to 1 the noise is -inf, a word that is not drawn (probability 2^-25).
    w = (words.float() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-w))


def least_allowed(logits_AV, top_p: float, top_k: int):
    """
    (A,) the smallest logit among the top_k, and of those among the smallest set that holds top_p of their probability. Words
    that are as likely as the last one stay with it. No sort: fp32 numbers are ordered like integers (after a flip of the
    negative ones), so 32 halvings of the integer range find the largest logit above which there is still enough.
    """
    bits = logits_AV.view(torch.int32)
    rank_AV = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    p_AV = (logits_AV - logits_AV.amax(-1, keepdim=True)).exp()

    def bisect(weight_AV, wanted_A):
        low_A = torch.full_like(rank_AV[:, 0], LOWEST)
        high_A = rank_AV.amax(-1)
        for _ in range(32):
            middle_A = (low_A + high_A + 1) >> 1
            enough_A = (weight_AV * (rank_AV >= middle_A[:, None])).sum(-1) >= wanted_A
            low_A, high_A = torch.where(enough_A, middle_A, low_A), torch.where(enough_A, high_A, middle_A - 1)
        return low_A

    rank_A = torch.full_like(rank_AV[:, 0], LOWEST)
    if 0 < top_k < logits_AV.shape[1]:
        rank_A = bisect(torch.ones_like(p_AV), top_k)
    if top_p < 1:
        p_AV = p_AV * (rank_AV >= rank_A[:, None])
        rank_A = torch.maximum(rank_A, bisect(p_AV, top_p * p_AV.sum(-1)))
    return torch.where(rank_A < 0, rank_A ^ 0x7FFFFFFF, rank_A).int().view(torch.float32)


def truncate(logits_AV, top_p: float, top_k: int):
    """-inf for words that are not drawn from, see least_allowed."""
    return logits_AV.masked_fill(logits_AV < least_allowed(logits_AV, top_p, top_k)[:, None], -torch.inf)


def draw(logits_AV, key_A, position_A, sampling: Sampling):
    """
    One token per row: its block of the vocabulary by Gumbel-max over the blocks' log-sum-exp, then the word by Gumbel-max in
    its block. P(block) P(word | block) = P(word) exactly, and a thirtieth of the noise is needed. Returns (token_A, logp_A);
    greedy rows get the log-prob at temperature 1.
    """
    logits_AV = logits_AV.float() / (sampling.temperature or 1.0)
    if sampling.temperature == 0:
        token_A = logits_AV.argmax(dim=-1)
    else:
        allowed_AV = truncate(logits_AV, sampling.top_p, sampling.top_k) if sampling.cuts else logits_AV
        width = min(BLOCK, allowed_AV.shape[1])
        blocks = F.pad(allowed_AV, (0, -allowed_AV.shape[1] % width), value=-torch.inf).unflatten(1, (-1, width))
        block_A = torch.zeros_like(key_A)
        if blocks.shape[1] > 1:
            block_A = (blocks.logsumexp(-1) + gumbel_noise(key_A, position_A, blocks.shape[1])).argmax(-1)
        words_AW = blocks.gather(1, block_A[:, None, None].expand(-1, 1, width))[:, 0]
        token_A = block_A * BLOCK + (words_AW + gumbel_noise(key_A, position_A, width, block_A)).argmax(-1)
    logp_A = logits_AV.gather(1, token_A[:, None])[:, 0] - logits_AV.logsumexp(dim=-1)
    return token_A, logp_A


# --------------------------------------------------------------------------------------------------------------------
# The state of a slot, as rows of one integer matrix (7, B), so that one copy brings it to the device and back

INPUT, LENGTH, DRAWN, KEY, LIMIT, ROW, DONE = range(7)
# INPUT: token to feed next. LENGTH: keys in the cache, = position of that token. DRAWN: response tokens so far, = counter of
# the random stream. LIMIT: most of them. ROW: where they are written. DONE: ended; the slot stands still.

# --------------------------------------------------------------------------------------------------------------------
# The fast path's kernels. Statistics and sums are fp32; what is stored is rounded where the plain path rounds, but for the
# residual, which the matrix product adds before it rounds.

if triton is not None:

    @triton.jit
    def norm_kernel(x, weight, out, eps, D: tl.constexpr, WIDTH: tl.constexpr):
        """RMSNorm. One program per row."""
        d = tl.arange(0, WIDTH)
        at, mask = tl.program_id(0) * D + d, d < D
        row = tl.load(x + at, mask, 0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(row * row) / D + eps)
        tl.store(out + at, row * scale * tl.load(weight + d, mask, 0.0).to(tl.float32), mask)

    @triton.jit
    def silu_mul_kernel(gate_up, out, I: tl.constexpr, WIDTH: tl.constexpr):
        a = tl.program_id(0).to(tl.int64)
        i = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        gate = tl.load(gate_up + a * 2 * I + i, i < I, 0.0).to(tl.float32)
        up = tl.load(gate_up + a * 2 * I + I + i, i < I, 0.0).to(tl.float32)
        silu = (gate / (1 + tl.exp(-gate))).to(out.dtype.element_ty)
        tl.store(out + a * I + i, silu.to(tl.float32) * up, i < I)

    @triton.jit
    def rotated(low, high, weight, cos, sin, eps, E: tl.constexpr, NORM: tl.constexpr):
        """The two halves of heads, normalised (Qwen3), then rotated."""
        kind = low.dtype
        e = tl.arange(0, E // 2)[None, :]
        low, high = low.to(tl.float32), high.to(tl.float32)
        if NORM:
            scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / E + eps)[:, None]
            low = (low * scale * tl.load(weight + e).to(tl.float32)).to(kind).to(tl.float32)
            high = (high * scale * tl.load(weight + E // 2 + e).to(tl.float32)).to(kind).to(tl.float32)
        return (low * cos - high * sin).to(kind), (high * cos + low * sin).to(kind)

    @triton.jit
    def attend_kernel(qkv, keys, values, state, table, cos, sin, q_norm, k_norm, part, lse, eps, scale, B, N, H: tl.constexpr,
                      K: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
                      G: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
        """
        Online softmax (FlashDecoding) of one slot, one KV head, one chunk of keys: the H / K query heads that share the KV
        head stand in one tile of G rows, so each key and value is read once. Chunks have a fixed number of keys, not a fixed
        share of them, so ragged lengths are balanced. The new key opens the softmax of the last chunk, which writes it and
        its value into their page.
        """
        a, k, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
        position = tl.load(state + 1 * B + a).to(tl.int32)      # LENGTH: of the new key; as many stand in the cache
        first = chunk * CHUNK
        if first <= position:
            g, half, e, t = tl.arange(0, G), tl.arange(0, E // 2)[None, :], tl.arange(0, E)[None, :], tl.arange(0, PAGE)
            real = g < H // K
            c, s = tl.load(cos + position * (E // 2) + half), tl.load(sin + position * (E // 2) + half)
            row, pages = qkv + a * (H + 2 * K) * E, table + a * N
            at = row + (k * (H // K) + g)[:, None] * E + half
            q_low, q_high = tl.load(at, real[:, None], 0.0), tl.load(at + E // 2, real[:, None], 0.0)
            q_low, q_high = rotated(q_low, q_high, q_norm, c, s, eps, E, NORM)
            if position < first + CHUNK:
                new = row + (H + k) * E
                k_low, k_high = tl.load(new + half), tl.load(new + E // 2 + half)
                k_low, k_high = rotated(k_low, k_high, k_norm, c, s, eps, E, NORM)
                v_new = tl.load(new + K * E + e)
                page = tl.load(pages + position // PAGE).to(tl.int64)
                there = ((page * K + k) * PAGE + position % PAGE) * E
                tl.store(keys + there + half, k_low)
                tl.store(keys + there + E // 2 + half, k_high)
                tl.store(values + there + e, v_new)
                top = (tl.sum(q_low.to(tl.float32) * k_low.to(tl.float32), 1)
                       + tl.sum(q_high.to(tl.float32) * k_high.to(tl.float32), 1)) * scale
                total = tl.full([G], 1.0, tl.float32)
                mix = tl.zeros([G, E], tl.float32) + v_new.to(tl.float32)
            else:
                top = tl.full([G], float("-inf"), tl.float32)
                total = tl.zeros([G], tl.float32)
                mix = tl.zeros([G, E], tl.float32)
            for i in range(tl.cdiv(tl.minimum(position - first, CHUNK), PAGE)):
                place = ((tl.load(pages + first // PAGE + i).to(tl.int64) * K + k) * PAGE + t) * E
                key = keys + place[None, :] + tl.arange(0, E // 2)[:, None]                         # (E / 2, PAGE)
                score = tl.dot(q_low, tl.load(key), input_precision="ieee")
                score = tl.dot(q_high, tl.load(key + E // 2), score, input_precision="ieee") * scale   # in powers of two
                score = tl.where((first + i * PAGE + t < position)[None, :], score, float("-inf"))
                higher = tl.maximum(top, tl.max(score, 1))
                p = tl.exp2(score - higher[:, None])
                shrink = tl.exp2(top - higher)
                total = total * shrink + tl.sum(p, 1)
                value = tl.load(values + place[:, None] + e)                                        # (PAGE, E)
                mix = tl.dot(p.to(value.dtype), value, mix * shrink[:, None], input_precision="ieee")
                top = higher
            slot = (a * CHUNKS + chunk) * H + k * (H // K) + g
            tl.store(part + slot[:, None] * E + e, mix / total[:, None], real[:, None])
            tl.store(lse + slot, top + tl.log2(total), real)

    @triton.jit
    def combine_kernel(part, lse, state, out, B, H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, CHUNK: tl.constexpr,
                       CHUNKS: tl.constexpr, G: tl.constexpr):  # fmt: skip
        """The chunks' mixtures, weighed by their share of the softmax's denominator."""
        a, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
        g, e = tl.arange(0, G), tl.arange(0, E)[None, :]
        real = g < H // K
        top = tl.full([G], float("-inf"), tl.float32)
        total = tl.zeros([G], tl.float32)
        mix = tl.zeros([G, E], tl.float32)
        for chunk in range(tl.load(state + 1 * B + a).to(tl.int32) // CHUNK + 1):
            at = (a * CHUNKS + chunk) * H + k * (H // K) + g
            this = tl.load(lse + at, real, 0.0)
            higher = tl.maximum(top, this)
            shrink, weight = tl.exp2(top - higher), tl.exp2(this - higher)
            mix = mix * shrink[:, None] + weight[:, None] * tl.load(part + at[:, None] * E + e, real[:, None], 0.0)
            total = total * shrink + weight
            top = higher
        tl.store(out + (a * H + k * (H // K) + g)[:, None] * E + e, mix / total[:, None], real[:, None])

    @triton.jit
    def gumbel(word):
        """Gumbel noise of a random 32-bit word, as in gumbel_noise(). Where 1 - w would round, -log(1 - w) is a series."""
        w = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
        series = w * (1 + w * (0.5 + w * (0.33333333 + w * (0.25 + w * 0.2))))
        return -tl.log(tl.where(w < 0.04, series, -tl.log(1 - w)))

    @triton.jit
    def least_allowed_kernel(logits, least, temperature, top_p, top_k, V: tl.constexpr, BLOCK: tl.constexpr):
        """least_allowed() of one row. Its 33 passes over the row (66 with both) read the L2 cache."""
        row = logits + tl.program_id(0).to(tl.int64) * V
        heat, p_wanted, k_wanted = tl.load(temperature), tl.load(top_p), tl.load(top_k)
        v = tl.arange(0, BLOCK)
        peak = tl.full([BLOCK], float("-inf"), tl.float32)
        for first in range(0, V, BLOCK):
            peak = tl.maximum(peak, tl.load(row + first + v, first + v < V, float("-inf")) / heat)
        peak = tl.max(peak)
        floor = tl.full([], -2139095041, tl.int64)      # LOWEST
        for by_mass in tl.static_range(2):      # the top_k words first, then top_p of their mass
            low, high = floor, tl.full([], 2147483647, tl.int64)
            wanted = p_wanted if by_mass else k_wanted
            for step in range(tl.where(wanted > 0, 33, 0)):
                middle = tl.where(step == 0, floor, (low + high + 1) >> 1)      # the first pass measures all there is
                mass = tl.zeros([BLOCK], tl.float32)
                for first in range(0, V, BLOCK):
                    z = tl.load(row + first + v, first + v < V, float("-inf")) / heat
                    bits = z.to(tl.int32, bitcast=True)
                    rank = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
                    weight = tl.exp(z - peak) if by_mass else tl.where(first + v < V, 1.0, 0.0)
                    mass += tl.where((rank >= middle) & (rank >= floor), weight, 0.0)
                total = tl.sum(mass)
                if by_mass:
                    wanted = tl.where(step == 0, p_wanted * total, wanted)
                low, high = tl.where(total >= wanted, middle, low), tl.where(total >= wanted, high, middle - 1)
            floor = low
        found = floor.to(tl.int32)
        found = tl.where(found < 0, found ^ 0x7FFFFFFF, found)
        tl.store(least + tl.program_id(0), found.to(tl.float32, bitcast=True))

    @triton.jit
    def blocks_kernel(logits, least, temperature, stats, blocks, V: tl.constexpr, BLOCK: tl.constexpr):
        """Of one block of one row: log-sum-exp of all words, of the allowed words, and the largest."""
        a, b = tl.program_id(0).to(tl.int64), tl.program_id(1)
        v = b * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(logits + a * V + v, v < V, float("-inf")) / tl.load(temperature)
        top = tl.max(z)
        p = tl.exp(z - top)
        at = stats + (a * blocks + b) * 3
        tl.store(at, top + tl.log(tl.sum(p)))
        tl.store(at + 1, top + tl.log(tl.sum(tl.where(z >= tl.load(least + a), p, 0.0))))
        tl.store(at + 2, top)

    @triton.jit
    def draw_kernel(logits, least, temperature, greedy, stats, blocks, state, eos, tokens, logps, B, C, V: tl.constexpr,
                    BLOCK: tl.constexpr, MANY: tl.constexpr, EOS: tl.constexpr):  # fmt: skip
        """draw() of one row from its blocks' statistics, then the row's state: one more token, or the end."""
        a = tl.program_id(0).to(tl.int64)
        key, position = tl.load(state + 3 * B + a), tl.load(state + 2 * B + a)      # KEY, DRAWN
        is_greedy, heat, floor = tl.load(greedy) != 0, tl.load(temperature), tl.load(least + a)

        b = tl.arange(0, MANY)
        at, real = stats + (a * blocks + b) * 3, b < blocks
        whole, allowed = tl.load(at, real, float("-inf")), tl.load(at + 1, real, float("-inf"))
        best = tl.load(at + 2, real, float("-inf"))
        zero = b * 0
        w0, w1, w2, w3 = tl.philox(key, b // 4, zero + position.to(tl.int32), zero + 1, zero)
        word = tl.where(b % 4 == 0, w0, tl.where(b % 4 == 1, w1, tl.where(b % 4 == 2, w2, w3)))
        block = tl.argmax(tl.where(is_greedy, best, allowed + gumbel(word)), 0)
        block = tl.minimum(block, blocks - 1)       # NaN is larger than anything, also where there is no block
        peak = tl.max(whole)
        normaliser = peak + tl.log(tl.sum(tl.exp(whole - peak)))

        c = tl.arange(0, BLOCK // 4)
        zero = c * 0
        w0, w1, w2, w3 = tl.philox(key, block * (BLOCK // 4) + c, zero + position.to(tl.int32), zero, zero)
        winner, token = float("-inf"), block * BLOCK
        for j in tl.static_range(4):
            v = block * BLOCK + 4 * c + j
            z = tl.load(logits + a * V + v, v < V, float("-inf")) / heat
            noise = gumbel(w0 if j == 0 else w1 if j == 1 else w2 if j == 2 else w3)
            value, i = tl.max(tl.where(z >= floor, tl.where(is_greedy, z, z + noise), float("-inf")), 0, return_indices=True)
            token = tl.where(value > winner, block * BLOCK + 4 * i + j, token)
            winner = tl.maximum(value, winner)
        logp = tl.load(logits + a * V + token) / heat - normaliser

        if tl.load(state + 6 * B + a) == 0:                                     # not DONE
            place = tl.load(state + 5 * B + a) * C + position                   # ROW
            tl.store(tokens + place, token)
            tl.store(logps + place, logp)
            tl.store(state + 0 * B + a, token.to(tl.int64))                     # INPUT
            tl.store(state + 1 * B + a, tl.load(state + 1 * B + a) + 1)         # LENGTH
            tl.store(state + 2 * B + a, position + 1)                           # DRAWN
            ended = position + 1 == tl.load(state + 4 * B + a)                  # LIMIT
            for one in tl.static_range(EOS):
                ended = ended | (token == tl.load(eos + one))
            tl.store(state + 6 * B + a, ended.to(tl.int64))


def graph_sizes(slots: int) -> list[int]:
    """Numbers of slots to capture a step for: powers of two, then eighths of all, 1 2 4 .. 64 128 192 .. 512 for 512."""
    eighth = max(1, slots // 8)
    small = [2**i for i in range(12) if 2**i < eighth]
    return sorted({*small, *range(eighth, slots, eighth), slots})


@dataclass
class Slot:
    """A running rollout: what was asked, the pages it holds, and a number that tells which slot is younger."""

    request: Request
    pages: list[int]
    born: int


class Sampler:
    """
    One copy of the weights, one KV cache, and the rollouts that are being drawn.

    slots: rollouts in flight at most; context: tokens of a prompt with its response at most. The cache gets kv_gib GiB (a
    training run says how many, see train.plan_memory) or what the slots can fill, on CUDA at most SHARE of the memory that is
    free now. MemoryError if that holds no context. fast: None takes the fast path where it can run.
    """

    PREFILL_TOKENS = 16384      # prompts computed in one forward: bounds its activations
    SHARE = 0.4
    CHUNK = 512                 # keys of one program of attend_kernel; half as many for few slots

    def __init__(self, cfg: ModelConfig, slots: int, context: int, eos_ids: Iterable[int], device="cpu", dtype=torch.float32,
                 kv_gib: float = 0.0, fast: bool | None = None, page: int | None = None):  # fmt: skip
        if slots < 1:
            raise ValueError(f"sampler: wanted 1 slot or more, found {slots}")
        if not 2 <= context <= cfg.max_position_embeddings:
            raise ValueError(f"sampler: wanted a context of 2 to {cfg.max_position_embeddings} tokens (the model's), "
                             f"found {context}")
        self.device, self.slots, self.context, self.cfg = torch.device(device), slots, context, cfg
        fits = triton is not None and cfg.head_dim in (32, 64, 128, 256)
        self.fast = self.device.type == "cuda" and fits if fast is None else fast
        self.stride = 8 if self.fast else 1     # decode steps of a launch
        self.page = page or (64 if self.fast else 16)
        self.eos_ids = frozenset(eos_ids)
        with torch.device("meta"):
            self.model = Model(cfg).to(dtype).eval().requires_grad_(False)
        self.model.to_empty(device=self.device)

        L, K, E = cfg.num_hidden_layers, cfg.num_key_value_heads, cfg.head_dim
        per_slot = self._pages_for(context) + 1     # one more: the template that a prompt leaves behind
        page_bytes = 2 * L * K * self.page * E * dtype.itemsize
        budget = kv_gib * 2**30
        if not budget and self.device.type == "cuda":
            budget = self.SHARE * torch.cuda.mem_get_info(self.device)[0]
        self.pages = min(slots * per_slot, int(budget // page_bytes) if budget else slots * per_slot)
        if self.pages < per_slot:
            raise MemoryError(f"sampler: {budget / 2**30:.2f} GiB of KV cache hold {self.pages * self.page} tokens, wanted "
                              f"room for a context of {context}: raise --kv_gib or lower --max_new")
        with self.device:
            # page 0 belongs to nobody: unused slots of a graph write there. Zeros: what is masked is multiplied by zero
            self.cache = torch.zeros(L, 2, self.pages + 1, K, self.page, E, dtype=dtype)
            self.state = torch.zeros(7, slots, dtype=torch.long)
            self.table = torch.zeros(slots, self._pages_for(context), dtype=torch.int32)
            self.tokens = torch.zeros(slots, context, dtype=torch.int32)        # responses, by ROW
            self.logps = torch.zeros(slots, context)
            self.eos = torch.tensor(sorted(self.eos_ids), dtype=torch.long)
        pin = dict(pin_memory=self.device.type == "cuda")
        self.host_state = torch.zeros(7, slots, dtype=torch.long, **pin)        # between launches these two are the truth
        self.host_table = torch.zeros(slots, self.table.shape[1], dtype=torch.int32, **pin)
        self.host_state[DONE] = 1
        self.state_B, self.table_BN = self.host_state.numpy(), self.host_table.numpy()

        self.queue: deque[Request] = deque()
        self.active: list[Slot] = []                    # entry a is slot a
        self.launched = False
        self.rows, self.born, self.preempted = list(range(slots)), 0, 0
        self.free = list(range(1, self.pages + 1))
        self.holders = [0] * (self.pages + 1)           # slots that use a page
        self.held = 0                                   # pages that some slot uses; all others are free or a prompt's
        self.prompts: OrderedDict[tuple[int, ...], list[int]] = OrderedDict()   # prompt -> its pages, newest last
        self.of_prompt = [False] * (self.pages + 1)
        if self.fast:
            self._prepare()
        self.begin(0, Sampling())

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page)

    @property
    def path(self) -> str:
        """For the header of a run."""
        return "Triton kernels in CUDA graphs" if self.fast else "plain torch"

    @property
    def busy(self) -> bool:
        return bool(self.queue or self.active)

    @torch.no_grad()
    def load(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copies new weights into the same buffers, so that graphs stay valid. Prompt keys of the old ones are forgotten."""
        self._idle("load")
        self.forget()
        own = dict(self.model.named_parameters())
        for name, tensor in named_tensors:
            if tensor.shape != own[name].shape:
                raise ValueError(f"sampler: {name} is {list(tensor.shape)}, wanted {list(own[name].shape)}")
            own.pop(name).copy_(tensor)
        if own:
            raise ValueError(f"sampler: no weights were given for {', '.join(sorted(own)[:3])}")

    def begin(self, seed: int, sampling: Sampling) -> None:
        """Root of the random streams, and how tokens are drawn, from here on."""
        self._idle("begin")
        self.seed, self.sampling = seed, sampling
        if self.fast:
            self.temperature.fill_(sampling.temperature or 1.0)
            self.greedy.fill_(int(sampling.temperature == 0))
            self.top_p.fill_(sampling.top_p if sampling.top_p < 1 else 0)       # 0: off
            self.top_k.fill_(sampling.top_k if sampling.top_k < self.cfg.vocab_size else 0)
            self.least.fill_(-torch.inf)

    def _idle(self, what: str) -> None:
        if self.busy:
            raise RuntimeError(f"sampler: {what}() while {len(self.active)} rollouts run and {len(self.queue)} wait")

    def add(self, requests: Iterable[Request]) -> None:
        """Any time. ValueError for a request that can never fit."""
        for request in requests:
            if not request.prompt or request.max_new < 1:
                raise ValueError(f"problem {request.problem}: wanted a prompt and max_new of 1 or more, "
                                 f"found {len(request.prompt)} tokens and {request.max_new}")
            if len(request.prompt) + request.max_new > self.context:
                raise ValueError(f"problem {request.problem}: a prompt of {len(request.prompt)} tokens and max_new of "
                                 f"{request.max_new} do not fit the context of {self.context}")
            self.queue.append(request)

    @torch.inference_mode()
    def step(self) -> list[Rollout]:
        """
        Takes in what the last launch drew, fills free slots from the queue, launches the next decode steps, and returns the
        rollouts that ended: what the caller does with them happens while the device works.
        """
        ended = self._collect()
        self._admit()
        self._launch()
        finished = []
        for request, tokens, logps in ended:
            tokens = tokens.tolist()
            finished.append(Rollout(request.problem, request.index, request.prompt, tokens, logps.tolist(),
                                    truncated=tokens[-1] not in self.eos_ids))
        return finished

    # ---------------------------------------------------------------------------------------------- pages and slots

    def _hold(self, page: int) -> int:
        self.held += self.holders[page] == 0
        self.holders[page] += 1
        return page

    def _drop(self, page: int) -> None:
        self.holders[page] -= 1
        if self.holders[page] == 0:
            self.held -= 1
            if not self.of_prompt[page]:
                self.free.append(page)

    def _take(self, n: int) -> list[int]:
        """n free pages; where there are fewer, the prompts that were used longest ago give up theirs."""
        while len(self.free) < n:
            self._forget_prompt(next(iter(self.prompts)))
        return [self.free.pop() for _ in range(n)]

    def _forget_prompt(self, prompt: tuple[int, ...]) -> None:
        for page in self.prompts.pop(prompt):
            self.of_prompt[page] = False
            if self.holders[page] == 0:
                self.free.append(page)

    def forget(self) -> None:
        """All prompt pages: their keys are those of other weights, or a benchmark begins anew."""
        while self.prompts:
            self._forget_prompt(next(iter(self.prompts)))

    def _remove(self, a: int) -> None:
        """Frees slot a; the last active one moves into the hole."""
        last = len(self.active) - 1
        for page in self.active[a].pages:
            self._drop(page)
        self.rows.append(int(self.state_B[ROW, a]))
        self.active[a] = self.active[last]
        self.state_B[:, a], self.table_BN[a] = self.state_B[:, last], self.table_BN[last]
        self.state_B[:, last], self.table_BN[last] = 0, 0
        self.state_B[DONE, last] = 1
        self.active.pop()

    def _collect(self) -> list[tuple]:
        """Waits for the launch, and takes out what ended: (request, tokens, logps) of each."""
        if not self.launched:
            return []
        self.launched = False
        self.host_state.copy_(self.state)
        done = np.flatnonzero(self.state_B[DONE, : len(self.active)])
        if not len(done):
            return []
        drawn = self.state_B[DRAWN, done]
        rows = torch.from_numpy(self.state_B[ROW, done]).to(self.device)
        tokens = self.tokens[rows, : drawn.max()].cpu().numpy()
        logps = self.logps[rows, : drawn.max()].cpu().numpy()
        ended = [(self.active[a].request, tokens[i, :n], logps[i, :n]) for i, (a, n) in enumerate(zip(done, drawn))]
        for a in done[::-1]:        # from the back: what moves into the hole is active
            self._remove(a)
        return ended

    def _most_pages(self, request: Request) -> int:
        return self._pages_for(len(request.prompt) + request.max_new - 1)       # the last token drawn is not fed

    def _admit(self) -> None:
        """
        Free slots take requests in order while there are pages: for all that running rollouts may still need, or, where the
        cache is smaller than that, for one more each.
        """
        if not self.queue or len(self.active) == self.slots:
            return
        taken, missing = [], []
        owed = sum(self._most_pages(s.request) - len(s.pages) for s in self.active)
        while self.queue and len(self.active) < self.slots:
            request, begun = self.queue[0], len(self.queue[0].prompt) - 1      # all but the last token
            shared, rest = divmod(begun, self.page)
            known = self.prompts.get(request.prompt)
            new = (rest > 0) + (self._pages_for(begun) if known is None else sum(self.holders[page] == 0 for page in known))
            more = self._most_pages(request) - shared - (rest > 0)
            if self.active and self.pages - self.held - new < min(owed + more, len(self.active) + 1):
                break
            owed += more
            if known is None:
                missing.append((request.prompt, self._reserve(request.prompt)))
            self.prompts.move_to_end(request.prompt)
            pages = [self._hold(page) for page in self.prompts[request.prompt]]      # holds the template until it is copied
            if rest:
                taken.append((pages[-1], self._hold(self._take(1)[0])))
                pages[-1] = taken[-1][1]
            a = len(self.active)
            self.active.append(Slot(self.queue.popleft(), pages, self.born))
            self.born += 1
            key = stream_key(self.seed, request.problem, request.index)
            self.state_B[:, a] = request.prompt[-1], begun, 0, key, request.max_new, self.rows.pop(), 0
            self.table_BN[a, : len(pages)] = pages
        self._look_ahead(missing)
        self._prefill(missing)
        for some in (taken[i : i + 32] for i in range(0, len(taken), 32)):      # what is copied is held twice
            source, target = torch.tensor(some, device=self.device).T
            self.cache[:, :, target] = self.cache[:, :, source]
            for template, _ in some:
                self._drop(template)

    def _reserve(self, prompt: tuple[int, ...]) -> list[int]:
        pages = self.prompts[prompt] = self._take(self._pages_for(len(prompt) - 1))
        for page in pages:
            self.of_prompt[page] = True
        return pages

    def _look_ahead(self, missing: list[tuple]) -> None:
        """A forward over a few prompts takes as long as one over many: where one is due, prompts of the queue join it."""
        tokens = sum(len(prompt) for prompt, _ in missing)
        for request in self.queue if missing else ():
            prompt = request.prompt
            if prompt in self.prompts:
                continue
            tokens += len(prompt)
            if tokens > self.PREFILL_TOKENS or len(self.free) - self._pages_for(len(prompt)) < self.pages // 4:
                return
            missing.append((prompt, self._reserve(prompt)))

    def _prefill(self, missing: list[tuple]) -> None:
        """Keys and values of all but the last token of (prompt, pages), packed, at most PREFILL_TOKENS in one forward."""
        todo = deque((prompt[:-1], pages) for prompt, pages in missing if pages)
        while todo:
            pack, total = [], 0
            while todo and (not pack or total + len(todo[0][0]) <= self.PREFILL_TOKENS):
                pack.append(todo.popleft())
                total += len(pack[-1][0])
            lengths = [len(ids) for ids, _ in pack]
            ids_T = torch.tensor([token for ids, _ in pack for token in ids], device=self.device)
            page_T = torch.tensor([pages[i // self.page] for ids, pages in pack for i in range(len(ids))], device=self.device)
            cu = torch.tensor([0, *lengths], device=self.device).cumsum(0).int()
            at_T = positions(cu, len(ids_T))

            def attend(layer, q_THE, k_TKE, v_TKE, place=(page_T, slice(None), at_T % self.page), cu=cu, lengths=lengths):
                for part, new in zip(self.cache[layer], (k_TKE, v_TKE)):
                    part[place] = new
                return attend_packed(q_THE, k_TKE, v_TKE, cu, max(lengths))

            self.model.run(ids_T, at_T, attend)

    def _launch(self) -> None:
        """Gives every active slot the pages of the next `stride` tokens, and starts that many decode steps."""
        while self.active:
            A = len(self.active)
            ends = np.minimum(self.state_B[LENGTH, :A] + self.stride,
                              self.state_B[LENGTH, :A] - self.state_B[DRAWN, :A] + self.state_B[LIMIT, :A])
            short = -(-ends // self.page) - [len(s.pages) for s in self.active]
            if np.maximum(short, 0).sum() <= self.pages - self.held:
                break
            youngest = max(range(A), key=lambda a: self.active[a].born)
            self.queue.appendleft(self.active[youngest].request)
            self.preempted += 1
            self._remove(youngest)
        if not self.active:
            return
        for a in np.flatnonzero(short > 0):
            pages, have = [self._hold(page) for page in self._take(short[a])], len(self.active[a].pages)
            self.table_BN[a, have : have + len(pages)] = pages
            self.active[a].pages += pages
        step = partial(self._plain_step, A) if not self.fast else partial(self._fast_step, A, self.sampling.cuts)
        if self.fast and self.device.type == "cuda":
            step = self._graph(next(n for n in self.sizes if n >= A), self.sampling.cuts).replay
        self.state.copy_(self.host_state, non_blocking=True)
        self.table.copy_(self.host_table, non_blocking=True)
        for _ in range(self.stride):
            step()
        self.launched = True

    # --------------------------------------------------------------------------------------------- the plain path

    def _plain_step(self, A: int) -> None:
        input_A, length_A, drawn_A, key_A, limit_A, row_A, done_A = self.state[:, :A]
        K, page = self.cfg.num_key_value_heads, self.page
        longest = int(self.state_B[LENGTH, :A].max()) + 1       # the host knows: stride is 1
        rows_AN = self.table[:, : self._pages_for(longest)][:A].long()
        here_A, inside_A = rows_AN.gather(1, (length_A // page)[:, None])[:, 0], length_A % page
        seen = (torch.arange(rows_AN.shape[1] * page, device=self.device) <= length_A[:, None])[:, None, None]
        heads = (rows_AN[:, None] * K + torch.arange(K, device=self.device)[:, None]).flatten()     # of (A, K, N) tiles

        def attend(layer, q_AHE, k_AKE, v_AKE):
            for part, new in zip(self.cache[layer], (k_AKE, v_AKE)):
                part[here_A, :, inside_A] = new
            k, v = (part.flatten(0, 1).flatten(1).index_select(0, heads).view(A, K, -1, self.cfg.head_dim)
                    for part in self.cache[layer])      # (A, K, keys, E)
            # the H / K query heads that share a KV head stand as query rows, so that keys are not repeated
            out = F.scaled_dot_product_attention(q_AHE.unflatten(1, (K, -1)), k, v, attn_mask=seen)
            return out.flatten(1, 2)

        hidden_AD = self.model.run(input_A, length_A, attend)
        token_A, logp_A = draw(logits_fp32(hidden_AD, self.model.head), key_A, drawn_A, self.sampling)
        self.tokens[row_A, drawn_A], self.logps[row_A, drawn_A] = token_A.int(), logp_A
        input_A.copy_(token_A)
        length_A += 1
        drawn_A += 1
        done_A.copy_(torch.isin(token_A, self.eos) | (drawn_A == limit_A))

    # ---------------------------------------------------------------------------------------------- the fast path

    def _prepare(self) -> None:
        """Buffers that graphs point to. q, k, v and gate, up become one matrix each, of which the parameters are views."""
        def fuse(linears, name):
            parts = [getattr(linear, name) for linear in linears]
            if parts[0] is None:
                return None
            whole = torch.cat([p.data for p in parts])
            for part, view in zip(parts, whole.split([len(p) for p in parts])):
                part.data = view
            return whole

        self.fused = []
        for block in self.model.model.layers:
            attention = [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj]
            mlp = [block.mlp.gate_proj, block.mlp.up_proj]
            self.fused.append((fuse(attention, "weight"), fuse(attention, "bias"), fuse(mlp, "weight")))
        chunks = -(-self.context // (self.CHUNK // 2))
        self.sizes, self.graphs, self.pool = graph_sizes(self.slots), {}, None
        B, V, H, E = self.slots, self.cfg.vocab_size, self.cfg.num_attention_heads, self.cfg.head_dim
        with self.device:
            cos, sin = rope_tables(self.cfg, torch.arange(self.context))
            self.cos, self.sin = cos.contiguous(), sin.contiguous()
            self.part, self.lse = torch.zeros(B, chunks, H, E), torch.zeros(B, chunks, H)
            self.stats, self.least = torch.zeros(B, -(-V // BLOCK), 3), torch.zeros(B)
            self.temperature, self.top_p, self.top_k = torch.ones(1), torch.zeros(1), torch.zeros(1)
            self.greedy = torch.zeros(1, dtype=torch.int32)

    def _graph(self, size: int, cuts: bool):
        """The captured step of `size` slots. All sizes are captured at first need, the largest first, in one memory pool."""
        if (size, cuts) not in self.graphs:
            self.state[DONE] = 1        # a warm-up must not write: kernels are compiled and libraries loaded before capture
            self.table.zero_()
            for n in reversed(self.sizes):
                self._fast_step(n, cuts)
                torch.cuda.synchronize()
                self.graphs[n, cuts] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graphs[n, cuts], pool=self.pool):
                    self._fast_step(n, cuts)
                self.pool = self.graphs[n, cuts].pool()
        return self.graphs[size, cuts]

    def _fast_step(self, A: int, cuts: bool) -> None:
        """One token for each of the first A slots."""
        cfg, model = self.cfg, self.model.model
        D, H, K, E = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        V, I, B, N = cfg.vocab_size, cfg.intermediate_size, self.slots, self.table.shape[1]
        group, blocks = max(16, triton.next_power_of_2(H // K)), self.stats.shape[1]
        scale = math.log2(math.e) / math.sqrt(E)
        chunk = self.CHUNK if A > 128 else self.CHUNK // 2      # few slots: more programs, of less work
        chunks = -(-self.context // chunk)

        def norm(weight):
            out = torch.empty_like(x)
            norm_kernel[A,](x, weight, out, cfg.rms_norm_eps, D, triton.next_power_of_2(D))
            return out

        x = F.embedding(self.state[INPUT, :A], model.embed_tokens.weight)
        mixed, inner = x.new_empty(A, H * E), x.new_empty(A, I)
        for block, (keys, values), (qkv_weight, qkv_bias, gate_up_weight) in zip(model.layers, self.cache, self.fused):
            attention = block.self_attn
            q_norm, k_norm = (n.weight if cfg.qk_norm else x for n in (attention.q_norm, attention.k_norm))
            qkv = F.linear(norm(block.input_layernorm.weight), qkv_weight, qkv_bias)
            attend_kernel[A, K, chunks](qkv, keys, values, self.state, self.table, self.cos, self.sin, q_norm, k_norm,
                                        self.part, self.lse, cfg.rms_norm_eps, scale, B, N, H, K, E, self.page, chunk, chunks,
                                        group, cfg.qk_norm, num_warps=2, num_stages=2)
            combine_kernel[A, K](self.part, self.lse, self.state, mixed, B, H, K, E, chunk, chunks, group)
            x.addmm_(mixed, attention.o_proj.weight.t())
            gate_up = F.linear(norm(block.post_attention_layernorm.weight), gate_up_weight)
            silu_mul_kernel[A, triton.cdiv(I, 1024)](gate_up, inner, I, 1024)
            x.addmm_(inner, block.mlp.down_proj.weight.t())
        logits = mm_fp32(norm(model.norm.weight), self.model.head.t())
        if cuts:
            least_allowed_kernel[A,](logits, self.least, self.temperature, self.top_p, self.top_k, V, BLOCK, num_warps=8)
        blocks_kernel[A, blocks](logits, self.least, self.temperature, self.stats, blocks, V, BLOCK)
        draw_kernel[A,](logits, self.least, self.temperature, self.greedy, self.stats, blocks, self.state, self.eos,
                        self.tokens, self.logps, B, self.context, V, BLOCK, triton.next_power_of_2(blocks), len(self.eos_ids))
