"""
rollout.py: greedy against transformers, log-probs against the training forward, frequencies against softmax, the random
stream against the published generator, and rollouts that do not depend on who else is in the batch. Shapes as in rollout.py.
"""

import math

import pytest
import torch
from test_model import FAMILIES, loaded, randomize
from transformers import AutoModelForCausalLM

from model import Model, ModelConfig
from rollout import MASK32, Request, Sampler, Sampling, draw, gumbel_noise, philox, stream_key, truncate

V = 89
PROMPTS = [tuple((7 * i + 3 * n) % V for i in range(n)) for n in (9, 1, 20, 4, 13, 2, 6)]


@pytest.fixture(scope="module")
def model():
    return randomize(Model(ModelConfig.from_dict(FAMILIES["qwen2-untied"].to_dict())))


def sampler_of(model, slots=4, context=64, eos=(), seed=0, **sampling):
    sampler = Sampler(model.cfg, slots, context, eos)
    sampler.load(model.named_parameters())
    sampler.begin(seed, Sampling(**sampling))
    return sampler


def drain(sampler):
    """{(problem, index): rollout} of all that is queued and running."""
    done = {}
    while sampler.busy:
        for rollout in sampler.step():
            assert (rollout.problem, rollout.index) not in done
            done[rollout.problem, rollout.index] = rollout
    return done


def requests(prompts=PROMPTS, each=3, max_new=12):
    return [Request(p, i, prompt, max_new) for p, prompt in enumerate(prompts) for i in range(each)]


def same(a, b):
    """Equal tokens; log-probs to the rounding of matrix products of other shapes."""
    assert a.keys() == b.keys()
    for key in a:
        assert (a[key].tokens, a[key].truncated, a[key].prompt) == (b[key].tokens, b[key].truncated, b[key].prompt), key
        assert a[key].logps == pytest.approx(b[key].logps, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_equals_transformers(name, tmp_path):
    """Seven prompts of 1 to 20 tokens through three slots; two ids end a response, chosen so that some end early."""
    reference = randomize(AutoModelForCausalLM.from_config(FAMILIES[name])).eval()
    reference.save_pretrained(tmp_path)
    wanted = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=14, do_sample=False)
        wanted.append(out[0, len(prompt) :].tolist())
    eos = {wanted[0][4], wanted[2][6]}
    sampler = sampler_of(loaded(tmp_path), 3, 40, eos, temperature=0.0)
    sampler.add(requests(each=1, max_new=14))
    found, ends = drain(sampler), 0
    for p, tokens in enumerate(wanted):
        end = next((t + 1 for t, token in enumerate(tokens) if token in eos), len(tokens))
        ends += end < 14
        assert found[p, 0].tokens == tokens[:end] and found[p, 0].truncated == (tokens[end - 1] not in eos)
    assert ends >= 2


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("cut", [dict(), dict(top_p=0.9, top_k=20)])
def test_logps_equal_a_teacher_forced_pass(model, temperature, cut):
    """Of the policy at this temperature, over all words: what top-p and top-k leave out does not change them."""
    sampler = sampler_of(model, slots=5, eos=(3, 11), temperature=temperature, **cut)
    sampler.add(requests())
    rollouts = list(drain(sampler).values())
    ids, rows, lengths = [], [], []
    for r in rollouts:
        rows += range(len(ids) + len(r.prompt) - 1, len(ids) + len(r.prompt) + len(r.tokens) - 1)
        ids += [*r.prompt, *r.tokens]
        lengths.append(len(r.prompt) + len(r.tokens))
    ids_T, rows_R = torch.tensor(ids), torch.tensor(rows)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    targets_R = torch.tensor([t for r in rollouts for t in r.tokens])
    with torch.no_grad():
        logp_R, _ = model(ids_T, cu, max(lengths), targets_R, rows_R, temperature)
    recorded_R = torch.tensor([p for r in rollouts for p in r.logps])
    assert len({len(r.tokens) for r in rollouts}) > 2
    assert (logp_R - recorded_R).abs().max() < 1e-5


def test_greedy_logps_are_those_of_temperature_one(model):
    sampler = sampler_of(model, temperature=0.0)
    sampler.add([Request(0, 0, PROMPTS[0], 1)])
    (rollout,) = drain(sampler).values()
    logits_V = model(torch.tensor(PROMPTS[0]), torch.tensor([0, 9]).int(), 9)[-1]
    assert rollout.tokens == [logits_V.argmax().item()]
    assert rollout.logps[0] == pytest.approx(logits_V.log_softmax(-1).max().item(), abs=1e-5)


