"""What one tenant does with slow uploads and slow lanes leaves another's calls as they are."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import threading
from collections.abc import Iterator

import httpx
import pytest

from server.api.changes import AT_ONCE, OF_ONE
from server.tenants.keys import Scope
from server.tenants.tenant import Limits
from tests.families import adapter_bytes
from tests.serving import Gate, Server, refused, until

TENANTS = ("ann", "bob", "cyd", "dan", "eve")


@pytest.fixture(scope="module")
def served(base, tmp_path_factory) -> Iterator[tuple[Server, dict[str, httpx.Client]]]:
    """A server with AUTH on, and a client of each tenant."""
    with Server(base, tmp_path_factory.mktemp("data"), auth="on") as server, contextlib.ExitStack() as open_:
        directory, loop = server.state.accounts.directory, server.state.client.loop

        async def client(tenant: str) -> httpx.Client:
            await directory.create(tenant, limits=Limits(rpm_limit=100))
            _, token = await directory.create_key(tenant, [Scope.GENERATE, Scope.ADAPTERS_WRITE])
            return httpx.Client(base_url=server.url, timeout=60, headers={"Authorization": f"Bearer {token}"})

        made = {one: asyncio.run_coroutine_threadsafe(client(one), loop).result(20) for one in TENANTS}
        yield server, {tenant: open_.enter_context(client) for tenant, client in made.items()}


def put(client: httpx.Client, name: str, folder) -> httpx.Response:
    config, weights = adapter_bytes(folder)
    return client.put(f"/adapters/{name}", files={"config": config, "weights": weights})


def test_uploads_that_never_end_leave_room_for_another_tenants(served, adapters):
    server, clients = served
    address, uploads = httpx.URL(server.url), server.state.uploads
    head = (
        "PUT /adapters/slow HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n"
        f"authorization: {clients['ann'].headers['authorization']}\r\n"
        "content-type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    )
    with contextlib.ExitStack() as open_:
        for _ in range(uploads.most // 2):
            connection = open_.enter_context(socket.create_connection((address.host, address.port), timeout=10))
            connection.sendall(head.encode())
        until(lambda: uploads.taken == uploads.most // 2)
        answer = put(clients["ann"], "more", adapters[0])
        assert refused(answer, 429)["code"] == "uploads_limit"
        assert answer.headers["x-ratelimit-limit-requests"] == "100", "as every 429 of a tenant with such a limit"
        assert answer.headers["x-ratelimit-remaining-requests"] == "100", "and an upload is no request for tokens"
        page = httpx.get(f"{server.url}/metrics").text
        assert 'onebase_limit_refusals_total{code="uploads_limit"} 1.0' in page
        assert dict(server.state.traffic.shown().tenants)["ann"].refused == {"uploads_limit": 1}
        assert put(clients["bob"], "b", adapters[0]).status_code == 201
    until(lambda: uploads.taken == 0)
    assert put(clients["ann"], "more", adapters[0]).status_code == 201


def test_copies_that_take_long_hold_up_nobody_else(served, adapters, monkeypatch):
    """However many calls the tenant makes meanwhile, of whatever kind."""
    server, clients = served
    ann, bob = clients["ann"], clients["bob"]
    put(ann, "laned", adapters[0])
    assert ann.patch("/adapters/laned", json={"lane": "merged"}).status_code == 200
    gate = Gate(server.runner.merge)
    monkeypatch.setattr(server.runner, "merge", gate)
    threads = [threading.Thread(target=put, args=(ann, "laned", adapters[1]))]
    threads += [threading.Thread(target=put, args=(ann, "laned", adapters[2])) for _ in range(5)]
    threads += [threading.Thread(target=ann.delete, args=("/adapters/laned",)) for _ in range(60)]
    try:
        threads[0].start()
        until(lambda: gate.entered)
        for thread in threads[1:]:
            thread.start()
        until(lambda: server.state.changes._names._users["ann", "laned"] >= 60)
        for name in ("laned", "more"):
            assert put(bob, name, adapters[0]).status_code == 201
            assert put(bob, name, adapters[1]).status_code == 200
            assert bob.post(f"/adapters/{name}/rollback", json={"version": 1}).status_code == 200
            assert bob.delete(f"/adapters/{name}").status_code == 204
        assert all(thread.is_alive() for thread in threads)
    finally:
        gate.open()
        for thread in threads:
            thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    ann.delete("/adapters/laned")
    server.idle()
    assert not server.state.changes._names._users


def test_several_tenants_that_merge_all_they_have_hold_up_nobody(served, adapters, monkeypatch):
    """As many as have all places for changes between them, had merging one."""
    server, clients = served
    bob, names = clients["bob"], [f"m{number}" for number in range(OF_ONE)]
    crowd = [client for tenant, client in clients.items() if tenant != "bob"]
    assert len(crowd) * OF_ONE >= AT_ONCE
    for client, name in itertools.product(crowd, names):
        assert put(client, name, adapters[0]).status_code == 201
    gate, answers = Gate(server.runner.merge), list[int]()
    monkeypatch.setattr(server.runner, "merge", gate)

    def merge(client: httpx.Client, name: str) -> None:
        answers.append(client.patch(f"/adapters/{name}", json={"lane": "merged"}).status_code)

    threads = [threading.Thread(target=merge, args=one) for one in itertools.product(crowd, names)]
    try:
        for thread in threads:
            thread.start()
        until(lambda: gate.entered and len(server.state.changes._names._users) == len(threads))
        assert put(bob, "quick", adapters[0]).status_code == 201
        assert put(bob, "quick", adapters[1]).status_code == 200
        assert bob.post("/adapters/quick/rollback", json={"version": 1}).status_code == 200
        assert bob.patch("/adapters/quick", json={"public": True}).json()["public"] is True
        assert bob.delete("/adapters/quick").status_code == 204
        assert not answers
    finally:
        gate.open()
        for thread in threads:
            thread.join(60)
    assert answers == [200] * len(threads)
    for client, name in itertools.product(crowd, names):
        assert client.delete(f"/adapters/{name}").status_code == 204
    until(lambda: server.engine._merged.nbytes == 0)
