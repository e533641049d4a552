"""
The draw: from logits to one token, in torch and in Triton kernels of the same arithmetic.

Token t of a rollout is drawn with Philox4x32-10 noise. Its key is the rollout's random stream and
its counter is (word / 4, t). It hangs on nothing else: neither on the batch nor on the slot.

First a block of 4096 words is drawn, then a word in it, both by Gumbel-max:

    logits     w w w w   w w w w   w w . .      a short last block is padded with -inf
    blocks     lse       lse       lse          argmax of (log-sum-exp + noise of the block)
    words                w w w w                argmax of (logit + noise of the word)

P(block) P(word | block) = P(word) exactly, and a thirtieth of the noise is needed.

Letters: A active slots, B slots, V vocabulary, W words in a block, C context.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # no build for this platform: torch operations are all there is
    triton = None

MASK32 = 0xFFFFFFFF
FLIP = 0x7FFFFFFF  # these bits of a negative fp32 number are flipped to order it as an integer
LOWEST = -2139095041  # rank of -inf among fp32 numbers, see least_allowed()
BLOCK = 4096  # words of a block

# The state of a slot, a column of one integer matrix (7, B): one copy brings all to the device.
INPUT = 0  # token to feed next
LENGTH = 1  # keys in the cache, which is the position of that token
DRAWN = 2  # response tokens so far, which is the counter of the random stream
KEY = 3  # of the random stream
LIMIT = 4  # response tokens at most
ROW = 5  # where they are written
DONE = 6  # 1: the rollout ended, and the slot stands still
STATE_ROWS = 7


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Explicit, never inherited from a model folder's generation_config."""

    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # smallest set of most likely words with at least this probability; 1: off
    top_k: int = 0  # the most likely k words; 0: off

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"sampling: wanted temperature >= 0, 0 < top_p <= 1, top_k >= 0, found {self}"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def divisor(self) -> float:
        """What logits are divided by: greedy tokens get the log-prob at temperature 1."""
        return 1.0 if self.greedy else self.temperature

    @property
    def cuts(self) -> bool:
        return not self.greedy and (self.top_p < 1 or self.top_k > 0)


# --------------------------------------------------------------------------------------------------
# In torch


