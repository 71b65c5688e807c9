"""What tenants cost, and what one does to another: `python -m loadtest.tenants`, over HTTP.

- `fair`: a tenant's closed loops alone, then beside a tenant of the same weight that has flooded the server.
- `auth`: a tiny request to a server with AUTH on and to one with AUTH off, by turns.
- `metering`: 16 streams on the server, and on one whose ledger writes nothing down (`loadtest/unmetered.py`), by turns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from loadtest.client import Client, Trace
from loadtest.compare import RESULTS
from loadtest.dialects import Onebase
from loadtest.lanes import Bench, Seen, Stream
from loadtest.pairs import by_turns, serving
from loadtest.stamp import again, stamp
from loadtest.workload import Request

COUNTS = (4, 16)  # closed-loop streams of the tenant that is looked at
PROMPT, NEW = 128, 64  # of its requests
FLOOD, LONG, MANY = 500, 512, 256  # requests of the other, their prompts and their answers, in tokens
WINDOW = 120.0  # seconds that each number of streams is looked at, alone and beside the flood
SWAPS = 4  # turns that they are parted into
PAIRS, ROUNDS = 300, 5  # of tiny requests, and of 16 streams
PATIENCE = 120.0  # seconds for a flood to begin, or to be gone


@dataclass(frozen=True)
class Effort:
    """How long is measured."""

    window: float
    pairs: int
    rounds: int


def main() -> None:
    """Writes `results/tenants-<dtype>.json` and prints it. Fewer parts than all take their place in the file that is
    there, which says so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--window", type=float, default=WINDOW, help="seconds that each number of streams is looked at")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of tiny requests with and without AUTH")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of 16 streams with the ledger and without")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory")
    arguments = parser.parse_args()
    effort = Effort(arguments.window, arguments.pairs, arguments.rounds)
    path, parts = arguments.out / f"tenants-{arguments.dtype}.json", arguments.parts
    report = measure(arguments.dtype, effort, parts)
    if path.exists() and set(parts) < set(PARTS):
        report = again(json.loads(path.read_text()), report, parts)
    text = json.dumps(report, indent=2)
    path.write_text(text + "\n")
    print(text)


def measure(dtype: str, effort: Effort, parts: list[str]) -> dict[str, Any]:
    """The parts, one after the other."""
    command = f"python -m loadtest.tenants --dtype {dtype}"
    if effort != Effort(WINDOW, PAIRS, ROUNDS):
        command += f" --window {effort.window:g} --pairs {effort.pairs} --rounds {effort.rounds}"
    if parts != list(PARTS):
        command += f" --parts {' '.join(parts)}"
    return {**stamp(command), "dtype": dtype, **{part: PARTS[part](dtype, effort) for part in parts}}


def fair(dtype: str, effort: Effort) -> dict[str, dict[str, float]]:
    """Tenant `b` alone and beside `a`, by its number of streams; by turns, for machines have moods."""
    found = {}
    with serving(dtype) as server:
        bench = Bench(server.url, [], key=server.keys["b"], window=effort.window / SWAPS)
        bench.run([Stream(prompt=PROMPT, new=NEW, requests=1)] * COUNTS[-1])  # warm
        for count in COUNTS:
            streams = [Stream(prompt=PROMPT, new=NEW)] * count
            alone, beside, given = list[Got](), list[Got](), list[float]()
            for _ in range(SWAPS):
                alone.append(Got.of(*bench.run(streams)))
                with flooded(server.url, server.keys["a"]) as flood:
                    beside.append(Got.of(*bench.run(streams)))
                    given.append(flood.rate())
            found[str(count)] = {
                **{f"alone_{name}": value for name, value in _figures(alone).items()},
                **{f"beside_{name}": value for name, value in _figures(beside).items()},
                "tokens_per_s, beside / alone": statistics.median(
                    one.rate / other.rate for one, other in zip(beside, alone, strict=True)
                ),
                "ttft_p99, beside / alone": _p99(beside) / _p99(alone),
                "the flood's tokens_per_s": statistics.median(given),
            }
    return found


@dataclass(frozen=True)
class Got:
    """What all streams had together: tokens a second, and seconds to each first token."""

    rate: float
    firsts: list[float]

    @classmethod
    def of(cls, seen: list[Seen], seconds: float) -> Got:
        """Of what `Bench.run` gives."""
        return cls(sum(one.tokens for one in seen) / seconds, [first for one in seen for first in one.firsts])


