"""How alike tenants are served."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from time import monotonic

from prometheus_client.core import Metric

from server.engine.stats import ShareFigures
from server.metrics.families import Family

WINDOW = 60.0  # seconds that are looked back at
_BETWEEN = 1.0  # seconds from one look to the next, at least: who reads often sees no less far back

FAIRNESS = Family(
    "gauge",
    "onebase_fairness_index",
    "Jain's index over priced tokens by weight, of the tenants that had work in the last minute (as far as the metrics "
    "were read before): 1 is alike, 1 / tenants the least; 1 when fewer than two had.",
    "1",
)


def jain(parts: Sequence[float]) -> float:
    """Jain, Chiu & Hawe 1984, "A Quantitative Measure of Fairness and Discrimination": (sum x)^2 / (n sum x^2)."""
    squares = sum(part * part for part in parts)
    return sum(parts) ** 2 / (len(parts) * squares) if len(parts) > 1 and squares else 1.0


class Fairness:
    """Remembers what tenants had been served when it was last asked. For one thread."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, dict[str, float]]] = deque()

    def index(self, shares: Mapping[str, ShareFigures], now: float | None = None) -> float:
        """Over what has been served since the latest look that is a WINDOW old, or else the first one."""
        now = monotonic() if now is None else now
        if not self._seen or now - self._seen[-1][0] >= _BETWEEN:
            self._seen.append((now, {tenant: share.served for tenant, share in shares.items()}))
        while len(self._seen) > 1 and now - self._seen[1][0] >= WINDOW:
            self._seen.popleft()
        before = self._seen[0][1] if now > self._seen[0][0] else {}
        parts = []
        for tenant, share in shares.items():
            had = before.get(tenant, 0.0)
            grown = share.served - had if share.served >= had else share.served  # it was forgotten meanwhile
            if grown or share.running or share.waiting:
                parts.append(grown / share.weight)
        return jain(parts)

    def families(self, shares: Mapping[str, ShareFigures]) -> Iterator[Metric]:
        """The index now."""
        yield FAIRNESS.of(self.index(shares))
