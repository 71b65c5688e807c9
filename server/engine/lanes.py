"""Whose step comes next: that of the shared lane, or that of a merged adapter's own. Plain Python, no torch.

Every step of a lane reads weights of its own, so lanes take turns on the device, by weighted fair queueing in two
levels (Demers, Keshav & Shenker 1989; in levels, Bennett & Zhang 1997): all merged lanes together against the shared
one, then the merged lanes among each other. Whoever is furthest behind in time over its share goes next. Who has
nothing to do neither loses nor saves: its clock joins the others' when it comes back.
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


class Urgency(IntEnum):
    """What a request waits for: batch work for nothing in particular, any other for its next token or its first."""

    BATCH, NEXT, FIRST = range(3)


@dataclass
class _Turn:
    clock: float
    since: float  # when it last had a turn, or came with work


class _Clocks:
    """The virtual clocks of some parties."""

    def __init__(self) -> None:
        self.turns: dict[str, _Turn] = {}
        self._busy: frozenset[str] = frozenset()

    def join(self, busy: Collection[str], now: float) -> None:
        """Those who have work now; newcomers begin where the others are."""
        still = self._busy & set(busy)
        start = min((self.turns[one].clock for one in still), default=0.0)
        for one in set(busy) - still:
            known = self.turns.get(one)
            self.turns[one] = _Turn(max(start, known.clock) if known and still else start, now)
        self._busy = frozenset(busy)

    def spent(self, one: str, seconds: float, now: float) -> None:
        """Pushes a clock on; of no effect on one that is no more."""
        turn = self.turns.get(one)
        if turn is not None:
            turn.clock += seconds
            turn.since = now

    def forget(self, one: str) -> None:
        self.turns.pop(one, None)
        self._busy -= {one}


class Lanes:
    """`share` is what the merged lanes have together of the device's time while the shared lane has work as well."""

    def __init__(self, share: float, now: Callable[[], float] = monotonic):
        self.share, self._now = share, now
        self._sides, self._merged = _Clocks(), _Clocks()  # SHARED and MERGED; each merged lane

    def order(self, busy: Mapping[str, Urgency]) -> list[str]:
        """The lanes with work, who is to go first first, by what the most urgent request of each waits for."""
        now = self._now()
        merged = [lane for lane in busy if lane != SHARED]
        self._sides.join([side for side, some in ((SHARED, SHARED in busy), (MERGED, merged)) if some], now)
        self._merged.join(merged, now)
        merged.sort(key=lambda lane: (busy[lane] < Urgency.FIRST, self._merged.turns[lane].clock))
        if SHARED not in busy or not merged:
            return merged or list(busy)
        first = self._merged_first(max(busy[lane] for lane in merged), now)
        return [*merged, SHARED] if first else [SHARED, *merged]

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
