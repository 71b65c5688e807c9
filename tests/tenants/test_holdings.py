"""What adapters occupied: exact over time, and nothing twice."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, select

from server.errors import TenantNotFound
from server.tenants.database import Database
from server.tenants.holdings import DAY, GB, Held, Holdings, cost, price_of
from server.tenants.prices import DEFAULT_BOOK, PriceBook
from server.tenants.tables import holdings
from tests.tenants.records import Broken, Faulty

pytestmark = pytest.mark.anyio
MIDNIGHT = 20_000 * DAY
MAIL = Held("acme", "mail", "storage", 1000)
LANE = Held("acme", "mail", "merged", 5000)


def _book(_: str) -> PriceBook:
    return DEFAULT_BOOK


async def _lines(database: Database) -> dict[tuple[str, str, int], Any]:
    async with database.read() as connection:
        found = (await connection.execute(select(holdings))).all()
    return {(row.adapter, row.kind, row.day): row for row in found}


async def test_each_day_and_kind_has_its_line(database: Database) -> None:
    held = Holdings(database, _book)
    await held.sample(MIDNIGHT - 100, [MAIL])
    await held.sample(MIDNIGHT - 40, [MAIL, LANE])
    await held.sample(MIDNIGHT + 2 * DAY + 5, [])
    await held.sample(MIDNIGHT + 3 * DAY, [])
    counted = {key: row.byte_seconds for key, row in (await _lines(database)).items()}
    assert counted == {
        ("mail", "storage", 19_999): 100 * 1000,
        ("mail", "storage", 20_000): DAY * 1000,
        ("mail", "storage", 20_001): DAY * 1000,
        ("mail", "storage", 20_002): 5 * 1000,
        ("mail", "merged", 19_999): 40 * 5000,
        ("mail", "merged", 20_000): DAY * 5000,
        ("mail", "merged", 20_001): DAY * 5000,
        ("mail", "merged", 20_002): 5 * 5000,
    }


def test_a_gigabyte_costs_what_the_book_says() -> None:
    assert cost("storage", GB * DAY, price_of(DEFAULT_BOOK, "storage")) == DEFAULT_BOOK.adapter_gb_day
    assert cost("merged", GB * 3600, price_of(DEFAULT_BOOK, "merged")) == DEFAULT_BOOK.merged_gb_hour


async def test_many_samples_are_rounded_as_one(database: Database) -> None:
    """Each of these seconds alone would round to nothing."""
    held = Holdings(database, _book)
    small = Held("acme", "mail", "storage", 400_000)
    for second in range(31):
        await held.sample(MIDNIGHT + second * DAY // 30 - (second == 30), [small])
    row = (await _lines(database))["mail", "storage", 20_000]
    assert row.byte_seconds == 400_000 * (DAY - 1)
    assert row.cost == 2  # 0.0004 GB at 5,000 micro-dollars a GB-day


async def test_a_restart_counts_nothing_twice_and_no_time_without_a_server(database: Database) -> None:
    first = Holdings(database, _book)
    await first.sample(MIDNIGHT, [MAIL])
    await first.sample(MIDNIGHT + 10, [MAIL])
    second = Holdings(database, _book)
    await second.sample(MIDNIGHT + 5, [MAIL])  # a clock that was set back
    await second.sample(MIDNIGHT + 12, [MAIL])
    third = Holdings(database, _book)
    await third.sample(MIDNIGHT + 100, [MAIL])
    await third.sample(MIDNIGHT + 101, [MAIL])
    assert (await _lines(database))["mail", "storage", 20_000].byte_seconds == 13 * 1000


@pytest.mark.parametrize("mode", ["before", "after"])
async def test_a_sample_that_fails_is_made_good(database: Database, mode: str) -> None:
    faulty = Faulty(database)
    held = Holdings(faulty, _book)
    await held.sample(MIDNIGHT, [MAIL])
    faulty.mode = mode
    with pytest.raises(Broken):
        await held.sample(MIDNIGHT + 10, [MAIL])
    faulty.mode = None
    await held.sample(MIDNIGHT + 20, [])
    await held.sample(MIDNIGHT + 30, [])
    assert (await _lines(database))["mail", "storage", 20_000].byte_seconds == 20 * 1000


async def test_what_did_not_change_is_left_for_a_later_sample(database: Database) -> None:
    held = Holdings(database, _book)
    await held.sample(MIDNIGHT, [MAIL, LANE])
    await held.sample(MIDNIGHT + 10, [MAIL], only_changed=True)
    assert {kind for _, kind, _ in await _lines(database)} == {"merged"}
    await held.sample(MIDNIGHT + 30, [replace(MAIL, bytes=2000)], only_changed=True)
    await held.sample(MIDNIGHT + 40, [])
    counted = {kind: row.byte_seconds for (_, kind, _), row in (await _lines(database)).items()}
    assert counted == {"merged": 10 * 5000, "storage": 30 * 1000 + 10 * 2000}


async def test_many_are_written_in_parts(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that was written before another one failed is not written twice."""
    monkeypatch.setattr("server.tenants.holdings.PART", 3)
    many = [Held(f"t{at % 2}", f"a{at}", "storage", 1 + at) for at in range(10)]
    faulty = Faulty(database)
    held = Holdings(faulty, _book)
    await held.sample(MIDNIGHT, many)
    writes: list[int] = []

    def thrice(connection: Any, pieces: list[Any]) -> Any:
        writes.append(len(pieces))
        if len(writes) == 3:
            raise Broken
        return add(connection, pieces)

    add = held._add
    monkeypatch.setattr(held, "_add", thrice)
    with pytest.raises(Broken):
        await held.sample(MIDNIGHT + 10, many)
    assert len(await _lines(database)) == 6
    await held.sample(MIDNIGHT + 20, [])
    assert writes == [3, 3, 3, 3, 3, 3, 1]
    found = {(row.tenant, row.adapter): row.byte_seconds for row in (await _lines(database)).values()}
    assert found == {(one.tenant, one.adapter): 20 * one.bytes for one in many}


