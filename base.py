"""
The embedded base models: a tokenizer of characters, a small Qwen2, and a short supervised phase on worked solutions.

It stands in for a pretrained model where none can be downloaded, so that `python train.py` runs the whole path: what it
leaves behind is a normal Hugging Face folder, and nothing after it knows that the model was made here. The corpus is like
the web's: most worked solutions are right, some slip in a step and go on from the slip. A model trained on it knows how
to do every step and does not always do it: what reinforcement learning can mend.
"""

import hashlib
import itertools
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

from data import arithmetic
from model import Model, ModelConfig, save_folder

# What decides the weights; a change gives another folder, so a cached base is never stale. `version` stands for the code of
# this file and of data.expression: raise it when they change.
#   tiny    for a first look, on two cores in a minute: a response is one line per operation
#   small   for measurements, on a GPU in a minute: every line is the whole expression with one operation less, so that
#           lengths go from 50 to 800 tokens, and slips come late: short problems are nearly sure, long ones nearly hopeless
RECIPES = dict(
    tiny=dict(
        shape=dict(hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1,
                   max_position_embeddings=256, rope_theta=10000.0),
        corpus=dict(levels=(1, 7), problems=9000, seeds=3, whole_lines=False, slip=0.12, sure=0, slips_from=620),
        batch=64, steps=750, lr=3e-3, warmup=50, bf16=False, seed=0, version=3,
    ),
    small=dict(
        shape=dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=12, num_key_value_heads=2,
                   max_position_embeddings=2048, rope_theta=10000.0),
        corpus=dict(levels=(2, 18), problems=51000, seeds=1, whole_lines=True, slip=0.04, sure=4, slips_from=850),
        batch=128, steps=1000, lr=1e-3, warmup=100, bf16=True, seed=0, version=1,
    ),
)


def character_tokenizer(name: str = "tiny") -> Qwen2Tokenizer:
    """
    One token per printable ASCII character, one for newline and one for `\\boxed{`; the rest of Unicode has none.

    The class is Qwen2's because `AutoTokenizer` picks it for a Qwen2 folder whatever the folder says, and cuts text by its
    own rule; a byte-level vocabulary without merges, spelled in that alphabet, comes back the same from every loader.
    """
    spelled = {"\n": "\u010a", " ": "\u0120"}
    characters = ["\n", *map(chr, range(32, 127))]
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "\\boxed{", *(spelled.get(c, c) for c in characters)]
    tokenizer = Qwen2Tokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token=None, eos_token=words[0], pad_token=words[0],
        additional_special_tokens=words[1:3], model_max_length=RECIPES[name]["shape"]["max_position_embeddings"],
    )
    tokenizer.add_tokens([AddedToken(words[3], special=False, normalized=False)])
    return tokenizer


def base_config(name: str, tokenizer) -> ModelConfig:
    return ModelConfig.from_dict(dict(
        RECIPES[name]["shape"], model_type="qwen2", architectures=["Qwen2ForCausalLM"], vocab_size=len(tokenizer),
        rms_norm_eps=1e-6, hidden_act="silu", tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    ))


def with_slips(solution: str, rate: float, sure: int, rng: random.Random) -> str:
    """
    The worked solution, where the result of line j = 0, 1, ... is off by a little with probability `rate` x (j - sure), and
    the lines after it go on from the slip: consistent to the end, and wrong. Long solutions go astray far more often.

    >>> with_slips("7+5=12\\n12*3=36\\n\\\\boxed{36}", 0.0, 0, random.Random(0))
    '7+5=12\\n12*3=36\\n\\\\boxed{36}'
    """
    lines, value = [], None
    for number, line in enumerate(solution.split("\n")[:-1]):
        left, _ = line.split("=")
        operator = next(c for c in left if c in "+-*")
        a, b = left.split(operator)
        a = int(a) if value is None else value
        value = {"+": a + int(b), "-": a - int(b), "*": a * int(b)}[operator]
        if rng.random() < rate * (number - sure):
            value = max(0, value + rng.choice((-10, -2, -1, 1, 2, 10)))
        lines.append(f"{a}{operator}{b}={value}")
    return "\n".join([*lines, f"\\boxed{{{value}}}"])


