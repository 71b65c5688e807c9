"""Who computes what in a step, with plain stand-ins for sequences and a sampler that makes tokens up."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from server.core import DEFAULT_TENANT
from server.engine.blocks import BlockPool, chain
from server.engine.lanes import SHARED, Urgency
from server.engine.messages import Prices
from server.engine.scheduler import Scheduler, Work

SIZE = 4


@dataclass
class FakeSubmit:
    batch: bool = False
    tenant: str = DEFAULT_TENANT
    weight: float = 1.0
    prices: Prices = field(default_factory=Prices)


@dataclass
class FakeRequest:
    ready: bool = True
    seed: bytes = b"seed"
    lane: str = SHARED
    submit: FakeSubmit = field(default_factory=FakeSubmit)


@dataclass(eq=False)
class FakeSequence:
    """What the scheduler knows of a sequence, and the length at which it ends."""

    order: int
    tokens: list[int]
    end: int = 10**9
    request: FakeRequest = field(default_factory=FakeRequest)
    computed: int = 0
    cached: int | None = None
    blocks: list[int] = field(default_factory=list)
    published: int = 0
    charged: int = 0
    preempted: int = 0
    index: int = 0

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    @property
    def place(self) -> tuple[bool, int]:
        return self.request.submit.batch, self.order

    @property
    def produced(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed

    def full_hashes(self, size: int) -> list[bytes]:
        hashes: list[bytes] = []
        for at in range(len(self.tokens) // size):
            hashes.append(chain(hashes[-1] if hashes else self.request.seed, self.tokens[at * size : (at + 1) * size]))
        return hashes


def scheduler_of(blocks: int = 64, tokens: int = 32, running: int = 16, prefix_cache: bool = False) -> Scheduler:
    return Scheduler(BlockPool(blocks, SIZE), max_batch_tokens=tokens, max_running=running, prefix_cache=prefix_cache)


def sequence(order: int, length: int, end: int = 10**9, *, ready: bool = True) -> FakeSequence:
    """Its prompt shares nothing with another's."""
    return FakeSequence(order, [order * 1000 + at for at in range(length)], end, FakeRequest(ready))


def step(scheduler: Scheduler) -> list[tuple[int, int]]:
    """One step with a sampler that makes up a token; returns (order, tokens computed). Checks what always holds."""
    work = scheduler.schedule()
    assert sum(item.count for item in work) <= scheduler.max_batch_tokens
    assert all(item.count > 0 for item in work)
    assert len({id(item.sequence) for item in work}) == len(work), "one place a sequence"
    assert len(scheduler.running) <= scheduler.max_running
    assert all(item.sequence in scheduler.running for item in work), "work for a sequence that lost its blocks"
    for queue in (scheduler.running, scheduler.waiting):
        assert [s.order for s in queue] == sorted(s.order for s in queue)
    for item in work:
        assert len(item.sequence.blocks) * SIZE >= item.sequence.computed + item.count, "no room for its keys"
        assert set(item.fresh) <= set(item.sequence.blocks)
    owned = [block for s in scheduler.running for block in s.blocks]
    assert scheduler.prefix_cache or len(owned) == len(set(owned)), "two sequences write one block"
    assert scheduler.pool.used == len(set(owned))
    result = [(item.sequence.order, item.count) for item in work]
    finish(scheduler, work)
    return result


def finish(scheduler: Scheduler, work: list[Work]) -> None:
    samples = [item.sequence for item in work if item.samples]
    scheduler.computed(work)
    for s in samples:
        s.tokens.append(s.order * 7 + len(s.tokens))
        if len(s.tokens) >= s.end:  # type: ignore[attr-defined]
            scheduler.remove(s)


def test_decodes_come_first_then_chunks_then_newcomers() -> None:
    scheduler = scheduler_of(tokens=8)
    scheduler.add(sequence(1, 2))
    assert step(scheduler) == [(1, 2)]
    scheduler.add(sequence(2, 10))
    assert step(scheduler) == [(1, 1), (2, 7)], "a decode, and what is left of the budget for a long prompt"
    scheduler.add(sequence(3, 3))
    assert step(scheduler) == [(1, 1), (2, 3), (3, 3)]
    assert step(scheduler) == [(1, 1), (2, 1), (3, 1)]


def test_a_long_prompt_is_cut_to_the_budget() -> None:
    scheduler = scheduler_of(tokens=16)
    scheduler.add(sequence(1, 40))
    counts = [step(scheduler) for _ in range(4)]
    assert counts == [[(1, 16)], [(1, 16)], [(1, 8)], [(1, 1)]]


