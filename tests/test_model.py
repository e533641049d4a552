"""
model.py against transformers on small random folders of each family, and against itself: packed = one by one,
cached = uncached, written = read, sharded = whole. Shapes as in model.py.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

import model as module
from kernels import rotate
from model import (
    Model,
    ModelConfig,
    forward_flops,
    load_weights,
    logits_fp32,
    resolve,
    save_folder,
    token_logprobs,
)

V = 89
SMALL = dict(
    vocab_size=V, hidden_size=48, intermediate_size=80, num_hidden_layers=3, max_position_embeddings=128,
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
# With E = 16 and 64 original positions the wavelengths 6, 20, 63, 199, .. fall on all three branches of llama3 scaling.
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)  # fmt: skip
FAMILIES = {
    "qwen2-tied": Qwen2Config(**SMALL, num_attention_heads=6, num_key_value_heads=1, tie_word_embeddings=True),
    "qwen2-untied": Qwen2Config(**SMALL, num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=False),
    "qwen3-tied": Qwen3Config(
        **SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True
    ),
    "qwen3-untied": Qwen3Config(
        **SMALL, num_attention_heads=3, num_key_value_heads=3, head_dim=32, tie_word_embeddings=False
    ),
    "llama3-tied": LlamaConfig(
        **SMALL, num_attention_heads=3, num_key_value_heads=1, rope_parameters=LLAMA3, tie_word_embeddings=True
    ),
    "llama3-untied": LlamaConfig(
        **SMALL, num_attention_heads=6, num_key_value_heads=2, head_dim=16, rope_parameters=LLAMA3,
        tie_word_embeddings=False
    ),
}  # fmt: skip


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small untied folder to damage copies of."""
    folder = tmp_path_factory.mktemp("small")
    randomize(AutoModelForCausalLM.from_config(FAMILIES["qwen2-untied"])).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def loaded(folder, dtype=torch.float32):
    model = Model(ModelConfig.from_folder(folder)).to(dtype)
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


# ------------------------------------------------------------------------------------------------------ parity


LENGTHS = [1, 40, 7, 23]


def test_logits_equal_transformers(family):
    reference, model, _ = family
    ids_T, cu, max_len = packed(LENGTHS)
    with torch.no_grad():
        wanted = torch.cat([reference(ids[None]).logits[0] for ids in ids_T.split(LENGTHS)])
    logits_TV = model(ids_T, cu, max_len)
    print(f"largest difference of logits {difference(logits_TV, wanted):.1e}, of size {wanted.abs().max():.1f}")
    assert logits_TV.dtype == torch.float32 and difference(logits_TV, wanted) < 1e-4


def test_packed_equals_one_by_one(family):
    _, model, _ = family
    ids_T, cu, max_len = packed(LENGTHS)
    alone = [model(ids, torch.tensor([0, len(ids)]).int(), len(ids)) for ids in ids_T.split(LENGTHS)]
    assert difference(model(ids_T, cu, max_len), torch.cat(alone)) < 2e-5


class ListCache:
    """Keys and values of each sequence in a list, attended to one row at a time in plain arithmetic: for Model.run."""

    def __init__(self, sequences):
        self.kept = [[] for _ in range(sequences)]      # (layer, k_KE, v_KE) in the order of positions

    def attend(self, sequence_T):
        def attend(layer, q_THE, k_TKE, v_TKE):
            out = torch.empty_like(q_THE)
            for t, s in enumerate(sequence_T):
                self.kept[s].append((layer, k_TKE[t], v_TKE[t]))
                k, v = (torch.stack([row[i] for row in self.kept[s] if row[0] == layer]) for i in (1, 2))
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
    hidden_TD = model.run(ids, at, cache.attend(torch.arange(3).repeat_interleave(torch.tensor(prompts)).tolist()))
    wanted = torch.cat([w[:n] for w, n in zip(whole, prompts)])
    assert difference(logits_fp32(hidden_TD, model.head), wanted) < 2e-5
    for step in range(6):
        lengths = [n + step for n in prompts]
        ids_A = torch.stack([part[n] for part, n in zip(ids_T.split([15, 30, 9]), lengths)])
        hidden_AD = model.run(ids_A, torch.tensor(lengths, dtype=index_type), cache.attend(range(3)))
        wanted = torch.stack([w[n] for w, n in zip(whole, lengths)])
        assert difference(logits_fp32(hidden_AD, model.head), wanted) < 2e-5


