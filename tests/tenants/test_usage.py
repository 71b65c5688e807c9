"""Usage by request, adapter and day: paged without gaps, of one tenant only."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.errors import InvalidRequest
from server.tenants import usage
from server.tenants.database import Database
from server.tenants.usage import DAY_MS, MAX_LIMIT, GroupBy
from tests.tenants.records import CREATED, RATES, record, write

pytestmark = pytest.mark.anyio
DONE = {"status": "stop", "prompt": 100, "cached": 10, "completion": 5}
COST = RATES.charge(100, 10, 5).total
FIRST = CREATED // DAY_MS * DAY_MS


async def _all(database: Database, limit: int, **more: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    after = None
    while True:
        page = await usage.page(database, "acme", limit=limit, after=after, **more)
        found += page.data
        assert page.next is None or len(page.data) == limit
        if page.next is None:
            return found
        after = page.next


async def _some(database: Database) -> None:
    """Three days of the base and two adapters; another tenant's, and one that still runs."""
    names = [None, "mail", "sql"]
    records = [
        record(f"r{day}{place}", adapter=name, created_ms=FIRST + day * DAY_MS + place // 2, **DONE)
        for day in range(3)
        for place, name in enumerate(names)
    ]
    await write(database, *records, record("other", tenant="rival", **DONE), record("running", prompt=7))


async def test_a_request_as_the_contract_has_it(database: Database) -> None:
    await write(database, record("gen-1", **DONE))
    page = await usage.page(database, "acme")
    assert page.next is None
    assert page.data == [
        {
            "request_id": "gen-1",
            "adapter": "mail",
            "digest": "sha256:0",
            "status": "stop",
            "prompt_tokens": 100,
            "cached_tokens": 10,
            "completion_tokens": 5,
            "cost_microusd": COST,
            "created": CREATED // 1000,
        }
    ]


@pytest.mark.parametrize("limit", [1, 2, 4, 9, 100])
@pytest.mark.parametrize(("group_by", "rows"), [("request", 9), ("adapter", 3), ("day", 3)])
async def test_pages_have_everything_once(database: Database, group_by: GroupBy, rows: int, limit: int) -> None:
    await _some(database)
    found = await _all(database, limit, group_by=group_by)
    assert len(found) == rows
    assert sum(row["cost_microusd"] for row in found) == 9 * COST
    assert sum(row["completion_tokens"] for row in found) == 45
    key = {"request": "request_id", "adapter": "adapter", "day": "created"}[group_by]
    assert len({row[key] for row in found}) == rows
    if group_by == "adapter":
        assert [row["adapter"] for row in found] == [None, "mail", "sql"]
        assert all(type(value) is int for row in found for name, value in row.items() if name != "adapter")
    if group_by == "day":
        assert [row["created"] for row in found] == [(FIRST + day * DAY_MS) // 1000 for day in range(3)]
        assert {row["requests"] for row in found} == {3}


async def test_bounds_are_half_open(database: Database) -> None:
    await _some(database)
    found = await _all(database, 100, from_ms=FIRST + DAY_MS, to_ms=FIRST + 2 * DAY_MS)
    assert [row["request_id"] for row in found] == ["r10", "r11", "r12"]
    assert await usage.spent(database, "acme", FIRST + DAY_MS) == 6 * COST
    assert await usage.spent(database, "nobody", 0) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"limit": 0},
        {"limit": MAX_LIMIT + 1},
        {"after": "x"},
        {"after": "1" * 30 + ":a"},
        {"after": "x", "group_by": "day"},
        {"after": "mail", "group_by": "adapter"},
    ],
)
async def test_what_no_page_gave_out_is_refused(database: Database, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await usage.page(database, "acme", **wrong)
    assert caught.value.param in wrong


@given(times=st.lists(st.integers(0, 3), max_size=12), limit=st.integers(1, 5))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_requests_of_the_same_moment_are_not_lost_between_pages(
    database: Database, times: list[int], limit: int
) -> None:
    records = [record(f"r{place}", created_ms=CREATED + moment, **DONE) for place, moment in enumerate(times)]
    await write(database, *records, afresh=True)
    found = await _all(database, limit)
    assert sorted(row["request_id"] for row in found) == sorted(one.request_id for one in records)
