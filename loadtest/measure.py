"""One workload against one server, from the warm-up to the report."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

from loadtest import report, tiers
from loadtest.client import TIMEOUT, Client, Trace
from loadtest.dialects import Dialect
from loadtest.progress import Progress, Tick, quiet
from loadtest.runner import GRACE, Run, run
from loadtest.stamp import stamp
from loadtest.workload import Request, Workload, plan, streams, warm


@dataclass(frozen=True)
class Target:
    """A server, how to speak to it, and the key to it where it wants one."""

    url: str
    api: str
    dialect: Dialect
    timeout: float = TIMEOUT
    key: str | None = field(default=None, repr=False)


def measure(
    target: Target, workload: Workload, *, command: str, baseline: bool = False, progress: Progress = quiet
) -> tuple[dict[str, Any], list[Trace]]:
    """The report and the traces that it is made of. With `baseline` the same requests go to the base afterwards.

    Raises BadWorkload when its file of lengths cannot be read.
    """
    requests, stamped = plan(workload), stamp(command)
    base: Run | None = None
    with progress("warm-up", workload.warmup) as tick:
        warmed = asyncio.run(_run(target, warm(workload), replace(workload, seconds=600.0), tick, 4))
    if warmed.interrupted:
        raise KeyboardInterrupt
    before = tiers.counters(target.url)
    with progress("requests", len(requests)) as tick:
        ours = asyncio.run(_run(target, requests, workload, tick))
    after = tiers.counters(target.url)
    if baseline and not ours.interrupted:
        with progress("base", len(requests)) as tick:
            base = asyncio.run(_run(target, [replace(one, adapter=None) for one in requests], workload, tick))
    for_adapters = sum(trace.request.adapter is not None for trace in ours.traces)
    result = {
        **stamped,
        "api": target.api,
        "workload": report.described(workload),
        **report.summary(ours, workload),
        "tiers": tiers.shares(before, after, for_adapters),
        "baseline": None,
    }
    if base is not None:
        summary = report.summary(base, workload)
        result["baseline"] = {**summary, "ratios": report.ratios(result, summary)}
    return result, ours.traces


async def _run(
    target: Target, requests: list[Request], workload: Workload, tick: Tick, at_once: int | None = None
) -> Run:
    async with Client(target.url, target.dialect, target.timeout, target.key) as client:
        return await run(
            client,
            requests,
            streams=at_once or streams(workload),
            seconds=workload.seconds,
            grace=min(GRACE, target.timeout),
            tick=tick,
        )