def test_gradients_equal_transformers(family):
    """Packed loss over some rows against the loss of a right-padded batch with a mask, at temperature 0.7."""
    reference, model, _ = family
    lengths = [12, 5, 20]
    ids_T, cu, max_len = packed(lengths, seed=3)
    parts = ids_T.split(lengths)
    rows_R = torch.cat([torch.arange(3, n - 1) + start for n, start in zip(lengths, cu.tolist())])
    weight_R = torch.linspace(-1, 1, len(rows_R))
    model.zero_grad()
    logp_R, entropy_R = model(ids_T, cu, max_len, ids_T[rows_R + 1], rows_R, 0.7)
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
    assert difference(entropy_R, -(rows.exp() * rows).sum(-1)) < 1e-4 and not entropy_R.requires_grad
    wanted = {name: p.grad for name, p in reference.named_parameters()}
    for name, p in model.named_parameters():
        assert difference(p.grad, wanted[name]) < 1e-5 * max(1.0, wanted[name].abs().max().item()), name


def test_checkpointing_changes_nothing(family):
    _, model, _ = family
    ids_T, cu, max_len = packed([6, 11], seed=4)
    rows_R, grads = torch.arange(5), []
    for flag in (False, True):
        model.checkpoint_activations = flag
        model.zero_grad()
        model(ids_T, cu, max_len, ids_T[rows_R + 1], rows_R)[0].sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    model.checkpoint_activations = False
    assert all(torch.equal(a, b) for a, b in zip(*grads))


# ------------------------------------------------------------------------------------- what an operation allocates


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
                token_logprobs(hidden_RD, weight_VD, torch.randint(500, (R,)), 1.0, known, chunk=32)[0].sum().backward()
            largest.append(watch.largest)
    assert set(largest) == {32 * 500 * 4}


# -------------------------------------------------------------------------------------------------- token_logprobs


def plain_logprobs(hidden_RD, weight_VD, targets_R, temperature):
    logp_RV = ((hidden_RD.float() @ weight_VD.float().t()) / temperature).log_softmax(-1)
    return logp_RV.gather(1, targets_R[:, None])[:, 0], -(logp_RV.exp() * logp_RV).sum(-1)


def logprobs_both_ways(R, chunk, temperature, dtype, known, device="cpu", V=500, D=32):
    """[values and gradients of token_logprobs], [the same of the plain fp32 form on the same rounded inputs]. known: the
    coefficients of the gradients are given beforehand."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(R, D, device=device).to(dtype), (torch.randn(V, D, device=device) * (32 / D) ** 0.5).to(dtype)
    targets_R, grad_R = torch.randint(V, (R,), device=device), torch.randn(R, device=device)
    results, ours = [], (grad_R if known else None, chunk)
    for function, kind, more in [(token_logprobs, dtype, ours), (plain_logprobs, torch.float32, ())]:
        h, w = hidden.to(kind, copy=True).requires_grad_(), weight.to(kind, copy=True).requires_grad_()
        logp_R, entropy_R = function(h, w, targets_R, temperature, *more)
        logp_R.backward(grad_R)
        results.append([logp_R.detach(), entropy_R.detach(), h.grad, w.grad])
    return results


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 7, 64, 4096])
@pytest.mark.parametrize("known", [False, True])
def test_token_logprobs(chunk, temperature, known):
    for got, wanted in zip(*logprobs_both_ways(65, chunk, temperature, torch.float32, known)):
        assert difference(got, wanted) < 1e-5 * max(1.0, wanted.abs().max().item())


def close_in_bf16(results):
    (logp, entropy, d_hidden, d_weight), wanted = results
    assert logp.dtype == entropy.dtype == torch.float32 and d_hidden.dtype == d_weight.dtype == torch.bfloat16
    # Both are differences of sums of the size of the logits, which fp32 rounds to 6e-8 of that size, some 50 times.
    rounding = 50 * 2**-24 * max(1.0, wanted[0].abs().max().item())
    assert difference(logp, wanted[0]) < rounding and difference(entropy, wanted[1]) < rounding
    for got, want in [(d_hidden, wanted[2]), (d_weight, wanted[3])]:  # dz and the result are rounded to 8 bits
        assert ((got.float() - want).norm() / want.norm()).item() < 5e-3


@pytest.mark.parametrize("known", [False, True])
def test_token_logprobs_bf16(known):
    close_in_bf16(logprobs_both_ways(65, 16, 0.8, torch.bfloat16, known))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
def test_known_coefficients_change_nothing(dtype, needs):
    """Bit for bit, also where only one gradient is wanted; NaN where the loss is not what it was said to be."""
    torch.manual_seed(0)
    hidden, weight, targets_R = torch.randn(30, 16).to(dtype), torch.randn(90, 16).to(dtype), torch.randint(90, (30,))
    said_R, found = torch.randn(30), []
    for known, factor in ((None, 1.0), (said_R, 1.0), (said_R, 1.0 + 1e-6)):
        h, w = hidden.clone().requires_grad_(needs[0]), weight.clone().requires_grad_(needs[1])
        logp_R, _ = token_logprobs(h, w, targets_R, 0.7, known, chunk=8)
        logp_R.backward(said_R * factor)
        found.append([x.grad for x in (h, w) if x.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found[:2]))
    assert all(x.isnan().all() for x in found[2])


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
    """The Triton kernels of kernels.py by Triton's interpreter against the torch operations that a CPU uses."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.path.dirname(module.__file__)}
    run = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def rotated_by_hand(x_THE, angle):
    """Complex numbers: pair (i, i + E/2) times e^(i angle)."""
    a, b = x_THE.chunk(2, -1)
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), -1)


