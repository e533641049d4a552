"""
The KV cache: its pages, who holds them, and the prompts whose keys stand in them.

Pages have 64 places (16 on the plain path), and the cache is (L, 2, pages, K, page, E). A slot's
row of the page table says where its keys are. Here pages of 4 places, prompt p of 7 tokens and
response r (. unused):

    table                       page 7    page 3    page 9    page 4    page 5
    slot 0   7 9 .      ┌────▶  p p p p   p p . .   p p r r   p p r r   r . . .
    slot 1   7 4 5   ───┘       both      template  slot 0    slot 1    slot 1
    slot 2   . . .

The full pages of a prompt are shared by its group. The rest of it is a template that every slot
copies and continues. All of the prompt but its last token is computed beforehand: that token is the
input of the slot's first decode step, so the first response token is drawn on the same path as all
others.

Letters: A active slots, B slots, N pages in a row of the table, L layers, K KV heads, E head dim,
H heads, T packed tokens.
"""

from collections import OrderedDict

import numpy as np
import torch

from draw import DONE, ROW, STATE_ROWS
from model import Model, ModelConfig, attend_packed, pack, positions


class Pages:
    """
    Which pages of the cache are free, which some rollout holds, and which keep a prompt's keys.

    A page may have many holders. Pages of a prompt stay when nobody holds them, until others need
    them: the prompt that was used longest ago goes first.
    """

    def __init__(self, count: int, size: int):
        self.count = count
        self.size = size  # places of a page
        self.free = list(range(1, count + 1))  # page 0 belongs to nobody
        self.holders = [0] * (count + 1)  # rollouts that use a page
        self.held = 0  # pages with a holder
        self.prompts: OrderedDict[tuple[int, ...], list[int]] = OrderedDict()  # newest last
        self.of_prompt = [False] * (count + 1)

    @property
    def available(self) -> int:
        """Pages without a holder: free, or a prompt's that can be forgotten."""
        return self.count - self.held

    def covering(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def can_allocate(self, prompt: tuple[int, ...], spare: int) -> bool:
        """Would `spare` pages be available after allocate(prompt)?"""
        cached = len(prompt) - 1
        if prompt in self.prompts:
            new = sum(1 for page in self.prompts[prompt] if self.holders[page] == 0)
        else:
            new = self.covering(cached)
        if cached % self.size:
            new += 1  # the template's copy
        return self.available - new >= spare

    def keep(self, prompt: tuple[int, ...]) -> list[int]:
        """Pages for all but the last token of a new prompt, which nobody holds yet."""
        pages = self.take(self.covering(len(prompt) - 1))
        self.prompts[prompt] = pages
        for page in pages:
            self.of_prompt[page] = True
        return pages

    def allocate(self, prompt: tuple[int, ...]) -> tuple[list[int], int | None]:
        """
        (pages that a new rollout of a kept prompt holds, template). The caller copies the template
        to the last of them and releases it. None: the prompt fills its pages.
        """
        self.prompts.move_to_end(prompt)
        pages = self.hold(self.prompts[prompt])
        if (len(prompt) - 1) % self.size == 0:
            return pages, None
        return pages[:-1] + self.hold(self.take(1)), pages[-1]

    def take(self, n: int) -> list[int]:
        """n free pages. The caller knows that so many are available."""
        while len(self.free) < n:
            self.forget(next(iter(self.prompts)))
        return [self.free.pop() for _ in range(n)]

    def hold(self, pages: list[int]) -> list[int]:
        for page in pages:
            if self.holders[page] == 0:
                self.held += 1
            self.holders[page] += 1
        return list(pages)

    def release(self, pages: list[int]) -> None:
        for page in pages:
            self.holders[page] -= 1
            if self.holders[page] == 0:
                self.held -= 1
                if not self.of_prompt[page]:
                    self.free.append(page)

    def forget(self, prompt: tuple[int, ...]) -> None:
        for page in self.prompts.pop(prompt):
            self.of_prompt[page] = False
            if self.holders[page] == 0:
                self.free.append(page)

    def forget_all(self) -> None:
        while self.prompts:
            self.forget(next(iter(self.prompts)))


def pages_that_fit(
    cfg: ModelConfig, slots: int, context: int, page: int, dtype: torch.dtype, budget: float
) -> int:
    """
    Pages for all that the slots can fill, or as many as `budget` bytes hold (0: no bound).
    MemoryError if they do not hold one context.
    """
    per_slot = -(-context // page) + 1  # one more: the template that a prompt leaves behind
    count = slots * per_slot
    if budget:
        L, K, E = cfg.num_hidden_layers, cfg.num_key_value_heads, cfg.head_dim
        page_bytes = 2 * L * K * page * E * dtype.itemsize
        count = min(count, int(budget // page_bytes))
    if count < per_slot:
        raise MemoryError(
            f"sampler: {budget / 2**30:.2f} GiB of KV cache hold {count * page} tokens, wanted "
            f"room for a context of {context}: raise --kv_gib or lower --max_new"
        )
    return count


class Buffers:
    """
    What decode steps read and write, always in the same place, so that graphs stay valid.

    Between launches the host owns `state_B` and `table_BN`, numpy views of pinned memory. A launch
    takes a copy of them, and the device's state comes back when the launch is collected.
    """

    def __init__(
        self, cfg: ModelConfig, slots: int, context: int, pages: int, page: int,
        eos_ids, device: torch.device, dtype: torch.dtype,
    ):  # fmt: skip
        L, K, E = cfg.num_hidden_layers, cfg.num_key_value_heads, cfg.head_dim
        columns = -(-context // page)
        self.device = device
        self.page = page
        with device:
            # Page 0 belongs to nobody: unused slots of a graph write there.
            # Zeros, because what is masked is multiplied by zero.
            self.cache = torch.zeros(L, 2, pages + 1, K, page, E, dtype=dtype)
            self.state = torch.zeros(STATE_ROWS, slots, dtype=torch.long)
            self.table = torch.zeros(slots, columns, dtype=torch.int32)
            self.tokens = torch.zeros(slots, context, dtype=torch.int32)  # responses, by ROW
            self.logps = torch.zeros(slots, context)
            self.eos = torch.tensor(sorted(eos_ids), dtype=torch.long)
        pinned = device.type == "cuda"
        self.host_state = torch.zeros(STATE_ROWS, slots, dtype=torch.long, pin_memory=pinned)
        self.host_table = torch.zeros(slots, columns, dtype=torch.int32, pin_memory=pinned)
        self.state_B = self.host_state.numpy()
        self.table_BN = self.host_table.numpy()
        self.state_B[DONE] = 1

    def upload(self) -> None:
        self.state.copy_(self.host_state, non_blocking=True)
        self.table.copy_(self.host_table, non_blocking=True)

    def download_state(self) -> None:
        """Waits for the launch."""
        self.host_state.copy_(self.state)

    def responses(self, slots, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, log-probs), each (len(slots), length), of these slots."""
        rows = torch.from_numpy(self.state_B[ROW, slots]).to(self.device)
        tokens = self.tokens[rows, :length].cpu().numpy()
        logps = self.logps[rows, :length].cpu().numpy()
        return tokens, logps

    def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
        """(source, target), a few at a time: what is copied stands in memory twice."""
        for i in range(0, len(pairs), 32):
            source, target = torch.tensor(pairs[i : i + 32], device=self.device).T
            self.cache[:, :, target] = self.cache[:, :, source]

    def move(self, source: int, target: int) -> None:
        """Moves a slot's state and pages to another one. What is left is empty and stands still."""
        self.state_B[:, target] = self.state_B[:, source]
        self.table_BN[target] = self.table_BN[source]
        self.state_B[:, source] = 0
        self.state_B[DONE, source] = 1
        self.table_BN[source] = 0


def prefill(model: Model, buffers: Buffers, prompts: list[tuple], most: int) -> None:
    """Writes the keys of (prompt, pages), with at most `most` tokens or one prompt in a forward."""
    batch, tokens = [], 0
    for prompt, pages in prompts:
        ids = prompt[:-1]
        if not ids:
            continue
        if batch and tokens + len(ids) > most:
            prefill_batch(model, buffers, batch)
            batch, tokens = [], 0
        batch.append((ids, pages))
        tokens += len(ids)
    if batch:
        prefill_batch(model, buffers, batch)


def prefill_batch(model: Model, buffers: Buffers, batch: list[tuple]) -> None:
    page = buffers.page
    packed = pack([ids for ids, _ in batch], [()] * len(batch), buffers.device)
    page_T = [pages[i // page] for ids, pages in batch for i in range(len(ids))]
    page_T = torch.tensor(page_T, device=buffers.device)
    position_T = positions(packed.cu, len(packed.ids_T))
    offset_T = position_T % page

    def attend(layer, q_THE, k_TKE, v_TKE):
        keys, values = buffers.cache[layer]
        keys[page_T, :, offset_T] = k_TKE
        values[page_T, :, offset_T] = v_TKE
        return attend_packed(q_THE, k_TKE, v_TKE, packed.cu, packed.max_len)

    model.run(packed.ids_T, position_T, attend)
