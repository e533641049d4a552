"""
One decoder for training and sampling: Qwen2 / Qwen2.5, Qwen3 and Llama 3, with Hugging Face's parameter names.

The three families are one block with two switches: Qwen2 has a bias on q, k, v; Qwen3 normalises each head of q and k.
One set of weights runs in two ways:

    forward   packed sequences, no cache (training)          ids_T = [a0 a1 a2 | b0 b1 | c0 c1 c2 c3],  cu = [0 3 5 9]
    run       tokens at given positions over a KV cache that belongs to the caller (rollout.py)

There is no padding and no attention mask in the packed layout: a sequence is the range cu[s]:cu[s+1] of the rows, so
masks come from lengths and never from token values. Nothing here knows about ranks or devices in use: `fully_shard`
(every block of model.model.layers, then the root) is applied from outside.

Shapes: T packed tokens, S sequences, R rows with a target, L layers, H heads, K KV heads, E head dim, D model dim,
V vocabulary.
"""

import inspect
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from kernels import gradient, rotate, statistics

try:
    from flash_attn import flash_attn_varlen_func  # optional: 5 to 20 % faster than the copy inside torch
except ImportError:
    flash_attn_varlen_func = None

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}


# ---------------------------------------------------------------------------------------------------------- config


@dataclass
class ModelConfig:
    """The fields of Hugging Face's config.json that shape the computation; `raw` is the file as it was read."""

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
    raw: dict

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Reads config.json, and adds the end-of-sequence ids of generation_config.json where there is one.

        Raises FileNotFoundError without a config.json, ValueError (one line, naming file and field) for anything that
        this decoder would compute wrongly: another architecture, another rope type, sliding windows, quantized weights.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no config.json, so it is not a model folder")
        cfg = cls.from_dict(read_json(path), str(path))
        generation = path.with_name("generation_config.json")
        if generation.is_file():
            more = eos_ids(read_json(generation), str(generation))
            cfg.eos_token_ids = tuple(dict.fromkeys(cfg.eos_token_ids + more))
        return cfg

    @classmethod
    def from_dict(cls, raw: dict, where: str = "config") -> "ModelConfig":
        """The same from a dictionary with the keys of config.json; `where` names it in messages."""

        def number(key, default=None, source=raw, kind=float):
            value = default if source.get(key) is None else source[key]
            if type(value) not in (int, kind) or value <= 0:  # type(), because True is an int too
                raise ValueError(f"{where}: {key} is {value!r}, a positive {kind.__name__} is wanted")
            return kind(value)

        def size(key, default=None):
            return number(key, default, kind=int)

        kind = raw.get("model_type")
        if kind not in ARCHITECTURES:
            raise ValueError(f"{where}: model_type {kind!r} is not supported, known are {', '.join(ARCHITECTURES)}")
        if (raw.get("architectures") or [ARCHITECTURES[kind]]) != [ARCHITECTURES[kind]]:
            raise ValueError(f"{where}: architectures {raw['architectures']} is not supported, {kind} must be a CausalLM")
        if raw.get("use_sliding_window") or set(raw.get("layer_types") or ()) - {"full_attention"}:
            raise ValueError(f"{where}: sliding-window attention (use_sliding_window, layer_types) is not supported")
        only = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None}
        for key, value in only.items():
            if raw.get(key, value) != value:
                raise ValueError(f"{where}: {key} is {raw[key]!r}, only {value!r} is supported")

        # transformers 5 writes rope_parameters with everything inside; before, rope_theta stood beside rope_scaling.
        rope = {"rope_theta": raw.get("rope_theta")} | (raw.get("rope_scaling") or {}) | (raw.get("rope_parameters") or {})
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "llama3"):
            raise ValueError(f"{where}: rope type {rope_type!r} is not supported, known are default and llama3")
        scaling = None
        if rope_type == "llama3":
            original = {"original_max_position_embeddings": raw.get("max_position_embeddings")}
            keys = ("factor", "low_freq_factor", "high_freq_factor", *original)
            scaling = {key: number(key, original.get(key), rope) for key in keys}

        H = size("num_attention_heads")
        cfg = cls(
            model_type=kind, raw=raw, eos_token_ids=eos_ids(raw, where),
            vocab_size=size("vocab_size"), hidden_size=size("hidden_size"),
            intermediate_size=size("intermediate_size"), num_hidden_layers=size("num_hidden_layers"),
            num_attention_heads=H, num_key_value_heads=size("num_key_value_heads", H),
            head_dim=size("head_dim", 128 if kind == "qwen3" else raw["hidden_size"] // H),
            rms_norm_eps=number("rms_norm_eps", 1e-6), max_position_embeddings=size("max_position_embeddings"),
            rope_theta=number("rope_theta", 10_000, rope), rope_scaling=scaling,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3",
        )  # fmt: skip
        if H % cfg.num_key_value_heads or cfg.head_dim % 2:
            raise ValueError(
                f"{where}: {H} heads of {cfg.head_dim} over {cfg.num_key_value_heads} KV heads do not work, "
                "whole groups of heads and an even head_dim are wanted"
            )
        return cfg


def eos_ids(raw: dict, where: str) -> tuple[int, ...]:
    ids = raw.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if any(type(i) is not int for i in ids):
        raise ValueError(f"{where}: eos_token_id is {raw['eos_token_id']!r}, an integer or a list of integers is wanted")
    return tuple(ids)


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, an object is wanted")
    return value


def resolve(name_or_folder: str) -> Path:
    """A folder as it is; `owner/name` is downloaded from the hub (weights, json and tokenizer files only) or found in
    its local cache. Raises FileNotFoundError when it is neither."""
    folder = Path(name_or_folder).expanduser()
    if name_or_folder and folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name_or_folder):
        raise FileNotFoundError(f"model {name_or_folder!r} is neither a folder nor an owner/name on the hub")
    try:
        wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
        return Path(snapshot_download(name_or_folder, allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError) as error:
        why = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"model {name_or_folder!r} is neither a folder nor a hub model within reach ({type(error).__name__}: {why})"
        ) from None


