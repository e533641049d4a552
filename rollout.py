"""
The sampler: continuous batching over a fixed number of slots.

    add() ──▶ queue ──▶ admit: prompt KV copied into a free slot ──▶ one decode step for all active slots ──▶ finished
                          ▲                                               │    ▲                               rollouts
                          └── prompt KV, computed once per prompt         └────┘

The cache, (L, 2, B, C, K, E), seen for one layer's keys (p prompt, r response, . unused), B = 4 slots, C = 10 places:

    slot 0   p p p p r r r . . .      active slots are always the first A (here 3): when one finishes it is refilled from
    slot 1   p p p p r . . . . .      the queue, or, once the queue is empty, the last active slot moves into the hole, so
    slot 2   p p p r r r r r . .      that a step works on cache[:, :, :A] and never on finished rows
    slot 3   . . . . . . . . . .

A slot starts with all of its prompt but the last token in place; that token is the input of its first decode step, so the
first response token is drawn on the same path as every other.

Randomness: token t of rollout i of problem p is drawn by Gumbel-max with Philox4x32-10 noise whose key is a hash of
(seed, p, i) and whose counter is (word / 4, t). It depends on nothing else: not on the batch, the slot, the order of
admission or the number of ranks.

Letters: A active slots, B slots, C places per slot, L layers, K KV heads, E head dim, V vocabulary, P prompt tokens.
Everything here is local to a rank: ranks stop at different steps, so there is no collective.
"""

import hashlib
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from model import Model, ModelConfig


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Explicit here, never inherited from a model folder's generation_config."""

    temperature: float = 1.0    # 0: greedy
    top_p: float = 1.0          # smallest set of most likely words with at least this probability; 1: off
    top_k: int = 0              # the most likely k words; 0: off

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(f"sampling: wanted temperature >= 0, 0 < top_p <= 1, top_k >= 0, found {self}")


@dataclass(frozen=True)
class Request:
    problem: int                # with `index` and the seed: the random stream
    index: int                  # which rollout of the problem
    prompt: tuple[int, ...]
    max_new: int                # response tokens at most, EOS included


@dataclass
class Rollout:
    problem: int
    index: int
    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)     # the response; ends in EOS unless truncated
    logps: list[float] = field(default_factory=list)    # log-prob of each token after temperature, before top-p and top-k, fp32
    truncated: bool = False


# --------------------------------------------------------------------------------------------------------------------
# Random numbers and the draw

MASK32 = 0xFFFFFFFF


