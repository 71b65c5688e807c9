"""What a lane of its own gives an adapter, and what it costs the others: `python -m loadtest.lanes`, over HTTP.

Each part is measured in turn on the same server, with the adapter in the shared lane and in its own, or beside the
base; closed loops with new random prompts throughout. Streams without an end begin one after the other, so that they do
not all have a prompt at once.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from loadtest import adapters
from loadtest.adapters import Adapter
from loadtest.client import Client, Trace
from loadtest.compare import RESULTS
from loadtest.dialects import Onebase
from loadtest.peers.onebase import serve
from loadtest.stamp import again, stamp
from loadtest.workload import Request
from server.model.bundled import materialise

ROWS, RANK = 16, 8
LONG = 1024  # tokens of the flood's prompts
PAIRS, ROUNDS = 60, 3  # of requests alone, and of endless streams by turns
SETTLE, WINDOW = 5.0, 15.0  # seconds until endless streams have found their rhythm, and that are then looked at
FLOODED = 8  # requests under the flood and without it
WHOLE = 30  # turns of 16 streams on one adapter, of a request each: a turn's speed wanders by a tenth
_numbers = itertools.count()


@dataclass(frozen=True)
class Stream:
    """One request after the other for one adapter (None: the base), or for one after the other that is `drawn`: so many
    `requests`, or (None) without an end of its own."""

    adapter: int | None = None
    prompt: int = 128
    new: int = 128
    requests: int | None = None
    drawn: Iterator[int] | None = None


@dataclass(frozen=True)
class Seen:
    """What one stream got while it was looked at: times to its first tokens, gaps between tokens, both in seconds, and
    tokens."""

    firsts: list[float]
    gaps: list[float]
    tokens: int


class Bench:
    """A server, with the key to it if it needs one, and streams that are sent to it; endless ones are looked at for
    `window` seconds."""

    def __init__(self, url: str, names: list[str], *, key: str | None = None, window: float = WINDOW):
        self._url, self._names, self._key, self._window = url, names, key, window

    def lane(self, number: int, lane: str) -> None:
        """Moves an adapter."""
        answer = httpx.patch(f"{self._url}/adapters/{self._names[number]}", json={"lane": lane}, timeout=120)
        answer.raise_for_status()

    def run(self, streams: list[Stream]) -> tuple[list[Seen], float]:
        """All at once: what each got, and in how many seconds. These are those until the streams with a number of
        requests were done; if none has one, `window` after SETTLE. Raises RuntimeError when a request fails."""
        return asyncio.run(self._run(streams))

    def rate(self, streams: list[Stream]) -> float:
        """Tokens a second of all streams together."""
        seen, seconds = self.run(streams)
        return sum(one.tokens for one in seen) / seconds

    async def _run(self, streams: list[Stream]) -> tuple[list[Seen], float]:
        start, done = time.perf_counter(), asyncio.Event()
        async with Client(self._url, Onebase(self._names), 600, self._key) as client:
            waits = [0.0 if one.requests else at / len(streams) * SETTLE for at, one in enumerate(streams)]
            loops = [
                asyncio.create_task(self._loop(client, one, start, wait, done))
                for one, wait in zip(streams, waits, strict=True)
            ]
            numbered = [loop for loop, one in zip(loops, streams, strict=True) if one.requests]
            if numbered:
                await asyncio.gather(*numbered)
            else:
                await asyncio.sleep(SETTLE + self._window)
            since, until = 0.0 if numbered else SETTLE, time.perf_counter() - start
            done.set()
            return [_seen(one, since, until) for one in await asyncio.gather(*loops)], until - since

    async def _loop(
        self, client: Client, stream: Stream, start: float, wait: float, done: asyncio.Event
    ) -> list[Trace]:
        traces: list[Trace] = []
        await asyncio.sleep(wait)
        while len(traces) < stream.requests if stream.requests else not done.is_set():
            adapter = stream.adapter if stream.drawn is None else next(stream.drawn)
            traces.append(Trace(Request(next(_numbers), None, adapter, stream.prompt, stream.new, 11)))
            await client.send(traces[-1], start)
            if traces[-1].error is not None:
                raise RuntimeError(traces[-1].error)
        return traces


def _seen(traces: list[Trace], since: float, until: float) -> Seen:
    firsts = [trace.ttft for trace in traces if since <= trace.times[0] < until]
    gaps = [gap for trace in traces for gap, at in zip(trace.gaps, trace.times[1:], strict=True) if since <= at < until]
    return Seen(firsts, gaps, len(firsts) + len(gaps))


def main() -> None:
    """Writes `results/lanes-<dtype>.json` and prints it. With `--only`, one part takes its place in the file that is
    there, which says so."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--only", choices=tuple(PARTS), help="measure this part alone")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory")
    arguments = parser.parse_args()
    path, only = arguments.out / f"lanes-{arguments.dtype}.json", arguments.only
    report = measure(arguments.dtype, (only,) if only else tuple(PARTS))
    if only:
        report = again(json.loads(path.read_text()), report, (only,))
    text = json.dumps(report, indent=2)
    path.write_text(text + "\n")
    print(text)


