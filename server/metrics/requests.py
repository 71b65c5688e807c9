"""Requests: their times by kind of lane, their tokens, how they ended."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from prometheus_client.core import Metric

from server.engine.stats import Stats
from server.metrics.families import Family

_times = partial(Family, "histogram", unit="seconds", labels=("lane",))

TIMES = {
    "first": _times(
        "onebase_time_to_first_token_seconds",
        "From a request's submission to its first token, counted when that came; its adapter's load included.",
    ),
    "gap": _times(
        "onebase_inter_token_latency_seconds", "Between two tokens of an answer, counted for every token but the first."
    ),
    "e2e": _times("onebase_e2e_request_latency_seconds", "From submission to the end, of requests that finished."),
    "queue": _times(
        "onebase_request_queue_time_seconds",
        "Waited for room in a step, adapter at hand; of all that came so far, cancelled ones too.",
    ),
    "load": _times(
        "onebase_request_load_time_seconds",
        "Waited for the adapter; only of requests whose adapter was not on the device.",
    ),
    "prefill": _times(
        "onebase_request_prefill_time_seconds", "From a request's first step to its first token, preemptions included."
    ),
    "decode": _times(
        "onebase_request_decode_time_seconds", "From the first token to the end, of requests that finished."
    ),
}
PROMPT = Family(
    "histogram", "onebase_request_prompt_tokens", "Tokens of the prompts of requests that finished.", "tokens"
)
GENERATION = Family(
    "histogram",
    "onebase_request_generation_tokens",
    "Tokens made by requests that finished, all answers together.",
    "tokens",
)
OUTCOMES = Family("counter", "onebase_requests", "Requests that ended in the engine.", "requests", ("outcome",))
REASONS = Family(
    "counter",
    "onebase_request_success",
    "Answers that ended, by why: stop, length, budget (the tenant's), abort (cancelled) or error. vLLM's name: not all "
    "are a success.",
    "answers",
    ("finished_reason",),
)


def families(stats: Stats) -> Iterator[Metric]:
    """All of this module."""
    counts = stats.counts
    for part, family in TIMES.items():
        yield family.histograms(((lane,), getattr(one, part)) for lane, one in counts.lanes.items())
    yield PROMPT.histograms([((), counts.prompt)])
    yield GENERATION.histograms([((), counts.generation)])
    yield OUTCOMES.by(dict.fromkeys(("cancelled", "error", "finished"), 0) | stats.outcomes)
    yield REASONS.by(dict(counts.reasons))
