"""Requests as OpenTelemetry traces, with the semantic conventions for generative AI.

A request's spans are made when it has ended, from the moments that it noted on its way: its steps pay nothing for them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.api.trail import Generation, Trail

CLOSE_SECONDS = 3.0  # a collector that is down must not hold up the end
_SYSTEM = "onebase"


def exporting(endpoint: str) -> TracerProvider:
    """Sends spans to the collector at `endpoint` (OTLP over HTTP, `/v1/traces` below it), or where OpenTelemetry's own
    variables say if it is empty; they also say what is sampled and what headers go with it. Spans wait in a bounded
    queue on a thread of their own; those that do not fit, or that nobody takes, are dropped."""
    address = f"{endpoint.rstrip('/')}/v1/traces" if endpoint else None
    own, given = Resource({"service.name": _SYSTEM, "service.version": version("onebase")}), Resource.create()
    unnamed = str(given.attributes.get("service.name", "")).startswith("unknown_service")
    provider = TracerProvider(resource=given.merge(own) if unnamed else own.merge(given), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=address)))
    return provider


class Spans:
    """A span for each request, below its caller's if it names one; below that of a generation `load`, `queue`,
    `prefill` and `decode`, as far as it came. `base` is the base model's name."""

    def __init__(self, provider: TracerProvider, base: str):
        self._provider, self._base = provider, base
        self._tracer = provider.get_tracer(_SYSTEM, version("onebase"))
        self._propagator = TraceContextTextMapPropagator()

    def record(self, trail: Trail) -> str | None:
        """The id of its trace, None if that is not sampled."""
        assert trail.ended is not None
        span = self._tracer.start_span(
            _name(trail, self._base),
            context=self._propagator.extract(trail.carrier, context=Context()),
            kind=SpanKind.SERVER,
            attributes=_attributes(trail, self._base),
            start_time=trail.nanoseconds(trail.began),
        )
        if not span.is_recording():
            return None
        self._parts(trail, span)
        if trail.outcome == "error" or (trail.status or 0) >= 500:
            span.set_status(Status(StatusCode.ERROR, trail.code))
        span.end(end_time=trail.nanoseconds(trail.ended))
        return format_trace_id(span.get_span_context().trace_id)

    def close(self) -> None:
        """Sends what is left, if that does not take long."""
        ending = threading.Thread(target=self._provider.shutdown, name="traces-end", daemon=True)
        ending.start()
        ending.join(CLOSE_SECONDS)

    def _parts(self, trail: Trail, span: Span) -> None:
        below = set_span_in_context(span, Context())
        for name, start, end in _phases(trail):
            part = self._tracer.start_span(name, context=below, start_time=trail.nanoseconds(start))
            part.end(end_time=trail.nanoseconds(end))


def _phases(trail: Trail) -> Iterator[tuple[str, float, float]]:
    """Each with its start and its end; the one in which the request ended goes up to that."""
    times = trail.times
    if times is None:
        return
    moments = (times.arrived, times.ready, times.scheduled, times.first, times.ended)
    for name, start, end in zip(("load", "queue", "prefill", "decode"), moments, moments[1:], strict=False):
        if start is None:
            return
        yield name, start, times.ended if end is None else end


def _name(trail: Trail, base: str) -> str:
    made = trail.generation
    if made is None:
        return f"{trail.method} {trail.route}" if trail.route else trail.method
    return f"{made.operation} {made.adapter or base}"


def _attributes(trail: Trail, base: str) -> dict[str, Any]:
    host, port = trail.scope.get("server") or (None, None)
    principal = trail.principal
    said = {
        "http.request.method": trail.method,
        "http.route": trail.route,
        "http.response.status_code": trail.status,
        "error.type": trail.code,
        "server.address": host,
        "server.port": port,
        "onebase.request_id": trail.request_id,
        "onebase.outcome": trail.outcome,
        "onebase.tenant": principal.tenant.id if principal else None,
        "onebase.adapter": trail.adapter,
    }
    if trail.generation is not None:
        said |= _generation(trail.generation, base)
    return {name: value for name, value in said.items() if value is not None}


def _generation(made: Generation, base: str) -> dict[str, Any]:
    said: dict[str, Any] = {
        "gen_ai.operation.name": made.operation,
        "gen_ai.provider.name": _SYSTEM,
        "gen_ai.request.model": made.adapter or base,
        "gen_ai.request.stream": made.stream,
        "gen_ai.request.choice.count": made.sampling["n"],
        **{f"gen_ai.request.{name}": made.sampling[name] for name in ("max_tokens", "temperature", "top_p", "top_k")},
        "onebase.priority": made.priority,
    }
    done, entry = made.done, made.entry
    if done is None or entry is None:
        return said
    return said | {
        "gen_ai.response.id": done.id,
        "gen_ai.response.model": base,
        "gen_ai.response.finish_reasons": made.finish_reasons,
        "gen_ai.response.time_to_first_chunk": done.times.ttft if made.stream else None,
        "gen_ai.usage.input_tokens": done.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": done.cached_tokens,
        "gen_ai.usage.output_tokens": done.completion_tokens,
        "onebase.version": entry.record.version,
        "onebase.digest": entry.record.digest,
        "onebase.lane": made.lane,
        "onebase.cold": done.residency.cold,
        "onebase.cost_microusd": entry.record.charge.total,
    }
