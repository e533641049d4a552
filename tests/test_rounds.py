"""What carries the decisions of aero.py out: rounds, budgets and refills with a fake sampler and
grader, one rank or several, and what is chosen, through an update of a tiny model."""

import collections
import itertools
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import aero
import data
import learner
import train
from config import Config
from hf import config_from_dict
from model import Model, pack
from reward import Verdict
from rollout import Rollout
from run import State


def seen(rewards):
    return aero.Group(rewards, problem=0)


# ----------------------------------------------------------------------------- streaming and rounds

COUNT = 12  # problems of the fake data set, from never right to always right


def outcome(problem, place, index, max_new):
    """(right, length) of a rollout, a pure function as with the real sampler. Right ones are short,
    wrong ones long."""
    rng = np.random.default_rng([3, place, index])
    right = rng.random() < (problem / (COUNT - 1)) ** 2
    return right, int(min(max_new, rng.integers(1, 4) if right else rng.integers(2, 40)))


class FakeSampler:
    """`slots` rollouts in flight, one token each per step; what ends in the same step comes back in
    scrambled order."""

    def __init__(self, slots, log):
        self.slots, self.log = slots, log
        self.queue, self.active = [], []
        self.rng = np.random.default_rng(slots)

    @property
    def busy(self):
        return bool(self.queue or self.active)

    def add(self, requests):
        for q in requests:
            self.log.append(("asked", q.place, q.index))
            self.queue.append(q)

    def step(self):
        while self.queue and len(self.active) < self.slots:
            q = self.queue.pop(0)
            right, length = outcome(q.problem.id, q.place, q.index, q.max_new)
            rollout = Rollout(q, [int(right)] * length, [0.0] * length, length == q.max_new)
            self.active.append([length, rollout])
        for entry in self.active:
            entry[0] -= 1
        done = [rollout for left, rollout in self.active if left == 0]
        self.active = [entry for entry in self.active if entry[0]]
        return [done[i] for i in self.rng.permutation(len(done))]


class FakeGrader:
    """Verdicts come 0 to `delay` polls later, in any order."""

    def __init__(self, delay, log):
        self.delay, self.log = delay, log
        self.jobs, self.waited = [], 0.0
        self.rng = np.random.default_rng(delay)

    @property
    def pending(self):
        return len(self.jobs)

    def submit(self, key, response, gold, problem, opened):
        self.jobs.append([self.rng.integers(0, self.delay + 1), key, float(response == gold)])

    def poll(self):
        ready = [job for job in self.jobs if job[0] == 0]
        self.jobs = [[left - 1, *rest] for left, *rest in self.jobs if left]
        self.log += [("graded", key.request.place, key.request.index) for _, key, _ in ready]
        return [
            (ready[i][1], Verdict(ready[i][2], None, "none", "wrong"))
            for i in self.rng.permutation(len(ready))
        ]

    def wait(self, timeout_s):
        while not (found := self.poll()):
            pass
        return found


TOKENIZER = SimpleNamespace(
    decode=lambda tokens, skip_special_tokens: "right" if tokens[0] else "wrong"
)
PROBLEMS = [data.Problem(i, (i,), "right", "", "") for i in range(COUNT)]


def never():
    return SimpleNamespace(asked=False)


def run_step(cfg, slots=16, delay=3, stop=None):
    """One step's sampling: (groups, new cursor, log of what was asked and graded)."""
    log, stop = [], stop or never()
    stop.asked_anywhere = lambda: any(train.gather(stop.asked))
    engine = train.Engine(FakeSampler(slots, log), FakeGrader(delay, log), TOKENIZER, stop)
    groups, cursor = train.draw_step(PROBLEMS, State(cursor=5), cfg, engine)
    assert stop.asked or not (engine.sampler.busy or engine.grader.pending)
    assert engine.grader.waited >= 0
    return groups, cursor, log


def rewards(g):
    return g.group.rewards


def drawn(groups, cfg):
    """All that training may depend on: for each place the problem, rounds, rewards, lengths, and
    what is kept."""
    batch, records = train.choose_batch(groups, 4, cfg)
    kept = collections.defaultdict(list)
    for x in batch:
        kept[x.place].append((x.advantage, x.tokens))
    return {
        r.place: (g.problem.id, g.rounds, rewards(g).tolist(), r.lengths, r.kept, kept[g.place])
        for g, r in zip(groups, records)
    }


