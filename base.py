"""
The embedded base model: a tokenizer of characters, a tiny Qwen2, and a short supervised phase on worked solutions.

It stands in for a pretrained model where none can be downloaded, so that `python train.py` runs the whole path: what it
leaves behind is a normal Hugging Face folder, and nothing after it knows that the model was made here. The corpus is like
the web's: most worked solutions are right, some slip in a step and go on from the slip. A model trained on it knows how
to do every step and does not always do it: what reinforcement learning can mend.
"""

import hashlib
import json
import os
import random
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
RECIPE = dict(
    shape=dict(hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1,
               max_position_embeddings=256, rope_theta=10000.0),
    corpus=dict(levels=7, problems=9000, seeds=3, slip=0.12, slips_from=620),
    batch=64, steps=750, lr=3e-3, warmup=50, seed=0, version=3,
)


def character_tokenizer() -> Qwen2Tokenizer:
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
        additional_special_tokens=words[1:3], model_max_length=RECIPE["shape"]["max_position_embeddings"],
    )
    tokenizer.add_tokens([AddedToken(words[3], special=False, normalized=False)])
    return tokenizer


def base_config(tokenizer) -> ModelConfig:
    return ModelConfig.from_dict(dict(
        RECIPE["shape"], model_type="qwen2", architectures=["Qwen2ForCausalLM"], vocab_size=len(tokenizer), rms_norm_eps=1e-6,
        hidden_act="silu", tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    ))


def with_slips(solution: str, rate: float, rng: random.Random) -> str:
    """
    The worked solution, where the result of line j = 0, 1, ... is off by a little with probability `rate` x j, and the lines
    after it go on from the slip: consistent to the end, and wrong. Long solutions go astray far more often than short ones.

    >>> with_slips("7+5=12\\n12*3=36\\n\\\\boxed{36}", 0.0, random.Random(0))
    '7+5=12\\n12*3=36\\n\\\\boxed{36}'
    """
    lines, value = [], None
    for number, line in enumerate(solution.split("\n")[:-1]):
        left, _ = line.split("=")
        operator = next(c for c in left if c in "+-*")
        a, b = left.split(operator)
        a = int(a) if value is None else value
        value = {"+": a + int(b), "-": a - int(b), "*": a * int(b)}[operator]
        if rng.random() < rate * number:
            value = max(0, value + rng.choice((-10, -2, -1, 1, 2, 10)))
        lines.append(f"{a}{operator}{b}={value}")
    return "\n".join([*lines, f"\\boxed{{{value}}}"])


def base_model(out: Path, device) -> Path:
    """The folder of the base model under `out`, made first (with a progress bar) if it is not there."""
    digest = hashlib.sha256(json.dumps(RECIPE, sort_keys=True).encode()).hexdigest()[:8]
    folder = out / f"base-{digest}"
    if (folder / "config.json").is_file():
        return folder
    torch.manual_seed(RECIPE["seed"])
    rng, corpus, steps = random.Random(RECIPE["seed"]), RECIPE["corpus"], RECIPE["steps"]
    tokenizer = character_tokenizer()
    cfg = base_config(tokenizer)
    model = Model(cfg).init_weights().to(device)    # drawn on the CPU: CUDA's random stream would give another base

    encoded = defaultdict(list)     # level -> [(prompt, response)]
    for seed in range(corpus["seeds"]):
        for example in arithmetic(seed, corpus["problems"], (1, corpus["levels"])):
            prompt = tokenizer(example.text).input_ids
            right, slipped = (tokenizer(with_slips(example.solution, rate, rng)).input_ids for rate in (0.0, corpus["slip"]))
            encoded[example.level].append((prompt, [*right, *cfg.eos_token_ids], [*slipped, *cfg.eos_token_ids]))

    optimizer = torch.optim.AdamW(model.parameters(), lr=RECIPE["lr"], betas=(0.9, 0.98), weight_decay=0.01)
    every = 1.0 if sys.stderr.isatty() else 15.0    # seconds between two updates
    bar, begun = tqdm(range(steps), desc="base model (once)", unit="step", mininterval=every), time.time()
    for step in bar:
        for group in optimizer.param_groups:    # warm-up, then linear to a tenth
            group["lr"] = RECIPE["lr"] * min((step + 1) / RECIPE["warmup"], 1.0 - 0.9 * step / steps)
        # Short problems first: what is copied and computed in one step is learned there, and cheaply.
        hardest = min(corpus["levels"], 2 + round((corpus["levels"] - 2) * step / (steps / 2)))
        ids, rows, lengths = [], [], []
        for _ in range(RECIPE["batch"]):        # the row before a response token predicts it
            prompt, right, slipped = rng.choice(encoded[rng.randint(1, hardest)])
            response = right if step < corpus["slips_from"] else slipped
            rows += range(len(ids) + len(prompt) - 1, len(ids) + len(prompt) + len(response) - 1)
            ids += prompt + response
            lengths.append(len(prompt) + len(response))
        ids_T, rows_R = torch.tensor(ids, device=device), torch.tensor(rows, device=device)
        cu = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        logp_R, _ = model(ids_T, cu, max(lengths), targets_R=ids_T[rows_R + 1], rows_R=rows_R)
        loss = -logp_R.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    parameters, solutions = sum(p.numel() for p in model.parameters()), sum(map(len, encoded.values()))
    print(f"base model: {parameters:,} parameters, {solutions:,} worked solutions, "
          f"loss {loss.item():.3f} per token, {time.time() - begun:.0f} s -> {folder}")

    partial = out / f"base-{digest}.{os.getpid()}.tmp"      # two runs may make the same base at once: the first one counts
    save_folder(partial, cfg, {name: p.detach().cpu() for name, p in model.named_parameters()}, tokenizer)
    if folder.exists():
        shutil.rmtree(partial)
    else:
        partial.rename(folder)
    return folder

