"""A onebase server of our own for a measurement: started on a free port, stopped at the end."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    pid: int


@contextlib.contextmanager
def serving(log: Path, **settings: object) -> Iterator[Served]:
    """Runs `onebase serve` with these settings and yields it once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {f"ONEBASE_{key.upper()}": str(value) for key, value in settings.items()}
    command = [sys.executable, "-m", "server.cli", "serve", "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_ready(process, url, log)
        yield Served(url, process.pid)
    finally:
        process.terminate()
        process.wait(60)


def put(url: str, name: str, folder: Path) -> float:
    """Uploads an adapter; the seconds it took."""
    start = time.perf_counter()
    files = {
        "config": (folder / "adapter_config.json").read_bytes(),
        "weights": (folder / "adapter_model.safetensors").read_bytes(),
    }
    response = httpx.put(f"{url}/adapters/{name}", files=files, timeout=120)
    response.raise_for_status()
    return time.perf_counter() - start


def _wait_ready(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/readyz", timeout=2).status_code == 200:
                return
        if process.poll() is not None:
            break
        time.sleep(0.2)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-2000:]}")
