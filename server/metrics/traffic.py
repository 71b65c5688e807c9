"""What tenants and adapters do, counted on the event loop as requests end; the busiest by name, the rest as `other`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields

from server.engine.messages import Done, Prices
from server.histogram import Histogram
from server.metrics.top import Top

BASE, OTHER = "(base)", "other"  # no adapter's name has parentheses; a tenant called `other` is counted with the rest
FIRST = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
OUTCOMES = ("finished", "cancelled", "error")
# Shown as 0 from the beginning: no `increase()` sees the first of what appears with it. Others appear when they come.
REFUSED = ("requests_limit", "tokens_limit", "parallel_limit", "budget_exhausted", "queue_share", "uploads_limit")


@dataclass(slots=True)
class AdapterTraffic:
    """What a tenant had of an adapter, or of all. Times are in seconds, `cost` in micro-dollars; `prompt` includes
    `cached`."""

    finished: int = 0
    cancelled: int = 0
    error: int = 0
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    cost: int = 0
    firsts: int = 0
    first_seconds: float = 0.0
    cold: int = 0
    load_seconds: float = 0.0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def absorb(self, other: AdapterTraffic) -> None:
        """Adds all that `other` has counted."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    def count(self, done: Done, cost: int) -> None:
        """A request has ended."""
        setattr(self, done.outcome, getattr(self, done.outcome) + 1)
        self.prompt += done.prompt_tokens
        self.cached += done.cached_tokens
        self.completion += done.completion_tokens
        self.cost += cost
        if done.times.ttft is not None:
            self.firsts += 1
            self.first_seconds += done.times.ttft
        if done.residency.cold:
            self.cold += 1
            self.load_seconds += done.times.load or 0.0
        self.queue_seconds += done.times.queue or 0.0
        self.prefill_seconds += done.times.prefill or 0.0
        self.decode_seconds += done.times.decode or 0.0


@dataclass(slots=True)
class TenantTraffic:
    """What a tenant had: of all adapters together, times to first tokens, refusals by code, priced tokens."""

    all: AdapterTraffic = field(default_factory=AdapterTraffic)
    first: Histogram = field(default_factory=lambda: Histogram(FIRST))
    refused: Counter[str] = field(default_factory=Counter)
    served: float = 0.0

    def absorb(self, other: TenantTraffic) -> None:
        """Adds all that `other` has counted."""
        self.all.absorb(other.all)
        self.first.absorb(other.first)
        self.refused.update(other.refused)
        self.served += other.served

    def count(self, done: Done, cost: int, prices: Prices) -> None:
        """A request has ended."""
        self.all.count(done, cost)
        if done.times.ttft is not None:
            self.first.add(done.times.ttft)
        if done.times.scheduled is not None:
            self.served += (done.prompt_tokens - done.cached_tokens) * prices.prompt
            self.served += done.cached_tokens * prices.cached + done.completion_tokens * prices.completion


@dataclass(frozen=True, slots=True)
class Shown:
    """Copies of the counters, `other` among them: by (tenant, adapter), and by tenant."""

    adapters: list[tuple[tuple[str, str], AdapterTraffic]]
    tenants: list[tuple[str, TenantTraffic]]


class Traffic:
    """The counters, for `most` names each. Used from one thread."""

    def __init__(self, most: int):
        self.adapters: Top[tuple[str, str], AdapterTraffic] = Top(most, AdapterTraffic, reserved=(OTHER, OTHER))
        self.tenants: Top[str, TenantTraffic] = Top(most, TenantTraffic, reserved=OTHER)

    def ended(self, tenant: str, adapter: str | None, done: Done, cost: int, prices: Prices) -> None:
        """A tenant's request has ended, and costs so many micro-dollars."""
        weight = 1.0 + done.prompt_tokens + done.completion_tokens
        self.adapters.of((tenant, adapter or BASE), weight).count(done, cost)
        self.tenants.of(tenant, weight).count(done, cost, prices)

    def refused(self, tenant: str, code: str) -> None:
        """A tenant's request was over its own limits."""
        self.tenants.of(tenant, 1.0).refused[code] += 1

    def shown(self) -> Shown:
        """As it is now."""
        adapters = [(name, _copy(one)) for name, one in self.adapters]
        tenants = [(name, _copied(one)) for name, one in self.tenants]
        return Shown(
            [*adapters, ((OTHER, OTHER), _copy(self.adapters.other))], [*tenants, (OTHER, _copied(self.tenants.other))]
        )


def _copy(one: AdapterTraffic) -> AdapterTraffic:
    fresh = AdapterTraffic()
    fresh.absorb(one)
    return fresh


def _copied(one: TenantTraffic) -> TenantTraffic:
    return TenantTraffic(_copy(one.all), one.first.copy(), Counter(one.refused), one.served)
