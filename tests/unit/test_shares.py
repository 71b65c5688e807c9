"""The order of the line, the accounts, and what must hold whoever comes: no clocks, no figures of speed."""

from __future__ import annotations

import itertools
from collections import Counter
from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine import counters
from server.engine.blocks import BlockPool
from server.engine.counters import AHEAD, CONTEXT
from server.engine.lanes import SHARED
from server.engine.messages import Prices, Sampling, Submit
from server.engine.room import MOST
from server.engine.scheduler import Scheduler
from tests.firstcome import FirstCome
from tests.unit.test_scheduler import SIZE, FakeRequest, FakeSequence, FakeSubmit, finish, orders, scheduler_of, step

STEP = 32 * Prices().completion  # a full step of `scheduler_of`, priced


def row(
    order: int, length: int, tenant: str, end: int = 10**9, *, weight: float = 1.0, batch: bool = False
) -> FakeSequence:
    submit = FakeSubmit(batch=batch, tenant=tenant, weight=weight)
    return FakeSequence(order, [order * 1000 + at for at in range(length)], end, FakeRequest(submit=submit))


def served(scheduler: Scheduler) -> dict[str, float]:
    return {name: one.served for name, one in scheduler.shares.figures().items()}


def test_the_line_is_the_tenants_in_turn() -> None:
    scheduler = scheduler_of(tokens=4, running=64)
    for order in range(200):
        scheduler.add(row(order, 4, "a" if order < 100 else "b", end=5))
    ended = [step(scheduler)[0][0] for _ in range(80)]
    one, two = ([order for order in ended if (order < 100) is first] for first in (True, False))
    assert one + two == sorted(ended), "each by arrival"
    assert abs(len(one) - len(two)) <= AHEAD * STEP / 8 / 6 + 1, "a full step is an eighth here, and each pays 6"


def test_batch_work_of_one_tenant_comes_after_other_work_of_another() -> None:
    scheduler = scheduler_of(tokens=4)
    scheduler.add(row(0, 4, "a", end=5, batch=True))
    scheduler.add(row(1, 4, "b", end=5))
    scheduler.add(row(2, 4, "b", end=5))
    ended = []
    for _ in range(3):
        work = scheduler.schedule()
        ended += orders(work)
        finish(scheduler, work)
    assert ended == [1, 2, 0]


def test_prompts_outputs_and_known_beginnings_have_their_prices() -> None:
    scheduler = scheduler_of(prefix_cache=True)
    first = row(0, 10, "a", end=12)
    scheduler.add(first)
    step(scheduler)
    assert served(scheduler) == {"a": 10 * 1.0 + 2.0}
    step(scheduler)
    assert served(scheduler) == {"a": 10 * 1.0 + 2 * 2.0}
    again = row(1, 10, "b")
    again.tokens[:] = first.tokens[:10]
    scheduler.add(again)
    step(scheduler)
    assert served(scheduler)["b"] == pytest.approx(8 * 0.1 + 2 * 1.0 + 2.0)


def test_who_reads_more_context_is_further_ahead_but_has_been_served_no_more() -> None:
    """Its steps take longer; the bill knows nothing of that."""
    scheduler = scheduler_of(blocks=2000)
    long, short = row(0, 200, "long", end=1200), row(1, 200, "short", end=1200)
    scheduler.add(long)
    scheduler.add(short)
    shares = scheduler.shares
    for _ in range(20):  # the prompts
        step(scheduler)
    counters, before = {one: shares.of(one).counter for one in (long, short)}, served(scheduler)
    long.tokens += [0] * 800
    long.computed += 800
    for _ in range(20):
        shares.charge(long, 1)
        shares.charge(short, 1)
    read, other = (shares.of(one).counter - counters[one] for one in (long, short))
    assert read / other == pytest.approx((1 + CONTEXT * long.computed) / (1 + CONTEXT * short.computed))
    after = served(scheduler)
    assert after["long"] - before["long"] == after["short"] - before["short"] > 0


