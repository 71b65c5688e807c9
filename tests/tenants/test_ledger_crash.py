"""kill -9 at random moments: what was acknowledged is on the bill once, and what was open is settled."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from server.tenants.database import open_database
from server.tenants.ledger import Ledger
from tests.tenants.records import event_of, rows, told

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 5
pytestmark = pytest.mark.anyio


def _until_killed(url: str, prefix: str, seconds: float) -> list[str]:
    """The ids that a process acknowledged before it was killed, some time after its first."""
    command = [sys.executable, "-m", "tests.tenants.closing", url, prefix]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        said = [process.stdout.readline()]
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGKILL)
        rest = process.stdout.read()
    finally:
        process.kill()
        process.wait()
    whole, _, _ = (said[0] + rest).rpartition(b"\n")
    return whole.decode().split()


async def test_every_acknowledged_record_is_there_once(database_url: str) -> None:
    url = database_url
    acknowledged: list[str] = []
    for number in range(ROUNDS):
        found = _until_killed(url, f"p{number}", random.uniform(0.0, 0.3))
        assert found, "nothing was acknowledged"
        acknowledged += found
    assert len(set(acknowledged)) == len(acknowledged)

    database = await open_database(url)
    ledger = Ledger(database, event=event_of)
    await ledger.start()
    await ledger.stop()
    there = await rows(database)
    assert set(acknowledged) <= there.keys()
    for name in acknowledged:
        assert (there[name].status, there[name].completion) == ("stop", 5)
    assert {row.status for row in there.values()} <= {"stop", "aborted"}
    for row in there.values():
        if row.status == "aborted":
            assert row.completion <= 3
            assert row.prompt == (100 if row.completion else 0)
    assert Counter(await told(database)) == Counter(there.keys()), "one event for each record"
    await database.close()