def test_rotate():
    """Values and gradients."""
    x, grad, angle = (torch.randn(*size, dtype=torch.double) for size in ((5, 3, 8), (5, 3, 8), (5, 1, 4)))
    mine, wanted = (x.clone().requires_grad_() for _ in range(2))
    out, by_hand = rotate(mine, angle.cos(), angle.sin()), rotated_by_hand(wanted, angle)
    out.backward(grad)
    by_hand.backward(grad)
    assert (out - by_hand).abs().max() < 1e-12 and (mine.grad - wanted.grad).abs().max() < 1e-12


@pytest.mark.parametrize("known", [None, torch.empty(0)])
def test_token_logprobs_of_no_rows(known):
    """A rank without rows to train on still takes part in the backward pass, with zeros."""
    hidden_RD, weight_VD = torch.randn(0, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    logp_R, entropy_R = token_logprobs(hidden_RD, weight_VD, torch.empty(0, dtype=torch.long), 1.0, known)
    logp_R.sum().backward()
    assert logp_R.shape == entropy_R.shape == (0,) and torch.equal(weight_VD.grad, torch.zeros(50, 8))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_token_logprobs_refuses_temperature(temperature):
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1, dtype=torch.long), temperature)


# ----------------------------------------------------------------------------------------------------------- FSDP2


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("known_R", [None, torch.ones(5)], ids=["unknown", "known"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sharded_equals_whole(family, process_group, checkpointing, known_R):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    _, whole, folder = family
    ids_T, cu, max_len = packed([6, 11, 3], seed=5)
    rows_R = torch.tensor([2, 3, 4, 9, 12])

    def gradients(model):
        model.zero_grad()
        logp_R, entropy_R = model(ids_T, cu, max_len, ids_T[rows_R + 1], rows_R, 0.9, known_R)
        logp_R.sum().backward()
        full = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
        return [logp_R.detach(), entropy_R, *[g.clone() for g in full]]

    def sharded(policy):
        model = loaded(folder)
        model.checkpoint_activations = checkpointing
        mesh = init_device_mesh("cpu", (1,))
        for part in [*model.model.layers, model]:
            fully_shard(part, mesh=mesh, mp_policy=policy)
        return model

    wanted = gradients(whole)
    model = sharded(MixedPrecisionPolicy())
    for _ in range(2):  # the second round meets parameters that were resharded
        for got, want in zip(gradients(model), wanted):
            assert difference(got, want) < 1e-6 * max(1, want.abs().max())
    assert difference(model(ids_T, cu, max_len), whole(ids_T, cu, max_len)) < 1e-5
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for got, want in zip(gradients(sharded(half)), gradients(loaded(folder, torch.bfloat16))):
        assert difference(got, want) <= 0.02 * max(1, want.abs().max())


# ------------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_gib", [5, 1e-5])
def test_save_and_reload(family, tmp_path, dtype, max_shard_gib):
    """Bit-equal through our own reader and through transformers', which also computes the same logits from it."""
    _, model, _ = family
    save_folder(tmp_path, model.cfg, model.state_dict(), dtype=dtype, max_shard_gib=max_shard_gib)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_gib < 1)
    again = loaded(tmp_path, dtype)
    assert again.cfg.eos_token_ids == model.cfg.eos_token_ids
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert reference.dtype == dtype
    theirs = dict(reference.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], p.to(dtype)) and torch.equal(theirs[name], p.to(dtype))
    ids_T, cu, max_len = packed([17])
    with torch.no_grad():
        wanted = reference(ids_T[None]).logits[0]
    if dtype == torch.float32:
        assert torch.equal(again(ids_T, cu, max_len), model(ids_T, cu, max_len))
        assert difference(again(ids_T, cu, max_len), wanted) < 1e-4
    else:
        assert ((again(ids_T, cu, max_len) - wanted.float()).norm() / wanted.float().norm()).item() < 0.03


