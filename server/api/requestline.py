"""The log line of a request that has ended: one, whatever became of it."""

from __future__ import annotations

from typing import Any

from server.api.state import State
from server.api.trail import Generation, Trail
from server.logs import request_logger

_log = request_logger()
_PROBES = frozenset({"/healthz", "/readyz", "/metrics"})  # asked every few seconds
_MOMENTS = ("queue", "load", "prefill", "decode", "ttft", "e2e")


def tell(state: State, trail: Trail) -> None:
    """Sends its trace, where traces are sent, and logs its line."""
    if trail.route in _PROBES:
        _log.debug("request", **fields(trail))
        return
    trace = state.traces.record(trail) if state.traces is not None else None
    level = _log.warning if (trail.status or 0) >= 500 or trail.outcome == "error" else _log.info
    level("request", **fields(trail), **({"trace_id": trace} if trace else {}))


def fields(trail: Trail) -> dict[str, Any]:
    """What the line says. What the request never came to is left out, and so is every word of its client that is no
    adapter's name, but for the prompt where the settings ask for it."""
    assert trail.ended is not None
    principal = trail.principal
    said = {
        "request_id": trail.request_id,
        "method": trail.method,
        "route": trail.route,
        "status": trail.status,
        "code": trail.code,
        "outcome": trail.outcome,
        "tenant": principal.tenant.id if principal else None,
        "key_id": (principal.key_id or None) if principal else None,
        "adapter": trail.adapter,
        "total_ms": _ms(trail.ended - trail.began),
    }
    if trail.generation is not None:
        said |= _generation(trail.generation)
    return {name: value for name, value in said.items() if value is not None}


def _generation(made: Generation) -> dict[str, Any]:
    said = {"stream": made.stream, "priority": made.priority, **made.sampling, "prompt": made.prompt}
    done, entry = made.done, made.entry
    if done is None or entry is None:
        return said
    record = entry.record
    return said | {
        "id": done.id,
        "version": record.version,
        "digest": record.digest,
        "lane": made.lane,
        "cold": done.residency.cold,
        "prompt_tokens": done.prompt_tokens,
        "cached_tokens": done.cached_tokens,
        "completion_tokens": done.completion_tokens,
        "finish_reasons": made.finish_reasons,
        **{f"{name}_ms": _ms(getattr(done.times, name)) for name in _MOMENTS},
        "price_version": record.price_version,
        "cost_microusd": record.charge.total,
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
