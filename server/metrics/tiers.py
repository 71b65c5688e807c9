"""Adapters in RAM and on the device, and merged copies."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Protocol

from prometheus_client.core import Metric

from server.engine.stats import Stats
from server.histogram import Histogram
from server.metrics.families import Family


class RamTier(Protocol):
    """What is read of the RAM tier."""

    def __len__(self) -> int: ...

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

    load_seconds: Histogram


_tier = partial(Family, labels=("tier",))

REGISTERED = Family("gauge", "onebase_adapters_registered", "Adapters that can be named.", "adapters")
HELD = _tier("gauge", "onebase_adapters_held", "Adapters held.", "adapters")
BYTES = _tier("gauge", "onebase_adapter_bytes", "Bytes of adapters held.", "bytes")
CAPACITY = _tier("gauge", "onebase_adapter_capacity_bytes", "What the tier may hold; the device has slots.", "bytes")
HITS = _tier(
    "counter",
    "onebase_adapter_hits",
    "device: requests that found their adapter there. ram: adapters that were wanted on the device, or ahead of it, "
    "and found in RAM.",
    "lookups",
)
MISSES = _tier(
    "counter",
    "onebase_adapter_misses",
    "Those that did not; several that wait for one load all count.",
    "lookups",
)
EVICTIONS = _tier("counter", "onebase_adapter_evictions", "Adapters that made room for others.", "adapters")
LOAD_SECONDS = _tier(
    "histogram",
    "onebase_adapter_load_seconds",
    "An adapter's way: from disk to RAM, and from RAM to the device (nothing on the CPU).",
    "seconds",
)
FAILURES = Family(
    "counter", "onebase_adapter_load_failures", "Loads that failed, and with them the requests that waited.", "loads"
)
SLOTS = Family("gauge", "onebase_adapter_slots", "Device slots.", "slots")
USED = Family("gauge", "onebase_adapter_slots_used", "Device slots that hold an adapter.", "slots")
PREFETCHES = Family(
    "counter",
    "onebase_adapter_prefetches",
    "Adapters brought to RAM before their request had a slot.",
    "adapters",
    ("outcome",),
)
COPIES = Family("gauge", "onebase_merged_copies", "Merged copies that take requests.", "copies", ("by",))
MERGED = Family("gauge", "onebase_merged_bytes", "Bytes of merged copies, those being made or left too.", "bytes")
MOST_MERGED = Family("gauge", "onebase_merged_capacity_bytes", "What merged copies may take.", "bytes")
MERGED_SECONDS = Family(
    "counter",
    "onebase_merged_byte_seconds",
    "Bytes times seconds of the merged copies that were asked for.",
    "byte seconds",
)
CHANGES = Family("counter", "onebase_lane_changes", "Copies made and given up.", "copies", ("change", "reason"))
# Shown as 0 from the beginning: no `increase()` sees the first of what appears with it.
_CHANGES = [
    *(("merge", reason) for reason in ("asked", "alone", "throughput", "latency")),
    *(("unmerge", reason) for reason in ("asked", "no_gain", "made_way")),
]


def families(stats: Stats, ram: RamTier, registered: int, merged_capacity: int) -> Iterator[Metric]:
    """All of this module."""
    yield REGISTERED.of(registered)
    yield HELD.by({"ram": len(ram), "device": len(stats.resident)})
    yield BYTES.by({"ram": ram.used_bytes, "device": stats.slot_bytes})
    yield CAPACITY.by({"ram": ram.capacity_bytes})
    yield HITS.by({"ram": ram.hits, "device": stats.slot_hits})
    yield MISSES.by({"ram": ram.misses, "device": stats.slot_misses})
    yield EVICTIONS.by({"ram": ram.evictions, "device": stats.slot_evictions})
    yield LOAD_SECONDS.histograms([(("ram",), ram.load_seconds), (("device",), stats.load_seconds)])
    yield FAILURES.of(stats.load_failures)
    yield SLOTS.of(stats.slots)
    yield USED.of(len(stats.resident))
    yield PREFETCHES.by(dict.fromkeys(("used", "unused", "failed"), 0) | stats.prefetches)
    automatic = sum(one.automatic for one in stats.copies.values())
    yield COPIES.by({"request": len(stats.copies) - automatic, "auto": automatic})
    yield MERGED.of(stats.merged_bytes)
    yield MOST_MERGED.of(merged_capacity)
    yield MERGED_SECONDS.of(stats.merged_byte_seconds)
    yield CHANGES.by({**dict.fromkeys(_CHANGES, 0), **stats.lane_changes})
