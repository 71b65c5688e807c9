"""The load test of tenants: its server without a ledger, its figures, and their table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from docs import measured
from loadtest import bars, lanes, tenants, unmetered
from loadtest.client import Trace
from loadtest.unmetered import Unwritten
from loadtest.workload import Request
from server.tenants.accounts import Accounts
from server.tenants.database import open_database
from tests.tenants.records import record, rows

RESULT = {
    "when": "2026-01-01",
    "commit": "abc1234",
    "command": "python -m loadtest.tenants --dtype bfloat16",
    "dtype": "bfloat16",
    "fair": {"4": {"tokens_per_s, beside / alone": 0.5, "ttft_p99, beside / alone": 1.5}},
    "auth": {"off_ms": 10.0, "on_ms": 10.5, "on - off, ms": 0.5},
    "metering": {"metered_tokens_per_s": 99.0, "unmetered_tokens_per_s": 100.0, "metered / unmetered": 0.99},
}


@pytest.mark.anyio
async def test_the_unmetered_ledger_is_ready_at_once_and_writes_nothing(tmp_path: Path) -> None:
    database = await open_database(f"sqlite:///{tmp_path / 'db'}")
    ledger = Unwritten(database)
    assert await ledger.start() == 0
    ledger.check()
    ledger.open(record("one"))
    ledger.checkpoint("one", 0, 1)
    await ledger.close(record("one", status="finished"))
    await ledger.stop()
    assert not await rows(database)
    await database.close()


@pytest.mark.anyio
async def test_the_servers_accounts_take_the_ledger_that_they_are_given(tmp_path: Path) -> None:
    database = await open_database(f"sqlite:///{tmp_path / 'db'}")
    accounts, _ = await Accounts.open(database, ledger=Unwritten)
    entry = accounts.admit(accounts.anybody(), "gen-1", 1, 1, None, batch=False)
    entry.runs(lambda: (0, 1))
    await entry.close("finished", "base", 1, 0, 1)
    await accounts.close()
    assert not await rows(database)
    await database.close()


def test_the_unmetered_server_is_the_server_with_that_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    monkeypatch.setattr(unmetered, "serve", lambda settings, *, ledger: served.append((settings, ledger)) or 0)
    monkeypatch.setattr("sys.argv", ["unmetered", "serve", "--port", "8123"])
    monkeypatch.setenv("ONEBASE_DTYPE", "bfloat16")
    assert unmetered.main() == 0
    ((settings, ledger),) = served
    assert (settings.port, settings.dtype, ledger) == (8123, "bfloat16", Unwritten)


def test_what_a_stream_got_becomes_figures() -> None:
    trace = Trace(Request(0, None, None, 8, 3, 1), sent=1.0, times=[1.5, 1.6, 1.7], tokens=3)
    one = tenants.Got.of([lanes._seen([trace], 0.0, 10.0)], 10.0)
    assert one == tenants.Got(0.3, [0.5])
    figures = tenants._figures([one, tenants.Got(0.5, [0.5, 0.5])])
    assert figures == {"tokens_per_s": 0.4, "ttft_p50_ms": 500.0, "ttft_p99_ms": 500.0, "requests": 3}


def test_the_results_are_held_to_their_aims_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tenants-bfloat16.json").write_text(json.dumps(RESULT))
    found = list(bars._tenants(RESULT))
    assert [bar.met for bar in found] == [True] * 4
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    table = measured.tenants_table()
    assert "| bfloat16 | 4 streams, alone and beside a flood | tokens_per_s, beside / alone | 0.5 |" in table
    assert "commit abc1234" in table


def test_a_shorter_run_says_so_in_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenants, "PARTS", {"auth": lambda dtype, effort: {"pairs": effort.pairs}, "fair": None})
    report = tenants.measure("float32", tenants.Effort(10.0, 7, 2), ["auth"])
    assert report["command"].endswith("--dtype float32 --window 10 --pairs 7 --rounds 2 --parts auth")
    assert report["auth"] == {"pairs": 7}
