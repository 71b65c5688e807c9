"""Gives adapters lanes of their own, and takes these back, where the measured costs of a step say that it pays.

With r of the shared lane's R rows on one adapter, everybody gets a token in shared(R) seconds; with that adapter
merged, in shared(R - r) + merged(r). It pays where the second is less: where the adapter is alone, or has so many rows
that reading the weights twice costs less than its LoRA does. It also pays where the adapter's requests are interactive
and all others in the shared lane are batch work: then what a lane of its own lets them wait is set against the shared
step. Plain Python.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

from server.core import AdapterRef
from server.engine.copyroom import Name, name_of
from server.engine.costs import DecodeCosts
from server.engine.lanes import SHARED
from server.engine.messages import Merge, Unmerge
from server.engine.scheduler import Work
from server.engine.sequence import Sequence

log = logging.getLogger("onebase.engine")

TICK = 0.25  # seconds between two looks
PATIENCE = 3.0  # seconds that the other lane must pay without a break
STAY = 30.0  # seconds that an adapter stays at least in the lane in which it was put, or could not be put
GAIN = 0.02  # of a step: a copy is made for more than that, and given back where nothing is left of it


class Copies(Protocol):
    """The merged copies (merging.py); those that were asked for are left alone."""

    def has(self, adapter: AdapterRef) -> bool: ...

    def automatic(self) -> dict[AdapterRef, bool]: ...

    def volunteer(self, adapter: AdapterRef, reason: str) -> None: ...

    def dismiss(self, adapter: AdapterRef) -> None: ...


@dataclass(frozen=True)
class Load:
    """What runs, as it concerns one adapter: `rows` of the shared lane were the adapter in it, `adapted` of them on
    adapters, `own` on this one. `urgent`: its own are interactive, and all others there are batch work. `lanes`: other
    merged lanes with rows. `late`: its own are batch work, and others there are interactive."""

    rows: int
    adapted: int
    own: int
    urgent: bool
    lanes: int
    late: bool = False

    @classmethod
    def of(cls, running: Collection[Sequence], adapter: AdapterRef, back: Collection[AdapterRef] = ()) -> Load:
        """For one adapter, from all sequences that run, as if those of the adapters `back` were in the shared lane."""
        own = [one for one in running if one.request.submit.adapter == adapter]
        rest = [one for one in running if one.request.submit.adapter != adapter]

        def shared(one: Sequence) -> bool:
            return one.request.lane == SHARED or one.request.submit.adapter in back

        others = [one for one in rest if shared(one)]
        return cls(
            rows=len(own) + len(others),
            adapted=len(own) + sum(one.request.submit.adapter is not None for one in others),
            own=len(own),
            urgent=bool(others)
            and not any(one.request.submit.batch for one in own)
            and all(one.request.submit.batch for one in others),
            lanes=len({one.request.lane for one in rest if not shared(one)}),
            late=all(one.request.submit.batch for one in own) and not all(one.request.submit.batch for one in others),
        )


def reason(load: Load, costs: DecodeCosts, share: float, gain: float) -> str | None:
    """Why a lane of its own pays for more than `gain` of a shared step: "alone", "throughput" or "latency"; None where
    it does not. `share` is what all merged lanes have of the time."""
    if not load.own or load.late:  # in a lane of its own it would yield to them, and here it runs along
        return None
    together = costs.shared_seconds(load.rows, load.adapted)
    merged = costs.merged_seconds(load.own)
    apart = costs.shared_seconds(load.rows - load.own, load.adapted - load.own) + merged
    if apart < (1 - gain) * together:
        return "alone" if load.own == load.rows else "throughput"
    if load.urgent and merged * (load.lanes + 1) / share < (1 - gain) * together:
        return "latency"
    return None


class AutoMerge:
    """Shown what runs after every step; changes at most one adapter's lane at a look."""

    def __init__(self, costs: DecodeCosts, copies: Copies, share: float, now: Callable[[], float] = monotonic):
        self.costs, self._copies, self._share, self._now = costs, copies, share, now
        self._next = 0.0
        self._since: dict[AdapterRef, float] = {}  # since when the other lane would pay
        self._settled: dict[AdapterRef, float] = {}  # when it was put into its lane, or could not be
        self._told: set[Name] = set()  # that are to stay in the shared lane

    def told(self, message: Merge | Unmerge) -> None:
        """Somebody has said in which lane an adapter is to be: all its versions stay out of this one's hands until it
        is asked for a lane again."""
        if isinstance(message, Merge):
            self._told.discard(name_of(message.adapter))
        elif message.asked:
            self._told.add(name_of(message.adapter))

    def learn(self, lane: str, work: Collection[Work], seconds: float) -> None:
        """A step took so long; prompts tell nothing of decodes."""
        if all(item.count == 1 for item in work):
            self.costs.learn(
                merged=lane != SHARED,
                rows=len(work),
                adapted=sum(item.sequence.request.submit.adapter is not None for item in work),
                context=sum(item.sequence.computed for item in work),
                seconds=seconds,
            )

    def look(self, running: Iterable[Sequence]) -> None:
        """Sets the lanes against each other for what runs now."""
        now = self._now()
        if now < self._next:
            return
        self._next = now + TICK
        self._settled = {adapter: at for adapter, at in self._settled.items() if now - at < STAY}
        rows, automatic = list(running), self._copies.automatic()
        candidates = {one.request.submit.adapter for one in rows}
        before, self._since, why = self._since, {}, dict[AdapterRef, str | None]()
        for adapter in (*automatic, *(one for one in candidates if one is not None and self._may_have(one))):
            merged = adapter in automatic
            why[adapter] = self._reason(rows, adapter, automatic, 0.0 if merged else GAIN)
            if (why[adapter] is not None) != merged:
                self._since[adapter] = before.get(adapter, now)
        self._change(rows, automatic, why, now)

    def _reason(
        self, rows: list[Sequence], adapter: AdapterRef, automatic: Collection[AdapterRef], gain: float
    ) -> str | None:
        """A lane must pay as things are, and also if all others that were made like it were given back: two lanes of
        which each pays only because there is the other one cost more than none."""
        if reason(Load.of(rows, adapter, automatic), self.costs, self._share, gain) is None:
            return None
        return reason(Load.of(rows, adapter), self.costs, self._share, gain)

    def _may_have(self, adapter: AdapterRef) -> bool:
        return name_of(adapter) not in self._told and not self._copies.has(adapter)

    def _change(
        self,
        rows: list[Sequence],
        automatic: dict[AdapterRef, bool],
        why: dict[AdapterRef, str | None],
        now: float,
    ) -> None:
        """The one for which the other lane has paid the longest goes there."""
        due = [one for one, since in self._since.items() if now - since >= PATIENCE and one not in self._settled]
        making = not all(automatic.values())
        for adapter in sorted(due, key=self._since.__getitem__):
            load = Load.of(rows, adapter)
            if adapter in automatic:
                log.info("%s goes back to the shared lane: %s", adapter.name, self._figures(load))
                self._copies.dismiss(adapter)
            elif not making:
                pays = why[adapter]
                assert pays is not None
                log.info("%s gets a lane of its own (%s): %s", adapter.name, pays, self._figures(load))
                self._copies.volunteer(adapter, pays)
            else:
                continue
            self._settled[adapter] = now
            return

    def _figures(self, load: Load) -> str:
        costs, others = self.costs, load.rows - load.own
        together = costs.shared_seconds(load.rows, load.adapted)
        rest, own = costs.shared_seconds(others, load.adapted - load.own), costs.merged_seconds(load.own)
        return (
            f"a step of {load.rows} rows takes {together * 1e3:.1f} ms, one of {others} without it {rest * 1e3:.1f} ms "
            f"and one of its {load.own} merged {own * 1e3:.1f} ms"
        )
