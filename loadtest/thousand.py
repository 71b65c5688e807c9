"""A thousand registered adapters, Zipf requests, a RAM budget for 200 of them and 32 slots: what it does to the rows.

`python -m loadtest.thousand` registers them over HTTP, then measures three things on one server: 16 streams over 16
resident adapters; the same number of streams over all of them, Zipf-distributed; and a new adapter put and used for
the first time while 15 streams run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from safetensors.torch import load_file, save_file

from loadtest.client import Trace, quantile, stream
from loadtest.compare import RESULTS, link_models, machine
from loadtest.service import Served, put, serving
from loadtest.workload import make_adapters, prompts
from server.model.bundled import DEFAULT_DATA_DIR, materialise

STREAMS = 16
LENGTH, NEW = 64, 48
SLOTS, RAM_ADAPTERS = 32, 200


def main() -> None:
    """Writes `results/thousand.json` and prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=320, help="of the Zipf part")
    parser.add_argument("--zipf", type=float, default=1.0)
    arguments = parser.parse_args()
    report = measure(arguments)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "thousand.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One server, all three parts."""
    base = materialise()
    template = make_adapters(base, DEFAULT_DATA_DIR.expanduser() / "bench" / "thousand", 1, rank=4)[0]
    one = sum(tensor.numel() * 4 for tensor in load_file(template / "adapter_model.safetensors").values())
    with tempfile.TemporaryDirectory() as data:
        link_models(Path(data))
        settings = {"data_dir": data, "adapter_slots": SLOTS, "ram_cache_bytes": RAM_ADAPTERS * one, "dtype": "float32"}
        with serving(Path(data) / "log", **settings) as server:
            names, uploads = _register(server, template, Path(data), arguments.adapters)
            return {
                "when": time.strftime("%Y-%m-%d"),
                "command": f"python -m loadtest.thousand --adapters {arguments.adapters} "
                f"--requests {arguments.requests} --zipf {arguments.zipf}",
                "machine": machine(),
                "adapters": len(names),
                "adapter_bytes_in_ram": one,
                "ram_budget_bytes": RAM_ADAPTERS * one,
                "slots": SLOTS,
                "upload_p50_s": round(quantile(uploads, 0.5), 4),
                "upload_p99_s": round(quantile(uploads, 0.99), 4),
                **asyncio.run(_parts(server, names, template, arguments)),
            }


async def _parts(
    server: Served, names: list[str], template: Path, arguments: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    limits = httpx.Limits(max_connections=2 * STREAMS)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
        rng = random.Random(7)
        weights = [(at + 1) ** -arguments.zipf for at in range(len(names))]
        drawn = rng.choices(names, weights, k=arguments.requests)
        few = names[:STREAMS] * (arguments.requests // STREAMS)
        await _workers(client, names[:STREAMS], 0)  # warm
        return {
            "resident": await _part(client, server, few, 1),
            "zipf": await _part(client, server, drawn, 2),
            "new_adapter": await _new_adapter(client, server, names, template),
        }


async def _part(client: httpx.AsyncClient, server: Served, names: list[str], seed: int) -> dict[str, Any]:
    before = await _metrics(client)
    start = time.perf_counter()
    traces, peak = await _workers(client, names, seed, server)
    seconds = time.perf_counter() - start
    after = await _metrics(client)
    grown = {key: after[key] - before[key] for key in ("ram_hits", "ram_misses", "device_loads")}
    gaps = [gap for trace in traces for gap in trace.gaps]
    cold = [trace.ttft for trace in traces if trace.cold]
    warm = [trace.ttft for trace in traces if not trace.cold]
    return {
        "requests": len(traces),
        "errors": sum(trace.error is not None for trace in traces),
        "tokens_per_s": round(sum(trace.tokens for trace in traces) / seconds, 1),
        "gap_p50_ms": round(quantile(gaps, 0.5) * 1e3, 1),
        "gap_p99_ms": round(quantile(gaps, 0.99) * 1e3, 1),
        "gap_max_ms": round(max(gaps, default=0) * 1e3, 1),
        "ttft_warm_p50_ms": round(quantile(warm, 0.5) * 1e3, 1),
        "ttft_cold_p50_ms": round(quantile(cold, 0.5) * 1e3, 1),
        "cold": len(cold),
        "ram_bytes_used": int(after["ram_bytes"]),
        "server_rss_peak_mib": round(peak / 1024**2),
        **{key: int(value) for key, value in grown.items()},
    }


async def _workers(
    client: httpx.AsyncClient, names: list[str], seed: int, server: Served | None = None
) -> tuple[list[Trace], int]:
    """STREAMS workers, each sending its next request when its last has ended."""
    jobs = list(zip(names, prompts(len(names), LENGTH, seed), strict=True))
    traces: list[Trace] = []
    peak = 0

    async def work() -> None:
        nonlocal peak
        while jobs:
            name, prompt = jobs.pop()
            body = {"adapter": name, "prompt": prompt, "max_tokens": NEW, "ignore_eos": True}
            traces.append(await stream(client, body))
            if server is not None:
                peak = max(peak, psutil.Process(server.pid).memory_info().rss)

    await asyncio.gather(*(work() for _ in range(STREAMS)))
    return traces, peak


async def _new_adapter(client: httpx.AsyncClient, server: Served, names: list[str], template: Path) -> dict[str, Any]:
    """15 streams run; a new adapter is put and asked for one token."""
    bodies = [
        {"adapter": name, "prompt": prompt, "max_tokens": 100, "ignore_eos": True}
        for name, prompt in zip(names, prompts(STREAMS - 1, LENGTH, 99), strict=False)
    ]
    others = [asyncio.create_task(stream(client, body)) for body in bodies]
    await asyncio.sleep(4)
    start = time.perf_counter()
    upload = await asyncio.to_thread(put, server.url, "brand-new", template)
    first = await stream(client, {"adapter": "brand-new", "prompt": prompts(1, LENGTH, 98)[0], "max_tokens": 1})
    usable = time.perf_counter() - start
    gaps = [gap for trace in await asyncio.gather(*others) for gap in trace.gaps[4:]]
    return {
        "put_s": round(upload, 3),
        "put_and_first_token_s": round(usable, 3),
        "error": first.error,
        "others_gap_p50_ms": round(quantile(gaps, 0.5) * 1e3, 1),
        "others_gap_max_ms": round(max(gaps) * 1e3, 1),
    }


def _register(server: Served, template: Path, data: Path, count: int) -> tuple[list[str], list[float]]:
    tensors = load_file(template / "adapter_model.safetensors")
    folder = data / "upload"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((template / "adapter_config.json").read_bytes())
    names, seconds = [], []
    for at in range(count):
        torch.manual_seed(at)
        changed = {key: tensor + 0.001 * torch.randn(tensor.shape[0], 1) for key, tensor in tensors.items()}
        save_file({key: tensor.half() for key, tensor in changed.items()}, folder / "adapter_model.safetensors")
        names.append(f"tenant-{at:04d}")
        seconds.append(put(server.url, names[-1], folder))
    return names, seconds


async def _metrics(client: httpx.AsyncClient) -> dict[str, float]:
    text = (await client.get("/metrics")).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {
        "ram_hits": float(values["onebase_adapter_ram_hits_total"]),
        "ram_misses": float(values["onebase_adapter_ram_misses_total"]),
        "device_loads": float(values["onebase_adapter_device_loads_total"]),
        "ram_bytes": float(values['onebase_adapter_bytes{tier="ram"}']),
    }


if __name__ == "__main__":
    main()
