"""The server's own limits, and how it stops."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from server.settings import Settings
from tests.databases import in_environment
from tests.serving import Server, chat_base, refused, until


@pytest.fixture(scope="module")
def options():
    return {"max_queue_requests": 3, "max_queue_tokens": 200}


def overloaded(response):
    error = refused(response, 503)
    assert (error["code"], error["type"]) == ("queue_full", "overloaded_error")
    assert int(response.headers["retry-after"]) >= 1


def waiting(server, count, **body):
    """`count` requests that the server holds, and a way to wait for their answers."""
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(server.generate(**body))) for _ in range(count)]
    for thread in threads:
        thread.start()
    until(lambda: server.state.client.open_requests == count)

    def finish():
        for thread in threads:
            thread.join(20)
        return answers

    return finish


@pytest.mark.parametrize("stream", [True, False])
def test_more_requests_than_the_queue_takes_are_503(server, gate, idle, stream):
    finish = waiting(server, 3)
    for adapter in ("a", None):
        body = {"prompt": "a", "max_tokens": 1, "adapter": adapter, "stream": stream}
        overloaded(server.http.post("/v1/generate", json=body))
    gate.open()
    assert len(finish()) == 3
    assert server.generate()


def test_more_tokens_than_the_queue_takes_are_503(server, gate, idle):
    finish = waiting(server, 1, prompt=[5] * 50, max_tokens=100)
    overloaded(server.http.post("/v1/generate", json={"prompt": [5] * 10, "max_tokens": 41}))
    overloaded(server.http.post("/v1/generate", json={"prompt": [5], "max_tokens": 25, "n": 2}))
    gate.open()
    assert len(finish()) == 1
    assert server.generate(prompt=[5] * 10, max_tokens=41)


def test_what_the_queue_could_never_take_is_422(server, idle):
    for body, param in (({"max_tokens": 200}, "max_tokens"), ({"max_tokens": 50, "n": 5}, "n")):
        refused(server.http.post("/v1/generate", json={"prompt": [5], **body}), 422, param)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_a_server_without_keys_is_not_opened_to_others(host):
    with pytest.raises(ValueError, match="--insecure"):
        Settings(host=host)
    assert Settings(host=host, insecure=True).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_needs_no_keys(host):
    assert Settings(host=host).auth == "off"


# --- a process of its own, and SIGTERM --------------------------------------------------------------------------------


class Process:
    """`onebase serve` on the small base, with a context that takes long to fill."""

    def __init__(self, base: Path, data: Path, **flags: object):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = data.with_suffix(".log")
        flags = {"base": base, "data-dir": data, "port": port, "kv-cache-tokens": 9000, "threads": 1, **flags}
        command = [sys.executable, "-m", "server.cli", "serve"]
        command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        with self.log.open("w") as log:
            env = os.environ | in_environment(data)
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def stream(self, tokens: int):
        body = {"prompt": "a", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        return self.http.stream("POST", "/v1/generate", json=body)


@pytest.fixture(scope="module")
def long_base(tmp_path_factory):
    return chat_base(tmp_path_factory.mktemp("bases") / "long-llama", max_position_embeddings=8192)


@pytest.fixture
def process(long_base, tmp_path):
    process = Process(long_base, tmp_path / "data")
    try:
        until(process.ready, 60)
        yield process
    finally:
        process.http.close()
        process.process.kill()
        process.process.wait()


def test_sigterm_lets_the_open_stream_end(process):
    with process.stream(800) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        process.process.send_signal(signal.SIGTERM)
        until(lambda: process.http.get("/readyz").status_code == 503)
        assert process.http.get("/healthz").status_code == 200
        assert refused(process.http.get("/readyz"), 503)["code"] == "draining"
        for stream in (True, False):
            new = process.http.post("/v1/generate", json={"prompt": "a", "stream": stream})
            assert refused(new, 503)["type"] == "overloaded_error"
            assert int(new.headers["retry-after"]) >= 1
        events = [line for line in lines if line]
    assert events[-1] == "data: [DONE]"
    last = json.loads(events[-2].removeprefix("data: "))
    assert last["usage"]["completion_tokens"] == 800
    assert last["choices"][0]["finish_reason"] == "length"
    assert process.process.wait(20) == 0
    assert "Traceback" not in process.log.read_text()


@pytest.mark.parametrize(("patience", "signals"), [(0.2, 1), (60, 2)])
def test_what_is_longer_than_the_patience_ends_with_an_error(long_base, tmp_path, patience, signals):
    body = {"prompt": "b", "max_tokens": 4000, "ignore_eos": True}
    with (
        Server(long_base, tmp_path / "data", kv_cache_tokens=16_000, drain_seconds=patience) as server,
        ThreadPoolExecutor() as threads,
        server.open_stream(max_tokens=8000, ignore_eos=True) as response,
    ):
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        whole = threads.submit(server.http.post, "/v1/generate", json=body)
        until(lambda: server.engine.stats.running == 2)
        for _ in range(signals):
            server.terminate()
        events = [line for line in lines if line]
        assert events[-2] == "event: error"
        error = json.loads(events[-1].removeprefix("data: "))["error"]
        assert (error["type"], error["code"]) == ("overloaded_error", "shutting_down")
        assert refused(whole.result(20), 503) == error
        assert int(whole.result().headers["retry-after"]) >= 1
        until(lambda: not server._thread.is_alive())


def test_an_offered_upgrade_is_ignored_and_the_body_read(server):
    headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQAAP__"}
    answer = server.http.post("/v1/generate", json={"prompt": "hello", "max_tokens": 2}, headers=headers)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("start", [b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-Long: ", b"GET /"])
def test_headers_and_addresses_without_end_are_cut_off(server, start):
    host, port = server.http.base_url.host, server.http.base_url.port
    with socket.create_connection((host, port), timeout=10) as connection:
        connection.sendall(start)
        with contextlib.suppress(ConnectionError):  # it may be closed while we send
            for _ in range(64):
                connection.sendall(b"a" * 65_536)
            while connection.recv(65_536):  # a server that waits for more lets this time out
                pass
    assert server.http.get("/healthz").status_code == 200
