"""A server with two tenants, and two programs of it that are measured by turns."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loadtest.lanes import Bench, Stream
from loadtest.peers.onebase import serve
from loadtest.peers.peer import Process
from server.tenants.database import open_database
from server.tenants.directory import Directory
from server.tenants.keys import Scope

ROWS, TURNS = 16, 3  # streams, and requests of each in a turn


@dataclass(frozen=True)
class Running:
    """A server and the keys of its tenants, by their ids."""

    process: Process
    url: str
    keys: dict[str, str]


@dataclass(frozen=True)
class Pair:
    """Tokens a second of two programs, by their names, and each pair's turns at the same place of its list."""

    turns: dict[str, list[float]]

    def rates(self) -> dict[str, float]:
        """The median of each."""
        return {name: statistics.median(found) for name, found in self.turns.items()}

    def ratios(self) -> list[float]:
        """The first program's over the second's, pair by pair."""
        first, second = self.turns.values()
        return [one / other for one, other in zip(first, second, strict=True)]


@contextlib.contextmanager
def serving(dtype: str, *, auth: str = "on", program: str = "server.cli") -> Iterator[Running]:
    """A server with two tenants, `a` and `b`."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/tenants.db"
        keys = asyncio.run(_tenants(url))
        settings = {"dtype": dtype, "device": "cpu", "auth": auth, "database_url": url}
        process, address = serve(Path(folder) / "server", program, **settings)
        try:
            yield Running(process, address, keys)
        finally:
            process.stop()


async def _tenants(url: str) -> dict[str, str]:
    database = await open_database(url)
    try:
        directory, _ = await Directory.open(database)
        keys = {}
        for tenant in ("a", "b"):
            await directory.create(tenant)
            _, keys[tenant] = await directory.create_key(tenant, [Scope.GENERATE])
        return keys
    finally:
        await database.close()


def by_turns(dtype: str, programs: dict[str, str], rounds: int) -> Pair:
    """Tenant `b`'s 16 streams on two programs (modules, by the names that they go by here). Only one of the servers is
    awake at a time, and which of them goes first changes."""
    turns: dict[str, list[float]] = {name: [] for name in programs}
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(serving(dtype, program=program)) for name, program in programs.items()}
        for at in range(rounds + 1):
            for name in sorted(servers, reverse=bool(at % 2)):
                server, other = servers[name], next(one for key, one in servers.items() if key != name)
                other.process.pause()
                rate = Bench(server.url, [], key=server.keys["b"]).rate([Stream(requests=TURNS)] * ROWS)
                other.process.resume()
                if at:  # the first warms up
                    turns[name].append(rate)
    return Pair(turns)
