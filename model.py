"""
One decoder for training and sampling: Qwen2 / Qwen2.5, Qwen3 and Llama 3.

The three families are one block with two switches: Qwen2 has a bias on q, k, v; Qwen3 normalises
each head of q and k. Parameters have Hugging Face's names (hf.py reads and writes the files).
One set of weights runs in two ways:

    forward   packed sequences, no cache (training)
                  ids_T = [a0 a1 a2 | b0 b1 | c0 c1 c2 c3],  cu = [0 3 5 9]
    run       tokens at given positions over a KV cache that belongs to the caller (rollout.py)

There is no padding and no attention mask in the packed layout: a sequence is the range
cu[s]:cu[s+1] of the rows, so masks come from lengths and never from token values. Nothing here
knows about ranks or devices in use: `fully_shard` is applied from outside, see Model.

Shapes: T packed tokens, S sequences, R rows with a target, L layers, H heads, K KV heads,
E head dim, D model dim, V vocabulary.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from head import HEAD_CHUNK, TokenScores, logits_fp32, mm_fp32, token_logprobs  # noqa: F401
from kernels import rotate

try:
    from flash_attn import flash_attn_varlen_func  # optional: an update was 0.4 % faster with it
except ImportError:
    flash_attn_varlen_func = None


@dataclass
class ModelConfig:
    """The fields of Hugging Face's config.json that shape the computation; hf.py reads them."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None  # None, or the llama3 parameters
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    eos_token_ids: tuple[int, ...]
    raw: dict  # the file as it was read


# ----------------------------------------------------------------------------------------- packing


class Packed(NamedTuple):
    ids_T: Tensor
    cu: Tensor  # (S+1,) int32, where sequences begin and end
    max_len: int
    rows_R: Tensor  # row t predicts token t + 1
    targets_R: Tensor


def pack(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device) -> Packed:
    """Prompts, each followed by its response (which may be empty), whose tokens are the targets.

        prompts    a0 a1 | b0           ids_T  = [a0 a1 a2 a3 b0 b1],  cu = [0 4 6],  max_len = 4
        responses  a2 a3 | b1           rows_R = [1 2 4],  targets_R = [a2 a3 b1]

    Raises ValueError for a response without a prompt: no row predicts its first token.
    """
    S = len(prompts)
    prompt_S = np.fromiter(map(len, prompts), np.int64, S)
    response_S = np.fromiter(map(len, responses), np.int64, S)
    if np.any(response_S[prompt_S == 0]):
        raise ValueError("a response follows an empty prompt, one token or more is wanted")
    part_sizes = np.stack([prompt_S, response_S], axis=1)
    lengths = part_sizes.sum(axis=1)
    cu = np.append(0, lengths.cumsum())
    parts = chain.from_iterable(zip(prompts, responses))
    ids_T = np.fromiter(chain.from_iterable(parts), np.int64, cu[-1])
    is_response_T = np.repeat([False, True] * S, part_sizes.ravel())
    places_R = np.flatnonzero(is_response_T)
    return Packed(
        ids_T=to_device(ids_T, device),
        cu=to_device(cu.astype(np.int32), device),
        max_len=int(lengths.max(initial=0)),
        rows_R=to_device(places_R - 1, device),
        targets_R=to_device(ids_T[places_R], device),
    )