@pytest.mark.parametrize("batch", [False, True])
def test_rows_of_who_is_ahead_take_turns_with_its_prompts_but_not_with_batch_work(batch: bool) -> None:
    scheduler = scheduler_of(running=64, blocks=2000)
    behind, ahead = row(0, 4, "behind"), row(1, 4, "ahead")
    for one in (behind, ahead):
        scheduler.add(one)
        step(scheduler)
    scheduler.add(row(2, 1000, "ahead", batch=batch))
    shares, seen = scheduler.shares, list[list[int]]()
    for _ in range(4):
        shares.of(ahead).counter = shares.of(behind).counter + 0.75 * AHEAD * STEP
        seen.append(sorted(orders(scheduler.schedule())))
        for one in (behind, ahead):
            one.computed = len(one.tokens)
            one.tokens.append(0)
    if batch:
        assert all({0, 1} <= set(found) for found in seen)
    else:
        assert [1 in found for found in seen] == [False, True, False, True]
        assert all({0, 2} <= set(found) for found in seen if 1 not in found)


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_prompt_is_charged_once_a_request(prefix_cache: bool) -> None:
    scheduler = scheduler_of(prefix_cache=prefix_cache, blocks=200)
    prices = Prices()

    def ask(order: int, tenant: str, count: int) -> None:
        """A request of 20 known tokens for several answers of three tokens each."""
        answers = [row(order + index, 20, tenant, end=23) for index in range(count)]
        for index, one in enumerate(answers):
            one.index, one.request, one.tokens[:] = index, answers[0].request, range(20)
            scheduler.add(one)
        while scheduler.running or scheduler.waiting:
            step(scheduler)

    ask(0, "a", 1)
    ask(10, "b", 5)
    known = 16 if prefix_cache else 0  # whole blocks that another request has left, without the last token
    one, five = served(scheduler).values()
    assert one == pytest.approx(20 * prices.prompt + 3 * prices.completion)
    assert five == pytest.approx(known * prices.cached + (20 - known) * prices.prompt + 15 * prices.completion)


def test_a_merged_lanes_tokens_are_its_tenants_as_well() -> None:
    scheduler = scheduler_of()
    for order, (tenant, lane) in enumerate([("a", SHARED), ("b", "b#1"), ("b", SHARED)]):
        made = row(order, 8, tenant)
        made.request.lane = lane
        scheduler.add(made)
    finish(scheduler, scheduler.schedule("b#1"))
    assert served(scheduler) == {"a": 0.0, "b": 8 + 2.0}
    finish(scheduler, scheduler.schedule())
    for _ in range(200):
        finish(scheduler, scheduler.schedule("b#1"))
    assert orders(scheduler.schedule()) == [0], "who has had so much in its own lane is left out of the shared one"


def test_a_newcomer_begins_at_the_bound_behind_the_others() -> None:
    scheduler = scheduler_of(running=4)
    for order in range(4):
        scheduler.add(row(order, 4, "a"))
    for _ in range(50):
        step(scheduler)
    scheduler.add(row(9, 4, "b"))
    old, new = (scheduler.shares.of(one) for one in (scheduler.running[0], scheduler.waiting[-1]))
    assert old.counter - new.counter == AHEAD * STEP


def test_who_comes_back_at_once_has_gained_nothing() -> None:
    scheduler = scheduler_of()
    scheduler.add(row(0, 4, "a"))
    counters = []
    for order in range(1, 20):
        scheduler.add(row(order, 12, "b", end=13))
        counters.append(scheduler.shares.of(scheduler.waiting[-1]).counter)
        while scheduler.waiting or len(scheduler.running) > 1:
            step(scheduler)
    assert counters == sorted(counters)
    assert counters[-1] - counters[0] >= 18 * 12


def test_a_newcomer_gets_a_place_at_once_and_never_more_than_its_part() -> None:
    scheduler = scheduler_of(running=4, blocks=200)
    for order in range(8):
        scheduler.add(row(order, 4, "a"))
    step(scheduler)
    for order in range(8, 14):
        scheduler.add(row(order, 4, "b"))
    assert 8 in [order for order, _ in step(scheduler)]
    for _ in range(100):
        step(scheduler)
        places = Counter(one.request.submit.tenant for one in scheduler.running)
    assert places == {"a": 2, "b": 2}
    assert [one.order for one in scheduler.running] == [0, 1, 8, 9], "the latest arrivals have given way"
    assert scheduler.preemptions == 2


