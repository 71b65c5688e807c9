"""Whose step comes next: that of the shared lane, or that of a merged adapter's own. Plain Python, no torch.

Every step of a lane reads weights of its own, so lanes take turns on the device, by weighted fair queueing in levels
(Demers, Keshav & Shenker 1989; in levels, Bennett & Zhang 1997): all merged lanes together against the shared one, then
the tenants that have work in merged lanes, then each tenant's merged lanes. Whoever is furthest behind in time over its
share goes next. Who has nothing to do neither loses nor saves: its clock joins the others' when it comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from time import monotonic

SHARED = ""  # the shared lane's key; a merged lane's is its copy's
MERGED = "#"  # the key of all merged lanes together
# Seconds that a lane with work waits at most, beside the step under way. A merged lane is bought for its latency; the
# shared one gives way while a merged request has no token yet.
MERGED_WAIT, SHARED_WAIT = 0.1, 1.0
# How far the merged lanes' clock may run ahead for that: a second of work at a share of one half.
_DEBT = 2.0
# Seconds that a tenant, or one of its lanes, may run ahead of others for the sake of first tokens.
AHEAD = 1.0


class Urgency(IntEnum):
    """What a request waits for: batch work for nothing in particular, any other for its next token or its first."""

    BATCH, NEXT, FIRST = range(3)


# By lane and tenant: what the tenant's most urgent request in the lane waits for.
Busy = Mapping[str, Mapping[str, Urgency]]


@dataclass(slots=True)
class _Turn:
    clock: float
    since: float  # when it last had a turn, or came with work


class _Clocks:
    """The virtual clocks of some parties."""

    def __init__(self) -> None:
        self.turns: dict[str, _Turn] = {}
        self._busy: frozenset[str] = frozenset()

    def join(self, busy: Collection[str], now: float) -> None:
        """Those who have work now; newcomers begin where the others are. Where there are no others they begin where
        the furthest of all was, or who comes back after them would wait for what was long ago."""
        still = self._busy & set(busy)
        start = self.least(still) if still else max((one.clock for one in self.turns.values()), default=0.0)
        for one in set(busy) - still:
            known = self.turns.get(one)
            self.turns[one] = _Turn(max(start, known.clock) if known else start, now)
        self._busy = frozenset(busy)

    def spent(self, one: str, seconds: float, now: float) -> None:
        """Pushes a clock on; of no effect on one that is no more."""
        turn = self.turns.get(one)
        if turn is not None:
            turn.clock += seconds
            turn.since = now

    def least(self, some: Collection[str]) -> float:
        """The clock of whoever of `some`, who have joined, is furthest behind; 0 for nobody."""
        return min((self.turns[one].clock for one in some), default=0.0)

    def forget(self, one: str) -> None:
        self.turns.pop(one, None)
        self._busy -= {one}


@dataclass(slots=True)
class _Tenant:
    """A tenant's merged lanes, and how much it is to have beside others. It is known as long as one of these lanes
    is."""

    weight: float = 1.0
    lanes: _Clocks = field(default_factory=_Clocks)


class _Merged:
    """The merged lanes among each other, by the tenants whose requests are in them.

    A step is charged to the tenant whose turn it was, whoever else has rows in it: what each has of the steps of one
    lane is settled there (shares.py). So every tenant with work in some lane has its turns, however far the others
    that it shares the lane with may be ahead or behind.
    """

    def __init__(self, weight: Callable[[str], float]):
        self._weight = weight
        self._clocks = _Clocks()  # of tenants
        self._tenants: dict[str, _Tenant] = {}
        self._payers: dict[str, str] = {}  # by lane: who is charged for its next step

    def order(self, busy: Busy, now: float) -> list[str]:
        """The lanes, who is to go first first; each has the place of whoever brings it furthest to the front."""
        lanes: dict[str, list[str]] = {}  # by tenant
        for lane, tenants in busy.items():
            for name in tenants:
                lanes.setdefault(name, []).append(lane)
        self._clocks.join(lanes, now)
        least = self._clocks.least(lanes)
        places: list[tuple[bool, float, float, str, str]] = []
        for name, own in lanes.items():
            tenant = self._tenants.setdefault(name, _Tenant())
            tenant.weight = self._weight(name)
            tenant.lanes.join(own, now)
            clock, first = self._clocks.turns[name].clock, tenant.lanes.least(own)
            may_hurry = (clock - least) * tenant.weight < AHEAD
            for lane in own:
                had = tenant.lanes.turns[lane].clock
                hurries = may_hurry and busy[lane][name] == Urgency.FIRST and had - first < AHEAD
                places.append((not hurries, clock, had, name, lane))
        self._payers = {}
        for *_, name, lane in sorted(places):
            self._payers.setdefault(lane, name)
        return list(self._payers)

    def spent(self, lane: str, seconds: float, now: float) -> None:
        name = self._payers.get(lane, "")
        tenant = self._tenants.get(name)
        if tenant is not None:
            self._clocks.spent(name, seconds / tenant.weight, now)
            tenant.lanes.spent(lane, seconds, now)

    def forget(self, lane: str) -> None:
        for name, tenant in list(self._tenants.items()):
            tenant.lanes.forget(lane)
            if not tenant.lanes.turns:
                del self._tenants[name]
                self._clocks.forget(name)


class Lanes:
    """`share` is what the merged lanes have together of the device's time while the shared lane has work as well;
    `weight` says what part of that a tenant has beside others."""

    def __init__(self, share: float, weight: Callable[[str], float], now: Callable[[], float] = monotonic):
        self.share, self._now = share, now
        self._sides, self._merged = _Clocks(), _Merged(weight)  # SHARED and MERGED; the merged lanes

    def order(self, busy: Busy) -> list[str]:
        """The lanes with work, who is to go first first."""
        now = self._now()
        merged = {lane: tenants for lane, tenants in busy.items() if lane != SHARED}
        self._sides.join([side for side, some in ((SHARED, SHARED in busy), (MERGED, merged)) if some], now)
        lanes = self._merged.order(merged, now)
        if SHARED not in busy or not merged:
            return lanes or list(busy)
        first = self._merged_first(max(max(tenants.values()) for tenants in merged.values()), now)
        return [*lanes, SHARED] if first else [SHARED, *lanes]

    def spent(self, lane: str, seconds: float) -> None:
        """`lane` has had a step of so many seconds; if it was its last, it may be no more."""
        now = self._now()
        if lane == SHARED:
            self._sides.spent(SHARED, seconds / (1 - self.share), now)
        else:
            self._sides.spent(MERGED, seconds / self.share, now)
            self._merged.spent(lane, seconds, now)

    def forget(self, lane: str) -> None:
        """The lane is no more."""
        self._merged.forget(lane)

    def ratio(self) -> float:
        """How much longer than a merged step a shared one may take for both to come in turn."""
        return (1 - self.share) / self.share

    def _merged_first(self, urgency: Urgency, now: float) -> bool:
        """Whether the merged lanes go before the shared one: when they are behind, or in a hurry and not far ahead."""
        merged, shared = self._sides.turns[MERGED], self._sides.turns[SHARED]
        if self._overdue(SHARED, SHARED_WAIT, now):
            return False
        if merged.clock <= shared.clock:
            return True
        hurry = urgency == Urgency.FIRST or (urgency == Urgency.NEXT and self._overdue(MERGED, MERGED_WAIT, now))
        return hurry and merged.clock - shared.clock < _DEBT

    def _overdue(self, side: str, most: float, now: float) -> bool:
        return now - self._sides.turns[side].since > most
