"""
learner.py: packing, the loss by hand, micro-batches, ranks, importance weights, compiled blocks,
bad
gradients, and losses that a fork would write; in the process of the tests and on ranks of their
own.
"""

import collections
import doctest
import functools
import itertools
import math
import os
import random
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import SERVER
from torch.distributed.fsdp import FSDPModule

import aero
import learner
import model as model_module
from config import Config
from hf import config_from_dict, load_weights, read_config, read_weights
from learner import (
    Trained,
    cost,
    forward_backward,
    full_weights,
    make_learner,
    micro_batch,
    pack_micro_batches,
    update,
)
from model import Model, pack

CPU = torch.device("cpu")
NAN = float("nan")
SHAPE = config_from_dict(
    dict(
        model_type="qwen2",
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
)

pytestmark = pytest.mark.usefixtures("server")


def scored(model, x, cfg):
    """The model's scores of one rollout's tokens."""
    ids_T, cu, max_len, rows_R, targets_R = pack([x.prompt], [x.tokens], "cpu")
    with torch.no_grad():
        return model(ids_T, cu, max_len, targets_R, rows_R, cfg.temperature)


def test_doctests():
    for module in (learner, aero):
        assert doctest.testmod(module).failed == 0


def test_pack_properties():
    rng = random.Random(0)
    for _ in range(300):
        lengths = [rng.randint(1, rng.choice([5, 60, 200])) for _ in range(rng.randint(1, 40))]
        world, cap, costs = (
            rng.choice([1, 2, 3, 8]),
            rng.choice([1, 50, 100, 1000]),
            [n * (30 + n) for n in lengths],
        )
        ranks = pack_micro_batches(costs, lengths, world, cap)
        assert len(ranks) == world and len({len(rank) for rank in ranks}) == 1 and ranks[0]
        bins = [b for rank in ranks for b in rank]
        assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in b) <= cap or len(b) == 1 for b in bins)
        assert (
            len(bins) <= world * math.ceil(2 * sum(lengths) / cap / world + 1)
            or max(lengths) > cap / 2
        )


@pytest.mark.parametrize("world", [2, 8])
def test_pack_balances_ranks(world):
    """AERO keeps few rollouts of unequal length: by cost a rank has at most 3 % more than the
    mean, by tokens 8 %."""
    rng, model_cfg = np.random.default_rng(0), SHAPE
    for _ in range(20):
        lengths = np.clip(rng.lognormal(6, 0.8, 64 * world), 1, 3072).astype(int).tolist()
        costs = [cost(model_cfg, 128, n) for n in lengths]
        ranks = pack_micro_batches(costs, [128 + n for n in lengths], world, 32768)
        spent = [sum(costs[i] for some in rank for i in some) for rank in ranks]
        assert max(spent) < 1.03 * np.mean(spent)


def test_cost():
    """The example of its docstring: 7617 tokens + 1356 response + tokens^2, up to the unit and a
    token's diagonal."""
    model_cfg = SHAPE
    unit = 4 * model_cfg.num_hidden_layers * model_cfg.hidden_size * 4 / 2
    for prompt, response in [(128, 512), (100, 3000)]:
        n = prompt + response
        assert cost(model_cfg, prompt, response) / unit == pytest.approx(
            7617 * n + 1356 * response + n * n, rel=1e-3
        )


def items(*responses, advantage=1.0):
    """One Trained per list of response ids; prompts of growing length."""
    return [
        Trained(i, tuple(range(5, 7 + i)), list(r), [-0.5] * len(r), advantage)
        for i, r in enumerate(responses)
    ]


def test_packed_example():
    """The example of its docstring, and a second rollout behind it."""
    p0, p1, p2, r0, r1 = 11, 12, 13, 21, 22
    first = Trained(0, (p0, p1, p2), [r0, r1], [-1.0, -2.0], 0.5)
    two = [first, Trained(1, (p0,), [r1], [-3.0], -2.0)]
    packed, batch = micro_batch(two, [0.25, 0.125], "cpu")
    assert packed.ids_T.tolist() == [p0, p1, p2, r0, r1, p0, r1]
    assert packed.cu.tolist() == [0, 5, 7] and packed.max_len == 5
    assert packed.rows_R.tolist() == [2, 3, 5] and packed.targets_R.tolist() == [r0, r1, r1]
    assert batch.sampled_R.tolist() == [-1.0, -2.0, -3.0]
    assert batch.advantage_R.tolist() == [0.5, 0.5, -2.0]
    assert batch.weight_R.tolist() == [0.25, 0.25, 0.125]
    assert batch.rollout_R.tolist() == [0, 0, 1] and batch.length_S.tolist() == [2, 1]
    assert packed.cu.dtype == torch.int32 and batch.advantage_R.dtype == torch.float32


