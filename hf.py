"""
Hugging Face folders, in and out.

    config.json, generation_config.json    read_config, config_from_dict
    *.safetensors                          find_weights, read_weights, load_weights
    tokenizer.json                         load_tokenizer, stop_ids
    a whole folder                         resolve (a path or a name on the hub), save_folder

What the decoder in model.py would compute wrongly is refused before anything is copied, in one
line: which file and field or tensor, what was found, what is wanted.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads must not spin; read with torch

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from model import Model, ModelConfig

ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
# Fields that may be null, and what they are otherwise.
KINDS = dict(model_type=str, layer_types=list, rope_scaling=dict, rope_parameters=dict)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Fields of which the decoder knows one value. A file that lacks them means it.
FIXED = dict(hidden_act="silu", attention_bias=False, mlp_bias=False, quantization_config=None)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, an object is wanted")
    return value


def write_json(path: Path, value: dict) -> None:
    """Complete or not at all."""
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial_path, path)


# ------------------------------------------------------------------------------------------- config


def read_config(folder: str | Path) -> ModelConfig:
    """config.json, with the end-of-sequence ids of generation_config.json where there is one.

    Raises FileNotFoundError without a config.json, ValueError for anything that this decoder would
    compute wrongly: another architecture or rope type, sliding windows, quantized weights.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json, so it is not a model folder")
    cfg = config_from_dict(read_json(path), str(path))
    generation = path.with_name("generation_config.json")
    if generation.is_file():
        ids = cfg.eos_token_ids + eos_ids(read_json(generation), str(generation))
        cfg.eos_token_ids = tuple(dict.fromkeys(ids))
    return cfg


def config_from_dict(raw: dict, where: str = "config") -> ModelConfig:
    """The same from a dictionary with the keys of config.json; `where` names it in messages."""
    check_supported(raw, where)
    file_dtype(raw, where)
    family = raw["model_type"]
    size = partial(positive, raw, where, int)
    heads = size("num_attention_heads")
    default_head_dim = 128 if family == "qwen3" else size("hidden_size") // heads
    rope_theta, rope_scaling = read_rope(raw, where)
    cfg = ModelConfig(
        model_type=family,
        vocab_size=size("vocab_size"),
        hidden_size=size("hidden_size"),
        intermediate_size=size("intermediate_size"),
        num_hidden_layers=size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", default_head_dim),
        rms_norm_eps=positive(raw, where, float, "rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=size("max_position_embeddings"),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        eos_token_ids=eos_ids(raw, where),
        raw=raw,
    )
    if heads % cfg.num_key_value_heads or cfg.head_dim % 2:
        shape = f"{heads} heads of {cfg.head_dim} over {cfg.num_key_value_heads} KV heads"
        raise ValueError(f"{where}: {shape}, wanted whole groups of heads and an even head_dim")
    return cfg


def positive(source: dict, where: str, kind: type, key: str, default=None):
    """source[key], or the default where it is missing or null, as a positive int or float."""
    value = source.get(key)
    if value is None:
        value = default
    is_number = type(value) in (int, kind)  # type(), because True is an int too
    if not is_number or not 0 < value < math.inf:
        raise ValueError(f"{where}: {key} is {value!r}, a positive {kind.__name__} is wanted")
    return kind(value)


def check_supported(raw: dict, where: str) -> None:
    for key, kind in KINDS.items():
        if not isinstance(raw.get(key), kind | None):
            raise ValueError(f"{where}: {key} is {raw[key]!r}, a {kind.__name__} is wanted")
    family = raw.get("model_type")
    if family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{where}: model_type {family!r} is not supported, known are {known}")
    wanted = [ARCHITECTURES[family]]
    architectures = raw.get("architectures") or wanted
    if architectures != wanted:
        raise ValueError(f"{where}: architectures {architectures} is not supported, {wanted} is")
    has_other_layers = any(kind != "full_attention" for kind in raw.get("layer_types") or ())
    if raw.get("use_sliding_window") or has_other_layers:
        fields = "use_sliding_window, layer_types"
        raise ValueError(f"{where}: sliding-window attention ({fields}) is not supported")
    for key, value in FIXED.items():
        if raw.get(key, value) != value:
            raise ValueError(f"{where}: {key} is {raw[key]!r}, only {value!r} is supported")


def file_dtype(raw: dict, where: str = "config") -> torch.dtype:
    """What the folder's weights are stored in: `dtype`, which was torch_dtype before version 5."""
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if name not in DTYPES:
        raise ValueError(f"{where}: dtype is {name!r}, known are {', '.join(DTYPES)}")
    return DTYPES[name]


def read_rope(raw: dict, where: str) -> tuple[float, dict | None]:
    """(rope_theta, the llama3 parameters or None). transformers 5 writes rope_parameters with
    everything inside; before, rope_theta stood beside rope_scaling."""
    rope = {"rope_theta": raw.get("rope_theta")}
    rope |= raw.get("rope_scaling") or {}
    rope |= raw.get("rope_parameters") or {}
    theta = positive(rope, where, float, "rope_theta", 10_000)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"{where}: rope type {kind!r} is not supported, default and llama3 are")
    # As in transformers: the top level counts more than rope's own, and the context stands in.
    original = "original_max_position_embeddings"
    rope[original] = raw.get(original) or rope.get(original) or raw.get("max_position_embeddings")
    keys = ("factor", "low_freq_factor", "high_freq_factor", original)
    return theta, {key: positive(rope, where, float, key) for key in keys}


