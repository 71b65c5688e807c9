"""Calls that change what a name means: one after the other of one name, and those that wait for a merged copy apart.

One thread makes the copies, and each takes up to seconds. However many calls wait for it, of however many tenants, a
plain change of another name (`DELETE`, a rollback, publishing) does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from server.api.parts import Lines

T = TypeVar("T")
AT_ONCE, OF_ONE = 32, 8  # plain changes: of all tenants, of one; each may wait for the disk


class Changes:
    """Used from one event loop. With `shared`, one tenant has no more than its part of the threads."""

    def __init__(self, *, shared: bool):
        self._names = Lines(math.inf, 1, shared=True)  # by tenant and name: those who wait for a name hold nothing else
        self._plain = Lines(AT_ONCE, OF_ONE, shared=shared)
        self._copies = Lines(1, 1, shared=True)  # more at once would only wait for the one thread

    async def run(self, tenant: str, name: str, call: Callable[[], T], *, copies: Callable[[], bool]) -> T:
        """`call()`, on a thread, in its turn. `copies` is asked when the name's turn has come: whether the call waits
        for a merged copy. Such calls have their turn by tenant: who asks for one waits for one of each other."""
        async with self._names.turn((tenant, name)):
            line = self._copies if copies() else self._plain
            return await line.run(tenant, call)
