"""
Every random number of a run hangs on a path under its seed, and on nothing else: not on the number
of ranks, on who finished first, or on what was drawn before. That is what makes a run repeatable.

    stream(seed, "rollout", step)     root of a step's rollouts; the sampler's key of one rollout is
                                      stream(root, place of its group, index)
    stream(seed, "evaluation")        the same for evaluations, every time
    generator(seed, "order", epoch)   in which order an epoch meets the problems
    generator(seed, "keep", step, place)   what an algorithm draws when it keeps or rejects
"""

import hashlib

import numpy as np


def stream(seed: int, *path) -> int:
    """63-bit number of the random stream at `path` under `seed`; the text of its parts decides."""
    text = " ".join(map(str, (seed, *path)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *path) -> np.random.Generator:
    return np.random.default_rng(stream(seed, *path))