def config(algo="aero", **changes):
    return Config(
        **dict(algo=algo, problems=COUNT, max_new=30) | aero.ALGORITHMS[algo].defaults | changes
    )


class FakeDist:
    """Ranks are threads."""

    def __init__(self, world=1):
        self.world, self.local = world, threading.local()

    def get_rank(self):
        return getattr(self.local, "rank", 0)

    def get_world_size(self):
        return self.world


@pytest.fixture
def ranks(monkeypatch):
    """(cfg, world) -> all ranks' groups; ranks are threads, and gather waits for all of them: a
    missing one fails the test."""
    monkeypatch.setattr(train, "gather", lambda x: [x])
    monkeypatch.setattr(train, "dist", FakeDist())

    def run(cfg, world, **options):
        fake, parts = FakeDist(world), [None] * world
        barrier = threading.Barrier(world, timeout=20)
        results = [None] * world

        def gather(x):
            parts[fake.get_rank()] = x
            barrier.wait()
            found = list(parts)
            barrier.wait()
            return found

        def of_rank(rank):
            fake.local.rank = rank
            results[rank] = run_step(cfg, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "gather", gather)
            patch.setattr(train, "dist", fake)
            threads = [threading.Thread(target=of_rank, args=(rank,)) for rank in range(world)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len({cursor for _, cursor, _ in results}) == 1
        return sorted(itertools.chain(*(groups for groups, _, _ in results)), key=lambda g: g.place)

    return run


def one_by_one(cfg):
    """The rounds of each place by the plainest loop: one problem after the other, and for the pool,
    round after round."""
    algo, found = aero.ALGORITHMS[cfg.algo], {}
    for place in range(cfg.problems):
        problem = data.nth(COUNT, cfg.seed, 5 + place)

        def rewards_of(n, place=place, problem=problem):
            all_of = (outcome(problem, place, i, cfg.max_new) for i in range(n))
            return np.array([float(right and length < cfg.max_new) for right, length in all_of])

        rounds = [0] * algo.first(seen([]), cfg)
        while cfg.rescue_budget == "prompt" and (
            n := algo.more(seen(rewards_of(len(rounds))), cfg)
        ):
            rounds += [rounds[-1] + 1] * n
        found[place] = rounds, rewards_of
    spare = cfg.problems * (cfg.n_total - cfg.n_explore)
    while cfg.rescue_budget == "pool" and spare:
        waiting = [
            place
            for place, (rounds, rewards_of) in found.items()
            if not rewards_of(len(rounds)).any()
        ]
        for place in waiting:
            rounds, n = found[place][0], min(spare, cfg.n_extra)
            rounds += [rounds[-1] + 1] * n
            spare -= n
        if not waiting:
            break
    return {
        place: (rounds, rewards_of(len(rounds)).tolist())
        for place, (rounds, rewards_of) in found.items()
    }


def named(changes):
    return ",".join(f"{k}={v}" for k, v in changes.items()) or "default"


STREAMED = [
    dict(),
    dict(rescue_budget="pool"),
    dict(algo="reinforce_ada"),
    dict(u_res=0.2),
    dict(n_extra=1),
]


@pytest.mark.parametrize("changes", STREAMED, ids=named)
def test_streaming_draws_what_a_barrier_draws(ranks, changes):
    """Lengths tell right from wrong here, so a decision on half a round would show. For any number
    of slots, slow or fast graders, one rank or three: the same rollouts, kept with the same
    advantages, and those that the plainest loop draws."""
    cfg = config(**changes)
    groups, cursor, log = run_step(cfg)
    wanted = drawn(groups, cfg)
    assert {place: x[1:3] for place, x in wanted.items()} == one_by_one(cfg) and cursor == 5 + COUNT
    assert any(max(g.rounds) > 0 for g in groups)
    for options in (dict(slots=1, delay=0), dict(slots=3, delay=9), dict(slots=1000, delay=0)):
        assert drawn(run_step(cfg, **options)[0], cfg) == wanted
    for world in (2, 3, COUNT + 1):
        assert drawn(ranks(cfg, world), cfg) == wanted

    # It does stream: a problem's second round is asked for while others wait for their first.
    def overtakes(log):
        first = {
            ("graded", g.place, i)
            for g in groups
            for i, number in enumerate(g.rounds)
            if number == 0
        }
        later = {
            ("asked", g.place, i)
            for g in groups
            for i, number in enumerate(g.rounds)
            if number == 1
        }
        return min(log.index(x) for x in later) < max(log.index(x) for x in first)

    assert overtakes(log)


@pytest.mark.parametrize("changes", STREAMED, ids=named)
def test_decisions_are_taken_on_whole_rounds(ranks, monkeypatch, changes):
    """Whatever a problem was asked for is graded before `more` sees it, in the order asked, once
    per round."""
    cfg, decided, algo = config(**changes), [], aero.ALGORITHMS[changes.get("algo", "aero")]

    def more(group, cfg):
        decided.append(group.rewards.tolist())
        return algo.more(group, cfg)

    monkeypatch.setitem(aero.ALGORITHMS, cfg.algo, algo._replace(more=more))
    groups, _, _ = run_step(cfg, slots=5, delay=6)
    wanted = [
        rewards(g)[np.array(g.rounds) <= k].tolist()
        for g in groups
        for k in range(max(g.rounds) + 1)
    ]
    assert sorted(decided) == sorted(wanted)


def test_half_a_round_would_favour_short_answers(ranks, monkeypatch):
    """The comparison has teeth: with one verdict of a round still out, other rollouts are drawn
    than by the plain loop."""
    whole = {g.place: len(g.rounds) for g in run_step(config())[0]}

    def complete(g):
        return len(g.verdicts) >= len(g.rounds) - 1

    def graded(g):
        return aero.Group([g.verdicts[i].score for i in sorted(g.verdicts)], g.problem.id)

    monkeypatch.setattr(train.OpenGroup, "complete", property(complete))
    monkeypatch.setattr(train.OpenGroup, "group", property(graded))
    assert {g.place: len(g.rounds) for g in run_step(config(), slots=4)[0]} != whole


@pytest.mark.parametrize("n_extra", [1, 2, 3, 5])
def test_rescue_budgets(ranks, n_extra):
    """prompt: a group grows to n_total exactly, if nothing is right. pool: the step draws n_total
    per problem at most, and exactly that many while a problem is without success; the problems that
    wait are dealt to evenly."""
    for g in run_step(config(n_extra=n_extra))[0]:
        assert len(g.rounds) <= 16 and (len(g.rounds) == 16 or rewards(g).any())
        assert np.diff(g.rounds).max() <= 1 and max(collections.Counter(g.rounds).values()) == 8
    groups, _, _ = run_step(config(n_extra=n_extra, rescue_budget="pool"))
    waiting = [len(g.rounds) for g in groups if not rewards(g).any()]
    assert waiting, "the fake data need a problem that is never right"
    assert sum(len(g.rounds) for g in groups) == COUNT * 16 and max(waiting) > 16
    assert max(waiting) - min(waiting) <= 2 * n_extra
    for g in groups:
        if rewards(g).any():  # what came after the round that succeeded: nothing
            assert rewards(g)[:8].any() or not rewards(g)[np.array(g.rounds) < max(g.rounds)].any()


def test_refill_replaces_flat_groups(ranks):
    cfg = config("dapo", problems=8)
    groups, cursor, _ = run_step(cfg)
    mixed = [g for g in groups if not aero.is_flat(rewards(g))]
    assert len(mixed) == 8 < len(groups) and cursor == 5 + len(groups)
    assert [g.place for g in groups] == list(range(len(groups)))
    assert {x.place for x in train.choose_batch(groups, 0, cfg)[0]} == {g.place for g in mixed}
    for world in (2, 3):
        assert drawn(ranks(cfg, world), cfg) == drawn(groups, cfg)


def test_refill_stops_at_its_cap(ranks, monkeypatch):
    """Nothing is ever right: the refills end, the batch is empty and the run goes on."""
    monkeypatch.setattr(train, "draw", draw := count_calls(train.draw))
    monkeypatch.setitem(globals(), "outcome", lambda problem, place, index, max_new: (False, 3))
    for cap in (0, 1, 10):
        draw.calls = 0
        cfg = config("dapo", problems=4, refill_cap=cap)
        groups, cursor, _ = run_step(cfg)
        assert len(groups) == 4 * (cap + 1) and cursor == 5 + len(groups) and draw.calls == cap + 1
        assert train.choose_batch(groups, 0, cfg)[0] == []


def count_calls(function):
    def counted(*arguments):
        counted.calls += 1
        return function(*arguments)

    counted.calls = 0
    return counted


@pytest.mark.parametrize(
    "changes", [dict(), dict(rescue_budget="pool"), dict(algo="dapo")], ids=named
)
def test_a_signal_ends_sampling_in_the_middle(ranks, changes):
    """Groups are incomplete then and are not looked at: the step is drawn again after the
    resumption."""
    for after in (0, 1, 7, 60):

        class Stop:
            left = after

            @property
            def asked(self):
                self.left -= 1
                return self.left < 0

        run_step(config(**changes), stop=Stop())


# ---------------------------------------------------------------- through training, on a tiny model

V, EOS = 16, 0


def group(place, outcomes, truncated=(), seed=0):
    """A finished group of one problem: random responses that end in EOS, graded."""
    rng = np.random.default_rng([seed, place])
    g = train.OpenGroup(place, data.Problem(place, (3, 1 + place, 5), "", "", ""))
    for request in g.request(len(outcomes), 20):
        tokens = [*rng.integers(0, V, rng.integers(1, 9)).tolist(), EOS]
        i = request.index
        rollout = Rollout(request, tokens, [-2.5] * len(tokens), i in truncated)
        g.take(rollout, Verdict(float(outcomes[i]), None, "none", "wrong"))
    return g


@pytest.fixture
def tiny(monkeypatch):
    """() -> (model, optimizer) on one rank, always the same; sharded as in training."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model_cfg = config_from_dict(dict(
        model_type="qwen2", vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, rms_norm_eps=1e-6,
        tie_word_embeddings=True, eos_token_id=EOS,
    ))  # fmt: skip

    def make(cfg):
        torch.manual_seed(0)
        with torch.no_grad():
            model = Model(model_cfg).init_weights(0.2)
        learner.shard(model, cfg, torch.device("cpu"))
        return model, learner.make_optimizer(model, cfg)

    yield make
    dist.destroy_process_group()


def learn(tiny, groups, **changes):
    """choose and update. Returns (metrics, parameters before, after, log-prob of the trained tokens
    before, after)."""
    cfg = Config(**{"lr": 1e-2, "max_new": 20, "algo": "aero"} | changes)
    model, optimizer = tiny(cfg)
    batch, _ = train.choose_batch(groups, 0, cfg)
    packed = pack([x.prompt for x in batch], [x.tokens for x in batch], "cpu")
    ids_T, cu, max_len, rows_R, targets_R = packed

    def look():  # parameters first: a forward pass without backward leaves them gathered
        parameters = torch.cat([p.detach().full_tensor().flatten() for p in model.parameters()])
        with torch.no_grad():
            logp_R = model(ids_T, cu, max_len, targets_R, rows_R).logp_R
        return parameters, logp_R.mean().item()

    before, logp_before = look()
    metrics = learner.update(learner.Learner(model, optimizer), batch, cfg.lr, cfg)
    after, logp_after = look()
    return metrics, before, after, logp_before, logp_after


@pytest.mark.parametrize("right", [True, False])
def test_flat_groups_are_learned_from(tiny, right):
    """A batch of flat groups alone: aero raises what was right and lowers what was wrong; grpo
    leaves every bit in place."""
    groups = [group(place, [right] * n) for place, n in enumerate((8, 16, 8))]
    metrics, before, after, logp_before, logp_after = learn(tiny, groups)
    assert metrics["optim/grad_norm"] > 1e-3 and not torch.equal(before, after)
    assert (logp_after > logp_before) == right
    metrics, before, after, _, _ = learn(tiny, groups, algo="grpo")
    assert metrics["optim/grad_norm"] == 0 and torch.equal(before, after)
    for algo in ("grpo_skip", "dapo", "reinforce_ada"):
        assert train.choose_batch(groups, 0, Config(algo=algo))[0] == []
    assert train.choose_batch(groups, 0, Config(algo="aero", posterior=False))[0] == []


def test_truncated_is_wrong_and_trained(ranks):
    """All 8 say the right answer, 2 are cut: 6 of 8 are right, the 2 are kept, with their tokens,
    and pushed down."""
    g = group(0, [1] * 8, truncated=(2, 5))
    assert rewards(g).tolist() == [1, 1, 0, 1, 1, 0, 1, 1]
    batch, (record,) = train.choose_batch([g], 0, Config())
    assert record.kept == list(range(8)) and sum(record.truncated) == 2
    assert batch[2].advantage == batch[5].advantage == pytest.approx(-math.sqrt(3))
    assert batch[2].tokens == g.rollouts[2].tokens
