"""The `onebase` command with a ledger that writes nothing down: what metering costs is the difference.

`python -m loadtest.unmetered serve …`, by `loadtest/tenants.py`.
"""

from __future__ import annotations

import asyncio

from server import cli
from server.tenants import accounts
from server.tenants.ledger import Ledger
from server.tenants.record import Record


class Unwritten(Ledger):
    """Everything is durable at once, nowhere."""

    @property
    def healthy(self) -> bool:
        return True

    async def start(self) -> int:
        return 0

    def open(self, record: Record) -> None:
        pass

    def checkpoint(self, request_id: str, cached: int, completion: int) -> None:
        pass

    def close(self, record: Record) -> asyncio.Future[None]:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done


if __name__ == "__main__":
    accounts.Ledger = Unwritten  # type: ignore[attr-defined]
    cli.app()