def in_whole_lines(solution: str) -> str:
    """
    The same steps, each written as the expression that is left: the length grows with the square of the level.

    >>> in_whole_lines("7+5=12\\n12*3=36\\n36-1=35\\n\\\\boxed{35}")
    '(12*3)-1\\n36-1\\n35\\n\\\\boxed{35}'
    """
    *steps, boxed = solution.split("\n")
    operations, lines = [re.fullmatch(r"-?\d+(.\d+)=.*", step)[1] for step in steps], []
    for done, step in enumerate(steps, 1):
        line = step.partition("=")[2]
        for i, operation in enumerate(operations[done:]):
            line = f"({line}){operation}" if i else f"{line}{operation}"
        lines.append(line)
    return "\n".join([*lines, boxed])


def base_model(name: str, out: Path, device) -> Path:
    """The folder of the base model under `out`, made first (with a progress bar) if it is not there."""
    recipe = RECIPES[name]
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
    folder = out / f"base-{name}-{digest}"
    if (folder / "config.json").is_file():
        return folder
    if recipe["bf16"] and device.type == "cpu":
        print(f"base model {name}: made for a GPU, where it takes a minute; here it takes hours", file=sys.stderr)
    torch.manual_seed(recipe["seed"])
    rng, corpus, steps = random.Random(recipe["seed"]), recipe["corpus"], recipe["steps"]
    tokenizer = character_tokenizer(name)
    cfg = base_config(name, tokenizer)
    model = Model(cfg).init_weights().to(device)    # drawn on the CPU: CUDA's random stream would give another base

    written = in_whole_lines if corpus["whole_lines"] else str
    (low, high), encoded = corpus["levels"], defaultdict(list)      # level -> [(prompt, response, response with slips)]
    for seed in range(corpus["seeds"]):
        examples = arithmetic(seed, corpus["problems"], corpus["levels"])
        texts = [[e.text, *(written(with_slips(e.solution, rate, corpus["sure"], rng)) for rate in (0.0, corpus["slip"]))]
                 for e in examples]
        ids = iter(tokenizer(list(itertools.chain(*texts))).input_ids)      # in one call: it has threads
        for example, prompt, *responses in zip(examples, ids, ids, ids):
            encoded[example.level].append((prompt, *([*response, *cfg.eos_token_ids] for response in responses)))

    # The optimizer's fp32 weights, of which the model is a copy in the precision of the work.
    masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    model.to(torch.bfloat16 if recipe["bf16"] and device.type == "cuda" else torch.float32)
    optimizer = torch.optim.AdamW(masters, lr=recipe["lr"], betas=(0.9, 0.98), weight_decay=0.01)
    every = 1.0 if sys.stderr.isatty() else 15.0    # seconds between two updates
    bar, begun = tqdm(range(steps), desc="base model (once)", unit="step", mininterval=every), time.time()
    for step in bar:
        for group in optimizer.param_groups:    # warm-up, then linear to a tenth
            group["lr"] = recipe["lr"] * min((step + 1) / recipe["warmup"], 1.0 - 0.9 * step / steps)
        # Short problems first: what is copied and computed in one step is learned there, and cheaply.
        hardest = min(high, low + 1 + round((high - low - 1) * step / (steps / 2)))
        ids, rows, lengths = [], [], []
        for _ in range(recipe["batch"]):        # the row before a response token predicts it
            prompt, right, slipped = rng.choice(encoded[rng.randint(low, hardest)])
            response = right if step < corpus["slips_from"] else slipped
            rows += range(len(ids) + len(prompt) - 1, len(ids) + len(prompt) + len(response) - 1)
            ids += prompt + response
            lengths.append(len(prompt) + len(response))
        ids_T, rows_R = torch.tensor(ids, device=device), torch.tensor(rows, device=device)
        cu = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        logp_R, _ = model(ids_T, cu, max(lengths), targets_R=ids_T[rows_R + 1], rows_R=rows_R)
        loss = -logp_R.mean()
        loss.backward()
        for master, p in zip(masters, model.parameters()):
            master.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for master, p in zip(masters, model.parameters()):
                p.copy_(master)
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    parameters, solutions = sum(p.numel() for p in masters), sum(map(len, encoded.values()))
    print(f"base model: {parameters:,} parameters, {solutions:,} worked solutions, "
          f"loss {loss.item():.3f} per token, {time.time() - begun:.0f} s -> {folder}")

    partial = out / f"{folder.name}.{os.getpid()}.tmp"      # two runs may make the same base at once: the first one counts
    names = [name for name, _ in model.named_parameters()]
    save_folder(partial, cfg, {n: p.detach().cpu() for n, p in zip(names, masters)}, tokenizer)
    try:
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial)
        if not folder.exists():
            raise
    return folder
