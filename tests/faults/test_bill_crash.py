"""`kill -9` of a real server under load: what clients got is on the bill once, what they were getting within the bound.

The bound that the ledger states: of a request that runs, what was made since its last checkpoint, LINGER, and one
commit may be lost. How long commits took is told by the answers: one that was received is durable with all that was
queued before it, and so at the latest when its request was sent. So no clock of the server's is needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from sqlalchemy import select

from server.tenants.accounts import CHECKPOINT_SECONDS
from server.tenants.database import open_database
from server.tenants.directory import Directory
from server.tenants.keys import Scope
from server.tenants.ledger import Ledger
from server.tenants.tables import usage
from tests.databases import of_server
from tests.families import ATTENTION, save_adapter
from tests.serving import chat_base

KILLS = 20
LONGEST = 4.0  # seconds under load before a kill
SLOW = 0.5  # seconds that the server's loop may be late with a checkpoint
UNSENT = 8  # tokens that a client may have missed although they were counted before the kill
ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.anyio


@dataclass
class Asked:
    """One request as its client saw it: `seen` is when each token came, on the client's clock."""

    tenant: str
    adapter: str | None
    most: int
    sent: float
    id: str | None = None
    seen: list[float] = field(default_factory=list)
    usage: dict[str, int] | None = None  # once the answer has ended


@dataclass
class Round:
    """What was asked until one kill."""

    asked: list[Asked] = field(default_factory=list)

    @property
    def durable(self) -> float:
        """What was queued before this moment had been committed when the server was killed."""
        return max((one.sent for one in self.asked if one.usage), default=float("-inf"))


@contextlib.contextmanager
def forking(**settings: Any) -> Iterator[subprocess.Popen[str]]:
    """What makes servers."""
    words = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.forking", *words]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        yield process


@contextlib.asynccontextmanager
async def serving(forker: subprocess.Popen[str]) -> AsyncIterator[tuple[int, str]]:
    """The process id and address of a new server that is ready; it is killed when the block ends."""
    assert forker.stdin is not None
    assert forker.stdout is not None
    print(file=forker.stdin, flush=True)
    pid, port = map(int, (await asyncio.to_thread(forker.stdout.readline)).split())
    url = f"http://127.0.0.1:{port}"
    try:
        async with aiohttp.ClientSession() as http, asyncio.timeout(60):
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with http.get(f"{url}/readyz") as response:
                        if response.status == 200:
                            break
                await asyncio.sleep(0.02)
        yield pid, url
    finally:
        os.kill(pid, signal.SIGKILL)


async def ask(http: aiohttp.ClientSession, one: Asked, key: str, *, stream: bool) -> None:
    """Sends it and notes what comes, until the answer or the connection ends."""
    body = {"prompt": [random.randrange(4, 300) for _ in range(random.randrange(1, 60))], "max_tokens": one.most}
    body |= {"adapter": one.adapter, "ignore_eos": True, "stream": stream}
    async with http.post("/v1/generate", json=body, headers={"Authorization": f"Bearer {key}"}) as response:
        assert response.status == 200, await response.text()
        if not stream:
            answer = await response.json()
            one.id, one.usage = answer["id"], answer["usage"]
            return
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line.removeprefix(b"data: "))
            one.id = chunk["id"]
            one.seen += [time.monotonic()] * len(chunk["choices"][0]["token_ids"])
            one.usage = chunk.get("usage")


async def load(url: str, keys: dict[str, str], told: Round, longest: int) -> None:
    """One client: a request after the other, until the server is gone."""
    async with aiohttp.ClientSession(url) as http:
        while True:
            tenant = random.choice(sorted(keys))
            adapter = "mail" if tenant == "default" and random.random() < 0.5 else None
            one = Asked(tenant, adapter, random.randint(1, longest), time.monotonic())
            told.asked.append(one)
            try:
                await ask(http, one, keys[tenant], stream=random.random() < 0.8)
            except (aiohttp.ClientError, ConnectionError):
                return