# ------------------------------------------------------------------------------------------------------- attention


def sequence_of_row(cu: Tensor, T: int) -> Tensor:
    """cu = [0 3 5] -> [0 0 0 1 1], without asking the device for the lengths."""
    return torch.searchsorted(cu, torch.arange(T, device=cu.device, dtype=cu.dtype), right=True) - 1


def positions(cu: Tensor, T: int) -> Tensor:
    """cu = [0 3 5] -> [0 1 2 0 1]: positions restart in every sequence."""
    return torch.arange(T, device=cu.device, dtype=cu.dtype) - cu[sequence_of_row(cu, T)]


def flash_ok(x: Tensor) -> bool:
    """torch's own FlashAttention-2 takes half precision on CUDA; everything else goes through SDPA."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


# torch 2.12 added enable_gqa, and from then on demands it when q and k differ in heads; 2.11 does not know the word.
GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def attend_packed(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, cu: Tensor, max_len: int) -> Tensor:
    """Causal attention inside each packed sequence -> (T, H, E). cu: (S+1,) int32, cu[-1] == T; max_len: the longest."""
    attend = by_sdpa if not flash_ok(q_THE) else by_flash_attn if flash_attn_varlen_func else by_varlen
    return attend(q_THE, k_TKE, v_TKE, cu, max_len)


def by_flash_attn(q_THE, k_TKE, v_TKE, cu, max_len) -> Tensor:
    return flash_attn_varlen_func(q_THE, k_TKE, v_TKE, cu, cu, max_len, max_len, causal=True)


def by_varlen(q_THE, k_TKE, v_TKE, cu, max_len) -> Tensor:
    return varlen_attn(q_THE, k_TKE, v_TKE, cu, cu, max_len, max_len, window_size=(-1, 0), **GQA)


def by_sdpa(q_THE, k_TKE, v_TKE, cu, max_len) -> Tensor:
    """Right-padded into one SDPA: [a0 a1 a2 | b0 b1] -> [a0 a1 a2], [b0 b1 --]. A causal row sees only what stands left
    of it, so no real row sees the padding, no mask is needed, and what the padding rows compute is never gathered back."""
    T, S = len(q_THE), len(cu) - 1
    place = (sequence_of_row(cu, T) * max_len + positions(cu, T)).long()  # (T,) of each row in the padded layout

    def pad(x):  # (T, h, E) -> (S, h, max_len, E)
        padded = x.new_zeros(S * max_len, *x.shape[1:])
        padded[place] = x
        return padded.unflatten(0, (S, max_len)).transpose(1, 2)

    out = F.scaled_dot_product_attention(pad(q_THE), pad(k_TKE), pad(v_TKE), is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)[place]


# ------------------------------------------------------------------------------------------------- rotary positions


def rope_tables(cfg: ModelConfig, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, each (T, 1, E/2) in fp32 (the 1 is the head axis).

    Frequencies are theta^(-2i/E), i < E/2 (RoFormer, 2104.09864). llama3 scaling (as in transformers'
    modeling_rope_utils): wavelengths above original/low_freq_factor are stretched by `factor`, those below
    original/high_freq_factor kept, linear in between. Recomputed in every forward (a dozen kernels on E/2 numbers):
    a buffer would be lost on the way from the meta device, and rounded by .to(bfloat16).
    """
    E = cfg.head_dim
    freq = 1.0 / cfg.rope_theta ** (torch.arange(0, E, 2, device=positions_T.device, dtype=torch.float32) / E)
    if cfg.rope_scaling:
        low, high = cfg.rope_scaling["low_freq_factor"], cfg.rope_scaling["high_freq_factor"]
        turns = cfg.rope_scaling["original_max_position_embeddings"] * freq / (2 * math.pi)  # in the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freq = (1 - keep) * freq / cfg.rope_scaling["factor"] + keep * freq
    angle = positions_T.float()[:, None, None] * freq
    return angle.cos(), angle.sin()


