"""Changes of tenants while the database fails, and while the server stops: all or nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from server.tenants.accounts import Accounts
from server.tenants.database import Database
from server.tenants.tenant import Limits
from tests.tenants.records import Broken, Faulty

pytestmark = pytest.mark.anyio
BUDGET = {"limits": Limits(max_budget=10**6)}


class Unreadable(Faulty):
    """While `deaf`, nothing can be read either."""

    deaf = False

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        if self.deaf:
            raise Broken
        async with super().read() as connection:
            yield connection


async def _use(accounts: Accounts, request_id: str) -> int:
    """What a request costs that made 1,000 tokens."""
    entry = accounts.admit(accounts.anybody(), request_id, 10, 1000, None, batch=False)
    entry.runs(lambda: (0, 1000))
    await entry.close("finished", "base", 10, 0, 1000)
    return entry.rates.charge(10, 0, 1000).total


@pytest.mark.parametrize("fails", ["read", "write"])
async def test_a_budget_that_cannot_be_loaded_is_not_in_force(database: Database, fails: str) -> None:
    faulty = Unreadable(database)
    accounts, _ = await Accounts.open(faulty)
    cost = await _use(accounts, "gen-1")
    assert cost
    faulty.deaf, faulty.mode = (True, None) if fails == "read" else (False, "before")
    with pytest.raises(Broken):
        await accounts.update("default", lambda _: BUDGET)
    faulty.deaf, faulty.mode = False, None
    assert accounts.directory.show("default").limits == Limits()
    await accounts.directory.reload()
    assert accounts.directory.show("default").limits == Limits(), "nor in the database"
    new = await accounts.update("default", lambda _: BUDGET)
    assert accounts.admission.budget_left(new) == 10**6 - cost
    await accounts.close()


async def test_a_change_that_was_begun_is_finished_before_the_accounts_are_closed(database: Database) -> None:
    faulty = Faulty(database)
    accounts, _ = await Accounts.open(faulty)
    faulty.mode, before = "hang", faulty.tried
    asker = asyncio.create_task(accounts.directory.create("acme"))
    while faulty.tried == before:
        await asyncio.sleep(0)
    asker.cancel()
    await asyncio.wait({asker})
    faulty.mode = None
    asyncio.get_running_loop().call_soon(faulty.free.set)
    await accounts.close()
    assert accounts.directory.show("acme").id == "acme"
    await accounts.directory.reload()
    assert accounts.directory.show("acme").id == "acme"