async def until_killed(forker: subprocess.Popen[str], keys: dict[str, str]) -> Round:
    """A server's life: some clients with short requests and some with long ones, then the kill."""
    told = Round()
    async with serving(forker) as (pid, url), asyncio.TaskGroup() as clients:
        for longest in (6, 6, 6, 40, *[3000] * 8):
            clients.create_task(load(url, keys, told, longest))
        await asyncio.sleep(random.uniform(0.05, LONGEST))
        os.kill(pid, signal.SIGKILL)
    return told


async def bill(url: str) -> dict[str, Any]:
    """All records, after the next start has settled what was open."""
    database = await open_database(url)
    ledger = Ledger(database)
    await ledger.start()
    await ledger.stop()
    async with database.read() as connection:
        rows = (await connection.execute(select(usage))).all()
    await database.close()
    there = {row.request_id: row for row in rows}
    assert len(there) == len(rows)
    return there


async def prepare(url: str) -> dict[str, str]:
    """A key of each of two tenants."""
    database = await open_database(url)
    directory, first = await Directory.open(database)
    await directory.create("acme")
    _, key = await directory.create_key("acme", [Scope.GENERATE])
    await database.close()
    assert first is not None
    return {"default": first, "acme": key}


def check_ended(one: Asked, row: Any) -> None:
    assert one.usage is not None
    assert row is not None, "an answer that its client has got is not on the bill"
    assert (row.status, row.tenant, row.adapter) == ("finished", one.tenant, one.adapter)
    said = [one.usage[name] for name in ("prompt_tokens", "cached_tokens", "completion_tokens", "cost_microusd")]
    cost = row.cost_prompt + row.cost_cached + row.cost_completion
    assert [row.prompt, row.cached, row.completion, cost] == said


def check_open(one: Asked, row: Any, durable: float) -> int:
    """The tokens that it had to be charged for at the least."""
    least = sum(at <= durable - CHECKPOINT_SECONDS - SLOW for at in one.seen)
    if row is None:
        assert not least, "a request was never written down"
        return 0
    assert row.status in ("aborted", "finished")
    assert least <= row.completion <= one.most
    if row.status == "aborted":
        assert row.completion <= len(one.seen) + UNSENT
        assert bool(row.prompt) == bool(row.completion)
    assert row.cached <= row.prompt
    return least


async def test_the_bill_after_twenty_kills(tmp_path: Path) -> None:
    base = chat_base(tmp_path / "base", max_position_embeddings=4096)
    save_adapter(base, tmp_path / "adapters" / "mail", seed=1, r=4, lora_alpha=8, target_modules=ATTENTION)
    url = of_server(tmp_path).get("database_url", f"sqlite:///{tmp_path / 'onebase.db'}")
    keys = await prepare(url)
    settings = {"base": str(base), "data_dir": str(tmp_path / "data"), "database_url": url, "auth": "on"}
    settings |= {"dtype": "float32", "device": "cpu", "threads": 1, "kv_cache_tokens": 32768}
    with forking(**settings, preload=str(tmp_path / "adapters")) as forker:
        rounds = [await until_killed(forker, keys) for _ in range(KILLS)]
    there = await bill(url)

    bounds = 0
    known = set()
    for told in rounds:
        assert told.asked
        for one in told.asked:
            if one.id is not None:
                assert one.id not in known, "two answers of one id"
                known.add(one.id)
            if one.usage:
                check_ended(one, there.get(one.id))
            elif one.id:
                bounds += check_open(one, there.get(one.id), told.durable)
    unknown = [row for name, row in there.items() if name not in known]  # their clients saw nothing of them
    assert len(unknown) <= sum(one.id is None for told in rounds for one in told.asked)
    assert {row.status for row in unknown} <= {"aborted", "finished"}
    assert sum(bool(one.usage) for told in rounds for one in told.asked) > KILLS
    assert bounds, "no request ran for long enough to be held to the bound"