def test_masks_come_from_lengths():
    """Id 0 is both EOS and pad here, as in Qwen2's base models: it is trained wherever it was
    drawn, the last one too."""
    rollouts = items([0], [9, 0, 0, 8, 0], [0, 0, 0])
    packed, batch = micro_batch(rollouts, [1.0, 1.0, 1.0], "cpu")
    assert packed.targets_R.tolist() == [token for x in rollouts for token in x.tokens]
    assert torch.equal(packed.ids_T[packed.rows_R + 1], packed.targets_R)
    assert (batch.weight_R > 0).all()


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class SGD(torch.optim.SGD):
    """Its step is the gradient. torch's fused kernel, which knows found_inf, does not take
    DTensors."""

    def step(self):
        found_inf, self.found_inf = self.found_inf, None
        if not found_inf:
            super().step()


@pytest.fixture
def fresh(one_process, student):
    """fresh(optimizer kind, settings): (settings, learner on one rank), made as a run makes it."""

    def make(kind=None, **changes):
        cfg = Config(**dict(dict(max_new=20, grad_clip=1e9, temperature=0.9), **changes))
        read = functools.partial(read_weights, folder=student.model)
        made = make_learner(read_config(student.model), cfg, CPU, read)
        if kind:
            made = made._replace(optimizer=kind(made.model.parameters(), lr=1.0))
        return cfg, made

    return make


def weights_of(model):
    return {name: w.clone() for name, w in full_weights(model)}


def unequal_batch(seed=0):
    """Groups of 5, 1, 2 and 3 rollouts of 1 to 12 tokens."""
    rng = random.Random(seed)
    return [
        Trained(
            place,
            tuple(rng.randrange(4, 90) for _ in range(rng.randint(1, 9))),
            [rng.randrange(90) for _ in range(n)],
            [-rng.random() for _ in range(n)],
            rng.choice([-1.5, 0.3, 1.0]),
        )
        for place, size in enumerate([5, 1, 2, 3])
        for n in [rng.randint(1, 12) for _ in range(size)]
    ]


@pytest.mark.parametrize("norm", aero.LOSS_NORMS)
@pytest.mark.parametrize("seed", range(3))
def test_micro_batches_do_not_matter(fresh, norm, seed):
    """Under SGD, whose step is the gradient, here of norm 1."""
    after, metrics = [], []
    for cap in (10_000, 40, 1):
        cfg, trained = fresh(SGD, loss_norm=norm, micro_tokens=cap, grad_clip=1.0)
        metrics.append(update(trained, unequal_batch(seed), 1.0, cfg))
        after.append(weights_of(trained.model))
    for other, m in zip(after[1:], metrics[1:]):
        for name, w in after[0].items():
            assert (other[name] - w).abs().max() < 1e-6, name
        assert m == pytest.approx(metrics[0], abs=1e-6, rel=1e-6)


