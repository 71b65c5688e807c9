"""Opening, migrating and refusing databases, on both kinds."""

from __future__ import annotations

import asyncio

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, insert, select, text
from sqlalchemy.exc import IntegrityError

from server.tenants.database import CONNECTIONS, READERS, Database, DatabaseUnusable, open_database
from server.tenants.tables import keys, metadata, prices

pytestmark = pytest.mark.anyio
BOOK = {"version": 1, "created_ms": 0, "book": {"a": [1, None]}}


async def test_the_migrated_schema_is_the_tables(database: Database) -> None:
    def differences(connection: Connection) -> list[object]:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        return compare_metadata(context, metadata)

    async with database.read() as connection:
        assert await connection.run_sync(differences) == []


async def test_the_open_index_is_partial(database: Database) -> None:
    """Which the comparison does not look at."""
    where = "sqlite_master WHERE name" if database.dialect == "sqlite" else "pg_indexes WHERE indexname"
    column = "sql" if database.dialect == "sqlite" else "indexdef"
    async with database.read() as connection:
        made = await connection.scalar(text(f"SELECT {column} FROM {where} = 'ix_usage_open'"))
    assert made is not None
    assert "'open'" in made.partition("WHERE")[2]


async def test_opening_again_keeps_what_is_there(database_url: str) -> None:
    first = await open_database(database_url)
    async with first.write() as connection:
        await connection.execute(insert(prices).values(BOOK))
    await first.close()
    second = await open_database(database_url)
    async with second.read() as connection:
        assert dict((await connection.execute(select(prices))).one()._mapping) == BOOK
    await second.close()


async def test_two_at_once_migrate_once(database_url: str) -> None:
    both = await asyncio.gather(open_database(database_url), open_database(database_url))
    async with both[0].read() as connection:
        assert (await connection.execute(text("SELECT version_num FROM alembic_version"))).scalars().all() == ["0002"]
    for opened in both:
        await opened.close()


async def test_a_later_schema_is_refused(database_url: str) -> None:
    opened = await open_database(database_url)
    async with opened.write() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    await opened.close()
    with pytest.raises(DatabaseUnusable, match="9999"):
        await open_database(database_url)


async def test_another_kind_is_refused() -> None:
    with pytest.raises(DatabaseUnusable, match="mysql"):
        await open_database("mysql://localhost/x")


async def test_a_failing_transaction_leaves_nothing(database: Database) -> None:
    async def twice() -> None:
        async with database.write() as connection:
            await connection.execute(insert(prices).values(BOOK))
            await connection.execute(insert(prices).values(BOOK))

    with pytest.raises(IntegrityError):
        await twice()
    async with database.read() as connection:
        assert (await connection.execute(select(prices))).all() == []


async def test_a_key_needs_its_tenant(database: Database) -> None:
    async def add() -> None:
        row = {"id": "k", "tenant": "nobody", "secret_sha256": b"", "scopes": [], "created_ms": 0}
        async with database.write() as connection:
            await connection.execute(insert(keys).values(row))

    with pytest.raises(IntegrityError):
        await add()


async def test_writers_wait_for_each_other(database: Database) -> None:
    """Each reads and then writes what it read: none is refused, and no change is lost."""
    async with database.write() as connection:
        await connection.execute(insert(prices).values(BOOK))

    async def once() -> None:
        async with database.write() as connection:
            row = prices.c.version == 1
            seen = await connection.scalar(select(prices.c.created_ms).where(row).with_for_update())
            await connection.execute(prices.update().where(row).values(created_ms=seen + 1))

    await asyncio.gather(*(once() for _ in range(20)))
    async with database.read() as connection:
        assert await connection.scalar(select(prices.c.created_ms)) == 20


async def test_however_many_read_a_writer_finds_a_connection(database: Database) -> None:
    go, reading = asyncio.Event(), 0

    async def read() -> None:
        nonlocal reading
        async with database.read() as connection:
            await connection.scalar(select(prices.c.version))
            reading += 1
            await go.wait()

    readers = [asyncio.create_task(read()) for _ in range(4 * CONNECTIONS)]
    while reading < READERS:
        await asyncio.sleep(0.01)
    async with asyncio.timeout(5), database.write() as connection:
        await connection.execute(insert(prices).values(BOOK))
    assert reading == READERS
    go.set()
    await asyncio.gather(*readers)
    assert reading == 4 * CONNECTIONS


async def test_sqlite_is_durable_and_checks(tmp_path: object) -> None:
    opened = await open_database(f"sqlite:///{tmp_path}/x.db")
    async with opened.read() as connection:
        values = [await connection.scalar(text(f"PRAGMA {name}")) for name in ("journal_mode", "synchronous")]
        assert values == ["wal", 2]
        assert await connection.scalar(text("PRAGMA foreign_keys")) == 1
    await opened.close()