def to_device(array: np.ndarray, device: torch.device | str) -> Tensor:
    """From pinned memory, or the copy to a GPU would wait for the work queued before it."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def sequence_of_row(cu: Tensor, T: int) -> Tensor:
    """cu = [0 3 5] -> [0 0 0 1 1], without asking the device for the lengths."""
    rows_T = torch.arange(T, device=cu.device, dtype=cu.dtype)
    return torch.searchsorted(cu, rows_T, right=True) - 1


def positions(cu: Tensor, T: int) -> Tensor:
    """cu = [0 3 5] -> [0 1 2 0 1]: positions restart in every sequence."""
    rows_T = torch.arange(T, device=cu.device, dtype=cu.dtype)
    return rows_T - cu[sequence_of_row(cu, T)]


# --------------------------------------------------------------------------------------- attention

# torch 2.12 added enable_gqa, and from then on demands it where q and k differ in heads.
KNOWS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters
GQA = {"enable_gqa": True} if KNOWS_GQA else {}


def attend_packed(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, cu: Tensor, max_len: int) -> Tensor:
    """Causal attention inside each packed sequence -> (T, H, E). cu and max_len: see Packed."""
    is_half = q_THE.dtype in (torch.bfloat16, torch.float16)
    if not q_THE.is_cuda or not is_half:  # the flash kernels take nothing else
        return by_sdpa(q_THE, k_TKE, v_TKE, cu, max_len)
    if flash_attn_varlen_func is None:
        return by_varlen(q_THE, k_TKE, v_TKE, cu, max_len)
    return by_flash_attn(q_THE, k_TKE, v_TKE, cu, max_len)


def by_flash_attn(q_THE, k_TKE, v_TKE, cu, max_len) -> Tensor:
    return flash_attn_varlen_func(q_THE, k_TKE, v_TKE, cu, cu, max_len, max_len, causal=True)


def by_varlen(q_THE, k_TKE, v_TKE, cu, max_len) -> Tensor:
    causal = (-1, 0)
    return varlen_attn(q_THE, k_TKE, v_TKE, cu, cu, max_len, max_len, window_size=causal, **GQA)


def by_sdpa(q_THE, k_TKE, v_TKE, cu, max_len) -> Tensor:
    """Right-padded into one SDPA: [a0 a1 a2 | b0 b1] -> [a0 a1 a2], [b0 b1 --].

    A causal row sees only what stands left of it. So no real row sees the padding, no mask is
    needed, and what the padding rows compute is never gathered back.
    """
    T = len(q_THE)
    S = len(cu) - 1
    place_T = (sequence_of_row(cu, T) * max_len + positions(cu, T)).long()  # in the padded layout

    def pad(x):  # (T, heads, E) -> (S, heads, max_len, E)
        padded = x.new_zeros(S * max_len, *x.shape[1:])
        padded[place_T] = x
        return padded.unflatten(0, (S, max_len)).transpose(1, 2)

    q, k, v = pad(q_THE), pad(k_TKE), pad(v_TKE)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)[place_T]


def rope_tables(cfg: ModelConfig, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, each (T, 1, E/2) in fp32 (the 1 is the head axis).

    Frequencies are theta^(-2i/E), i < E/2 (RoFormer, 2104.09864). llama3 scaling, as in
    transformers' modeling_rope_utils: wavelengths above original/low_freq_factor are stretched by
    `factor`, those below original/high_freq_factor kept, linear in between. Recomputed in every
    forward (a dozen kernels on E/2 numbers), because a buffer would be lost on the way from the
    meta device, and rounded by .to(bfloat16).
    """
    E = cfg.head_dim
    exponent = torch.arange(0, E, 2, device=positions_T.device, dtype=torch.float32) / E
    frequency = 1.0 / cfg.rope_theta**exponent
    if cfg.rope_scaling:
        low = cfg.rope_scaling["low_freq_factor"]
        high = cfg.rope_scaling["high_freq_factor"]
        original = cfg.rope_scaling["original_max_position_embeddings"]
        turns = original * frequency / (2 * math.pi)  # within the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        stretched = (1 - keep) * frequency / cfg.rope_scaling["factor"]
        frequency = stretched + keep * frequency
    angle = positions_T.float()[:, None, None] * frequency
    return angle.cos(), angle.sin()


