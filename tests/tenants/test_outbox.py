"""The outbox's deliverer against a local receiver, on both databases."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import func, select

from server.tenants.database import Database
from server.tenants.outbox import CLAIM, LAST_DELAY, LEASE_SECONDS, TRIES, Deliverer, Keeping
from server.tenants.sinks import CloudEventsSink, LagoSink, Sink, StripeSink
from server.tenants.tables import outbox
from tests.tenants.receivers import Receiver, receiving

pytestmark = pytest.mark.anyio
START = 1_700_000_000.0


class Clock:
    """Seconds since 1970 that pass when they are told to."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as there:
        yield there


def payload(name: str, cost: int = 5) -> str:
    data = {"cost_microusd": cost, "total_tokens": 1}
    body = {"id": name, "source": "test", "subject": "acme", "time": "2023-11-14T22:13:20Z", "data": data}
    return json.dumps(body | {"specversion": "1.0", "type": "llm.usage.v1"})


async def fill(database: Database, *names: str, cost: int = 5, at: float = START) -> None:
    made = int(at * 1000)
    rows = [{"event_id": n, "payload": payload(n, cost), "created_ms": made, "next_ms": made} for n in names]
    async with database.write() as connection:
        await connection.execute(outbox.insert(), rows)


async def count(database: Database, *conditions: Any) -> int:
    async with database.read() as connection:
        return await connection.scalar(select(func.count()).select_from(outbox).where(*conditions)) or 0


@contextlib.asynccontextmanager
async def delivering(database: Database, sink: Sink, clock: Clock, **more: Any) -> AsyncIterator[Deliverer]:
    deliverer = Deliverer(database, sink, clock=clock, **more)
    try:
        yield deliverer
    finally:
        await deliverer.stop()


async def test_batches_in_order(database: Database, receiver: Receiver) -> None:
    clock = Clock()
    names = [f"gen-{number:04}" for number in range(CLAIM + 50)]
    await fill(database, *names)
    async with delivering(database, CloudEventsSink(receiver.url), clock) as deliverer:
        assert await deliverer.round() == 0  # there is more
        assert deliverer.waiting == 50
        assert await deliverer.round() > 0
        assert (deliverer.delivered, deliverer.waiting, deliverer.oldest_seconds) == (CLAIM + 50, 0, 0.0)
        calls = len(receiver.calls)
        await deliverer.round()
    assert len(receiver.calls) == calls == 5
    assert receiver.got == dict.fromkeys(names, 1)
    first = [event["id"] for event in json.loads(receiver.calls[0][1])]
    assert first == sorted(first)
    assert len(first) == 100


@pytest.mark.parametrize("fault", [500, 503, 429, 401, "lost"])
async def test_a_failing_sink_is_tried_again(database: Database, receiver: Receiver, fault: Any) -> None:
    clock = Clock()
    await fill(database, "a", "b")
    receiver.faults = [fault, fault, fault]
    waits = []
    async with delivering(database, LagoSink(f"{receiver.url}/lago", "s", code="llm"), clock) as deliverer:
        for _ in range(8):
            waits.append(await deliverer.round())
            if not deliverer.waiting:
                break
            assert deliverer.oldest_seconds == pytest.approx(clock.now - START)
            clock.now += waits[-1]
        assert (deliverer.delivered, deliverer.parked) == (2, 0)
    assert receiver.got == {"a": 1, "b": 1}
    if fault != "lost":  # which the receiver had taken
        assert deliverer.failures == 3
        assert [0.5 <= waits[0] <= 1, 1 <= waits[1] <= 2, 2 <= waits[2] <= 4] == [True] * 3


async def test_retry_after_is_waited_for(database: Database, receiver: Receiver) -> None:
    clock = Clock()
    await fill(database, "a")
    receiver.faults = [(429, {"Retry-After": "120"})]
    async with delivering(database, CloudEventsSink(receiver.url), clock) as deliverer:
        assert await deliverer.round() == 120
        clock.now += 119
        await deliverer.round()
        assert receiver.got == {}
        clock.now += 1
        await deliverer.round()
    assert receiver.got == {"a": 1}


