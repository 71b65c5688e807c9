"""One server a database: the claim on it, which a server holds as long as it runs.

A server takes every open row that it finds at its start for a crashed one's, and answers keys, limits and budgets from
memory. Two on one database would settle each other's requests and overdraw each other's budgets.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

from sqlalchemy import make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from server.tenants.database import DatabaseUnusable, async_url, file_of

log = logging.getLogger("onebase.tenants")
WAIT_SECONDS = 3.0  # PostgreSQL needs a moment to see that a server was killed
LOOK_SECONDS = 1.0  # between looks whether the claim is still held, and between attempts to take it again
ANSWER_SECONDS = 10.0  # within which PostgreSQL must answer a look
_LOCK = 0x6F6E6563  # an arbitrary number that only this program locks; it is the database's own, not the cluster's
# After a server's machine is gone without a word, PostgreSQL ends its session within half a minute.
_KEEPALIVE = {"tcp_keepalives_idle": "10", "tcp_keepalives_interval": "5", "tcp_keepalives_count": "3"}


class Claim:
    """`held` says whether this process is the database's one server. What is lost and taken again is `held` once
    `regained` has been awaited, for another server may have changed the database meanwhile."""

    def __init__(self) -> None:
        self.held = True
        self.regained: Callable[[], Awaitable[None]] = _nothing


@contextlib.asynccontextmanager
async def claimed(url: str) -> AsyncIterator[Claim]:
    """Holds the database at `url` for this process: by a lock on a file beside SQLite's, by an advisory lock of a
    session of its own on PostgreSQL. To be taken before the database is opened, as that may change its schema.

    Raises `DatabaseUnusable` when another server has it, and when there is no way in.
    """
    try:
        parsed = make_url(url)
        address = async_url(parsed)
    except SQLAlchemyError as fault:
        raise DatabaseUnusable(f"DATABASE_URL cannot be read: {fault}") from None
    shown = parsed.set(query={}).render_as_string(hide_password=True)
    if address.get_backend_name() == "sqlite":
        with _locked(file_of(address), shown):
            yield Claim()
        return
    async with _Session(address, shown).holding() as claim:
        yield claim


async def _nothing() -> None:
    pass


def _in_use(shown: str) -> DatabaseUnusable:
    return DatabaseUnusable(
        f"another onebase server uses the database {shown}: each needs one of its own (ONEBASE_DATABASE_URL)"
    )


@contextlib.contextmanager
def _locked(database: Path | None, shown: str) -> Iterator[None]:
    """A lock on a file beside the database, for SQLite drops its own when anybody in the process closes that one."""
    if database is None:
        yield
        return
    path = database.resolve()
    try:
        descriptor = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as fault:
        raise DatabaseUnusable(f"the database {shown} cannot be used: {fault.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(shown) from None
        yield
    finally:
        os.close(descriptor)


class _Session:
    """A session on PostgreSQL that does nothing but hold the lock. It ends with the process, whatever ends that."""

    def __init__(self, url: URL, shown: str):
        bounds = {"timeout": ANSWER_SECONDS, "command_timeout": ANSWER_SECONDS, "server_settings": _KEEPALIVE}
        # Autocommit: what is idle within a transaction may be ended by a time limit of the database's.
        self._engine = create_async_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT", connect_args=bounds)
        self._connection: AsyncConnection | None = None
        self._claim = Claim()
        self._shown = shown

    @contextlib.asynccontextmanager
    async def holding(self) -> AsyncIterator[Claim]:
        """Takes the lock, watches it, and gives it back."""
        try:
            await self._first()
            watch = asyncio.create_task(self._watch(), name="claim")
            try:
                yield self._claim
            finally:
                watch.cancel()
                await asyncio.wait({watch})
        finally:
            await self._drop()

    async def _first(self) -> None:
        end = asyncio.get_running_loop().time() + WAIT_SECONDS
        try:
            while not await self._take():
                if asyncio.get_running_loop().time() > end:
                    raise _in_use(self._shown)
                await asyncio.sleep(0.1)
        except DatabaseUnusable:
            raise
        except Exception as fault:  # the driver's are of many kinds
            raise DatabaseUnusable(f"the database {self._shown} cannot be used: {fault}") from fault

    async def _take(self) -> bool:
        if self._connection is None:
            self._connection = await self._engine.connect()
        return bool(await self._connection.scalar(text(f"SELECT pg_try_advisory_lock({_LOCK})")))

    async def _drop(self) -> None:
        """Ends the session, whatever state it is in."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        with contextlib.suppress(Exception):
            await connection.execute(text(f"SELECT pg_advisory_unlock({_LOCK})"))  # at once; closing takes a moment
        with contextlib.suppress(Exception):
            await connection.close()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                if self._claim.held and self._connection is not None:
                    await self._connection.execute(text("SELECT 1"))
                elif await self._take():
                    await self._claim.regained()
                    self._claim.held = True
                    log.warning("the database %s is this server's again", self._shown)
            except Exception as fault:
                if self._claim.held:
                    log.error("the claim on the database %s is lost, nothing is admitted: %s", self._shown, fault)
                self._claim.held = False
                await self._drop()