def loss_by_hand(model, batch, cfg, ratio_against_sampler):
    """Straight from the formula, one rollout and one token at a time, over all logits of the
    packed forward."""
    groups, tokens = {}, sum(len(x.tokens) for x in batch)
    for x in batch:
        groups.setdefault(x.place, []).append(x)
    total, gaps, entropies, clipped, ratios = 0.0, [], [], 0.0, 0.0
    for x in batch:
        ids = torch.tensor([*x.prompt, *x.tokens])
        logits_TV = model(ids, torch.tensor([0, len(ids)]).int(), len(ids)) / cfg.temperature
        logp_TV = logits_TV.log_softmax(-1)
        for t, (token, sampled) in enumerate(zip(x.tokens, x.logps)):
            row = logp_TV[len(x.prompt) - 1 + t]
            weight = {
                "prompt": 1 / len(groups) / len(groups[x.place]) / len(x.tokens),
                "token": 1 / tokens,
                "constant": 1 / (cfg.max_new * len(batch)),
            }[cfg.loss_norm]
            ratio = torch.exp(
                row[token] - (sampled if ratio_against_sampler else row[token].detach())
            )
            bounded = min(max(ratio.item(), 1 - cfg.clip_low), 1 + cfg.clip_high)
            gain = min(
                ratio * x.advantage, torch.tensor(bounded * x.advantage), key=lambda v: v.item()
            )
            total = total - weight * gain
            clipped += weight * (bounded * x.advantage < ratio.item() * x.advantage)
            ratios += weight * ratio.item()
            gaps.append(row[token].item() - sampled)
            entropies.append(-(row.exp() * row).sum().item())
    weight = 1.0 if cfg.loss_norm != "constant" else tokens / (cfg.max_new * len(batch))
    return total, {
        "loss/policy": total.item(),
        "loss/clip_frac": clipped / weight,
        "loss/ratio_mean": ratios / weight,
        "policy/entropy": np.mean(entropies),
        "mismatch/kl": np.mean([math.exp(g) - 1 - g for g in gaps]),
        "mismatch/max_abs": max(map(abs, gaps)),
    }


@pytest.mark.parametrize("norm", aero.LOSS_NORMS)
@pytest.mark.parametrize("updates", [1, 2])
def test_loss_by_hand(fresh, student, norm, updates):
    """Loss, gradient and metrics. With one update the ratio is 1; with two it is against the
    sampler's log-probs."""
    cfg, trained = fresh(SGD, loss_norm=norm, updates_per_batch=updates, clip_high=0.3)
    plain = Model(read_config(student.model))
    load_weights(plain, student.model)
    batch = []
    for x in (
        unequal_batch()
    ):  # log-probs near the policy's own, so that some ratios are clipped and others not
        ids = torch.tensor([*x.prompt, *x.tokens])
        logp_TV = (
            plain(ids, torch.tensor([0, len(ids)]).int(), len(ids)) / cfg.temperature
        ).log_softmax(-1)
        own = [logp_TV[len(x.prompt) - 1 + t, token].item() for t, token in enumerate(x.tokens)]
        batch.append(x._replace(logps=[p + 0.3 * (-1) ** t for t, p in enumerate(own)]))
    loss, wanted = loss_by_hand(plain, batch, cfg, ratio_against_sampler=updates > 1)
    loss.backward()
    rate = 0.0 if updates == 2 else 0.5  # at rate 0 both updates see the same weights
    metrics = update(trained, batch, rate, cfg)
    for name, value in wanted.items():
        assert metrics[name] == pytest.approx(value, abs=2e-6, rel=2e-5), name
    norm_by_hand = math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in plain.parameters()))
    assert metrics["optim/grad_norm"] == pytest.approx(norm_by_hand, rel=1e-5)
    if updates == 1:
        assert (
            metrics["loss/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
            and metrics["loss/clip_frac"] == 0
        )
        after = weights_of(trained.model)
        for name, p in plain.named_parameters():
            assert (after[name] - (p - rate * p.grad)).abs().max() < 2e-6, name
    else:
        assert 0 < metrics["loss/clip_frac"] < 1


def seen_coefficients(monkeypatch):
    """The coefficients that the head is given from now on, one entry per forward pass."""
    seen, original = [], model_module.token_logprobs

    def spy(hidden_RD, weight_VD, targets_R, temperature, coefficient_R=None, *chunk):
        seen.append(coefficient_R)
        return original(hidden_RD, weight_VD, targets_R, temperature, coefficient_R, *chunk)

    monkeypatch.setattr(model_module, "token_logprobs", spy)
    return seen


@pytest.mark.parametrize(
    "changes", [{}, dict(clip_low=1e-3, clip_high=1e-3), dict(loss_norm="constant")], ids=str
)
def test_the_gradient_is_known_beforehand(fresh, monkeypatch, changes):
    """With one update, what autograd finds behind the loss, its clip and its minimum of two equal
    gains. At a clip of exactly the ratio it would be autograd's choice: that is not promised."""
    seen = seen_coefficients(monkeypatch)
    after, metrics = [], []
    for loss in ("clip", "plain"):
        seen.clear()
        cfg, trained = fresh(SGD, micro_tokens=40, loss=loss, **changes)
        advantages = itertools.cycle([-1.5, 0.0, 1 / 3, 2e-7])
        batch = [x._replace(advantage=a) for x, a in zip(unequal_batch(), advantages)]
        metrics.append(update(trained, batch, 1.0, cfg))
        assert all((coefficient_R is None) == (loss == "plain") for coefficient_R in seen)
        after.append(weights_of(trained.model))
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-6, abs=1e-9)
    for name, w in after[0].items():
        assert w.isfinite().all() and torch.allclose(w, after[1][name], rtol=1e-6, atol=1e-8), name


