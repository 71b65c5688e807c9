"""Decides what each step computes. Plain Python, no torch.

A step is one lane's. Decodes first, then prefills already begun, then newcomers in the order of arrival, up to the
token budget; batch work comes after all other. Where several tenants have work, each of the three is shared
(engine/shares.py). A sequence gets all the blocks it needs or none; when a decode finds none, the latest arrival gives
its blocks back and is computed again later (engine/room.py).
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from server.engine.account import Account, place
from server.engine.blocks import BlockPool
from server.engine.lanes import SHARED, Urgency
from server.engine.room import Room
from server.engine.sequence import Sequence
from server.engine.shares import Shares


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
        self.waiting: list[Sequence] = []  # by place
        self.running: list[Sequence] = []  # by place
        self.preemptions = 0
        self.prefix_queries = self.prefix_hits = 0  # tokens of prompts that were looked up, and found
        self.shares = Shares(max_batch_tokens, self.max_running, pool.count)
        self._room = Room(pool, self.shares, self.max_running)
        self._short: Sequence | None = None  # the last one for which there were no blocks

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence."""
        self.shares.enter(sequence)
        self._queue(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and its blocks back."""
        if sequence in self.running:
            self._stop(sequence)
        elif sequence in self.waiting:
            self._unqueue(sequence)
        else:
            return
        self.shares.leave(sequence)
        if sequence is self._short:
            self._short = None

    def lanes(self) -> dict[str, dict[str, Urgency]]:
        """The lanes with work, and what the most urgent request of each tenant in it waits for."""
        found: dict[str, dict[str, Urgency]] = {}
        for sequence in (*self.running, *(one for one in self.waiting if one.request.ready)):
            submit, urgency = sequence.request.submit, Urgency.NEXT if sequence.produced else Urgency.FIRST
            if submit.batch:
                urgency = Urgency.BATCH
            tenants = found.setdefault(sequence.request.lane, {})
            tenants[submit.tenant] = max(tenants.get(submit.tenant, urgency), urgency)
        return found

    def decoding(self, lane: str) -> int:
        """How many rows of the lane get a token in its next step."""
        return sum(one.pending == 1 and one.request.lane == lane for one in self.running)

    def schedule(self, lane: str = SHARED, chunk: int | None = None) -> list[Work]:
        """The work of one step of `lane`, at most `max_batch_tokens` tokens, of which at most `chunk` are prompts';
        empty when nothing can be computed."""
        first = self._make_way()
        self._begin(lane, first)
        work = self._fill(lane, chunk)
        if not work and self.shares.contended:  # who was behind could do nothing after all
            self.shares.begin({}, {})
            work = self._fill(lane, chunk)
        return work

    def _fill(self, lane: str, chunk: int | None) -> list[Work]:
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

    def _make_way(self) -> Sequence | None:
        """Preempts whoever is to give way to the first in line, which it returns, if that gives it room; until it has
        taken the room, nobody behind it is handed any, whatever the lane."""
        first = next(self.shares.line(), None)
        if first is not None and (victims := self._room.makers(first, self.running)):
            for one in victims:
                self._preempt(one, first)
            self._short = first
        return first

    def _begin(self, lane: str, first: Sequence | None) -> None:
        """Says what each tenant could have in a step of the lane: for its running sequences, and for the `first` in
        line if that has room."""
        wanted: dict[Account, int] = {}
        prompts: dict[Account, bool] = {}
        if self.shares.contended:
            rows = [one for one in self.running if one.request.lane == lane]
            if first is not None and first.request.lane == lane:
                rows += [first] * self._room.fits(first, len(self.running), self.pool.available)
            for one in rows:
                tenant = self.shares.of(one)
                wanted[tenant] = wanted.get(tenant, 0) + one.pending
                if one.pending > 1:
                    prompts[tenant] = prompts.get(tenant, True) and one.place[0]
        self.shares.begin(wanted, prompts)

    def _decodes(self, lane: str) -> list[Work]:
        work: list[Work] = []
        done: set[Sequence] = set()
        for sequence in self.shares.pick(
            [one for one in self.running if one.pending == 1 and one.request.lane == lane]
        ):
            if len(work) >= self.max_batch_tokens:
                break
            if sequence not in self.running:
                continue
            fresh = self._extend(sequence, done)
            if fresh is not None:
                work.append(self._work(sequence, 1, fresh))
                done.add(sequence)
        return work

    def _extend(self, sequence: Sequence, done: set[Sequence]) -> tuple[int, ...] | None:
        """Blocks for the next token, taken from others that are not done if need be; None if it gives its own."""
        missing = self.pool.needed(len(sequence.tokens)) - len(sequence.blocks)
        if missing <= 0:
            return ()
        while (blocks := self.pool.allocate(missing)) is None:
            victim = self._room.giver(sequence, self.running, done)
            self._preempt(victim, sequence)
            if victim is sequence:
                return None
        sequence.blocks += blocks
        self.shares.of(sequence).blocks += missing
        return tuple(blocks)

    def _prefills(self, lane: str, budget: int) -> list[Work]:
        work: list[Work] = []
        for sequence in self.shares.fairly(
            [one for one in self.running if one.pending > 1 and one.request.lane == lane]
        ):
            count = self.shares.chunk(sequence, min(sequence.pending, budget))
            if count > 0:
                work.append(self._work(sequence, count))
                budget -= count
        return work

    def _admit(self, lane: str, budget: int) -> list[Work]:
        work: list[Work] = []
        for sequence in self.shares.line(bounded=True):
            if budget <= 0 or len(self.running) >= self.max_running:
                break
            if sequence.request.lane != lane:
                if sequence is self._short:
                    break
                continue
            count = self.shares.chunk(sequence, min(sequence.pending, budget))
            if not count:
                continue
            fresh = self._place(sequence)
            if fresh is None:
                self._short = sequence
                break  # blocks are handed out in order, whatever the lane, or a long prompt would starve
            self._unqueue(sequence)
            insort(self.running, sequence, key=place)
            count = min(count, sequence.pending)
            work.append(self._work(sequence, count, fresh))
            budget -= count
        return work

    def _work(self, sequence: Sequence, count: int, fresh: tuple[int, ...] = ()) -> Work:
        self.shares.charge(sequence, count)
        return Work(sequence, count, fresh)

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
        self.shares.placed(sequence)
        if sequence.cached is None:
            sequence.cached = sequence.computed
            if self.prefix_cache:
                self.prefix_queries += length
                self.prefix_hits += sequence.computed
            self.shares.hit(sequence)
        return tuple(fresh)

    def _preempt(self, sequence: Sequence, other: Sequence) -> None:
        """Takes room from one for the other; it waits again, before all that arrived later."""
        self.preemptions += 1
        sequence.preempted += self.shares.of(sequence) is not self.shares.of(other)
        self._stop(sequence)
        self._queue(sequence)

    def _queue(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=place)
        self.shares.queued(sequence)

    def _unqueue(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        self.shares.unqueued(sequence)

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.shares.stopped(sequence)
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = sequence.published = 0