def test_a_newcomer_gets_blocks_at_once() -> None:
    scheduler = scheduler_of(blocks=12)
    for order in range(5):
        scheduler.add(row(order, 8, "a", end=11))
    step(scheduler)
    assert scheduler.pool.available < 5
    scheduler.add(row(9, 16, "b"))
    assert 9 in [order for order, _ in step(scheduler)]


def test_nobody_makes_room_for_who_would_not_be_in_the_step() -> None:
    """Else the others would take the room again, and be preempted for it again."""
    scheduler = scheduler_of(running=4, blocks=4000)
    scheduler.add(row(0, 30, "a", end=31))
    for order in range(1, 5):
        scheduler.add(row(order, 4, "b"))
    while len([one for one in scheduler.running if one.order]) < 4:
        step(scheduler)
    for order in range(5, 40):  # each takes a place as long as it is due, and leaves at once
        scheduler.add(row(order, 30, "a", end=31))
    before = scheduler.preemptions
    account = scheduler.shares.of(scheduler.waiting[-1])
    for _ in range(40):
        ahead = not scheduler.shares.due(scheduler.waiting[-1])
        seen = scheduler.preemptions
        step(scheduler)
        assert scheduler.preemptions == seen or not ahead
    assert scheduler.preemptions > before
    assert account.rows <= 2


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_and_prices_are_checked_before_they_reach_the_engine(weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        Submit("", (1,), None, Sampling(1), weight=weight)
    if weight:
        with pytest.raises(ValueError, match="price"):
            Prices(prompt=weight)


def test_weights_say_how_many_places_are_ones_part() -> None:
    scheduler = scheduler_of(running=8, blocks=4000)
    for order in range(10):
        scheduler.add(row(order, 4, "a"))
    step(scheduler)
    for order in range(10, 20):
        scheduler.add(row(order, 4, "b", weight=3.0))
    for _ in range(300):
        step(scheduler)
    assert Counter(one.request.submit.tenant for one in scheduler.running) == {"a": 2, "b": 6}


def test_rows_of_who_is_ahead_take_turns() -> None:
    scheduler = scheduler_of(running=8, blocks=4000)
    for order in range(7):
        scheduler.add(row(order, 2, "a"))
    scheduler.add(row(7, 2, "b"))
    for _ in range(400):
        step(scheduler)
    lengths = [len(one.tokens) for one in scheduler.running]
    assert max(lengths[:7]) - min(lengths[:7]) <= 1
    assert lengths[7] > lengths[0]


def test_accounts_of_passers_by_are_forgotten() -> None:
    scheduler = scheduler_of(blocks=4000)
    scheduler.add(row(0, 4, "stays"))
    for order in range(1, 2000):
        scheduler.add(row(order, 4, f"t{order}", end=5))
        step(scheduler)
    assert len(scheduler.shares.figures()) < 300


def test_counters_start_again_without_changing_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    def play() -> tuple[list[list[tuple[int, int]]], float]:
        scheduler, steps = scheduler_of(running=4, blocks=400), []
        for order in range(400):
            scheduler.add(row(order, 3 + order % 7, f"t{order % 3}", end=20 + order % 5))
        while scheduler.waiting or scheduler.running:
            steps.append(step(scheduler))
            scheduler.add(late := row(10**6 + len(steps), 2, "late", end=3))
            steps.append(step(scheduler))
            scheduler.remove(late)
        return steps, scheduler.shares._clock

    plain, clock = play()
    monkeypatch.setattr(counters, "_REBASE", 2.0)
    again, low = play()
    assert again == plain
    assert low < clock / 2


ARRIVAL = st.tuples(
    st.integers(0, 3),  # steps after the one before
    st.sampled_from("abcd"),
    st.integers(1, 24),  # prompt
    st.integers(1, 12),  # new tokens
    st.booleans(),  # batch
)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(ARRIVAL, min_size=1, max_size=25),
    st.integers(9, 14),
    st.sampled_from([2, 5, 16, 64]),
    st.sampled_from([1, 2, 3, 8]),
)
def test_everybody_ends_and_pays_once(
    arrivals: list[tuple[int, str, int, int, bool]], blocks: int, tokens: int, running: int
) -> None:
    """Tenants of weights 1 to 4, with a pool that holds any sequence alone."""
    scheduler = scheduler_of(blocks=blocks, tokens=tokens, running=running)
    due, rows, at = [], [], 0
    for order, (gap, tenant, prompt, new, batch) in enumerate(arrivals):
        at += gap
        rows.append(row(order, prompt, tenant, prompt + new, weight="abcd".index(tenant) + 1.0, batch=batch))
        due.append((at, rows[-1]))
    bound = sum(len(one.tokens) + one.end for one in rows) * (MOST + 4) + at
    for now in range(bound):
        while due and due[0][0] <= now:
            scheduler.add(due.pop(0)[1])
        if not due and not scheduler.waiting and not scheduler.running:
            break
        work = scheduler.schedule()
        assert work or not (scheduler.waiting or scheduler.running), "there is work, and room for some of it"
        assert all(item.sequence in scheduler.running for item in work)
        assert all(len(item.sequence.blocks) * SIZE >= item.sequence.computed + item.count for item in work)
        finish(scheduler, work)
    assert all(len(one.tokens) == one.end for one in rows)
    assert scheduler.pool.used == 0
    paid = Counter[str]()
    for one in rows:
        paid[one.request.submit.tenant] += one.prompt_length + 2 * one.produced
    assert served(scheduler) == pytest.approx(dict(paid))
    for account in (scheduler.shares.of(one) for one in rows):
        assert (account.open, account.rows, account.blocks, account.waiting) == (0, 0, 0, [])


