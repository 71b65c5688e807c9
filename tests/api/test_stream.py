"""Streams: their framing, their faults, and what is left when the client goes."""

import json
import socket

import pytest

from server.errors import AdapterUnavailable, EngineFailure
from tests.serving import ENVELOPE, Gate, refused, until

pytestmark = pytest.mark.usefixtures("idle")
LONG = {"max_tokens": 300, "ignore_eos": True}


def outcomes(server) -> dict[str, int]:
    return dict(server.engine.stats.outcomes)


def joined(chunks, index=0):
    """Text and tokens of one answer, put together from its chunks."""
    mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(one["text"] for one in mine), [token for one in mine for token in one["token_ids"]]


def test_every_event_is_framed_to_the_letter(server):
    with server.open_stream(ignore_eos=True) as response:
        raw = b"".join(response.iter_raw())
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-request-id"]
    events = raw.split(b"\n\n")
    assert events.pop() == b""
    assert events.pop() == b"data: [DONE]"
    assert all(event.startswith(b"data: {") and event.endswith(b"}") and b"\n" not in event for event in events)
    assert len(events) == 8


def test_chunks_have_the_answers_fields_and_only_the_last_has_the_end(server):
    whole = server.generate(adapter="a", ignore_eos=True)
    *chunks, last = server.stream(adapter="a", ignore_eos=True)
    for chunk in (*chunks, last):
        assert set(chunk) - {"usage"} == set(whole) - {"usage"}
        assert set(chunk["choices"][0]) == set(whole["choices"][0])
        assert chunk["id"] == last["id"]
        assert chunk["adapter"] == whole["adapter"] | {"cold": False, "load_ms": 0.0}
    assert all(chunk["choices"][0]["finish_reason"] is None and "usage" not in chunk for chunk in chunks)
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["usage"]["completion_tokens"] == 8
    assert set(last["usage"]) == set(whole["usage"])


@pytest.mark.parametrize("text", ["plain words here", "naïve 日本語 🎉 x", "🎉🎉🎉", "日本", "tail\u0301 e\u0301"])
@pytest.mark.parametrize("stop", [[], ["never said"], ["語 "]])
def test_the_chunks_put_together_are_the_whole(server, script, text, stop):
    script(text)
    settings = {"max_tokens": len(text.encode()), "ignore_eos": True, "stop": stop}
    whole = server.generate(**settings)["choices"][0]
    chunks = server.stream(**settings)
    assert joined(chunks) == (whole["text"], whole["token_ids"])
    assert whole["text"] == text.split(stop[0])[0] if stop else text
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]
    assert "\ufffd" not in whole["text"]


def test_an_unfinished_character_at_the_end_comes_out_the_same(server, script):
    script("ab🎉")
    for length in (3, 4, 5, 6):
        whole = server.generate(max_tokens=length)["choices"][0]
        assert joined(server.stream(max_tokens=length)) == (whole["text"], whole["token_ids"])


def test_random_bytes_put_together_are_the_whole(server):
    for seed in range(4):
        settings = {"temperature": 3.0, "seed": seed, "max_tokens": 60, "ignore_eos": True, "logprobs": 2}
        whole, chunks = server.generate(**settings)["choices"][0], server.stream(**settings)
        assert joined(chunks) == (whole["text"], whole["token_ids"])
        tokens = [token for chunk in chunks for token in chunk["choices"][0]["logprobs"]["tokens"]]
        assert tokens == whole["logprobs"]["tokens"]


def test_two_answers_in_one_stream(server):
    settings = {"n": 2, "temperature": 1.5, "seed": 4, "max_tokens": 12, "stop": "a"}
    whole, chunks = server.generate(**settings), server.stream(**settings)
    for choice in whole["choices"]:
        index = choice["index"]
        assert joined(chunks, index) == (choice["text"], choice["token_ids"])
        mine = [one for chunk in chunks for one in chunk["choices"] if one["index"] == index]
        assert [one["finish_reason"] for one in mine if one["finish_reason"]] == [choice["finish_reason"]]
        assert mine[-1]["finish_reason"]
    assert [bool(chunk.get("usage")) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1]["usage"] | {"cached_tokens": 0} == whole["usage"] | {"cached_tokens": 0}


