"""From traces to figures. Times in the report are milliseconds; docs/loadtest.md says what each figure means."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.client import Trace
from loadtest.runner import Run
from loadtest.workload import Objective, Workload

LATE_MS = 10.0  # a request sent this much after it was due was held up by this program, not by the server


def summary(run: Run, workload: Workload) -> dict[str, Any]:
    """Everything about one run that follows from its traces."""
    done = [trace for trace in run.traces if trace.error is None]
    tokens = sum(trace.tokens for trace in run.traces)
    seconds = run.seconds or 1.0
    return {
        "requests": {
            "planned": run.planned,
            "sent": len(run.traces),
            "finished": len(done),
            "failed": len(run.traces) - len(done),
            "reasons": dict(Counter(trace.error for trace in run.traces if trace.error).most_common()),
        },
        "interrupted": run.interrupted,
        "seconds": run.seconds,
        "prompt_tokens": sum(trace.request.prompt_tokens for trace in done),
        "output_tokens": tokens,
        "tokens_per_s": tokens / seconds,
        "requests_per_s": len(done) / seconds,
        "ttft_ms": spread(trace.ttft for trace in done),
        "gap_ms": spread(gap for trace in done for gap in trace.gaps),
        "e2e_ms": spread(trace.total for trace in done),
        "lag_ms": _lag(run.traces),
        "goodput": goodput(run.traces, workload.slo, seconds),
        "cold": _cold(done),
        "fairness": {"adapters": _fairness(run.traces), "tenants": None},
    }


def spread(seconds: Iterable[float]) -> dict[str, float] | None:
    """Quantiles in milliseconds, interpolated linearly; None of nothing."""
    values = np.array(list(seconds)) * 1e3
    if not len(values):
        return None
    p50, p90, p99 = np.quantile(values, (0.5, 0.9, 0.99))
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "max": float(values.max())}


def goodput(traces: Sequence[Trace], slo: Objective | None, seconds: float) -> dict[str, float] | None:
    """Requests that kept both limits (DistServe, Zhong et al. 2024): their share of all sent, and how many a second."""
    if slo is None:
        return None
    good = sum(_good(trace, slo) for trace in traces)
    return {
        "ttft_ms": slo.ttft_ms,
        "gap_ms": slo.gap_ms,
        "share": good / len(traces) if traces else 0.0,
        "requests_per_s": good / seconds,
    }


def jain(values: Sequence[float]) -> float | None:
    """Jain's fairness index (Jain, Chiu, Hawe 1984): (sum x)^2 / (n sum x^2), from 1/n to 1; None of nothing."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else None


def ratios(ours: dict[str, Any], base: dict[str, Any]) -> dict[str, float | None]:
    """A run over the same run on the base alone: more is better for tokens, less for times."""
    found: dict[str, float | None] = {"tokens_per_s": _over(ours["tokens_per_s"], base["tokens_per_s"])}
    for kind in ("ttft_ms", "gap_ms", "e2e_ms"):
        for quantile in ("p50", "p99"):
            pair = [(one[kind] or {}).get(quantile) for one in (ours, base)]
            found[f"{kind}.{quantile}"] = _over(*pair)
    return found


def described(workload: Workload) -> dict[str, Any]:
    """The workload as it was run, without what is off and without directories."""
    fields = {key: value for key, value in dataclasses.asdict(workload).items() if value is not None}
    if workload.lengths_file is not None:
        fields["lengths_file"] = Path(workload.lengths_file).name
    return fields


def _good(trace: Trace, slo: Objective) -> bool:
    if trace.error is not None or trace.ttft * 1e3 > slo.ttft_ms:
        return False
    gaps = trace.gaps
    return not gaps or sum(gaps) / len(gaps) * 1e3 <= slo.gap_ms


def _lag(traces: Sequence[Trace]) -> dict[str, Any] | None:
    """How late this program sent what was due; None in a closed loop."""
    lags = [trace.sent - trace.due for trace in traces if trace.due is not None]
    found = spread(lags)
    return None if found is None else {**found, "late": sum(lag * 1e3 > LATE_MS for lag in lags), "limit": LATE_MS}


def _cold(done: Sequence[Trace]) -> dict[str, Any] | None:
    """First tokens of requests whose adapter had to be loaded, beside the others'; None where the API does not say."""
    if not any(trace.cold is not None for trace in done):
        return None
    cold = [trace.ttft for trace in done if trace.cold]
    return {
        "requests": len(cold),
        "ttft_ms": spread(cold),
        "warm_ttft_ms": spread(trace.ttft for trace in done if not trace.cold),
    }


def _fairness(traces: Sequence[Trace]) -> float | None:
    """Jain's index over adapters of the tokens a second that a request got, from due to end, on average; failed: 0."""
    rates: dict[int, list[float]] = defaultdict(list)
    for trace in traces:
        if trace.request.adapter is not None:
            rate = 0.0 if trace.error is not None or trace.total <= 0 else trace.tokens / trace.total
            rates[trace.request.adapter].append(rate)
    return jain([sum(rate) / len(rate) for rate in rates.values()])


def _over(ours: float | None, base: float | None) -> float | None:
    return ours / base if ours is not None and base else None
