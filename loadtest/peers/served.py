"""A peer that is a server: measured over HTTP by the same client as every other."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import statistics

import httpx
import numpy as np

from loadtest.client import Client
from loadtest.dialects import Dialect
from loadtest.peers.peer import Case, Figures, Process
from loadtest.runner import Run, run
from loadtest.workload import Request

LIMIT = 1800.0  # seconds for one case


class Served:
    """A running server."""

    def __init__(self, name: str, dtype: str, process: Process, url: str, dialect: Dialect):
        self.name, self.dtype, self.process = name, dtype, process
        self._url, self._dialect = url, dialect

    def can(self, case: Case) -> bool:
        """Every case."""
        return True

    def measure(self, case: Case, requests: list[Request]) -> Figures:
        """Sends all at the same time."""
        done = asyncio.run(self._run(requests))
        failed = [trace.error for trace in done.traces if trace.error is not None]
        if failed:
            raise RuntimeError(f"{len(failed)} requests failed, the first with: {failed[0]}")
        figures = {
            "seconds": done.seconds,
            "tokens_per_s": sum(trace.tokens for trace in done.traces) / done.seconds,
            "ttft_ms": statistics.median(trace.ttft for trace in done.traces) * 1e3,
        }
        if gaps := [gap for trace in done.traces for gap in trace.gaps]:
            figures["gap_p99_ms"] = float(np.quantile(gaps, 0.99)) * 1e3
        if case.rows == 1 and (trace := done.traces[0]).tokens > 1:
            figures["decode_tokens_per_s"] = (trace.tokens - 1) / (trace.times[-1] - trace.times[0])
        return figures

    async def _run(self, requests: list[Request]) -> Run:
        async with Client(self._url, self._dialect, LIMIT) as client:
            return await run(client, requests, streams=len(requests), seconds=LIMIT)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=5).status_code == 200
    return False
