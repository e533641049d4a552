"""
Memory and traffic per GPU for three sizes of model on 1 to 512 GPUs in nodes of 8, by the formulas
that a run checks before it starts. A Markdown table of the first settings of plan.CHANGES that fit.

    python -m tools.plan                    GPUs of 141 GB, 64k tokens per GPU and update
    python -m tools.plan --gpu_gib 79       GPUs of 80 GB
"""

import sys
from dataclasses import dataclass

import plan
from config import Config, Knobs, knob, parse
from tools.shapes import shape

HEADER = (
    "shape", "GPUs", "settings", "GiB per GPU",
    "learner's state", "activations", "sampler", "GB sent per step",
)  # fmt: skip
NODE = 8  # GPUs


@dataclass
class Budget(Knobs):
    gpu_gib: float = knob(139.8, "memory of a GPU, as its driver counts it", above=0.0)
    tokens: int = knob(65536, "tokens per GPU and update, in micro-batches of 16k", least=1)
    kv_gib: float = knob(20.0, "KV cache of the sampler on each GPU", above=0.0)
    context: int = knob(4096, "tokens of a prompt with its response", least=1)


def table(budget: Budget) -> str:
    lines = [row(HEADER), row(["---"] * len(HEADER))]
    for name in ("qwen2.5-math-1.5b", "qwen2.5-7b", "qwen2.5-32b"):
        for gpus in (1, 8, 64, 512):
            lines.append(row([name, gpus, *cells(name, gpus, budget)]))
    return "\n".join(lines)


def row(cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def cells(name: str, gpus: int, budget: Budget) -> list:
    try:
        changes, planned = plan.advise(
            budget.gpu_gib * 2**30,
            shape(name),
            Config(compile=True),
            gpus,
            min(gpus, NODE),
            budget.kv_gib * 2**30,
            budget.context,
            budget.tokens,
        )
    except MemoryError:
        return ["does not fit"] + [""] * 5
    size = {part: in_bytes / 2**30 for part, in_bytes in planned.memory.items()}
    state = size["weights and optimizer"] + size["gradients"] + size["gathered weights"]
    activations = size["activations"] + size["working set"]
    return [
        plan.flags(changes),
        f"{sum(size.values()):.0f}",
        f"{state:.0f}",
        f"{activations:.0f}",
        f"{size['sampler']:.0f}",
        f"{sum(planned.traffic.values()) / 1e9:.0f}",
    ]


def main(argv: list[str]) -> int:
    try:
        budget = parse(Budget, argv, __doc__)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(budget))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
