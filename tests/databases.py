"""The databases that tests run on: an SQLite file, and PostgreSQL from Debian's packages, started once a session."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.tenants.database import Database, open_database

SETTINGS = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "listen_addresses=''", "max_connections=60")
SUPERUSER = "onebase"


class Postgres:
    """A PostgreSQL of its own in a throw-away directory, on a unix socket there. It refuses to run as root, so then it
    runs as an unprivileged user."""

    def __init__(self, binaries: Path):
        self._binaries = binaries
        self._user = _unprivileged() if os.geteuid() == 0 else None
        self.directory = Path(tempfile.mkdtemp(prefix="onebase-pg-"))
        if self._user:
            shutil.chown(self.directory, self._user)
        self._data = self.directory / "data"

    def start(self) -> None:
        """Returns once it accepts connections."""
        self._run("initdb", "--no-sync", "--auth=trust", f"--username={SUPERUSER}", "--encoding=UTF8", "-D", self._data)
        options = " ".join(f"-c {setting}" for setting in (*SETTINGS, f"unix_socket_directories={self.directory}"))
        self._run("pg_ctl", "start", "-w", "-D", self._data, "-l", self.directory / "log", "-o", options)

    def stop(self) -> None:
        """Stops it at once and removes everything."""
        self._run("pg_ctl", "stop", "-m", "immediate", "-D", self._data)
        shutil.rmtree(self.directory, ignore_errors=True)

    def create(self) -> str:
        """The name of a new, empty database."""
        name = f"t{uuid.uuid4().hex}"
        self._sql(f"CREATE DATABASE {name}")
        return name

    def drop(self, name: str) -> None:
        """Removes a database, whoever is still connected."""
        self._sql(f"DROP DATABASE {name} WITH (FORCE)")

    def url(self, name: str) -> str:
        """Where a database is, as the server's setting wants it."""
        return f"postgresql://{SUPERUSER}@/{name}?host={self.directory}"

    def _sql(self, statement: str) -> None:
        self._run("psql", "-h", self.directory, "-U", SUPERUSER, "-d", "postgres", "-qc", statement)

    def _run(self, program: str, *arguments: str | Path) -> None:
        who: dict[str, Any] = {}
        if self._user:
            who = {"user": self._user, "group": pwd.getpwnam(self._user).pw_gid, "extra_groups": []}
        command = [self._binaries / program, *arguments]
        with tempfile.TemporaryFile() as said:  # a file: the server would keep a pipe open
            done = subprocess.run(command, cwd="/", stdout=said, stderr=said, timeout=60, **who)
            said.seek(0)
            assert done.returncode == 0, f"{program}: {said.read().decode(errors='replace')}"


def _unprivileged() -> str:
    there = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in there else "nobody"


def _binaries() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """Debian's PostgreSQL, once a session. CI must have it; elsewhere its tests are skipped without it."""
    binaries = _binaries()
    if binaries is None:
        missing = "no PostgreSQL under /usr/lib/postgresql (Debian: apt-get install postgresql)"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    server = Postgres(binaries)
    server.start()
    try:
        yield server
    finally:
        server.stop()


_servers: dict[Path, str] = {}  # the databases of servers by their data directories, with --database postgresql
_cluster: list[Postgres] = []


def of_server(data_dir: Path) -> dict[str, str]:
    """The setting that gives the server of this data directory its database: always the same one, and nobody else's.
    None with SQLite, which is in the data directory."""
    if not _cluster:
        return {}
    if data_dir not in _servers:
        _servers[data_dir] = _cluster[0].url(_cluster[0].create())
    return {"database_url": _servers[data_dir]}


def in_environment(data_dir: Path) -> dict[str, str]:
    """`of_server` as variables of a process."""
    return {f"ONEBASE_{name.upper()}": value for name, value in of_server(data_dir).items()}


@pytest.fixture(scope="session", autouse=True)
def servers_databases(request: pytest.FixtureRequest) -> Iterator[None]:
    """Servers of this session use what `--database` says."""
    if request.config.getoption("database") == "postgresql":
        _cluster.append(request.getfixturevalue("postgres"))
    yield
    _cluster.clear()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'onebase.db'}"
        return
    server: Postgres = request.getfixturevalue("postgres")
    name = server.create()
    try:
        yield server.url(name)
    finally:
        server.drop(name)


@pytest.fixture
def anyio_backend() -> str:
    """Async tests (`pytest.mark.anyio`) run on asyncio, as the server does."""
    return "asyncio"


@pytest.fixture
async def database(database_url: str, anyio_backend: str) -> AsyncIterator[Database]:
    """An open, migrated database of each kind."""
    opened = await open_database(database_url)
    try:
        yield opened
    finally:
        await opened.close()
