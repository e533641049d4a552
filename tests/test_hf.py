"""
hf.py: folders written and read, against transformers and against damage. Whatever the decoder would
compute wrongly is refused in one line that names file and field.
"""

import json
import os
import shutil

import pytest
import test_model
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from test_model import FAMILIES, difference, loaded, packed, randomize
from transformers import AutoConfig, AutoModelForCausalLM

import hf
from hf import (
    config_from_dict,
    file_dtype,
    load_tokenizer,
    load_weights,
    read_config,
    resolve,
    save_folder,
    stop_ids,
    write_json,
)
from model import Model, rope_tables
from tasks import base

family = test_model.family  # the fixture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small untied folder to damage copies of."""
    folder = tmp_path_factory.mktemp("small")
    randomize(AutoModelForCausalLM.from_config(FAMILIES["qwen2-untied"])).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


# -------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_gib", [5, 1e-5])
def test_save_and_reload(family, tmp_path, dtype, max_shard_gib):
    """Bit-equal through our own reader and through transformers', which also computes the same
    logits from it."""
    _, model, _ = family
    save_folder(tmp_path, model.cfg, model.state_dict(), dtype=dtype, max_shard_gib=max_shard_gib)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_gib < 1)
    again = loaded(tmp_path, dtype)
    assert again.cfg.eos_token_ids == model.cfg.eos_token_ids
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert reference.dtype == dtype
    theirs = dict(reference.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], p.to(dtype)) and torch.equal(
            theirs[name], p.to(dtype)
        )
    ids_T, cu, max_len = packed([17])
    with torch.no_grad():
        wanted = reference(ids_T[None]).logits[0]
    if dtype == torch.float32:
        assert torch.equal(again(ids_T, cu, max_len), model(ids_T, cu, max_len))
        assert difference(again(ids_T, cu, max_len), wanted) < 1e-4
    else:
        assert (
            (again(ids_T, cu, max_len) - wanted.float()).norm() / wanted.float().norm()
        ).item() < 0.03