def test_reads_shards_and_a_repeated_tied_head(family, tmp_path):
    reference, model, _ = family
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    spare = load_file(shards[-1])
    spare["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if model.cfg.tie_word_embeddings:
        spare["lm_head.weight"] = torch.zeros(V, 48)
    save_file(spare, shards[-1])
    for name, p in loaded(tmp_path).named_parameters():
        assert torch.equal(p, dict(model.named_parameters())[name])


def test_written_configs(folder, tmp_path):
    """All end-of-sequence ids are written, and no sampling default of the folder that was read."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "config.json", eos_token_id=7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 7], "temperature": 0.1, "top_k": 3}')
    model = loaded(tmp_path)
    assert model.cfg.eos_token_ids == (7, 8)
    save_folder(tmp_path / "out", model.cfg, model.state_dict(), dtype=torch.bfloat16)
    config = json.loads((tmp_path / "out/config.json").read_text())
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert config["eos_token_id"] == generation["eos_token_id"] == [7, 8] and config["dtype"] == "bfloat16"
    assert not generation.keys() - {"bos_token_id", "eos_token_id", "pad_token_id"}
    assert ModelConfig.from_folder(tmp_path / "out").eos_token_ids == (7, 8)


def test_config_of_older_transformers():
    """rope_theta and rope_scaling at the top level, before version 5, mean the same as rope_parameters."""
    raw = FAMILIES["llama3-tied"].to_dict()
    new, scaling = ModelConfig.from_dict(raw), dict(raw.pop("rope_parameters"))
    old = ModelConfig.from_dict(raw | {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling})
    assert (new.rope_theta, new.rope_scaling) == (old.rope_theta, old.rope_scaling) and new.rope_scaling["factor"] == 8
    plain = ModelConfig.from_dict(raw | {"rope_theta": 5e5, "rope_scaling": None})
    assert plain.rope_theta == 5e5 and plain.rope_scaling is None


def test_forward_flops():
    """torch's own count of a forward pass whose attention is two whole matrix products: every key counts."""
    model = Model(ModelConfig.from_dict(FAMILIES["qwen3-tied"].to_dict()))
    ids_T, cu, max_len = packed([33])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids_T, cu, max_len)
    assert counter.get_total_flops() == forward_flops(model.cfg, tokens=33, context=33 * 33)


def test_init_weights():
    model = Model(ModelConfig.from_dict(FAMILIES["qwen2-tied"].to_dict())).init_weights()
    state = model.state_dict()
    assert abs(state["model.embed_tokens.weight"].std().item() - 0.02) < 1e-3
    assert state["model.layers.0.self_attn.q_proj.bias"].eq(0).all() and state["model.norm.weight"].eq(1).all()


# -------------------------------------------------------------------------------------------------------- bad input


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(message, function, *args, error=ValueError):
    """One line that says `message`."""
    with pytest.raises(error, match=message) as caught:
        function(*args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["no_such_folder", "./no/such", "/no/such", "a/b/c", "", __file__])
def test_unknown_folder(name):
    refused("neither a folder nor", resolve, name, error=FileNotFoundError)


