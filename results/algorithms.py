"""
What each algorithm of aero.py, with its published defaults, does with a problem of success rate p: algorithms.png.

    python results/algorithms.py

Exact, not simulated: all ways in which the rounds of a group can go, through the very functions that training calls. Inside
a round only the number of right rollouts matters, so a way is a count per round, and its probability a product of binomials.
"""

import math
import sys
from pathlib import Path

import matplotlib
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import aero

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLES = {      # Okabe and Ito; what often coincides with another line is dashed or dotted over it
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


def expectations(name: str, p) -> np.ndarray:
    """(3, P) for success rates p (P,): rollouts drawn, rollouts trained on, mean |advantage| of these (0 if there are none)."""
    algo, rng = aero.ALGORITHMS[name], np.random.default_rng(0)
    s = aero.Settings(algo=name, **algo.defaults)
    total, flat, ways = np.zeros((3, len(p))), np.zeros(len(p)), [(1, np.zeros(0), algo.first(s))]
    while ways:
        orders, before, n = ways.pop()
        for c in range(n + 1):
            r = np.concatenate([before, np.repeat([1.0, 0.0], [c, n - c])])
            count = orders * math.comb(n, c)
            if more := algo.more(r, s):
                ways.append((count, r, more))
                continue
            kept, advantage = aero.choose(r, s, rng)
            chance = count * p ** r.sum() * (1 - p) ** (len(r) - r.sum())
            size = np.abs(advantage).mean() if len(kept) else 0
            total += chance * np.array([[len(r)], [len(kept)], [size]])
            flat += chance * aero.is_flat(r)
    # dapo draws another problem for a flat group, and another, up to the cap: all of them of success rate p in this picture
    return total * sum(flat**i for i in range(s.refill_cap * algo.refill + 1))


def main():
    p = np.linspace(0, 1, 201)
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 4.5))
    for name, style in STYLES.items():
        for axis, y in zip(axes, expectations(name, p)):
            axis.plot(p, y, label=name, **dict(linewidth=1.8, zorder=3) | style)
    titles = ("rollouts drawn per problem", "rollouts trained on per problem", "mean |advantage| of these rollouts")
    for axis, title in zip(axes, titles):
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("success rate of the problem", fontsize=10)
        axis.set_xlim(0, 1)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yscale("log", base=2)
    axes[0].set_yticks([8, 16, 32, 64, 128], ["8", "16", "32", "64", "128"])
    axes[0].minorticks_off()
    axes[0].set_ylim(bottom=6.2)
    axes[1].set_yticks(range(0, 17, 4))
    axes[1].set_ylim(bottom=0)
    axes[2].set_ylim(bottom=0)
    together = ((0, 17.6, "grpo, maxrl"), (0, 6.75, "grpo_skip, drgrpo, sign"),     # lines that lie on each other
                (1, 15.2, "grpo, maxrl, pods"), (1, 8.4, "drgrpo, sign, mc_grpo"))
    for panel, y, names in together:
        axes[panel].text(0.5, y, names, fontsize=9, color="#555555", horizontalalignment="center")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, frameon=False, fontsize=10.5, handlelength=2.6)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    path = Path(__file__).with_suffix(".png")
    figure.savefig(path, dpi=110)
    print(path)


if __name__ == "__main__":
    main()