def test_an_answer_that_ends_early_is_told_at_once(server):
    """Two answers of which one stops: its last chunk does not wait for the other's."""
    settings = {"n": 2, "temperature": 2.0, "max_tokens": 40, "stop": ["a", "b", "c", "d"], "ignore_eos": True}

    def uneven(seed):
        lengths = [len(one["token_ids"]) for one in server.generate(seed=seed, **settings)["choices"]]
        return abs(lengths[0] - lengths[1]) > 5

    seed = next(seed for seed in range(50) if uneven(seed))
    chunks = [chunk["choices"][0] for chunk in server.stream(seed=seed, **settings)]
    (first, last) = [at for at, one in enumerate(chunks) if one["finish_reason"]]
    assert chunks[first]["index"] != chunks[last]["index"]
    assert last - first > 4


def test_a_stream_of_one_token(server):
    (chunk,) = server.stream(max_tokens=1, ignore_eos=True)
    assert chunk["choices"][0]["finish_reason"] == "length"
    assert chunk["usage"]["completion_tokens"] == 1


def test_a_refused_stream_is_an_ordinary_refusal(server):
    for body, status in (({"adapter": "nobody"}, 404), ({"prompt": ""}, 422), ({"max_tokens": 9999}, 422)):
        with server.open_stream(**body) as response:
            response.read()
        refused(response, status)


def failing_at(server, monkeypatch, step):
    """The engine's step number `step` from now fails, and no other."""
    run, count = server.runner.run, iter(range(1, 10_000))

    def failing(work, copy):
        if next(count) == step:
            raise RuntimeError("CUDA error: a secret of /this/machine")
        return run(work, copy)

    monkeypatch.setattr(server.runner, "run", failing)


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_before_the_first_chunk_has_its_own_status(server, monkeypatch, stream):
    failing_at(server, monkeypatch, 1)
    response = server.http.post("/v1/generate", json={"prompt": "a", "stream": stream})
    assert refused(response, EngineFailure.status)["code"] == "engine_failure"
    assert "secret" not in response.text
    assert server.generate()


def test_a_fault_after_the_first_chunk_is_an_error_event(server, monkeypatch):
    failing_at(server, monkeypatch, 4)
    with server.open_stream(ignore_eos=True) as response:
        events = response.read().decode().split("\n\n")
    assert response.status_code == 200
    assert events.pop() == ""
    event, data = events.pop().split("\n")
    assert event == "event: error"
    error = json.loads(data.removeprefix("data: "))["error"]
    assert set(error) == ENVELOPE
    assert error["code"] == "engine_failure"
    assert "secret" not in data
    assert len(events) == 3
    assert all(event.startswith("data: {") for event in events)


def test_a_fault_while_answering_whole_is_its_status(server, monkeypatch):
    failing_at(server, monkeypatch, 4)
    response = server.http.post("/v1/generate", json={"prompt": "a", "max_tokens": 8, "ignore_eos": True})
    assert refused(response, 500)["code"] == "engine_failure"


def test_an_adapter_that_cannot_be_read_is_a_status_before_the_stream(server, new_adapter, monkeypatch):
    server.put("lost", new_adapter())

    def unreadable(digest):
        raise AdapterUnavailable("the stored adapter does not match its digest")

    monkeypatch.setattr(server.engine._loader, "_fetch", unreadable)
    for stream in (True, False):
        response = server.http.post("/v1/generate", json={"prompt": "a", "adapter": "lost", "stream": stream})
        assert refused(response, 500)["code"] == "adapter_unavailable"
    monkeypatch.undo()
    assert server.generate(adapter="lost")["adapter"]["name"] == "lost"


