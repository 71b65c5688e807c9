"""The client and the runner against a small server that speaks all three APIs, stalls and fails as told."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer as Served

from loadtest.client import Client, Trace
from loadtest.dialects import Dialect, Llama, Onebase, OpenAI, UnknownServer, connect, detect
from loadtest.runner import Run, run
from loadtest.workload import Request

NAMES = ["first", "second"]


def ask(count: int, *, adapter: int | None = 0, due: float | None = None, new: int = 3) -> list[Request]:
    return [Request(at, due and due * at, adapter, 4, new, 7) for at in range(count)]


class Fake:
    """Answers `/v1/generate`, `/v1/completions` and `/completion` with as many tokens as are asked for."""

    def __init__(self, *apis: str):
        self.bodies: list[dict[str, Any]] = []
        self.before: Callable[[int], Awaitable[None]] | None = None  # awaited with the request's number
        self.after: Callable[[web.StreamResponse], Awaitable[bool]] | None = None  # after a token; True: no more
        self.app = web.Application()
        for path, chunks in (
            ("/v1/generate", self._onebase),
            ("/v1/completions", self._openai),
            ("/completion", self._llama),
        ):
            self.app.router.add_post(path, self._handler(chunks))
        told = {
            "onebase": ("/adapters", {"data": [], "next": None}),
            "llama": ("/props", {"default_generation_settings": {}}),
            "openai": ("/v1/models", {"data": [{"id": "tiny"}, {"id": "first", "parent": "tiny"}]}),
            "loras": ("/lora-adapters", [{"id": 4, "path": "/x/second.gguf"}, {"id": 7, "path": "first.gguf"}]),
        }
        for api in apis:
            self.app.router.add_get(told[api][0], self._says(told[api][1]))

    @staticmethod
    def _says(body: Any) -> Any:
        async def answer(_: web.Request) -> web.Response:
            return web.json_response(body)

        return answer

    def _handler(self, chunks: Callable[[dict[str, Any]], list[Any]]) -> Any:
        async def answer(request: web.Request) -> web.StreamResponse:
            body = await request.json()
            self.bodies.append(body)
            if self.before is not None:
                await self.before(len(self.bodies) - 1)
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            for chunk in chunks(body):
                await response.write(f"data: {chunk if chunk == '[DONE]' else json.dumps(chunk)}\n\n".encode())
                if self.after is not None and await self.after(response):
                    return response
            return response

        return answer

    def _onebase(self, body: dict[str, Any]) -> list[Any]:
        def chunk(at: int) -> dict[str, Any]:
            last = at == body["max_tokens"] - 1
            choice = {"index": 0, "text": "a", "token_ids": [5], "finish_reason": "length" if last else None}
            usage = {"usage": {"completion_tokens": at + 1}} if last else {}
            return {"adapter": {"name": body["adapter"], "cold": True}, "choices": [choice]} | usage

        return [*map(chunk, range(body["max_tokens"])), "[DONE]"]

    def _openai(self, body: dict[str, Any]) -> list[Any]:
        made = [{"choices": [{"text": "a", "finish_reason": None}], "usage": None} for _ in range(body["max_tokens"])]
        made[-1]["choices"] = [{"text": "a", "finish_reason": "length"}]
        return [*made, {"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}, "[DONE]"]

    def _llama(self, body: dict[str, Any]) -> list[Any]:
        made = [{"content": "a", "tokens": [5], "stop": False} for _ in range(body["n_predict"])]
        return [*made, {"content": "", "tokens": [], "stop": True, "tokens_predicted": body["n_predict"]}]


def served(
    fake: Fake, requests: list[Request], dialect: Dialect | None = None, *, streams: int | None = 2, **limits: Any
) -> Run:
    """What a run against the fake gives."""

    async def inside() -> Run:
        async with Served(fake.app) as server:
            url = str(server.make_url(""))
            async with Client(url, dialect or Onebase(NAMES), limits.pop("timeout", 30)) as client:
                return await run(client, requests, streams=streams, **{"seconds": 30, "grace": 30, **limits})

    return asyncio.run(inside())


def only_error(fake: Fake, **more: Any) -> str | None:
    (trace,) = served(fake, ask(1), **more).traces
    return trace.error


@pytest.mark.parametrize(("dialect", "key"), [(OpenAI(NAMES, "tiny"), "text"), (Llama([7, 4]), "content")])
def test_a_lone_token_without_text_is_one(dialect: Dialect, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a character: the text is empty, and only the counts at the end say that there was a token."""

    def silent(chunks: list[Any]) -> list[Any]:
        for chunk in chunks:
            for part in chunk.get("choices", [chunk]) if isinstance(chunk, dict) else ():
                part.update({key: "", "tokens": []})
        return chunks

    made = "_openai" if key == "text" else "_llama"
    original = getattr(Fake, made)
    monkeypatch.setattr(Fake, made, lambda self, body: silent(original(self, body)))
    (trace,) = served(Fake(), ask(1, new=1), dialect).traces
    assert (trace.error, trace.tokens, len(trace.times)) == (None, 1, 1)


