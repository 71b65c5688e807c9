"""Mixed traffic against a server with AUTH on: two tenants, hits, misses, evictions, errors, cancels, both lanes."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.families import adapter_bytes, save_adapter
from tests.serving import Server, chat_base

SCOPES = ["generate", "adapters:write", "usage:read"]
NAMES = [f"adapter-{number}" for number in range(8)]


class Sink(BaseHTTPRequestHandler):
    """Takes usage events."""

    def do_POST(self) -> None:
        """Any event will do."""
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        """Says nothing."""


@contextlib.contextmanager
def sink() -> Iterator[str]:
    """The address of one on a free port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Sink)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/events"
    server.shutdown()
    server.server_close()
    thread.join()


class Fleet:
    """One server with two tenants of eight adapters each, of which two fit on the device and three into RAM."""

    def __init__(self, folder: Path):
        self.base = chat_base(folder / "base")
        for seed, name in enumerate(NAMES):
            save_adapter(self.base, folder / name, seed=seed)
        self._folder = folder
        self.clients: list[httpx.Client] = []

    @contextlib.contextmanager
    def serving(self) -> Iterator[Server]:
        """Runs it; `admin` is a client with an admin key, `metrics_key` one for Prometheus."""
        with contextlib.ExitStack() as stack:
            one = (self._folder / NAMES[0] / "adapter_model.safetensors").stat().st_size
            settings = {"adapter_slots": 2, "ram_cache_bytes": 3 * one, "auth": "on", "kv_cache_tokens": 512}
            settings |= {"events_url": stack.enter_context(sink()), "max_running": 4, "max_queue_requests": 8}
            said = io.StringIO()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sys.stderr", said)
                server = stack.enter_context(Server(self.base, self._folder / "data", **settings))
            stack.callback(lambda: [client.close() for client in self.clients])
            self.admin = self._client(server, said.getvalue().split("this once:\n")[1].split()[0])
            self.metrics_key = self._key("default", ["metrics:read"])
            limits = {"acme": {"weight": 2.0, "limits": {"soft_budget": 1}}, "busy": {"limits": {"rpm_limit": 60}}}
            self.tenants = {name: self._tenant(server, name, more) for name, more in limits.items()}
            yield server

    def _client(self, server: Server, token: str) -> httpx.Client:
        self.clients.append(httpx.Client(base_url=server.url, timeout=60, headers={"authorization": f"Bearer {token}"}))
        return self.clients[-1]

    def _key(self, tenant: str, scopes: list[str]) -> str:
        made = self.admin.post(f"/admin/tenants/{tenant}/keys", json={"scopes": scopes})
        assert made.status_code == 201, made.text
        return str(made.json()["token"])

    def _tenant(self, server: Server, name: str, more: dict[str, Any]) -> httpx.Client:
        made = self.admin.post("/admin/tenants", json={"id": name, **more})
        assert made.status_code == 201, made.text
        client = self._client(server, self._key(name, SCOPES))
        for adapter in NAMES:
            config, weights = adapter_bytes(self._folder / adapter)
            put = client.put(f"/adapters/{adapter}", files={"config": config, "weights": weights})
            assert put.status_code == 201, put.text
        return client

    def drive(self, seconds: float) -> None:
        """Traffic of every kind for so long, until nothing is left of it."""
        end = time.monotonic() + seconds
        merged = self.tenants["acme"].patch(f"/adapters/{NAMES[0]}", json={"lane": "merged"})
        assert merged.status_code == 200, merged.text
        jobs = [self._generates, self._generates, self._merged, self._cancels, self._errors, self._floods, self._merges]
        threads = [threading.Thread(target=job, args=(end, at)) for at, job in enumerate(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _generates(self, end: float, at: int) -> None:
        client, number = list(self.tenants.values())[at % 2], 0
        while time.monotonic() < end:
            number += 1
            body = {"adapter": NAMES[number % len(NAMES)] if number % 3 else None, "prompt": "the same words " * 6}
            client.post("/v1/generate", json={**body, "max_tokens": 12, "ignore_eos": True})

    def _merged(self, end: float, at: int) -> None:
        while time.monotonic() < end:
            body = {"adapter": NAMES[0], "prompt": "hello", "max_tokens": 16, "ignore_eos": True}
            self.tenants["acme"].post("/v1/generate", json=body)

    def _cancels(self, end: float, at: int) -> None:
        body = {"prompt": "hello", "max_tokens": 400, "ignore_eos": True, "stream": True}
        while time.monotonic() < end:
            with self.tenants["acme"].stream("POST", "/v1/generate", json=body) as response:
                next(response.iter_lines(), None)

    def _errors(self, end: float, at: int) -> None:
        while time.monotonic() < end:
            self.tenants["acme"].post("/v1/generate", json={"adapter": "nobody's", "prompt": "hello"})
            self.tenants["acme"].get("/adapters/none")
            time.sleep(0.2)

    def _floods(self, end: float, at: int) -> None:
        """Past the rate of its tenant, and past the queue."""

        def one() -> None:
            body = {"prompt": "hello " * 30, "max_tokens": 40, "ignore_eos": True, "n": 2}
            with contextlib.suppress(httpx.HTTPError):
                self.tenants["acme" if at % 2 else "busy"].post("/v1/generate", json=body)

        while time.monotonic() < end:
            threads = [threading.Thread(target=one) for _ in range(12)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def _merges(self, end: float, at: int) -> None:
        lanes = ("merged", "shared")
        while time.monotonic() < end:
            for lane in lanes:
                self.tenants["busy"].patch(f"/adapters/{NAMES[1]}", json={"lane": lane})
            time.sleep(0.5)
