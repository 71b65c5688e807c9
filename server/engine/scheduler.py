"""Decides what each step computes. Plain Python, no torch.

Decodes first, then prefills already begun, then newcomers in the order of arrival, up to the token budget. A
sequence gets all the blocks it needs or none; when a decode finds none, the latest arrival gives its blocks back and
is computed again later (recompute preemption; Kwon et al. 2023).
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from server.engine.blocks import BlockPool
from server.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Work:
    """The next `count` uncomputed tokens of a sequence; `fresh` are blocks it has just been given."""

    sequence: Sequence
    count: int
    fresh: tuple[int, ...] = ()

    @property
    def samples(self) -> bool:
        """Whether this work reaches the last token, so that a new one is chosen from its logits."""
        return self.count == self.sequence.pending


class Scheduler:
    """Queues and the block accounts; owned by the engine's thread."""

    def __init__(self, pool: BlockPool, *, max_batch_tokens: int, max_running: int, prefix_cache: bool = True):
        self.pool, self.max_batch_tokens = pool, max_batch_tokens
        self.max_running = min(max_running, max_batch_tokens)  # every running row can decode in every step
        self.prefix_cache = prefix_cache
        self.waiting: list[Sequence] = []  # by arrival
        self.running: list[Sequence] = []  # by arrival
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence; one that was preempted comes before all that arrived later."""
        insort(self.waiting, sequence, key=lambda s: s.order)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and its blocks back."""
        for queue in (self.waiting, self.running):
            if sequence in queue:
                queue.remove(sequence)
        self._give_back(sequence)

    def schedule(self) -> list[Work]:
        """The work of one step, at most `max_batch_tokens` tokens; empty when nothing can be computed."""
        work = self._decodes()
        budget = self.max_batch_tokens - len(work)
        work += self._prefills(budget)
        budget = self.max_batch_tokens - sum(item.count for item in work)
        return work + self._admit(budget)

    def computed(self, work: list[Work]) -> None:
        """Books what a step has computed, and lets later prompts share blocks that are full now: those of the prompt.
        What is generated comes token by token and differs in its last bits from the same tokens as a prompt; were it
        shared, an answer would depend on what the cache still holds."""
        for item in work:
            sequence = item.sequence
            sequence.computed += item.count
            if not self.prefix_cache:
                continue
            full = min(sequence.computed, sequence.prompt_length) // self.pool.block_size
            if full > sequence.published:
                hashes = sequence.full_hashes(self.pool.block_size)
                for number in range(sequence.published, full):
                    self.pool.publish(sequence.blocks[number], hashes[number])
                sequence.published = full

    def _decodes(self) -> list[Work]:
        work: list[Work] = []
        for sequence in list(self.running):
            if len(work) >= self.max_batch_tokens:
                break
            if sequence.pending != 1 or sequence not in self.running:
                continue
            fresh = self._extend(sequence)
            if fresh is not None:
                work.append(Work(sequence, 1, fresh))
        return work

    def _extend(self, sequence: Sequence) -> tuple[int, ...] | None:
        """Blocks for the next token, taken from the latest arrivals if need be; None if that is `sequence` itself."""
        missing = self.pool.needed(len(sequence.tokens)) - len(sequence.blocks)
        if missing <= 0:
            return ()
        while (blocks := self.pool.allocate(missing)) is None:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return None
        sequence.blocks += blocks
        return tuple(blocks)

    def _prefills(self, budget: int) -> list[Work]:
        work: list[Work] = []
        for sequence in self.running:
            if budget > 0 and sequence.pending > 1:
                count = min(sequence.pending, budget)
                work.append(Work(sequence, count))
                budget -= count
        return work

    def _admit(self, budget: int) -> list[Work]:
        work: list[Work] = []
        for sequence in list(self.waiting):
            if budget <= 0 or len(self.running) >= self.max_running:
                break
            if not sequence.request.ready:
                continue  # its adapter is on the way: it blocks nobody
            fresh = self._place(sequence)
            if fresh is None:
                break  # blocks are handed out in order, or a long prompt would starve
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=lambda s: s.order)
            count = min(sequence.pending, budget)
            work.append(Work(sequence, count, fresh))
            budget -= count
        return work

    def _place(self, sequence: Sequence) -> tuple[int, ...] | None:
        """Blocks for all of the sequence's tokens, shared where they are known already; None and no change if short."""
        length = len(sequence.tokens)
        shared: list[int] = []
        if self.prefix_cache:
            # The last token is always computed: its logits are what the next one is chosen from.
            usable = (length - 1) // self.pool.block_size
            shared = self.pool.match(sequence.full_hashes(self.pool.block_size)[:usable])
        missing = self.pool.needed(length) - len(shared)
        # A block is left for every running row, or the newcomer would be the next one preempted.
        fits = missing + len(self.running) <= self.pool.available or not self.running
        fresh = self.pool.allocate(missing) if fits else None
        if fresh is None:
            self.pool.release(shared)
            return None
        sequence.blocks = shared + fresh
        sequence.computed = len(shared) * self.pool.block_size
        sequence.published = len(shared)
        if sequence.cached is None:
            sequence.cached = sequence.computed
        return tuple(fresh)

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.running.remove(sequence)
        self._give_back(sequence)
        self.add(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = sequence.published = 0
