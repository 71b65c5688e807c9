"""The engine's figures as others read them: plain values, taken after a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.core import AdapterRef
from server.engine.counts import Counts
from server.histogram import LOAD, Histogram


@dataclass(frozen=True, slots=True)
class CopyFigures:
    """An adapter's merged copy that takes requests. Nobody asked for an `automatic` one."""

    nbytes: int
    pinned: bool
    automatic: bool


@dataclass(frozen=True, slots=True)
class ShareFigures:
    """A tenant's share: the priced tokens it has had, its sequences that wait and run, and its weight."""

    served: float
    waiting: int
    running: int
    weight: float = 1.0


@dataclass(slots=True)
class Stats:
    """A snapshot of the engine for /readyz and /metrics; counters only ever grow. `step_began` is when the step under
    way began, None between steps; `failed_steps` counts those that failed since the last that did not. `slot_bytes`
    are the adapters on the device; requests found theirs there (`slot_hits`) or not, `load_seconds` is how long one
    took from RAM to the device, and `wanted` are the names of those that requests wait for. `prefix_queries` tokens of
    prompts were looked up in the prefix cache, `prefix_hits` found. `prefetches` counts those that have ended by what
    came of them: "used", "unused" or "failed". `copies` are the merged copies that take requests, `merged_bytes` what
    all take; `asked_bytes` is what those take by adapter that were asked for and are there, until their last requests
    have ended, and `merged_byte_seconds` adds that up; `lane_changes` counts them by ("merge" or "unmerge", why).
    `lane_notes` say by (tenant, adapter) why one that asked for a lane of its own is in the shared one. `shares` are
    the tenants with work and those that lately had some; who comes back after a while counts from nothing again.
    """

    counts: Counts = field(default_factory=Counts)
    steps: int = 0
    running: int = 0
    waiting: int = 0
    loading: int = 0
    blocks: int = 0
    blocks_used: int = 0
    block_size: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    step_began: float | None = None
    failed_steps: int = 0
    resident: frozenset[str] = field(default_factory=frozenset)
    slots: int = 0
    slot_bytes: int = 0
    slot_references: int = 0
    slot_evictions: int = 0
    slot_loads: int = 0
    slot_hits: int = 0
    slot_misses: int = 0
    load_failures: int = 0
    load_seconds: Histogram = field(default_factory=lambda: Histogram(LOAD))
    wanted: frozenset[str] = frozenset()
    prefix_queries: int = 0
    prefix_hits: int = 0
    prefetches: dict[str, int] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=dict)
    copies: dict[AdapterRef, CopyFigures] = field(default_factory=dict)
    merged_bytes: int = 0
    asked_bytes: dict[AdapterRef, int] = field(default_factory=dict)
    merged_byte_seconds: float = 0.0
    lane_changes: dict[tuple[str, str], int] = field(default_factory=dict)
    lane_notes: dict[tuple[str, str], str] = field(default_factory=dict)
    shares: dict[str, ShareFigures] = field(default_factory=dict)