def test_only_work_that_reaches_the_last_token_samples() -> None:
    scheduler = scheduler_of(tokens=16)
    long = sequence(1, 20)
    scheduler.add(long)
    [first] = scheduler.schedule()
    assert not first.samples
    scheduler.computed([first])
    [second] = scheduler.schedule()
    assert second.samples
    assert len(second.sequence.tokens) == 20


def test_no_more_run_at_once_than_allowed() -> None:
    scheduler = scheduler_of(running=2)
    for order in (1, 2, 3):
        scheduler.add(sequence(order, 2, end=4))
    assert step(scheduler) == [(1, 2), (2, 2)]
    assert step(scheduler) == [(1, 1), (2, 1)]
    assert step(scheduler) == [(3, 2)]


def test_blocks_are_handed_out_in_the_order_of_arrival() -> None:
    """A short newcomer does not overtake a long one for which there is no room yet, or that would starve."""
    scheduler = scheduler_of(blocks=6, tokens=64)
    scheduler.add(sequence(1, 12, end=15))
    assert step(scheduler) == [(1, 12)]
    scheduler.add(sequence(2, 16, end=18))
    scheduler.add(sequence(3, 1, end=3))
    assert step(scheduler) == [(1, 1)]
    assert step(scheduler) == [(1, 1)]
    assert step(scheduler) == [(2, 16), (3, 1)]


def test_a_row_without_its_adapter_blocks_nobody() -> None:
    scheduler = scheduler_of()
    cold = sequence(1, 8, ready=False)
    scheduler.add(cold)
    scheduler.add(sequence(2, 4))
    assert step(scheduler) == [(2, 4)]
    assert step(scheduler) == [(2, 1)]
    assert not cold.blocks, "it holds nothing while it waits"
    cold.request.ready = True
    assert step(scheduler) == [(2, 1), (1, 8)]


def test_nothing_ready_is_no_work() -> None:
    scheduler = scheduler_of()
    assert scheduler.schedule() == []
    scheduler.add(sequence(1, 8, ready=False))
    assert scheduler.schedule() == []


def test_the_latest_arrival_gives_way_and_comes_back_before_later_ones() -> None:
    scheduler = scheduler_of(blocks=4, tokens=64)
    first, second, third = sequence(1, 4, end=10), sequence(2, 4, end=10), sequence(3, 3, end=6)
    scheduler.add(first)
    scheduler.add(second)
    assert step(scheduler) == [(1, 4), (2, 4)]
    scheduler.add(third)
    for _ in range(4):  # both grow to their second block, and fill the pool
        assert [order for order, _ in step(scheduler)] == [1, 2]
    assert scheduler.preemptions == 0
    while scheduler.running or scheduler.waiting:
        step(scheduler)
        assert second not in scheduler.waiting or third not in scheduler.running
    assert scheduler.preemptions > 0
    assert len(first.tokens) == len(second.tokens) == 10
    assert len(third.tokens) == 6


def test_preemption_takes_the_latest_arrival_and_recomputes_it() -> None:
    scheduler = scheduler_of(blocks=5, tokens=64)
    rows = [sequence(order, 4, end=13) for order in (1, 2)]
    for row in rows:
        scheduler.add(row)
    lengths, seen = [], 0
    while scheduler.running or scheduler.waiting:
        work = step(scheduler)
        assert work[0][0] == min(row.order for row in rows if len(row.tokens) < 13 or (row.order, 1) in work)
        if scheduler.preemptions > seen:
            seen = scheduler.preemptions
            assert rows[1] not in scheduler.running
            assert (rows[1].computed, rows[1].blocks) == (0, [])
            lengths.append(len(rows[1].tokens))
    assert lengths, "the pool was meant to be too small for both"
    assert lengths[0] > 4, "what it had made is kept"
    assert [len(row.tokens) for row in rows] == [13, 13]
    assert scheduler.pool.used == 0


def test_removing_returns_the_blocks_wherever_the_sequence_is() -> None:
    scheduler = scheduler_of(tokens=4)
    decoding, prefilling, waiting = sequence(1, 2), sequence(2, 30), sequence(3, 5, ready=False)
    for row in (decoding, prefilling, waiting):
        scheduler.add(row)
    step(scheduler)
    assert scheduler.pool.used > 0
    for row in (prefilling, waiting, decoding, decoding):
        scheduler.remove(row)
    assert (scheduler.running, scheduler.waiting, scheduler.pool.used) == ([], [], 0)


