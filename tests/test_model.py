"""
model.py and head.py against transformers on small random folders of each family, and against
themselves: packed = one by one, cached = uncached, sharded = whole, one pass = two. Shapes as in
those files.
"""

import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

import model as module
from head import logits_fp32, token_logprobs
from hf import config_from_dict, load_weights, read_config
from kernels import rotate
from model import Model, forward_flops, pack

V = 89
SMALL = dict(
    vocab_size=V,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
# With E = 16 and 64 original positions the wavelengths 6, 20, 63, 199, .. fall on all three
# branches of llama3 scaling.
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=1e4,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
FAMILIES = {
    "qwen2-tied": Qwen2Config(
        **SMALL, num_attention_heads=6, num_key_value_heads=1, tie_word_embeddings=True
    ),
    "qwen2-untied": Qwen2Config(
        **SMALL, num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=False
    ),
    "qwen3-tied": Qwen3Config(
        **SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True
    ),
    "qwen3-untied": Qwen3Config(
        **SMALL,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=32,
        tie_word_embeddings=False,
    ),
    "llama3-tied": LlamaConfig(
        **SMALL,
        num_attention_heads=3,
        num_key_value_heads=1,
        rope_parameters=LLAMA3,
        tie_word_embeddings=True,
    ),
    "llama3-untied": LlamaConfig(
        **SMALL,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters=LLAMA3,
        tie_word_embeddings=False,
    ),
}


def randomize(model, seed=0):
    """Weights large enough that logits differ by units, biases and norms away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.15, generator=generator)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(transformers model, ours, folder) of one family."""
    folder = tmp_path_factory.mktemp(request.param)
    reference = randomize(AutoModelForCausalLM.from_config(FAMILIES[request.param])).eval()
    reference.save_pretrained(folder)
    return reference, loaded(folder), folder


def loaded(folder, dtype=torch.float32):
    model = Model(read_config(folder)).to(dtype)
    load_weights(model, folder)
    return model


def packed(lengths, seed=1, device="cpu"):
    """Random ids of sequences of these lengths -> (ids_T, cu, max_len)."""
    ids_T = torch.randint(V, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    cu = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    return ids_T.to(device), cu.to(device), max(lengths)


def difference(a, b):
    assert a.shape == b.shape
    return (a.double() - b.double()).abs().max().item()


# ------------------------------------------------------------------------------------------- parity


LENGTHS = [1, 40, 7, 23]


def test_logits_equal_transformers(family):
    reference, model, _ = family
    ids_T, cu, max_len = packed(LENGTHS)
    with torch.no_grad():
        wanted = torch.cat([reference(ids[None]).logits[0] for ids in ids_T.split(LENGTHS)])
    logits_TV = model(ids_T, cu, max_len)
    off = difference(logits_TV, wanted)
    print(f"largest difference of logits {off:.1e}, of size {wanted.abs().max():.1f}")
    assert logits_TV.dtype == torch.float32 and off < 1e-4


def test_packed_equals_one_by_one(family):
    _, model, _ = family
    ids_T, cu, max_len = packed(LENGTHS)
    alone = [
        model(ids, torch.tensor([0, len(ids)]).int(), len(ids)) for ids in ids_T.split(LENGTHS)
    ]
    assert difference(model(ids_T, cu, max_len), torch.cat(alone)) < 2e-5


class ListCache:
    """Keys and values of each sequence in a list, for Model.run: attended to one row at a time in
    plain arithmetic."""

    def __init__(self, sequences):
        self.kept = [[] for _ in range(sequences)]  # (layer, k_KE, v_KE) in the order of positions

    def attend(self, sequence_T):
        def attend(layer, q_THE, k_TKE, v_TKE):
            out = torch.empty_like(q_THE)
            for t, s in enumerate(sequence_T):
                self.kept[s].append((layer, k_TKE[t], v_TKE[t]))
                k, v = (
                    torch.stack([row[i] for row in self.kept[s] if row[0] == layer]) for i in (1, 2)
                )
                k, v = (x.repeat_interleave(q_THE.shape[1] // x.shape[1], dim=1) for x in (k, v))
                weight = torch.einsum("he,khe->hk", q_THE[t], k).div(k.shape[-1] ** 0.5).softmax(-1)
                out[t] = torch.einsum("hk,khe->he", weight, v)
            return out

        return attend


@pytest.mark.parametrize("index_type", [torch.int32, torch.int64])
def test_cached_equals_uncached(family, index_type):
    """Prompts of unequal length, then six tokens more of each."""
    _, model, _ = family
    ids_T, cu, max_len = packed([15, 30, 9])
    whole = model(ids_T, cu, max_len).split([15, 30, 9])
    prompts, cache = [9, 24, 3], ListCache(3)
    ids = torch.cat([part[:n] for part, n in zip(ids_T.split([15, 30, 9]), prompts)])
    at = torch.cat([torch.arange(n) for n in prompts]).to(index_type)
    hidden_TD = model.run(
        ids, at, cache.attend(torch.arange(3).repeat_interleave(torch.tensor(prompts)).tolist())
    )
    wanted = torch.cat([w[:n] for w, n in zip(whole, prompts)])
    assert difference(logits_fp32(hidden_TD, model.head), wanted) < 2e-5
    for step in range(6):
        lengths = [n + step for n in prompts]
        ids_A = torch.stack([part[n] for part, n in zip(ids_T.split([15, 30, 9]), lengths)])
        hidden_AD = model.run(
            ids_A, torch.tensor(lengths, dtype=index_type), cache.attend(range(3))
        )
        wanted = torch.stack([w[n] for w, n in zip(whole, lengths)])
        assert difference(logits_fp32(hidden_AD, model.head), wanted) < 2e-5


def test_gradients_equal_transformers(family):
    """Packed loss over some rows against that of a right-padded batch with a mask, at temperature
    0.7."""
    reference, model, _ = family
    lengths = [12, 5, 20]
    ids_T, cu, max_len = packed(lengths, seed=3)
    parts = ids_T.split(lengths)
    rows_R = torch.cat([torch.arange(3, n - 1) + start for n, start in zip(lengths, cu.tolist())])
    weight_R = torch.linspace(-1, 1, len(rows_R))
    model.zero_grad()
    logp_R, entropy_R, _ = model(ids_T, cu, max_len, ids_T[rows_R + 1], rows_R, 0.7)
    (logp_R * weight_R).sum().backward()

    padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    mask = torch.arange(max_len) < torch.tensor(lengths)[:, None]
    reference.zero_grad()
    full = (reference(padded, attention_mask=mask.long()).logits / 0.7).log_softmax(-1)
    rows = torch.cat([full[s, 3 : n - 1] for s, n in enumerate(lengths)])
    targets = torch.cat([part[4:] for part in parts])
    wanted_logp = rows.gather(1, targets[:, None])[:, 0]
    (wanted_logp * weight_R).sum().backward()
    assert difference(logp_R, wanted_logp) < 1e-4
    assert (
        difference(entropy_R, -(rows.exp() * rows).sum(-1)) < 1e-4 and not entropy_R.requires_grad
    )
    wanted = {name: p.grad for name, p in reference.named_parameters()}
    for name, p in model.named_parameters():
        assert difference(p.grad, wanted[name]) < 1e-5 * max(
            1.0, wanted[name].abs().max().item()
        ), name


def test_checkpointing_changes_nothing(family):
    _, model, _ = family
    ids_T, cu, max_len = packed([6, 11], seed=4)
    rows_R, grads = torch.arange(5), []
    for flag in (False, True):
        model.checkpoint_activations = flag
        model.zero_grad()
        model(ids_T, cu, max_len, ids_T[rows_R + 1], rows_R).logp_R.sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    model.checkpoint_activations = False
    assert all(torch.equal(a, b) for a, b in zip(*grads))


# ------------------------------------------------------------------------------------------ packing


def test_pack_by_hand():
    batch = pack([[1, 2], (3,)], [[4, 5], [6]], "cpu")
    assert batch.ids_T.tolist() == [1, 2, 4, 5, 3, 6] and batch.cu.tolist() == [0, 4, 6]
    assert batch.rows_R.tolist() == [1, 2, 4] and batch.targets_R.tolist() == [4, 5, 6]
    assert batch.max_len == 4 and batch.cu.dtype == torch.int32 and batch.ids_T.dtype == torch.int64


tokens = st.lists(st.integers(0, 151_935), max_size=6)


@given(st.lists(st.tuples(tokens.filter(len), tokens), max_size=6))
@settings(max_examples=100, deadline=None)
def test_pack_of_anything(pairs):
    """Each sequence comes back out of its range of rows, its response as the targets of the rows
    before; also of no sequences, and of responses without tokens."""
    ids_T, cu, max_len, rows_R, targets_R = pack(
        [p for p, _ in pairs], [r for _, r in pairs], "cpu"
    )
    ranges = list(zip(cu.tolist(), cu.tolist()[1:]))
    assert [ids_T[a:b].tolist() for a, b in ranges] == [p + r for p, r in pairs]
    assert targets_R.tolist() == [token for _, r in pairs for token in r]
    assert torch.equal(ids_T[rows_R + 1], targets_R) and cu[-1] == len(ids_T)
    rows = [row for (a, b), (p, _) in zip(ranges, pairs) for row in range(a + len(p) - 1, b - 1)]
    assert rows_R.tolist() == rows and max_len == max((b - a for a, b in ranges), default=0)


def test_pack_refuses_a_response_that_no_row_predicts():
    with pytest.raises(ValueError, match="empty prompt"):
        pack([[1], []], [[2], [3]], "cpu")
    assert pack([[1], []], [[2], []], "cpu").cu.tolist() == [0, 2, 2]


# ---------------------------------------------------------------------- what an operation allocates


def loss_of(scores):
    """The sum of log-probs, by either way of their gradient."""
    return scores.logp_R.sum() if scores.weighted is None else scores.weighted


class Watch(TorchDispatchMode):
    """Records the operations that ran and the largest storage that one of them made."""

    def __init__(self):
        super().__init__()
        self.operations, self.largest, self.known = set(), 0, set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, torch.Tensor):
                self.known.add(t.untyped_storage().data_ptr())
        result = operation(*args, **(kwargs or {}))
        self.operations.add(operation.overloadpacket.__name__)
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return result


def test_token_logprobs_memory_does_not_grow_with_rows():
    weight_VD, largest = torch.randn(500, 8, requires_grad=True), []
    for R in (64, 640):
        for known in (None, torch.ones(R)):
            hidden_RD = torch.randn(R, 8, requires_grad=True)
            with Watch() as watch:
                targets_R = torch.randint(500, (R,))
                loss_of(token_logprobs(hidden_RD, weight_VD, targets_R, 1.0, known, 32)).backward()
            largest.append(watch.largest)
    assert set(largest) == {32 * 500 * 4}


# ----------------------------------------------------------------------------------- token_logprobs


def plain_logprobs(hidden_RD, weight_VD, targets_R, temperature, dtype=torch.float32):
    logits_RV = hidden_RD.to(dtype) @ weight_VD.to(dtype).t()
    logp_RV = (logits_RV / temperature).log_softmax(-1)
    return logp_RV.gather(1, targets_R[:, None])[:, 0], -(logp_RV.exp() * logp_RV).sum(-1)


def logprobs_both_ways(R, chunk, temperature, dtype, known, device="cpu", V=500, D=32):
    """[values and gradients of token_logprobs], [the same of the plain fp32 form on the same
    rounded inputs]. known: the coefficients of the gradients are given beforehand."""
    torch.manual_seed(0)
    hidden = torch.randn(R, D, device=device).to(dtype)
    weight = (torch.randn(V, D, device=device) * (32 / D) ** 0.5).to(dtype)
    targets_R = torch.randint(V, (R,), device=device)
    grad_R = torch.randn(R, device=device)

    h, w = (x.clone().requires_grad_() for x in (hidden, weight))
    known_R = grad_R if known else None
    logp_R, entropy_R, weighted = token_logprobs(h, w, targets_R, temperature, known_R, chunk)
    (weighted if known else (grad_R * logp_R).sum()).backward()
    ours = [logp_R.detach(), entropy_R.detach(), h.grad, w.grad]

    h, w = (x.float().detach().clone().requires_grad_() for x in (hidden, weight))
    logp_R, entropy_R = plain_logprobs(h, w, targets_R, temperature)
    logp_R.backward(grad_R)
    return ours, [logp_R.detach(), entropy_R.detach(), h.grad, w.grad]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 7, 64, 4096])
@pytest.mark.parametrize("known", [False, True])
def test_token_logprobs(chunk, temperature, known):
    for got, wanted in zip(*logprobs_both_ways(65, chunk, temperature, torch.float32, known)):
        assert difference(got, wanted) < 1e-5 * max(1.0, wanted.abs().max().item())


def close_in_bf16(results):
    (logp, entropy, d_hidden, d_weight), wanted = results
    assert (
        logp.dtype == entropy.dtype == torch.float32
        and d_hidden.dtype == d_weight.dtype == torch.bfloat16
    )
    # Both are differences of sums of the size of the logits, which fp32 rounds to 6e-8 of that
    # size, some 50 times.
    rounding = 50 * 2**-24 * max(1.0, wanted[0].abs().max().item())
    assert difference(logp, wanted[0]) < rounding and difference(entropy, wanted[1]) < rounding
    for got, want in [
        (d_hidden, wanted[2]),
        (d_weight, wanted[3]),
    ]:  # dz and the result are rounded to 8 bits
        assert ((got.float() - want).norm() / want.norm()).item() < 5e-3


@pytest.mark.parametrize("known", [False, True])
def test_token_logprobs_bf16(known):
    close_in_bf16(logprobs_both_ways(65, 16, 0.8, torch.bfloat16, known))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
def test_known_coefficients_change_nothing(dtype, needs):
    """Bit for bit, also where only one gradient is wanted; and twice from one graph."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(30, 16).to(dtype), torch.randn(90, 16).to(dtype)
    targets_R, coefficient_R, grads = torch.randint(90, (30,)), torch.randn(30), []
    for known_R in (None, coefficient_R):
        h, w = hidden.clone().requires_grad_(needs[0]), weight.clone().requires_grad_(needs[1])
        inputs = [x for x in (h, w) if x.requires_grad]
        scores = token_logprobs(h, w, targets_R, 0.7, known_R, chunk=8)
        if known_R is None:
            weighted = (coefficient_R * scores.logp_R).sum()
        else:
            assert not scores.logp_R.requires_grad
            weighted = scores.weighted
        first = torch.autograd.grad(weighted, inputs, retain_graph=True)
        again = torch.autograd.grad(weighted, inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
        grads.append([weighted.detach(), scores.entropy_R, *first])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


# What a user may write with `weighted`: f(weighted, other differentiable terms of the inputs).
LOSSES = {
    "alone": lambda weighted, h, w: weighted,
    "half": lambda weighted, h, w: 0.5 * weighted,
    "negative": lambda weighted, h, w: -3.0 * weighted,
    "nothing": lambda weighted, h, w: 0.0 * weighted,
    "divided": lambda weighted, h, w: weighted / 7,
    "twice": lambda weighted, h, w: weighted + 0.25 * weighted,
    "decay": lambda weighted, h, w: weighted + 0.1 * w.square().sum(),
    "penalties": lambda weighted, h, w: 2 * weighted + h.sin().sum() - (w * w.detach()).mean(),
    "square": lambda weighted, h, w: weighted**2,
    "exponential": lambda weighted, h, w: (0.01 * weighted).exp() + h.sum(),
    "product": lambda weighted, h, w: weighted * h.mean() * w.abs().mean(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(
    seed=st.integers(0, 2**32 - 1),
    R=st.integers(1, 9),
    chunk=st.integers(1, 10),
    temperature=st.sampled_from([0.5, 0.8, 1.0, 1.7]),
)
@settings(max_examples=15, deadline=None)
def test_a_loss_of_any_shape(loss, dtype, seed, R, chunk, temperature):
    """
    Whatever is made of `weighted`, its gradients are those of plain autograd through full logits.
    It was so for the loss that had been said alone: 0.5 * loss, or a KL term beside it, gave NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, 6, generator=generator) for n in (R, 23))
    targets_R = torch.randint(23, (R,), generator=generator)
    coefficient_R = torch.randn(R, generator=generator)

    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    scores = token_logprobs(h, w, targets_R, temperature, coefficient_R, chunk)
    LOSSES[loss](scores.weighted, h, w).backward()

    hh, ww = (x.to(dtype).clone().requires_grad_() for x in (hidden, weight))
    logp_R, _ = plain_logprobs(hh, ww, targets_R, temperature, dtype)
    wanted = (coefficient_R.to(dtype) * logp_R).sum()
    LOSSES[loss](wanted, hh, ww).backward()
    assert difference(scores.logp_R, logp_R) < 1e-5
    assert abs(scores.weighted.item() - wanted.item()) < 1e-5 * R
    for got, want in ((h.grad, hh.grad), (w.grad, ww.grad)):
        assert difference(got, want) < 2e-5 * max(1.0, want.abs().max().item())


