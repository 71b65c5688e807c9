"""The page on the engine: where a step's time goes, what is in the batch, the KV cache, the lanes."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from ops.dashboards.panels import Panel, Row, number, of, page, quantile, quantiles, rate, series, total


def engine() -> dashboard.Dashboard:
    """Step time broken down, batch, KV blocks, prefix cache, lanes and process."""
    rows = [
        Row("Now", _now()),
        Row("Steps", _steps()),
        Row("Batch and KV blocks", _batch()),
        Row("Lanes", _lanes()),
        Row("Process", _process()),
    ]
    return page("onebase-engine", "Engine", "Where a step's time goes, and what is in it.", rows)


def lora_share() -> str:
    """The part of a forward pass that goes into adapters, of the steps that were timed."""
    return f"{total('onebase_lora_seconds_total')} / {total('onebase_forward_sampled_seconds_total')}"


def prefix_hits() -> str:
    """The share of prompt tokens that the prefix cache had."""
    return f"{total('onebase_prefix_cache_hits_total')} / {total('onebase_prefix_cache_queries_total')}"


def _now() -> list[Panel]:
    return [
        number("Steps", "Steps a second, of all lanes.", "short", total("onebase_engine_steps_total")),
        number(
            "A step, p50",
            "Half of the steps take at most this.",
            "s",
            quantile(0.5, "onebase_engine_step_seconds"),
        ),
        number(
            "Tokens a step, mean",
            "Mean of the tokens that a step computes: rows that decode, and pieces of prompts.",
            "short",
            f"{total('onebase_iteration_tokens_total_sum')} / {total('onebase_iteration_tokens_total_count')}",
        ),
        number(
            "LoRA",
            "Share of a forward pass that adapters cost, of the steps that were timed by parts.",
            "percentunit",
            lora_share(),
        ),
        number("Prefix cache hits", "Share of prompt tokens found in it.", "percentunit", prefix_hits()),
        number(
            "Stepping",
            "1 while the engine's thread lives and is not stuck in a step.",
            "none",
            f"min({of('onebase_engine_stepping')})",
            least=1,
        ),
    ]


def _steps() -> list[Panel]:
    return [
        series(
            "Where the engine's time goes",
            "Seconds of each second, by what the engine's thread did, the mean of the servers. Idle is what is free.",
            "percentunit",
            (f"avg by (part) ({rate('onebase_engine_step_part_seconds_total')})", "{{part}}"),
            stacked=True,
        ),
        series(
            "Step time",
            "Median, 95th and 99th percentile. Long ones hold prompts; they are the pauses that streams see.",
            "s",
            *quantiles("onebase_engine_step_seconds"),
        ),
        series(
            "LoRA's share of a step",
            "Of the steps that were timed by parts: what serving adapters costs beside the base.",
            "percentunit",
            (lora_share(), "LoRA"),
            most=1,
        ),
    ]


def _batch() -> list[Panel]:
    return [
        series(
            "Rows a step",
            "Mean rows that decode, and rows with a piece of their prompt.",
            "short",
            (
                f"{total('onebase_batch_rows_sum', by='kind')} / {total('onebase_batch_rows_count', by='kind')}",
                "{{kind}}",
            ),
        ),
        series(
            "Tokens a step",
            "Median, 95th and 99th percentile of what a step computes; MAX_BATCH_TOKENS is its bound.",
            "short",
            *quantiles("onebase_iteration_tokens_total"),
        ),
        series(
            "Preemptions",
            "Sequences a second that gave up their blocks. Raise KV_CACHE_TOKENS, or lower MAX_RUNNING.",
            "short",
            (total("onebase_num_preemptions_total"), "preempted"),
            bad=1,
        ),
        series(
            "KV blocks",
            "In use, and how many there are. Free ones keep prefixes until they are needed.",
            "short",
            (f"sum({of('onebase_kv_cache_blocks_used')})", "used"),
            (f"sum({of('onebase_kv_cache_blocks')})", "there are"),
            width=12,
        ),
        series(
            "Prefix cache",
            "Prompt tokens a second that were looked up, and found.",
            "short",
            (total("onebase_prefix_cache_queries_total"), "looked up"),
            (total("onebase_prefix_cache_hits_total"), "found"),
            width=12,
        ),
    ]


def _lanes() -> list[Panel]:
    return [
        series(
            "Merged copies",
            "Copies that take requests, by who asked: a tenant, or AUTO_MERGE.",
            "short",
            (f"sum by (by) ({of('onebase_merged_copies')})", "{{by}}"),
        ),
        series(
            "Bytes of merged copies",
            "What they take, and MERGED_BYTES.",
            "bytes",
            (f"sum({of('onebase_merged_bytes')})", "merged"),
            (f"sum({of('onebase_merged_capacity_bytes')})", "most"),
        ),
        series(
            "Lane changes",
            "Copies made and given up in the last minutes, and why.",
            "short",
            (f"sum by (change, reason) (increase({of('onebase_lane_changes_total')}[5m]))", "{{change}}: {{reason}}"),
        ),
        series(
            "Step time by lane, p95",
            "A merged step reads the weights once more; the lanes take turns.",
            "s",
            (quantile(0.95, "onebase_engine_step_seconds", "le,lane_kind"), "{{lane_kind}}"),
            width=12,
        ),
        series(
            "Steps by lane",
            "Steps a second of the shared lane and of the merged ones.",
            "short",
            (total("onebase_engine_step_seconds_count", by="lane_kind"), "{{lane_kind}}"),
            width=12,
        ),
    ]


def _process() -> list[Panel]:
    return [
        series(
            "CPU", "Cores that the server keeps busy.", "short", (rate("process_cpu_seconds_total"), "{{instance}}")
        ),
        series(
            "Memory",
            "Resident memory; what grows for days without more adapters is a fault.",
            "bytes",
            (of("process_resident_memory_bytes"), "{{instance}}"),
        ),
        series(
            "Open files",
            "Connections and files, and how many there may be.",
            "short",
            (of("process_open_fds"), "open on {{instance}}"),
            (of("process_max_fds"), "most on {{instance}}"),
        ),
    ]
