"""The page for whoever is on call: load, latency, errors, saturation."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from ops.dashboards.panels import Panel, Row, number, of, page, quantile, quantiles, rate, series, total

CALLS = 'route!="health"'  # probes and scrapes would hide how calls go
FAILED = total("onebase_http_responses_total", f'status=~"5..",{CALLS}')
ANSWERED = total("onebase_http_responses_total", CALLS)


def fleet() -> dashboard.Dashboard:
    """Load, latency, errors and saturation of the chosen instances."""
    rows = [
        Row("Now", _now()),
        Row("Load", _load()),
        Row("Latency", _latency()),
        Row("Errors", _errors()),
        Row("Saturation", _saturation()),
    ]
    return page("onebase-fleet", "Fleet", "Is it well? Load, latency, errors and saturation of every server.", rows)


def _now() -> list[Panel]:
    return [
        number(
            "Servers",
            "Instances that Prometheus reaches.",
            "none",
            'sum(up{job="onebase",instance=~"$instance"})',
            least=1,
        ),
        number("Tokens a second", "Tokens generated.", "short", total("onebase_generation_tokens_total")),
        number("Requests", "Requests ended a second, whatever came of them.", "reqps", total("onebase_requests_total")),
        number(
            "First token, p95",
            "95 of 100 requests had their first token within this time.",
            "s",
            quantile(0.95, "onebase_time_to_first_token_seconds"),
            warn=1,
            bad=5,
        ),
        number(
            "Failed",
            "Share of answers with a 5xx status, probes left out; 0 is the aim, and 503 says that a queue is full.",
            "percentunit",
            f"{FAILED} / {ANSWERED}",
            warn=0.001,
            bad=0.01,
        ),
        number(
            "KV cache",
            "Share of the KV blocks in use on the fullest server; at 1 new requests wait and rows are preempted.",
            "percentunit",
            f"max({of('onebase_kv_cache_usage_perc')})",
            warn=0.8,
            bad=0.95,
        ),
    ]


def _load() -> list[Panel]:
    return [
        series(
            "Requests by outcome",
            "How the requests that reached the engine ended. Cancelled ones were left by their clients.",
            "reqps",
            (total("onebase_requests_total", by="outcome"), "{{outcome}}"),
            stacked=True,
        ),
        series(
            "Tokens",
            "Tokens a second: of prompts, those of them found in the prefix cache, and generated ones.",
            "short",
            (total("onebase_prompt_tokens_total"), "prompt"),
            (total("onebase_cached_tokens_total"), "of these, cached"),
            (total("onebase_generation_tokens_total"), "generated"),
        ),
        series(
            "Sequences",
            "In the batch, waiting for room in it, and waiting for their adapter.",
            "short",
            (f"sum({of('onebase_num_requests_running')})", "running"),
            (f"sum({of('onebase_num_requests_waiting')})", "waiting"),
            (f"sum({of('onebase_num_requests_loading')})", "loading"),
        ),
    ]


def _latency() -> list[Panel]:
    return [
        series(
            "Time to first token",
            "From a request's arrival in the engine to its first token; queueing and loading are part of it.",
            "s",
            *quantiles("onebase_time_to_first_token_seconds"),
            warn=1,
            bad=5,
        ),
        series(
            "Time between tokens",
            "What a reader of a stream sees between one token and the next.",
            "s",
            *quantiles("onebase_inter_token_latency_seconds"),
            warn=0.2,
            bad=0.5,
        ),
        series(
            "Whole request",
            "From a request's arrival in the engine to its end.",
            "s",
            *quantiles("onebase_e2e_request_latency_seconds"),
        ),
        series(
            "Where the time goes, p95",
            "Waiting for room or for the adapter, computing the prompt, generating. The largest says where to look.",
            "s",
            (quantile(0.95, "onebase_request_queue_time_seconds"), "queue"),
            (quantile(0.95, "onebase_request_load_time_seconds"), "load"),
            (quantile(0.95, "onebase_request_prefill_time_seconds"), "prefill"),
            (quantile(0.95, "onebase_request_decode_time_seconds"), "decode"),
            width=12,
        ),
        series(
            "Time between tokens by lane, p95",
            "The merged lane is what its tenants pay for: it should stay below the shared one.",
            "s",
            (quantile(0.95, "onebase_inter_token_latency_seconds", "le,lane"), "{{lane}}"),
            width=12,
        ),
    ]


def _errors() -> list[Panel]:
    return [
        series(
            "Answers by status",
            "HTTP answers a second by class of status, probes left out; 429 is a tenant's own limit, 503 the server's.",
            "reqps",
            (total("onebase_http_responses_total", CALLS, by="status"), "{{status}}"),
            stacked=True,
        ),
        series(
            "Refused",
            "Requests that a full queue or a tenant's limit kept out, a second.",
            "reqps",
            (total("onebase_queue_refusals_total", by="reason"), "queue: {{reason}}"),
            (total("onebase_limit_refusals_total", by="code"), "limit: {{code}}"),
        ),
        series(
            "Faults inside",
            "Steps that failed, adapters that could not be loaded, and commits that the database refused, a second.",
            "short",
            (total("onebase_failed_steps_total"), "failed steps"),
            (total("onebase_adapter_load_failures_total"), "adapter loads"),
            (total("onebase_ledger_failures_total"), "ledger commits"),
            bad=0.001,
        ),
    ]


def _saturation() -> list[Panel]:
    full = [
        (f"max({of('onebase_queue_requests')} / {of('onebase_queue_capacity_requests')})", "queue, requests"),
        (f"max({of('onebase_queue_tokens')} / {of('onebase_queue_capacity_tokens')})", "queue, tokens"),
        (f"max({of('onebase_kv_cache_usage_perc')})", "KV blocks"),
        (f"max({of('onebase_adapter_slots_used')} / {of('onebase_adapter_slots')})", "adapter slots"),
    ]
    ram = of("onebase_adapter_bytes", 'tier="ram"'), of("onebase_adapter_capacity_bytes", 'tier="ram"')
    return [
        series(
            "How full",
            "The fullest server; 1 is full. A full queue refuses, full KV blocks preempt, full slots and RAM evict.",
            "percentunit",
            *full,
            (f"max({ram[0]} / {ram[1]})", "adapters in RAM"),
            most=1,
            warn=0.8,
            bad=0.95,
        ),
        series(
            "Memory",
            "Resident memory of the server, and what its machine or container allows.",
            "bytes",
            (of("process_resident_memory_bytes"), "{{instance}}"),
            (of("onebase_memory_limit_bytes"), "limit of {{instance}}"),
        ),
        series(
            "CPU",
            "Cores that the server keeps busy.",
            "short",
            (rate("process_cpu_seconds_total"), "{{instance}}"),
        ),
    ]