@pytest.mark.parametrize(
    "dialect", [Onebase(NAMES), OpenAI(NAMES, "tiny"), Llama([7, 4])], ids=["onebase", "openai", "llama"]
)
def test_every_dialect_counts_tokens_and_notes_their_times(dialect: Dialect) -> None:
    done = served(Fake(), ask(5), dialect)
    assert [trace.error for trace in done.traces] == [None] * 5
    for trace in done.traces:
        assert trace.tokens == 3
        assert len(trace.times) == 3
        assert trace.sent <= trace.times[0] <= trace.times[1] <= trace.times[2] <= trace.end <= done.seconds
        assert len(trace.gaps) == 2
    assert {trace.cold for trace in done.traces} == {True if isinstance(dialect, Onebase) else None}


def test_every_dialect_names_the_adapter_and_the_base_in_its_own_way() -> None:
    prompt = [1, 2]
    assert Onebase(NAMES).body(1, prompt, 9)["adapter"] == "second"
    assert Onebase(NAMES).body(None, prompt, 9)["adapter"] is None
    assert OpenAI(NAMES, "tiny").body(1, prompt, 9)["model"] == "second"
    assert OpenAI(NAMES, "tiny").body(None, prompt, 9)["model"] == "tiny"
    assert Llama([7, 4]).body(1, prompt, 9)["lora"] == [{"id": 4, "scale": 1.0}]
    assert Llama([7, 4]).body(None, prompt, 9)["lora"] == []
    for body in (d.body(None, prompt, 9) for d in (Onebase(NAMES), OpenAI(NAMES, "tiny"), Llama([]))):
        assert body["prompt"] == prompt
        assert body["ignore_eos"] is body["stream"] is True
        assert 9 in (body.get("max_tokens"), body.get("n_predict"))


def test_the_server_is_asked_what_it_speaks() -> None:
    async def inside(*apis: str) -> Any:
        async with Served(Fake(*apis).app) as server:
            url = str(server.make_url("")).rstrip("/")
            api = await asyncio.to_thread(detect, url)
            return api, await asyncio.to_thread(connect, url, api, NAMES)

    api, dialect = asyncio.run(inside("onebase", "openai"))
    assert (api, dialect.path) == ("onebase", "/v1/generate")
    api, dialect = asyncio.run(inside("openai"))
    assert (api, dialect.body(None, [1], 1)["model"]) == ("openai", "tiny")
    api, dialect = asyncio.run(inside("llama", "openai", "loras"))
    assert (api, dialect.body(0, [1], 1)["lora"][0]["id"]) == ("llama", 7)
    with pytest.raises(UnknownServer):
        asyncio.run(inside())


def test_nobody_there() -> None:
    with pytest.raises(httpx.ConnectError):
        detect("http://127.0.0.1:9")


def test_a_closed_loop_has_so_many_open_and_no_more() -> None:
    fake, open_, most = Fake(), 0, 0

    async def before(_: int) -> None:
        nonlocal open_, most
        open_ += 1
        most = max(most, open_)
        await asyncio.sleep(0.01)
        open_ -= 1

    fake.before = before
    done = served(fake, ask(12), streams=3)
    assert len(done.traces) == 12
    assert most == 3


def test_a_stall_is_seen_by_everything_that_was_due_during_it() -> None:
    """The server holds every answer back until it wakes. An open loop goes on sending, and each request's latency has
    the whole of its wait in it; were sending to wait for the answers before, only one of them would show it.
    """
    fake, woken = Fake(), asyncio.Event()
    starts: list[float] = []

    async def before(number: int) -> None:
        if number == 0:
            starts.append(time.perf_counter())
            asyncio.get_running_loop().call_later(0.5, wake)
        await woken.wait()

    def wake() -> None:
        starts.append(time.perf_counter())
        woken.set()

    fake.before = before
    done = served(fake, ask(20, due=0.02), streams=None)
    assert [trace.error for trace in done.traces] == [None] * 20
    stalled = starts[1] - starts[0]
    first = min(done.traces, key=lambda trace: trace.start)
    for trace in done.traces:
        assert trace.due == pytest.approx(0.02 * trace.request.index)
        waited = stalled - (trace.due - first.due)  # what of the stall was left when it was due
        assert trace.ttft >= waited
    assert sum(trace.ttft >= 0.25 for trace in done.traces) >= 12
    assert len(fake.bodies) == 20


