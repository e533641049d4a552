"""
What a measurement runs on: random weights, random prompts, lengths and verdicts by a random number.

All of it hangs on a seed, a problem and an index alone, so every algorithm meets the same work. The
seeds are those of the first measurements: figures of all builds are figures of one workload.
"""

from dataclasses import replace

import numpy as np
import torch

from data import Problem
from learner import Learner, make_learner
from model import Model
from reward import Verdict
from rollout import Sampler


def random_problems(cfg, model_cfg) -> list[Problem]:
    rng = np.random.default_rng(0)
    problems = []
    for number in range(cfg.prompts):
        prompt = rng.integers(0, model_cfg.vocab_size, cfg.prompt_len)
        problems.append(Problem(number, tuple(prompt.tolist()), "0", "", ""))
    return problems


class SetLength(Sampler):
    """
    Without stop ids every rollout runs to its max_new, which here is its length and no truncation.
    With `ragged`, lengths are log-normal with sigma 0.8 and a mean of max_new / 5, cut at max_new.
    """

    ragged = False

    def begin(self, seed, sampling):
        super().begin(seed, sampling)
        self.length_seed = seed

    def add(self, requests):
        if self.ragged:
            requests = [replace(request, max_new=self.length(request)) for request in requests]
        super().add(requests)

    def length(self, request) -> int:
        rng = np.random.default_rng([self.length_seed, request.place, request.index])
        length = rng.lognormal(np.log(request.max_new / 5) - 0.8**2 / 2, 0.8)
        return int(np.clip(length, 1, request.max_new))

    def step(self):
        finished = super().step()
        for rollout in finished:
            rollout.truncated = False
        return finished


def random_sampler(cfg, model_cfg, device) -> SetLength:
    half = device.type == "cuda" and not cfg.fp32
    sampler = SetLength(
        model_cfg,
        slots=min(cfg.slots, cfg.prompts * cfg.n),
        context=cfg.prompt_len + cfg.new,
        eos_ids=(),
        device=device,
        dtype=torch.bfloat16 if half else torch.float32,
        kv_gib=cfg.kv_gib,
        fast=False if cfg.plain else None,
    )
    sampler.model.init_weights()
    sampler.ragged = cfg.ragged
    return sampler


def random_learner(cfg, model_cfg, device) -> Learner:
    def read(_):
        torch.manual_seed(0)
        with device:
            return Model(model_cfg).init_weights().named_parameters()

    return make_learner(model_cfg, cfg, device, read)


class SimulatedGrader:
    """
    What a training step needs of reward.Grader. A verdict is a coin whose bias is the problem's: a
    third of the problems is never right, the rates of the others are uniform on (0, 1).
    """

    def __init__(self, seed: int, count: int):
        rng = np.random.default_rng(seed)
        hopeless = rng.random(count) < 1 / 3
        self.rate = np.where(hopeless, 0.0, rng.random(count))
        self.seed = seed
        self.graded = []
        self.waited = 0.0

    @property
    def pending(self) -> int:
        return len(self.graded)

    def submit(self, rollout, response, gold, problem="", opened=False):
        place = rollout.request.place
        rng = np.random.default_rng([self.seed, place, rollout.request.index])
        right = rng.random() < self.rate[place]
        reason = "equal:simulated" if right else "wrong"
        self.graded.append((rollout, Verdict(float(right), None, "simulated", reason)))

    def poll(self) -> list:
        graded = self.graded
        self.graded = []
        return graded

    def wait(self, timeout_s) -> list:
        return self.poll()


class NoTokenizer:
    """Random tokens have no text."""

    def decode(self, tokens, skip_special_tokens=True):
        return ""


class NeverStop:
    asked = False

    def asked_anywhere(self) -> bool:
        return False
