"""Sends the requests of a plan: an open loop at the times that they are due, or a closed loop of streams.

In the open loop nothing waits for an answer: a server that stalls does not hold back the requests that come next, and
their latency counts from when they were due ("coordinated omission", Tene 2013). In a closed loop a stall is seen by as
many requests as there are streams, and no more; use it for throughput.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from loadtest.client import Client, Trace
from loadtest.workload import Request

GRACE = 60.0


@dataclass
class Run:
    """What was done. `seconds` is the time from the first request to the end of the last."""

    planned: int
    traces: list[Trace] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False


async def run(
    client: Client,
    requests: list[Request],
    *,
    streams: int | None,
    seconds: float,
    grace: float = GRACE,
    tick: Callable[[Trace], None] = lambda _: None,
) -> Run:
    """Sends `requests`, `streams` at a time, or with None each when it is due.

    Nothing is sent after `seconds`; what has not ended `grace` seconds later is cut off and counts as failed. When the
    task is cancelled, as by Ctrl-C, what is open is cut off and the Run has what was done.
    """
    result, start = Run(len(requests)), time.perf_counter()
    open_: set[asyncio.Task[None]] = set()

    async def one(request: Request, due: float | None) -> None:
        trace = Trace(request, due)
        result.traces.append(trace)
        try:
            await client.send(trace, start)
        finally:
            tick(trace)

    async def stream(left: Iterator[Request]) -> None:
        for request in left:
            if time.perf_counter() - start >= seconds:
                return
            await one(request, None)

    async def generate() -> None:
        for request in requests:
            due = request.due or 0.0
            if due >= seconds:
                return
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            task = asyncio.create_task(one(request, due))
            open_.add(task)
            task.add_done_callback(open_.discard)

    left = iter(requests)
    sending = [asyncio.create_task(generate())] if streams is None else []
    sending += [asyncio.create_task(stream(left)) for _ in range(streams or 0)]
    try:
        async with asyncio.timeout(seconds + grace):
            await asyncio.gather(*sending)
            await asyncio.gather(*open_)
    except TimeoutError:
        pass
    except asyncio.CancelledError:
        result.interrupted = True
    for task in [*sending, *open_]:
        task.cancel()
    await asyncio.gather(*sending, *open_, return_exceptions=True)
    result.seconds = max((trace.end for trace in result.traces), default=time.perf_counter() - start)
    return result