# ----------------------------------------------------------------------------------------------------------- model


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        D, H, K, E = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        self.head_dim = E
        self.q_proj = nn.Linear(D, H * E, bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(D, K * E, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(D, K * E, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(H * E, D, bias=False)
        self.q_norm = nn.RMSNorm(E, cfg.rms_norm_eps) if cfg.qk_norm else None
        self.k_norm = nn.RMSNorm(E, cfg.rms_norm_eps) if cfg.qk_norm else None

    def qkv(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (proj(x_TD).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


class MLP(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.up_proj = nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False)
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """nn.RMSNorm takes its statistics in fp32 for half-precision input, as transformers does; one kernel on CUDA."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = nn.RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x_TD: Tensor, cos: Tensor, sin: Tensor, cu: Tensor, max_len: int) -> Tensor:
        q, k, v = self.before(x_TD)
        return self.after(x_TD, attend_packed(rotate(q, cos, sin), rotate(k, cos, sin), v, cu, max_len))

    # What stands on either side of attention; `run` calls these two around its caller's use of a cache.
    def before(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.qkv(self.input_layernorm(x_TD))

    def after(self, x_TD: Tensor, out_THE: Tensor) -> Tensor:
        x_TD = x_TD + self.self_attn.o_proj(out_THE.flatten(1))
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class Model(nn.Module):
    """Parameters are named as in Hugging Face's files; a tied model has no lm_head.weight.

    Under FSDP2 shard each of model.model.layers and then the root, with cast_forward_inputs=False (the rotary tables
    are fp32 inputs of every block). The embedding, the last norm and the head belong to the root's unit, and all use
    of the head happens inside the root's forward. `run` is for an unsharded copy.
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
        self.checkpoint_activations = False  # keep only each block's input for the backward pass, recompute the rest

    @property
    def head(self) -> Tensor:
        return (self.model.embed_tokens if self.cfg.tie_word_embeddings else self.lm_head).weight

    @torch.no_grad()
    def init_weights(self, std: float = 0.02) -> "Model":
        """Random weights as transformers draws them (normal matrices, zero biases, unit norms), from torch's stream."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                p.normal_(0.0, std)
            else:
                p.fill_(float(name.endswith("norm.weight")))
        return self

    def forward(
        self, ids_T: Tensor, cu: Tensor, max_len: int,
        targets_R: Tensor | None = None, rows_R: Tensor | None = None, temperature: float = 1.0,
        coefficient_R: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """Packed sequences through the decoder; see attend_packed for cu and max_len.

        Without targets: logits_TV in fp32 (to look at; in half precision on CUDA they carry no gradient).
        With targets: (logp_R, entropy_R) in fp32 of token targets_R[r] after row rows_R[r], at that temperature.
            ids_T = [p0 p1 r0 r1 | ..], trained on the response r0 r1:  rows_R = [1 2],  targets_R = [r0 r1]
            coefficient_R: the loss's derivative by each log-prob, where it is known beforehand; see token_logprobs.
        """
        x = self.model.embed_tokens(ids_T)
        cos, sin = rope_tables(self.cfg, positions(cu, len(ids_T)))
        for block in self.model.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, cu, max_len, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, cos, sin, cu, max_len)
        if targets_R is None:
            return logits_fp32(self.model.norm(x), self.head)
        # Only rows with a target enter the norm and the head: prompts cost nothing there.
        return token_logprobs(self.model.norm(x[rows_R]), self.head, targets_R, temperature, coefficient_R)

    @torch.no_grad()
    def run(self, ids_T: Tensor, positions_T: Tensor, attend) -> Tensor:
        """Tokens at given positions through the decoder -> (T, D) after the last norm. The cache is the caller's:
        attend(layer, q_THE, k_TKE, v_TKE) -> (T, H, E) stores keys and values where it likes, and reads them."""
        x = self.model.embed_tokens(ids_T)
        cos, sin = rope_tables(self.cfg, positions_T)
        for layer, block in enumerate(self.model.layers):
            q, k, v = block.before(x)
            x = block.after(x, attend(layer, rotate(q, cos, sin), rotate(k, cos, sin), v))
        return self.model.norm(x)


# ------------------------------------------------------------------------------------------- head and log-probabilities


def mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b accumulated and returned in fp32. On CUDA the half-precision kernel writes its fp32 accumulator out, at
    almost no cost; the CPU has no such kernel, so the operands are widened."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_mm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in fp32; on CUDA the product is added where it is made, so that it is not written, read and added."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += mm_fp32(a, b)


def logits_fp32(hidden_RD: Tensor, weight_VD: Tensor, temperature: float = 1.0) -> Tensor:
    """The one place where logits come from, for training and sampling: never rounded to half precision."""
    logits_RV = mm_fp32(hidden_RD, weight_VD.t())
    return logits_RV if temperature == 1.0 else logits_RV.div_(temperature)


HEAD_CHUNK = 4096  # rows whose logits exist at a time: 2.5 GB for 152k words in fp32


def head_pass(hidden_RD, weight_VD, targets_R, temperature, chunk, coefficient_R, needed):
    """One pass over the logits -> (logp_R, entropy_R, d_hidden, d_weight). The last two are the gradients of sum_r
    coefficient_R[r] logp_R[r], or None without coefficients or where not needed. With p = softmax(z), z = h W^T / tau:
    d logp[y] / dz = onehot(y) - p."""
    logp_R, entropy_R = (torch.empty(len(hidden_RD), dtype=torch.float32, device=hidden_RD.device) for _ in range(2))
    need_hidden, need_weight = (need and coefficient_R is not None for need in needed)
    d_hidden = torch.empty_like(hidden_RD) if need_hidden else None
    d_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if need_weight else None
    for i in range(0, len(hidden_RD), chunk):
        rows = slice(i, i + chunk)
        z = logits_fp32(hidden_RD[rows], weight_VD, temperature)
        logp_R[rows], entropy_R[rows], lse = statistics(z, targets_R[rows])
        if need_hidden or need_weight:
            dz = gradient(z, targets_R[rows], lse, coefficient_R[rows] / temperature, weight_VD.dtype)
            del z  # 2.5 GB that the products below need not stand beside
            if need_hidden:
                d_hidden[rows] = dz @ weight_VD
            if need_weight:
                add_mm(d_weight, dz.t(), hidden_RD[rows])
    return logp_R, entropy_R, d_hidden, d_weight.to(weight_VD.dtype) if need_weight else None


class TokenLogprobs(torch.autograd.Function):
    """See token_logprobs: the gradients come with the forward pass if their coefficient is known, else from a second pass."""

    @staticmethod
    def forward(ctx, hidden_RD, weight_VD, targets_R, temperature, chunk, coefficient_R):
        inputs = (hidden_RD, weight_VD, targets_R)
        logp_R, entropy_R, *gradients = head_pass(*inputs, temperature, chunk, coefficient_R, ctx.needs_input_grad[:2])
        ctx.save_for_backward(coefficient_R, *(inputs if coefficient_R is None else gradients))
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy_R)
        return logp_R, entropy_R

    @staticmethod
    def backward(ctx, grad_R, _):
        coefficient_R, *saved = ctx.saved_tensors
        if coefficient_R is None:
            gradients = head_pass(*saved, ctx.temperature, ctx.chunk, grad_R, ctx.needs_input_grad[:2])[2:]
        else:  # asked on the device, without waiting for the answer
            kept = torch.where((grad_R == coefficient_R).all(), 1.0, math.nan)
            gradients = [d if d is None else d.mul_(kept) for d in saved]
        return *gradients, None, None, None, None


def token_logprobs(
    hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, temperature: float,
    coefficient_R: Tensor | None = None, chunk: int = HEAD_CHUNK,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(log p(targets_R), entropy_R) in fp32 of softmax(hidden W^T / temperature); the entropy carries no gradient.

    Works through `chunk` rows at a time: the R x V matrix never exists (4096 rows x 152k words in fp32 are 2.5 GB, 64k
    rows would be 40 GB). The gradient of the weight is summed over chunks in fp32. R = 0 is allowed and gives zero
    gradients. Raises ValueError unless temperature > 0.

    The backward pass computes all logits again, unless the caller knows beforehand how its loss will depend on each
    log-prob, d loss / d logp_R = coefficient_R: then the forward pass makes the gradients too, one of the head's four matrix
    products is saved, and the gradients are the same sums. A loss that turns out otherwise gets gradients of NaN.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, log-probabilities need one above 0")
    return TokenLogprobs.apply(hidden_RD, weight_VD, targets_R, temperature, chunk, coefficient_R)


def forward_flops(cfg: ModelConfig, tokens: float, context: float, predicted: float | None = None) -> float:
    """FLOPs of a forward pass over `tokens` tokens that attend to `context` keys, summed over the tokens (a sequence of
    n tokens: n (n + 1) / 2), with the head computed for `predicted` of them (None: all). 2 per matrix parameter and token
    (the embedding is a lookup), and per layer, head and key 2 E for the score and 2 E for the mix: 4 L H E x context."""
    D, H, K, E = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    block = D * (2 * H + 2 * K) * E + 3 * D * cfg.intermediate_size
    head = cfg.vocab_size * D * (tokens if predicted is None else predicted)
    return 2.0 * (cfg.num_hidden_layers * block * tokens + head) + 4.0 * cfg.num_hidden_layers * H * E * context


# --------------------------------------------------------------------------------------------------- files in and out


@torch.no_grad()
def load_weights(model: Model, folder: str | Path) -> None:
    """Copies model.safetensors, or the shards of model.safetensors.index.json, into the model's own tensors (cast to
    their dtype). Everything is checked before the first byte is copied, see find_weights."""
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("load_weights needs memory to write to, this model is on the meta device (use to_empty first)")
    own = dict(model.named_parameters())
    for name, tensor in read_weights(model, folder):
        own[name].copy_(tensor)


def read_weights(model: Model, folder: str | Path):
    """(name, tensor) one at a time, in the model's order; everything is checked before the first one is read."""
    found = find_weights(model, folder)
    return ((name, found[name][1].get_tensor(name)) for name, _ in model.named_parameters())


def find_weights(model: Model, folder: str | Path) -> dict:
    """{name: (path, open shard)} of the model's tensors, which may be on the meta device; nothing is read but headers.
    FileNotFoundError for a missing file, ValueError for a damaged one and for missing, unexpected or mis-shaped tensors,
    each naming file and tensor."""
    folder, wanted = Path(folder), dict(model.named_parameters())
    found = {}  # name -> the open shard that holds it
    for path in weight_files(folder):
        try:
            shard = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None
        found |= dict.fromkeys(shard.keys(), (path, shard))
    # Files may repeat the tied head, and old Llama files hold the rotary frequencies; both follow from the rest.
    spare = [n for n in found if n.endswith("rotary_emb.inv_freq") or (n == "lm_head.weight" and n not in wanted)]
    shapes = {name: list(p.shape) for name, p in wanted.items()}
    if "lm_head.weight" in spare:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    for problem, names in [("lack", wanted.keys() - found), ("hold the unknown", found.keys() - wanted - set(spare))]:
        if names:
            raise ValueError(f"weights in {folder} {problem} tensor {min(names)} ({len(names)} such)")
    for name, shape in shapes.items():
        path, shard = found[name]
        part = shard.get_slice(name)
        if part.get_shape() != shape or part.get_dtype() not in ("F32", "F16", "BF16"):
            raise ValueError(
                f"{path}: {name} is {part.get_dtype()} {part.get_shape()}, floating point {shape} is wanted by config.json"
            )
    return found


def weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json")
    names = read_json(index).get("weight_map")
    names = sorted({str(name) for name in names.values()}) if isinstance(names, dict) else []
    if not names:
        raise ValueError(f"{index} has no weight_map")
    for name in names:
        # An index is input like any other: it must not reach outside its folder.
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise ValueError(f"{index} names the shard {name!r}, a bare *.safetensors file name is wanted")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{index} names the shard {name}, which is not in the folder")
    return [folder / name for name in names]


def save_folder(
    folder: str | Path, cfg: ModelConfig, state: dict[str, Tensor],
    tokenizer=None, dtype: torch.dtype | None = None, max_shard_gib: float = 5,
) -> None:  # fmt: skip
    """Writes a folder that transformers loads: weights (sharded beyond max_shard_gib), config.json, generation_config.json
    with the end-of-sequence ids and no sampling defaults, and the tokenizer if given. dtype None keeps the state's own.
    The caller writes to a fresh folder and renames it when complete. Raises ValueError when names are not cfg's."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        wanted = Model(cfg).state_dict()
    wrong = {n for n in wanted.keys() | state if n not in wanted or n not in state or wanted[n].shape != state[n].shape}
    if wrong:
        raise ValueError(f"state to save differs from its config in tensor {min(wrong)} ({len(wrong)} such)")
    dtype = dtype or state["model.norm.weight"].dtype
    shards, filled = [[]], 0
    for name, tensor in state.items():
        size = tensor.numel() * dtype.itemsize
        if shards[-1] and filled + size > max_shard_gib * 2**30:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map = {}
    for i, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {n: state[n].detach().to("cpu", dtype).contiguous() for n in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(t.numel() for t in state.values()) * dtype.itemsize
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})

    eos = list(cfg.eos_token_ids)
    ids = {"eos_token_id": eos[0] if len(eos) == 1 else eos or None}
    name = str(dtype).removeprefix("torch.")
    kind = {"architectures": [ARCHITECTURES[cfg.model_type]], "dtype": name, "torch_dtype": name}
    write_json(folder / "config.json", cfg.raw | kind | ids)
    write_json(folder / "generation_config.json", {k: cfg.raw.get(k) for k in ("bos_token_id", "pad_token_id")} | ids)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