class Client:
    """A client of a bare socket, which can vanish."""

    def __init__(self, server, **body):
        content = json.dumps({"prompt": "hello", **LONG, **body}).encode()
        self._socket = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=30)
        head = ["POST /v1/generate HTTP/1.1", "Host: x", "Content-Type: application/json"]
        head += [f"Content-Length: {len(content)}", "", ""]
        self._socket.sendall("\r\n".join(head).encode() + content)

    def read_until(self, mark: bytes) -> bytes:
        data = b""
        while mark not in data:
            part = self._socket.recv(65536)
            assert part, data
            data += part
        return data

    def leave(self) -> None:
        self._socket.close()


def ended_as_cancelled(server, before):
    """One more request has ended, as cancelled, and nothing of it is left."""
    until(lambda: server.state.client.open_requests == 0)
    server.idle()
    after = outcomes(server)
    assert after == before | {"cancelled": before.get("cancelled", 0) + 1}


@pytest.mark.parametrize("stream", [True, False])
def test_gone_while_decoding(server, gate, stream):
    before = outcomes(server)
    gate.open()
    client = Client(server, stream=stream)
    until(lambda: gate.entered > 5)
    client.leave()
    ended_as_cancelled(server, before)
    assert gate.entered < 250


@pytest.mark.parametrize("stream", [True, False])
def test_gone_while_prefilling(server, gate, stream):
    before = outcomes(server)
    client = Client(server, stream=stream, prompt=[7] * 150, adapter="a", max_tokens=60)
    until(lambda: gate.entered == 1)
    client.leave()
    gate.open()
    ended_as_cancelled(server, before)
    assert gate.entered < 4


@pytest.mark.parametrize("stream", [True, False])
def test_gone_while_loading(server, new_adapter, monkeypatch, stream):
    name = f"slow-{stream}".lower()
    server.put(name, new_adapter())
    fetch = Gate(server.engine._loader._fetch)
    monkeypatch.setattr(server.engine._loader, "_fetch", fetch)
    before = outcomes(server)
    client = Client(server, stream=stream, adapter=name)
    until(lambda: fetch.entered == 1)
    client.leave()
    ended_as_cancelled(server, before)
    fetch.open()
    assert server.generate(adapter=name)["adapter"]["name"] == name


def test_a_slow_load_stalls_nobody(server, new_adapter, monkeypatch):
    server.put("slowest", new_adapter())
    fetch = Gate(server.engine._loader._fetch)
    monkeypatch.setattr(server.engine._loader, "_fetch", fetch)
    client = Client(server, stream=True, adapter="slowest", max_tokens=4)
    until(lambda: fetch.entered == 1)
    assert server.generate(adapter="a")["choices"]
    assert server.generate()["choices"]
    assert server.http.get("/adapters/slowest").json()["in_flight"] == 1
    fetch.open()
    assert b'"cold":true' in client.read_until(b"[DONE]")
    client.leave()


@pytest.mark.parametrize("stream", [True, False])
def test_gone_while_queued(server, gate, monkeypatch, stream):
    monkeypatch.setattr(server.engine._scheduler, "max_running", 1)
    before = outcomes(server)
    first = Client(server, stream=True, max_tokens=12)
    until(lambda: gate.entered == 1)
    second = Client(server, stream=stream, adapter="a")
    until(lambda: server.state.client.open_requests == 2)
    second.leave()
    gate.open()
    assert first.read_until(b"[DONE]").count(b"data: {") == 12
    until(lambda: server.state.client.open_requests == 0)
    after = outcomes(server)
    assert after["cancelled"] - before.get("cancelled", 0) == 1
    assert after["finished"] - before.get("finished", 0) == 1
    first.leave()


def test_many_clients_gone_at_once(server):
    clients = [Client(server, stream=bool(at % 2), adapter="a" if at % 3 else None) for at in range(12)]
    until(lambda: server.engine.stats.running > 0)
    for client in clients:
        client.leave()
    until(lambda: server.state.client.open_requests == 0)
