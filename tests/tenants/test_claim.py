"""One server a database: a second one is refused, and one that has lost its claim admits nothing without it."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text

from server.commands.recover import recover
from server.errors import LedgerUnavailable
from server.tenants import claim as claims
from server.tenants.accounts import Accounts
from server.tenants.claim import claimed
from server.tenants.database import Database, DatabaseUnusable, open_database
from server.tenants.directory import Directory

pytestmark = pytest.mark.anyio
HOLD = """
import asyncio, sys
from server.tenants.claim import claimed

async def hold():
    async with claimed(sys.argv[1]):
        print("held", flush=True)
        await asyncio.sleep(600)

asyncio.run(hold())
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "LOOK_SECONDS", 0.02)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "WAIT_SECONDS", 0.0)


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


async def _end_the_session(url: str) -> None:
    """What a restart of PostgreSQL does to whoever holds the claim."""
    database = await open_database(url)
    mine = "database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    holders = f"FROM pg_locks WHERE locktype = 'advisory' AND objid = :lock AND {mine}"
    async with database.write() as connection:
        done = await connection.execute(text(f"SELECT pg_terminate_backend(pid) {holders}"), {"lock": claims._LOCK})
        assert len(done.all()) == 1
    await database.close()


async def test_a_second_server_is_refused_and_told_which_database(database_url: str, at_once: None) -> None:
    async with claimed(database_url):
        with pytest.raises(DatabaseUnusable, match="another onebase server uses the database") as caught:
            async with claimed(database_url):
                pytest.fail("two servers on one database")
    assert database_url.partition("?")[0] in str(caught.value)
    async with claimed(database_url):
        pass


async def test_a_password_is_not_said(at_once: None) -> None:
    with pytest.raises(DatabaseUnusable) as caught:
        async with claimed("postgresql://someone:hunter2@127.0.0.1:1/x"):
            pass
    assert "someone" in str(caught.value)
    assert "hunter2" not in str(caught.value)


async def test_it_ends_with_a_process_that_is_killed(database_url: str) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, database_url], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert await asyncio.to_thread(holder.stdout.readline) == "held\n"
        holder.send_signal(signal.SIGKILL)
        await asyncio.to_thread(holder.wait)
        async with claimed(database_url):  # waits a moment, for PostgreSQL hears of it a little later
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


async def test_two_names_of_one_file_are_one_database(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "onebase.db")
    async with claimed(f"sqlite:///{tmp_path}/onebase.db"), claimed(f"sqlite:///{tmp_path}/other.db"):
        with pytest.raises(DatabaseUnusable):
            async with claimed(f"sqlite:///{tmp_path}/link"):
                pass


async def test_a_database_in_memory_needs_no_claim() -> None:
    async with claimed("sqlite://"), claimed("sqlite://"):
        pass


async def test_a_new_admin_key_needs_the_server_stopped(database_url: str, tmp_path: Path, at_once: None) -> None:
    """Whichever data directory the command is told."""
    (tmp_path / "elsewhere").mkdir()
    async with claimed(database_url):
        with pytest.raises(OSError, match="another onebase server uses the database"):
            await recover(tmp_path / "elsewhere", database_url)
    assert (await recover(tmp_path / "elsewhere", database_url)).startswith("ob_")


async def test_a_lost_claim_is_taken_again_after_everything_was_read_again(database_url: str) -> None:
    if database_url.startswith("sqlite"):
        pytest.skip("a lock on a file is never lost")
    async with claimed(database_url) as claim:
        database = await open_database(database_url, claim)
        accounts, _ = await Accounts.open(database)
        reading, gate = asyncio.Event(), asyncio.Event()

        async def regained() -> None:
            reading.set()
            await gate.wait()
            await accounts.reload()

        claim.regained = regained
        await _end_the_session(database_url)
        await reading.wait()
        assert not database.owned
        with pytest.raises(LedgerUnavailable):
            accounts.admit(accounts.anybody(), "gen-1", 1, 1, None, batch=False)
        await _another_tenant(database_url, "newcomer")
        gate.set()
        await _until(lambda: database.owned)
        assert accounts.directory.show("newcomer").id == "newcomer"
        accounts.admit(accounts.anybody(), "gen-1", 1, 1, None, batch=False).refuse()
        await accounts.close()
        await database.close()


async def test_a_claim_that_another_server_took_stays_lost(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if database_url.startswith("sqlite"):
        pytest.skip("a lock on a file is never lost")
    take, taken, refused = claims._Session._take, asyncio.Event(), asyncio.Event()

    async def later(self: claims._Session) -> bool:
        if self._claim is claim and not taken.is_set():
            return False
        got = await take(self)
        if self._claim is claim and not got:
            refused.set()
        return got

    async with claimed(database_url) as claim:
        monkeypatch.setattr(claims._Session, "_take", later)
        await _end_the_session(database_url)
        async with claimed(database_url):
            taken.set()
            await refused.wait()
            assert not claim.held
        await _until(lambda: claim.held)


async def _another_tenant(url: str, name: str) -> None:
    """Made by another server."""
    database: Database = await open_database(url)
    directory, _ = await Directory.open(database)
    await directory.create(name)
    await database.close()