@given(seed=st.integers(0, 2**32 - 1), factor=st.floats(-4, 4, width=32))
@settings(max_examples=25, deadline=None)
def test_scaling_of_the_loss_scales_the_gradient(seed, factor):
    """What comes in multiplies, in fp32, gradients that are made already."""
    generator = torch.Generator().manual_seed(seed)
    targets_R, coefficient_R = torch.arange(5), torch.randn(5, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        h, w = (torch.randn(n, 6, generator=generator).to(dtype) for n in (5, 11))
        h, w = h.requires_grad_(), w.requires_grad_()
        weighted = token_logprobs(h, w, targets_R, 0.9, coefficient_R).weighted
        once = torch.autograd.grad(weighted, (h, w), retain_graph=True)
        scaled = torch.autograd.grad(factor * weighted, (h, w))
        products = [(factor * a.float()).to(dtype) for a in once]
        assert all(torch.equal(a, b) for a, b in zip(products, scaled))
        assert all(a.dtype == dtype for a in once)


@pytest.mark.parametrize("known", [False, True])
def test_no_second_derivative(known):
    """The gradients are constants to autograd, so asking for theirs is refused, and not wrong."""
    h, w = (torch.randn(n, 6, requires_grad=True) for n in (5, 11))
    known_R = torch.ones(5) if known else None
    loss = loss_of(token_logprobs(h, w, torch.arange(5), 1.0, known_R))
    (grad,) = torch.autograd.grad(loss.square(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_coefficients_are_constants():
    h, w, coefficient_R = torch.randn(5, 6), torch.randn(9, 6), torch.ones(5, requires_grad=True)
    with pytest.raises(ValueError, match="coefficient_R carries a gradient"):
        token_logprobs(h, w, torch.arange(5), 1.0, coefficient_R)


INTERPRETED = """
import torch, kernels
for V in (100, 5000, 8192):     # one block that is not full, several, several that are
    z, targets, scale = torch.randn(3, V) * 4, torch.tensor([0, 7, V - 1]), torch.randn(3)
    got = [torch.empty(3) for _ in range(3)]
    kernels.statistics_kernel[3,](z, targets, *got, V, BLOCK=4096)
    for a, b in zip(got, kernels.statistics(z, targets)):
        assert (a - b).abs().max() < 1e-4, (V, a, b)
    dz = torch.empty(3, V)
    kernels.gradient_kernel[3, -(-V // 4096)](z, targets, got[2], scale, dz, V, BLOCK=4096)
    assert (dz - kernels.gradient(z, targets, got[2], scale, torch.float32)).abs().max() < 1e-5
for H, E in ((6, 32), (1, 64), (7, 128)):
    x, angle = torch.randn(4, H, E), torch.randn(4, 1, E // 2)
    out = torch.full_like(x, torch.nan)
    kernels.rotate_kernel[4,](x, angle.cos(), angle.sin(), out, H, E, 8)
    assert (out - kernels.rotate(x, angle.cos(), angle.sin())).abs().max() < 1e-6
"""


def test_kernels_interpreted():
    """The Triton kernels of kernels.py by Triton's interpreter against the torch operations that a
    CPU uses."""
    pytest.importorskip("triton")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.path.dirname(module.__file__),
    }
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def rotated_by_hand(x_THE, angle):
    """Complex numbers: pair (i, i + E/2) times e^(i angle)."""
    a, b = x_THE.chunk(2, -1)
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), -1)