async def test_a_new_price_holds_from_the_next_day_on(database: Database) -> None:
    book = DEFAULT_BOOK
    held = Holdings(database, lambda _: book)
    await held.sample(MIDNIGHT, [MAIL])
    await held.sample(MIDNIGHT + 10, [MAIL])
    book = replace(DEFAULT_BOOK, version=2, adapter_gb_day=7)
    await held.sample(MIDNIGHT + DAY + 10, [])
    lines = await _lines(database)
    assert [(row.price_version, row.price) for row in lines.values()] == [(1, DEFAULT_BOOK.adapter_gb_day), (2, 7)]


async def test_a_tenant_that_is_gone_stops_nobody_elses_bill(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """A line that was begun goes on at its price; another day's is left out, once."""
    gone: set[str] = set()

    def book_of(tenant: str) -> PriceBook:
        if tenant in gone:
            raise TenantNotFound("there is no tenant of that name")
        return DEFAULT_BOOK

    held, other = Holdings(database, book_of), Held("nobody", "lost", "storage", 1000)
    await held.sample(MIDNIGHT, [MAIL, other])
    await held.sample(MIDNIGHT + 10, [MAIL, other])
    gone.add("nobody")
    await held.sample(MIDNIGHT + DAY + 5, [MAIL])
    assert caplog.text.count("tenant nobody held as lost is on no bill") == 1
    await held.sample(MIDNIGHT + DAY + 9, [MAIL])
    assert caplog.text.count("is on no bill") == 1
    counted = {(adapter, day): row.byte_seconds for (adapter, _, day), row in (await _lines(database)).items()}
    assert counted == {("mail", 20_000): DAY * 1000, ("mail", 20_001): 9 * 1000, ("lost", 20_000): DAY * 1000}
    alone = Holdings(database, book_of)
    await alone.sample(MIDNIGHT + 2 * DAY, [other])
    await alone.sample(MIDNIGHT + 2 * DAY + 5, [])
    assert len(await _lines(database)) == len(counted)


STEP = st.tuples(st.integers(0, DAY), st.dictionaries(st.sampled_from(["a", "b"]), st.integers(0, 10**9)))


@given(steps=st.lists(STEP, max_size=6))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_it_is_the_integral(database: Database, steps: list[tuple[int, dict[str, int]]]) -> None:
    async with database.write() as connection:
        await connection.execute(delete(holdings))
    held = Holdings(database, _book)
    now, sizes, expected = MIDNIGHT, {}, Counter[str]()
    for wait, after in [*steps, (0, {})]:
        for name, size in sizes.items():
            expected[name] += size * wait
        now, sizes = now + wait, after
        await held.sample(now, [Held("acme", name, "storage", size) for name, size in sizes.items()])
    found = Counter[str]()
    for (name, _, _), row in (await _lines(database)).items():
        found[name] += row.byte_seconds
        assert row.cost == cost("storage", row.byte_seconds, row.price)
    assert +found == +expected
