"""Clients that do not read: what they leave unread counts against the queue's bounds, and comes back once."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import Any

import pytest

from tests.serving import Server, refused, until

pytestmark = pytest.mark.usefixtures("idle")
PROMPT, TOKENS = [5, 6, 7], 6
WORST = len(PROMPT) + TOKENS
END = {"type": "http.response.body", "body": b"", "more_body": False}


class Reader:
    """A client in process, on the server's event loop, that takes `takes` messages and no more until `read_on`."""

    def __init__(self, server: Server, takes: int, **body: Any):
        self.taken: list[dict[str, Any]] = []
        self.blocked = self.broken = self.ended = False
        self._takes, self._asked = takes, False
        self._body = json.dumps({"prompt": PROMPT, "max_tokens": TOKENS, "ignore_eos": True, **body}).encode()
        self._client, self.held_after = server.state.client, -1
        self._loop, self._on, self._gone = self._client.loop, asyncio.Event(), asyncio.Event()
        scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1"}
        scope |= {"method": "POST", "path": "/v1/generate", "query_string": b""}
        scope |= {"headers": [(b"content-type", b"application/json")]}
        asyncio.run_coroutine_threadsafe(self._serve(server.app, scope), self._loop)

    async def _serve(self, app: Any, scope: dict[str, Any]) -> None:
        self._task = asyncio.current_task()
        try:
            await app(scope, self._receive, self._send)
        finally:
            self.ended = True

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if len(self.taken) >= self._takes:
            self.blocked = True
            await self._on.wait()
            if self.broken:
                raise OSError("broken pipe")
        self.taken.append(message)
        if message == END:
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        self.held_after = self._client.open_tokens

    def read_on(self) -> None:
        self._loop.call_soon_threadsafe(self._on.set)

    def go(self) -> None:
        self._loop.call_soon_threadsafe(self._gone.set)

    def be_broken(self) -> None:
        self.broken = True
        self.read_on()

    def be_cancelled(self) -> None:
        """What uvicorn does at the end of a shutdown."""
        self._loop.call_soon_threadsafe(self._task.cancel)

    def wait_unread(self, server: Server) -> Reader:
        """Until its request has ended and its answer waits for it."""
        until(lambda: self.blocked and server.state.client.open_requests == 0)
        return self

    def wait_served(self) -> None:
        until(lambda: self.ended)

    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.taken).decode()


ENDS = [Reader.read_on, Reader.go, Reader.be_broken, Reader.be_cancelled]
# Nothing taken; the headers; and before the last message.
PLACES = [(True, 0), (True, 1), (True, 3), (True, TOKENS + 2), (False, 0), (False, 1), (False, 2)]


def full(server: Server) -> bool:
    """Whether the queue takes no more."""
    response = server.http.post("/v1/generate", json={"prompt": PROMPT, "max_tokens": TOKENS})
    if response.status_code == 200:
        return False
    assert refused(response, 503)["code"] == "queue_full"
    return True


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
@pytest.mark.parametrize(("stream", "takes"), PLACES)
def test_an_unread_answer_counts_until_its_reader_ends(server, monkeypatch, stream, takes, end):
    monkeypatch.setattr(server.state.client.bounds, "max_requests", 1)
    reader = Reader(server, takes, stream=stream).wait_unread(server)
    assert full(server)
    assert server.state.client.open_tokens == WORST
    end(reader)
    reader.wait_served()
    assert server.state.client.open_tokens == 0
    assert not full(server)
    if end is Reader.read_on:
        assert reader.taken[-1] == END
        assert reader.text().endswith("data: [DONE]\n\n" if stream else "}")


def test_unread_answers_count_against_the_bound_of_tokens(server, monkeypatch):
    monkeypatch.setattr(server.state.client.bounds, "max_amount", 2 * WORST)
    readers = [Reader(server, 1, stream=True).wait_unread(server) for _ in range(2)]
    assert full(server)
    refusal = Reader(server, 9, stream=True)
    refusal.wait_served()
    assert refusal.taken[0]["status"] == 503
    assert server.state.client.open_tokens == 2 * WORST
    readers[0].read_on()
    readers[0].wait_served()
    assert not full(server)
    readers[1].read_on()


def test_a_share_comes_back_once_however_often_its_reader_ends(server, monkeypatch):
    monkeypatch.setattr(server.state.client.bounds, "max_requests", 1)
    kept = Reader(server, 1, stream=True).wait_unread(server)
    monkeypatch.setattr(server.state.client.bounds, "max_requests", 2)
    other = Reader(server, 2, stream=True).wait_unread(server)
    for end in (Reader.read_on, Reader.go, Reader.be_cancelled):
        end(other)
    other.wait_served()
    assert server.state.client.open_tokens == WORST
    monkeypatch.setattr(server.state.client.bounds, "max_requests", 1)
    assert full(server)
    kept.go()


@pytest.mark.parametrize("stream", [True, False])
def test_a_reader_that_goes_first_counts_until_the_request_has_ended(server, gate, monkeypatch, stream):
    monkeypatch.setattr(server.state.client.bounds, "max_requests", 1)
    reader = Reader(server, 0, stream=stream)
    until(lambda: gate.entered == 1)
    reader.be_cancelled()
    time.sleep(0.05)
    assert full(server)
    assert server.state.client.open_requests == 1
    gate.open()
    until(lambda: server.state.client.open_tokens == 0)
    assert not full(server)


@pytest.mark.parametrize("stream", [True, False])
def test_whoever_has_its_answer_finds_the_share_free(server, stream):
    """At once, for its next request can be there in the loop's next round."""
    reader = Reader(server, 100, stream=stream)
    reader.wait_served()
    assert reader.taken[-1] == END
    assert reader.held_after == 0


def unread(server: Server, stream: bool) -> socket.socket:
    """A connection whose client has asked for a long answer and reads none of it; the request itself has ended."""
    server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # accepted sockets get it too
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(server._socket.getsockname())
    settings = {"max_tokens": 60, "n": 5, "ignore_eos": True, "logprobs": 20, "stream": stream}
    body = json.dumps({"prompt": PROMPT, **settings}).encode()
    head = f"POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    connection.sendall(f"{head}\r\n\r\n".encode() + body)
    client, worst = server.state.client, 5 * (len(PROMPT) + 60)
    until(lambda: client.open_tokens == worst)
    until(lambda: client.open_requests == 0)
    time.sleep(0.2)  # for what the connection buffers
    assert client.open_tokens == worst
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_connection_that_is_closed_unread_gives_its_share_back(server, stream):
    connection = unread(server, stream)
    connection.close()
    until(lambda: server.state.client.open_tokens == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_drain_does_not_wait_for_a_client_that_never_reads(base, tmp_path, stream):
    with Server(base, tmp_path / "data", drain_seconds=600) as server, unread(server, stream):
        server.terminate()
        until(lambda: not server._thread.is_alive())
        assert server.state.client.open_tokens == 0