def test_rotate():
    """Values and gradients."""
    x, grad, angle = (
        torch.randn(*size, dtype=torch.double) for size in ((5, 3, 8), (5, 3, 8), (5, 1, 4))
    )
    mine, wanted = (x.clone().requires_grad_() for _ in range(2))
    out, by_hand = rotate(mine, angle.cos(), angle.sin()), rotated_by_hand(wanted, angle)
    out.backward(grad)
    by_hand.backward(grad)
    assert (out - by_hand).abs().max() < 1e-12 and (mine.grad - wanted.grad).abs().max() < 1e-12


@pytest.mark.parametrize("known", [None, torch.empty(0)])
def test_token_logprobs_of_no_rows(known):
    """A rank without rows to train on still takes part in the backward pass, with zeros."""
    hidden_RD, weight_VD = (
        torch.randn(0, 8, requires_grad=True),
        torch.randn(50, 8, requires_grad=True),
    )
    targets_R = torch.empty(0, dtype=torch.long)
    scores = token_logprobs(hidden_RD, weight_VD, targets_R, 1.0, known)
    loss_of(scores).backward()
    assert scores.logp_R.shape == scores.entropy_R.shape == (0,)
    assert torch.equal(weight_VD.grad, torch.zeros(50, 8)) and hidden_RD.grad.shape == (0, 8)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_token_logprobs_refuses_temperature(temperature):
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(
            torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1, dtype=torch.long), temperature
        )