async def test_an_event_that_is_refused_holds_up_nobody(
    database: Database, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    await fill(database, "a", "bad", "c")
    receiver.poison = {"bad"}
    async with delivering(database, CloudEventsSink(receiver.url, "s3cret"), clock) as deliverer:
        await deliverer.round()
        assert receiver.got == {"a": 1, "c": 1}
        with caplog.at_level(logging.ERROR, "onebase.outbox"):
            for _ in range(TRIES):
                clock.now += LAST_DELAY
                await deliverer.round()
        assert (deliverer.delivered, deliverer.parked, deliverer.waiting) == (2, 1, 0)
        assert [("bad" in record.getMessage(), "s3cret" in record.getMessage()) for record in caplog.records] == [
            (True, False)
        ]
        async with database.read() as connection:
            row = (await connection.execute(select(outbox).where(outbox.c.parked_ms.is_not(None)))).one()
        assert (row.event_id, row.attempts, row.fault) == ("bad", TRIES, "status 400")
        calls = len(receiver.calls)
        clock.now += LAST_DELAY
        await deliverer.round()
        assert len(receiver.calls) == calls
        receiver.poison = set()
        assert await deliverer.revive() == 1
        await deliverer.round()
    assert receiver.got == {"a": 1, "bad": 1, "c": 1}


async def test_what_is_parked_costs_no_look_at_what_is_due(database: Database, receiver: Receiver) -> None:
    """It lies behind everything that the index is asked for; and many are revived in parts."""
    clock = Clock()
    await fill(database, *"abcde")
    receiver.poison = set("abcde")
    async with delivering(database, CloudEventsSink(receiver.url), clock) as deliverer:
        for _ in range(TRIES):
            clock.now += LAST_DELAY
            await deliverer.round()
        assert (deliverer.parked, deliverer.waiting) == (5, 0)
        assert await count(database, outbox.c.next_ms < int((clock.now + 10**9) * 1000)) == 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("server.tenants.outbox.PRUNE_ROWS", 2)
            assert await deliverer.revive() == 5
        receiver.poison = set()
        await deliverer.round()
    assert receiver.got == dict.fromkeys("abcde", 1)


class Crash(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("kind", ["stripe", "lago", "events"])
async def test_a_crash_between_post_and_mark(
    database: Database, receiver: Receiver, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sink() -> Sink:
        if kind == "stripe":
            return StripeSink(f"{receiver.url}/stripe", "s", event_name="llm")
        return LagoSink(f"{receiver.url}/lago", "s", code="llm") if kind == "lago" else CloudEventsSink(receiver.url)

    async def crash(*_: object) -> float:
        raise Crash

    clock = Clock()
    await fill(database, "a", "b")
    async with delivering(database, sink(), clock) as deliverer:
        monkeypatch.setattr(deliverer, "_mark", crash)
        with pytest.raises(Crash):
            await deliverer.round()
    assert set(receiver.got) == {"a", "b"}
    assert await count(database, outbox.c.delivered_ms.is_not(None)) == 0
    await fill(database, "c", at=START + 1)
    clock.now += LEASE_SECONDS
    async with delivering(database, sink(), clock) as deliverer:
        await deliverer.round()
        assert (deliverer.delivered, deliverer.waiting) == (3, 0)
    again = 2 if kind == "events" else 1  # whoever keeps the ids does not count a repetition
    assert receiver.got == {"a": again, "b": again, "c": 1}


async def test_two_servers_share_an_outbox(database: Database, receiver: Receiver) -> None:
    clock = Clock()
    names = [f"gen-{number}" for number in range(300)]
    await fill(database, *names)
    async with (
        delivering(database, CloudEventsSink(receiver.url), clock) as one,
        delivering(database, CloudEventsSink(receiver.url), clock) as other,
    ):
        await asyncio.gather(one.round(), other.round())
        assert one.delivered + other.delivered == 300
    assert receiver.got == dict.fromkeys(names, 1)


async def test_what_a_sink_does_not_want_is_done(database: Database, receiver: Receiver) -> None:
    await fill(database, "free", cost=0)
    async with delivering(database, StripeSink(f"{receiver.url}/stripe", "s", event_name="llm"), Clock()) as deliverer:
        await deliverer.round()
        assert (deliverer.delivered, deliverer.waiting) == (1, 0)
    assert receiver.calls == []


async def test_old_and_too_many_events_go(
    database: Database, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    await fill(database, "a", "b")
    keeping = Keeping(seconds=3600, rows=3)
    async with delivering(database, CloudEventsSink(receiver.url), clock, keeping=keeping) as deliverer:
        await deliverer.round()
        clock.now += 3599
        await deliverer.round()
        assert await count(database) == 2
        clock.now += 61
        await deliverer.round()
        assert await count(database) == 0
        receiver.faults = [500]
        await fill(database, *"cdefg", at=clock.now)
        clock.now += 61
        with caplog.at_level(logging.ERROR, "onebase.outbox"):
            await deliverer.round()
        assert (deliverer.dropped, deliverer.waiting) == (2, 3)
        assert "2 events were dropped" in caplog.text
        clock.now += LAST_DELAY
        await deliverer.round()
    assert receiver.got == dict.fromkeys("abefg", 1)


async def test_it_runs_and_survives_its_database(database: Database, receiver: Receiver) -> None:
    """One round fails as if the database were away; the next ones deliver."""
    deliverer = Deliverer(database, CloudEventsSink(receiver.url), clock=Clock())
    claim, failed = deliverer._claim, asyncio.Event()

    async def once() -> Any:
        deliverer._claim = claim  # type: ignore[method-assign]
        failed.set()
        raise OSError

    deliverer._claim = once  # type: ignore[method-assign]
    await fill(database, "a")
    deliverer.start()
    await failed.wait()
    async with asyncio.timeout(30):
        while not deliverer.delivered:
            await asyncio.sleep(0.02)
    await deliverer.stop()
    assert receiver.got == {"a": 1}
