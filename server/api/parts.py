"""What tenants share that is bounded, so that none of them can have all of it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Hashable, Iterator
from typing import TypeVar

import anyio
import anyio.to_thread

from server.errors import Overloaded, RateLimited

T = TypeVar("T")
RETRY_SECONDS = 5


class Places:
    """At most `most` uploads at once; nobody waits for a place. Used from one event loop.

    With `shared`, a tenant takes one while it has fewer than are free (dynamic thresholds: Choudhury and Hahne,
    "Dynamic Queue Length Thresholds for Shared-Memory Packet Switches", IEEE/ACM Transactions on Networking, 1998): one
    alone gets half of them, of several each a like part, and some stay free for whoever comes next.
    """

    def __init__(self, most: int, *, shared: bool):
        self.most, self._shared = most, shared
        self._held: Counter[str] = Counter()  # by tenant; without those that have none

    @property
    def taken(self) -> int:
        """By all tenants."""
        return self._held.total()

    @contextlib.contextmanager
    def taking(self, tenant: str) -> Iterator[None]:
        """A place during the block. Raises RateLimited when the tenant has its part already, Overloaded when none is
        free for one that is within its part."""
        free = self.most - self.taken
        if self._shared and self._held[tenant] >= max(1, free):
            message = f"this tenant is sending {self._held[tenant]} uploads already, which is its part at present"
            raise RateLimited(message, code="uploads_limit", retry_after=RETRY_SECONDS)
        if not free:
            raise Overloaded("too many uploads are under way", code="uploads_full", retry_after=RETRY_SECONDS)
        self._held[tenant] += 1
        try:
            yield
        finally:
            self._held[tenant] -= 1
            self._held += Counter()  # drops the zeros


class Lines:
    """Work for threads, `most` pieces at once and, with `shared`, at most `each` of one tenant; the others wait. Used
    from one event loop. A tenant's own line comes before the common one, in which it has at most `each`: however many
    it sends, another waits behind no more than that. Instead of a tenant it may be anything that work is of."""

    def __init__(self, most: float, each: float, *, shared: bool):
        self._all, self._each = anyio.CapacityLimiter(most), each if shared else most
        self._own: dict[Hashable, anyio.CapacityLimiter] = {}  # of tenants that have work or wait
        self._users: Counter[Hashable] = Counter()

    @contextlib.asynccontextmanager
    async def turn(self, tenant: Hashable) -> AsyncIterator[None]:
        """One of the tenant's pieces is worked on during the block; waits until it may be."""
        own = self._own.setdefault(tenant, anyio.CapacityLimiter(self._each))
        self._users[tenant] += 1
        try:
            async with own, self._all:
                yield
        finally:
            self._users[tenant] -= 1
            if not self._users[tenant]:
                del self._users[tenant], self._own[tenant]

    async def run(self, tenant: Hashable, call: Callable[[], T]) -> T:
        """`call()`, on a thread that is not one of those that everything else shares."""
        async with self.turn(tenant):
            return await anyio.to_thread.run_sync(call, limiter=anyio.CapacityLimiter(1))