@pytest.mark.parametrize(
    "changes, known",
    [
        ({}, True),
        (dict(updates_per_batch=2), False),
        (dict(is_cap=2.0), False),
        *((dict(loss=loss), False) for loss in ("plain", "half", "gspo", "kl")),
    ],
    ids=str,
)
def test_a_loss_takes_the_shortcut_that_it_earned(fresh, monkeypatch, changes, known):
    """Only where it declares its derivative, the ratio is 1, and nothing else multiplies it."""
    seen = seen_coefficients(monkeypatch)
    cfg, trained = fresh(micro_tokens=40, **changes)
    update(trained, unequal_batch(), 1e-3, cfg)
    assert seen and all((coefficient_R is not None) == known for coefficient_R in seen)


# --------------------------------------------------------------------------------- losses of forks


def half_loss(batch, cfg):
    loss, metrics = aero.clipped_loss(batch, cfg)
    return 0.5 * loss, metrics


def gspo_loss(batch, cfg):
    """A ratio per sequence (2507.18071): exp of the mean log-ratio of its tokens."""

    def per_rollout(x_R):
        return x_R.new_zeros(len(batch.length_S)).index_add(0, batch.rollout_R, x_R)

    ratio_S = (per_rollout(batch.logp_R - batch.behaviour_R) / batch.length_S).exp()
    advantage_S = per_rollout(batch.advantage_R) / batch.length_S
    weight_S = per_rollout(batch.weight_R)
    clipped_S = ratio_S.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    gain_S = torch.minimum(ratio_S * advantage_S, clipped_S * advantage_S)
    return -(weight_S * gain_S).sum(), {"ratio_mean": (weight_S * ratio_S).sum()}


def kl_loss(batch, cfg):
    """The clipped loss and a pull to the starting model, by the estimator k3 = r - log r - 1."""
    loss, metrics = aero.clipped_loss(batch, cfg)
    log_ratio_R = batch.reference_R - batch.logp_R
    kl = (batch.weight_R * (log_ratio_R.exp() - log_ratio_R - 1)).sum()
    return loss + 0.5 * kl, metrics | {"kl": kl}


FORKS = {
    "plain": aero.Loss(aero.clipped_loss),
    "half": aero.Loss(half_loss),
    "gspo": aero.Loss(gspo_loss),
    "kl": aero.Loss(kl_loss, needs_reference=True),
}


@pytest.fixture(autouse=True)
def forks(monkeypatch):
    for name, loss in FORKS.items():
        monkeypatch.setitem(aero.LOSSES, name, loss)


def token_logps(model, x, cfg):
    """(n,) of one rollout's tokens, from all logits and by torch alone."""
    ids = torch.tensor([*x.prompt, *x.tokens])
    logits_TV = model(ids, torch.tensor([0, len(ids)]).int(), len(ids)) / cfg.temperature
    rows = torch.arange(len(x.prompt) - 1, len(ids) - 1)
    return logits_TV.log_softmax(-1)[rows, torch.tensor(x.tokens)]


def fork_by_hand(name, model, start, batch, cfg, on_policy=True):
    """(loss, loss/kl) from the formulas, one rollout after the other: the mean over problems of
    the mean over their rollouts of the mean over tokens."""
    sizes = collections.Counter(x.place for x in batch)
    loss, kl = 0.0, 0.0
    for x in batch:
        logps = token_logps(model, x, cfg)
        gap = logps - (logps.detach() if on_policy else torch.tensor(x.logps))
        if name == "gspo":
            gap = gap.mean()
        ratio, share = gap.exp(), 1 / len(sizes) / sizes[x.place]
        bounded = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
        gain = torch.minimum(ratio * x.advantage, bounded * x.advantage).mean()
        loss = loss - (0.5 if name == "half" else 1.0) * share * gain
        if name == "kl":
            away = token_logps(start, x, cfg).detach() - logps
            k3 = share * (away.exp() - away - 1).mean()
            loss, kl = loss + 0.5 * k3, kl + k3.item()
    return loss, kl


