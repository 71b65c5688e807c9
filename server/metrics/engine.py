"""The engine: what it has to do, tokens, the KV cache, and where a step's time goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.core import Metric

from server.engine.stats import Stats
from server.metrics.families import Family

RUNNING = Family("gauge", "onebase_num_requests_running", "Sequences in the batch.", "sequences")
WAITING = Family("gauge", "onebase_num_requests_waiting", "Sequences waiting for room or their adapter.", "sequences")
LOADING = Family("gauge", "onebase_num_requests_loading", "Requests waiting for their adapter.", "requests")
PREEMPTIONS = Family("counter", "onebase_num_preemptions", "Sequences computed again for want of blocks.", "sequences")
MOST_REQUESTS = Family(
    "gauge", "onebase_queue_capacity_requests", "Requests that may be open; more are refused.", "requests"
)
MOST_TOKENS = Family(
    "gauge", "onebase_queue_capacity_tokens", "Tokens that open requests may need; more are refused.", "tokens"
)
OPEN_REQUESTS = Family("gauge", "onebase_queue_requests", "Open requests: queued, running, or not read.", "requests")
OPEN_TOKENS = Family("gauge", "onebase_queue_tokens", "Prompt + max_tokens of the open requests.", "tokens")
REFUSALS = Family(
    "counter",
    "onebase_queue_refusals",
    "Requests that were not queued: the queue was full (requests, tokens), or draining or not_ready, all 503; or the "
    "tenant had its share of the queue (429).",
    "requests",
    ("reason",),
)
PROMPT_TOKENS = Family("counter", "onebase_prompt_tokens", "Prompt tokens read for ended requests.", "tokens")
CACHED_TOKENS = Family("counter", "onebase_cached_tokens", "Of these, found in the prefix cache.", "tokens")
GENERATED = Family("counter", "onebase_generation_tokens", "Tokens generated.", "tokens")
PREFIX_QUERIES = Family(
    "counter", "onebase_prefix_cache_queries", "Prompt tokens looked up in the prefix cache, once a sequence.", "tokens"
)
PREFIX_HITS = Family("counter", "onebase_prefix_cache_hits", "Of these, the ones found.", "tokens")
KV_USE = Family("gauge", "onebase_kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", "ratio")
KV_BLOCKS = Family("gauge", "onebase_kv_cache_blocks", "KV blocks.", "blocks")
KV_USED = Family("gauge", "onebase_kv_cache_blocks_used", "KV blocks that sequences hold.", "blocks")
STEPS = Family("counter", "onebase_engine_steps", "Steps computed.", "steps")
STEP_SECONDS = Family(
    "histogram",
    "onebase_engine_step_seconds",
    "Of a step, from its scheduling until its tokens are taken.",
    "seconds",
    ("lane_kind",),
)
PARTS = Family(
    "counter",
    "onebase_engine_step_part_seconds",
    "All seconds of the engine's thread by what it did: schedule (messages and adapters too), pack, forward, sample, "
    "emit (tokens to text, events), idle. On CUDA forward is launching and sample holds the wait for the device.",
    "seconds",
    ("part",),
)
STEP_TOKENS = Family(
    "histogram", "onebase_iteration_tokens_total", "Tokens computed in a step, prompts and decodes.", "tokens"
)
ROWS = Family(
    "histogram",
    "onebase_batch_rows",
    "Rows in a step: of one token (decode), or of more (prefill); steps without any left out.",
    "rows",
    ("kind",),
)
FAILED = Family("counter", "onebase_failed_steps", "Steps that failed, and with them their requests.", "steps")
LAST = Family(
    "gauge", "onebase_engine_last_step_timestamp_seconds", "When the latest step ended; 0: none yet.", "seconds"
)
STEPPING = Family(
    "gauge",
    "onebase_engine_stepping",
    "1 while the engine's thread runs and no step hangs or fails again and again.",
    "1",
)
LORA = Family(
    "counter",
    "onebase_lora_seconds",
    "What adapters took of onebase_forward_sampled_seconds_total. On the CPU the kernels count it in every step; "
    "without them every 64th step is looked into. On CUDA it is every 64th step that is launched from Python (prompts; "
    "decodes only without graphs), looked into by events.",
    "seconds",
)
SAMPLED = Family(
    "counter",
    "onebase_forward_sampled_seconds",
    "Forward passes of the shared lane in which onebase_lora_seconds_total was counted; on CUDA only those with "
    "adapters.",
    "seconds",
)


@dataclass(frozen=True, slots=True)
class Queue:
    """The queue's bounds and what is open of them; refusals by why; whether the engine steps."""

    most_requests: int
    most_tokens: int
    requests: int
    tokens: int
    refused: Mapping[str, int]
    stepping: bool


def families(stats: Stats, queue: Queue) -> Iterator[Metric]:
    """All of this module."""
    yield from _load(stats, queue)
    yield PROMPT_TOKENS.of(stats.prompt_tokens)
    yield CACHED_TOKENS.of(stats.cached_tokens)
    yield GENERATED.of(stats.generated_tokens)
    yield PREFIX_QUERIES.of(stats.prefix_queries)
    yield PREFIX_HITS.of(stats.prefix_hits)
    yield KV_USE.of(stats.blocks_used / stats.blocks if stats.blocks else 0.0)
    yield KV_BLOCKS.of(stats.blocks)
    yield KV_USED.of(stats.blocks_used)
    yield from _steps(stats, queue.stepping)


def _load(stats: Stats, queue: Queue) -> Iterator[Metric]:
    yield RUNNING.of(stats.running)
    yield WAITING.of(stats.waiting)
    yield LOADING.of(stats.loading)
    yield PREEMPTIONS.of(stats.preemptions)
    yield MOST_REQUESTS.of(queue.most_requests)
    yield MOST_TOKENS.of(queue.most_tokens)
    yield OPEN_REQUESTS.of(queue.requests)
    yield OPEN_TOKENS.of(queue.tokens)
    yield REFUSALS.by(dict.fromkeys(("requests", "tokens", "share", "draining", "not_ready"), 0) | dict(queue.refused))


def _steps(stats: Stats, stepping: bool) -> Iterator[Metric]:
    counts = stats.counts
    yield STEPS.of(stats.steps)
    yield STEP_SECONDS.histograms(((kind,), one) for kind, one in counts.steps.items())
    yield PARTS.by(dict(counts.clock.parts))
    yield STEP_TOKENS.histograms([((), counts.tokens)])
    yield ROWS.histograms(((kind,), one) for kind, one in counts.rows.items())
    yield FAILED.of(counts.failed)
    yield LAST.of(counts.last_step)
    yield STEPPING.of(stepping)
    yield LORA.of(counts.clock.lora)
    yield SAMPLED.of(counts.clock.sampled)