# -------------------------------------------------------------------------------------------- FSDP2


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(folder, policy, checkpointing=False, compiled=False):
    """A model of the folder as the learner has it: halves of blocks compiled, blocks and root
    sharded."""
    model = loaded(folder)
    model.checkpoint_activations = checkpointing
    if compiled:  # Inductor is left out: a CPU takes a minute for it
        for block in model.model.layers:
            halves = (block.before, block.after)
            block.before, block.after = (
                torch.compile(half, dynamic=True, backend="aot_eager") for half in halves
            )
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in [*model.model.layers, model]:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return model


def full_gradients(model):
    grads = [p.grad for p in model.parameters()]
    return [g.full_tensor().clone() if hasattr(g, "full_tensor") else g.clone() for g in grads]


@pytest.mark.parametrize("known_R", [None, torch.ones(5)], ids=["unknown", "known"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sharded_equals_whole(family, process_group, checkpointing, known_R):
    _, whole, folder = family
    ids_T, cu, max_len = packed([6, 11, 3], seed=5)
    rows_R = torch.tensor([2, 3, 4, 9, 12])

    def gradients(model):
        model.zero_grad()
        scores = model(ids_T, cu, max_len, ids_T[rows_R + 1], rows_R, 0.9, known_R)
        loss_of(scores).backward()
        return [scores.logp_R.detach(), scores.entropy_R, *full_gradients(model)]

    wanted = gradients(whole)
    model = sharded(folder, MixedPrecisionPolicy(), checkpointing)
    for _ in range(2):  # the second round meets parameters that were resharded
        for got, want in zip(gradients(model), wanted):
            assert difference(got, want) < 1e-6 * max(1, want.abs().max())
    assert difference(model(ids_T, cu, max_len), whole(ids_T, cu, max_len)) < 1e-5
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    by_half = gradients(sharded(folder, half, checkpointing))
    for got, want in zip(by_half, gradients(loaded(folder, torch.bfloat16))):
        assert difference(got, want) <= 0.02 * max(1, want.abs().max())


# (prompts, responses) of each rank; the last batch gives rank 1 nothing to train on.
BATCHES = [
    [([[1, 2, 3], [4]], [[5, 6], [7, 8, 9, 10]]), ([[11, 12]], [[13]])],
    [([[1, 2], [3, 4, 5]], [[6], [7, 8]]), ([[9, 10, 11]], [[]])],
]
WAYS = [(False, False), (True, False), (False, True), (True, True)]  # checkpointing, compiled


def half_a_loss(model, batch, known):
    """0.5 x the weighted sum of log-probs, by either way of its gradient."""
    packed = pack(*batch, "cpu")
    coefficient_R = torch.linspace(-1, 2, len(packed.rows_R))
    known_R = coefficient_R if known else None
    scores = model(**packed._asdict(), temperature=0.8, coefficient_R=known_R)
    return 0.5 * (scores.weighted if known else (coefficient_R * scores.logp_R).sum())


def gradients_of_a_rank(rank, port, folder, output):
    torch.set_num_threads(1)
    store = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    grads = {}
    for way in WAYS:
        model = sharded(folder, MixedPrecisionPolicy(), *way)
        for number, batches in enumerate(BATCHES):
            for known in (False, True):
                model.zero_grad()
                half_a_loss(model, batches[rank], known).backward()
                grads[way, number, known] = full_gradients(model)
    if rank == 0:
        torch.save(grads, output)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    """TokenScores are the output of FSDP2's root, also where a rank has no rows, with checkpointing
    and compiled blocks. With coefficients known or not the gradients are the same to the bit."""
    with socket.socket() as s:
        s.bind(("", 0))
        port = s.getsockname()[1]
    folder = tmp_path / "model"
    randomize(AutoModelForCausalLM.from_config(FAMILIES["qwen3-tied"])).save_pretrained(folder)
    output = tmp_path / "grads.pt"
    torch.multiprocessing.spawn(gradients_of_a_rank, (port, folder, output), nprocs=2)
    grads = torch.load(output)
    whole = loaded(folder)
    for number, batches in enumerate(BATCHES):
        whole.zero_grad()
        (sum(half_a_loss(whole, batch, False) for batch in batches) / 2).backward()
        wanted = full_gradients(whole)
        for way in WAYS:
            one_pass, two_passes = grads[way, number, True], grads[way, number, False]
            assert all(torch.equal(a, b) for a, b in zip(one_pass, two_passes))
            for got, want in zip(one_pass, wanted):
                assert difference(got, want) < 2e-6 * max(1, want.abs().max()), way


# ------------------------------------------------------------------------------------------- config


def test_forward_flops():
    """torch's own count of a forward pass whose attention is two whole matrix products: every key
    counts."""
    model = Model(config_from_dict(FAMILIES["qwen3-tied"].to_dict()))
    ids_T, cu, max_len = packed([33])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids_T, cu, max_len)
    assert counter.get_total_flops() == forward_flops(model.cfg, tokens=33, context=33 * 33)


def test_init_weights():
    model = Model(config_from_dict(FAMILIES["qwen2-tied"].to_dict())).init_weights()
    state = model.state_dict()
    assert abs(state["model.embed_tokens.weight"].std().item() - 0.02) < 1e-3
    assert (
        state["model.layers.0.self_attn.q_proj.bias"].eq(0).all()
        and state["model.norm.weight"].eq(1).all()
    )


# --------------------------------------------------------------------------------------------- CUDA


def cuda(test):
    """What only a CUDA machine can run: the flash kernels, against SDPA in fp32 on the same rounded
    inputs."""
    return pytest.mark.gpu(
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test)
    )


