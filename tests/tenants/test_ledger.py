"""The ledger: written once, durable when it says so, and never stopped for good by a database that fails."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from server.errors import LedgerUnavailable
from server.tenants import ledger as module
from server.tenants.database import Database
from server.tenants.ledger import AlreadyClosed, Ledger
from server.tenants.prices import Rates
from tests.tenants.records import Faulty, event_of, record, rows, told

pytestmark = pytest.mark.anyio
DONE = {"status": "stop", "prompt": 100, "cached": 10, "completion": 5}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts that follow each other at once."""
    monkeypatch.setattr(module, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(module, "LAST_DELAY", 0.01)


async def test_a_closed_record_is_there_with_its_cost_and_event(database: Database) -> None:
    ledger = Ledger(database, event=event_of)
    assert await ledger.start() == 0
    ledger.open(record("a", prompt=100))
    await ledger.close(record("a", **DONE))
    row = (await rows(database))["a"]
    assert (row.status, row.prompt, row.cached, row.completion) == ("stop", 100, 10, 5)
    assert (row.cost_prompt, row.cost_cached, row.cost_completion) == (9, 0, 2)  # 9, 0.1 and 2 micro-dollars
    assert row.closed_ms is not None
    assert await told(database) == ["a"]
    await ledger.stop()


async def test_opens_and_checkpoints_are_written_without_anybody_waiting(database: Database) -> None:
    ledger = Ledger(database)
    await ledger.start()
    ledger.open(record("a", prompt=100))
    ledger.checkpoint("a", 10, 3)
    ledger.checkpoint("a", 10, 4)
    while ledger.queued:
        await asyncio.sleep(0.01)
    row = (await rows(database))["a"]
    assert (row.status, row.prompt, row.cached, row.completion, row.closed_ms) == ("open", 100, 10, 4, None)
    assert row.cost_prompt == row.cost_completion == 0
    assert ledger.commits == 1
    await ledger.stop()


async def test_many_share_a_commit(database: Database) -> None:
    ledger = Ledger(database, event=event_of)
    await ledger.start()
    await asyncio.gather(*(ledger.close(record(f"r{number}", **DONE)) for number in range(2500)))
    assert ledger.commits == 1
    assert len(await rows(database)) == len(await told(database)) == 2500
    await ledger.stop()


async def test_the_next_group_gathers_while_one_commits(database: Database) -> None:
    faulty = Faulty(database)
    ledger = Ledger(faulty)
    await ledger.start()
    faulty.mode = "hang"
    first = ledger.close(record("first", **DONE))
    while faulty.tried < 2:  # the settling was the first
        await asyncio.sleep(0)
    later = [ledger.close(record(f"r{number}", **DONE)) for number in range(50)]
    assert ledger.queued == 51
    faulty.mode = None
    faulty.free.set()
    await asyncio.gather(first, *later)
    assert ledger.commits == 2
    assert ledger.queued == 0
    assert ledger.lag_seconds == 0
    await ledger.stop()


async def test_a_second_close_is_an_error_that_changes_nothing(database: Database) -> None:
    ledger = Ledger(database, event=event_of)
    await ledger.start()
    first, second = ledger.close(record("a", **DONE)), ledger.close(record("a", **DONE | {"completion": 50}))
    await first
    with pytest.raises(AlreadyClosed):
        await second
    third = ledger.close(record("a", **DONE | {"completion": 500}))
    fine = ledger.close(record("b", **DONE))
    await fine
    with pytest.raises(AlreadyClosed):
        await third
    there = await rows(database)
    assert (there["a"].completion, there["b"].completion) == (5, 5)
    assert await told(database) == ["a", "b"]
    await ledger.stop()


async def test_nothing_changes_a_closed_record(database: Database) -> None:
    ledger = Ledger(database)
    await ledger.start()
    await ledger.close(record("a", **DONE))
    ledger.checkpoint("a", 0, 99)
    ledger.open(record("a", prompt=7))
    await ledger.stop()
    row = (await rows(database))["a"]
    assert (row.status, row.prompt, row.completion) == ("stop", 100, 5)


async def test_who_goes_away_is_on_the_bill(database: Database) -> None:
    ledger = Ledger(database)
    await ledger.start()

    async def request() -> None:
        await ledger.close(record("a", **DONE))

    task = asyncio.create_task(request())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    await ledger.stop()
    assert (await rows(database))["a"].status == "stop"


@pytest.mark.parametrize("mode", ["before", "after"])
async def test_a_failing_commit_is_tried_again(database: Database, quick: None, mode: str) -> None:
    """`after` is the connection that breaks once the commit is done: the second attempt finds its own rows."""
    faulty = Faulty(database)
    ledger = Ledger(faulty, event=event_of)
    await ledger.start()
    faulty.mode = mode
    ledger.open(record("open", prompt=3))
    waiting = [ledger.close(record(name, **DONE)) for name in ("a", "b")]
    while ledger.failures < 3:
        await asyncio.sleep(0.001)
    assert not any(future.done() for future in waiting)
    faulty.mode = None
    await asyncio.gather(*waiting)
    assert sorted(await rows(database)) == ["a", "b", "open"]
    assert await told(database) == ["a", "b"]
    await ledger.stop()


async def test_a_true_double_is_found_after_a_failure_too(database: Database, quick: None) -> None:
    faulty = Faulty(database)
    ledger = Ledger(faulty)
    await ledger.start()
    await ledger.close(record("a", **DONE))
    faulty.mode = "before"
    double = ledger.close(record("a", **DONE | {"completion": 6}))
    while not ledger.failures:
        await asyncio.sleep(0.001)
    faulty.mode = None
    with pytest.raises(AlreadyClosed):
        await double
    assert (await rows(database))["a"].completion == 5
    await ledger.stop()


@pytest.mark.parametrize("mode", ["before", "hang"])
async def test_patience_ends_the_request_and_not_the_record(database: Database, quick: None, mode: str) -> None:
    faulty = Faulty(database)
    ledger = Ledger(faulty, patience=0.05)
    await ledger.start()
    ledger.check()
    faulty.mode = mode
    with pytest.raises(LedgerUnavailable) as caught:
        await ledger.close(record("a", **DONE))
    assert (caught.value.status, caught.value.code) == (503, "ledger_unavailable")
    while ledger.healthy:
        await asyncio.sleep(0.005)
    assert ledger.lag_seconds > 0.05
    with pytest.raises(LedgerUnavailable):
        ledger.check()
    faulty.mode = None
    faulty.free.set()
    while ledger.queued:
        await asyncio.sleep(0.005)
    ledger.check()
    assert (await rows(database))["a"].status == "stop"
    await ledger.stop()


async def test_a_stop_does_not_wait_for_ever(database: Database, quick: None) -> None:
    faulty = Faulty(database)
    ledger = Ledger(faulty)
    await ledger.start()
    faulty.mode = "before"
    ledger.open(record("a"))
    waiting = ledger.close(record("b", **DONE))
    await ledger.stop(seconds=0.05)
    with pytest.raises(LedgerUnavailable):
        await waiting
    assert not ledger.healthy
    assert await rows(database) == {}


async def test_before_the_start_and_after_the_stop_nothing_is_admitted(database: Database) -> None:
    ledger = Ledger(database)
    with pytest.raises(LedgerUnavailable):
        ledger.check()
    await ledger.start()
    ledger.check()
    await ledger.stop()
    with pytest.raises(LedgerUnavailable):
        ledger.check()


async def test_what_a_crash_left_open_is_settled_by_its_last_checkpoint(database: Database) -> None:
    before = Ledger(database)
    await before.start()
    for name in ("ran", "waited", "prefilling"):
        before.open(record(name, prompt=1000))
    while before.queued:
        await asyncio.sleep(0.01)
    before.checkpoint("ran", 100, 50)
    before.checkpoint("prefilling", 100, 0)
    await before.close(record("done", **DONE))
    await before.stop()

    after = Ledger(database, event=event_of)
    assert await after.start() == 3
    there = await rows(database)
    counts = {name: (row.status, row.prompt, row.cached, row.completion) for name, row in there.items()}
    assert counts == {
        "ran": ("aborted", 1000, 100, 50),
        "waited": ("aborted", 0, 0, 0),
        "prefilling": ("aborted", 0, 0, 0),
        "done": ("stop", 100, 10, 5),
    }
    assert (there["ran"].cost_prompt, there["ran"].cost_cached, there["ran"].cost_completion) == (90, 1, 20)
    assert sorted(await told(database)) == ["prefilling", "ran", "waited"]
    with pytest.raises(AlreadyClosed):
        await after.close(record("ran", **DONE))
    await after.stop()
    assert await Ledger(database).start() == 0


async def test_an_event_that_cannot_be_made_does_not_stop_the_bill(database: Database) -> None:
    def broken(_: object) -> dict[str, object]:
        raise KeyError("no such field")

    ledger = Ledger(database, event=broken)
    await ledger.start()
    await ledger.close(record("a", **DONE))
    assert list(await rows(database)) == ["a"]
    assert await told(database) == []
    await ledger.stop()


@pytest.mark.parametrize(
    "wrong",
    [
        {"request_id": ""},
        {"tenant": "t" * 65},
        {"adapter": "a\0b"},
        {"prompt": 1, "cached": 2},
        {"completion": -1},
        {"completion": 2**33},
        {"rank": 2**31},
        {"rates": Rates(10**19, 0, 0)},
    ],
)
def test_a_record_that_no_database_would_take_is_not_made(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must be|impossible"):
        replace(record("a"), **wrong)  # type: ignore[arg-type]
