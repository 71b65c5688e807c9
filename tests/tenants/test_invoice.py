"""The bill: its lines are the records, to the micro-dollar."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete

from server.errors import InvalidRequest
from server.tenants import usage
from server.tenants.database import Database
from server.tenants.holdings import DAY, GB, Held, Holdings, cost
from server.tenants.invoice import bounds, invoice
from server.tenants.prices import DEFAULT_BOOK, Rates
from server.tenants.tables import holdings
from tests.tenants.records import record, write

pytestmark = pytest.mark.anyio
MONTH = "2026-11"
BEGIN, END = bounds(MONTH)
RECORD = st.fixed_dictionaries(
    {
        "adapter": st.sampled_from([None, "mail", "sql"]),
        "rates": st.builds(Rates, *(st.integers(0, 10**10) for _ in range(3))),
        "fresh": st.integers(0, 5000),
        "cached": st.integers(0, 5000),
        "completion": st.integers(0, 5000),
        "created_ms": st.integers(BEGIN - 10, END + 10) | st.sampled_from([BEGIN - 1, BEGIN, END - 1, END]),
        "status": st.sampled_from(["stop", "length", "aborted", "open"]),
    }
)
HELD = st.lists(st.integers(0, 10**10), min_size=1, max_size=4)


@given(drawn=st.lists(RECORD, max_size=12), sizes=HELD)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_the_lines_are_the_records(database: Database, drawn: list[dict[str, Any]], sizes: list[int]) -> None:
    records = []
    for number, values in enumerate(drawn):
        prompt = values.pop("fresh") + values["cached"]
        records.append(record(f"r{number}", prompt=prompt, **values))
    await write(database, *records, record("theirs", tenant="rival", status="stop", completion=9), afresh=True)
    kept = await _keep(database, sizes)

    bill = await invoice(database, "acme", MONTH)
    mine = [one for one in records if BEGIN <= one.created_ms < END]
    ended = [one for one in mine if one.status != "open"]
    assert (bill.requests, bill.running) == (len(ended), len(mine) - len(ended))
    assert bill.total_microusd == sum(one.charge.total for one in ended) + kept
    page = await usage.page(database, "acme", from_ms=BEGIN, to_ms=END)
    assert sum(row["cost_microusd"] for row in page.data) + kept == bill.total_microusd
    for line in bill.lines:
        if line.unit == "tokens":
            charges = [getattr(one.charge, line.kind) for one in ended if one.adapter == line.adapter]
            assert line.amount_microusd == sum(charges)
    assert len({(line.adapter, line.kind) for line in bill.lines}) == len(bill.lines)
    told = json.loads(json.dumps(bill.as_dict()))
    assert sum(line["amount_microusd"] for line in told["lines"]) == told["total_microusd"] == bill.total_microusd
    table = list(csv.DictReader(io.StringIO(bill.as_csv())))
    assert sum(int(row["amount_microusd"]) for row in table) == bill.total_microusd
    assert [row["adapter"] or None for row in table] == [line.adapter for line in bill.lines]


async def _keep(database: Database, sizes: list[int]) -> int:
    """An hour of each size in turn, a day apart; what that must cost."""
    async with database.write() as connection:
        await connection.execute(delete(holdings))
    held = Holdings(database, lambda _: DEFAULT_BOOK)
    for place, size in enumerate(sizes):
        begin = BEGIN // 1000 + place * DAY
        await held.sample(begin, [Held("acme", "mail", "storage", size)])
        await held.sample(begin + 3600, [])
    return sum(cost("storage", size * 3600, DEFAULT_BOOK.adapter_gb_day) for size in sizes)


async def test_a_bill_by_example(database: Database) -> None:
    book = replace(DEFAULT_BOOK, prompt=1_000_000, cached=100_000, completion=2_000_000, adapter_gb_day=864_000)
    done = {"status": "stop", "created_ms": BEGIN, "rates": book.rates(0)}
    await write(
        database,
        record("base", adapter=None, prompt=10, completion=3, **done),
        record("mail", prompt=30, cached=20, completion=1, **done),
    )
    held = Holdings(database, lambda _: book)
    await held.sample(BEGIN // 1000, [Held("acme", "mail", "storage", GB)])
    await held.sample(BEGIN // 1000 + 10, [])
    bill = await invoice(database, "acme", MONTH)
    assert bill.as_csv().split() == [
        "tenant,month,adapter,kind,quantity,unit,amount_microusd,amount_usd",
        "acme,2026-11,,prompt,10,tokens,10,0.000010",
        "acme,2026-11,,completion,3,tokens,6,0.000006",
        "acme,2026-11,mail,prompt,10,tokens,10,0.000010",
        "acme,2026-11,mail,cached,20,tokens,2,0.000002",
        "acme,2026-11,mail,completion,1,tokens,2,0.000002",
        "acme,2026-11,mail,storage,10000000000,byte_seconds,100,0.000100",
    ]
    assert bill.as_dict()["total"] == "0.000130"


async def test_a_month_without_use_is_an_empty_bill(database: Database) -> None:
    bill = await invoice(database, "acme", "9999-12")
    assert (bill.lines, bill.total_microusd, bill.requests) == ((), 0, 0)


@pytest.mark.parametrize("wrong", ["2026-13", "2026-00", "2026-1", "1969-12", "2026-11-01", "٢٠٢٦-11", ""])
async def test_what_is_no_month_is_refused(wrong: str) -> None:
    with pytest.raises(InvalidRequest):
        bounds(wrong)


def test_months_follow_each_other() -> None:
    assert bounds("2026-11")[1] == bounds("2026-12")[0]
    assert bounds("2026-12")[1] == bounds("2027-01")[0]
    assert bounds("9999-12")[1] - bounds("9999-12")[0] == 31 * DAY * 1000
