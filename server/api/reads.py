"""Turns at reading long prompts: tenant by tenant, and large prompts apart from others."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from server.api.parts import Lines
from server.engine.bounds import Bounds

LARGE = 65_536  # characters; reading so many takes tens of milliseconds, of the largest a second and 150 MB
MAX_WAITING = 64 * 2**20  # characters of all prompts that wait or are being read


class Reads:
    """One large prompt and one other are read at a time. Who waits has its turn after one prompt of each other tenant
    and the one that is being read, however many of them wait. Used from one event loop."""

    def __init__(self, max_requests: int, *, shared: bool):
        self.bounds = Bounds(max_requests, MAX_WAITING, "characters", shared=shared)
        # One at a time, and one of a tenant in the common line: the tenants take turns.
        self._large, self._other = Lines(1, 1, shared=True), Lines(1, 1, shared=True)

    @asynccontextmanager
    async def turn(self, tenant: str, weight: float, size: int) -> AsyncIterator[None]:
        """Waits for the turn of a prompt of `size` characters, and has it inside. Raises Overloaded or QueueShare where
        too many wait."""
        self.bounds.take(tenant, weight, size)
        line = self._large if size > LARGE else self._other
        try:
            async with line.turn(tenant):
                yield
        finally:
            self.bounds.give_back(tenant, size)