@pytest.mark.parametrize("tokens", [4, 64])
def test_a_large_request_is_not_overtaken_for_ever(tokens: int) -> None:
    """By small ones of its own tenant, of another's flood and of tenants that are new every time."""
    scheduler = scheduler_of(blocks=12, tokens=tokens, running=4)
    numbers = itertools.count(1)
    for _ in range(6):
        scheduler.add(row(next(numbers), 6, "flood", end=14))
    step(scheduler)
    large = row(next(numbers), 40, "large", end=46)
    scheduler.add(large)
    for _ in range(2000):
        while len(scheduler.waiting) < 8:
            number = next(numbers)
            scheduler.add(row(number, 6, ("large", "flood", f"new{number}")[number % 3], end=14))
        step(scheduler)
        if len(large.tokens) == large.end:
            return
    pytest.fail("it starves")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(ARRIVAL, min_size=1, max_size=25),
    st.integers(9, 14),
    st.sampled_from([2, 5, 16, 64]),
    st.sampled_from([1, 2, 3, 8]),
    st.booleans(),
)
def test_one_tenant_alone_is_served_as_it_comes(
    arrivals: list[tuple[int, str, int, int, bool]], blocks: int, tokens: int, running: int, cache: bool
) -> None:
    """The same work in the same blocks as without any shares, in two lanes."""
    pools = [BlockPool(blocks, SIZE), BlockPool(blocks, SIZE)]
    both = [
        kind(pool, max_batch_tokens=tokens, max_running=running, prefix_cache=cache)
        for kind, pool in zip((Scheduler, FirstCome), pools, strict=True)
    ]
    due, at = [], 0
    for order, (gap, kind, prompt, new, batch) in enumerate(arrivals):
        at += gap
        made = row(order, prompt, "only", prompt + new, batch=batch)
        made.tokens[: prompt // 2] = [0] * (prompt // 2)
        made.request.lane = "a#1" if kind == "a" else SHARED
        due.append((at, made))
    for now in range(2000):
        while due and due[0][0] <= now:
            _, made = due.pop(0)
            for scheduler in both:
                scheduler.add(deepcopy(made))  # type: ignore[attr-defined]
        for lane in (SHARED, "a#1"):
            chunk = 4 if lane == SHARED and now % 3 == 0 else None
            work = [scheduler.schedule(lane, chunk) for scheduler in both]  # type: ignore[attr-defined]
            plain = [[(one.sequence.order, one.count, one.fresh) for one in items] for items in work]
            assert plain[0] == plain[1]
            for scheduler, items in zip(both, work, strict=True):
                finish(scheduler, items)  # type: ignore[arg-type]
        if not due and not both[0].waiting and not both[0].running:  # type: ignore[attr-defined]
            return
    pytest.fail("it does not come to an end")
