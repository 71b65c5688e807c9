"""What a start opens is closed again, in reverse, also when something after it fails to open."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from server import app
from server.api.state import State
from server.engine.engine import Engine
from server.settings import Settings
from server.tenants.accounts import Accounts
from server.tenants.claim import claimed
from server.tenants.database import Database
from server.tenants.ledger import Ledger
from server.tenants.outbox import Deliverer
from tests.databases import of_server
from tests.harness import fresh_base

pytestmark = pytest.mark.anyio


class NoDisk(OSError):
    """What fails."""


@pytest.fixture
def parts(base, tmp_path) -> tuple[State, Engine]:
    small: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_cache_tokens": 1024, "threads": 1} | of_server(
        tmp_path
    )
    settings = Settings(base=str(base), data_dir=tmp_path, events_url="http://127.0.0.1:1/", **small)
    return app.build(settings, fresh_base(base))


@pytest.fixture
def closed(monkeypatch) -> list[str]:
    """What was closed, in its order."""
    names: list[str] = []
    for kind, name in ((Database, "close"), (Ledger, "stop"), (Deliverer, "stop"), (Engine, "stop")):
        monkeypatch.setattr(kind, name, _noted(names, kind.__name__, getattr(kind, name)))
    return names


def _noted(names: list[str], name: str, function: Any) -> Any:
    def noted(*arguments: Any) -> Any:
        names.append(name)
        return function(*arguments)

    return noted


async def _nothing_is_left(before: set[Any], state: State, engine: Engine) -> None:
    assert asyncio.all_tasks() <= before
    assert not engine.alive
    async with claimed(state.settings.database):  # nobody else's
        pass


@pytest.mark.parametrize(
    ("fails", "name", "before"),
    [
        (app, "open_database", []),
        (Accounts, "_load", ["Ledger", "Deliverer", "Database"]),
        (Engine, "start", ["Ledger", "Deliverer", "Database"]),
        (app.Sampler, "__aenter__", ["Engine", "Ledger", "Deliverer", "Database"]),
    ],
)
async def test_a_start_that_fails_closes_what_it_opened(parts, closed, monkeypatch, fails, name, before) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise NoDisk

    monkeypatch.setattr(fails, name, fail)
    tasks = asyncio.all_tasks()
    with pytest.raises(NoDisk):
        async with app.running(*parts):
            pytest.fail("it runs")
    assert closed == before
    await _nothing_is_left(tasks, *parts)


async def test_a_server_that_ends_closes_everything(parts, closed) -> None:
    tasks = asyncio.all_tasks()
    async with app.running(*parts):
        assert not closed
    assert closed == ["Engine", "Ledger", "Deliverer", "Database"]
    await _nothing_is_left(tasks, *parts)
