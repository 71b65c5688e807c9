"""What the first use of an adapter on disk adds to the time to its first token, alone and beside busy streams.

`python -m loadtest.cold` puts adapters over HTTP on a server that keeps none in RAM, then asks each for one token
twice, with different prompts of one length: the first time it comes from disk, the second time it is on the device.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from loadtest import adapters
from loadtest.adapters import Adapter
from loadtest.compare import RESULTS
from loadtest.peers.onebase import serve
from loadtest.stamp import stamp
from server.model.bundled import materialise

LENGTH = 64
STREAMS = 15
RANK = 8  # in float16, on attention: 2 MB on disk


def main() -> None:
    """Writes `results/cold.json` and prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=24, help="first uses in each part")
    parser.add_argument("--json", type=Path, default=RESULTS / "cold.json")
    arguments = parser.parse_args()
    report = json.dumps(measure(arguments.adapters), indent=2)
    arguments.json.write_text(report + "\n")
    print(report)


def measure(count: int) -> dict[str, Any]:
    """One server, both parts; times in milliseconds."""
    base = materialise()
    needed = [Adapter(at, RANK, "attention") for at in range(2 * count + STREAMS)]
    with tempfile.TemporaryDirectory() as data:
        settings = {"adapter_slots": len(needed), "ram_cache_bytes": 0, "dtype": "float32"}
        process, url = serve(Path(data) / "server", **settings)
        try:
            adapters.register(url, needed, base)
            parts = asyncio.run(_parts(url, [adapter.name for adapter in needed]))
        finally:
            process.stop()
    return {
        **stamp(f"python -m loadtest.cold --adapters {count}"),
        "adapter_bytes": len(needed[0].weights(base)),
        **parts,
    }


async def _parts(url: str, names: list[str]) -> dict[str, Any]:
    busy, idle, loaded = names[:STREAMS], names[STREAMS::2], names[STREAMS + 1 :: 2]
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=64)) as client:
        for name, prompt in zip(busy[:3], _prompts(3, 1), strict=True):
            await _ask(client, name, prompt)  # warm
        alone = await _part(client, idle, 2)
        async with _streams(client, busy):
            return {"idle": alone, f"beside_{STREAMS}_streams": await _part(client, loaded, 3)}


async def _part(client: httpx.AsyncClient, names: list[str], seed: int) -> dict[str, Any]:
    added, first, second, loads = [], [], [], []
    asked = _prompts(2 * len(names), seed)
    for at, name in enumerate(names):
        cold, residency = await _ask(client, name, asked[2 * at])
        if not residency["cold"]:
            raise RuntimeError(f"{name} was on the device already")
        warm, again = await _ask(client, name, asked[2 * at + 1])
        if again["cold"]:
            raise RuntimeError(f"{name} is not on the device")
        first.append(cold)
        second.append(warm)
        added.append(cold - warm)
        loads.append(residency["load_ms"])
    return {
        "first_uses": len(names),
        "added_p50_ms": round(statistics.median(added), 1),
        "added_p90_ms": round(float(np.quantile(added, 0.9)), 1),
        "first_p50_ms": round(statistics.median(first), 1),
        "second_p50_ms": round(statistics.median(second), 1),
        "waited_for_adapter_p50_ms": round(statistics.median(loads), 1),
        "waited_for_adapter_p90_ms": round(float(np.quantile(loads, 0.9)), 1),
    }


async def _ask(client: httpx.AsyncClient, name: str, prompt: list[int]) -> tuple[float, dict[str, Any]]:
    """Milliseconds to an answer of one token, and what it says of its adapter."""
    start = time.perf_counter()
    response = await client.post("/v1/generate", json={"adapter": name, "prompt": prompt, "max_tokens": 1})
    response.raise_for_status()
    return (time.perf_counter() - start) * 1e3, response.json()["adapter"]


@contextlib.asynccontextmanager
async def _streams(client: httpx.AsyncClient, names: list[str]) -> AsyncIterator[None]:
    """One endless answer a name, each past its prompt when this is entered."""
    begun = [asyncio.Event() for _ in names]

    async def read(name: str, prompt: list[int], first: asyncio.Event) -> None:
        body = {"adapter": name, "prompt": prompt, "max_tokens": 1500, "ignore_eos": True, "stream": True}
        async with client.stream("POST", "/v1/generate", json=body) as response:
            response.raise_for_status()
            async for _ in response.aiter_lines():
                first.set()

    jobs = zip(names, _prompts(len(names), 4), begun, strict=True)
    tasks = [asyncio.create_task(read(*job)) for job in jobs]
    try:
        await asyncio.gather(*(event.wait() for event in begun))
        yield
        if any(task.done() for task in tasks):
            raise RuntimeError("a stream ended before the measurement did")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _prompts(count: int, seed: int) -> list[list[int]]:
    """Random token ids, no two alike, so that no cache helps."""
    return np.random.default_rng(seed).integers(100, 40_000, (count, LENGTH)).tolist()


if __name__ == "__main__":
    main()
