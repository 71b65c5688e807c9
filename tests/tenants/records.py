"""Records to write, and a database that fails on demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from server.tenants.database import Database
from server.tenants.prices import Rates
from server.tenants.record import Record, row_of
from server.tenants.tables import OPEN, outbox, usage

RATES = Rates(prompt=100_000_000, cached=10_000_000, completion=400_000_000)
CREATED = 1_790_000_000_000


def record(name: str, **more: Any) -> Record:
    """A request of tenant `acme`, with what differs."""
    values: dict[str, Any] = {
        "request_id": name,
        "tenant": "acme",
        "key_id": "k1",
        "adapter": "mail",
        "version": 2,
        "digest": "sha256:0",
        "rank": 16,
        "lane": "shared",
        "price_version": 1,
        "rates": RATES,
        "created_ms": CREATED,
    }
    return Record(**(values | more))


def event_of(closed: Record) -> dict[str, Any]:
    """A small event."""
    return {"id": closed.request_id, "cost": closed.charge.total}


async def rows(database: Database) -> dict[str, Any]:
    """All usage rows by their ids."""
    async with database.read() as connection:
        return {row.request_id: row for row in (await connection.execute(select(usage))).all()}


async def told(database: Database) -> list[str]:
    """The outbox, oldest first."""
    async with database.read() as connection:
        return list((await connection.execute(select(outbox.c.event_id).order_by(outbox.c.id))).scalars().all())


class Broken(OSError):
    """The database is away."""


class Faulty(Database):
    """While `mode` says so, write transactions fail (`before` or `after` they are committed) or hang."""

    mode: str | None = None

    def __init__(self, inner: Database):
        super().__init__(inner.engine)
        self.free = asyncio.Event()
        self.tried = 0

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        self.tried += 1
        if self.mode == "hang":
            await self.free.wait()
        async with super().write() as connection:
            yield connection
            if self.mode == "before":
                raise Broken
        if self.mode == "after":
            raise Broken


async def write(database: Database, *records: Record, afresh: bool = False) -> None:
    """Put rows there as the ledger does, without one; `afresh`: and nothing else."""
    values = [row_of(one, None if one.status == OPEN else one.created_ms + 1) for one in records]
    async with database.write() as connection:
        if afresh:
            await connection.execute(delete(usage))
        if values:
            await connection.execute(insert(usage), values)
