"""
The embedded base models: a tokenizer of characters, a small Qwen2, and a short supervised phase on
worked solutions.

It stands in for a pretrained model where none can be downloaded, so that `python train.py` runs the
whole path: what it leaves behind is a normal Hugging Face folder, and nothing after it knows that
the model was made here. The corpus is like the web's: most worked solutions are right, some slip in
a step and go on from the slip. A model trained on it knows how to do every step and does not always
do it: what reinforcement learning can mend.
"""

import hashlib
import json
import os
import random
import re
import shutil
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from tokenizers import AddedToken
from tqdm import tqdm
from transformers import Qwen2Tokenizer

from hf import config_from_dict, save_folder
from model import Model, ModelConfig, pack
from tasks.arithmetic import OPERATIONS, arithmetic

# What decides the weights; a change gives another folder, so a cached base is never stale.
# `version` stands for the code of this file and of tasks/arithmetic.py: raise it when they change.
# `slip` and `sure`: see with_slips; solutions with slips are read from step `slips_from` on.
RECIPES = {
    # For a first look, on two cores in a minute: a response is one line per operation.
    "tiny": dict(
        shape=dict(
            hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=3,
            num_key_value_heads=1, max_position_embeddings=256, rope_theta=10000.0,
        ),
        corpus=dict(
            levels=(1, 7), problems=9000, seeds=3, whole_lines=False,
            slip=0.12, sure=0, slips_from=620,
        ),
        batch=64, steps=750, lr=3e-3, warmup=50, bf16=False, seed=0, version=3,
    ),
    # For measurements, on a GPU in a minute: every line is the whole expression with one operation
    # less, so that lengths go from 50 to 800 tokens, and slips come late: short problems are nearly
    # sure, long ones nearly hopeless.
    "small": dict(
        shape=dict(
            hidden_size=768, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=12,
            num_key_value_heads=2, max_position_embeddings=2048, rope_theta=10000.0,
        ),
        corpus=dict(
            levels=(2, 18), problems=51000, seeds=1, whole_lines=True,
            slip=0.04, sure=4, slips_from=850,
        ),
        batch=128, steps=1000, lr=1e-3, warmup=100, bf16=True, seed=0, version=1,
    ),
}


def character_tokenizer(name: str = "tiny") -> Qwen2Tokenizer:
    r"""
    One token per printable ASCII character, one for newline and one for `\boxed{`; the rest of
    Unicode has none.

    The class is Qwen2's because `AutoTokenizer` picks it for a Qwen2 folder whatever the folder
    says, and cuts text by its own rule; a byte-level vocabulary without merges, spelled in that
    alphabet, comes back the same from every loader.
    """
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    # Byte-level vocabularies spell newline and space as these two letters.
    characters = ["\u010a", "\u0120", *map(chr, range(33, 127))]
    words = [*special, "\\boxed{", *characters]
    tokenizer = Qwen2Tokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token=None,
        eos_token=special[0], pad_token=special[0], additional_special_tokens=special[1:],
        model_max_length=RECIPES[name]["shape"]["max_position_embeddings"],
    )
    tokenizer.add_tokens([AddedToken("\\boxed{", special=False, normalized=False)])
    return tokenizer


def base_config(name: str, tokenizer) -> ModelConfig:
    raw = RECIPES[name]["shape"] | dict(
        model_type="qwen2", architectures=["Qwen2ForCausalLM"], vocab_size=len(tokenizer),
        rms_norm_eps=1e-6, hidden_act="silu", tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )
    return config_from_dict(raw)


def with_slips(solution: str, rate: float, sure: int, rng: random.Random) -> str:
    r"""
    The worked solution, where the result of line j = 0, 1, ... is off by a little with probability
    `rate` x (j - sure), and the lines after it go on from the slip: consistent to the end, and
    wrong. Long solutions go astray far more often.

    >>> with_slips("7+5=12\n12*3=36\n\\boxed{36}", 0.0, 0, random.Random(0))
    '7+5=12\n12*3=36\n\\boxed{36}'
    """
    lines = []
    value = None
    for number, step in enumerate(solution.split("\n")[:-1]):
        left, sign, right = re.fullmatch(r"(\d+)([-+*])(\d+)=\d+", step).groups()
        if value is None:
            value = int(left)
        result = OPERATIONS[sign](value, int(right))
        if rng.random() < rate * (number - sure):
            result = max(0, result + rng.choice((-10, -2, -1, 1, 2, 10)))
        lines.append(f"{value}{sign}{right}={result}")
        value = result
    lines.append(f"\\boxed{{{value}}}")
    return "\n".join(lines)