def test_a_known_beginning_is_shared_and_not_computed_again() -> None:
    scheduler = scheduler_of(prefix_cache=True)
    first = sequence(1, 10, end=11)
    scheduler.add(first)
    assert step(scheduler) == [(1, 10)]
    again = FakeSequence(2, first.tokens[:10])
    other = FakeSequence(3, first.tokens[:10], request=FakeRequest(seed=b"another adapter"))
    scheduler.add(again)
    scheduler.add(other)
    assert step(scheduler) == [(2, 2), (3, 10)]
    assert (again.cached, other.cached) == (8, 0)


@pytest.mark.parametrize("length", [1, 4, 8])
def test_a_prompt_that_is_known_whole_still_computes_its_last_token(length: int) -> None:
    scheduler = scheduler_of(prefix_cache=True)
    for order in (1, 2):
        scheduler.add(FakeSequence(order, list(range(length)), end=length + 1))
        [(_, count)] = step(scheduler)
        assert 1 <= count <= SIZE if order == 2 else count == length


@pytest.mark.parametrize("seed", range(40))
def test_everything_ends_however_small_the_pool(seed: int) -> None:
    """Random prompts, lengths, budgets, adapters that come late and cancellations; any sequence fits alone."""
    dice = random.Random(seed)
    blocks = dice.randint(3, 12)
    scheduler = Scheduler(
        BlockPool(blocks, SIZE),
        max_batch_tokens=dice.choice([2, 5, 16, 64]),
        max_running=dice.choice([1, 3, 8]),
        prefix_cache=dice.random() < 0.5,
    )
    rows = []
    for order in range(30):
        end = dice.randint(2, blocks * SIZE)
        prompt = [dice.randint(0, 1) if dice.random() < 0.1 else 0 for _ in range(dice.randint(1, end - 1))]
        rows.append(FakeSequence(order, prompt, end, FakeRequest(dice.random() < 0.7, dice.choice([b"a", b"b"]))))
    coming, cancelled, steps = list(rows), set(), 0
    while coming or scheduler.waiting or scheduler.running:
        if coming and dice.random() < 0.5:
            scheduler.add(coming.pop(0))
        for row in scheduler.waiting:
            row.request.ready |= dice.random() < 0.1 or not coming
        if dice.random() < 0.02 and (open_ := scheduler.waiting + scheduler.running):
            row = dice.choice(open_)
            scheduler.remove(row)
            cancelled.add(row.order)
        eldest = scheduler.running[0] if scheduler.running else None
        before = len(eldest.tokens) if eldest else 0
        work = step(scheduler)
        if eldest and (eldest.pending != 1 or before == len(eldest.tokens)) and eldest in scheduler.running:
            orders = [order for order, _ in work]
            assert eldest.order in orders or len(work) >= scheduler.max_batch_tokens, "the first in line stands still"
        if not coming and (scheduler.waiting or scheduler.running):
            assert work, "nothing moves"
        steps += 1
        assert steps < 30 * blocks * SIZE * 10, "it does not come to an end"
    assert scheduler.pool.used == 0
    for row in rows:
        assert row.order in cancelled or len(row.tokens) == row.end


def orders(work: list[Work]) -> list[int]:
    return [item.sequence.order for item in work]


def laned(order: int, length: int, lane: str, *, batch: bool = False) -> FakeSequence:
    made = sequence(order, length)
    made.request.lane, made.request.submit.batch = lane, batch
    return made


def play(scheduler: Scheduler, work: list[Work]) -> None:
    scheduler.computed(work)
    for item in work:
        if item.sequence.pending == 0:
            item.sequence.tokens.append(7)


def test_a_step_is_one_lanes() -> None:
    scheduler = scheduler_of()
    for order, lane in enumerate([SHARED, "a#1", SHARED, "b#2", "a#1"]):
        scheduler.add(laned(order, 3, lane))
    first = {DEFAULT_TENANT: Urgency.FIRST}
    assert scheduler.lanes() == dict.fromkeys((SHARED, "a#1", "b#2"), first)
    work = scheduler.schedule("a#1")
    assert orders(work) == [1, 4]
    play(scheduler, work)
    assert scheduler.lanes()["a#1"] == {DEFAULT_TENANT: Urgency.NEXT}
    scheduler.add(laned(9, 3, "b#2", batch=True))
    scheduler.add(laned(10, 3, "c#3", batch=True))
    assert scheduler.lanes()["b#2"] == first
    assert scheduler.lanes()["c#3"] == {DEFAULT_TENANT: Urgency.BATCH}
    assert scheduler.decoding("a#1") == 2
    assert scheduler.decoding(SHARED) == 0
    assert orders(scheduler.schedule()) == [0, 2]
    assert orders(scheduler.schedule("d#4")) == []


