"""Requests as OpenTelemetry traces."""

import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest

pytest.importorskip("opentelemetry.sdk", reason="needs onebase[otel]")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from server import app
from server.api import spans
from server.api.spans import Spans
from server.settings import Settings
from tests.serving import until

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARTS = ["load", "queue", "prefill", "decode"]
WORDS = "grandmother's blue teapot"


@pytest.fixture
def traced(server, monkeypatch):
    """`traced()` waits for the next request's spans: its own, and those below it in order."""
    return make_traced(server, monkeypatch)


def make_traced(server, monkeypatch):
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(server.state, "traces", Spans(provider, "tiny"))

    def spans_of_one():
        found = until(
            lambda: [one for one in exporter.get_finished_spans() if one.kind == SpanKind.SERVER] and exporter
        )
        all_of_it = found.get_finished_spans()
        exporter.clear()
        *parts, own = all_of_it  # the request's own ends last
        assert own.kind == SpanKind.SERVER
        return own, parts

    spans_of_one.exporter = exporter
    return spans_of_one


def ask(server, trace: str | None = None, **body) -> httpx.Response:
    headers = {"traceparent": trace} if trace else {}
    body = {"prompt": WORDS, "max_tokens": 4, "ignore_eos": True, **body}
    return server.http.post("/v1/generate", json=body, headers=headers)


def within(own, parts) -> None:
    """Each begins where the one before ended, all inside the request's."""
    moments = [own.start_time, *(moment for part in parts for moment in (part.start_time, part.end_time)), own.end_time]
    assert moments == sorted(moments)
    for part, after in itertools.pairwise(parts):
        assert part.end_time == after.start_time
    for part in parts:
        assert part.parent.span_id == own.context.span_id
        assert part.context.trace_id == own.context.trace_id
        assert part.kind == SpanKind.INTERNAL


def test_a_generation(server, traced):
    told = ask(server, adapter="a", temperature=0.5, top_p=0.9, top_k=7).json()
    own, parts = traced()
    assert own.name == "text_completion a"
    assert own.parent is None
    assert own.status.status_code == StatusCode.UNSET
    assert [part.name for part in parts] == PARTS
    within(own, parts)
    said = dict(own.attributes)
    assert said.pop("server.port") == int(server.url.rpartition(":")[2])
    assert said.pop("onebase.request_id").startswith("req-")
    assert said == {
        "http.request.method": "POST",
        "http.route": "/v1/generate",
        "http.response.status_code": 200,
        "server.address": "127.0.0.1",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "onebase",
        "gen_ai.request.model": "a",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 7,
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.stream": False,
        "gen_ai.response.id": told["id"],
        "gen_ai.response.model": "tiny",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": told["usage"]["prompt_tokens"],
        "gen_ai.usage.cache_read.input_tokens": told["usage"]["cached_tokens"],
        "gen_ai.usage.output_tokens": 4,
        "onebase.outcome": "finished",
        "onebase.tenant": "default",
        "onebase.priority": "interactive",
        "onebase.adapter": "a",
        "onebase.version": told["adapter"]["version"],
        "onebase.digest": told["adapter"]["digest"],
        "onebase.lane": "shared",
        "onebase.cold": told["adapter"]["cold"],
        "onebase.cost_microusd": told["usage"]["cost_microusd"],
    }


def test_a_streamed_chat_of_the_base(server, traced):
    chat = [{"role": "user", "content": WORDS}]
    assert ask(server, prompt=None, messages=chat, stream=True).status_code == 200
    own, parts = traced()
    assert own.name == "chat tiny"
    within(own, parts)
    first = (parts[2].end_time - parts[0].start_time) / 1e9
    assert own.attributes["gen_ai.response.time_to_first_chunk"] == pytest.approx(first, abs=1e-6)
    assert (own.attributes["onebase.lane"], own.attributes.get("onebase.adapter")) == ("base", None)


def test_below_the_caller_s_span(server, traced):
    ask(server, f"00-{TRACE}-{CALLER}-01")
    own, parts = traced()
    assert (f"{own.context.trace_id:032x}", f"{own.parent.span_id:016x}") == (TRACE, CALLER)
    assert own.parent.is_remote
    within(own, parts)
    for bad in ("00-zz-00-01", f"00-{'0' * 32}-{CALLER}-01", "x" * 500):
        assert ask(server, bad).status_code == 200
        assert traced()[0].parent is None


@pytest.mark.usefixtures("idle")
def test_a_client_that_goes(server, traced, gate):
    with httpx.Client(base_url=server.url) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/generate", json={"prompt": WORDS, "ignore_eos": True}, timeout=0.5)
        gate.open()
    own, parts = traced()
    assert own.attributes["onebase.outcome"] == "cancelled"
    assert own.attributes["gen_ai.response.finish_reasons"] == ("cancelled",)
    assert own.status.status_code == StatusCode.UNSET, "nobody's fault"
    assert [part.name for part in parts] == PARTS[: len(parts)]
    assert len(parts) >= 3
    within(own, parts)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("stream", [True, False])