# ----------------------------------------------------------------------------------------- decoder


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        D = cfg.hidden_size
        E = self.head_dim = cfg.head_dim
        HE = cfg.num_attention_heads * E
        KE = cfg.num_key_value_heads * E
        self.q_proj = nn.Linear(D, HE, bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(D, KE, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(D, KE, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(HE, D, bias=False)
        self.q_norm = nn.RMSNorm(E, cfg.rms_norm_eps) if cfg.qk_norm else None
        self.k_norm = nn.RMSNorm(E, cfg.rms_norm_eps) if cfg.qk_norm else None

    def qkv(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_THE = self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        k_TKE = self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        v_TKE = self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None:
            q_THE = self.q_norm(q_THE)
            k_TKE = self.k_norm(k_TKE)
        return q_THE, k_TKE, v_TKE


class MLP(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """nn.RMSNorm takes its statistics in fp32 for half-precision input, as transformers does."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = nn.RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x_TD: Tensor, cos: Tensor, sin: Tensor, cu: Tensor, max_len: int) -> Tensor:
        q, k, v = self.before(x_TD)
        out = attend_packed(rotate(q, cos, sin), rotate(k, cos, sin), v, cu, max_len)
        return self.after(x_TD, out)

    # What stands on either side of attention: Model.run puts its caller's cache between the two.
    def before(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.qkv(self.input_layernorm(x_TD))

    def after(self, x_TD: Tensor, out_THE: Tensor) -> Tensor:
        x_TD = x_TD + self.self_attn.o_proj(out_THE.flatten(1))
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class Model(nn.Module):
    """Parameters are named as in Hugging Face's files; a tied model has no lm_head.weight.

    Under FSDP2 shard each of model.model.layers and then the root, with cast_forward_inputs=False
    (the rotary tables are fp32 inputs of every block). The embedding, the last norm and the head
    belong to the root's unit, and all use of the head happens inside the root's forward.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.model.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers))
        self.model.norm = nn.RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        if not cfg.tie_word_embeddings:
            self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        self.checkpoint_activations = False  # True: keep the inputs of blocks, recompute the rest

    @property
    def head(self) -> Tensor:
        last = self.model.embed_tokens if self.cfg.tie_word_embeddings else self.lm_head
        return last.weight

    @torch.no_grad()
    def init_weights(self, std: float = 0.02) -> "Model":
        """As transformers draws them: normal matrices, zero biases, unit norms."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                p.normal_(0.0, std)
            elif name.endswith("norm.weight"):
                p.fill_(1.0)
            else:
                p.zero_()
        return self

    def forward(
        self,
        ids_T: Tensor,
        cu: Tensor,
        max_len: int,
        targets_R: Tensor | None = None,
        rows_R: Tensor | None = None,
        temperature: float = 1.0,
        coefficient_R: Tensor | None = None,
    ) -> Tensor | TokenScores:
        """Packed sequences through the decoder; see Packed for what goes in.

        Without targets: logits_TV in fp32 (to look at; no gradient in half precision on CUDA).
        With targets: their TokenScores at that temperature, see token_logprobs.
        """
        x_TD = self.model.embed_tokens(ids_T)
        cos, sin = rope_tables(self.cfg, positions(cu, len(ids_T)))
        inputs = (cos, sin, cu, max_len)
        for block in self.model.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                options = dict(use_reentrant=False, preserve_rng_state=False)
                x_TD = checkpoint(block, x_TD, *inputs, **options)
            else:
                x_TD = block(x_TD, *inputs)
        if targets_R is None:
            return logits_fp32(self.model.norm(x_TD), self.head)
        # Only rows with a target enter the norm and the head: prompts cost nothing there.
        hidden_RD = self.model.norm(x_TD[rows_R])
        return token_logprobs(hidden_RD, self.head, targets_R, temperature, coefficient_R)

    @torch.no_grad()
    def run(self, ids_T: Tensor, positions_T: Tensor, attend) -> Tensor:
        """Tokens at given positions through an unsharded copy -> (T, D) after the last norm.

        The cache is the caller's: attend(layer, q_THE, k_TKE, v_TKE) -> (T, H, E) stores keys and
        values where it likes, and reads them.
        """
        x_TD = self.model.embed_tokens(ids_T)
        cos, sin = rope_tables(self.cfg, positions_T)
        for layer, block in enumerate(self.model.layers):
            q, k, v = block.before(x_TD)
            out = attend(layer, rotate(q, cos, sin), rotate(k, cos, sin), v)
            x_TD = block.after(x_TD, out)
        return self.model.norm(x_TD)


def forward_flops(
    cfg: ModelConfig,
    tokens: float,
    context: float,
    predicted: float | None = None,
) -> float:
    """FLOPs of a forward pass over `tokens` tokens, the head computed for `predicted` of them
    (None: all).

    context: the keys that the tokens attend to, summed; a sequence of n tokens has n (n + 1) / 2.
    A matrix parameter takes 2 per token (the embedding is a lookup); a key takes in every layer and
    head 2 E for its score and 2 E for its mix.
    """
    D, E, L = cfg.hidden_size, cfg.head_dim, cfg.num_hidden_layers
    H, K = cfg.num_attention_heads, cfg.num_key_value_heads
    attention = D * (2 * H + 2 * K) * E
    mlp = 3 * D * cfg.intermediate_size
    if predicted is None:
        predicted = tokens
    matrices = L * (attention + mlp) * tokens + cfg.vocab_size * D * predicted
    return 2.0 * matrices + 4.0 * L * H * E * context