def test_reads_shards_and_a_repeated_tied_head(family, tmp_path):
    reference, model, _ = family
    reference.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    spare = load_file(shards[-1])
    spare["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if model.cfg.tie_word_embeddings:
        spare["lm_head.weight"] = model.model.embed_tokens.weight.detach().clone()
    save_file(spare, shards[-1])
    for name, p in loaded(tmp_path).named_parameters():
        assert torch.equal(p, dict(model.named_parameters())[name])


def test_written_configs(folder, tmp_path):
    """All end-of-sequence ids are written, and no sampling default of the folder that was read."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "config.json", eos_token_id=7)
    (tmp_path / "generation_config.json").write_text(
        '{"eos_token_id": [8, 7], "temperature": 0.1, "top_k": 3}'
    )
    model = loaded(tmp_path)
    assert model.cfg.eos_token_ids == (7, 8)
    save_folder(tmp_path / "out", model.cfg, model.state_dict(), dtype=torch.bfloat16)
    config = json.loads((tmp_path / "out/config.json").read_text())
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert (
        config["eos_token_id"] == generation["eos_token_id"] == [7, 8]
        and config["dtype"] == "bfloat16"
    )
    assert not generation.keys() - {"bos_token_id", "eos_token_id", "pad_token_id"}
    assert read_config(tmp_path / "out").eos_token_ids == (7, 8)


def test_config_of_older_transformers():
    """rope_theta and rope_scaling at the top level, before version 5, mean the same as
    rope_parameters."""
    raw = FAMILIES["llama3-tied"].to_dict()
    new, scaling = config_from_dict(raw), dict(raw.pop("rope_parameters"))
    old = config_from_dict(raw | {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling})
    assert (new.rope_theta, new.rope_scaling) == (
        old.rope_theta,
        old.rope_scaling,
    ) and new.rope_scaling["factor"] == 8
    plain = config_from_dict(raw | {"rope_theta": 5e5, "rope_scaling": None})
    assert plain.rope_theta == 5e5 and plain.rope_scaling is None


def test_llama3_context_on_the_top_level(tmp_path):
    """original_max_position_embeddings beside rope_parameters was overlooked, and the whole context
    taken in its place: other frequencies. In transformers the top level counts more."""
    original = "original_max_position_embeddings"
    raw = FAMILIES["llama3-tied"].to_dict()
    llama3 = {key: value for key, value in raw.pop("rope_parameters").items() if key != original}
    cases = [
        ({original: 32}, {}, 32),
        ({original: 32}, {original: 64}, 32),
        ({}, {original: 64}, 64),
        ({}, {}, 128),
    ]
    for top, inside, wanted in cases:
        for name in ("rope_parameters", "rope_scaling"):
            write_json(tmp_path / "config.json", raw | top | {name: llama3 | inside})
            cfg = read_config(tmp_path)
            theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
            cos, _ = rope_tables(cfg, torch.ones(1))
            assert cfg.rope_scaling[original] == wanted
            assert difference(cos[0, 0], theirs.model.rotary_emb.inv_freq.cos()) < 1e-6
    edit(tmp_path / "config.json", **{original: -3})
    refused(f"{original} is -3", read_config, tmp_path)


def test_dtype_of_the_file():
    """An unknown one was found at the last export, hours later: a run is refused at its start."""
    assert file_dtype({}) == file_dtype({"dtype": None}) == torch.float32
    assert file_dtype({"torch_dtype": "float16"}) == torch.float16
    assert file_dtype({"dtype": "bfloat16", "torch_dtype": "float32"}) == torch.bfloat16
    refused("config: dtype is 'int8'", file_dtype, {"torch_dtype": "int8"})


def test_json_is_complete_or_not_there(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, "\u00e9"]})
    assert json.loads(path.read_text()) == {"a": [1, "\u00e9"]} and os.listdir(tmp_path) == [
        "a.json"
    ]
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [1, "\u00e9"]}


# --------------------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folder with the characters' tokenizer and a tiny random model, the tokenizer)"""
    path, tokenizer = tmp_path_factory.mktemp("model") / "tiny", base.character_tokenizer()
    cfg = base.base_config("tiny", tokenizer)
    torch.manual_seed(0)
    save_folder(path, cfg, dict(Model(cfg).init_weights().named_parameters()), tokenizer)
    return path, tokenizer


def test_tokenizer_is_the_one_of_the_folder(tiny):
    """AutoTokenizer gave a Qwen2 folder Qwen2's splitting rule whatever its tokenizer.json said,
    and newlines were lost."""
    folder, tokenizer = tiny
    again = load_tokenizer(folder, len(tokenizer))
    assert again.encode("12*3\n\\boxed{36}") == tokenizer.encode("12*3\n\\boxed{36}")
    assert stop_ids(again) == stop_ids(tokenizer)


def test_stop_ids(tiny):
    _, tokenizer = tiny
    ids = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert stop_ids(tokenizer) == tuple(sorted(ids))
    assert stop_ids(tokenizer, [7, *ids]) == tuple(sorted([7, *ids]))


def test_missing_or_damaged_tokenizer(tiny, tmp_path):
    folder, _ = tiny
    copy = shutil.copytree(folder, tmp_path / "copy")
    refused("ids up to 99, the model's vocabulary ends before 90", load_tokenizer, copy, 90)
    (copy / "tokenizer.json").write_bytes(b"{")
    refused("tokenizer.json is damaged", load_tokenizer, copy, 100)
    (copy / "tokenizer.json").unlink()
    refused("holds no tokenizer.json", load_tokenizer, copy, 100, error=FileNotFoundError)


# ---------------------------------------------------------------------------------------- bad input


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
    refused(
        "'nobody/nothing' is neither a folder nor",
        resolve,
        "nobody/nothing",
        error=FileNotFoundError,
    )


def test_hub_name_takes_only_what_is_needed(folder, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        hf, "snapshot_download", lambda name, **more: asked.update(more, name=name) or str(folder)
    )
    assert resolve("Qwen/Qwen2.5-Math-1.5B") == folder and asked["name"] == "Qwen/Qwen2.5-Math-1.5B"
    assert "*.safetensors" in asked["allow_patterns"] and not {"*", "*.bin"} & set(
        asked["allow_patterns"]
    )
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
        (dict(model_type={}), "model_type is {}, a str is wanted"),
        (dict(layer_types=3), "layer_types is 3, a list is wanted"),
        (dict(rope_parameters=[1]), r"rope_parameters is \[1\], a dict is wanted"),
        (dict(rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
        (dict(rope_parameters={"rope_theta": float("inf")}), "rope_theta is inf"),
        (dict(dtype="float64"), "dtype is 'float64', known are float32, bfloat16, float16"),
        (dict(dtype=None, torch_dtype="bf16"), "dtype is 'bf16'"),
        (dict(dtype="weight"), "dtype is 'weight'"),
    ],
)
def test_bad_config(copy, fields, message):
    edit(copy / "config.json", **fields)
    refused(message, read_config, copy)


def test_missing_or_damaged_config(copy):
    (copy / "config.json").write_text('{"model_type": "qwen2",')
    refused("config.json is not valid JSON", read_config, copy)
    (copy / "config.json").write_text("[]")
    refused("an object is wanted", read_config, copy)
    (copy / "config.json").unlink()
    refused("holds no config.json", read_config, copy, error=FileNotFoundError)


def test_missing_weights(copy, folder):
    (copy / "model.safetensors").unlink()
    refused(
        "holds neither model.safetensors nor",
        load_weights,
        loaded(folder),
        copy,
        error=FileNotFoundError,
    )


@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "text"])
def test_damaged_weights(copy, folder, damage):
    path = copy / "model.safetensors"
    data = path.read_bytes()
    wrong = {
        "truncated": data[: len(data) // 2],
        "header": b"\xff" * 64 + data[64:],
        "empty": b"",
        "text": b"oid sha",
    }
    path.write_bytes(wrong[damage])
    refused(r"model\.safetensors is damaged", load_weights, loaded(folder), copy)


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("model.norm.weight", None, r"lack tensor model\.norm\.weight"),
        ("lm_head.weight", None, r"lack tensor lm_head\.weight"),
        ("model.layers.9.mlp.up_proj.weight", torch.ones(2), r"unknown tensor model\.layers\.9"),
        (
            "model.norm.weight",
            torch.ones(47),
            r"model\.norm\.weight is F32 \[47\], .*\[48\] is wanted",
        ),
        ("model.norm.weight", torch.ones(48, dtype=torch.int8), r"model\.norm\.weight is I8"),
    ],
)
def test_wrong_tensors_and_nothing_copied(copy, folder, name, tensor, message):
    state = load_file(copy / "model.safetensors")
    state.pop(name, None)
    state["model.embed_tokens.weight"] = torch.zeros(test_model.V, 48)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_head_that_is_another(copy, dtype):
    """
    The flag says that head and embedding are one, the file holds two. The head was dropped without
    a word, and logits were off by 19. An equal one is accepted, of whatever dtype.
    """
    edit(copy / "config.json", tie_word_embeddings=True)
    state = load_file(copy / "model.safetensors")
    refused(r"lm_head\.weight is not model\.embed_tokens\.weight", loaded, copy)
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].bfloat16().float()
    head = state["model.embed_tokens.weight"].to(dtype, copy=True)
    save_file(state | {"lm_head.weight": head.clone()}, copy / "model.safetensors")
    assert torch.equal(loaded(copy).head, state["model.embed_tokens.weight"])
    head[-1, -1] += 0.5
    save_file(state | {"lm_head.weight": head}, copy / "model.safetensors")
    refused(r"model\.safetensors: lm_head\.weight is not", loaded, copy)


def test_other_misuse(folder, tmp_path):
    model = loaded(folder)
    with torch.device("meta"):
        empty = Model(model.cfg)
    refused("meta device", load_weights, empty, folder)
    state = model.state_dict()
    headless = {name: t for name, t in state.items() if name != "lm_head.weight"}
    message = r"differs from its config in tensor lm_head\.weight"
    refused(message, save_folder, tmp_path, model.cfg, headless)
    refused(
        "differs", save_folder, tmp_path, model.cfg, state | {"model.norm.weight": torch.ones(3)}
    )
