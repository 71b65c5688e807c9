"""The process: what it is, its memory, and prometheus_client's own figures of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import Metric

from server import logs
from server.machine import memory_limit
from server.metrics.families import Family

BUILD = Family("gauge", "onebase_build_info", "1, with what runs here.", "1", ("version", "base", "dtype", "device"))
LIMIT = Family(
    "gauge",
    "onebase_memory_limit_bytes",
    "RAM that the process may take: its cgroup's limit, or all there is.",
    "bytes",
)
DEVICE = Family(
    "gauge",
    "onebase_device_memory_bytes",
    "Memory of the CUDA device: used (by anybody), free, and reserved by this process's allocator. Only on CUDA.",
    "bytes",
    ("kind",),
)
DROPPED = Family(
    "counter",
    "onebase_log_lines_dropped",
    "Lines of the log that were not written: whoever reads stderr is too slow, or it could not be written.",
    "lines",
)


@dataclass(frozen=True, slots=True)
class Machine:
    """What runs here. `device` is the CUDA device's memory by kind, empty without one."""

    version: str
    base: str
    dtype: str
    kind: str
    device: Mapping[str, int] = field(default_factory=dict)


def families(machine: Machine) -> Iterator[Metric]:
    """All of this module, and what prometheus_client knows of the process (`process_*`, `python_*`)."""
    yield BUILD.by({(machine.version, machine.base, machine.dtype, machine.kind): 1})
    yield LIMIT.of(memory_limit())
    if machine.device:
        yield DEVICE.by(dict(machine.device))
    yield DROPPED.of(logs.dropped())
    yield from _OWN.collect()


_OWN = CollectorRegistry()
ProcessCollector(registry=_OWN)
PlatformCollector(registry=_OWN)
GCCollector(registry=_OWN)
