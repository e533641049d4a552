"""
One token for every active slot, with fused Triton kernels that on CUDA are captured as graphs. (The
same step in torch operations is PlainDecoder in rollout.py.) A step:

    x = embedding of INPUT                                            (A, D)
    per layer   norm ▸ q k v as one product ▸ attend, combine ▸ + o
                norm ▸ gate, up as one product ▸ silu_mul ▸ + down
    norm ▸ logits in fp32 ▸ the draw, which writes each slot's next state

Statistics and sums are fp32. What is stored is rounded where the plain path rounds, but for the
residual, which the matrix product adds before it rounds. In Triton's interpreter the kernels run on
a CPU too, without graphs.

Letters: A active slots, B slots, C context, N pages in a row of the table, L layers, H heads,
K KV heads, E head dim, D model dim, I inner dim of the MLP, V vocabulary.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

from cache import Buffers
from draw import DONE, INPUT, FusedDraw, Sampling, triton
from model import Model, ModelConfig, mm_fp32, rope_tables

# --------------------------------------------------------------------------------------------------
# Kernels

if triton is not None:
    import triton.language as tl

    from draw import S_LENGTH

    @triton.jit
    def norm_kernel(x, weight, out, eps, D: tl.constexpr, WIDTH: tl.constexpr):
        """RMSNorm. One program per row."""
        d = tl.arange(0, WIDTH)
        offset = tl.program_id(0) * D + d
        real = d < D
        row = tl.load(x + offset, real, 0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(row * row) / D + eps)
        tl.store(out + offset, row * scale * tl.load(weight + d, real, 0.0).to(tl.float32), real)

    @triton.jit
    def silu_mul_kernel(gate_up, out, I: tl.constexpr, WIDTH: tl.constexpr):
        """silu(gate) * up, of rows that hold gate, then up."""
        a = tl.program_id(0).to(tl.int64)
        i = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        gate = tl.load(gate_up + a * 2 * I + i, i < I, 0.0).to(tl.float32)
        up = tl.load(gate_up + a * 2 * I + I + i, i < I, 0.0).to(tl.float32)
        silu = (gate / (1 + tl.exp(-gate))).to(out.dtype.element_ty)
        tl.store(out + a * I + i, silu.to(tl.float32) * up, i < I)

    @triton.jit
    def rotated(low, high, weight, cos, sin, eps, E: tl.constexpr, NORM: tl.constexpr):
        """The two halves of heads, normalised (Qwen3), then rotated."""
        dtype = low.dtype
        e = tl.arange(0, E // 2)[None, :]
        low = low.to(tl.float32)
        high = high.to(tl.float32)
        if NORM:
            squares = tl.sum(low * low, 1) + tl.sum(high * high, 1)
            scale = tl.rsqrt(squares / E + eps)[:, None]
            low = low * scale * tl.load(weight + e).to(tl.float32)
            low = low.to(dtype).to(tl.float32)
            high = high * scale * tl.load(weight + E // 2 + e).to(tl.float32)
            high = high.to(dtype).to(tl.float32)
        return (low * cos - high * sin).to(dtype), (high * cos + low * sin).to(dtype)

    @triton.jit
    def attend_kernel(
        qkv, keys, values, state, table, cos, sin, q_norm, k_norm, part, lse, eps, scale, B, N,
        H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr,
        CHUNK: tl.constexpr, CHUNKS: tl.constexpr, G: tl.constexpr, NORM: tl.constexpr,
    ):  # fmt: skip
        """
        Online softmax (FlashDecoding) of one slot, one KV head, one chunk of keys.

        The H / K query heads that share the KV head stand in one tile of G rows, so each key and
        value is read once. Chunks have a fixed number of keys, not a fixed share of them, so ragged
        lengths are balanced. The new key opens the softmax of the last chunk, which writes it and
        its value into their page.
        """
        a = tl.program_id(0).to(tl.int64)
        k = tl.program_id(1)
        chunk = tl.program_id(2)
        SHARED: tl.constexpr = H // K
        HALF: tl.constexpr = E // 2
        # of the new key, and as many stand in the cache
        position = tl.load(state + B * S_LENGTH + a).to(tl.int32)
        first = chunk * CHUNK
        if first <= position:
            g = tl.arange(0, G)
            half = tl.arange(0, HALF)[None, :]
            e = tl.arange(0, E)[None, :]
            t = tl.arange(0, PAGE)
            real = g < SHARED
            c = tl.load(cos + position * HALF + half)
            s = tl.load(sin + position * HALF + half)
            row = qkv + a * (H + 2 * K) * E
            pages = table + a * N
            query = row + (k * SHARED + g)[:, None] * E + half
            q_low = tl.load(query, real[:, None], 0.0)
            q_high = tl.load(query + HALF, real[:, None], 0.0)
            q_low, q_high = rotated(q_low, q_high, q_norm, c, s, eps, E, NORM)
            if position < first + CHUNK:
                new = row + (H + k) * E
                k_low = tl.load(new + half)
                k_high = tl.load(new + HALF + half)
                k_low, k_high = rotated(k_low, k_high, k_norm, c, s, eps, E, NORM)
                v_new = tl.load(new + K * E + e)
                page = tl.load(pages + position // PAGE).to(tl.int64)
                place = ((page * K + k) * PAGE + position % PAGE) * E
                tl.store(keys + place + half, k_low)
                tl.store(keys + place + HALF + half, k_high)
                tl.store(values + place + e, v_new)
                dot_low = tl.sum(q_low.to(tl.float32) * k_low.to(tl.float32), 1)
                dot_high = tl.sum(q_high.to(tl.float32) * k_high.to(tl.float32), 1)
                top = (dot_low + dot_high) * scale
                total = tl.full([G], 1.0, tl.float32)
                mix = tl.zeros([G, E], tl.float32) + v_new.to(tl.float32)
            else:
                top = tl.full([G], float("-inf"), tl.float32)
                total = tl.zeros([G], tl.float32)
                mix = tl.zeros([G, E], tl.float32)
            for i in range(tl.cdiv(tl.minimum(position - first, CHUNK), PAGE)):
                page = tl.load(pages + first // PAGE + i).to(tl.int64)
                places = ((page * K + k) * PAGE + t) * E
                key = keys + places[None, :] + tl.arange(0, HALF)[:, None]  # (E / 2, PAGE)
                score = tl.dot(q_low, tl.load(key), input_precision="ieee")
                score = tl.dot(q_high, tl.load(key + HALF), score, input_precision="ieee")
                score = score * scale  # in powers of two
                seen = first + i * PAGE + t < position
                score = tl.where(seen[None, :], score, float("-inf"))
                higher = tl.maximum(top, tl.max(score, 1))
                p = tl.exp2(score - higher[:, None])
                shrink = tl.exp2(top - higher)
                total = total * shrink + tl.sum(p, 1)
                value = tl.load(values + places[:, None] + e)  # (PAGE, E)
                p = p.to(value.dtype)
                mix = tl.dot(p, value, mix * shrink[:, None], input_precision="ieee")
                top = higher
            entry = (a * CHUNKS + chunk) * H + k * SHARED + g
            tl.store(part + entry[:, None] * E + e, mix / total[:, None], real[:, None])
            tl.store(lse + entry, top + tl.log2(total), real)

    @triton.jit
    def combine_kernel(
        part, lse, state, out, B,
        H: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
        CHUNK: tl.constexpr, CHUNKS: tl.constexpr, G: tl.constexpr,
    ):  # fmt: skip
        """The chunks' mixtures, weighed by their share of the softmax's denominator."""
        SHARED: tl.constexpr = H // K
        a = tl.program_id(0).to(tl.int64)
        k = tl.program_id(1)
        g = tl.arange(0, G)
        e = tl.arange(0, E)[None, :]
        real = g < SHARED
        top = tl.full([G], float("-inf"), tl.float32)
        total = tl.zeros([G], tl.float32)
        mix = tl.zeros([G, E], tl.float32)
        position = tl.load(state + B * S_LENGTH + a).to(tl.int32)
        for chunk in range(position // CHUNK + 1):
            entry = (a * CHUNKS + chunk) * H + k * SHARED + g
            chunk_lse = tl.load(lse + entry, real, 0.0)
            higher = tl.maximum(top, chunk_lse)
            shrink = tl.exp2(top - higher)
            weight = tl.exp2(chunk_lse - higher)
            chunk_mix = tl.load(part + entry[:, None] * E + e, real[:, None], 0.0)
            mix = mix * shrink[:, None] + weight[:, None] * chunk_mix
            total = total * shrink + weight
            top = higher
        head = a * H + k * SHARED + g
        tl.store(out + head[:, None] * E + e, mix / total[:, None], real[:, None])


def norm(x_AD, weight_D, eps: float):
    A, D = x_AD.shape
    out_AD = torch.empty_like(x_AD)
    norm_kernel[A,](x_AD, weight_D, out_AD, eps, D, triton.next_power_of_2(D))
    return out_AD


# --------------------------------------------------------------------------------------------------
# The step


def can_run(cfg: ModelConfig) -> bool:
    """Has this platform Triton, and are the heads of a size that the kernels take?"""
    return triton is not None and cfg.head_dim in (32, 64, 128, 256)


def graph_sizes(slots: int) -> list[int]:
    """
    Numbers of slots to capture a step for: powers of two, then eighths of all.

    >>> graph_sizes(512)
    [1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512]
    """
    eighth = max(1, slots // 8)
    powers = [2**i for i in range(12)]
    small = [size for size in powers if size < eighth]
    return sorted({*small, *range(eighth, slots, eighth), slots})


def fuse(linears, name: str):
    """One matrix of several linears' parameters, which become views of it; None without any."""
    parts = [getattr(linear, name) for linear in linears]
    if parts[0] is None:
        return None
    whole = torch.cat([part.data for part in parts])
    for part, view in zip(parts, whole.split([len(part) for part in parts])):
        part.data = view
    return whole