def learn_forks_on(rank, world, node, port, folder, output, changes):
    """Two steps of every fork under SGD, with what autograd finds for the second one by hand."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    results = {}
    for name in ("clip", *FORKS):
        torch._dynamo.reset()
        cfg, trained = join(
            rank, world, node, port, folder, dict(changes, loss=name, grad_clip=1e9)
        )
        trained = trained._replace(optimizer=SGD(trained.model.parameters(), lr=1.0))
        update(trained, unequal_batch(), 0.1, cfg)
        before, batch = weights_of(trained.model), unequal_batch(1)
        metrics = update(trained, batch, 1.0, cfg)
        after = weights_of(trained.model)
        plain, start = Model(read_config(folder)), Model(read_config(folder))
        load_weights(start, folder)
        plain.load_state_dict(before)
        loss, kl = fork_by_hand(name, plain, start, batch, cfg)
        loss.backward()
        wanted = {n: before[n] - p.grad for n, p in plain.named_parameters()}
        results[name] = after, wanted, metrics, loss.item(), kl
        assert not trained.reference or not any(
            p.requires_grad for p in trained.reference.parameters()
        )
    if rank == 0:
        torch.save(results, output)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "world, changes",
    [
        (1, {}),
        (2, {}),
        (2, dict(reshard=True)),
        pytest.param(1, dict(compile=True), marks=pytest.mark.slow),
        pytest.param(2, dict(compile=True, reshard=True), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_fork_of_the_loss_trains(student, tmp_path, world, changes):
    """Half of the loss, a sequence-level ratio and a pull to the starting model: their gradients
    are those of plain autograd over all logits. Under the earlier design they became NaN."""
    results = learned(student, tmp_path / "forks.pt", world, world, learn_forks_on, **changes)
    for name, (after, wanted, metrics, loss, _) in results.items():
        for parameter, w in wanted.items():
            assert (after[parameter] - w).abs().max() < 2e-6, (name, parameter)
        assert metrics["loss/policy"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert metrics["optim/skipped"] == 0 and metrics["optim/grad_norm"] > 1e-3
        assert ("loss/kl" in metrics) == (name == "kl")
        assert ("loss/clip_frac" in metrics) == (name != "gspo")
    assert results["kl"][2]["loss/kl"] == pytest.approx(results["kl"][4], rel=1e-4)
    assert results["kl"][4] > 1e-6, "the model has not moved away from its start"


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_whose_clip_acts(fresh, student, name):
    """Two updates at rate 0, so against the sampler's log-probs: some sequences are clipped."""
    cfg, trained = fresh(SGD, loss=name, updates_per_batch=2, micro_tokens=40)
    plain = Model(read_config(student.model))
    load_weights(plain, student.model)
    batch = []
    for number, x in enumerate(unequal_batch()):
        logps = token_logps(plain, x, cfg).detach() + 0.3 * (-1) ** number
        batch.append(x._replace(logps=logps.tolist()))
    loss, _ = fork_by_hand(name, plain, plain, batch, cfg, on_policy=False)
    loss.backward()
    metrics = update(trained, batch, 0.0, cfg)
    squares = sum(p.grad.double().pow(2).sum().item() for p in plain.parameters())
    assert metrics["optim/grad_norm"] == pytest.approx(math.sqrt(squares), rel=1e-5)
    assert metrics["loss/policy"] == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)


def test_a_changed_loss_does_not_keep_the_derivative_of_the_old_one(monkeypatch):
    """`_replace(function=...)` kept it, and the fork trained the old gradient without a word."""
    clip = aero.LOSSES["clip"]

    def half(batch, cfg):
        loss, metrics = clip.function(batch, cfg)
        return 0.5 * loss, metrics

    aero.check_derivative("clip", Config())
    aero.check_derivative("clip", Config(clip_low=1e-9, clip_high=1e-9))
    monkeypatch.setitem(aero.LOSSES, "half", clip._replace(function=half))
    with pytest.raises(ValueError, match="--loss half: its derivative is not that of its function"):
        aero.check_derivative("half", Config())
    monkeypatch.setitem(aero.LOSSES, "half", aero.Loss(half))
    aero.check_derivative("half", Config())


