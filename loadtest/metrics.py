"""What the metrics cost: `python -m loadtest.metrics`.

- `step`: what is called for a decode step of 16 rows, by itself; two servers of the same code differ by far more.
- `streams`: 16 streams on the server, and on one that counts nothing (`loadtest/uncounted.py`), by turns, over HTTP.
- `scrape`: `/metrics` of a server with 5,000 adapters that have all had a request, and how long `/healthz` takes beside
  that and without it: as long as the event loop stands still.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np

from loadtest.adapters import Adapter, upload
from loadtest.compare import RESULTS
from loadtest.pairs import ROWS, by_turns
from loadtest.peers.onebase import serve
from loadtest.stamp import again, stamp
from server.engine import clock
from server.engine.counting import Counting
from server.model.bundled import materialise

ROUNDS = 15  # pairs of 16 streams
STEPS = 20_000
ADAPTERS, SCRAPES = 5_000, 50
AT_ONCE = 16


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    rounds: int
    adapters: int


def main() -> None:
    """Writes `results/metrics-<dtype>.json` and prints it. Fewer parts than all take their place in the file that is
    there, which says so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="pairs of 16 streams")
    parser.add_argument("--adapters", type=int, default=ADAPTERS, help="registered while /metrics is read")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory")
    arguments = parser.parse_args()
    path, parts = arguments.out / f"metrics-{arguments.dtype}.json", arguments.parts
    report = measure(arguments.dtype, Effort(arguments.rounds, arguments.adapters), parts)
    if path.exists() and set(parts) < set(PARTS):
        report = again(json.loads(path.read_text()), report, parts)
    found = json.dumps(report, indent=2)
    path.write_text(found + "\n")
    print(found)


def measure(dtype: str, effort: Effort, parts: list[str]) -> dict[str, Any]:
    """The parts, one after the other."""
    command = f"python -m loadtest.metrics --dtype {dtype}"
    if effort != Effort(ROUNDS, ADAPTERS):
        command += f" --rounds {effort.rounds} --adapters {effort.adapters}"
    if parts != list(PARTS):
        command += f" --parts {' '.join(parts)}"
    return {**stamp(command), "dtype": dtype, **{part: PARTS[part](dtype, effort) for part in parts}}


def step(_dtype: str, _effort: Effort) -> dict[str, float]:
    """Microseconds a step, whatever the model."""
    counting: Any = Counting()
    rows = [SimpleNamespace(last=0.0, request=SimpleNamespace(kind="shared")) for _ in range(ROWS)]
    work = [SimpleNamespace(count=1)] * ROWS
    start = time.perf_counter()
    for at in range(STEPS):
        for part in clock.PARTS:
            counting.clock.mark(part)
        counting.step("shared", 0.03, work)
        for row in rows:
            counting.token(row, at * 0.03)
    return {"us": (time.perf_counter() - start) / STEPS * 1e6}


def streams(dtype: str, effort: Effort) -> dict[str, float]:
    """Tokens a second where everything is counted, and where nothing is."""
    found = by_turns(dtype, {"counted": "server.cli", "uncounted": "loadtest.uncounted"}, effort.rounds)
    low, middle, high = np.quantile(found.ratios(), (0.25, 0.5, 0.75))
    return {f"{name}_tokens_per_s": rate for name, rate in found.rates().items()} | {
        "counted / uncounted": float(middle),
        "counted / uncounted, lower quartile": float(low),
        "counted / uncounted, upper quartile": float(high),
    }


def scrape(dtype: str, effort: Effort) -> dict[str, float]:
    """Milliseconds, and the series that there are."""
    folder = materialise()
    with tempfile.TemporaryDirectory() as data:
        process, url = serve(Path(data) / "server", dtype=dtype, device="cpu")
        try:
            with httpx.Client(base_url=url, timeout=120) as http, ThreadPoolExecutor(AT_ONCE) as threads:
                names = [_put(http, Adapter(at, 1, "attention"), folder) for at in range(effort.adapters)]
                list(threads.map(lambda name: _ask(http, name), names))
                alone = _pings(http, lambda: time.sleep(0.02))
                took: list[float] = []
                beside = _pings(http, lambda: took.append(_read(http)))
                series = sum(not line.startswith("#") for line in http.get("/metrics").text.splitlines())
        finally:
            process.stop()
    return {
        "registered": effort.adapters,
        "series": series,
        "ms": statistics.median(took) * 1e3,
        "healthz_max_ms, alone": max(alone) * 1e3,
        "healthz_max_ms, beside": max(beside) * 1e3,
    }


def _put(http: httpx.Client, adapter: Adapter, base: Path) -> str:
    upload(http, adapter.name, adapter.config(), adapter.weights(base))
    return adapter.name


def _ask(http: httpx.Client, name: str) -> None:
    body = {"adapter": name, "prompt": [100, 200, 300], "max_tokens": 1}
    http.post("/v1/generate", json=body).raise_for_status()


def _read(http: httpx.Client) -> float:
    start = time.perf_counter()
    http.get("/metrics").raise_for_status()
    return time.perf_counter() - start


def _pings(http: httpx.Client, busy: Any) -> list[float]:
    """Seconds of each `/healthz` while `busy` is called SCRAPES times."""
    over, found = threading.Event(), list[float]()

    def ping() -> None:
        while not over.is_set():
            start = time.perf_counter()
            http.get("/healthz").raise_for_status()
            found.append(time.perf_counter() - start)

    thread = threading.Thread(target=ping)
    thread.start()
    try:
        for _ in range(SCRAPES):
            busy()
    finally:
        over.set()
        thread.join()
    return found


PARTS = {"step": step, "streams": streams, "scrape": scrape}

if __name__ == "__main__":
    main()