def relative(got, wanted):
    return ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()


@cuda
@pytest.mark.parametrize(
    "backend, H, K, E",
    [
        ("by_varlen", 12, 2, 128),
        ("by_varlen", 4, 4, 64),
        ("by_varlen", 6, 1, 32),
        ("by_sdpa", 12, 2, 128),
        ("by_flash_attn", 12, 2, 128),
        ("by_flash_attn", 28, 4, 128),
    ],
)
def test_packed_attention_equals_sdpa_in_fp32(backend, H, K, E):
    """Values and gradients of every backend, with grouped KV heads and sequences of one token."""
    if backend == "by_flash_attn":
        pytest.importorskip("flash_attn")
    torch.manual_seed(0)
    lengths = [1, 300, 17, 128, 1030]
    _, cu, max_len = packed(lengths, device="cuda")
    inputs = [torch.randn(sum(lengths), heads, E, device="cuda").bfloat16() for heads in (H, K, K)]
    grad, results = torch.randn(sum(lengths), H, E, device="cuda").bfloat16(), []
    for attend, dtype in (
        (getattr(module, backend), torch.bfloat16),
        (module.by_sdpa, torch.float32),
    ):
        q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in inputs)
        out = attend(q, k, v, cu, max_len)
        out.backward(grad.to(dtype))
        results.append([out.detach(), q.grad, k.grad, v.grad])
    errors = [relative(got, wanted) for got, wanted in zip(*results)]
    print(
        f"{backend} {H} x {K} x {E}: relative errors of out, dq, dk, dv",
        *(f"{e:.2%}" for e in errors),
    )
    assert max(errors) < 6e-3


