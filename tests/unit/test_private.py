"""What the server writes is for its own user, whatever the umask."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.datadir import own
from server.registry.store import Store
from server.tenants.database import open_database
from server.tenants.directory import Directory

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def generous() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_data_directory_is_the_servers_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tmp_path / "above" / "data"
    os.close(own(data))
    assert mode(data) == 0o700
    assert mode(data / ".lock") == 0o600
    os.close(own(data))
    assert not caplog.records


def test_one_that_is_open_to_others_is_warned_of_and_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tmp_path.chmod(0o750)
    with caplog.at_level(logging.WARNING):
        os.close(own(tmp_path))
    assert mode(tmp_path) == 0o750
    (record,) = caplog.records
    assert f"{tmp_path} is open to other users (mode 750)" in record.getMessage()


def test_the_adapters_are_the_servers_alone(tmp_path: Path) -> None:
    Store(tmp_path / "data" / "adapters")
    assert mode(tmp_path / "data") == mode(tmp_path / "data" / "adapters") == 0o700


async def test_a_new_sqlite_database_is_the_servers_alone(tmp_path: Path) -> None:
    """Wherever it is, and its log too."""
    database = await open_database(f"sqlite:///{tmp_path / 'onebase.db'}")
    await Directory.open(database)
    assert {path.name: mode(path) for path in tmp_path.iterdir()} == dict.fromkeys(
        ("onebase.db", "onebase.db-wal", "onebase.db-shm"), 0o600
    )
    await database.close()


async def test_an_sqlite_database_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "onebase.db"
    path.touch(mode=0o640)
    await (await open_database(f"sqlite:///{path}")).close()
    assert mode(path) == 0o640