def measure(dtype: str, names: Sequence[str]) -> dict[str, Any]:
    """The parts of these names, on one server."""
    base, needed = materialise(), [Adapter(at, RANK, "attention") for at in range(ROWS)]
    with tempfile.TemporaryDirectory() as data:
        process, url = serve(Path(data) / "server", dtype=dtype, device="cpu", adapter_slots=ROWS)
        try:
            adapters.register(url, needed, base)
            bench = Bench(url, [one.name for one in needed])
            bench.run([Stream(at, new=4, requests=1) for at in range(ROWS)])  # warm
            parts = {name: PARTS[name](bench) for name in names}
        finally:
            process.stop()
    only = f" --only {names[0]}" if len(names) == 1 else ""
    command = f"python -m loadtest.lanes --dtype {dtype}{only}"
    return {**stamp(command), "dtype": dtype, **parts}


def beside(bench: Bench) -> dict[str, float]:
    """One interactive row beside 15 rows of other adapters, by turns in the shared lane and in its own."""
    streams = [Stream(at) for at in range(ROWS)]
    rates: dict[str, list[float]] = {"shared": [], "merged": []}
    gaps: dict[str, list[float]] = {"shared": [], "merged": []}
    for _ in range(ROUNDS):
        for lane in _lanes(bench):
            (own, *others), seconds = bench.run(streams)
            rates[lane].append(sum(one.tokens for one in others) / seconds)
            gaps[lane].append(statistics.median(own.gaps))
    return {
        "shared_gap_p50_ms": _median(gaps["shared"]),
        "merged_gap_p50_ms": _median(gaps["merged"]),
        "merged / shared gap_p50": _paired(gaps["merged"], gaps["shared"]),
        "the others' tokens_per_s, merged / shared": _paired(rates["merged"], rates["shared"]),
    }


def flood(bench: Bench) -> dict[str, float]:
    """One interactive row under a flood of long prompts; its first token against that of a quiet server."""
    one, prompts = Stream(0, requests=FLOODED), [Stream(at, LONG, 2) for at in range(1, ROWS)]
    bench.lane(0, "merged")
    (quiet,), _ = bench.run([one])
    (own, *_), _ = bench.run([one, *prompts])
    bench.lane(0, "shared")
    (shared, *_), _ = bench.run([replace(one, requests=2), *prompts])
    return {
        "alone_ttft_p50_ms": _median(quiet.firsts),
        "alone_gap_p50_ms": _median(quiet.gaps),
        "ttft_p50_ms": _median(own.firsts),
        "ttft_max_ms": max(own.firsts) * 1e3,
        "gap_p50_ms": _median(own.gaps),
        "gap_p99_ms": _p99(own.gaps),
        "gap_p99 / gap_p50": _p99(own.gaps) / _median(own.gaps),
        "shared_gap_p50_ms": _median(shared.gaps),
        "shared_gap_p99_ms": _p99(shared.gaps),
    }


def whole(bench: Bench) -> dict[str, float]:
    """All 16 rows on one merged adapter against the base; every other turn in the opposite order."""
    bench.lane(0, "merged")
    kinds: dict[str, int | None] = {"base": None, "merged": 0}
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    for at in range(WHOLE):
        for kind in sorted(kinds, reverse=bool(at % 2)):
            rates[kind].append(bench.rate([Stream(kinds[kind], requests=1)] * ROWS))
    bench.lane(0, "shared")
    ratios = [one / other for one, other in zip(rates["merged"], rates["base"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "base_tokens_per_s": statistics.median(rates["base"]),
        "merged / base": middle,
        "merged / base, lower quartile": low,
        "merged / base, upper quartile": high,
    }


def alone(bench: Bench) -> dict[str, float]:
    """One stream alone, request by request on the base and merged: whatever else the machine does meets both alike."""
    bench.lane(0, "merged")
    gaps: dict[int | None, list[float]] = {None: [], 0: []}
    for _ in range(PAIRS):
        for adapter, found in gaps.items():
            (seen,), _ = bench.run([Stream(adapter, new=64, requests=1)])
            found.append(statistics.median(seen.gaps))
    bench.lane(0, "shared")
    return {"base_gap_p50_ms": _median(gaps[None]), "gap, merged / base": _paired(gaps[0], gaps[None])}


def crossover(bench: Bench) -> dict[str, dict[str, float]]:
    """Throughput of all 16 rows when some of them are one adapter's, with its own lane over without."""
    found = {}
    for rows in (1, 4, 8, 12, 15, 16):
        streams = [Stream(at) for at in [0] * rows + list(range(1, ROWS - rows + 1))]
        rates: dict[str, list[float]] = {"shared": [], "merged": []}
        for _ in range(ROUNDS):
            for lane in _lanes(bench):
                rates[lane].append(bench.rate(streams))
        found[str(rows)] = {"merged / shared": _paired(rates["merged"], rates["shared"])}
    return found


PARTS = {"beside": beside, "flood": flood, "whole": whole, "alone": alone, "crossover": crossover}


def _lanes(bench: Bench) -> Iterator[str]:
    """Adapter 0 in the shared lane, then in its own."""
    for lane in ("shared", "merged"):
        bench.lane(0, lane)
        yield lane
    bench.lane(0, "shared")


def _paired(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


def _p99(seconds: list[float]) -> float:
    return float(np.quantile(seconds, 0.99)) * 1e3


def _median(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e3


if __name__ == "__main__":
    main()
