"""Who reads a long prompt next."""

from __future__ import annotations

import asyncio

import pytest

from server.api.reads import LARGE, MAX_WAITING, Reads
from server.errors import Overloaded, QueueShare


class Readers:
    """Requests that each want a turn, and hold it until they are told to end."""

    def __init__(self, requests: int = 100, *, shared: bool = True):
        self.reads = Reads(requests, shared=shared)
        self.had: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, *names: str, size: int = 10_000) -> None:
        """`a1` is the first request of tenant `a`."""
        for name in names:
            self._ends[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._read(name, size))
        await settled()

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await settled()

    async def _read(self, name: str, size: int) -> None:
        async with self.reads.turn(name[0], 1.0, size):
            self.had.append(name)
            await self._ends[name].wait()

    def idle(self) -> None:
        assert (self.reads.bounds.requests, self.reads.bounds.amount) == (0, 0)


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_tenants_take_turns_however_many_of_one_wait() -> None:
    async def go() -> None:
        readers = Readers()
        await readers.come("a1", "a2", "a3", "a4", "b1", "b2", "c1")
        order = ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]
        for at, name in enumerate(order):
            assert readers.had == order[: at + 1]
            await readers.end(name)
        await readers.come("b3")
        assert readers.had[-1] == "b3", "nobody waits: no turn is needed"
        await readers.end("b3")
        readers.idle()

    asyncio.run(go())


def test_a_large_prompt_does_not_hold_up_a_smaller_one() -> None:
    async def go() -> None:
        readers = Readers()
        await readers.come("a1", "b1", size=LARGE + 1)
        await readers.come("c1", size=LARGE)
        assert readers.had == ["a1", "c1"]
        for name in ("a1", "b1", "c1"):
            await readers.end(name)
        readers.idle()

    asyncio.run(go())


@pytest.mark.parametrize("given", [False, True])
def test_who_is_given_up_leaves_its_turn_to_the_next(given: bool) -> None:
    async def go() -> None:
        readers = Readers()
        await readers.come("a1", "b1", "c1")
        if given:  # in the same round in which it gets its turn
            readers._ends["a1"].set()
            while not readers.tasks["a1"].done():
                await asyncio.sleep(0)
        readers.tasks["b1"].cancel()
        await settled()
        await readers.end("a1")
        assert readers.had[-1] == "c1"
        await readers.end("c1")
        await readers.come("d1")
        await readers.end("d1")
        assert readers.had[-1] == "d1"
        readers.idle()

    asyncio.run(go())


def test_how_many_wait_is_bounded_for_each_tenant_and_for_all() -> None:
    async def refused(readers: Readers, name: str, size: int) -> type[BaseException]:
        with pytest.raises((Overloaded, QueueShare)) as caught:
            async with readers.reads.turn(name, 1.0, size):
                pass
        return caught.type

    async def go() -> None:
        readers = Readers(8)
        await readers.come("a1", "a2", "a3", "a4")
        assert await refused(readers, "a", 10_000) is QueueShare
        await readers.come("b1", "c1")
        for name in ("a1", "b1", "c1", "a2", "a3", "a4"):
            await readers.end(name)
        assert len(readers.had) == 6
        await readers.come("a5", size=MAX_WAITING // 2)
        assert await refused(readers, "a", 10_000) is QueueShare
        assert await refused(readers, "b", MAX_WAITING) is Overloaded
        await readers.end("a5")
        readers.idle()

    asyncio.run(go())
