"""The page on the adapters: where they are, what is loaded over and over, who pays for it in waiting."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from ops.dashboards.panels import Panel, Row, number, of, page, quantile, ranking, rate, series, total

CHOSEN = 'tenant=~"$tenant",adapter=~"$adapter"'
BOTH = "tenant, adapter"
NAMES = "{{tenant}} / {{adapter}}"


def adapters() -> dashboard.Dashboard:
    """Tiers, hit rates, cold starts, churn, and the adapters at the top of each."""
    rows = [
        Row("Now", _now()),
        Row("Tiers", _tiers()),
        Row("Cold starts and churn", _churn()),
        Row("Which adapters", _top()),
        Row("Why a first token is late", _late()),
    ]
    text = "Where the adapters are, which ones are loaded over and over, and what their requests wait for."
    return page("onebase-adapters", "Adapters", text, rows, ("tenant", "adapter"))


def hits(tier: str) -> str:
    """The share of look-ups in a tier that found the adapter there."""
    only = f'tier="{tier}"'
    found, not_found = total("onebase_adapter_hits_total", only), total("onebase_adapter_misses_total", only)
    return f"{found} / ({found} + {not_found})"


def _now() -> list[Panel]:
    held = "onebase_adapters_held"
    return [
        number("Registered", "Adapters that a request can name.", "none", f"sum({of('onebase_adapters_registered')})"),
        number("In RAM", "Adapters that a device slot can be filled from at once.", "none", _sum(held, 'tier="ram"')),
        number("On the device", "Adapters that the next step can use.", "none", _sum(held, 'tier="device"')),
        number("Merged", "Copies of the weights with a lane of their own.", "none", _sum("onebase_merged_copies")),
        number(
            "Found on the device",
            "Share of requests whose adapter was there when they came; the others wait for it.",
            "percentunit",
            hits("device"),
        ),
        number(
            "Loading, p95",
            "What 95 of 100 requests that found their adapter cold waited for it at most, wherever it came from.",
            "s",
            quantile(0.95, "onebase_request_load_time_seconds"),
            warn=0.5,
            bad=2,
        ),
    ]


def _tiers() -> list[Panel]:
    return [
        series(
            "Hit rate by tier",
            "Share of look-ups that found the adapter. Low on the device: more slots. Low in RAM: more RAM.",
            "percentunit",
            (hits("device"), "device"),
            (hits("ram"), "ram"),
            most=1,
        ),
        series(
            "Bytes",
            "Adapters held in each tier, and what RAM may hold.",
            "bytes",
            (f"sum by (tier) ({of('onebase_adapter_bytes')})", "{{tier}}"),
            (f"sum by (tier) ({of('onebase_adapter_capacity_bytes')})", "most in {{tier}}"),
        ),
        series(
            "Slots",
            "Device slots in use, and how many there are. All in use is normal with more adapters than slots.",
            "short",
            (_sum("onebase_adapter_slots_used"), "used"),
            (_sum("onebase_adapter_slots"), "there are"),
        ),
    ]


def _churn() -> list[Panel]:
    loads = "onebase_adapter_load_seconds"
    return [
        series(
            "Evictions",
            "Adapters that made room for others, a second. Many, with many misses: the working set does not fit.",
            "short",
            (total("onebase_adapter_evictions_total", by="tier"), "{{tier}}"),
        ),
        series(
            "Load time by tier",
            "Median and 95th percentile: from disk to RAM, and into a device slot.",
            "s",
            (quantile(0.5, loads, "le,tier"), "p50 {{tier}}"),
            (quantile(0.95, loads, "le,tier"), "p95 {{tier}}"),
        ),
        series(
            "Fetched ahead",
            "Adapters brought to RAM before their request had a slot, by what came of it.",
            "short",
            (total("onebase_adapter_prefetches_total", by="outcome"), "{{outcome}}"),
        ),
    ]


def _top() -> list[Panel]:
    wait, ttft = "onebase_adapter_load_wait_seconds_total", "onebase_adapter_ttft_seconds_total"
    return [
        series(
            "Tokens by adapter",
            "The ten adapters that generate most, a second. Beyond METRICS_TOP names are counted as `other`.",
            "short",
            (f"topk(10, {_by('onebase_adapter_tokens_total', 'kind=~' + _quoted('completion'))})", NAMES),
            stacked=True,
            width=12,
        ),
        series(
            "Cold starts by adapter",
            "Requests a second that had to wait for their adapter: the ones on top thrash.",
            "short",
            (f"topk(10, {_by('onebase_adapter_cold_starts_total')})", NAMES),
            width=12,
        ),
        ranking(
            "Waited for loading",
            "Seconds that requests waited for each adapter, in the chosen time.",
            "s",
            f"topk(20, {_in_all(wait)})",
        ),
        ranking(
            "Mean time to first token",
            "By adapter, in the chosen time: who is slow.",
            "s",
            f"topk(20, {_in_all(ttft)} / ({_in_all('onebase_adapter_ttft_requests_total')} > 0))",
        ),
        ranking(
            "Share of requests that found it cold",
            "By adapter, in the chosen time. Near 1 with many requests: more slots or RAM, or merge it.",
            "percentunit",
            f"topk(20, {_in_all('onebase_adapter_cold_starts_total')}"
            f" / ({_in_all('onebase_adapter_requests_total')} > 0))",
        ),
    ]


def _late() -> list[Panel]:
    wait, ttft = "onebase_adapter_load_wait_seconds_total", "onebase_adapter_ttft_seconds_total"
    firsts = f"({_by('onebase_adapter_ttft_requests_total')} > 0)"
    return [
        series(
            "Why a first token is late, by adapter",
            "Mean seconds to the first token of the ten slowest adapters.",
            "s",
            (f"topk(10, {_by(ttft)} / {firsts})", NAMES),
            width=6,
        ),
        series(
            "... of which waiting for the adapter",
            "Mean seconds of it until the adapter was on the device: more slots, more RAM, or a merged lane.",
            "s",
            (f"topk(10, {_by(wait)} / {firsts})", NAMES),
            width=6,
        ),
        series(
            "... of which waiting for room",
            "Mean seconds of it until a step had room: the batch or the KV cache is full, or the tenant had its share.",
            "s",
            (f"topk(10, {_by('onebase_adapter_queue_wait_seconds_total')} / {firsts})", NAMES),
            width=6,
        ),
        series(
            "... of which computing the prompt",
            "Mean seconds of it from the request's first step: prompts are long, or steps are.",
            "s",
            (f"topk(10, {_by('onebase_adapter_prefill_seconds_total')} / {firsts})", NAMES),
            width=6,
        ),
    ]


def _by(metric: str, more: str = "") -> str:
    return f"sum by ({BOTH}) ({rate(metric, CHOSEN + (',' + more if more else ''))})"


def _in_all(metric: str) -> str:
    """What it grew by in the chosen time."""
    return f"sum by ({BOTH}) (increase({of(metric, CHOSEN)}[$__range]))"


def _sum(metric: str, more: str = "") -> str:
    return f"sum({of(metric, more)})"


def _quoted(text: str) -> str:
    return f'"{text}"'
