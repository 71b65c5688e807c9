"""The schedule of a single tenant without any shares, as an oracle: first come, first served, batch work last."""

from __future__ import annotations

from bisect import insort

from server.engine.account import place
from server.engine.blocks import BlockPool
from server.engine.lanes import SHARED
from server.engine.scheduler import Work
from server.engine.sequence import Sequence


class FirstCome:
    """The queues and the block accounts."""

    def __init__(self, pool: BlockPool, *, max_batch_tokens: int, max_running: int, prefix_cache: bool = True):
        self.pool, self.max_batch_tokens = pool, max_batch_tokens
        self.max_running = min(max_running, max_batch_tokens)  # every running row can decode in every step
        self.prefix_cache = prefix_cache
        self.waiting: list[Sequence] = []  # by place
        self.running: list[Sequence] = []  # by place
        self.preemptions = 0
        self._short: Sequence | None = None  # the last one for which there were no blocks

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence; one that was preempted comes before all that arrived later."""
        insort(self.waiting, sequence, key=place)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and its blocks back."""
        for queue in (self.waiting, self.running):
            if sequence in queue:
                queue.remove(sequence)
        self._give_back(sequence)
        if sequence is self._short:
            self._short = None

    def schedule(self, lane: str = SHARED, chunk: int | None = None) -> list[Work]:
        """The work of one step of `lane`, at most `max_batch_tokens` tokens, of which at most `chunk` are prompts';
        empty when nothing can be computed."""
        self._make_way()
        work = self._decodes(lane)
        budget = self.max_batch_tokens - len(work)
        budget = budget if chunk is None else min(budget, chunk)
        prefills = self._prefills(lane, budget)
        budget -= sum(item.count for item in prefills)
        return work + prefills + self._admit(lane, budget)

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

    def _make_way(self) -> None:
        """Preempts batch work for the first request in the queue that is not, if that gives it room; until it has
        taken the room, nobody behind it is handed any, whatever the lane."""
        first = next((one for one in self.waiting if one.request.ready), None)
        if first is None or first.request.submit.batch:
            return
        running, blocks = len(self.running), self.pool.available
        victims: list[Sequence] = []
        for one in reversed(self.running):
            if not one.request.submit.batch or self._fits(first, running, blocks):
                break
            victims.append(one)
            running -= 1
            blocks += len(one.blocks)
        if victims and self._fits(first, running, blocks):
            for one in victims:
                self._preempt(one)
            self._short = first

    def _fits(self, sequence: Sequence, running: int, blocks: int) -> bool:
        """Whether there is room beside so many running sequences with so many blocks free, sharing none."""
        return running < self.max_running and self.pool.needed(len(sequence.tokens)) + running <= blocks

    def _decodes(self, lane: str) -> list[Work]:
        work: list[Work] = []
        for sequence in list(self.running):
            if len(work) >= self.max_batch_tokens:
                break
            if sequence.pending != 1 or sequence.request.lane != lane or sequence not in self.running:
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

    def _prefills(self, lane: str, budget: int) -> list[Work]:
        work: list[Work] = []
        for sequence in self.running:
            if budget > 0 and sequence.pending > 1 and sequence.request.lane == lane:
                count = min(sequence.pending, budget)
                work.append(Work(sequence, count))
                budget -= count
        return work

    def _admit(self, lane: str, budget: int) -> list[Work]:
        work: list[Work] = []
        for sequence in list(self.waiting):
            if budget <= 0 or len(self.running) >= self.max_running:
                break
            if not sequence.request.ready:
                continue  # its adapter is on the way: it blocks nobody
            if sequence.request.lane != lane:
                if sequence is self._short:
                    break
                continue
            fresh = self._place(sequence)
            if fresh is None:
                self._short = sequence
                break  # blocks are handed out in order, whatever the lane, or a long prompt would starve
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=place)
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
        if sequence is self._short:
            self._short = None
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
