"""
What each algorithm of aero.py, as published, does with a problem of success rate p: algorithms.png.

    python results/algorithms.py

Exact, not simulated: all ways in which the rounds of a group can go, through the very functions
that training calls. Inside a round only the number of right rollouts matters. So a way is a count
per round, and its probability a product of binomials.
"""

import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import aero
from config import Config
from curves import tidy

# Okabe and Ito; what often coincides with another line is dashed or dotted over it.
STYLES = {
    "aero": dict(color="#0072B2", linewidth=3.4, zorder=4),
    "reinforce_ada": dict(color="#009E73"),
    "pods": dict(color="#E69F00"),
    "dapo": dict(color="#D55E00"),
    "mc_grpo": dict(color="#999999"),
    "grpo": dict(color="#000000"),
    "grpo_skip": dict(color="#56B4E9", linewidth=2.6),
    "maxrl": dict(color="#009E73", linestyle=(0, (4, 3)), zorder=5),
    "drgrpo": dict(color="#CC79A7", linestyle=(0, (4, 3)), zorder=5),
    "sign": dict(color="#000000", linestyle=(0, (1, 2)), zorder=6),
}
USUAL = dict(linewidth=1.8, zorder=3)
TITLES = (
    "rollouts drawn per problem",
    "rollouts trained on per problem",
    "mean |advantage| of these rollouts",
)
# (panel, height, the lines that lie on each other there)
TOGETHER = (
    (0, 17.6, "grpo, maxrl"),
    (0, 6.75, "grpo_skip, drgrpo, sign"),
    (1, 15.2, "grpo, maxrl, pods"),
    (1, 8.4, "drgrpo, sign, mc_grpo"),
)


def groups(algo: aero.Algorithm, cfg):
    """(number of orders, rewards) of each way in which a complete group can go."""
    ways = [(1, np.zeros(0), algo.first(aero.Group(np.zeros(0), problem=0), cfg))]
    while ways:
        orders, before, n = ways.pop()
        for right in range(n + 1):
            rewards = np.concatenate([before, np.ones(right), np.zeros(n - right)])
            count = orders * math.comb(n, right)
            more = algo.more(aero.Group(rewards, problem=0), cfg)
            if more:
                ways.append((count, rewards, more))
            else:
                yield count, rewards


def expectations(name: str, p) -> np.ndarray:
    """
    (3, P) for success rates p (P,): rollouts drawn, rollouts trained on, their mean |advantage|,
    0 where there are none.
    """
    algo = aero.ALGORITHMS[name]
    cfg = Config(algo=name, **algo.defaults)
    rng = np.random.default_rng(0)
    total = np.zeros((3, len(p)))
    flat = np.zeros(len(p))
    for count, rewards in groups(algo, cfg):
        kept, advantage = aero.choose(aero.Group(rewards, problem=0), cfg, rng)
        right = rewards.sum()
        chance = count * p**right * (1 - p) ** (len(rewards) - right)
        size = np.abs(advantage).mean() if len(kept) else 0
        total += chance * np.array([[len(rewards)], [len(kept)], [size]])
        if aero.is_flat(rewards):
            flat += chance
    if not algo.refill:
        return total
    # dapo draws another problem for a flat group, and another, up to the cap. In this picture all
    # of them have success rate p.
    return total * sum(flat**i for i in range(cfg.refill_cap + 1))


def main():
    from matplotlib.figure import Figure

    p = np.linspace(0, 1, 201)
    figure = Figure(figsize=(10.5, 4.5))
    axes = figure.subplots(1, 3)
    for name, style in STYLES.items():
        for axis, y in zip(axes, expectations(name, p)):
            axis.plot(p, y, label=name, **USUAL | style)
    for axis, title in zip(axes, TITLES):
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("success rate of the problem", fontsize=10)
        tidy(axis, xlim=(0, 1))
    drawn, trained, advantage = axes
    drawn.set_yscale("log", base=2)
    drawn.set_yticks([8, 16, 32, 64, 128], ["8", "16", "32", "64", "128"])
    drawn.minorticks_off()
    drawn.set_ylim(bottom=6.2)
    trained.set_yticks(range(0, 17, 4))
    trained.set_ylim(bottom=0)
    advantage.set_ylim(bottom=0)
    for panel, y, names in TOGETHER:
        axes[panel].text(0.5, y, names, fontsize=9, color="#555555", horizontalalignment="center")
    handles, labels = drawn.get_legend_handles_labels()
    legend = dict(loc="lower center", ncols=5, frameon=False, fontsize=10.5, handlelength=2.6)
    figure.legend(handles, labels, **legend)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    path = Path(__file__).with_suffix(".png")
    figure.savefig(path, dpi=110)
    print(path)


if __name__ == "__main__":
    main()
