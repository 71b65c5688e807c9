"""No tenant has all of what is bounded, and a line is as long for one as for another."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.changes import AT_ONCE, Changes
from server.api.parts import Lines, Places
from server.errors import OnebaseError, Overloaded, RateLimited


def fill(places: Places, tenant: str, held: contextlib.ExitStack) -> int:
    """How many places the tenant gets until it is refused."""
    for count in range(places.most + 1):
        try:
            held.enter_context(places.taking(tenant))
        except RateLimited:
            return count
    raise AssertionError("it was never refused")


def test_one_has_half_and_each_that_comes_finds_room() -> None:
    places = Places(16, shared=True)
    with contextlib.ExitStack() as held:
        assert [fill(places, tenant, held) for tenant in "abcd"] == [8, 4, 2, 1]
        held.enter_context(places.taking("e"))
        with pytest.raises(Overloaded) as full:
            held.enter_context(places.taking("f"))
        assert full.value.code == "uploads_full"
        with pytest.raises(RateLimited) as part:
            held.enter_context(places.taking("a"))
        assert (part.value.code, part.value.retry_after) == ("uploads_limit", 5)
    assert places.taken == 0
    assert not places._held, "nothing is kept of who has none"
    with contextlib.ExitStack() as held:
        assert fill(places, "f", held) == 8


def test_where_there_is_one_tenant_it_has_all() -> None:
    places = Places(16, shared=False)
    with contextlib.ExitStack() as held:
        for _ in range(16):
            held.enter_context(places.taking("default"))
        with pytest.raises(Overloaded) as full:
            held.enter_context(places.taking("default"))
        assert full.value.code == "uploads_full"
    assert places.taken == 0

    async def at_once() -> int:
        lines, most, gate = Lines(4, 2, shared=False), 0, asyncio.Event()

        async def work() -> None:
            nonlocal most
            async with lines.turn("default"):
                most += 1
                await gate.wait()

        tasks = [asyncio.create_task(work()) for _ in range(9)]
        await asyncio.sleep(0.01)
        begun = most
        gate.set()
        await asyncio.gather(*tasks)
        return begun

    assert asyncio.run(at_once()) == 4


@given(st.integers(1, 20), st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans())))
def test_any_history_stays_within_the_places(most: int, history: list[tuple[str, bool]]) -> None:
    places, held, counts = Places(most, shared=True), {}, Counter[str]()
    for number, (tenant, comes) in enumerate(history):
        if not comes:
            mine = next((one for one in held if held[one][0] == tenant), None)
            if mine is not None:
                held.pop(mine)[1].close()
                counts[tenant] -= 1
            continue
        stack, free = contextlib.ExitStack(), most - counts.total()
        try:
            stack.enter_context(places.taking(tenant))
        except OnebaseError:
            assert counts[tenant] >= free, "it had fewer than were free"
        else:
            assert counts[tenant] < free
            held[number], counts[tenant] = (tenant, stack), counts[tenant] + 1
        assert places.taken == counts.total() <= most
    for _, stack in held.values():
        stack.close()
    assert not places._held


def test_one_who_sends_much_is_waited_for_no_longer_than_one_who_sends_little() -> None:
    async def order() -> list[str]:
        lines, done = Lines(2, 1, shared=True), []
        gate = asyncio.Event()

        async def work(tenant: str) -> None:
            async with lines.turn(tenant):
                await gate.wait()
                done.append(tenant)
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(work(tenant)) for tenant in "aaaaaaaabc"]
        await asyncio.sleep(0.01)
        gate.set()
        await asyncio.gather(*tasks)
        assert not lines._own
        assert not lines._users
        return done

    done = asyncio.run(order())
    assert sorted(done) == list("aaaaaaaabc")
    assert {"b", "c"} <= set(done[:4])


def test_a_tenant_that_fills_its_part_leaves_room_and_its_faults_are_its_own() -> None:
    async def both() -> tuple[str, list[BaseException | str]]:
        lines, go = Lines(4, 2, shared=True), threading.Event()

        def slow() -> str:
            assert go.wait(20)
            raise OverflowError

        held = [asyncio.create_task(lines.run("ann", slow)) for _ in range(9)]
        await asyncio.sleep(0.01)
        gone = held.pop()
        gone.cancel()  # a client that goes while it waits in line
        other = await asyncio.wait_for(lines.run("bob", lambda: "done"), 20)
        go.set()
        told = await asyncio.gather(*held, gone, return_exceptions=True)
        assert not lines._own
        return other, told

    other, told = asyncio.run(both())
    assert other == "done"
    assert [type(one) for one in told] == [OverflowError] * 8 + [asyncio.CancelledError]


def test_changes_that_wait_for_copies_hold_up_no_plain_ones_and_have_turns_by_tenant() -> None:
    tenants, each = "abcd", AT_ONCE // 2  # twice what there are places for plain changes

    async def order() -> list[str]:
        changes, go, done = Changes(shared=True), threading.Event(), list[str]()

        def build(tenant: str) -> None:
            assert go.wait(20)
            done.append(tenant)

        names = [(tenant, f"{tenant}{number}") for tenant in tenants for number in range(each)]
        waiting = [changes.run(*name, partial(build, name[0]), copies=lambda: True) for name in names]
        waiting += [changes.run(*name, lambda: None, copies=lambda: False) for name in names]  # of the same names
        tasks = [asyncio.create_task(one) for one in waiting]
        await asyncio.sleep(0.01)
        plain = changes.run("e", "other", lambda: "at once", copies=lambda: False)
        assert await asyncio.wait_for(plain, 20) == "at once"
        tasks.append(asyncio.create_task(changes.run("e", "own", partial(build, "e"), copies=lambda: True)))
        await asyncio.sleep(0.01)
        go.set()
        await asyncio.gather(*tasks)
        assert not changes._names._own
        return done

    done = asyncio.run(order())
    assert len(done) == len(tenants) * each + 1
    assert done.index("e") == len(tenants), "after one of each"
