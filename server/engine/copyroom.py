"""What a merged copy takes, and which copies make way for another, tenant by tenant.

Each tenant has a part of the room for the copies that it asks for, so that nobody's copies, pinned or in use, can fill
all of it. Parts change: everybody's are as they were when anybody last asked for a copy. Where room is missing, idle
copies go in this order, and among equals the one that has been idle the longest: those that nobody asked for; those of
the tenant that asks; those of tenants that have more than their part; all others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from server.core import AdapterRef
from server.errors import Conflict
from server.lora.merge import MergedCopy

Name = tuple[str, str]  # tenant and adapter


def name_of(adapter: AdapterRef) -> Name:
    """Whose adapter it is, and which, whatever the version."""
    return adapter.tenant, adapter.name


@dataclass(eq=False)
class Held:
    """One copy, made (`copy`) or on its way. `nbytes` is its room, from the moment that this was made for it; its
    byte-seconds are of the time when it is there, and `counted` is up to when they are added up. Nobody asked for an
    `automatic` one. `part` is what all copies that its tenant asked for may take, None for no bound."""

    adapter: AdapterRef
    lane: str
    reason: str
    pinned: bool = False
    automatic: bool = False
    keeps: bool = False  # whether it takes nobody's room
    part: int | None = None
    askers: list[str] = field(default_factory=list)
    copy: MergedCopy | None = None
    nbytes: int = 0
    counted: float = 0.0
    used: int = 0
    references: int = 0

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return self.adapter.tenant


class CopyRoom:
    """`most` bytes, of which `active` copies take or will take requests, and `leaving` ones were given up and are still
    in use."""

    def __init__(self, most: int, active: Collection[Held], leaving: Collection[Held]):
        self.most, self._active = most, active
        self._all = [*active, *leaving]

    def makers(self, held: Held, nbytes: int) -> list[Held]:
        """The copies that are to go so that `held` can have `nbytes`. Raises `Conflict` when no choice of them is
        enough: `quota_exceeded` for the tenant's part, `merged_full` for all there is."""
        idle = [one for one in self._active if makes_way(one, held) and one.copy is not None and not one.references]
        gone: list[Held] = []
        excess = 0 if held.automatic or held.part is None else self._counted(held) + nbytes - held.part
        for one in sorted(idle, key=lambda one: one.used):
            if excess > 0 and one.tenant == held.tenant and not one.automatic:
                gone.append(one)
                excess -= one.nbytes
        if excess > 0:
            alone = held.part is not None and held.part >= self.most  # its part is all that there is
            raise self._full(held, nbytes) if alone else self._exceeded(held, nbytes)
        missing = nbytes - held.nbytes - (self.most - sum(one.nbytes for one in self._all))
        missing -= sum(one.nbytes for one in gone)
        rest = [one for one in idle if one not in gone]
        while missing > 0 and rest:
            over = self._over(gone)
            one = min(rest, key=lambda one: (_rank(one, held, over), one.used))
            rest.remove(one)
            gone.append(one)
            missing -= one.nbytes
        if missing > 0:
            raise self._full(held, nbytes)
        return gone

    def _counted(self, held: Held) -> int:
        """What counts against the part of its tenant beside it; not the version that it takes over from, which goes
        when it is there."""
        return sum(
            one.nbytes
            for one in self._all
            if one is not held
            and one.tenant == held.tenant
            and not one.automatic
            and not (one in self._active and one.adapter.name == held.adapter.name)
        )

    def _over(self, gone: Collection[Held]) -> set[str]:
        """The tenants that have more than their part when those of `gone` are no more."""
        taken: Counter[str] = Counter()
        for one in self._all:
            if not one.automatic and one not in gone:
                taken[one.tenant] += one.nbytes
        return {one.tenant for one in self._all if one.part is not None and taken[one.tenant] > one.part}

    def _exceeded(self, held: Held, nbytes: int) -> Conflict:
        return Conflict(
            f"this tenant may have {held.part} bytes of merged copies: one of {held.adapter.name} takes {nbytes}, "
            f"others take {self._counted(held)}, and only idle copies that are not pinned make way",
            code="quota_exceeded",
        )

    def _full(self, held: Held, nbytes: int) -> Conflict:
        takes = f"a merged copy of {held.adapter.name} takes {nbytes} bytes; MERGED_BYTES is {self.most}"
        before = sum(
            one.nbytes for one in self._all if one is not held and name_of(one.adapter) == name_of(held.adapter)
        )
        if nbytes > self.most:
            why = "no copy of this size fits"
        elif nbytes + before > self.most:
            why = f"its earlier version takes {before} until the new one has taken over: end its lane first"
        else:  # what others have is not its to know
            own = sum(one.nbytes for one in self._all if one.tenant == held.tenant)
            why = (
                f"too much of it is taken, {own} by this tenant, and only idle copies that are not pinned make way "
                "(those that nobody asked for as soon as their requests have ended: try again)"
            )
        return Conflict(f"{takes}, {why}", code="merged_full")


def makes_way(one: Held, other: Held) -> bool:
    """Whether `one` is of those that go for `other`. A version does not go for its successor, which may fail."""
    if name_of(one.adapter) == name_of(other.adapter) or other.keeps:
        return False
    return not other.automatic and (one.automatic or not one.pinned)


def _rank(one: Held, held: Held, over: Collection[str]) -> int:
    if one.automatic:
        return 0
    if one.tenant == held.tenant:
        return 1
    return 2 if one.tenant in over else 3