def test_prompts_are_cut_to_the_chunk_and_decodes_are_not() -> None:
    scheduler = scheduler_of(tokens=64)
    for order in range(3):
        scheduler.add(sequence(order, 2))
    play(scheduler, scheduler.schedule())
    scheduler.add(sequence(9, 40))
    work = scheduler.schedule(SHARED, 4)
    assert [(item.sequence.order, item.count) for item in work] == [(0, 1), (1, 1), (2, 1), (9, 4)]


def test_blocks_are_handed_out_in_order_whatever_the_lane() -> None:
    """A long prompt of one lane that waits for blocks is not overtaken for ever by short ones of another."""
    scheduler = scheduler_of(blocks=10)
    first = laned(0, 24, SHARED)
    scheduler.add(first)
    play(scheduler, scheduler.schedule())
    scheduler.add(laned(1, 30, SHARED))
    scheduler.add(laned(2, 3, "a#1"))
    assert orders(scheduler.schedule()) == [0], "there are no blocks for the second"
    assert orders(scheduler.schedule("a#1")) == [], "and so none for the third"
    scheduler.remove(first)
    play(scheduler, scheduler.schedule())
    assert orders(scheduler.schedule("a#1")) == [2]


def test_one_that_waited_for_blocks_and_left_holds_nobody_up() -> None:
    scheduler = scheduler_of(blocks=10)
    scheduler.add(laned(0, 24, SHARED))
    play(scheduler, scheduler.schedule())
    gone = laned(1, 30, SHARED)
    scheduler.add(gone)
    scheduler.schedule()
    scheduler.add(laned(2, 3, "a#1"))
    scheduler.remove(gone)
    assert orders(scheduler.schedule("a#1")) == [2]


def test_batch_work_comes_last() -> None:
    scheduler = scheduler_of(tokens=8)
    scheduler.add(laned(0, 6, SHARED, batch=True))
    scheduler.add(laned(1, 6, SHARED))
    work = scheduler.schedule()
    assert [(item.sequence.order, item.count) for item in work] == [(1, 6), (0, 2)]


def test_batch_work_gives_its_place_up_to_other_work() -> None:
    scheduler = scheduler_of(running=2)
    for order in range(2):
        scheduler.add(laned(order, 4, SHARED, batch=True))
    play(scheduler, scheduler.schedule())
    scheduler.add(laned(2, 4, SHARED, batch=True))
    assert orders(scheduler.schedule()) == [0, 1], "its like does not make way"
    scheduler.add(laned(3, 4, SHARED))
    assert orders(scheduler.schedule()) == [0, 3], "the latest batch row makes way"
    assert scheduler.preemptions == 1
    assert [one.order for one in scheduler.waiting] == [1, 2]


def test_batch_work_gives_its_blocks_up_to_other_work() -> None:
    scheduler = scheduler_of(blocks=12)
    for order in range(2):
        scheduler.add(laned(order, 16, SHARED, batch=True))
    play(scheduler, scheduler.schedule())
    scheduler.add(laned(2, 20, SHARED))
    assert orders(scheduler.schedule()) == [0, 2]
    assert scheduler.preemptions == 1


def test_a_decode_without_blocks_takes_them_from_batch_work_first() -> None:
    scheduler = scheduler_of(blocks=4)
    scheduler.add(laned(0, 8, SHARED, batch=True))
    scheduler.add(laned(1, 8, SHARED))
    assert orders(scheduler.schedule()) == [1]


def test_room_that_batch_work_gave_up_is_not_handed_back_by_its_own_lane() -> None:
    """Else it would be preempted and computed anew in every round, while the first in the queue waits for its turn."""
    scheduler = scheduler_of(blocks=40, running=2, tokens=8)
    scheduler.add(sequence(0, 60))
    assert orders(scheduler.schedule()) == [0]
    scheduler.add(laned(1, 4, "a#1", batch=True))
    assert orders(scheduler.schedule("a#1")) == [1]
    scheduler.add(sequence(2, 4))
    for _ in range(5):
        assert orders(scheduler.schedule("a#1")) == []
        play(scheduler, scheduler.schedule(SHARED, 8))
    assert scheduler.preemptions == 1


def test_batch_work_is_not_preempted_for_what_would_not_fit_all_the_same() -> None:
    scheduler = scheduler_of(blocks=8, running=4)
    scheduler.add(sequence(0, 5 * SIZE))
    scheduler.add(laned(1, SIZE, SHARED, batch=True))
    play(scheduler, scheduler.schedule())
    scheduler.add(sequence(2, 6 * SIZE))
    scheduler.schedule()
    assert scheduler.preemptions == 0
