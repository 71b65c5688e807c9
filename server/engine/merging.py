"""The merged copies: who has one, what they take, who waits for one, and who still runs on one.

All of it happens on the engine's thread, so there are no locks; building.py makes the copies beside it. A copy
belongs to one version of one adapter's name. Its lane's key is its own: a copy that is made anew after it was given up
is another lane.

Copies are asked for, or made by the engine itself (automerge.py): those make way for one that was asked for, and never
the other way round.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable
from time import monotonic
from typing import cast

from server.core import AdapterRef
from server.engine.building import Builder, BuildingThread
from server.engine.copyroom import CopyRoom, Held, Name, makes_way, name_of
from server.engine.messages import Built, LaneChanged, Merge, Unmerge, Weighed
from server.engine.stats import CopyFigures
from server.errors import Conflict, OnebaseError
from server.lora.merge import MergedCopy
from server.lora.weights import AdapterWeights

log = logging.getLogger("onebase.engine")


LaneMessage = Merge | Unmerge | Weighed | Built


class MergedCopies:
    """`most` bytes of them at once. `post` reaches the engine's inbox, `answer` its events; `freed` hears of every lane
    that is no more."""

    def __init__(
        self,
        builder: Builder,
        fetch: Callable[[str], AdapterWeights],
        post: Callable[[Weighed | Built], None],
        answer: Callable[[LaneChanged], None],
        freed: Callable[[str], None],
        most: int,
        now: Callable[[], float] = monotonic,
    ):
        self._thread, self._answer = BuildingThread(builder, fetch, post), answer
        self._freed, self.most, self._now = freed, most, now
        self._active: dict[AdapterRef, Held] = {}  # made or on their way
        self._leaving: list[Held] = []  # given up, and still in use
        self.byte_seconds = 0.0  # of what `asked` tells
        # By name: why it is in the shared lane though it asked for one of its own. Replaced at every change.
        self.notes: dict[Name, str] = {}
        self.changes: Counter[tuple[str, str]] = Counter()  # ("merge" | "unmerge", reason)
        self._numbers = itertools.count(1)

    def __bool__(self) -> bool:
        return bool(self._active or self._leaving)

    @property
    def nbytes(self) -> int:
        """What all copies take, those on their way and those still in use included."""
        return sum(held.nbytes for held in self._all())

    def figures(self) -> dict[AdapterRef, CopyFigures]:
        """By adapter: the copies that take requests."""
        return {
            held.adapter: CopyFigures(held.nbytes, held.pinned, held.automatic)
            for held in self._active.values()
            if held.copy is not None
        }

    def asked(self) -> dict[AdapterRef, int]:
        """Bytes by adapter, as they are on the bill: the copies that were asked for, from when they are made until the
        last request that runs on them has ended."""
        found: Counter[AdapterRef] = Counter()
        for held in self._all():
            if _billed(held):
                found[held.adapter] += held.nbytes
        return dict(found)

    def count(self) -> None:
        """Brings `byte_seconds` up to now."""
        now = self._now()
        for held in self._all():
            self._count(held, now)

    def handle(self, message: LaneMessage) -> None:
        """What the engine's inbox had for the copies."""
        if isinstance(message, Merge):
            self.want(message)
        elif isinstance(message, Unmerge):
            self.give_up(message)
        elif isinstance(message, Weighed):
            self.weighed(message)
        else:
            self.built(message)

    def want(self, message: Merge) -> None:
        """Begins to make a copy, unless there is one."""
        held = self._active.get(message.adapter) or self._begin(message.adapter)
        for one in self._all():
            one.part = message.parts.get(one.tenant, one.part)
        if held.automatic:
            self._count(held, self._now())  # from here on it is on the bill
            held.automatic, held.keeps = False, message.keeps
            fault = self._make_room(held, held.nbytes) if held.nbytes else None
            if fault is not None:
                held.automatic = True
                self._answer(LaneChanged(message.id, fault))
                return
        held.pinned, held.keeps = message.pinned, message.keeps
        if held.copy is not None:
            self._answer(LaneChanged(message.id))
        else:
            held.askers.append(message.id)

    def give_up(self, message: Unmerge) -> None:
        """Newcomers run in the shared lane again; the copy goes with its last request."""
        if not message.replaced:
            self._forget(message.adapter)
        held = self._active.get(message.adapter)
        if held is not None:
            self._tell(held, Conflict("the adapter was taken out of its lane before it was there", code="lane_left"))
            self._drop(held, "asked")
        self._answer(LaneChanged(message.id))

    def has(self, adapter: AdapterRef) -> bool:
        """Whether the adapter has a copy that takes requests, or one on its way."""
        return adapter in self._active

    def automatic(self) -> dict[AdapterRef, bool]:
        """The copies that nobody asked for, and whether each is there yet."""
        return {held.adapter: held.copy is not None for held in self._active.values() if held.automatic}

    def volunteer(self, adapter: AdapterRef, reason: str) -> None:
        """Begins to make a copy that nobody asked for. The adapter has none."""
        self._begin(adapter, reason).automatic = True

    def dismiss(self, adapter: AdapterRef) -> None:
        """Gives such a copy up."""
        self._drop(self._active[adapter], "no_gain")

    def acquire(self, adapter: AdapterRef) -> Held | None:
        """A reference to the adapter's copy, or None when it has none now."""
        held = self._active.get(adapter)
        if held is None or held.copy is None:
            return None
        held.references += 1
        held.used = next(self._numbers)
        return held

    def release(self, held: Held) -> None:
        """Gives one reference back."""
        held.references -= 1
        if not held.references and held in self._leaving:
            self._leaving.remove(held)
            self._free(held)

    def copy_of(self, lane: str) -> MergedCopy | None:
        """The copy that a lane's steps run on; None for the shared lane."""
        return next((one.copy for one in self._all() if one.lane == lane), None)

    def weighed(self, message: Weighed) -> None:
        """Makes room and has the copy built; or tells those who asked that there is none."""
        held = self._of(message.lane)
        if held is None:
            return  # given up meanwhile
        if message.fault is not None:
            self._fail(held, message.fault)
        elif (fault := self._make_room(held, message.nbytes)) is not None:
            self._fail(held, fault)
        else:
            held.nbytes = message.nbytes
            self._thread.build(held.lane, cast(AdapterWeights, message.weights))

    def built(self, message: Built) -> None:
        """The copy takes requests from now on."""
        held = self._of(message.lane)
        if held is None:
            leaving = next((one for one in self._leaving if one.lane == message.lane), None)
            if leaving is not None:  # given up while it was made: its room is free now
                self._leaving.remove(leaving)
                self._free(leaving)
        elif message.fault is not None:
            self._fail(held, message.fault)
        else:
            assert isinstance(message.copy, MergedCopy)
            held.copy, held.used, held.counted = message.copy, next(self._numbers), self._now()
            self.changes["merge", held.reason] += 1
            self._forget(held.adapter)
            log.info("%s version %d has a lane of its own", held.adapter.name, held.adapter.version)
            self._tell(held)

    def give_all_up(self, fault: OnebaseError | None) -> None:
        """The engine ends: those who wait are told."""
        for held in self._active.values():
            self._tell(held, fault)

    def close(self) -> None:
        """Waits for a copy that is being made."""
        self._thread.close()

    def _all(self) -> list[Held]:
        """Those that take requests or will, and those that are still in use."""
        return [*self._active.values(), *self._leaving]

    def _of(self, lane: str) -> Held | None:
        return next((held for held in self._active.values() if held.lane == lane), None)

    def _begin(self, adapter: AdapterRef, reason: str = "asked") -> Held:
        held = Held(adapter, f"{adapter.name}#{next(self._numbers)}", reason)
        self._active[adapter] = held
        self._thread.weigh(held.lane, adapter.key)
        return held

    def _make_room(self, held: Held, nbytes: int) -> Conflict | None:
        """Those that make way go, if that is enough (copyroom.py). If it is not, those that nobody asked for take no
        more requests: their room is free when the last of theirs has ended."""
        fault: Conflict | None = None
        try:
            victims = CopyRoom(self.most, self._active.values(), self._leaving).makers(held, nbytes)
        except Conflict as refusal:
            fault, full = refusal, refusal.code == "merged_full"
            victims = [one for one in self._active.values() if full and one.automatic and makes_way(one, held)]
        for one in victims:
            asked = logging.INFO if one.automatic else logging.WARNING
            log.log(asked, "%s gives its lane up for %s", one.adapter.name, held.adapter.name)
            if not one.automatic:
                other = f"the one of {held.adapter.name}" if one.tenant == held.tenant else "another tenant's"
                note = f"its merged copy was idle and not pinned, and made way for {other}"
                self.notes = self.notes | {name_of(one.adapter): note}
            self._drop(one, "made_way")
        return fault

    def _forget(self, adapter: AdapterRef) -> None:
        """There is nothing to tell of the name's lane any more."""
        name = name_of(adapter)
        if name in self.notes:
            self.notes = {known: note for known, note in self.notes.items() if known != name}

    def _drop(self, held: Held, reason: str) -> None:
        """Frees the copy when nobody runs on it, and not before it is made: its room is taken until then."""
        del self._active[held.adapter]
        if held.copy is not None:
            self.changes["unmerge", reason] += 1
        if held.references or (held.nbytes and held.copy is None):
            self._leaving.append(held)
        else:
            self._free(held)

    def _free(self, held: Held) -> None:
        self._count(held, self._now())
        held.copy, held.nbytes = None, 0
        self._freed(held.lane)

    def _count(self, held: Held, now: float) -> None:
        if _billed(held):
            self.byte_seconds += held.nbytes * (now - held.counted)
        held.counted = now

    def _fail(self, held: Held, fault: OnebaseError) -> None:
        del self._active[held.adapter]
        if held.automatic:
            log.info("%s gets no lane of its own: %s", held.adapter.name, fault.message)
        elif held.keeps:  # nobody hears of the refusal: it had a lane when the server last ran
            self.notes = self.notes | {name_of(held.adapter): fault.message}
        self._tell(held, fault)
        self._free(held)

    def _tell(self, held: Held, fault: OnebaseError | None = None) -> None:
        for asker in held.askers:
            self._answer(LaneChanged(asker, fault))
        held.askers.clear()


def _billed(held: Held) -> bool:
    return held.copy is not None and not held.automatic