def test_unknown_hub_name(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("'nobody/nothing' is neither a folder nor", resolve, "nobody/nothing", error=FileNotFoundError)


def test_hub_name_takes_only_what_is_needed(folder, monkeypatch):
    asked = {}
    monkeypatch.setattr(module, "snapshot_download", lambda name, **more: asked.update(more, name=name) or str(folder))
    assert resolve("Qwen/Qwen2.5-Math-1.5B") == folder and asked["name"] == "Qwen/Qwen2.5-Math-1.5B"
    assert "*.safetensors" in asked["allow_patterns"] and not {"*", "*.bin"} & set(asked["allow_patterns"])
    assert resolve(str(folder)) == folder


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(model_type="mistral"), "'mistral'"),
        (dict(model_type=None), "model_type None"),
        (dict(architectures=["Qwen2ForProcessRewardModel"]), "Qwen2ForProcessRewardModel"),
        (dict(use_sliding_window=True), "use_sliding_window"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "sliding"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (dict(attention_bias=True), "attention_bias"),
        (dict(quantization_config={"bits": 4}), "quantization_config"),
        (dict(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "'yarn'"),
        (dict(rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 4.0}), "'dynamic'"),
        (dict(rope_parameters={"rope_type": "llama3", "factor": 4.0}), "low_freq_factor is None"),
        (dict(rope_parameters={"rope_theta": "big"}), "rope_theta is 'big'"),
        (dict(hidden_size=None), "hidden_size is None"),
        (dict(vocab_size=-5), "vocab_size is -5"),
        (dict(num_hidden_layers="3"), "num_hidden_layers is '3'"),
        (dict(num_key_value_heads=4), "6 heads of 8 over 4 KV heads"),
        (dict(head_dim=7), "6 heads of 7"),
        (dict(eos_token_id="</s>"), "eos_token_id is '</s>'"),
    ],
)
def test_bad_config(copy, fields, message):
    edit(copy / "config.json", **fields)
    refused(message, ModelConfig.from_folder, copy)


def test_missing_or_damaged_config(copy):
    (copy / "config.json").write_text('{"model_type": "qwen2",')
    refused("config.json is not valid JSON", ModelConfig.from_folder, copy)
    (copy / "config.json").write_text("[]")
    refused("an object is wanted", ModelConfig.from_folder, copy)
    (copy / "config.json").unlink()
    refused("holds no config.json", ModelConfig.from_folder, copy, error=FileNotFoundError)


def test_missing_weights(copy, folder):
    (copy / "model.safetensors").unlink()
    refused("holds neither model.safetensors nor", load_weights, loaded(folder), copy, error=FileNotFoundError)


@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "text"])
def test_damaged_weights(copy, folder, damage):
    path = copy / "model.safetensors"
    data = path.read_bytes()
    wrong = {"truncated": data[: len(data) // 2], "header": b"\xff" * 64 + data[64:], "empty": b"", "text": b"oid sha"}
    path.write_bytes(wrong[damage])
    refused(r"model\.safetensors is damaged", load_weights, loaded(folder), copy)


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("model.norm.weight", None, r"lack tensor model\.norm\.weight"),
        ("lm_head.weight", None, r"lack tensor lm_head\.weight"),
        ("model.layers.9.mlp.up_proj.weight", torch.ones(2), r"unknown tensor model\.layers\.9"),
        ("model.norm.weight", torch.ones(47), r"model\.norm\.weight is F32 \[47\], .*\[48\] is wanted"),
        ("model.norm.weight", torch.ones(48, dtype=torch.int8), r"model\.norm\.weight is I8"),
    ],
)
def test_wrong_tensors_and_nothing_copied(copy, folder, name, tensor, message):
    state = load_file(copy / "model.safetensors")
    state.pop(name, None)
    state["model.embed_tokens.weight"] = torch.zeros(V, 48)
    save_file(state if tensor is None else state | {name: tensor}, copy / "model.safetensors")
    model = loaded(folder)
    refused(message, load_weights, model, copy)
    assert model.model.embed_tokens.weight.abs().sum() > 0


