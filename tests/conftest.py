"""What several test files share: small models, one of them taught to answer, and its problems."""

import json
import multiprocessing
import os
import random
import sys
from multiprocessing import forkserver
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    # The sampler's kernels run in Triton's interpreter; to be said before triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"

from hf import config_from_dict, save_folder
from model import Model, ModelConfig, pack
from tasks.base import character_tokenizer

# Everything is imported once, so that a process costs what it computes.
SERVER = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="session")
def server():
    """It gets its path from the environment: Python 3.11 to 3.13 do not hand on sys.path to what
    it imports first."""
    SERVER.set_forkserver_preload(["test_train", "test_learner"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()


def pytest_configure():
    torch.set_num_threads(1)  # tiny matrices: a second thread only waits


def tiny_config(tokenizer, **changes) -> ModelConfig:
    fields = dict(
        model_type="qwen2",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    return config_from_dict(fields | changes)


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    """
    A tiny Qwen2 folder that answers a letter and a digit, "b7", with zero to two lines "7=7" and
    \\boxed{7}: always right for 0-2, half of the time for 3-6, hardly ever for 7-9, so groups of
    all kinds come up. `data`: 40 problems, `held`: 10.
    """
    folder = tmp_path_factory.mktemp("student")
    tokenizer = character_tokenizer()
    rng = random.Random(0)
    torch.manual_seed(0)
    model = Model(tiny_config(tokenizer)).init_weights(0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    right = [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.02, 0.02, 0.02]
    for _ in range(150):
        prompts, responses = [], []
        for _ in range(48):
            d = rng.randrange(10)
            answer = d if rng.random() < right[d] else rng.randrange(10)
            prompts.append(tokenizer(f"{rng.choice('abcde')}{d}").input_ids)
            text = f"{d}={d}\n" * rng.randrange(3) + f"\\boxed{{{answer}}}"
            responses.append([*tokenizer(text).input_ids, tokenizer.eos_token_id])
        logp_R = model(**pack(prompts, responses, "cpu")._asdict()).logp_R
        (-logp_R.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_folder(folder / "model", model.cfg, model.state_dict(), tokenizer)
    for name, letters in (("data", "abcd"), ("held", "e")):
        problems = [f"{letter}{d}" for letter in letters for d in range(10)]
        rows = [{"problem": problem, "answer": problem[1]} for problem in problems]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return SimpleNamespace(
        model=folder / "model",
        data=folder / "data.jsonl",
        held=folder / "held.jsonl",
        tokenizer=tokenizer,
    )
