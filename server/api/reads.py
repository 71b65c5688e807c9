"""Turns at reading long prompts: tenant by tenant, and large prompts apart from others."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from server.engine.bounds import Bounds

LARGE = 65_536  # characters; reading so many takes tens of milliseconds, of the largest a second and 150 MB
MAX_WAITING = 64 * 2**20  # characters of all prompts that wait or are being read


class Reads:
    """One large prompt and one other are read at a time. Who waits has its turn after one prompt of each other tenant
    and the one that is being read, however many of them wait. Used from one event loop."""

    def __init__(self, max_requests: int, *, shared: bool):
        self.bounds = Bounds(max_requests, MAX_WAITING, "characters", shared=shared)
        self._large, self._other = _Line(), _Line()

    @asynccontextmanager
    async def turn(self, tenant: str, weight: float, size: int) -> AsyncIterator[None]:
        """Waits for the turn of a prompt of `size` characters, and has it inside. Raises Overloaded or QueueShare where
        too many wait."""
        self.bounds.take(tenant, weight, size)
        line = self._large if size > LARGE else self._other
        try:
            await line.enter(tenant)
            try:
                yield
            finally:
                line.leave(tenant)
        finally:
            self.bounds.give_back(tenant, size)


class _Line:
    """One at a time; the tenants in rotation, each one's in the order of arrival."""

    def __init__(self) -> None:
        self._busy = False
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def enter(self, tenant: str) -> None:
        if not self._busy:
            self._busy = True
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it had just been given the turn
                self.leave(tenant)
            raise

    def leave(self, tenant: str) -> None:
        if tenant in self._waiting:
            self._waiting.move_to_end(tenant)  # all others first
        while self._waiting:
            first, turns = next(iter(self._waiting.items()))
            turn = turns.popleft()
            if not turns:
                del self._waiting[first]
            if not turn.done():  # else its request was given up
                turn.set_result(None)
                return
        self._busy = False