def test_the_reference_stays_where_it_was(fresh):
    """Frozen: no optimizer state, no gradient, and the log-probs of the start after a step."""
    cfg, trained = fresh(loss="kl", micro_tokens=40)
    start = weights_of(trained.model)
    assert fresh(loss="clip")[1].reference is None
    for _ in range(2):
        update(trained, unequal_batch(), 1e-2, cfg)
    for (
        module
    ) in trained.reference.modules():  # what a forward pass without backward leaves gathered
        if isinstance(module, FSDPModule):
            module.reshard()
    reference = weights_of(trained.reference)
    assert all(torch.equal(w, start[name]) for name, w in reference.items())
    assert any(not torch.equal(w, start[name]) for name, w in weights_of(trained.model).items())
    assert len(trained.optimizer.state) == len(start)
    assert all(p.grad is None for p in trained.reference.parameters())


# -------------------------------------------------------------------------- several updates


def test_first_of_two_updates_is_on_policy(fresh):
    """With the sampler's own log-probs the first ratio is 1, so a mean other than 1 comes from the
    second."""
    cfg, trained = fresh(updates_per_batch=2)
    batch = []
    for x in unequal_batch():
        batch.append(x._replace(logps=scored(trained.model, x, cfg).logp_R.tolist()))
    still = update(trained, batch, 0.0, cfg)
    assert (
        still["loss/ratio_mean"] == pytest.approx(1, abs=1e-5) and still["mismatch/max_abs"] < 1e-5
    )
    moving = update(trained, batch, 1e-2, cfg)
    assert abs(moving["loss/ratio_mean"] - 1) > 1e-3 and moving["mismatch/max_abs"] < 1e-5


