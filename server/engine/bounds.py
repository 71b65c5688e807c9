"""How much may be open at once, and how much of that may be one tenant's."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from server.errors import Overloaded, QueueShare

# So much of the whole a small weight does not take away, where as much is left free.
FEW = 1 / 64


@dataclass(eq=False, slots=True)
class _Part:
    weight: float
    requests: int = 0
    amount: int = 0


class Bounds:
    """At most `max_requests` requests and `max_amount` of `unit` (tokens, say) at once; used from one thread.

    With `shared`, no tenant fills them alone. Up to the half they are anybody's. Above it a tenant may have as much as
    is left free after it, times its weight over the largest weight there (dynamic thresholds: Choudhury & Hahne 1998,
    "Dynamic queue length thresholds for shared-memory packet switches"). So a tenant alone takes half of the room, two
    of one weight a third each, and the rest is there for who comes next. A tenant's first request needs only room, for
    its part may be less than any request; but none is taken that is more than half of it all.
    """

    def __init__(self, max_requests: int, max_amount: int, unit: str, *, shared: bool):
        self.max_requests, self.max_amount, self.unit, self.shared = max_requests, max_amount, unit, shared
        self.requests = self.amount = 0
        self.refused: Counter[str] = Counter()  # by what was full: requests, the unit, or the tenant's share
        self._parts: dict[str, _Part] = {}

    @property
    def largest(self) -> int:
        """The most that one request may be of the amount."""
        return self.max_amount // 2 if self.shared else self.max_amount

    def check(self, tenant: str, weight: float, amount: int) -> None:
        """Whether one more request would be taken. Raises Overloaded when all is full, QueueShare when the tenant has
        its part of it."""
        own = self._parts.get(tenant) or _Part(weight)
        kinds = (
            (self.requests, own.requests, 1, self.max_requests, "requests"),
            (self.amount, own.amount, amount, self.max_amount, self.unit),
        )
        for used, _, more, most, unit in kinds:
            if used + more > most:
                self.refused[unit] += 1
                raise Overloaded(f"the queue is full ({most} {unit})", code="queue_full", retry_after=1)
        if not self.shared or (not own.requests and amount <= self.largest):
            return
        part = weight / max([weight, *(one.weight for one in self._parts.values())])
        for used, held, more, most, unit in kinds:
            free = most - used - more
            if free < most / 2 and held + more > max(part * free, min(FEW * most, free)):
                self.refused["share"] += 1
                raise QueueShare(f"this tenant has its part of the queue's {most} {unit}", retry_after=1)

    def take(self, tenant: str, weight: float, amount: int) -> None:
        """Counts one more request; raises as `check` does. The latest weight says it for all of the tenant's."""
        self.check(tenant, weight, amount)
        part = self._parts.setdefault(tenant, _Part(weight))
        part.weight = weight
        self._count(part, 1, amount)

    def give_back(self, tenant: str, amount: int) -> None:
        """Once for each `take`, with its amount."""
        part = self._parts[tenant]
        self._count(part, -1, -amount)
        if not part.requests:
            del self._parts[tenant]

    def _count(self, part: _Part, requests: int, amount: int) -> None:
        part.requests += requests
        part.amount += amount
        self.requests += requests
        self.amount += amount
