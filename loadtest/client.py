"""Sends requests and notes when each part of their streams arrived.

Server and client share the cores, so that what a chunk costs here is taken from what is measured. aiohttp takes half of
what httpx does for it: 50 instead of 110 us, its HTTP parser being compiled.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp

from loadtest.dialects import Dialect, authorization
from loadtest.workload import Request

LINE = 1 << 20  # bytes; the longest line of a stream
TIMEOUT = 600.0


@dataclass(slots=True)
class Trace:
    """What became of one request. Times are seconds on the run's clock.

    `due` is when it was meant to be sent, None in a closed loop; `times` is when each chunk with tokens arrived.
    """

    request: Request
    due: float | None = None
    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    end: float = 0.0
    tokens: int = 0
    cold: bool | None = None
    error: str | None = None

    @property
    def start(self) -> float:
        """What latencies are counted from."""
        return self.sent if self.due is None else self.due

    @property
    def ttft(self) -> float:
        """From due to the first token, in seconds; needs one."""
        return self.times[0] - self.start

    @property
    def total(self) -> float:
        """From due to the end, in seconds."""
        return self.end - self.start

    @property
    def gaps(self) -> list[float]:
        """Seconds between the chunks with tokens."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


class Fault(Exception):
    """A request failed; the message is the reason that the report counts it under."""


class Client:
    """One server, and the `key` to it where it needs one. Every request has a connection of its own: none waits for
    another's, and none is found closed."""

    def __init__(self, url: str, dialect: Dialect, timeout: float = TIMEOUT, key: str | None = None):
        self._headers = authorization(key)
        self._url, self._dialect = url.rstrip("/") + dialect.path, dialect
        self._timeout = aiohttp.ClientTimeout(total=timeout)

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=self._timeout,
            read_bufsize=LINE,
            headers=self._headers,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def send(self, trace: Trace, start: float) -> None:
        """Sends the trace's request now and notes in it what comes; what goes wrong is its `error`, not an exception.

        `start` is the `time.perf_counter()` that the run's clock counts from.
        """
        request = trace.request
        body = self._dialect.body(request.adapter, request.prompt(), request.output_tokens)
        trace.sent = time.perf_counter() - start
        try:
            await self._stream(body, trace, start)
        except Fault as fault:
            trace.error = str(fault)
        except TimeoutError:
            trace.error = "timeout"
        except (aiohttp.ClientError, OSError) as fault:
            trace.error = f"connection: {type(fault).__name__}"
        except (ValueError, KeyError, TypeError, IndexError) as fault:
            trace.error = f"not a chunk of this API: {type(fault).__name__}"
        except asyncio.CancelledError:
            trace.error = "cut off"
            raise
        finally:
            trace.end = time.perf_counter() - start

    async def _stream(self, body: dict[str, Any], trace: Trace, start: float) -> None:
        ended = False
        async with self._session.post(self._url, json=body) as response:
            if response.status != 200:
                raise Fault(_reason(response.status, await response.text()))
            async for line in response.content:
                if not line.startswith((b"data: {", b"error: {")):
                    continue
                now = time.perf_counter() - start
                chunk = json.loads(line[line.index(b"{") :])
                if "error" in chunk or line.startswith(b"error"):
                    raise Fault(f"in the stream: {_told(chunk)}")
                piece = self._dialect.read(chunk)
                # A lone token without text of its own, such as half of a character, shows in the total only.
                if piece.tokens or (piece.total and not trace.times):
                    trace.times.append(now)
                    trace.tokens += piece.tokens
                if piece.total is not None:
                    trace.tokens = piece.total
                if piece.cold is not None:
                    trace.cold = trace.cold or piece.cold
                ended = ended or piece.last
        if not ended:
            raise Fault("the stream just stopped")
        if not trace.times:
            raise Fault("no token")


def _reason(status: int, text: str) -> str:
    try:
        return f"{status} {_told(json.loads(text))}"
    except ValueError:
        return str(status)


def _told(body: Any) -> str:
    """The code, type or message of an error, whichever is there first."""
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return str(error)[:100]
    told = next((error[key] for key in ("code", "type", "message") if isinstance(error.get(key), str)), "error")
    return told[:100]
