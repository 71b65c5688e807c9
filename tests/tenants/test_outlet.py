"""Where events go, as the settings say it: to a sink, or nowhere, and then nothing is kept for them."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from sqlalchemy import func, select

from server.tenants.accounts import Accounts, Outlet
from server.tenants.database import Database
from server.tenants.sinks import CloudEventsSink, LagoSink, OpenMeterSink, StripeSink, make_sink
from server.tenants.tables import outbox
from tests.tenants.receivers import receiving

pytestmark = pytest.mark.anyio
KINDS = {"cloudevents": CloudEventsSink, "stripe": StripeSink, "lago": LagoSink, "openmeter": OpenMeterSink}


async def _use(accounts: Accounts, request_id: str) -> None:
    """A request that made five tokens."""
    entry = accounts.admit(accounts.anybody(), request_id, 10, 5, None, batch=False)
    entry.runs(lambda: (0, 5))
    await entry.close("finished", "base", 10, 0, 5)


async def _rows(database: Database) -> int:
    async with database.read() as connection:
        return await connection.scalar(select(func.count()).select_from(outbox)) or 0


async def test_without_an_outlet_nothing_is_kept(database: Database) -> None:
    accounts, _ = await Accounts.open(database)
    await _use(accounts, "gen-1")
    assert accounts.deliverer is None
    assert await _rows(database) == 0
    await accounts.close()


@pytest.mark.parametrize("kind", sorted(KINDS))
async def test_events_go_out_with_the_token_and_the_tenants_own_name(database: Database, kind: str) -> None:
    async with receiving() as receiver:
        outlet = Outlet(f"{receiver.url}/{kind}", kind, "a-secret", "here")
        assert "a-secret" not in repr(outlet)
        accounts, _ = await Accounts.open(database, outlet)
        await accounts.directory.update("default", customer="cus_42")
        await _use(accounts, "gen-1")
        async with asyncio.timeout(20):
            while not receiver.got:
                await asyncio.sleep(0.02)
        await accounts.close()
    ((headers, body),) = receiver.calls
    assert receiver.got == {"gen-1": 1}
    assert headers["Authorization"] == "Bearer a-secret"
    assert ("cus_42" in body) == (kind != "cloudevents")
    assert ('"source":"here"' in body) == (kind in ("cloudevents", "openmeter"))


async def test_an_outlet_that_cannot_be_is_said_at_once(database: Database) -> None:
    for wrong in (Outlet("ftp://somewhere"), replace(Outlet("http://somewhere"), kind="fax")):
        with pytest.raises(ValueError, match="sink"):
            await Accounts.open(database, wrong)


@pytest.mark.parametrize(("kind", "made"), KINDS.items())
async def test_kinds(kind: str, made: type) -> None:
    assert type(make_sink(kind, "https://example.org/events", "", str)) is made
