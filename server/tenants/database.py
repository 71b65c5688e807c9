"""The database: SQLite or PostgreSQL behind one face, with its schema brought up to date when it is opened."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Table, event, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_SECONDS = 10  # for another writer on SQLite, for a connection to PostgreSQL
COMMAND_SECONDS = 60  # after which a statement on PostgreSQL has failed
CONNECTIONS = 8
READERS = CONNECTIONS - 2  # at once: however many read, who writes the bill down finds a connection
_WRITES = "onebase_writes"
_MIGRATION_LOCK = 0x6F6E6562  # an arbitrary number that only this program locks


class DatabaseUnusable(RuntimeError):
    """The database cannot be used: an unknown kind, or a schema from a later version of onebase."""


class Holding(Protocol):
    """What says whether the database is this process's."""

    held: bool


class Database:
    """An open database. Use `read()` for consistent reading and `write()` for a transaction."""

    def __init__(self, engine: AsyncEngine, claim: Holding | None = None):
        self.engine = engine
        self.dialect = engine.dialect.name
        self._claim = claim
        self._readers = asyncio.Semaphore(READERS)

    @property
    def owned(self) -> bool:
        """Whether this process holds its claim on the database; True where it was opened without one."""
        return self._claim is None or self._claim.held

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A connection whose reads see one state; nothing that it changes is kept. Waits while READERS others read."""
        async with self._readers, self.engine.connect() as connection:
            if self.dialect == "postgresql":  # SQLite's transactions are like that anyway
                await connection.execution_options(isolation_level="REPEATABLE READ")
            yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A transaction: committed, and durable, once the block is left without an exception; else rolled back."""
        async with self.engine.connect() as connection:
            await connection.execution_options(**{_WRITES: True})
            async with connection.begin():
                yield connection

    def insert(self, table: Table) -> Any:
        """An INSERT that has `on_conflict_do_nothing` and `on_conflict_do_update`, which both databases spell alike."""
        return sqlite.insert(table) if self.dialect == "sqlite" else postgresql.insert(table)

    async def close(self) -> None:
        """Close every connection."""
        await self.engine.dispose()


async def open_database(url: str, claim: Holding | None = None) -> Database:
    """Connect to `sqlite:///file` or `postgresql://…` and migrate to the newest schema. `claim`: see `claimed`.

    Raises `DatabaseUnusable` where this version cannot work with what is there, and SQLAlchemy's or the driver's error
    where there is no way in.
    """
    address = async_url(make_url(url))
    database = Database(_engine(address), claim)
    try:
        if database.dialect == "sqlite":
            _make_private(file_of(address))
        async with database.write() as connection:
            if database.dialect == "postgresql":  # SQLite's write transaction is a lock already
                await connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
            await connection.run_sync(_migrate)
    except BaseException:
        await database.close()
        raise
    return database


def async_url(url: URL) -> URL:
    """The URL with the driver that is used for its kind. Raises `DatabaseUnusable` for a kind that is not."""
    match url.get_backend_name():
        case "sqlite":
            return url.set(drivername="sqlite+aiosqlite")
        case "postgresql" | "postgres":
            return url.set(drivername="postgresql+asyncpg")
        case other:
            raise DatabaseUnusable(f"the database must be sqlite or postgresql, not {other}")


def file_of(url: URL) -> Path | None:
    """Where an SQLite database is; None for one in memory."""
    name = (url.database or "").removeprefix("file:").partition("?")[0]
    return Path(name) if name and name != ":memory:" else None


def _make_private(path: Path | None) -> None:
    """An SQLite database that is not there yet, for this user alone: its log and shared memory take its mode over."""
    if path is not None:
        with suppress(OSError):  # it is there, or SQLite will say what is the matter
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _engine(url: URL) -> AsyncEngine:
    if url.get_backend_name() == "postgresql":
        bounds = {"timeout": BUSY_SECONDS, "command_timeout": COMMAND_SECONDS}
        return create_async_engine(
            url, pool_size=CONNECTIONS, pool_pre_ping=True, connect_args=bounds, hide_parameters=True
        )
    engine = create_async_engine(url, pool_size=CONNECTIONS, hide_parameters=True)  # errors are logged, salts are not
    event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver begins no transaction by itself: `_begin_sqlite` does
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout = {BUSY_SECONDS * 1000}",
        "journal_mode = WAL",
        "synchronous = FULL",  # a commit is on the disk when it returns
        "foreign_keys = ON",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    """A writer takes its lock at once: one that reads first and writes later may find that it cannot have it."""
    writes = connection.get_execution_options().get(_WRITES)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _migrate(connection: Connection) -> None:
    """Run what is missing of the revisions, in the transaction that `connection` is in."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))  # it is interpolated
    config.attributes["connection"] = connection  # for env.py
    known = {revision.revision for revision in ScriptDirectory.from_config(config).walk_revisions()}
    later = set(MigrationContext.configure(connection).get_current_heads()) - known
    if later:
        raise DatabaseUnusable(
            f"the database has schema {', '.join(sorted(later))}, which this version of onebase does not know: "
            "it is from a later one"
        )
    command.upgrade(config, "head")