def test_a_step_that_fails(server, traced, monkeypatch, stream):
    def broken(work, copy):
        raise RuntimeError("out of something")

    monkeypatch.setattr(server.runner, "run", broken)
    ask(server, stream=stream)
    own, parts = traced()
    assert (own.status.status_code, own.status.description) == (StatusCode.ERROR, "engine_failure")
    assert own.attributes["error.type"] == "engine_failure"
    assert [part.name for part in parts] == PARTS[:3], "it ended before its first token"
    within(own, parts)


def test_what_is_refused(server, traced):
    ask(server, adapter="nobody")
    own, parts = traced()
    assert (own.name, parts) == ("text_completion nobody", [])
    assert own.status.status_code == StatusCode.UNSET, "the client's fault"
    assert (own.attributes["error.type"], own.attributes["onebase.outcome"]) == ("adapter_not_found", "refused")
    ask(server, max_tokens=-1)
    assert traced()[0].name == "POST /v1/generate"


def test_what_is_no_generation(server, traced):
    server.http.get("/healthz")
    server.http.get("/adapters/a")
    own, parts = traced()
    assert (own.name, parts, own.attributes["http.route"]) == ("GET /adapters/{name}", [], "/adapters/{name}")
    server.http.get(f"/no/{WORDS}")
    assert traced()[0].name == "GET"


@pytest.mark.parametrize(
    ("ratio", "flags", "sampled"),
    [("0", None, False), ("1", None, True), ("0", "01", True), ("1", "00", False)],
)
def test_what_is_sampled(server, monkeypatch, ratio, flags, sampled):
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", ratio)
    traced = make_traced(server, monkeypatch)
    told = []
    record = server.state.traces.record
    monkeypatch.setattr(server.state.traces, "record", lambda trail: told.append(record(trail)))
    ask(server, f"00-{TRACE}-{CALLER}-{flags}" if flags else None)
    until(lambda: told)
    assert bool(traced.exporter.get_finished_spans()) == (told[0] is not None) == sampled
    if flags and sampled:
        assert told == [TRACE]


def test_no_prompt_is_in_a_trace(server, traced, monkeypatch):
    monkeypatch.setattr(server.state.settings, "log_prompts", True)
    ask(server, stop=[WORDS])
    own, parts = traced()
    assert WORDS not in "".join(one.to_json() for one in (own, *parts))


def test_an_exporter_that_fails_breaks_nothing(server, monkeypatch):
    class Broken(SpanExporter):
        def export(self, batch):
            raise RuntimeError("no collector")

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(Broken()))
    monkeypatch.setattr(server.state, "traces", Spans(provider, "tiny"))
    for _ in range(3):
        assert ask(server).status_code == 200


def test_a_collector_that_is_down_or_hangs_holds_nothing_up(server, monkeypatch):
    monkeypatch.setattr(spans, "CLOSE_SECONDS", 0.2)
    hangs = threading.Event()
    for taken in ("refuses", "hangs"):
        provider = spans.exporting("http://127.0.0.1:1")
        if taken == "hangs":
            processor = provider._active_span_processor._span_processors[0]
            monkeypatch.setattr(processor.span_exporter, "export", lambda batch: hangs.wait(60))
        traces = Spans(provider, "tiny")
        monkeypatch.setattr(server.state, "traces", traces)
        assert ask(server).status_code == 200
        traces.close()
        assert not hangs.is_set()
    hangs.set()


class Collector(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.calls.append((self.path, dict(self.headers), body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *words):
        pass


@pytest.fixture
def collector():
    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        server.calls = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("standard", [False, True])
def test_a_collector_gets_them(server, monkeypatch, collector, standard):
    url = f"http://127.0.0.1:{collector.server_port}"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-token=secret")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    if standard:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    traces = app.traces(Settings(otlp_endpoint="" if standard else url), server.state.base)
    monkeypatch.setattr(server.state, "traces", traces)
    ask(server, adapter="a")
    until(lambda: traces._provider._active_span_processor._span_processors[0]._batch_processor._queue)
    traces.close()
    path, headers, body = collector.calls[0]
    assert (path, {name.lower(): value for name, value in headers.items()}["x-token"]) == ("/v1/traces", "secret")
    (group,) = ExportTraceServiceRequest.FromString(body).resource_spans
    resource = {one.key: one.value.string_value for one in group.resource.attributes}
    assert (resource["service.name"], resource["deployment.environment"]) == ("mine" if standard else "onebase", "test")
    names = [one.name for scope in group.scope_spans for one in scope.spans]
    assert sorted(names) == sorted([*PARTS, "text_completion a"])
    assert WORDS.encode() not in body


def test_off_unless_asked_for(server, monkeypatch, caplog):
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert app.traces(Settings(), server.state.base) is None
    monkeypatch.setitem(__import__("sys").modules, "server.api.spans", None)  # as without the extra
    assert app.traces(Settings(otlp_endpoint="http://127.0.0.1:1"), server.state.base) is None
    assert "onebase[otel]" in caplog.text


def test_the_log_names_the_trace(server, traced, caplog):
    with caplog.at_level("INFO", "onebase.request"):
        ask(server, f"00-{TRACE}-{CALLER}-01")
        traced()
        lines = until(lambda: [one.msg for one in caplog.records if one.name == "onebase.request"])
    assert lines[0]["trace_id"] == TRACE
    json.dumps(lines[0])