# --------------------------------------------------------------------------------------------------- distribution


def chi_square(counts, probabilities):
    """Refuses at p = 1e-4 (Wilson-Hilferty); cells that expect less than 5 are put together. Zero cells must be empty."""
    counts, expected = counts.double(), probabilities.double() * counts.sum()
    assert not counts[expected == 0].any()
    few = (expected < 5) & (expected > 0)
    cells = [(counts[~few & (expected > 0)], expected[~few & (expected > 0)])]
    if expected[few].sum() >= 5:
        cells.append((counts[few].sum()[None], expected[few].sum()[None]))
    found = sum(((c - e) ** 2 / e).sum().item() for c, e in cells)
    df = sum(len(c) for c, _ in cells) - 1
    bound = df * (1 - 2 / (9 * df) + 3.719 * math.sqrt(2 / (9 * df))) ** 3
    print(f"chi-square {found:.1f}, {df} degrees of freedom, bound {bound:.1f}")
    assert found < bound


def cut_by_hand(probabilities, top_p, top_k):
    """Plain loops: the k most likely, then the fewest of them that hold top_p of their mass."""
    order = sorted(range(len(probabilities)), key=lambda v: -probabilities[v])
    order = order[:top_k] if top_k else order
    mass, kept = sum(probabilities[v] for v in order), []
    for v in order:
        if top_p < 1 and sum(probabilities[w] for w in kept) / mass >= top_p:
            break
        kept.append(v)
    total = sum(probabilities[v] for v in kept)
    return [probabilities[v] / total if v in kept else 0.0 for v in range(len(probabilities))]


@pytest.mark.parametrize("over", ["rollouts", "positions", "problems"])
@pytest.mark.parametrize("sampling", [
    Sampling(), Sampling(0.6), Sampling(1.7), Sampling(top_k=7), Sampling(top_p=0.8), Sampling(1.3, top_p=0.9, top_k=12),
], ids=str)  # fmt: skip
def test_frequencies(sampling, over):
    N = 20_000
    logits_V = torch.randn(60, generator=torch.Generator().manual_seed(5)) * 1.5
    key_N, position_N = torch.full((N,), stream_key(1, 2, 3)), torch.full((N,), 4)
    if over == "positions":
        position_N = torch.arange(N)
    else:
        key_N = torch.tensor([stream_key(1, i, 3) if over == "problems" else stream_key(1, 2, i) for i in range(N)])
    token_N, logp_N = draw(logits_V.expand(N, -1), key_N, position_N, sampling)
    whole_V = (logits_V / sampling.temperature).softmax(-1)
    wanted_V = torch.tensor(cut_by_hand(whole_V.double().tolist(), sampling.top_p, sampling.top_k))
    chi_square(token_N.bincount(minlength=60), wanted_V)
    assert torch.allclose(logp_N, whole_V.log()[token_N], atol=1e-6)


def test_neighbours_are_independent():
    """Pairs of words at successive positions, of neighbouring rollouts, and of neighbouring words of one position."""
    N, flat = 20_000, torch.zeros(1, 8)
    key_N = torch.tensor([stream_key(0, 0, i) for i in range(N)])
    zeros = torch.zeros(N, dtype=torch.long)
    one = draw(flat.expand(N, -1), key_N, zeros, Sampling())[0]
    two = draw(flat.expand(N, -1), key_N, zeros + 1, Sampling())[0]
    chi_square((one * 8 + two).bincount(minlength=64), torch.full((64,), 1 / 64))
    chi_square((one[:-1] * 8 + one[1:]).bincount(minlength=64), torch.full((64,), 1 / 64))
    noise = gumbel_noise(key_N, zeros, 8)
    eighths = (torch.exp(-torch.exp(-noise)) * 8).long().clamp(max=7)  # uniform again
    for v in range(7):
        chi_square((eighths[:, v] * 8 + eighths[:, v + 1]).bincount(minlength=64), torch.full((64,), 1 / 64))


def test_sampler_frequencies(model):
    """The whole path: 6,000 first tokens of one prompt against the training forward, at temperature 0.8."""
    sampler = sampler_of(model, slots=512, context=16, temperature=0.8)
    sampler.add(Request(0, i, PROMPTS[0], 1) for i in range(6000))
    tokens = torch.tensor([r.tokens[0] for r in drain(sampler).values()])
    logits_V = model(torch.tensor(PROMPTS[0]), torch.tensor([0, 9]).int(), 9)[-1].detach()
    chi_square(tokens.bincount(minlength=V), (logits_V / 0.8).softmax(-1))


