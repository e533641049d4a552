"""
The sampler: continuous batching over a paged KV cache.

    add() ──▶ queue ──▶ admit: a free slot, the prompt's pages ──▶ decode steps for all active slots
                ▲         ▲                                             │    ▲          │
                │         └── prompt pages, computed once per prompt    └────┘          ▼
                └──────── preempted: the youngest, when pages run out          finished rollouts

Memory follows what is written: a slot gets a page when it reaches one. A request that finds too few
waits. When running rollouts find none, the youngest goes back to the queue and is drawn again, to
the same tokens up to rounding, since its random stream hangs on nothing else. The cache never grows
(cache.py has the picture of its pages).

Active slots are always the first A of B. The host owns their state between launches, a launch is a
few decode steps (`stride`), and the device stops a slot by itself when its rollout ends.

Two paths draw the same rollouts up to rounding. Plain: torch operations, any device (below). Fast,
on CUDA with Triton: a step is one replay of a CUDA graph of fused kernels (decode.py).

Randomness: token t of rollout i of a group hangs on (seed, place of the group, i, t) alone
(draw.py): not on the batch, the slot, the order of admission or the number of ranks. Everything
here is local to a rank: ranks stop at different steps, so there is no collective.

Letters: A active slots, B slots, N pages in a row of the table, H heads, K KV heads, E head dim,
D model dim, V vocabulary.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from cache import Buffers, Pages, pages_that_fit, prefill
from decode import FastDecoder, can_run
from draw import DONE, DRAWN, LENGTH, LIMIT, ROW, Sampling, draw
from model import Model, ModelConfig, logits_fp32
from streams import stream


@dataclass(frozen=True)
class Request:
    problem: object  # data.Problem, or anything with `prompt`, a tuple of token ids
    place: int  # number of its group; with `index` and the seed: the random stream
    index: int  # which rollout of the group
    max_new: int  # response tokens at most, EOS included

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.problem.prompt


@dataclass(eq=False)  # a rollout is one object, and the key of its verdict
class Rollout:
    request: Request
    tokens: list[int]  # the response; ends in EOS unless truncated
    logps: list[float]  # of each token after temperature, before top-p and top-k, fp32
    truncated: bool


@dataclass
class Slot:
    """A running rollout."""

    request: Request
    pages: list[int]
    born: int  # the larger, the younger


# --------------------------------------------------------------------------------------------------
# The plain step


class PlainDecoder:
    """One token for every active slot with torch operations; FastDecoder's counterpart."""

    path = "plain torch"
    PAGE = 16
    STRIDE = 1

    def __init__(self, model: Model, buffers: Buffers):
        self.model = model
        self.buffers = buffers

    def begin(self, sampling: Sampling) -> None:
        self.sampling = sampling

    def stepper(self, A: int):
        """The step of the first A slots as a call without arguments."""
        return partial(self.step, A)

    def step(self, A: int) -> None:
        """One token for each of the first A slots."""
        buffers, page = self.buffers, self.buffers.page
        device, cfg = buffers.device, self.model.cfg
        K, E = cfg.num_key_value_heads, cfg.head_dim
        input_A, length_A, drawn_A, key_A, limit_A, row_A, done_A = buffers.state[:, :A]
        longest = int(buffers.state_B[LENGTH, :A].max()) + 1  # the host knows: STRIDE is 1
        columns = -(-longest // page)
        pages_AN = buffers.table[:A, :columns].long()
        page_A = pages_AN.gather(1, (length_A // page)[:, None])[:, 0]  # of the new key
        offset_A = length_A % page
        seen = torch.arange(columns * page, device=device) <= length_A[:, None]
        seen = seen[:, None, None]  # (A, 1, 1, keys)
        heads_K = torch.arange(K, device=device)
        tiles = (pages_AN[:, None] * K + heads_K[:, None]).flatten()  # of (A, K, N)

        def gathered(part):  # (pages, K, page, E) -> (A, K, keys, E)
            return part.flatten(0, 1).flatten(1).index_select(0, tiles).view(A, K, -1, E)

        def attend(layer, q_AHE, k_AKE, v_AKE):
            keys, values = buffers.cache[layer]
            keys[page_A, :, offset_A] = k_AKE
            values[page_A, :, offset_A] = v_AKE
            # The H / K query heads that share a KV head stand as query rows: keys are not repeated.
            q = q_AHE.unflatten(1, (K, -1))
            k, v = gathered(keys), gathered(values)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            return out.flatten(1, 2)

        hidden_AD = self.model.run(input_A, length_A, attend)
        logits_AV = logits_fp32(hidden_AD, self.model.head)
        token_A, logp_A = draw(logits_AV, key_A, drawn_A, self.sampling)
        buffers.tokens[row_A, drawn_A] = token_A.int()
        buffers.logps[row_A, drawn_A] = logp_A
        input_A.copy_(token_A)
        length_A += 1
        drawn_A += 1
        done_A.copy_(torch.isin(token_A, buffers.eos) | (drawn_A == limit_A))


# --------------------------------------------------------------------------------------------------
# The scheduler


class Sampler:
    """
    One copy of the weights, one KV cache, and the rollouts that are being drawn.

    slots: rollouts in flight at most. context: tokens of a prompt with its response at most.
    kv_gib: GiB of the cache (a training run says how many, see plan.py); 0 is what the slots can
    fill, on CUDA at most SHARE of the memory that is free now. fast: None takes the fast path where
    it can run. MemoryError if the cache holds no context, ValueError for sizes that cannot be.
    """

    PREFILL_TOKENS = 16384  # prompts computed in one forward: bounds its activations
    SHARE = 0.4

    def __init__(
        self, cfg: ModelConfig, slots: int, context: int, eos_ids: Iterable[int], device="cpu",
        dtype=torch.float32, kv_gib: float = 0.0, fast: bool | None = None, page: int | None = None,
    ):  # fmt: skip
        most = cfg.max_position_embeddings
        if slots < 1:
            raise ValueError(f"sampler: wanted 1 slot or more, found {slots}")
        if not 2 <= context <= most:
            raise ValueError(
                f"sampler: wanted a context of 2 to {most} tokens (the model's), found {context}"
            )
        self.device = torch.device(device)
        self.dtype = dtype
        self.slots = slots
        self.context = context
        self.eos_ids = eos_ids = frozenset(eos_ids)
        if fast is None:
            fast = self.device.type == "cuda" and can_run(cfg)
        self.fast = fast
        decoder = FastDecoder if fast else PlainDecoder
        page = page or decoder.PAGE
        with torch.device("meta"):
            self.model = Model(cfg).to(dtype).eval().requires_grad_(False)
        self.model.to_empty(device=self.device)
        budget = kv_gib * 2**30
        if not budget and self.device.type == "cuda":
            budget = self.SHARE * torch.cuda.mem_get_info(self.device)[0]
        count = pages_that_fit(cfg, slots, context, page, dtype, budget)
        self.pages = Pages(count, page)
        self.buffers = Buffers(cfg, slots, context, count, page, eos_ids, self.device, dtype)
        self.decoder = decoder(self.model, self.buffers)
        self.stride = decoder.STRIDE  # decode steps of a launch
        self.path = decoder.path  # this and the next two: for the header of a run
        self.kv_bytes = self.buffers.cache.numel() * self.buffers.cache.element_size()
        self.cache_tokens = count * page

        self.queue: deque[Request] = deque()
        self.active: list[Slot] = []  # entry a is slot a
        self.rows = list(range(slots))  # free ones of the buffers' tokens and log-probs
        self.launched = False  # and not collected
        self.born = 0
        self.preempted = 0  # rollouts that were put back, since the start
        self.begin(0, Sampling())

    @property
    def busy(self) -> bool:
        return bool(self.queue or self.active)

    def drawn_so_far(self) -> list[int]:
        """Response tokens of each running rollout when the last launch began."""
        return self.buffers.state_B[DRAWN, : len(self.active)].tolist()

    @torch.no_grad()
    def load(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """
        Copies new weights into the same buffers, so that graphs stay valid; forgets all prompts.
        ValueError for a tensor of another shape and for one that is not given.
        """
        self._must_be_idle("load")
        self.forget()
        missing = dict(self.model.named_parameters())
        for name, tensor in named_tensors:
            shape = missing[name].shape
            if tensor.shape != shape:
                raise ValueError(f"sampler: {name} is {list(tensor.shape)}, wanted {list(shape)}")
            missing.pop(name).copy_(tensor)
        if missing:
            names = ", ".join(sorted(missing)[:3])
            raise ValueError(f"sampler: no weights were given for {names}")

    def begin(self, seed: int, sampling: Sampling) -> None:
        """Root of the random streams, and how tokens are drawn, from here on."""
        self._must_be_idle("begin")
        self.seed = seed
        self.sampling = sampling
        self.decoder.begin(sampling)

    def forget(self) -> None:
        """All prompts: their keys are those of other weights, or a benchmark begins anew."""
        self.pages.forget_all()

    def _must_be_idle(self, what: str) -> None:
        if self.busy:
            counts = f"{len(self.active)} rollouts run and {len(self.queue)} wait"
            raise RuntimeError(f"sampler: {what}() while {counts}")

    def add(self, requests: Iterable[Request]) -> None:
        """Any time. ValueError for a request that can never fit."""
        for request in requests:
            prompt, max_new = len(request.prompt), request.max_new
            if not prompt or max_new < 1:
                raise ValueError(
                    f"problem {request.place}: wanted a prompt and max_new of 1 or more, "
                    f"found {prompt} tokens and {max_new}"
                )
            if prompt + max_new > self.context:
                raise ValueError(
                    f"problem {request.place}: a prompt of {prompt} tokens and max_new of "
                    f"{max_new} do not fit the context of {self.context}"
                )
            self.queue.append(request)

    @torch.inference_mode()
    def step(self) -> list[Rollout]:
        """
        Takes in what the last launch drew, fills free slots from the queue, launches the next
        decode steps, and returns the rollouts that ended: what the caller does with them happens
        while the device works.
        """
        ended = self._collect()
        self._admit()
        self._launch()
        rollouts = []
        for request, tokens, logps in ended:
            tokens = tokens.tolist()
            truncated = tokens[-1] not in self.eos_ids
            rollouts.append(Rollout(request, tokens, logps.tolist(), truncated))
        return rollouts

    def _collect(self) -> list[tuple[Request, np.ndarray, np.ndarray]]:
        """Waits for the launch, and takes out what ended: (request, tokens, log-probs) of each."""
        if not self.launched:
            return []
        self.launched = False
        self.buffers.download_state()
        state_B = self.buffers.state_B
        done = np.flatnonzero(state_B[DONE, : len(self.active)])
        if not len(done):
            return []
        drawn = state_B[DRAWN, done]
        tokens, logps = self.buffers.responses(done, drawn.max())
        ended = []
        for a, n, row, logp in zip(done, drawn, tokens, logps):
            ended.append((self.active[a].request, row[:n], logp[:n]))
        for a in done[::-1]:  # from the back: what moves into the hole is active
            self._remove(a)
        return ended

    def _remove(self, a: int) -> None:
        """Frees slot a; the last active one moves into the hole."""
        self.pages.release(self.active[a].pages)
        self.rows.append(int(self.buffers.state_B[ROW, a]))
        last = len(self.active) - 1
        self.buffers.move(last, a)
        self.active[a] = self.active[last]
        self.active.pop()

    def _pages_at_most(self, request: Request) -> int:
        """The last token drawn is not fed."""
        return self.pages.covering(len(request.prompt) + request.max_new - 1)

    def _admit(self) -> None:
        """
        Free slots take requests in order while there are pages: for all that running rollouts may
        still need, or, where the cache is smaller than that, for one more each.
        """
        if not self.queue or len(self.active) == self.slots:
            return
        prompts, copies = [], []
        owed = sum(self._pages_at_most(slot.request) - len(slot.pages) for slot in self.active)
        while self.queue and len(self.active) < self.slots:
            prompt = self.queue[0].prompt
            owed += self._pages_at_most(self.queue[0]) - self.pages.covering(len(prompt) - 1)
            spare = min(owed, len(self.active) + 1)
            if self.active and not self.pages.can_allocate(prompt, spare):
                break
            if prompt not in self.pages.prompts:
                prompts.append((prompt, self.pages.keep(prompt)))
            pages, template = self.pages.allocate(prompt)
            if template is not None:
                copies.append((template, pages[-1]))
            self._start(self.queue.popleft(), pages)
        if prompts:
            self._look_ahead(prompts)
            prefill(self.model, self.buffers, prompts, self.PREFILL_TOKENS)
        self.buffers.copy_pages(copies)
        self.pages.release([template for template, _ in copies])

    def _start(self, request: Request, pages: list[int]) -> None:
        """In the next slot, with the last prompt token as its first input."""
        a = len(self.active)
        self.active.append(Slot(request, pages, self.born))
        self.born += 1
        key = stream(self.seed, request.place, request.index)
        cached = len(request.prompt) - 1
        column = (request.prompt[-1], cached, 0, key, request.max_new, self.rows.pop(), 0)
        self.buffers.state_B[:, a] = column
        self.buffers.table_BN[a, : len(pages)] = pages

    def _look_ahead(self, prompts: list[tuple]) -> None:
        """
        A forward over a few prompts takes as long as one over many: where one is due, prompts of
        the queue join it.
        """
        tokens = sum(len(prompt) for prompt, _ in prompts)
        for request in self.queue:
            prompt = request.prompt
            if prompt in self.pages.prompts:
                continue
            tokens += len(prompt)
            left = len(self.pages.free) - self.pages.covering(len(prompt))
            if tokens > self.PREFILL_TOKENS or left < self.pages.count // 4:
                return
            prompts.append((prompt, self.pages.keep(prompt)))

    def _missing_pages(self) -> np.ndarray:
        """(A,) pages that each active slot lacks for the tokens of a launch."""
        state = self.buffers.state_B[:, : len(self.active)]
        last = state[LENGTH] - state[DRAWN] + state[LIMIT]
        end = np.minimum(state[LENGTH] + self.stride, last)
        owned = np.array([len(slot.pages) for slot in self.active], dtype=int)
        return np.maximum(self.pages.covering(end) - owned, 0)

    def _launch(self) -> None:
        """Gives slots the pages of the next `stride` tokens, and starts that many decode steps."""
        missing_A = self._missing_pages()
        while missing_A.sum() > self.pages.available:
            self._preempt()
            missing_A = self._missing_pages()
        if not self.active:
            return
        for a in np.flatnonzero(missing_A):
            owned = self.active[a].pages
            pages = self.pages.hold(self.pages.take(missing_A[a]))
            self.buffers.table_BN[a, len(owned) : len(owned) + len(pages)] = pages
            owned += pages
        step = self.decoder.stepper(len(self.active))
        self.buffers.upload()
        for _ in range(self.stride):
            step()
        self.launched = True

    def _preempt(self) -> None:
        """The youngest rollout goes back to the head of the queue."""
        youngest = max(range(len(self.active)), key=lambda a: self.active[a].born)
        self.queue.appendleft(self.active[youngest].request)
        self.preempted += 1
        self._remove(youngest)


# --------------------------------------------------------------------------------------------------
# Drawing and grading


def graded(sampler: Sampler, grader, tokenizer, stop=None) -> Iterator[tuple[Rollout, object]]:
    """
    Draws and grades all that was added -> (rollout, verdict), in the order of the verdicts.
    Responses are graded while others are decoded.

    The caller may add more while it iterates: the loop ends when, after the caller has dealt with
    the last verdict, nothing waits or runs. So a group's next round is asked for where the verdict
    that completes its last one arrives:

        sampler.add(group.first_round())
        for rollout, verdict in graded(sampler, grader, tokenizer, stop):
            group = groups[rollout.request.place]
            group.add(rollout, verdict)
            if group.complete:
                sampler.add(group.next_round())     # drawn and yielded by this very loop

    Once stop.asked it ends early: what runs stays in the sampler, what is graded in the grader.
    grader: submit(key, response, gold, problem, opened), the key is the rollout; poll() and
    wait(seconds) -> [(key, verdict)]; pending; waited, to which the seconds are added in which
    decoding had ended and grading had not.
    """
    while (sampler.busy or grader.pending) and not (stop and stop.asked):
        for rollout in sampler.step():
            problem = rollout.request.problem
            response = tokenizer.decode(rollout.tokens, skip_special_tokens=True)
            grader.submit(
                rollout, response, problem.gold, problem.text, problem.opens_thought
            )
        if sampler.busy:
            verdicts = grader.poll()
        else:
            begun = time.perf_counter()
            verdicts = grader.wait(0.1)
            grader.waited += time.perf_counter() - begun
        yield from verdicts
