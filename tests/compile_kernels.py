"""
Compiles the kernels of a decode step for an H100 without one: every call that Sampler._fast_step makes, with its types and
constants, for few and for many slots. Prints the names. Run by test_rollout.py in a process without Triton's interpreter.
"""

import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))

import rollout
from bench import SHAPES
from model import ModelConfig

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64", float: "fp32", int: "i32"}
done = set()


class Compiled:
    """Stands in a kernel's place: kernel[grid](arguments) compiles and does not run."""

    def __init__(self, name):
        self.name, self.kernel = name, getattr(rollout, name)

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, **options):
        constant = {p.num for p in self.kernel.params if p.is_constexpr}
        types = {p.name: "constexpr" if p.num in constant else TYPES[getattr(a, "dtype", type(a))]
                 for p, a in zip(self.kernel.params, args)}  # fmt: skip
        source = ASTSource(self.kernel, types, {(i,): args[i] for i in constant})
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        done.add(self.name)


for name in [name for name in dir(rollout) if name.endswith("_kernel")]:
    setattr(rollout, name, Compiled(name))
for changes in (dict(), dict(model_type="qwen3", head_dim=64)):
    config = SHAPES["qwen2.5-math-1.5b"] | dict(num_hidden_layers=1, vocab_size=9001) | changes
    sampler = rollout.Sampler(ModelConfig.from_dict(config), 192, 1200, (3, 11), dtype=torch.bfloat16, fast=True)
    for A in (16, 192):
        sampler._fast_step(A, cuts=True)
print(*sorted(done))
