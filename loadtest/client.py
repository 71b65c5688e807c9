"""A closed-loop client for `POST /v1/generate`: all requests at once, streamed, every token's time noted."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Trace:
    """One streamed answer. Times are seconds since it was sent; `chunks` the arrival of each chunk."""

    adapter: str | None
    tokens: int = 0
    ttft: float = 0.0
    total: float = 0.0
    cold: bool = False
    chunks: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def gaps(self) -> list[float]:
        """Times between chunks."""
        return [b - a for a, b in zip(self.chunks, self.chunks[1:], strict=False)]


async def stream(client: httpx.AsyncClient, body: dict[str, Any]) -> Trace:
    """Sends one request and reads its stream to the end."""
    trace, start = Trace(body.get("adapter")), time.perf_counter()
    async with client.stream("POST", "/v1/generate", json={**body, "stream": True}) as response:
        if response.status_code != 200:
            trace.error = f"{response.status_code} {(await response.aread()).decode()[:200]}"
            return trace
        async for line in response.aiter_lines():
            if line.startswith("event: error"):
                trace.error = "error event"
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "choices" not in chunk:
                continue
            trace.chunks.append(time.perf_counter() - start)
            trace.cold = trace.cold or chunk["adapter"]["cold"]
            if usage := chunk.get("usage"):
                trace.tokens = usage["completion_tokens"]
    trace.total = time.perf_counter() - start
    trace.ttft = trace.chunks[0] if trace.chunks else trace.total
    return trace


async def at_once(url: str, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    """Sends all `bodies` at the same time; aggregate tokens a second, and the median time to the first token."""
    limits = httpx.Limits(max_connections=len(bodies) + 4)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        start = time.perf_counter()
        traces = await asyncio.gather(*(stream(client, body) for body in bodies))
        seconds = time.perf_counter() - start
    failed = [trace.error for trace in traces if trace.error]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed, the first with: {failed[0]}")
    return {
        "seconds": seconds,
        "tokens_per_s": sum(trace.tokens for trace in traces) / seconds,
        "ttft_p50": statistics.median(trace.ttft for trace in traces),
        "gap_p99": quantile([gap for trace in traces for gap in trace.gaps], 0.99),
        "traces": traces,
    }


def quantile(values: list[float], q: float) -> float:
    """The q-quantile, 0 <= q <= 1; 0.0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0
