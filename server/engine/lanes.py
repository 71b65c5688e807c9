"""Whose step comes next: that of the shared lane, or that of a merged adapter's own. Plain Python, no torch.

Every step of a lane reads weights of its own, so lanes take turns on the device, by weighted fair queueing in levels
(Demers, Keshav & Shenker 1989; in levels, Bennett & Zhang 1997): all merged lanes together against the shared one, then
the tenants that have work in merged lanes, then each tenant's merged lanes. Whoever is furthest behind in time over its
share goes next. Who has nothing to do neither loses nor saves: its clock joins the others' when it comes back.
Batch work yields to the interactive work of its own tenant: that takes nothing from anybody else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
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
# What is left to batch work, of the part that it would have, beside interactive work of its own tenant, so that it
# does not wait for ever.
YIELD = 0.1


class Urgency(IntEnum):
    """What a request waits for: batch work for nothing in particular, any other for its next token or its first."""

    BATCH, NEXT, FIRST = range(3)


# By lane and tenant: what the tenant's most urgent request in the lane waits for.
Busy = Mapping[str, Mapping[str, Urgency]]


def _batch(tenants: Mapping[str, Urgency]) -> bool:
    """Whether there is work, and none but batch work."""
    return bool(tenants) and max(tenants.values()) == Urgency.BATCH


@dataclass(slots=True)
class _Turn:
    clock: float
    since: float  # when it last had a turn, or came with work
    part: float  # what it is to have beside the others


class _Clocks:
    """The virtual clocks of some parties."""

    def __init__(self) -> None:
        self.turns: dict[str, _Turn] = {}
        self._busy: frozenset[str] = frozenset()

    def join(self, parts: Mapping[str, float], now: float) -> None:
        """Those who have work now, and their parts; newcomers begin where the others are. Where there are no others
        they begin where the furthest of all was, or who comes back after them would wait for what was long ago. Whose
        part has grown is ahead by what the time that it had is worth now: interactive work does not wait for the
        batch work before it."""
        still = self._busy & parts.keys()
        start = self.least(still) if still else max((one.clock for one in self.turns.values()), default=0.0)
        for one, part in parts.items():
            turn = self.turns.setdefault(one, _Turn(start, now, part))
            turn.clock = max(start, turn.clock)
            if part > turn.part:
                turn.clock = start + (turn.clock - start) * turn.part / part
            turn.part = part
            if one not in still:
                turn.since = now
        self._busy = frozenset(parts)

    def spent(self, one: str, seconds: float, now: float) -> None:
        """Pushes a clock on; of no effect on one that is no more."""
        turn = self.turns.get(one)
        if turn is not None:
            turn.clock += seconds / turn.part
            turn.since = now

    def least(self, some: Collection[str]) -> float:
        """The clock of whoever of `some`, who have joined, is furthest behind; 0 for nobody."""
        return min((self.turns[one].clock for one in some), default=0.0)

    def forget(self, one: str) -> None:
        self.turns.pop(one, None)
        self._busy -= {one}


class _Merged:
    """The merged lanes among each other, by the tenants whose requests are in them.

    A step is charged to the tenant whose turn it was, whoever else has rows in it: what each has of the steps of one
    lane is settled there (counters.py). So every tenant with work in some lane has its turns, however far the others
    that it shares the lane with may be ahead or behind.
    """

    def __init__(self) -> None:
        self._clocks = _Clocks()  # of tenants
        # By tenant: its merged lanes. It is known as long as one of these lanes is.
        self._tenants: dict[str, _Clocks] = {}
        self._payers: dict[str, str] = {}  # by lane: who is charged for its next step

    def order(self, busy: Busy, parts: Mapping[str, float], now: float) -> list[str]:
        """The lanes, who is to go first first; each has the place of whoever brings it furthest to the front. `parts`
        are the tenants'."""
        lanes: dict[str, dict[str, Urgency]] = {}  # by tenant
        for lane, tenants in busy.items():
            for name, urgency in tenants.items():
                lanes.setdefault(name, {})[lane] = urgency
        self._clocks.join(parts, now)
        least = self._clocks.least(lanes)
        places: list[tuple[bool, float, float, str, str]] = []
        for name, own in lanes.items():
            clocks = self._tenants.setdefault(name, _Clocks())
            clocks.join(_among(own), now)
            turn, first = self._clocks.turns[name], clocks.least(own)
            may_hurry = (turn.clock - least) * turn.part < AHEAD
            for lane, urgency in own.items():
                had = clocks.turns[lane].clock
                hurries = may_hurry and urgency == Urgency.FIRST and had - first < AHEAD
                places.append((not hurries, turn.clock, had, name, lane))
        self._payers = {}
        for *_, name, lane in sorted(places):
            self._payers.setdefault(lane, name)
        return list(self._payers)

    def spent(self, lane: str, seconds: float, now: float) -> None:
        name = self._payers.get(lane, "")
        clocks = self._tenants.get(name)
        if clocks is not None:
            self._clocks.spent(name, seconds, now)
            clocks.spent(lane, seconds, now)

    def forget(self, lane: str) -> None:
        for name, clocks in list(self._tenants.items()):
            clocks.forget(lane)
            if not clocks.turns:
                del self._tenants[name]
                self._clocks.forget(name)