@pytest.mark.parametrize("updates", [1, 2])
def test_truncated_importance_weights(fresh, updates):
    """Every token weighs min(learner / sampler, cap); the ratio is against the learner's own
    log-probs, so it begins at 1."""

    def once(**changes):
        cfg, trained = fresh(SGD, updates_per_batch=updates, micro_tokens=40, **changes)
        return update(trained, batch, 0.0, cfg), trained, cfg

    batch = [x._replace(logps=[-3.0] * len(x.tokens)) for x in unequal_batch()]
    capped, trained, cfg = once(is_cap=2.0)
    assert capped["loss/ratio_mean"] == pytest.approx(1, abs=1e-6) and capped["loss/clip_frac"] == 0
    weights = aero.token_weights(
        [x.place for x in batch], [len(x.tokens) for x in batch], "prompt", 20
    )
    wanted = 0.0
    for x, weight in zip(batch, weights):
        logp_R = scored(trained.model, x, cfg).logp_R
        importance_R = (logp_R - torch.tensor(x.logps)).exp().clamp(max=2.0)
        wanted -= weight * x.advantage * importance_R.sum().item()
    assert capped["loss/policy"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_compiled_equals_eager(fresh, monkeypatch):
    """And all blocks and all numbers of tokens share two graphs, or four where forward passes are
    also done again. Inductor
    is left out: a CPU takes a minute for it."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    after = []
    for changes in (
        {},
        dict(compile=True, reshard=True),
        dict(compile=True, checkpoint_activations=True),
    ):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        cfg, trained = fresh(SGD, micro_tokens=40, grad_clip=1.0, **changes)
        update(trained, unequal_batch(), 1.0, cfg)
        after.append(weights_of(trained.model))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 * cfg.compile * (
            1 + cfg.checkpoint_activations
        )
    assert all(
        (other[name] - w).abs().max() < 1e-6 for other in after[1:] for name, w in after[0].items()
    )


def test_eos_is_trained(fresh, student):
    """A response that is EOS alone, with a positive advantage: EOS grows likelier after its
    prompt."""
    cfg, trained = fresh(SGD)
    eos, prompt = student.tokenizer.eos_token_id, (40, 41)

    def chance():
        with torch.no_grad():
            ids = torch.tensor(prompt)
            logits_TV = trained.model(ids, torch.tensor([0, 2]).int(), 2)
            return logits_TV[-1].softmax(-1)[eos].item()

    before = chance()
    update(trained, [Trained(0, prompt, [eos], [-1.0], 1.0)], 0.1, cfg)
    assert chance() > before


@pytest.mark.parametrize("bad", [NAN, math.inf, 1e38])
def test_a_gradient_that_is_not_finite_changes_nothing(fresh, bad):
    cfg, trained = fresh()
    batch = unequal_batch()
    update(trained, batch, 1e-3, cfg)
    weights, state = (
        weights_of(trained.model),
        [{k: v.clone() for k, v in s.items()} for s in trained.optimizer.state.values()],
    )
    batch[3] = batch[3]._replace(advantage=bad)
    metrics = update(trained, batch, 1e-3, cfg)
    assert metrics["optim/skipped"] == 1 and not math.isfinite(metrics["optim/grad_norm"])
    assert all(torch.equal(w, weights[name]) for name, w in full_weights(trained.model))
    for now, before in zip(trained.optimizer.state.values(), state):
        assert all(
            torch.equal(
                v.full_tensor() if hasattr(v, "full_tensor") else v,
                before[k].full_tensor() if hasattr(v, "full_tensor") else before[k],
            )
            for k, v in now.items()
        )
    assert update(trained, unequal_batch(), 1e-3, cfg)["optim/skipped"] == 0


def test_a_poisoned_weight_is_no_step(fresh):
    cfg, trained = fresh()
    with torch.no_grad():
        trained.model.model.norm.weight.to_local()[0] = math.inf
    before = weights_of(trained.model)
    assert update(trained, unequal_batch(), 1e-3, cfg)["optim/skipped"] == 1
    assert all(torch.equal(w, before[name]) for name, w in full_weights(trained.model))


def join(rank, world, node, port, folder, changes):
    torch.set_num_threads(1)
    aero.LOSSES.update(FORKS)
    os.environ["LOCAL_WORLD_SIZE"] = str(node)
    if not dist.is_initialized():
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    cfg = Config(**dict(dict(max_new=20, grad_clip=1.0, micro_tokens=40), **changes))
    read = functools.partial(read_weights, folder=folder)
    return cfg, make_learner(read_config(folder), cfg, CPU, read)


def learn_on(rank, world, node, port, folder, output, changes):
    """One update under SGD, whose step is the gradient, on this rank; rank 0 saves weights and
    metrics."""
    cfg, trained = join(rank, world, node, port, folder, changes)
    trained = trained._replace(optimizer=SGD(trained.model.parameters(), lr=1.0))
    metrics = update(trained, unequal_batch(), 1.0, cfg)
    sizes = {p.device_mesh.size(-1) for p in trained.model.parameters()}
    assert sizes == {node if cfg.shard == "node" else world}
    weights = weights_of(trained.model)
    if rank == 0:
        torch.save((weights, metrics), output)
    dist.destroy_process_group()


def learn_one_on(rank, world, node, port, folder, output, changes):
    """One rollout for all ranks; with as many weights of zero as there are other ranks."""
    cfg, trained = join(rank, world, node, port, folder, {})
    one = [Trained(0, (5, 6, 7), [8, 9, 0], [-1.0, -2.0, -1.5], 1.0)]
    before = weights_of(trained.model)
    metrics = update(trained, one, 1e-2, cfg)
    after = weights_of(trained.model)
    if rank == 0:
        torch.save((before, after, metrics), output)
    dist.destroy_process_group()


def no_rows_on(rank, world, node, port, folder, output, changes):
    """A backward pass to which only rank 0 brings rows to train, with their coefficients known and
    not."""
    _, trained = join(rank, world, node, port, folder, {})
    ids_T, rows_R, found = (
        torch.arange(4, 13),
        torch.arange(2, 7) if rank == 0 else torch.empty(0, dtype=torch.long),
        [],
    )
    inputs = (ids_T, torch.tensor([0, 9]).int(), 9, ids_T[rows_R + 1], rows_R, 0.9)
    for known_R in (None, torch.ones(len(rows_R))):
        trained.model.zero_grad()
        scores = trained.model(*inputs, known_R)
        source = scores.logp_R.sum() if known_R is None else scores.weighted
        source.backward()
        found.append([p.grad.full_tensor() for p in trained.model.parameters()])
    if rank == 0:
        torch.save(found, output)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one_rank_learns(student, tmp_path_factory):
    return learned(student, tmp_path_factory.mktemp("one") / "weights.pt", 1, 1)


def learned(student, output, world, node, learn=learn_on, **changes):
    with socket.socket() as s:
        s.bind(("", 0))
        port = s.getsockname()[1]
    ranks = [
        SERVER.Process(target=learn, args=(rank, world, node, port, student.model, output, changes))
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    return torch.load(output)


@pytest.mark.parametrize(
    "world, node, changes",
    [
        (2, 2, {}),
        (2, 2, dict(reshard=True)),
        (2, 1, {}),  # two nodes of one: replicated, all-reduced
        (2, 1, dict(reshard=True)),
        (2, 1, dict(shard="world")),
        (2, 2, dict(loss="plain")),
        (2, 2, dict(micro_tokens=1)),
        (2, 2, dict(micro_tokens=10_000)),
        (4, 2, dict(reshard=True)),  # two nodes of two
        (1, 1, dict(reshard=True)),
    ],
    ids=str,
)
def test_ranks_do_not_matter(student, one_rank_learns, tmp_path, world, node, changes):
    """Groups of 5, 1, 2 and 3 rollouts: the same gradient and metrics however they are sharded,
    replicated and cut."""
    weights, metrics = learned(student, tmp_path / "weights.pt", world, node, **changes)
    assert all((weights[name] - w).abs().max() < 1e-6 for name, w in one_rank_learns[0].items())
    assert metrics == pytest.approx(one_rank_learns[1], abs=1e-6, rel=1e-6)


def test_rank_with_nothing_takes_part(student, tmp_path, fresh):
    """One rollout for two ranks: both get one micro-batch, the second with weight zero and a
    gradient of zero."""
    assert pack_micro_batches([6], [6], 2, 100) == [[[0]], [[]]]
    one, two = (learned(student, tmp_path / f"{n}.pt", n, n, learn_one_on) for n in (1, 2))
    for before, after, metrics in (one, two):
        assert metrics["optim/grad_norm"] > 0 and any(
            not torch.equal(w, after[n]) for n, w in before.items()
        )
        assert metrics == pytest.approx(one[2], rel=1e-6, abs=1e-6)
    assert all((w - two[1][name]).abs().max() < 1e-6 for name, w in one[1].items())
    cfg, trained = fresh()
    packed, batch = micro_batch(items([8, 9, 0]), [0.0], "cpu")
    _, metrics = forward_backward(trained, packed, batch, cfg)
    grads = [p.grad.full_tensor() for p in trained.model.parameters()]
    assert all(not grad.any() for grad in grads) and metrics["policy"] == 0  # there, and zero


def test_a_rank_without_rows(student, tmp_path):
    one, two = (
        learned(student, tmp_path / f"{world}.pt", world, world, no_rows_on) for world in (1, 2)
    )
    for grads in zip(*one, *two):
        assert all(
            (g - grads[0]).abs().max() < 1e-6 * max(1, grads[0].abs().max()) for g in grads[1:]
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_learner_on_cuda(student):
    """bf16: the same gradient norm and entropy within rounding whatever only changes speed and
    memory."""
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found, model_cfg, device = [], read_config(student.model), torch.device("cuda", 0)
        for changes in (
            {},
            dict(micro_tokens=40),
            dict(reshard=True),
            dict(checkpoint_activations=True),
            dict(compile=True),
        ):
            cfg = Config(**dict(dict(max_new=20, micro_tokens=80), **changes))
            read = functools.partial(read_weights, folder=student.model)
            trained = make_learner(model_cfg, cfg, device, read)
            found.append([update(trained, unequal_batch(), 1e-3, cfg) for _ in range(2)])
        for other in found[1:]:
            for name in ("optim/grad_norm", "policy/entropy"):
                assert [m[name] for m in other] == pytest.approx(
                    [m[name] for m in found[0]], rel=2e-2
                ), name
        before, bad = (
            weights_of(trained.model),
            [x._replace(advantage=NAN) for x in unequal_batch()],
        )
        assert update(trained, bad, 1e-3, cfg)["optim/skipped"] == 1
        assert all(torch.equal(w, before[name]) for name, w in full_weights(trained.model))
    finally:
        dist.destroy_process_group()
