"""Brings the events of the outbox to a sink: at least once, in order but for what is tried again.

A round claims the oldest events that are due by moving their `next_ms` behind a lease, posts them, and marks what
became of them. After a crash between post and mark they are posted again when the lease has passed.

When the sink fails (no connection, timeout, 5xx, 429, a key that it does not take) nothing is wrong with the events:
all of them wait, each time longer, with jitter, and never shorter than `Retry-After` asks. When it refuses a batch, its
events are sent one by one; one that is refused `TRIES` times is parked: kept, counted, logged, tried no more.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import bindparam, delete, func, select, update

from server.tenants.database import Database
from server.tenants.events import Event
from server.tenants.sinks import TIMEOUT_SECONDS, Outcome, Sink, Verdict
from server.tenants.tables import now_ms, outbox

log = logging.getLogger("onebase.outbox")

CLAIM = 400  # events of one round: what of the outbox is in memory
CALLS = 4  # to the sink at once
TRIES = 12  # refusals until an event is parked: about a quarter of an hour
LEASE_SECONDS = 60.0  # that a round may take
LOOK_SECONDS, LOOK_ROWS = 10.0, 10_000  # so many waiting events are counted only so often
IDLE_SECONDS = 1.0  # between rounds when nothing is due
FIRST_DELAY, LAST_DELAY = 1.0, 300.0  # seconds of back-off
PRUNE_SECONDS = 60.0
PRUNE_ROWS = 5_000  # deleted, or revived, in one transaction
_MS = 1000
_NEVER = 2**62  # the `next_ms` of what is parked, behind all that the index of what is due is asked for
_PARKED = outbox.c.delivered_ms.is_(None) & outbox.c.parked_ms.is_not(None)
_WAITING = outbox.c.delivered_ms.is_(None) & (outbox.c.next_ms < _NEVER) & outbox.c.parked_ms.is_(None)


@dataclass(frozen=True, slots=True)
class Keeping:
    """How much the outbox holds: delivered events for `seconds`, and `rows` that are not delivered, parked ones too.
    The oldest beyond that are dropped, which is logged and counted; the usage that they told of stays on the bill."""

    seconds: float = 7 * 86_400.0
    rows: int = 1_000_000


@dataclass(slots=True)
class _Claimed:
    row: int
    attempts: int
    event: Event


class Deliverer:
    """`delivered`, `parked`, `dropped` and `failures` (calls that the sink did not take) count since the start.
    `waiting` and `oldest_ms` (when the oldest undelivered event was made; None without one) are of the last round;
    `oldest_seconds` is its age now. `clock` gives seconds since 1970.

    It owns the sink and closes it.
    """

    def __init__(
        self, database: Database, sink: Sink, *, clock: Callable[[], float] = time.time, keeping: Keeping | None = None
    ):
        self._database = database
        self._sink = sink
        self._clock = clock
        self._keeping = keeping or Keeping()
        self._failed = 0  # calls in a row
        self._pruned = self._looked = 0.0
        self._task: asyncio.Task[None] | None = None
        self.delivered = self.parked = self.dropped = self.failures = 0
        self.waiting = 0
        self.oldest_ms: int | None = None

    @property
    def oldest_seconds(self) -> float:
        """The age of the oldest event that is neither delivered nor parked."""
        return 0.0 if self.oldest_ms is None else max(0.0, self._clock() - self.oldest_ms / _MS)

    def start(self) -> None:
        """Delivers on the running event loop until `stop`."""
        self._task = asyncio.create_task(self._run(), name="outbox")

    async def stop(self) -> None:
        """Ends it at once. What is on its way is delivered again at the next start."""
        if self._task:
            self._task.cancel()
            await asyncio.wait({self._task})
        await self._sink.close()

    async def round(self) -> float:
        """Delivers what is due now, `CLAIM` events at most. The seconds until the next round."""
        claimed = await self._claim()
        wanted = [item for item in claimed if self._sink.wants(item.event)]
        size = self._sink.batch
        posted = await self._post([wanted[start : start + size] for start in range(0, len(wanted), size)])
        unwanted = {item.row for item in claimed} - {item.row for item in wanted}
        wait = await self._mark(claimed, posted | dict.fromkeys(unwanted, Verdict(Outcome.DELIVERED)))
        await self._prune()
        await self._look()
        return wait if wait or len(claimed) == CLAIM else IDLE_SECONDS

    async def revive(self) -> int:
        """Tries the parked events again, after whatever was at fault is mended. How many."""
        now, revived = self._now_ms(), 0
        some = select(outbox.c.id).where(_PARKED).order_by(outbox.c.id).limit(PRUNE_ROWS)
        again = update(outbox).where(outbox.c.id.in_(some)).values(parked_ms=None, attempts=0, next_ms=now)
        while True:
            async with self._database.write() as connection:
                done = (await connection.execute(again)).rowcount
            revived += done
            if done < PRUNE_ROWS:
                return revived

    async def _run(self) -> None:
        while True:
            try:
                wait = await self.round()
            except Exception:  # the database: it may come back
                log.exception("a round of the outbox failed")
                self._failed += 1
                wait = self._back_off(self._failed)
            await asyncio.sleep(wait)

    async def _claim(self) -> list[_Claimed]:
        """The oldest events that are due, put off for as long as posting them may take."""
        now = self._now_ms()
        due = (
            select(outbox.c.id, outbox.c.event_id, outbox.c.attempts, outbox.c.payload)
            .where(_WAITING, outbox.c.next_ms <= now)
            .order_by(outbox.c.next_ms, outbox.c.id)
        )
        async with self._database.read() as connection:  # which leaves the ledger its turn to write
            if (await connection.execute(due.limit(1))).first() is None:
                return []
        async with self._database.write() as connection:
            # Another server on the same database takes others.
            rows = (await connection.execute(due.limit(CLAIM).with_for_update(skip_locked=True))).all()
            until = now + int(LEASE_SECONDS * _MS)
            mine = outbox.c.id.in_([row.id for row in rows])
            await connection.execute(update(outbox).where(mine).values(next_ms=until))
        return [_Claimed(row.id, row.attempts, Event(row.event_id, json.loads(row.payload))) for row in rows]

    async def _post(self, batches: Iterable[Sequence[_Claimed]]) -> dict[int, Verdict]:
        """What became of each event that was sent, by row. Once the sink fails, or the lease is about to end, the rest
        is not sent."""
        verdicts: dict[int, Verdict] = {}
        left = iter(batches)
        end = time.monotonic() + LEASE_SECONDS - 2 * TIMEOUT_SECONDS

        async def work() -> None:
            for batch in left:
                got = await self._batch(batch, end)
                verdicts.update(got)
                if self._over(got, end):
                    return

        async with asyncio.TaskGroup() as group:
            for _ in range(CALLS):
                group.create_task(work())
        return verdicts

    async def _batch(self, batch: Sequence[_Claimed], end: float) -> dict[int, Verdict]:
        verdict = await self._sink.send([item.event for item in batch])
        if verdict.outcome is not Outcome.DELIVERED:
            self.failures += 1
        if verdict.outcome is not Outcome.REFUSED or len(batch) == 1:
            return {item.row: verdict for item in batch}
        verdicts = {item.row: Verdict(Outcome.DELIVERED) for item in batch if item.event.id in verdict.held}
        rest = [item for item in batch if item.row not in verdicts]
        if verdicts and rest:  # only what it had already may have been in the way
            return verdicts | await self._batch(rest, end)
        for item in rest:  # one of them is at fault, and must not hold up the others
            alone = await self._batch([item], end)
            verdicts |= alone
            if self._over(alone, end):
                break
        return verdicts

    def _over(self, got: dict[int, Verdict], end: float) -> bool:
        """Whether to stop sending: the sink fails, or there is no time left for another call."""
        return time.monotonic() > end or any(verdict.outcome is Outcome.LATER for verdict in got.values())

    async def _mark(self, claimed: Sequence[_Claimed], verdicts: dict[int, Verdict]) -> float:
        """Writes down what became of them; what was not sent is let go. How long the sink is left alone, seconds."""
        later = [verdict for verdict in verdicts.values() if verdict.outcome is Outcome.LATER]
        self._failed = self._failed + 1 if later else 0
        pause = max([self._back_off(self._failed), *(verdict.retry_after for verdict in later)]) if later else 0.0
        now, unsent = self._now_ms(), Verdict(Outcome.LATER)
        rows = [self._marked(item, verdicts.get(item.row, unsent), now, pause) for item in claimed]
        if rows:
            names = ("attempts", "next_ms", "delivered_ms", "parked_ms", "fault")
            change = update(outbox).where(outbox.c.id == bindparam("row"))
            async with self._database.write() as connection:
                await connection.execute(change.values({name: bindparam(f"new_{name}") for name in names}), rows)
        self.delivered += sum(row["new_delivered_ms"] is not None for row in rows)
        parked = [item.event.id for item, row in zip(claimed, rows, strict=True) if row["new_parked_ms"] is not None]
        self.parked += len(parked)
        if parked:
            log.error("%r refused %d events too often, %s first: they are parked", self._sink, len(parked), parked[0])
        if later:
            log.warning("%r takes no events (%s); the next try is in %.1f s", self._sink, later[0].reason, pause)
        return pause

    def _marked(self, item: _Claimed, verdict: Verdict, now: int, pause: float) -> dict[str, Any]:
        attempts = item.attempts + (verdict.outcome is Outcome.REFUSED)
        delivered = parked = None
        wait = pause
        if verdict.outcome is Outcome.DELIVERED:
            delivered = now
        elif verdict.outcome is Outcome.REFUSED:
            wait = max(self._back_off(attempts), verdict.retry_after)
            parked = now if attempts >= TRIES else None
        return {
            "row": item.row,
            "new_attempts": attempts,
            "new_next_ms": _NEVER if parked else now + int(wait * _MS),
            "new_delivered_ms": delivered,
            "new_parked_ms": parked,
            "new_fault": verdict.reason[:256] or None,
        }

    async def _prune(self) -> None:
        """Deletes what was delivered long ago, and what is beyond the most rows that are kept."""
        now = self._clock()
        if now < self._pruned + PRUNE_SECONDS:
            return
        old = outbox.c.delivered_ms < int((now - self._keeping.seconds) * _MS)
        undelivered = select(outbox.c.id).where(outbox.c.delivered_ms.is_(None)).order_by(outbox.c.id.desc())
        async with self._database.write() as connection:
            gone = await connection.execute(_some(old))
            last = await connection.scalar(undelivered.offset(self._keeping.rows).limit(1))
            dropped = 0
            if last is not None:
                beyond = outbox.c.delivered_ms.is_(None) & (outbox.c.id <= last)
                dropped = (await connection.execute(_some(beyond))).rowcount
        if gone.rowcount < PRUNE_ROWS and dropped < PRUNE_ROWS:
            self._pruned = now  # else there is more: the next round goes on
        if dropped:
            self.dropped += dropped
            log.error("the outbox is full: %d events were dropped undelivered", dropped)

    async def _look(self) -> None:
        now = self._clock()
        if self.waiting > LOOK_ROWS and now < self._looked + LOOK_SECONDS:
            return
        self._looked = now
        async with self._database.read() as connection:
            count, oldest = (
                await connection.execute(select(func.count(), func.min(outbox.c.created_ms)).where(_WAITING))
            ).one()
        self.waiting, self.oldest_ms = count, oldest

    def _back_off(self, failures: int) -> float:
        """Seconds, between half and the whole of a delay that doubles: the servers that failed at once must not come
        back at once."""
        delay = min(LAST_DELAY, FIRST_DELAY * 2 ** min(failures - 1, 20))
        return delay * random.uniform(0.5, 1.0)

    def _now_ms(self) -> int:
        return now_ms(self._clock)


def _some(condition: Any) -> Any:
    """Deletes up to `PRUNE_ROWS` of the rows."""
    return delete(outbox).where(outbox.c.id.in_(select(outbox.c.id).where(condition).limit(PRUNE_ROWS)))