def _figures(turns: list[Got]) -> dict[str, float]:
    firsts = [one for turn in turns for one in turn.firsts]
    return {
        "tokens_per_s": statistics.median(turn.rate for turn in turns),
        "ttft_p50_ms": statistics.median(firsts) * 1e3,
        "ttft_p99_ms": _p99(turns) * 1e3,
        "requests": len(firsts),
    }


def _p99(turns: list[Got]) -> float:
    return float(np.quantile([one for turn in turns for one in turn.firsts], 0.99))


class Flood:
    """Long requests, all at once, that are given up at the end."""

    def __init__(self, url: str, key: str):
        self._url, self._key = url, key
        self._traces = [Trace(Request(at, None, None, LONG, MANY, 13)) for at in range(FLOOD)]
        self._over = threading.Event()
        self._began = time.perf_counter()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    @property
    def begun(self) -> bool:
        """Whether the first token has come. Raises RuntimeError when a request failed."""
        failed = [trace.error for trace in self._traces if trace.error is not None]
        if failed:
            raise RuntimeError(failed[0])
        return any(trace.times for trace in self._traces)

    def rate(self) -> float:
        """What it has got a second since its first token."""
        times = sorted(at for trace in self._traces for at in trace.times)
        return len(times) / (time.perf_counter() - self._began - times[0])

    def stop(self) -> None:
        """Closes the connections."""
        self._over.set()
        self.thread.join()

    async def _run(self) -> None:
        async with Client(self._url, Onebase([]), 3600, self._key) as client:
            tasks = [asyncio.create_task(client.send(trace, self._began)) for trace in self._traces]
            await asyncio.to_thread(self._over.wait)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def flooded(url: str, key: str) -> Iterator[Flood]:
    """The server with a flood on it; idle again afterwards."""
    flood = Flood(url, key)
    flood.thread.start()
    try:
        _until(lambda: flood.begun)
        yield flood
        if not _open(url):
            raise RuntimeError("the flood ended before the measurement did")
    finally:
        flood.stop()
    _until(lambda: not _open(url))


def _open(url: str) -> float:
    """Sequences that wait or run."""
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    names = ("onebase_num_requests_running ", "onebase_num_requests_waiting ")
    return sum(float(line.split()[1]) for line in lines if line.startswith(names))


def _until(holds: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > end:
            raise RuntimeError("the server does not come to rest, or to work")
        time.sleep(0.2)


def auth(dtype: str, effort: Effort) -> dict[str, float]:
    """One token of a short prompt, on a connection that stays open."""
    with serving(dtype, auth="off") as without, serving(dtype) as guarded:
        headers = {"Authorization": f"Bearer {guarded.keys['b']}"}
        with (
            httpx.Client(base_url=without.url, timeout=60) as off,
            httpx.Client(base_url=guarded.url, timeout=60, headers=headers) as on,
        ):
            for http in (off, on) * 5:
                _tiny(http, 0)
            pairs = [(_tiny(off, at), _tiny(on, at)) for at in range(1, effort.pairs + 1)]
    return {
        "off_ms": statistics.median(one for one, _ in pairs) * 1e3,
        "on_ms": statistics.median(other for _, other in pairs) * 1e3,
        "on - off, ms": statistics.median(other - one for one, other in pairs) * 1e3,
    }


def _tiny(http: httpx.Client, number: int) -> float:
    body = {"prompt": [100 + number, 200, 300, 400], "max_tokens": 1}
    start = time.perf_counter()
    http.post("/v1/generate", json=body).raise_for_status()
    return time.perf_counter() - start


def metering(dtype: str, effort: Effort) -> dict[str, float]:
    """Tokens a second with the ledger, and without."""
    found = by_turns(dtype, {"metered": "server.cli", "unmetered": "loadtest.unmetered"}, effort.rounds)
    return {f"{name}_tokens_per_s": rate for name, rate in found.rates().items()} | {
        "metered / unmetered": statistics.median(found.ratios())
    }


PARTS = {"fair": fair, "auth": auth, "metering": metering}

if __name__ == "__main__":
    main()