def in_whole_lines(solution: str) -> str:
    r"""
    The same steps, each written as the expression that is left: the length grows with the square of
    the level.

    >>> in_whole_lines("7+5=12\n12*3=36\n36-1=35\n\\boxed{35}")
    '(12*3)-1\n36-1\n35\n\\boxed{35}'
    """
    *steps, boxed = solution.split("\n")
    operations = [re.fullmatch(r"-?\d+(.\d+)=.*", step)[1] for step in steps]
    lines = []
    for number, step in enumerate(steps, 1):
        _, _, line = step.partition("=")
        for i, operation in enumerate(operations[number:]):
            if i > 0:
                line = f"({line})"
            line += operation
        lines.append(line)
    return "\n".join([*lines, boxed])


def worked_solutions(corpus: dict, tokenizer, rng: random.Random) -> dict[int, list[tuple]]:
    """Level: [(prompt, right response, response with slips), ...], token ids each."""
    solutions = defaultdict(list)
    end = [tokenizer.eos_token_id]
    for seed in range(corpus["seeds"]):
        examples = arithmetic(seed, corpus["problems"], corpus["levels"])
        texts = []
        for example in examples:
            texts.append(example.text)
            for rate in (0.0, corpus["slip"]):
                response = with_slips(example.solution, rate, corpus["sure"], rng)
                if corpus["whole_lines"]:
                    response = in_whole_lines(response)
                texts.append(response)
        ids = iter(tokenizer(texts).input_ids)  # in one call: it has threads
        for example, prompt, right, slipped in zip(examples, ids, ids, ids):
            solutions[example.level].append((prompt, right + end, slipped + end))
    return solutions


def train(model: Model, solutions: dict[int, list[tuple]], recipe: dict, rng, device):
    """Returns the optimizer's weights in fp32, in the order of model.parameters(), and the loss."""
    masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    # The model is a copy of them in the precision of the work.
    if recipe["bf16"] and device.type == "cuda":
        model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(masters, recipe["lr"], betas=(0.9, 0.98), weight_decay=0.01)
    seconds = 1.0 if sys.stderr.isatty() else 15.0  # between two updates of the bar
    steps = range(recipe["steps"])
    bar = tqdm(steps, desc="base model (once)", unit="step", mininterval=seconds)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, recipe)
        prompts, responses = draw_batch(step, solutions, recipe, rng)
        packed = pack(prompts, responses, device)
        scores = model(packed.ids_T, packed.cu, packed.max_len, packed.targets_R, packed.rows_R)
        loss = -scores.logp_R.mean()
        loss.backward()
        for master, p in zip(masters, model.parameters()):
            master.grad = p.grad.float()
            p.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for master, p in zip(masters, model.parameters()):
                p.copy_(master)
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return masters, loss.item()


def lr_at(step: int, recipe: dict) -> float:
    """Warm-up, then linear to a tenth."""
    warmup = (step + 1) / recipe["warmup"]
    decay = 1.0 - 0.9 * step / recipe["steps"]
    return recipe["lr"] * min(warmup, decay)


def draw_batch(step: int, solutions, recipe: dict, rng) -> tuple[list, list]:
    """
    Prompts and responses of a step, short problems first: what is copied and computed in one line
    is learned there, and cheaply.
    """
    low, high = recipe["corpus"]["levels"]
    hardest = min(high, low + 1 + round((high - low - 1) * step / (recipe["steps"] / 2)))
    prompts, responses = [], []
    for _ in range(recipe["batch"]):
        prompt, right, slipped = rng.choice(solutions[rng.randint(low, hardest)])
        prompts.append(prompt)
        responses.append(right if step < recipe["corpus"]["slips_from"] else slipped)
    return prompts, responses


def base_model(name: str, out: Path, device) -> Path:
    """The base model's folder under `out`, made first (with a progress bar) if it is not there."""
    recipe = RECIPES[name]
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
    folder = out / f"base-{name}-{digest}"
    if (folder / "config.json").is_file():
        return folder
    if recipe["bf16"] and device.type == "cpu":
        note = "made for a GPU, where it takes a minute; here it takes hours"
        print(f"base model {name}: {note}", file=sys.stderr)
    torch.manual_seed(recipe["seed"])
    rng = random.Random(recipe["seed"])
    tokenizer = character_tokenizer(name)
    cfg = base_config(name, tokenizer)
    model = Model(cfg).init_weights().to(device)  # drawn on the CPU: CUDA's would be others
    solutions = worked_solutions(recipe["corpus"], tokenizer, rng)
    begun = time.time()
    masters, loss = train(model, solutions, recipe, rng, device)
    names = [key for key, _ in model.named_parameters()]
    weights = {name: p.detach().cpu() for name, p in zip(names, masters)}
    parameters = sum(p.numel() for p in masters)
    count = sum(map(len, solutions.values()))
    print(
        f"base model: {parameters:,} parameters, {count:,} worked solutions, "
        f"loss {loss:.3f} per token, {time.time() - begun:.0f} s -> {folder}"
    )

    # Two runs may make the same base at once: the first one counts.
    partial = out / f"{folder.name}.{os.getpid()}.tmp"
    save_folder(partial, cfg, weights, tokenizer)
    try:
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial)
        if not folder.exists():
            raise
    return folder