def _among(own: Mapping[str, Urgency]) -> dict[str, float]:
    """The parts of one tenant's lanes: alike, but those of nothing but batch work have together `YIELD` of what one of
    the others has."""
    batch = sum(urgency == Urgency.BATCH for urgency in own.values())
    part = YIELD / batch if 0 < batch < len(own) else 1.0
    return {lane: part if urgency == Urgency.BATCH else 1.0 for lane, urgency in own.items()}


class Lanes:
    """`share` is what the merged lanes have together of the device's time while the shared lane has work as well;
    `weight` says what part of that a tenant has beside others."""

    def __init__(self, share: float, weight: Callable[[str], float], now: Callable[[], float] = monotonic):
        self.share, self._weight, self._now = share, weight, now
        self._sides, self._merged = _Clocks(), _Merged()  # SHARED and MERGED; the merged lanes

    def order(self, busy: Busy) -> list[str]:
        """The lanes with work, who is to go first first."""
        now = self._now()
        merged = {lane: tenants for lane, tenants in busy.items() if lane != SHARED}
        shared, apart = busy.get(SHARED, {}), _together(merged)
        parts = {name: self._weight(name) * (YIELD if _yields(name, apart, shared) else 1.0) for name in apart}
        sides = self._parts(shared, apart, parts)
        self._sides.join({side: sides[side] for side, some in ((SHARED, shared), (MERGED, merged)) if some}, now)
        lanes = self._merged.order(merged, parts, now)
        if not shared or not merged:
            return lanes or list(busy)
        return [*lanes, SHARED] if self._merged_first(shared, apart, now) else [SHARED, *lanes]

    def spent(self, lane: str, seconds: float) -> None:
        """`lane` has had a step of so many seconds; if it was its last, it may be no more."""
        now = self._now()
        self._sides.spent(SHARED if lane == SHARED else MERGED, seconds, now)
        if lane != SHARED:
            self._merged.spent(lane, seconds, now)

    def forget(self, lane: str) -> None:
        """The lane is no more."""
        self._merged.forget(lane)

    def ratio(self) -> float:
        """How much longer than a merged step a shared one may take for both to come in turn."""
        return (1 - self.share) / self.share

    def _parts(
        self, shared: Mapping[str, Urgency], merged: Mapping[str, Urgency], parts: Mapping[str, float]
    ) -> dict[str, float]:
        """What each side is to have. `share` is the price of latency, for which batch work has no use: a side of
        nothing but that has beside interactive work no more than its tenants have by their weights. `parts` are
        those of the tenants in merged lanes, less what they leave to their own interactive requests in the shared one.
        The shared one leaves something only if all its tenants do: it is not by lane that these share it."""
        wholly, left = sum(self._weight(name) for name in merged), sum(parts.values())
        beside = sum(self._weight(name) for name in shared)
        if _batch(merged) and shared and not _batch(shared):
            part = min(self.share, left / (left + beside))
            return {SHARED: 1 - part, MERGED: part}
        if _batch(shared) and merged and not _batch(merged):
            beside *= YIELD if all(_yields(name, shared, merged) for name in shared) else 1.0
            part = min(1 - self.share, beside / (beside + wholly))
            return {SHARED: part, MERGED: 1 - part}
        return {SHARED: 1 - self.share, MERGED: self.share * (left / wholly if merged else 1)}

    def _merged_first(self, shared: Mapping[str, Urgency], apart: Mapping[str, Urgency], now: float) -> bool:
        """Whether the merged lanes go before the shared one: when they are behind, or in a hurry and not far ahead."""
        behind = self._sides.turns[SHARED].clock - self._sides.turns[MERGED].clock
        urgency = max(apart.values())
        if self._overdue(SHARED, SHARED_WAIT, now) and not (_batch(shared) and urgency > Urgency.BATCH):
            return False
        if behind >= 0:
            return True
        hurry = urgency == Urgency.FIRST or (urgency == Urgency.NEXT and self._overdue(MERGED, MERGED_WAIT, now))
        return hurry and -behind < _DEBT

    def _overdue(self, side: str, most: float, now: float) -> bool:
        return now - self._sides.turns[side].since > most


def _together(merged: Busy) -> dict[str, Urgency]:
    """By tenant: its most urgent request in any of the lanes."""
    found: dict[str, Urgency] = {}
    for tenants in merged.values():
        for name, urgency in tenants.items():
            found[name] = max(found.get(name, urgency), urgency)
    return found


def _yields(name: str, here: Mapping[str, Urgency], there: Mapping[str, Urgency]) -> bool:
    """Whether a tenant's work on one side is batch work, and on the other it has interactive work."""
    return here[name] == Urgency.BATCH and there.get(name, Urgency.BATCH) > Urgency.BATCH
