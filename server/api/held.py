"""Tells the bill what every tenant stores, and what is merged because it asked for that."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Self

from server.api.state import State
from server.core import AdapterRef
from server.errors import TenantNotFound
from server.registry.records import Key, Record
from server.tenants.holdings import Held

log = logging.getLogger("onebase.api")
LOOK_SECONDS = 1.0  # after which a change is seen; the bill counts in whole seconds
SAMPLE_SECONDS = 60.0  # after which is written down what has not changed
SPARING = 20  # a look and what follows from it take at most one part in so many of the time
Seen = tuple[Mapping[Key, Record], Mapping[AdapterRef, int]]


class Sampler:
    """Looks at the registry and at the engine's figures while it is entered, and writes down what is held at every
    change, once a minute, and at the end. What comes and goes between two looks is on no bill, and what lasts longer is
    at each end off by at most one look."""

    def __init__(self, state: State):
        self._state = state
        self._seen: Seen = ({}, {})
        self._sampled = 0.0

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="holdings")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        try:
            await self._state.accounts.holdings.sample(int(time.time()), ())
        except Exception:
            log.exception("what was stored since the last minute could not be written down")

    async def look(self) -> None:
        """Samples what has changed, and everything once a minute."""
        whole = time.monotonic() >= self._sampled + SAMPLE_SECONDS
        seen, held = await asyncio.to_thread(self._looked, whole)
        if held is None:
            return
        await self._state.accounts.holdings.sample(int(time.time()), held, only_changed=not whole)
        self._seen = seen
        if whole:
            self._sampled = time.monotonic()

    async def _run(self) -> None:
        while True:
            began = time.monotonic()
            try:
                await self.look()
            except Exception:  # the database: it may come back, and nothing is lost until then
                log.exception("what is stored could not be written down")
            await asyncio.sleep(max(LOOK_SECONDS, SPARING * (time.monotonic() - began)))

    def _looked(self, whole: bool) -> tuple[Seen, list[Held] | None]:
        """What is there now, and what that makes held; None where nothing has changed. Not on the event loop."""
        seen = self._state.registry.snapshot(), self._state.client.stats.asked_bytes
        return seen, list(self._held(seen)) if whole or seen != self._seen else None

    def _held(self, seen: Seen) -> Iterator[Held]:
        """What belongs to a tenant that this database does not know is nobody's bill."""
        records, copies = seen
        for (tenant, name), record in records.items():
            if self._known(tenant):
                yield Held(tenant, name, "storage", record.bytes)
        for adapter, nbytes in copies.items():
            if self._known(adapter.tenant):
                yield Held(adapter.tenant, adapter.name, "merged", nbytes)

    def _known(self, tenant: str) -> bool:
        try:
            self._state.accounts.directory.show(tenant)
        except TenantNotFound:
            return False
        return True
