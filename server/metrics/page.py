"""All metrics of one moment, as text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from server.engine.stats import ShareFigures, Stats
from server.metrics import customers, engine, http, process, requests, tenants, tiers, vllm
from server.metrics.engine import Queue
from server.metrics.fairness import Fairness
from server.metrics.families import FAMILIES
from server.metrics.process import Machine
from server.metrics.tenants import AdmissionFigures, LedgerFigures, OutboxFigures
from server.metrics.tiers import RamTier
from server.metrics.traffic import Shown

_PRIVATE = frozenset(family.name for family in FAMILIES if family.private)


def ready(
    ledger: LedgerFigures,
    admission: AdmissionFigures,
    outbox: OutboxFigures | None,
    fairness: Fairness,
    shares: Mapping[str, ShareFigures],
) -> list[Metric]:
    """What is taken on the event loop, for a Moment."""
    return [*tenants.families(ledger, admission, outbox), *fairness.families(shares)]


@dataclass(frozen=True, slots=True)
class Moment(Collector):
    """What the event loop hands over: of all that changes under its hands a copy, or families (`ready`). `shown`
    is None for who may not see tenants and adapters by name, `resident` where nobody asked for the `vllm:` metrics;
    else it gives the names of the adapters on the device."""

    stats: Stats
    queue: Queue
    ram: RamTier
    registered: int
    merged_capacity: int
    responses: Mapping[tuple[str, str], int]
    machine: Machine
    ready: Sequence[Metric]
    shown: Shown | None
    resident: Callable[[], Collection[str]] | None

    def collect(self) -> Iterator[Metric]:
        """Every family that may be shown."""
        yield from (metric for metric in self._all() if self.shown is not None or metric.name not in _PRIVATE)

    def text(self) -> bytes:
        """Prometheus text 0.0.4. From any thread."""
        return generate_latest(self)

    def _all(self) -> Iterator[Metric]:
        yield from requests.families(self.stats)
        yield from engine.families(self.stats, self.queue)
        yield from tiers.families(self.stats, self.ram, self.registered, self.merged_capacity)
        yield from http.families(self.responses)
        yield from self.ready
        if self.shown is not None:
            yield from customers.families(self.shown, self.stats.shares)
        yield from process.families(self.machine)
        if self.resident is not None:
            yield from vllm.families(self.stats, self.resident())