def eos_ids(raw: dict, where: str) -> tuple[int, ...]:
    value = raw.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if any(type(i) is not int for i in ids):
        raise ValueError(f"{where}: eos_token_id is {value!r}, a list of integers is wanted")
    return tuple(ids)


# ------------------------------------------------------------------------------------- reading


def resolve(name_or_folder: str) -> Path:
    """A folder as it is; `owner/name` is downloaded from the hub (weights, json and tokenizer files
    only) or found in its local cache. Raises FileNotFoundError when it is neither."""
    folder = Path(name_or_folder).expanduser()
    if name_or_folder and folder.is_dir():
        return folder
    problem = f"model {name_or_folder!r} is neither a folder nor"
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name_or_folder):
        raise FileNotFoundError(f"{problem} an owner/name on the hub")
    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(name_or_folder, allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise FileNotFoundError(f"{problem} a hub model within reach ({reason})") from None


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


@torch.no_grad()
def load_weights(model: Model, folder: str | Path) -> None:
    """Copies the folder's weights into the model's own tensors, cast to their dtype."""
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("the model is on the meta device, memory for weights is wanted (to_empty)")
    parameters = dict(model.named_parameters())
    for name, tensor in read_weights(model, folder):
        parameters[name].copy_(tensor)


def read_weights(model: Model, folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) one at a time, in the model's order, after find_weights has checked all."""
    shards = find_weights(model, folder)
    return ((name, shards[name][1].get_tensor(name)) for name, _ in model.named_parameters())


def find_weights(model: Model, folder: str | Path) -> dict:
    """{name: (path, open shard)} of the tensors of the model, which may be on the meta device.

    Reads headers alone (and a tied head that the files repeat). FileNotFoundError for a missing
    file; ValueError for a damaged one, and for missing, unexpected or wrong tensors.
    """
    shards = {}
    for path in weight_files(Path(folder)):
        try:
            shard = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None
        # Old Llama files hold the rotary frequencies, which follow from the config.
        names = shard.keys()
        names = [name for name in names if not name.endswith("rotary_emb.inv_freq")]
        shards |= dict.fromkeys(names, (path, shard))
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    repeats_head = HEAD in shards and HEAD not in shapes
    if repeats_head:
        shapes[HEAD] = shapes[EMBEDDING]
    missing, unknown = shapes.keys() - shards, shards.keys() - shapes
    for problem, names in (("lack", missing), ("hold the unknown", unknown)):
        if names:
            first = f"{min(names)} ({len(names)} such)"
            raise ValueError(f"weights in {folder} {problem} tensor {first}")
    for name, shape in shapes.items():
        path, shard = shards[name]
        header = shard.get_slice(name)
        dtype, stored = header.get_dtype(), header.get_shape()
        if stored != shape or dtype not in ("F32", "F16", "BF16"):
            wanted = f"floating point {shape} is wanted by config.json"
            raise ValueError(f"{path}: {name} is {dtype} {stored}, {wanted}")
    if repeats_head:
        head, embedding = (shards[name][1].get_tensor(name) for name in (HEAD, EMBEDDING))
        if not (head == embedding).all():
            problem = f"{HEAD} is not {EMBEDDING}, as config.json's tie_word_embeddings wants"
            raise ValueError(f"{shards[HEAD][0]}: {problem}")
    return shards


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json names."""
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(f"{folder} holds neither {single.name} nor {index.name}")
    weight_map = read_json(index).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        # An index is input like any other: it must not reach outside its folder.
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise ValueError(f"{index} names {name!r}, a bare *.safetensors name is wanted")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{index} names the shard {name}, which is not in the folder")
    return [folder / name for name in names]


def load_tokenizer(folder: str | Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer exactly as the folder's tokenizer.json says. (AutoTokenizer of transformers 5
    picks a class by the model's type, and Qwen2's puts a splitting rule of its own in its place.)

    Raises FileNotFoundError, or ValueError for damage and for ids that the model does not know."""
    path = Path(folder, "tokenizer.json")
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no tokenizer.json")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{path} is damaged: {first_line(error)}") from None
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab_size:
        limit = f"the model's vocabulary ends before {vocab_size}"
        raise ValueError(f"{path} has ids up to {highest}, {limit}")
    return tokenizer