class FastDecoder:
    """One token for every active slot, with kernels that read and write `buffers`."""

    path = "Triton kernels in CUDA graphs"
    PAGE = 64
    STRIDE = 8  # steps of a launch
    CHUNK = 512  # keys of one program of attend_kernel; half as many for few slots

    def __init__(self, model: Model, buffers: Buffers):
        self.model = model
        self.buffers = buffers
        self.weights = []  # of each layer: qkv, its bias, gate_up
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
            gate_up = [mlp.gate_proj, mlp.up_proj]
            fused = fuse(qkv, "weight"), fuse(qkv, "bias"), fuse(gate_up, "weight")
            self.weights.append(fused)
        cfg = model.cfg
        H, E = cfg.num_attention_heads, cfg.head_dim
        slots, self.context = buffers.tokens.shape
        most_chunks = -(-self.context // (self.CHUNK // 2))
        with buffers.device:
            cos, sin = rope_tables(cfg, torch.arange(self.context))
            self.cos = cos.contiguous()
            self.sin = sin.contiguous()
            self.part = torch.zeros(slots, most_chunks, H, E)
            self.lse = torch.zeros(slots, most_chunks, H)
        self.draw = FusedDraw(slots, cfg.vocab_size, buffers.device)
        self.sizes = graph_sizes(slots)
        self.graphs = {}  # (slots, cuts) -> captured step
        self.pool = None
        self.cuts = False

    def begin(self, sampling: Sampling) -> None:
        self.cuts = sampling.cuts
        self.draw.begin(sampling)

    def stepper(self, A: int):
        """
        The step of the first A slots as a call without arguments; on CUDA the replay of a graph,
        for which A is rounded up. Ask before the upload: a capture clears state and table.
        """
        if self.buffers.device.type != "cuda":
            return partial(self.step, A, self.cuts)
        size = next(size for size in self.sizes if size >= A)
        if (size, self.cuts) not in self.graphs:
            self.capture(self.cuts)
        return self.graphs[size, self.cuts].replay

    def capture(self, cuts: bool) -> None:
        """Steps of all sizes, at the first need of one: the largest first, in one memory pool."""
        # A warm-up compiles kernels and loads libraries before the capture. It must not write.
        self.buffers.state[DONE] = 1
        self.buffers.table.zero_()
        for size in reversed(self.sizes):
            self.step(size, cuts)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                self.step(size, cuts)
            self.pool = graph.pool()
            self.graphs[size, cuts] = graph

    def step(self, A: int, cuts: bool) -> None:
        """One token for each of the first A slots; those that are done stand still."""
        cfg, model = self.model.cfg, self.model.model
        I, eps = cfg.intermediate_size, cfg.rms_norm_eps
        x = F.embedding(self.buffers.state[INPUT, :A], model.embed_tokens.weight)
        mixed = x.new_empty(A, cfg.num_attention_heads * cfg.head_dim)
        inner = x.new_empty(A, I)
        for layer, block in enumerate(model.layers):
            qkv_weight, qkv_bias, gate_up_weight = self.weights[layer]
            qkv = F.linear(norm(x, block.input_layernorm.weight, eps), qkv_weight, qkv_bias)
            self.attend(layer, qkv, mixed)
            x.addmm_(mixed, block.self_attn.o_proj.weight.t())
            gate_up = F.linear(norm(x, block.post_attention_layernorm.weight, eps), gate_up_weight)
            silu_mul_kernel[A, triton.cdiv(I, 1024)](gate_up, inner, I, 1024)
            x.addmm_(inner, block.mlp.down_proj.weight.t())
        logits_AV = mm_fp32(norm(x, model.norm.weight, eps), self.model.head.t())
        self.draw.step(logits_AV, self.buffers, cuts)

    def attend(self, layer: int, qkv, mixed) -> None:
        """Writes the new tokens' keys and values into their pages, and the attention to `mixed`."""
        cfg, buffers = self.model.cfg, self.buffers
        A = len(qkv)
        H, K, E = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        B, N = buffers.table.shape
        attention = self.model.model.layers[layer].self_attn
        q_norm, k_norm = qkv, qkv  # not read
        if cfg.qk_norm:
            q_norm, k_norm = attention.q_norm.weight, attention.k_norm.weight
        keys, values = buffers.cache[layer]
        chunk = self.CHUNK if A > 128 else self.CHUNK // 2  # few slots: more programs, of less work
        chunks = -(-self.context // chunk)
        group = max(16, triton.next_power_of_2(H // K))
        scale = math.log2(math.e) / math.sqrt(E)
        attend_kernel[A, K, chunks](
            qkv, keys, values, buffers.state, buffers.table, self.cos, self.sin, q_norm, k_norm,
            self.part, self.lse, cfg.rms_norm_eps, scale, B, N, H, K, E, buffers.page,
            chunk, chunks, group, cfg.qk_norm, num_warps=2, num_stages=2,
        )  # fmt: skip
        combine_kernel[A, K](
            self.part, self.lse, buffers.state, mixed, B, H, K, E, chunk, chunks, group
        )