def stream_key(seed: int, problem: int, index: int) -> int:
    """63-bit Philox key of one rollout's random stream."""
    digest = hashlib.blake2b(f"{seed} {problem} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def philox(counter_low, counter_high, key, rounds: int = 10):
    """
    Philox4x32 (Salmon et al., SC 2011) on int64 tensors that broadcast: four 32-bit words for the counter
    (counter_low, counter_high, 0, 0) and a 64-bit key.
    """
    c0, c1 = torch.broadcast_tensors(counter_low, counter_high)
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = key & MASK32, (key >> 32) & MASK32
    for _ in range(rounds):
        # int64 products wrap, their 64 bits are those of the unsigned product
        low, high = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = ((high >> 32) & MASK32) ^ c1 ^ k0, high & MASK32, ((low >> 32) & MASK32) ^ c3 ^ k1, low & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def gumbel_noise(key_A, position_A, V: int):
    """(A, V) fp32 Gumbel noise. Word v takes output v % 4 of counter v // 4."""
    counter = torch.arange((V + 3) // 4, device=key_A.device)
    words = torch.stack(philox(counter[None, :], position_A[:, None], key_A[:, None]), dim=-1).flatten(1)[:, :V]
    # w in (0, 1]; -log1p(-w) is exponential down to 2^-33, so that the far tail of the vocabulary can still be drawn.
    # Where fp32 rounds w to 1 the noise is -inf, a word that is not drawn (probability 2^-25).
    w = (words.float() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-w))


def truncate(logits_AV, top_p: float, top_k: int):
    """-inf outside the top_k most likely words, then outside the smallest set that holds top_p of what is left."""
    if 0 < top_k < logits_AV.shape[1]:
        least = logits_AV.topk(top_k, dim=-1).values[:, -1:]
        logits_AV = logits_AV.masked_fill(logits_AV < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits_AV.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)     # mass above each word: the first stays
        outside = torch.zeros_like(ordered, dtype=torch.bool).scatter(1, order, before >= top_p)
        logits_AV = logits_AV.masked_fill(outside, -torch.inf)
    return logits_AV


def draw(logits_AV, key_A, position_A, sampling: Sampling):
    """One token per row. Returns (token_A, logp_A); greedy rows get the log-prob at temperature 1."""
    logits_AV = logits_AV.float() / (sampling.temperature or 1.0)
    if sampling.temperature == 0:
        token_A = logits_AV.argmax(dim=-1)
    else:
        allowed_AV = truncate(logits_AV, sampling.top_p, sampling.top_k)
        token_A = (allowed_AV + gumbel_noise(key_A, position_A, logits_AV.shape[1])).argmax(dim=-1)
    logp_A = logits_AV.gather(1, token_A[:, None])[:, 0] - logits_AV.logsumexp(dim=-1)
    return token_A, logp_A


# --------------------------------------------------------------------------------------------------------------------

class Sampler:
    """
    One copy of the weights, one KV cache, and the rollouts that are being drawn.

    slots: rollouts in flight; context: places per slot, prompt + response. Memory: L x 2 x slots x context x K x E
    elements of cache beside the weights.
    """

    PREFILL_TOKENS = 16384      # prompts computed in one forward: bounds its activations

    def __init__(self, cfg: ModelConfig, slots: int, context: int, eos_ids: Iterable[int], device="cpu", dtype=torch.float32):
        if slots < 1:
            raise ValueError(f"sampler: wanted 1 slot or more, found {slots}")
        if not 2 <= context <= cfg.max_position_embeddings:
            raise ValueError(f"sampler: wanted a context of 2 to {cfg.max_position_embeddings} tokens (the model's), "
                             f"found {context}")
        self.device, self.slots, self.context = torch.device(device), slots, context
        self.eos_ids = frozenset(eos_ids)
        with self.device:
            self.model = Model(cfg).to(dtype).eval().requires_grad_(False)
            shape = (cfg.num_hidden_layers, 2, slots, context, cfg.num_key_value_heads, cfg.head_dim)
            self.cache = torch.zeros(shape, dtype=dtype)
            self.input_B = torch.zeros(slots, dtype=torch.long)      # token to feed next
            self.length_B = torch.zeros(slots, dtype=torch.int32)    # tokens in the cache, = position of that token
            self.drawn_B = torch.zeros(slots, dtype=torch.long)      # response tokens so far, = counter of the random stream
            self.key_B = torch.zeros(slots, dtype=torch.long)
        self.queue: deque[Request] = deque()
        self.active: list[tuple[Request, Rollout]] = []             # entry a is slot a
        self.prompt_kv: OrderedDict[tuple[int, ...], torch.Tensor] = OrderedDict()   # prompt -> (L, 2, P, K, E), newest last
        self.seed, self.sampling = 0, Sampling()

    @property
    def busy(self) -> bool:
        return bool(self.queue or self.active)

    def load(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copies new weights into the same buffers. Prompt KV of the old ones is forgotten."""
        self._idle("load")
        own = dict(self.model.named_parameters())
        for name, tensor in named_tensors:
            own.pop(name).copy_(tensor)
        if own:
            raise ValueError(f"sampler: no weights were given for {', '.join(sorted(own)[:3])}")
        self.prompt_kv.clear()

    def begin(self, seed: int, sampling: Sampling) -> None:
        """Root of the random streams, and how tokens are drawn, from here on."""
        self._idle("begin")
        self.seed, self.sampling = seed, sampling

    def _idle(self, what: str) -> None:
        if self.busy:
            raise RuntimeError(f"sampler: {what}() while {len(self.active)} rollouts run and {len(self.queue)} wait")

    def add(self, requests: Iterable[Request]) -> None:
        """Any time. ValueError for a request that can never fit."""
        for request in requests:
            if not request.prompt or request.max_new < 1:
                raise ValueError(f"problem {request.problem}: wanted a prompt and max_new of 1 or more, "
                                 f"found {len(request.prompt)} tokens and {request.max_new}")
            if len(request.prompt) + request.max_new > self.context:
                raise ValueError(f"problem {request.problem}: a prompt of {len(request.prompt)} tokens and max_new of "
                                 f"{request.max_new} do not fit the context of {self.context}")
            self.queue.append(request)

    @torch.inference_mode()
    def step(self) -> list[Rollout]:
        """Fills free slots from the queue, draws one token for every active slot, and returns the rollouts that ended."""
        self._admit()
        A = len(self.active)
        if A == 0:
            return []
        longest = max(len(request.prompt) + len(rollout.tokens) for request, rollout in self.active)
        logits_AV = self.model.decode(self.input_B[:A], self.length_B[:A], self.cache, longest)
        token_A, logp_A = draw(logits_AV, self.key_B[:A], self.drawn_B[:A], self.sampling)
        self.input_B[:A] = token_A
        self.length_B[:A] += 1
        self.drawn_B[:A] += 1
        return self._collect(token_A.tolist(), logp_A.tolist())

    def _admit(self) -> None:
        """Free slots take requests in order. Prompts that are not at hand are computed first, packed, each once."""
        taken = [self.queue.popleft() for _ in range(min(self.slots - len(self.active), len(self.queue)))]
        if not taken:
            return
        missing = [p for p in dict.fromkeys(r.prompt for r in taken) if p not in self.prompt_kv]
        while missing:
            pack, tokens = [], 0
            while missing and (not pack or tokens + len(missing[0]) <= self.PREFILL_TOKENS):
                pack.append(missing.pop(0))
                tokens += len(pack[-1])
            self._prefill(pack)
        for request in taken:
            a, P = len(self.active), len(request.prompt)
            self.prompt_kv.move_to_end(request.prompt)
            self.cache[:, :, a, :P] = self.prompt_kv[request.prompt]
            self.input_B[a], self.length_B[a], self.drawn_B[a] = request.prompt[-1], P - 1, 0
            self.key_B[a] = stream_key(self.seed, request.problem, request.index)
            self.active.append((request, Rollout(request.problem, request.index, request.prompt)))
        # A group's later rounds find their prompt here, up to a quarter of the cache's size; the longest unused go first,
        # the newest never: with few slots the rest of its group may still be waiting.
        while len(self.prompt_kv) > 1 and sum(map(len, self.prompt_kv)) > self.slots * self.context // 4:
            self.prompt_kv.popitem(last=False)

    def _prefill(self, prompts: list[tuple[int, ...]]) -> None:
        lengths = [len(p) for p in prompts]
        ids_T = torch.tensor([t for p in prompts for t in p], device=self.device)
        cu = torch.tensor([0, *lengths], device=self.device).cumsum(0).int()
        _, kv = self.model.prefill(ids_T, cu, max(lengths))
        for prompt, part in zip(prompts, kv.split(lengths, dim=2)):
            self.prompt_kv[prompt] = part.clone()

    def _collect(self, tokens: list[int], logps: list[float]) -> list[Rollout]:
        """Books the new tokens, takes out what ended, and closes the holes so that the active slots are the first again."""
        ended = []
        for a, (request, rollout) in enumerate(self.active):
            rollout.tokens.append(tokens[a])
            rollout.logps.append(logps[a])
            if tokens[a] in self.eos_ids or len(rollout.tokens) == request.max_new:
                rollout.truncated = tokens[a] not in self.eos_ids
                ended.append(a)
        finished = [self.active[a][1] for a in ended]
        for a in reversed(ended):       # from the back: what moves into the hole is active
            last = len(self.active) - 1
            if a < last:
                request, rollout = self.active[last]
                P = len(request.prompt) + len(rollout.tokens)
                self.cache[:, :, a, :P] = self.cache[:, :, last, :P]
                for state in (self.input_B, self.length_B, self.drawn_B, self.key_B):
                    state[a] = state[last]
                self.active[a] = self.active[last]
            self.active.pop()
        return finished