def stop_ids(tokenizer, eos_ids: Iterable[int] = ()) -> tuple[int, ...]:
    """Every id that ends a response: the model's, and the ends of turn that this tokenizer knows.
    The config of Qwen2.5-Math names <|endoftext|> alone, while a ChatML turn ends in <|im_end|>."""
    ends = {"<|im_end|>", "<|eot_id|>", tokenizer.eos_token}
    tokens = tokenizer.added_tokens_decoder.items()
    known = {i for i, token in tokens if str(token) in ends}
    return tuple(sorted(known | set(eos_ids)))


# ------------------------------------------------------------------------------------------ writing


def save_folder(
    folder: str | Path,
    cfg: ModelConfig,
    state: dict[str, Tensor],
    tokenizer=None,
    dtype: torch.dtype | None = None,
    max_shard_gib: float = 5,
) -> None:
    """Writes a folder that transformers loads: weights (dtype None keeps the state's own), configs
    with the end-of-sequence ids and no sampling defaults, and the tokenizer if given. The caller
    writes to a fresh folder and renames it when complete. Raises ValueError unless names and shapes
    of the state are cfg's."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = Model(cfg)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    given = {name: tensor.shape for name, tensor in state.items()}
    wrong = {name for name, _ in wanted.items() ^ given.items()}
    if wrong:
        first = f"{min(wrong)} ({len(wrong)} such)"
        raise ValueError(f"state to save differs from its config in tensor {first}")
    dtype = dtype or state["model.norm.weight"].dtype
    # Planned by tensors without memory, so that only one shard at a time is cast.
    plan = split_torch_state_dict_into_shards(
        model.to(dtype).state_dict(),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=int(max_shard_gib * 2**30),
    )
    for file, names in plan.filename_to_tensors.items():
        shard = {name: state[name].detach().to("cpu", dtype).contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    ids = {"eos_token_id": list(cfg.eos_token_ids) or None}
    if len(cfg.eos_token_ids) == 1:
        ids = {"eos_token_id": cfg.eos_token_ids[0]}
    name = str(dtype).removeprefix("torch.")
    kind = {"architectures": [ARCHITECTURES[cfg.model_type]], "dtype": name, "torch_dtype": name}
    write_json(folder / "config.json", cfg.raw | kind | ids)
    kept = {key: cfg.raw.get(key) for key in ("bos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", kept | ids)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