def test_latency_has_the_delay_of_a_late_sender_in_it() -> None:
    """The loop is held up before a request is due: it goes out late, but its clock started when it was due."""
    fake = Fake()

    async def before(number: int) -> None:
        if number == 0:
            time.sleep(0.2)  # holds up the sender as well: it lives on this loop

    fake.before = before
    done = served(fake, ask(20, due=0.05), streams=None)
    late = max(done.traces, key=lambda trace: trace.sent - trace.due)
    assert late.sent - late.due >= 0.1
    assert late.ttft >= late.sent - late.due


def test_failures_are_counted_by_reason_and_the_run_goes_on() -> None:
    fake = Fake()

    async def before(number: int) -> None:
        if number == 1:
            body = json.dumps({"error": {"message": "m", "type": "overloaded", "code": "queue_full"}})
            raise web.HTTPServiceUnavailable(text=body, content_type="application/json")
        if number == 2:
            raise web.HTTPBadGateway(text="<html>")

    fake.before = before
    done = served(fake, ask(5), streams=1)
    assert [trace.error for trace in done.traces] == [None, "503 queue_full", "502", None, None]


def test_an_error_in_the_stream() -> None:
    fake = Fake()

    async def after(response: web.StreamResponse) -> bool:
        await response.write(b'event: error\ndata: {"error": {"message": "m", "code": "engine_failed"}}\n\n')
        return True

    fake.after = after
    assert only_error(fake) == "in the stream: engine_failed"


def test_a_stream_that_just_stops() -> None:
    fake = Fake()

    async def after(_: web.StreamResponse) -> bool:
        return True

    fake.after = after
    assert only_error(fake) == "the stream just stopped"


def test_a_connection_that_is_cut() -> None:
    fake = Fake()

    async def after(response: web.StreamResponse) -> bool:
        assert response._req is not None
        assert response._req.transport is not None
        response._req.transport.abort()
        return True

    fake.after = after
    assert str(only_error(fake)).startswith("connection: ")


def test_chunks_of_another_api() -> None:
    fake = Fake()
    fake._openai = lambda body: [{"foo": 1}]  # type: ignore[method-assign]
    fake.app.router.add_post("/other/v1/generate", fake._handler(lambda body: [{"foo": 1}]))
    dialect = Onebase(NAMES)
    dialect.path = "/other/v1/generate"
    assert only_error(fake, dialect=dialect) == "not a chunk of this API: KeyError"


def test_a_request_that_takes_too_long() -> None:
    fake = Fake()

    async def before(_: int) -> None:
        await asyncio.sleep(5)

    fake.before = before
    assert only_error(fake, timeout=0.05) == "timeout"


@pytest.mark.parametrize("streams", [None, 2])
def test_the_bound_in_time_ends_sending_and_then_cuts_off(streams: int | None) -> None:
    fake = Fake()

    async def before(number: int) -> None:
        if number >= 2:
            await asyncio.sleep(10)

    fake.before = before
    done = served(fake, ask(1000, due=0.02), streams=streams, seconds=1.0, grace=0.1)
    assert not done.interrupted
    assert done.planned == 1000
    assert 2 < len(done.traces) < 100
    errors = [trace.error for trace in done.traces]
    assert errors.count(None) == 2
    assert set(errors) == {None, "cut off"}


@pytest.mark.parametrize("streams", [None, 2])
def test_an_interrupt_gives_what_was_done(streams: int | None) -> None:
    fake, tick = Fake(), 0

    async def inside() -> Run:
        def seen(_: Trace) -> None:
            nonlocal tick
            tick += 1
            if tick == 3:
                task.cancel()  # what asyncio does on Ctrl-C

        async with Served(fake.app) as server, Client(str(server.make_url("")), Onebase(NAMES)) as client:
            requests = ask(1000, due=0.01)
            task = asyncio.create_task(run(client, requests, streams=streams, seconds=30, tick=seen))
            return await task

    done = asyncio.run(inside())
    assert done.interrupted
    assert [trace.error for trace in done.traces[:3]] == [None] * 3
    assert len(done.traces) < 1000