def philox(c0, c1, c2, key, rounds: int = 10):
    """
    Philox4x32 (Salmon et al., SC 2011) on int64 tensors that broadcast: four 32-bit words for the
    counter (c0, c1, c2, 0) and a 64-bit key.
    """
    c0, c1, c2 = torch.broadcast_tensors(c0, c1, c2)
    c3 = torch.zeros_like(c0)
    k0 = key & MASK32
    k1 = (key >> 32) & MASK32
    for _ in range(rounds):
        # int64 products wrap, their 64 bits are those of the unsigned product
        product_0 = 0xD2511F53 * c0
        product_2 = 0xCD9E8D57 * c2
        c0 = ((product_2 >> 32) & MASK32) ^ c1 ^ k0
        c1 = product_2 & MASK32
        c2 = ((product_0 >> 32) & MASK32) ^ c3 ^ k1
        c3 = product_0 & MASK32
        k0 = (k0 + 0x9E3779B9) & MASK32
        k1 = (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def gumbel_noise(key_A, position_A, n: int, block_A=None):
    """
    (A, n) fp32 Gumbel noise of words block * BLOCK, ...; without block_A of the blocks themselves.
    Word v takes output v % 4 of counter (v // 4, position, 0), block b takes output b % 4 of
    counter (b // 4, position, 1).
    """
    if block_A is None:
        first_A = torch.zeros_like(key_A)
        kind = 1
    else:
        first_A = block_A * (BLOCK // 4)
        kind = 0
    counter = first_A[:, None] + torch.arange((n + 3) // 4, device=key_A.device)
    kind = torch.full_like(counter[:1, :1], kind)
    outputs = philox(counter, position_A[:, None], kind, key_A[:, None])
    words = torch.stack(outputs, dim=-1).flatten(1)[:, :n]
    # w in (0, 1]; -log1p(-w) is exponential down to 2^-33, so that the far tail can still be drawn.
    # Where fp32 rounds w to 1 the noise is -inf: a word that is not drawn (probability 2^-25).
    w = (words.float() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-w))


def least_allowed(logits_AV, top_p: float, top_k: int):
    """
    (A,) the smallest logit among the top_k, and of those among the smallest set that holds top_p of
    their probability. Words that are as likely as the last one stay with it.

    No sort: fp32 numbers are ordered like integers (after a flip of the negative ones), so 32
    halvings of the integer range find the largest logit above which there is still enough.
    """
    bits = logits_AV.view(torch.int32)
    rank_AV = torch.where(bits < 0, bits ^ FLIP, bits).long()
    p_AV = (logits_AV - logits_AV.amax(-1, keepdim=True)).exp()

    def bisect(weight_AV, wanted_A):
        low_A = torch.full_like(rank_AV[:, 0], LOWEST)
        high_A = rank_AV.amax(-1)
        for _ in range(32):
            middle_A = (low_A + high_A + 1) >> 1
            weight_A = (weight_AV * (rank_AV >= middle_A[:, None])).sum(-1)
            enough_A = weight_A >= wanted_A
            low_A = torch.where(enough_A, middle_A, low_A)
            high_A = torch.where(enough_A, high_A, middle_A - 1)
        return low_A

    rank_A = torch.full_like(rank_AV[:, 0], LOWEST)
    if 0 < top_k < logits_AV.shape[1]:
        rank_A = bisect(torch.ones_like(p_AV), top_k)
    if top_p < 1:
        p_AV = p_AV * (rank_AV >= rank_A[:, None])
        rank_A = torch.maximum(rank_A, bisect(p_AV, top_p * p_AV.sum(-1)))
    bits_A = torch.where(rank_A < 0, rank_A ^ FLIP, rank_A)
    return bits_A.int().view(torch.float32)


def truncate(logits_AV, top_p: float, top_k: int):
    """-inf for words that are not drawn from, see least_allowed."""
    least_A = least_allowed(logits_AV, top_p, top_k)
    return logits_AV.masked_fill(logits_AV < least_A[:, None], -torch.inf)


def gumbel_max(logits_AV, key_A, position_A):
    """(A,) one word of each row's softmax: the block, then the word in it."""
    V = logits_AV.shape[1]
    width = min(BLOCK, V)
    padded = F.pad(logits_AV, (0, -V % width), value=-torch.inf)
    blocks = padded.unflatten(1, (-1, width))  # (A, blocks, W)
    count = blocks.shape[1]
    block_A = torch.zeros_like(key_A)
    if count > 1:
        noise = gumbel_noise(key_A, position_A, count)
        block_A = (blocks.logsumexp(-1) + noise).argmax(-1)
    index = block_A[:, None, None].expand(-1, 1, width)
    words_AW = blocks.gather(1, index)[:, 0]
    noise_AW = gumbel_noise(key_A, position_A, width, block_A)
    return block_A * BLOCK + (words_AW + noise_AW).argmax(-1)


def draw(logits_AV, key_A, position_A, sampling: Sampling):
    """
    One token per row -> (token_A, logp_A). The log-prob is in fp32, after temperature and over all
    words: what top-p and top-k leave out does not change it.
    """
    logits_AV = logits_AV.float() / sampling.divisor
    if sampling.greedy:
        token_A = logits_AV.argmax(dim=-1)
    elif sampling.cuts:
        allowed_AV = truncate(logits_AV, sampling.top_p, sampling.top_k)
        token_A = gumbel_max(allowed_AV, key_A, position_A)
    else:
        token_A = gumbel_max(logits_AV, key_A, position_A)
    logit_A = logits_AV.gather(1, token_A[:, None])[:, 0]
    return token_A, logit_A - logits_AV.logsumexp(dim=-1)


# --------------------------------------------------------------------------------------------------
# In Triton. Statistics and sums are fp32.

if triton is not None:
    # Kernels read constants of Triton's own type only.
    S_INPUT = tl.constexpr(INPUT)
    S_LENGTH = tl.constexpr(LENGTH)
    S_DRAWN = tl.constexpr(DRAWN)
    S_KEY = tl.constexpr(KEY)
    S_LIMIT = tl.constexpr(LIMIT)
    S_ROW = tl.constexpr(ROW)
    S_DONE = tl.constexpr(DONE)
    LOWEST_RANK = tl.constexpr(LOWEST)
    SIGN_FLIP = tl.constexpr(FLIP)

    @triton.jit
    def gumbel(word):
        """
        Gumbel noise of a random 32-bit word, as in gumbel_noise(). Where 1 - w would round,
        -log(1 - w) is a series.
        """
        w = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
        series = w * (1 + w * (0.5 + w * (0.33333333 + w * (0.25 + w * 0.2))))
        return -tl.log(tl.where(w < 0.04, series, -tl.log(1 - w)))

    @triton.jit
    def least_allowed_kernel(
        logits, least, temperature, top_p, top_k, V: tl.constexpr, BLOCK: tl.constexpr
    ):
        """least_allowed() of one row. Its 33 passes (66 with both cuts) read the L2 cache."""
        row = logits + tl.program_id(0).to(tl.int64) * V
        heat = tl.load(temperature)
        p_wanted = tl.load(top_p)
        k_wanted = tl.load(top_k)
        v = tl.arange(0, BLOCK)
        peak = tl.full([BLOCK], float("-inf"), tl.float32)
        for first in range(0, V, BLOCK):
            z = tl.load(row + first + v, first + v < V, float("-inf")) / heat
            peak = tl.maximum(peak, z)
        peak = tl.max(peak)
        floor = tl.full([], LOWEST_RANK, tl.int64)
        for by_mass in tl.static_range(2):  # the top_k words first, then top_p of their mass
            low = floor
            high = tl.full([], 2147483647, tl.int64)
            wanted = p_wanted if by_mass else k_wanted
            for step in range(tl.where(wanted > 0, 33, 0)):
                # the first pass measures all there is
                middle = tl.where(step == 0, floor, (low + high + 1) >> 1)
                mass = tl.zeros([BLOCK], tl.float32)
                for first in range(0, V, BLOCK):
                    z = tl.load(row + first + v, first + v < V, float("-inf")) / heat
                    bits = z.to(tl.int32, bitcast=True)
                    rank = tl.where(bits < 0, bits ^ SIGN_FLIP, bits).to(tl.int64)
                    weight = tl.exp(z - peak) if by_mass else tl.where(first + v < V, 1.0, 0.0)
                    mass += tl.where((rank >= middle) & (rank >= floor), weight, 0.0)
                total = tl.sum(mass)
                if by_mass:
                    wanted = tl.where(step == 0, p_wanted * total, wanted)
                enough = total >= wanted
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle - 1)
            floor = low
        bits = floor.to(tl.int32)
        bits = tl.where(bits < 0, bits ^ SIGN_FLIP, bits)
        tl.store(least + tl.program_id(0), bits.to(tl.float32, bitcast=True))

    @triton.jit
    def blocks_kernel(
        logits, least, temperature, stats, blocks, V: tl.constexpr, BLOCK: tl.constexpr
    ):
        """Of a block of a row: log-sum-exp of all words, of the allowed words, and the largest."""
        a = tl.program_id(0).to(tl.int64)
        b = tl.program_id(1)
        v = b * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(logits + a * V + v, v < V, float("-inf")) / tl.load(temperature)
        top = tl.max(z)
        p = tl.exp(z - top)
        entry = stats + (a * blocks + b) * 3
        tl.store(entry, top + tl.log(tl.sum(p)))
        allowed = tl.where(z >= tl.load(least + a), p, 0.0)
        tl.store(entry + 1, top + tl.log(tl.sum(allowed)))
        tl.store(entry + 2, top)

    @triton.jit
    def draw_kernel(
        logits, least, temperature, greedy, stats, blocks, state, eos, tokens, logps, B, C,
        V: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, STOPS: tl.constexpr,
    ):  # fmt: skip
        """
        draw() of one row from its blocks' statistics, then its slot's state: a token more, or the
        end. TILE: number of blocks, rounded up to a power of two. STOPS: number of stop ids.
        """
        a = tl.program_id(0).to(tl.int64)
        key = tl.load(state + B * S_KEY + a)
        position = tl.load(state + B * S_DRAWN + a)
        is_greedy = tl.load(greedy) != 0
        heat = tl.load(temperature)
        floor = tl.load(least + a)

        # the block
        b = tl.arange(0, TILE)
        entry = stats + (a * blocks + b) * 3
        real = b < blocks
        whole = tl.load(entry, real, float("-inf"))
        allowed = tl.load(entry + 1, real, float("-inf"))
        best = tl.load(entry + 2, real, float("-inf"))
        zero = b * 0
        w0, w1, w2, w3 = tl.philox(key, b // 4, zero + position.to(tl.int32), zero + 1, zero)
        word = tl.where(b % 4 == 0, w0, tl.where(b % 4 == 1, w1, tl.where(b % 4 == 2, w2, w3)))
        block = tl.argmax(tl.where(is_greedy, best, allowed + gumbel(word)), 0)
        block = tl.minimum(block, blocks - 1)  # NaN is larger than anything, also where no block is
        peak = tl.max(whole)
        normaliser = peak + tl.log(tl.sum(tl.exp(whole - peak)))

        # the word in it
        c = tl.arange(0, BLOCK // 4)
        zero = c * 0
        counter = block * (BLOCK // 4) + c
        words = tl.philox(key, counter, zero + position.to(tl.int32), zero, zero)
        winner = float("-inf")
        token = block * BLOCK
        for j in tl.static_range(4):
            v = block * BLOCK + 4 * c + j
            z = tl.load(logits + a * V + v, v < V, float("-inf")) / heat
            noise = gumbel(words[j])
            allowed_word = z >= floor
            score = tl.where(is_greedy, z, z + noise)
            score = tl.where(allowed_word, score, float("-inf"))
            value, lane = tl.max(score, 0, return_indices=True)
            token = tl.where(value > winner, block * BLOCK + 4 * lane + j, token)
            winner = tl.maximum(value, winner)
        logp = tl.load(logits + a * V + token) / heat - normaliser

        # the state
        if tl.load(state + B * S_DONE + a) == 0:
            place = tl.load(state + B * S_ROW + a) * C + position
            tl.store(tokens + place, token)
            tl.store(logps + place, logp)
            tl.store(state + B * S_INPUT + a, token.to(tl.int64))
            tl.store(state + B * S_LENGTH + a, tl.load(state + B * S_LENGTH + a) + 1)
            tl.store(state + B * S_DRAWN + a, position + 1)
            ended = position + 1 == tl.load(state + B * S_LIMIT + a)
            for i in tl.static_range(STOPS):
                ended = ended | (token == tl.load(eos + i))
            tl.store(state + B * S_DONE + a, ended.to(tl.int64))


class FusedDraw:
    """
    The kernels' draw. Temperature, top-p and top-k are tensors, so that a captured graph follows
    them; whether there are cuts at all decides which kernels run.
    """

    def __init__(self, slots: int, vocab_size: int, device):
        self.blocks = -(-vocab_size // BLOCK)
        self.vocab_size = vocab_size
        with device:
            self.stats = torch.zeros(slots, self.blocks, 3)
            self.least = torch.zeros(slots)
            self.temperature = torch.ones(1)
            self.top_p = torch.zeros(1)
            self.top_k = torch.zeros(1)
            self.greedy = torch.zeros(1, dtype=torch.int32)

    def begin(self, sampling: Sampling) -> None:
        self.temperature.fill_(sampling.divisor)
        self.greedy.fill_(int(sampling.greedy))
        top_p = sampling.top_p if sampling.top_p < 1 else 0  # 0: off
        top_k = sampling.top_k if sampling.top_k < self.vocab_size else 0
        self.top_p.fill_(top_p)
        self.top_k.fill_(top_k)
        self.least.fill_(-torch.inf)

    def step(self, logits_AV, buffers, cuts: bool) -> None:
        """Draws a token for each row and writes it, its log-prob and the slot's new state."""
        A, V = logits_AV.shape
        B, C = buffers.tokens.shape
        if cuts:
            least_allowed_kernel[A,](
                logits_AV, self.least, self.temperature, self.top_p, self.top_k, V, BLOCK,
                num_warps=8,
            )  # fmt: skip
        blocks_kernel[A, self.blocks](
            logits_AV, self.least, self.temperature, self.stats, self.blocks, V, BLOCK
        )
        draw_kernel[A,](
            logits_AV, self.least, self.temperature, self.greedy, self.stats, self.blocks,
            buffers.state, buffers.eos, buffers.tokens, buffers.logps, B, C, V, BLOCK,
            triton.next_power_of_2(self.blocks), len(buffers.eos),
        )  # fmt: skip
