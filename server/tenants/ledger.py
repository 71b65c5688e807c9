"""The ledger: one usage record a request, written once, in groups, and durable before the answer ends.

All that waits is committed in one transaction (group commit: DeWitt et al., "Implementation techniques for main memory
database systems", SIGMOD 1984), and the next group gathers meanwhile. See docs/decisions/0009-the-ledger.md.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import bindparam, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from server.errors import LedgerUnavailable
from server.tenants.database import Database
from server.tenants.record import ABORTED, Record, record_of, row_of
from server.tenants.tables import OPEN, now_ms, outbox, usage

PATIENCE = 5.0  # seconds that a closed record waits for the database before its request fails
SPACING = 0.02  # seconds from one commit's begin to the next's: under load more share one; a lone record waits for none
LINGER = 0.2  # seconds that what nobody waits for gathers before it is committed
FIRST_DELAY, LAST_DELAY = 0.05, 1.0  # seconds between the attempts of a commit
Event = Callable[[Record], dict[str, Any] | None]
log = logging.getLogger(__name__)

_FIXED = ("request_id", "created_ms")  # of an open row that is closed
_CHECKPOINT = (
    update(usage)
    .where(usage.c.request_id == bindparam("of"), usage.c.status == OPEN)
    .values(cached=bindparam("now_cached"), completion=bindparam("now_completion"))
)


class AlreadyClosed(RuntimeError):
    """A second close of the same request: a fault of the caller. What was written first stands."""


@dataclass(slots=True)
class _Closing:
    record: Record
    closed_ms: int
    durable: asyncio.Future[None]
    timer: asyncio.TimerHandle | None = None

    def end(self, fault: Exception | None = None) -> None:
        """Tell who waits; only the first call does, and nobody need be there any more."""
        if self.timer:
            self.timer.cancel()
        if self.durable.done():
            return
        if fault is None:
            self.durable.set_result(None)
        else:
            self.durable.set_exception(fault)
            self.durable.exception()  # seen: it is no news to the event loop if nobody asks


@dataclass(slots=True)
class _Group:
    """What goes into one transaction. `since` is when its oldest part came."""

    opens: dict[str, Record] = field(default_factory=dict)
    checkpoints: dict[str, tuple[int, int]] = field(default_factory=dict)
    closes: dict[str, _Closing] = field(default_factory=dict)
    since: float = 0.0
    attempts: int = 0

    def __len__(self) -> int:
        return len(self.opens) + len(self.checkpoints) + len(self.closes)


class Ledger:
    """The usage records of one server. `open`, `checkpoint` and `close` belong to the event loop that `start` ran on.

    `event` makes what is to be told of a closed record, with a unique `id`; it goes into the outbox in the same
    transaction. `commits` and `failures` count attempts.
    """

    def __init__(self, database: Database, *, event: Event | None = None, patience: float = PATIENCE):
        self._database = database
        self._event = event
        self._patience = patience
        self._open_row = database.insert(usage).on_conflict_do_nothing()
        self._final_row = _final_row(database)
        self._event_row = database.insert(outbox).on_conflict_do_nothing()
        self._next = _Group()
        self._under_way = _Group()
        self._wake = asyncio.Event()
        self._stopping = False
        self._writer: asyncio.Task[None] | None = None
        self.commits = 0
        self.failures = 0

    @property
    def queued(self) -> int:
        """Opens, checkpoints and closes that are not committed."""
        return len(self._next) + len(self._under_way)

    @property
    def lag_seconds(self) -> float:
        """The age of the oldest part that is not committed."""
        since = [group.since for group in (self._under_way, self._next) if len(group)]
        return time.monotonic() - min(since) if since else 0.0

    @property
    def healthy(self) -> bool:
        """Whether what came `patience` seconds ago is committed, somebody is there to commit more, and no other server
        may have taken the database."""
        writing = self._writer is not None and not self._writer.done()
        return writing and self._database.owned and self.lag_seconds <= self._patience

    def check(self) -> None:
        """For admission: raises `LedgerUnavailable` while what a request uses could not be written down."""
        if not self.healthy:
            raise _unavailable()

    async def start(self) -> int:
        """Settle what an earlier process left open, then accept records. The number that was settled."""
        settled = await self._settle()
        self._writer = asyncio.create_task(self._write(), name="ledger")
        return settled

    async def stop(self, seconds: float = 10.0) -> None:
        """Commit what is queued, for `seconds` at most. What could not be is open, and settled at the next start."""
        self._stopping = True
        self._wake.set()
        if self._writer is None:
            return
        await asyncio.wait({self._writer}, timeout=seconds)
        self._writer.cancel()
        await asyncio.wait({self._writer})
        if self.queued:
            log.error("the ledger stops with %d entries that the database did not take", self.queued)
        for closing in (*self._under_way.closes.values(), *self._next.closes.values()):
            closing.end(_unavailable())

    def open(self, record: Record) -> None:
        """A request is admitted."""
        self._came()
        self._next.opens[record.request_id] = record

    def checkpoint(self, request_id: str, cached: int, completion: int) -> None:
        """What a running request has used until now. Tokens say that its prompt was computed."""
        if request_id not in self._next.closes:
            self._came()
            self._next.checkpoints[request_id] = (cached, completion)

    def close(self, record: Record) -> asyncio.Future[None]:
        """A request has ended. The future is done when that is durable, whether or not somebody waits for it.

        It fails with `LedgerUnavailable` after `patience` seconds (the record stays queued), and with `AlreadyClosed`
        when the request was closed before.
        """
        loop = asyncio.get_running_loop()
        closing = _Closing(record, now_ms(), loop.create_future())
        name = record.request_id
        if name in self._next.closes or name in self._under_way.closes:
            closing.end(AlreadyClosed(name))
            return closing.durable
        self._came()
        closing.timer = loop.call_later(self._patience, closing.end, _unavailable())
        self._next.closes[name] = closing
        self._next.opens.pop(name, None)
        self._next.checkpoints.pop(name, None)
        self._wake.set()
        return closing.durable

    async def flushed(self) -> None:
        """Returns when all that was closed until now is durable, or could not be made so in `patience`."""
        waiting = [one.durable for group in (self._under_way, self._next) for one in group.closes.values()]
        if waiting:
            await asyncio.wait(waiting)

    def _came(self) -> None:
        if not len(self._next):
            self._next.since = time.monotonic()
            self._wake.set()

    async def _write(self) -> None:
        """The one writer: takes all that waits, commits it, again until the database takes it, and goes on."""
        while await self._due():
            began = time.monotonic()
            self._under_way, self._next = self._next, _Group()
            refused = await self._persist(self._under_way)
            group, self._under_way = self._under_way, _Group()
            for name, closing in group.closes.items():
                closing.end(AlreadyClosed(name) if name in refused else None)
            await asyncio.sleep(max(0.0, began + SPACING - time.monotonic()))

    async def _due(self) -> bool:
        """Wait until there is something to commit; False when there will be nothing more."""
        while not self._stopping and not self._next.closes:
            rest = self._next.since + LINGER - time.monotonic() if len(self._next) else None
            if rest is not None and rest <= 0:
                break
            self._wake.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(rest):
                    await self._wake.wait()
        return len(self._next) > 0

    async def _persist(self, group: _Group) -> set[str]:
        delay = FIRST_DELAY
        while True:
            try:
                refused = await self._commit(group)
                self.commits += 1
                return refused
            except Exception as fault:
                self.failures += 1
                group.attempts += 1
                log.warning("the ledger could not be written (attempt %d): %s", group.attempts, fault)
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(2 * delay, LAST_DELAY)

    async def _commit(self, group: _Group) -> set[str]:
        """One transaction. The ids among `closes` that had been closed before."""
        closes = [(closing.record, closing.closed_ms) for closing in group.closes.values()]
        async with self._database.write() as connection:
            if group.opens:
                rows = [row_of(record, None) for record in group.opens.values()]
                await connection.execute(self._open_row, rows)
            if group.checkpoints:
                counts = [
                    {"of": name, "now_cached": cached, "now_completion": completion}
                    for name, (cached, completion) in group.checkpoints.items()
                ]
                await connection.execute(_CHECKPOINT, counts)
            refused = group.closes.keys() - await self._close(connection, closes)
            if refused and group.attempts:  # an attempt that seemed to fail may have been committed after all
                refused -= await _written_before(connection, [pair for pair in closes if pair[0].request_id in refused])
        return refused

    async def _close(self, connection: AsyncConnection, closes: list[tuple[Record, int]]) -> set[str]:
        """Write final rows and their events; the ids of those that were not final before."""
        if not closes:
            return set()
        result = await connection.execute(self._final_row, [row_of(*close) for close in closes])
        written = set(result.scalars().all())
        events = [
            row
            for record, closed_ms in closes
            if record.request_id in written
            if (row := self._told(record, closed_ms))
        ]
        if events:
            await connection.execute(self._event_row, events)
        return written

    def _told(self, record: Record, closed_ms: int) -> dict[str, Any] | None:
        """The outbox row of a closed record. An event that cannot be made must not keep its record off the bill."""
        if self._event is None:
            return None
        try:
            event = self._event(record)
            payload = None if event is None else json.dumps(event)
        except Exception:
            log.exception("no event of request %s", record.request_id)
            return None
        if event is None:
            return None
        row = {"event_id": event["id"], "payload": payload, "created_ms": closed_ms}
        return row | {"attempts": 0, "next_ms": closed_ms, "delivered_ms": None}

    async def _settle(self) -> int:
        """Close what an earlier process left open, by its last checkpoint; a prompt counts once there is a token."""
        async with self._database.write() as connection:
            rows = (await connection.execute(select(usage).where(usage.c.status == OPEN))).all()
            found = [record_of(row) for row in rows]
            aborted = [
                replace(record, status=ABORTED)
                if record.completion
                else replace(record, status=ABORTED, prompt=0, cached=0)
                for record in found
            ]
            now = now_ms()
            await self._close(connection, [(record, now) for record in aborted])
        return len(found)


def _final_row(database: Database) -> Any:
    """Insert a closed record, or make the open row of its id final; gives back the ids of those that it wrote."""
    new = database.insert(usage)
    changed = {column.name: new.excluded[column.name] for column in usage.c if column.name not in _FIXED}
    return new.on_conflict_do_update(
        index_elements=[usage.c.request_id], set_=changed, where=usage.c.status == OPEN
    ).returning(usage.c.request_id)


async def _written_before(connection: AsyncConnection, closes: list[tuple[Record, int]]) -> set[str]:
    """The ids whose rows in the database are these very closes."""
    names = [record.request_id for record, _ in closes]
    rows = (await connection.execute(select(usage).where(usage.c.request_id.in_(names)))).all()
    there = {row.request_id: dict(row._mapping) for row in rows}
    return {close[0].request_id for close in closes if there.get(close[0].request_id) == row_of(*close)}


def _unavailable() -> LedgerUnavailable:
    return LedgerUnavailable("What this request used could not be written down in time", retry_after=1)
