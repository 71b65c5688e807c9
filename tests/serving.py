"""A real server for tests: uvicorn in a thread around the app, and what is needed to look at it."""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from server.app import create_app
from server.core import AdapterRef
from server.engine.messages import Unmerge
from server.run import DrainingServer
from server.settings import Settings
from tests.databases import of_server
from tests.families import adapter_bytes, save_model, tokenizer

ENVELOPE = {"message", "type", "param", "code"}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def until(holds: Callable[[], Any], seconds: float = 20) -> Any:
    """Waits until `holds()` is true; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < end, f"did not happen within {seconds} s"
        time.sleep(0.005)
    return value


class Server:
    """The app behind uvicorn on a free port. What is under it may be looked at: `state`, `engine`."""

    def __init__(self, base: Path, data_dir: Path, **settings: Any):
        defaults: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_cache_tokens": 2048, "threads": 2}
        defaults |= of_server(data_dir)
        self.settings = Settings(base=str(base), data_dir=data_dir, port=0, **{**defaults, **settings})
        self.app = create_app(self.settings)
        self.state = self.app.state.onebase
        self._socket = socket.socket(proto=socket.IPPROTO_TCP)  # as asyncio asks for, to set TCP_NODELAY
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        quiet = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": 2}
        config = uvicorn.Config(self.app, http="h11", loop="asyncio", **quiet)
        self._uvicorn = DrainingServer(config, self.state)
        self._thread = threading.Thread(target=self._uvicorn.run, kwargs={"sockets": [self._socket]})
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def __enter__(self) -> Server:
        self._thread.start()
        until(lambda: self._uvicorn.started)
        return self

    def __exit__(self, *fault: Any) -> None:
        self.http.close()
        self._uvicorn.should_exit = True
        self._thread.join(30)
        self._socket.close()
        assert not self._thread.is_alive()

    def terminate(self) -> None:
        """What SIGTERM does."""
        self.state.client.loop.call_soon_threadsafe(self._uvicorn.handle_exit, signal.SIGTERM, None)

    @property
    def engine(self) -> Any:
        return self.state.client._engine

    @property
    def runner(self) -> Any:
        return self.engine._runner

    def put(self, name: str, folder: Path, **more: Any) -> httpx.Response:
        config, weights = adapter_bytes(folder)
        return self.http.put(f"/adapters/{name}", files={"config": config, "weights": weights}, **more)

    def generate(self, **body: Any) -> dict[str, Any]:
        response = self.http.post("/v1/generate", json={"prompt": "hello", "max_tokens": 8, **body})
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, **body: Any) -> list[dict[str, Any]]:
        """The chunks of a streamed answer that ends as it should."""
        body = {"prompt": "hello", "max_tokens": 8, "stream": True, **body}
        response = self.http.post("/v1/generate", json=body)
        assert response.status_code == 200, response.text
        events = response.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    @contextlib.contextmanager
    def open_stream(self, **body: Any) -> Iterator[httpx.Response]:
        body = {"prompt": "hello", "max_tokens": 8, "stream": True, **body}
        with self.http.stream("POST", "/v1/generate", json=body) as response:
            yield response

    def idle(self) -> None:
        """Waits until nothing is held any more: no row, no slot, no block, no lease, no open stream."""

        def nothing() -> bool:
            stats, client = self.engine.stats, self.state.client
            held = (stats.running, stats.waiting, stats.loading, stats.slot_references, stats.blocks_used)
            return held == (0,) * 5 and client.open_requests == client.open_tokens == 0

        until(nothing)
        assert not any(self.state.registry.leases().values())
        assert not any(one.in_flight for one in self.state.activity.values())


class Gate:
    """Lets a function be called only while it is open, and tells how often it was entered."""

    def __init__(self, function: Callable[..., Any]):
        self._function, self._open, self.entered = function, threading.Event(), 0

    def __call__(self, *arguments: Any) -> Any:
        self.entered += 1
        assert self._open.wait(30)
        return self._function(*arguments)

    def open(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._open.clear()


def on_the_engine(server: Any, act: Callable[[], Any]) -> Any:
    """What `act` gives, done by the engine's thread, which alone may touch the merged copies."""
    given: queue.SimpleQueue[Any] = queue.SimpleQueue()
    handle = server.engine._merged.handle

    def first(message: Any) -> None:
        made = act()
        server.engine._merged.handle = handle
        handle(message)
        given.put(made)

    server.engine._merged.handle = first
    server.engine.change_lane(Unmerge("none", AdapterRef("nobody", 1, "none")))
    return given.get(timeout=10)


def refused(response: httpx.Response, status: int, param: str | None = ...) -> dict[str, Any]:  # type: ignore[assignment]
    """Asserts the error envelope, to the letter; returns its inside."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == ENVELOPE
    assert body["error"]["message"]
    assert isinstance(body["error"]["message"], str)
    assert isinstance(body["error"]["type"], str)
    assert isinstance(body["error"]["code"], str)
    assert "Traceback" not in response.text
    assert response.headers["x-request-id"]
    if param is not ...:
        assert body["error"]["param"] == param, response.text
    return body["error"]


def ids_of(text: str) -> list[int]:
    """The tokens of a text: its bytes."""
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def chat_base(folder: Path, **config: Any) -> Path:
    """A small random Llama with a chat template; `config` replaces fields of its configuration."""
    save_model("llama", folder)
    for name, more in (("tokenizer_config.json", {"chat_template": TEMPLATE}), ("config.json", config)):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, **more}))
    return folder
