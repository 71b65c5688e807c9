"""The server with a ledger that writes nothing down: what metering costs is the difference.

`python -m loadtest.unmetered serve --port N`, by `loadtest/tenants.py`; everything else is said by variables.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

from server.commands.client import settings_of
from server.run import serve
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


def main() -> int:
    """Serves until a signal; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("serve",))
    parser.add_argument("--port", type=int, required=True)
    return serve(settings_of({"port": parser.parse_args().port}), ledger=Unwritten)


if __name__ == "__main__":
    sys.exit(main())
