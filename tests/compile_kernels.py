"""
Compiles the kernels of a decode step for an H100 without one: every call that FastDecoder.step
makes, with its types and constants, for few and for many slots. Prints their names. Run by
test_rollout.py in a process without Triton's interpreter.
"""

import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))

import decode
import draw
from hf import config_from_dict
from rollout import Sampler

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    float: "fp32",
    int: "i32",
}
# One layer of Qwen2.5-Math-1.5B, with a vocabulary of a few blocks.
SHAPE = dict(
    model_type="qwen2", vocab_size=9001, hidden_size=1536, intermediate_size=8960,
    num_hidden_layers=1, num_attention_heads=12, num_key_value_heads=2,
    max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip
names = set()


class Compiled:
    """Stands in a kernel's place: kernel[grid](arguments) compiles and does not run."""

    def __init__(self, name, kernel):
        self.name, self.kernel = name, kernel

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, **options):
        constant = {p.num for p in self.kernel.params if p.is_constexpr}
        types = {}
        for p, argument in zip(self.kernel.params, args):
            if p.num in constant:
                types[p.name] = "constexpr"
            else:
                types[p.name] = TYPES[getattr(argument, "dtype", type(argument))]
        source = ASTSource(self.kernel, types, {(i,): args[i] for i in constant})
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        names.add(self.name)


for module in (decode, draw):
    for name in dir(module):
        if name.endswith("_kernel"):
            setattr(module, name, Compiled(name, getattr(module, name)))
for changes in (dict(), dict(model_type="qwen3", head_dim=64)):
    cfg = config_from_dict(SHAPE | changes)
    sampler = Sampler(cfg, 192, 1200, (3, 11), dtype=torch.bfloat16, fast=True)
    for A in (16, 192):
        sampler.decoder.step(A, cuts=True)
print(*sorted(names))
