"""A metric family: said once, with its help and its unit, and filled when somebody reads the metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from server.histogram import Histogram

FAMILIES: list[Family] = []  # every one; docs/metrics.md is written from it
PRIVATE = frozenset({"tenant", "adapter", "running_lora_adapters", "waiting_lora_adapters"})


@dataclass(frozen=True)
class Family:
    """`name` is without the `_total` of a counter. Histograms and counters are of `unit` too; a gauge without one has
    the unit `1`."""

    kind: Literal["gauge", "counter", "histogram"]
    name: str
    help: str
    unit: str
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        FAMILIES.append(self)

    @property
    def shown(self) -> str:
        """The name that is asked for in PromQL."""
        return f"{self.name}_total" if self.kind == "counter" else self.name

    @property
    def private(self) -> bool:
        """Whether a label names a tenant or an adapter."""
        return not PRIVATE.isdisjoint(self.labels)

    def of(self, value: float) -> Metric:
        """The family of one value."""
        return self.by({(): value})

    def by(self, values: Mapping[Any, float]) -> Metric:
        """The family with a value for each of its labels' values, a tuple or, of one label, itself."""
        kind = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        metric = kind(self.name, self.help, labels=self.labels)
        for labels, value in values.items():
            metric.add_metric((labels,) if isinstance(labels, str) else labels, value)
        return metric

    def histograms(self, values: Iterable[tuple[tuple[str, ...], Histogram]]) -> Metric:
        """The family of histograms, by their labels' values."""
        metric = HistogramMetricFamily(self.name, self.help, labels=self.labels)
        for labels, one in values:
            buckets = [(floatToGoString(bound), float(count)) for bound, count in one.cumulative()]
            metric.add_metric(labels, buckets, one.sum)
        return metric