@pytest.mark.parametrize(
    "weight_map, message, error",
    [
        ({"a": "../copy2/model.safetensors"}, "bare", ValueError),
        ({"a": "/etc/model.safetensors"}, "bare", ValueError),
        ({"a": "sub/model.safetensors"}, "bare", ValueError),
        ({"a": "model.bin"}, "bare", ValueError),
        ({"a": 5}, "bare", ValueError),
        ({"a": "other.safetensors"}, "not in the folder", FileNotFoundError),
        ({}, "no weight_map", ValueError),
        (None, "no weight_map", ValueError),
    ],
)
def test_bad_index(copy, folder, weight_map, message, error):
    os.rename(copy / "model.safetensors", copy / "model-00001-of-00001.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(message, load_weights, loaded(folder), copy, error=error)


def test_refuses_a_tied_head_of_another_shape(copy):
    edit(copy / "config.json", tie_word_embeddings=True)
    state = load_file(copy / "model.safetensors") | {"lm_head.weight": torch.zeros(5, 48)}
    save_file(state, copy / "model.safetensors")
    refused(r"lm_head\.weight is F32 \[5, 48\]", loaded, copy)


def test_other_misuse(folder, tmp_path):
    model = loaded(folder)
    with torch.device("meta"):
        empty = Model(model.cfg)
    refused("meta device", load_weights, empty, folder)
    state = model.state_dict()
    refused(r"differs from its config in tensor lm_head\.weight", save_folder, tmp_path, model.cfg,
            {name: t for name, t in state.items() if name != "lm_head.weight"})  # fmt: skip
    refused("differs", save_folder, tmp_path, model.cfg, state | {"model.norm.weight": torch.ones(3)})


# -------------------------------------------------------------------------------------------------------------- CUDA


def cuda(test):
    """What only a CUDA machine can run: the flash kernels, against SDPA in fp32 on the same rounded inputs."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


def relative(got, wanted):
    return ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()


@cuda
@pytest.mark.parametrize("backend, H, K, E", [
    ("by_varlen", 12, 2, 128), ("by_varlen", 4, 4, 64), ("by_varlen", 6, 1, 32), ("by_sdpa", 12, 2, 128),
    ("by_flash_attn", 12, 2, 128), ("by_flash_attn", 28, 4, 128),
])  # fmt: skip
def test_packed_attention_equals_sdpa_in_fp32(backend, H, K, E):
    """Values and gradients of every backend, with grouped KV heads and sequences of one token."""
    if backend == "by_flash_attn":
        pytest.importorskip("flash_attn")
    torch.manual_seed(0)
    lengths = [1, 300, 17, 128, 1030]
    _, cu, max_len = packed(lengths, device="cuda")
    inputs = [torch.randn(sum(lengths), heads, E, device="cuda").bfloat16() for heads in (H, K, K)]
    grad, results = torch.randn(sum(lengths), H, E, device="cuda").bfloat16(), []
    for attend, dtype in ((getattr(module, backend), torch.bfloat16), (module.by_sdpa, torch.float32)):
        q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in inputs)
        out = attend(q, k, v, cu, max_len)
        out.backward(grad.to(dtype))
        results.append([out.detach(), q.grad, k.grad, v.grad])
    errors = [relative(got, wanted) for got, wanted in zip(*results)]
    print(f"{backend} {H} x {K} x {E}: relative errors of out, dq, dk, dv", *(f"{e:.2%}" for e in errors))
    assert max(errors) < 6e-3


@cuda
@pytest.mark.parametrize("H, E", [(12, 128), (2, 128), (7, 64), (6, 24)])
def test_rotate_on_cuda(H, E):
    """Heads that fill no power of two, and a head size that takes torch's operations; bf16 against fp32 on the CPU."""
    x, grad, angle = torch.randn(300, H, E).bfloat16(), torch.randn(300, H, E).bfloat16(), torch.randn(300, 1, E // 2) * 100
    mine, wanted = x.cuda().requires_grad_(), x.float().requires_grad_()
    out = rotate(mine, angle.cos().cuda(), angle.sin().cuda())
    out.backward(grad.cuda())
    rotate(wanted, angle.cos(), angle.sin()).backward(grad.float())
    assert relative(out.cpu(), rotate(wanted, angle.cos(), angle.sin())) < 3e-3
    assert relative(mine.grad.cpu(), wanted.grad) < 3e-3


@cuda
@pytest.mark.parametrize("R, V, D, chunk", [(65, 500, 32, 16), (3000, 151_936, 1536, 1024), (7, 4097, 64, 4096)])
@pytest.mark.parametrize("known", [False, True])
def test_token_logprobs_on_cuda(R, V, D, chunk, known):
    results = logprobs_both_ways(R, chunk, 0.8, torch.bfloat16, known, "cuda", V, D)
    for name, got, wanted in zip(("log-prob", "entropy", "d hidden", "d weight"), *results):
        print(f"{R} x {V}: {name} {difference(got, wanted):.1e} of {wanted.abs().max():.1e}, {relative(got, wanted):.1e}")
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
        token_logprobs(hidden_RD, weight_VD, targets_R, 1.0, known_R)[0].sum().backward()
        more.append(torch.cuda.max_memory_allocated() - before - hidden_RD.nbytes)
    print(" ".join(f"{x / 2**30:.3f}" for x in more), "GiB")
    assert max(more) - min(more) < 2**22