@cuda
@pytest.mark.parametrize("H, E", [(12, 128), (2, 128), (7, 64), (6, 24)])
def test_rotate_on_cuda(H, E):
    """Heads that fill no power of two, and a head size that takes torch's operations; bf16 against
    fp32 on the CPU."""
    x, grad, angle = (
        torch.randn(300, H, E).bfloat16(),
        torch.randn(300, H, E).bfloat16(),
        torch.randn(300, 1, E // 2) * 100,
    )
    mine, wanted = x.cuda().requires_grad_(), x.float().requires_grad_()
    out = rotate(mine, angle.cos().cuda(), angle.sin().cuda())
    out.backward(grad.cuda())
    rotate(wanted, angle.cos(), angle.sin()).backward(grad.float())
    assert relative(out.cpu(), rotate(wanted, angle.cos(), angle.sin())) < 3e-3
    assert relative(mine.grad.cpu(), wanted.grad) < 3e-3


@cuda
@pytest.mark.parametrize(
    "R, V, D, chunk", [(65, 500, 32, 16), (3000, 151_936, 1536, 1024), (7, 4097, 64, 4096)]
)
@pytest.mark.parametrize("known", [False, True])
def test_token_logprobs_on_cuda(R, V, D, chunk, known):
    results = logprobs_both_ways(R, chunk, 0.8, torch.bfloat16, known, "cuda", V, D)
    for name, got, wanted in zip(("log-prob", "entropy", "d hidden", "d weight"), *results):
        off = f"{difference(got, wanted):.1e} of {wanted.abs().max():.1e}"
        print(f"{R} x {V}: {name} {off}, {relative(got, wanted):.1e}")
    close_in_bf16(results)


@cuda
def test_token_logprobs_memory_on_cuda():
    """Beside hidden states and their gradient, as much for 32k rows as for 8k."""
    weight_VD, more = torch.randn(151_936, 256, device="cuda").bfloat16().requires_grad_(), []
    for R, known in ((8192, False), (32768, False), (8192, True), (32768, True)):
        hidden_RD = torch.randn(R, 256, device="cuda").bfloat16().requires_grad_()
        targets_R = torch.zeros(R, dtype=torch.long, device="cuda")
        weight_VD.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        known_R = torch.ones(R, device="cuda") if known else None
        loss_of(token_logprobs(hidden_RD, weight_VD, targets_R, 1.0, known_R)).backward()
        more.append(torch.cuda.max_memory_allocated() - before - hidden_RD.nbytes)
    print(" ".join(f"{x / 2**30:.3f}" for x in more), "GiB")
    assert max(more) - min(more) < 2**22