def test_truncate_edges():
    logits_AV = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(truncate(logits_AV, 1.0, 0), logits_AV) and torch.equal(truncate(logits_AV, 1.0, 9), logits_AV)
    assert truncate(logits_AV, 1e-9, 0).isfinite().sum(-1).tolist() == [1, 1]  # the first always stays
    assert truncate(logits_AV, 0.75, 0).isfinite().sum(-1).tolist() == [2, 3]
    assert truncate(logits_AV[:1], 1.0, 1).isfinite().tolist() == [[True, False, False, False]]


@pytest.mark.parametrize("bad", [dict(temperature=-1.0), dict(top_p=0.0), dict(top_p=1.5), dict(top_k=-1)])
def test_bad_sampling(bad):
    with pytest.raises(ValueError, match="sampling: wanted"):
        Sampling(**bad)


# -------------------------------------------------------------------------------------------------- random streams


def philox_by_hand(counter, key, rounds=10):
    """Philox4x32 as published, in Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & MASK32, (p0 >> 32) ^ c[3] ^ k[1], p0 & MASK32]
        k = [(k[0] + 0x9E3779B9) & MASK32, (k[1] + 0xBB67AE85) & MASK32]
    return c


def test_philox_known_answers():
    """The vectors of Random123 for the plain form, then ours against the plain form."""
    assert philox_by_hand([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox_by_hand([MASK32] * 4, [MASK32] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert philox_by_hand(
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    ) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]  # fmt: skip
    rows = [(0, 0, 0), (MASK32, MASK32, 2**63 - 1), (1, 0, 1), (0, 1, 1 << 40)]
    rows += [(i * 7919 % 40_000, i * 31, stream_key(3, i, 5)) for i in range(50)]
    low, high, key = (torch.tensor(column) for column in zip(*rows))
    found = torch.stack(philox(low, high, torch.zeros_like(low), key), -1).tolist()
    for (a, b, k), words in zip(rows, found):
        assert words == philox_by_hand([a, b, 0, 0], [k & MASK32, k >> 32])


def test_noise_is_gumbel_of_its_words():
    key, position = stream_key(9, 8, 7), 1234
    noise = gumbel_noise(torch.tensor([key]), torch.tensor([position]), 11)[0]  # 11: not a multiple of 4
    words = [w for c in range(3) for w in philox_by_hand([c, position, 0, 0], [key & MASK32, key >> 32])][:11]
    wanted = [-math.log(-math.log1p(-(w + 0.5) / 2**32)) for w in words]
    assert noise.tolist() == pytest.approx(wanted, abs=1e-5)


def test_keys_differ():
    keys = {stream_key(s, p, i) for s in (-1, 0, 1, 11, 2**40) for p in range(30) for i in range(30)}
    assert len(keys) == 5 * 30 * 30 and all(0 <= k < 2**63 for k in keys)


# ------------------------------------------------------------------------------------------------------ invariance


@pytest.fixture(scope="module")
def alone(model):
    """Every rollout drawn by itself."""
    done, sampler = {}, sampler_of(model, slots=1, eos=(3, 11))
    for request in requests():
        sampler.add([request])
        done |= drain(sampler)
    assert {r.truncated for r in done.values()} == {True, False}
    return done


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_slots_do_not_matter(model, alone, slots):
    sampler = sampler_of(model, slots=slots, eos=(3, 11))
    sampler.add(requests())
    same(drain(sampler), alone)


def test_order_and_time_of_admission_do_not_matter(model, alone):
    """Backwards, a few at a time while others run, with other problems in between."""
    sampler, waiting, done = sampler_of(model, slots=4, eos=(3, 11)), requests()[::-1], {}
    while waiting or sampler.busy:
        sampler.add([Request(100 + len(waiting), 0, PROMPTS[3], 5)])
        while waiting and len(waiting) % 4:
            sampler.add([waiting.pop(0)])
        sampler.add(waiting[:1])
        waiting = waiting[1:]
        done |= {(r.problem, r.index): r for r in sampler.step()}
        if not waiting:
            done |= drain(sampler)
    same({key: r for key, r in done.items() if key[0] < 100}, alone)


def test_streams_differ(model):
    """By seed, problem and index, and only by these."""
    def tokens(seed, problem, index):
        sampler = sampler_of(model, seed=seed, temperature=3.0)
        sampler.add([Request(problem, index, PROMPTS[0], 12)])
        return tuple(drain(sampler)[problem, index].tokens)

    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0), (2**33, 0, 0)]
    assert len({tokens(*key) for key in keys}) == len(keys)
    assert tokens(*keys[0]) == tokens(*keys[0])


def test_compaction(model):
    """Rollouts of every length from 1 to 20 in six slots: holes close in all places, and nothing is mixed up."""
    ragged = [Request(p, 0, PROMPTS[p % len(PROMPTS)], 1 + 7 * p % 20) for p in range(20)]
    one, many = sampler_of(model, slots=1), sampler_of(model, slots=6)
    for sampler in (one, many):
        sampler.add(ragged)
    found = drain(many)
    same(found, drain(one))
    assert all(len(found[r.problem, 0].tokens) == len(found[r.problem, 0].logps) == r.max_new for r in ragged)


# --------------------------------------------------------------------------------------------------------- streams


def test_every_eos_ends_and_belongs_to_the_response(model):
    sampler = sampler_of(model, slots=8, eos=(3, 11, 20, 21, 22, 23, 24, 25), temperature=2.0)
    sampler.add(requests(each=6, max_new=40))
    done = drain(sampler).values()
    ends = {r.tokens[-1] for r in done if not r.truncated}
    assert len(ends) >= 4 and ends <= sampler.eos_ids
    for r in done:
        assert not sampler.eos_ids & set(r.tokens[:-1])
        assert len(r.tokens) == 40 if r.truncated else r.tokens[-1] in sampler.eos_ids


def test_eos_on_the_last_token_is_no_truncation(model):
    plain = sampler_of(model)
    plain.add([Request(0, 0, PROMPTS[0], 5)])
    tokens = drain(plain)[0, 0].tokens
    assert tokens[4] not in tokens[:4]
    sampler = sampler_of(model, eos=(tokens[4],))
    sampler.add([Request(0, 0, PROMPTS[0], 5), Request(1, 0, PROMPTS[0], 1)])
    done = drain(sampler)
    assert done[0, 0].tokens == tokens and not done[0, 0].truncated
    assert done[1, 0].truncated and len(done[1, 0].tokens) == 1


def test_only_drawn_ids_end_a_response(model):
    """Prompts full of the EOS id, and no EOS at all: what a pad token would be is an ordinary word."""
    sampler = sampler_of(model, eos=(3,))
    sampler.add([Request(0, 0, (3, 3, 5, 3), 8)])
    assert len(drain(sampler)[0, 0].tokens) >= 1
    never = sampler_of(model, eos=(), temperature=3.0)
    never.add(requests(each=4, max_new=30))
    done = drain(never).values()
    assert all(r.truncated and len(r.tokens) == 30 for r in done) and any(0 in r.tokens for r in done)


def test_short_ones_stream_out_and_slots_are_refilled(model):
    sampler = sampler_of(model, slots=2)
    lengths = [30, 1, 1, 4, 2, 7, 3, 3]
    sampler.add(Request(p, 0, PROMPTS[p % 7], n) for p, n in enumerate(lengths))
    active, decode = [], sampler.model.decode
    sampler.model.decode = lambda ids_A, *rest: active.append(len(ids_A)) or decode(ids_A, *rest)
    ended = []
    while sampler.busy:
        ended += [(r.problem, len(active)) for r in sampler.step()]
    assert ended == [(1, 1), (2, 2), (3, 6), (4, 8), (5, 15), (6, 18), (7, 21), (0, 30)]
    assert active == [2] * 21 + [1] * 9


@pytest.mark.parametrize("slots", [1, 4])
def test_a_prompt_is_computed_once(model, slots):
    """For its group and a later round of it. In one slot a quarter of the cache is less than the prompt: it was computed
    for each rollout anew, since what had just been used was forgotten."""
    sampler = sampler_of(model, slots=slots)
    given, prefill = [], sampler.model.prefill
    sampler.model.prefill = lambda ids_T, *rest: given.append(len(ids_T)) or prefill(ids_T, *rest)
    sampler.add(Request(0, i, PROMPTS[2], 3) for i in range(8))
    drain(sampler)
    sampler.add([Request(0, 8, PROMPTS[2], 3)])
    drain(sampler)
    assert given == [20]


def test_prompts_at_hand_are_bounded(model):
    sampler = sampler_of(model, slots=4, context=32)
    sampler.add(Request(p, 0, tuple((p + i) % V for i in range(8)), 2) for p in range(40))
    while sampler.busy:
        sampler.step()
        assert sum(map(len, sampler.prompt_kv)) <= 4 * 32 // 4


def test_many_prompts_in_bounded_forwards(model, monkeypatch):
    monkeypatch.setattr(Sampler, "PREFILL_TOKENS", 24)
    sampler, small = sampler_of(model, slots=16), []
    prefill = sampler.model.prefill
    sampler.model.prefill = lambda ids_T, *rest: small.append(len(ids_T)) or prefill(ids_T, *rest)
    sampler.add(requests(each=1))
    found = drain(sampler)
    assert max(small) <= 24 and sum(small) == sum(map(len, PROMPTS))
    whole = sampler_of(model, slots=1)
    whole.add(requests(each=1))
    same(found, drain(whole))


def test_a_prompt_of_one_token(model):
    sampler = sampler_of(model, temperature=0.0)
    sampler.add([Request(0, 0, (5,), 6)])
    ids = [5]
    for _ in range(6):
        ids.append(model(torch.tensor(ids), torch.tensor([0, len(ids)]).int(), len(ids))[-1].argmax().item())
    assert drain(sampler)[0, 0].tokens == ids[1:]


def test_filling_the_context_to_the_last_place(model):
    sampler, wide = sampler_of(model, slots=2, context=16), sampler_of(model, slots=2)
    for s in (sampler, wide):
        s.add([Request(0, 0, PROMPTS[0], 7), Request(1, 0, PROMPTS[1], 15), Request(2, 0, PROMPTS[0], 7)])
    same(drain(sampler), drain(wide))


# ---------------------------------------------------------------------------------------------------------- states


def test_load_changes_results_and_forgets_prompts(model):
    """Old prompt keys under new weights would be a mixture of two policies."""
    other = randomize(Model(model.cfg), seed=1)
    sampler, fresh = sampler_of(model), sampler_of(other)
    sampler.add(requests(each=1))
    before, buffer = drain(sampler), sampler.model.model.norm.weight.data_ptr()
    assert sampler.prompt_kv
    sampler.load(other.named_parameters())
    assert not sampler.prompt_kv and sampler.model.model.norm.weight.data_ptr() == buffer
    for s in (sampler, fresh):
        s.add(requests(each=1))
    after = drain(sampler)
    same(after, drain(fresh))
    assert any(before[key].tokens != after[key].tokens for key in before)
    assert sampler.model.model.norm.weight.data_ptr() != other.model.norm.weight.data_ptr()  # a copy, not the learner's


def test_load_wants_all_weights(model):
    sampler = sampler_of(model)
    with pytest.raises(ValueError, match=r"no weights were given for model\.layers"):
        sampler.load([(n, p) for n, p in model.named_parameters() if "layers.1" not in n])


def test_nothing_changes_under_a_running_rollout(model):
    sampler = sampler_of(model)
    sampler.add(requests(each=2))
    for _ in range(2):  # queued only, then running
        with pytest.raises(RuntimeError, match=r"begin\(\) while"):
            sampler.begin(1, Sampling())
        with pytest.raises(RuntimeError, match=r"load\(\) while"):
            sampler.load(model.named_parameters())
        sampler.step()
    drain(sampler)
    sampler.begin(1, Sampling())
    assert not sampler.busy and sampler.step() == []


@pytest.mark.parametrize("request_, message", [
    (Request(4, 0, (), 5), "problem 4: wanted a prompt and max_new of 1 or more, found 0 tokens and 5"),
    (Request(4, 0, (1, 2), 0), "found 2 tokens and 0"),
    (Request(4, 0, (1,) * 60, 5), "problem 4: a prompt of 60 tokens and max_new of 5 do not fit the context of 64"),
])  # fmt: skip
def test_requests_that_cannot_fit(model, request_, message):
    sampler = sampler_of(model)
    with pytest.raises(ValueError, match=message) as caught:
        sampler.add([request_])
    assert "\n" not in str(caught.value) and not sampler.busy


@pytest.mark.parametrize("slots, context", [(0, 64), (-1, 64), (2, 1), (2, 129)])
def test_bad_sizes(model, slots, context):
    with pytest.raises(ValueError, match="sampler: wanted"):
        Sampler(model.cfg, slots, context, ())
