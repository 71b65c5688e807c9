"""`POST /admin/events/revive` and its command: parked events are tried again."""

from __future__ import annotations

import asyncio
import json

import pytest
from sqlalchemy import insert, select, update
from typer.testing import CliRunner

from server import cli
from server.tenants.tables import outbox
from tests.serving import refused


@pytest.fixture(scope="module")
def options():
    return {"events_url": "http://127.0.0.1:1/"}  # where nobody listens


@pytest.fixture
def parked(server):
    """Parks events of these ids; gives back those that are parked."""

    async def park(names: list[str]) -> None:
        rows = [{"event_id": name, "payload": "{}", "created_ms": 1, "next_ms": 1, "parked_ms": 1} for name in names]
        async with server.state.accounts.database.write() as connection:
            await connection.execute(insert(outbox), rows)

    async def look() -> list[str]:
        async with server.state.accounts.database.read() as connection:
            found = await connection.execute(select(outbox.c.event_id).where(outbox.c.parked_ms.is_not(None)))
            return sorted(found.scalars())

    async def deliver() -> None:
        async with server.state.accounts.database.write() as connection:
            await connection.execute(update(outbox).values(parked_ms=None, delivered_ms=1))

    def on_its_loop(work):
        return asyncio.run_coroutine_threadsafe(work, server.state.client.loop).result(20)

    yield lambda *names: on_its_loop(park(list(names)) if names else look())
    on_its_loop(deliver())


def test_parked_events_are_tried_again(server, parked):
    parked("a", "b")
    assert parked() == ["a", "b"]
    response = server.http.post("/admin/events/revive")
    assert (response.status_code, response.json()) == (200, {"revived": 2})
    assert parked() == []
    assert server.http.post("/admin/events/revive").json() == {"revived": 0}


def test_the_command(server, parked):
    parked("c")
    result = CliRunner().invoke(cli.app, ["events", "revive", "--url", server.url, "--json"])
    assert (result.exit_code, json.loads(result.stdout)) == (0, {"revived": 1})


def test_a_server_without_events_says_so(server, monkeypatch):
    monkeypatch.setattr(server.state.accounts, "deliverer", None)
    assert refused(server.http.post("/admin/events/revive"), 409)["code"] == "no_events"
