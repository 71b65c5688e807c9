"""The figures of engine, cache, ledger and outbox as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine.messages import Stats


class CacheFigures(Protocol):
    """What is read of the RAM tier."""

    @property
    def used_bytes(self) -> int: ...

    @property
    def capacity_bytes(self) -> int: ...
    @property
    def hits(self) -> int: ...
    @property
    def misses(self) -> int: ...
    @property
    def evictions(self) -> int: ...


class EngineCollector(Collector):
    """Reads one snapshot when it is scraped; the hot path pays nothing."""

    def __init__(self, stats: Stats, cache: CacheFigures, registered: int):
        self._stats, self._cache, self._registered = stats, cache, registered

    def collect(self) -> Iterator[Metric]:
        """Yields every family."""
        s, c = self._stats, self._cache
        used = s.blocks_used / s.blocks if s.blocks else 0.0
        yield GaugeMetricFamily("onebase_num_requests_running", "Sequences in the batch.", s.running)
        yield GaugeMetricFamily("onebase_num_requests_waiting", "Sequences waiting for room.", s.waiting)
        yield GaugeMetricFamily("onebase_num_requests_loading", "Requests waiting for their adapter.", s.loading)
        yield GaugeMetricFamily("onebase_kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", used)
        yield GaugeMetricFamily("onebase_adapters_registered", "Adapters that can be named.", self._registered)
        yield GaugeMetricFamily("onebase_adapter_slots", "Device slots.", s.slots)
        yield GaugeMetricFamily("onebase_adapter_slots_used", "Device slots that hold an adapter.", len(s.resident))
        yield from _lanes(s)
        tiers = GaugeMetricFamily("onebase_adapter_bytes", "Bytes of adapters held.", labels=["tier"])
        tiers.add_metric(["ram"], c.used_bytes)
        tiers.add_metric(["device"], s.slot_bytes)
        yield tiers
        yield GaugeMetricFamily("onebase_adapter_ram_capacity_bytes", "What the RAM tier may hold.", c.capacity_bytes)
        evictions = CounterMetricFamily("onebase_adapter_evictions", "Adapters evicted.", labels=["tier"])
        evictions.add_metric(["ram"], c.evictions)
        evictions.add_metric(["device"], s.slot_evictions)
        yield evictions
        yield CounterMetricFamily("onebase_adapter_ram_hits", "Adapters wanted on the device and found in RAM.", c.hits)
        yield CounterMetricFamily("onebase_adapter_ram_misses", "Adapters wanted on the device, not in RAM.", c.misses)
        yield CounterMetricFamily("onebase_adapter_device_loads", "Adapters that arrived on the device.", s.slot_loads)
        prefetches = CounterMetricFamily(
            "onebase_adapter_prefetches", "Adapters brought to RAM before their request had a slot.", labels=["outcome"]
        )
        for outcome in ("used", "unused", "failed"):
            prefetches.add_metric([outcome], s.prefetches.get(outcome, 0))
        yield prefetches
        yield CounterMetricFamily(
            "onebase_num_preemptions", "Sequences computed again for want of blocks.", s.preemptions
        )
        yield CounterMetricFamily("onebase_prompt_tokens", "Prompt tokens read for ended requests.", s.prompt_tokens)
        yield CounterMetricFamily("onebase_cached_tokens", "Of these, found in the prefix cache.", s.cached_tokens)
        yield CounterMetricFamily("onebase_generation_tokens", "Tokens generated.", s.generated_tokens)
        yield CounterMetricFamily("onebase_engine_steps", "Steps of the engine.", s.steps)
        outcomes = CounterMetricFamily("onebase_requests", "Ended requests.", labels=["outcome"])
        for outcome, count in sorted(s.outcomes.items()):
            outcomes.add_metric([outcome], count)
        yield outcomes


def _lanes(s: Stats) -> Iterator[Metric]:
    copies = GaugeMetricFamily("onebase_merged_copies", "Merged copies that take requests.", labels=["by"])
    automatic = sum(one.automatic for one in s.copies.values())
    copies.add_metric(["request"], len(s.copies) - automatic)
    copies.add_metric(["auto"], automatic)
    yield copies
    yield GaugeMetricFamily("onebase_merged_bytes", "Bytes of merged copies.", s.merged_bytes)
    yield CounterMetricFamily(
        "onebase_merged_byte_seconds",
        "Bytes times seconds of the merged copies that were asked for.",
        s.merged_byte_seconds,
    )
    changes = CounterMetricFamily("onebase_lane_changes", "Copies made and given up.", labels=["change", "reason"])
    for (change, reason), count in sorted(s.lane_changes.items()):
        changes.add_metric([change, reason], count)
    yield changes


class LedgerFigures(Protocol):
    """What is read of the ledger."""

    @property
    def lag_seconds(self) -> float: ...
    @property
    def queued(self) -> int: ...

    commits: int
    failures: int


class AdmissionFigures(Protocol):
    """What is read of the tenants' limits: refusals by code, and windows that went over a soft budget."""

    @property
    def refused(self) -> Mapping[str, int]: ...

    soft_warnings: int


class OutboxFigures(Protocol):
    """What is read of the outbox."""

    @property
    def oldest_seconds(self) -> float: ...

    waiting: int
    delivered: int
    parked: int
    dropped: int
    failures: int


class TenantsCollector(Collector):
    """Ledger, limits and outbox (None: events go nowhere). No label names a tenant: whoever scrapes is none of them."""

    def __init__(self, ledger: LedgerFigures, admission: AdmissionFigures, outbox: OutboxFigures | None):
        self._ledger, self._admission, self._outbox = ledger, admission, outbox

    def collect(self) -> Iterator[Metric]:
        """Yields every family."""
        ledger, admission = self._ledger, self._admission
        yield GaugeMetricFamily(
            "onebase_ledger_lag_seconds", "Age of the oldest uncommitted entry.", ledger.lag_seconds
        )
        yield GaugeMetricFamily("onebase_ledger_queued", "Entries that are not committed.", ledger.queued)
        yield CounterMetricFamily("onebase_ledger_commits", "Commits, each of one or more entries.", ledger.commits)
        yield CounterMetricFamily("onebase_ledger_failures", "Commits that the database refused.", ledger.failures)
        refused = CounterMetricFamily("onebase_limit_refusals", "Requests over their tenant's limit.", labels=["code"])
        for code, count in sorted(admission.refused.items()):
            refused.add_metric([code], count)
        yield refused
        yield CounterMetricFamily("onebase_soft_budget_warnings", "Budget windows over it.", admission.soft_warnings)
        if self._outbox is not None:
            yield from _outbox(self._outbox)


def _outbox(figures: OutboxFigures) -> Iterator[Metric]:
    oldest = figures.oldest_seconds
    yield GaugeMetricFamily("onebase_outbox_oldest_seconds", "Age of the oldest undelivered event.", oldest)
    yield GaugeMetricFamily("onebase_outbox_waiting", "Events that are not delivered.", figures.waiting)
    yield CounterMetricFamily("onebase_outbox_failures", "Calls that the sink did not take.", figures.failures)
    events = CounterMetricFamily("onebase_outbox_events", "Events that left the outbox.", labels=["outcome"])
    for outcome in ("delivered", "parked", "dropped"):
        events.add_metric([outcome], getattr(figures, outcome))
    yield events


def make_registry(stats: Stats, cache: CacheFigures, registered: int, tenants: TenantsCollector) -> CollectorRegistry:
    """A registry of our own around one snapshot."""
    registry = CollectorRegistry()
    registry.register(tenants)
    registry.register(EngineCollector(stats, cache, registered))
    return registry
