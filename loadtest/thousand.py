"""A thousand registered adapters, Zipf requests, a RAM budget for 200 of them and 32 slots: what it does to the rows.

`python -m loadtest.thousand` registers them over HTTP, then measures three things on one server: 16 streams over 16
resident adapters (workload `thousand-resident`); as many over all of them (`thousand-zipf`); and a new adapter, put and
used for the first time while 15 streams run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from loadtest import adapters, tiers
from loadtest.adapters import Adapter
from loadtest.client import Client, Trace
from loadtest.compare import RESULTS
from loadtest.dialects import Onebase
from loadtest.measure import Target, measure
from loadtest.peers.onebase import serve
from loadtest.peers.peer import Process
from loadtest.progress import bar
from loadtest.runner import run
from loadtest.stamp import stamp
from loadtest.workload import Request, Workload, change, load
from server.model.bundled import materialise

SLOTS, RAM_ADAPTERS = 32, 200
LENGTH, OTHERS, LONG = 64, 15, 100  # of the third part: tokens in, streams beside it, their tokens out
SETTLED = 4.0  # seconds after which the other streams are past their prefill
FLOAT32 = 4


def main() -> None:
    """Writes `results/thousand.json` and prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=192, help="of each of the first two parts")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory")
    arguments = parser.parse_args()
    report = thousand(arguments.requests)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "thousand.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def thousand(requests: int) -> dict[str, Any]:
    """One server, all three parts."""
    base = materialise()
    few, all_ = (change(load(f"thousand-{name}"), requests=requests) for name in ("resident", "zipf"))
    needed = adapters.of(all_)
    values = sum((out + into) * needed[0].rank for out, into in adapters.shapes(base, all_.targets).values())
    budget = RAM_ADAPTERS * values * FLOAT32
    command = f"python -m loadtest.thousand --requests {requests}"
    with tempfile.TemporaryDirectory() as folder:
        process, url = serve(Path(folder) / "server", adapter_slots=SLOTS, ram_cache_bytes=budget, dtype="float32")
        try:
            uploads = _register(url, needed, base)
            dialect = Onebase([adapter.name for adapter in needed] + ["brand-new"])
            target = Target(url, "onebase", dialect)
            return {
                **stamp(command),
                "adapters": len(needed),
                "adapter_bytes_in_ram": values * FLOAT32,
                "ram_budget_bytes": budget,
                "slots": SLOTS,
                "upload_p50_s": round(float(np.quantile(uploads, 0.5)), 4),
                "upload_p99_s": round(float(np.quantile(uploads, 0.99)), 4),
                "resident": _part(target, process, few),
                "zipf": _part(target, process, change(all_, seed=2)),
                "new_adapter": asyncio.run(_new_adapter(target, len(needed), base)),
            }
        finally:
            process.stop()


def _register(url: str, needed: list[Adapter], base: Path) -> list[float]:
    """Seconds that each upload took, one after the other."""
    seconds = []
    with httpx.Client(base_url=url, timeout=120) as http, bar("adapters", len(needed)) as tick:
        for adapter in needed:
            config, weights = adapter.config(), adapter.weights(base)
            start = time.perf_counter()
            adapters.upload(http, adapter.name, config, weights)
            seconds.append(time.perf_counter() - start)
            tick()
    return seconds


def _part(target: Target, process: Process, workload: Workload) -> dict[str, Any]:
    """The figures of one workload that are looked at, and what the server's memory came to."""
    with _peak(process) as peak:
        report, _ = measure(target, workload, command="", progress=bar)
    gaps, cold = report["gap_ms"], report["cold"]
    held = (tiers.metrics(target.url) or {}).get("onebase_adapter_bytes{ram}", 0)
    return {
        "requests": report["requests"]["sent"],
        "errors": report["requests"]["failed"],
        "tokens_per_s": round(report["tokens_per_s"], 1),
        **{f"gap_{name}_ms": round(gaps[name], 1) for name in ("p50", "p99", "max")},
        "ttft_warm_p50_ms": _median(cold["warm_ttft_ms"]),
        "ttft_cold_p50_ms": _median(cold["ttft_ms"]),
        "cold": cold["requests"],
        "found_on": report["tiers"],
        "ram_bytes_used": int(held),
        "server_rss_peak_mib": round(peak[0] / 1024**2),
    }


async def _new_adapter(target: Target, number: int, base: Path) -> dict[str, Any]:
    """15 streams run; a new adapter is put and asked for one token."""
    others = [Request(at, None, at, LENGTH, LONG, 99) for at in range(OTHERS)]
    new = Adapter(number, 4, "attention")
    async with Client(target.url, target.dialect) as client:
        beside = asyncio.create_task(run(client, others, streams=OTHERS, seconds=600))
        await asyncio.sleep(SETTLED)
        start = time.perf_counter()
        await asyncio.to_thread(_put, target.url, new, base)
        put = time.perf_counter() - start
        first = Trace(Request(0, None, number, LENGTH, 1, 98))
        await client.send(first, start)
        usable = time.perf_counter() - start
        gaps = [gap * 1e3 for trace in (await beside).traces for gap in trace.gaps[4:]]
    return {
        "put_s": round(put, 3),
        "put_and_first_token_s": round(usable, 3),
        "error": first.error,
        "others_gap_p50_ms": round(float(np.median(gaps)), 1),
        "others_gap_max_ms": round(max(gaps), 1),
    }


def _put(url: str, adapter: Adapter, base: Path) -> None:
    with httpx.Client(base_url=url, timeout=120) as http:
        adapters.upload(http, "brand-new", adapter.config(), adapter.weights(base))


@contextmanager
def _peak(process: Process) -> Iterator[list[int]]:
    """The most resident bytes of the server while the block runs, in a list of one."""
    server, most, ended = psutil.Process(process.popen.pid), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.25):
            most[0] = max(most[0], server.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        ended.set()
        watcher.join()


def _median(times: dict[str, float] | None) -> float:
    return round(times["p50"], 1) if times else 0.0


if __name__ == "__main__":
    main()
