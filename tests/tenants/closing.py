"""A process that closes records as fast as it can and prints the id of each that was acknowledged, until it is killed.

`python -m tests.tenants.closing URL PREFIX`
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys

from server.tenants.database import open_database
from server.tenants.ledger import Ledger
from tests.tenants.records import event_of, record

AT_ONCE = 16


async def serve(url: str, prefix: str) -> None:
    """`AT_ONCE` requests at a time; some of them never end."""
    ledger = Ledger(await open_database(url), event=event_of)
    await ledger.start()
    numbers = itertools.count()

    async def request() -> None:
        while True:
            name = f"{prefix}-{next(numbers)}"
            ledger.open(record(name, prompt=100))
            for made in range(1, 4):
                await asyncio.sleep(0)
                ledger.checkpoint(name, 10, made)
            if name.endswith("7"):
                continue
            await ledger.close(record(name, status="stop", prompt=100, cached=10, completion=5))
            os.write(1, f"{name}\n".encode())

    await asyncio.gather(*(request() for _ in range(AT_ONCE)))


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
