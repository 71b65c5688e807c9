"""Every name's record in memory: a tenant's own, and those that others have published."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import merge
from itertools import groupby

from sortedcontainers import SortedDict

from server.errors import AdapterNotFound, Conflict, Forbidden
from server.registry.records import Key, Record


class Names:
    """Its caller's lock guards every change; one look-up needs none. A published name is unique among the published.

    `withdrawn` says of an owner that nobody else is to have what it has published, as long as that is so: the records
    stay as they are, and so do its claims on names.
    """

    def __init__(self) -> None:
        self.withdrawn: Callable[[str], bool] = lambda owner: False
        self._own: dict[str, SortedDict] = {}  # records by tenant, then by name
        self._published: SortedDict = SortedDict()  # keys by name; also of those that are about to be published

    def get(self, key: Key) -> Record | None:
        """The tenant's own record of that name."""
        return self._own.get(key[0], {}).get(key[1])

    def own(self, key: Key) -> Record:
        """The same, to be changed. Raises `Forbidden` where the name means another's published one, which all may see,
        `AdapterNotFound` where it means none."""
        owner, record = self.find(key)
        if owner != key:
            raise Forbidden(f"the adapter {key[1]} is another tenant's: only its owner may change it", param="adapter")
        return record

    def find(self, key: Key) -> tuple[Key, Record]:
        """What the name means to the tenant, and its owner's key: its own adapter, else a published one. Raises
        `AdapterNotFound`: another's private one costs the same look-ups as a name that nobody has, and the same words.
        """
        record = self.get(key)
        if record is not None:
            return key, record
        owner = self._published.get(key[1])
        record = self.get(owner) if owner is not None else None
        if owner is None or record is None or not self._shown(owner[0], record):
            raise _not_found(key[1])
        return owner, record

    def visible(self, tenant: str, after: str | None, *, own: bool = False) -> Iterator[tuple[Key, Record]]:
        """What names after `after` (None: all) mean to the tenant, in their order; with `own`, only where that is its
        own adapter. A name costs as much however many there are, and what others keep to themselves costs nothing."""
        mine, shown = self._own.get(tenant, SortedDict()), SortedDict() if own else self._published
        ways = [names.irange(after, inclusive=(False, True)) for names in (mine, shown)]
        for name, _ in groupby(merge(*ways)):
            key = (tenant, name) if name in mine else shown[name]
            record = self.get(key)
            if record is not None and (key[0] == tenant or self._shown(key[0], record)):
                yield key, record

    def _shown(self, owner: str, record: Record) -> bool:
        """Whether all other tenants have it too."""
        return record.public and not self.withdrawn(owner)

    def __len__(self) -> int:
        return sum(map(len, list(self._own.values())))

    def items(self) -> list[tuple[Key, Record]]:
        """All records of all tenants."""
        return [((tenant, name), record) for tenant, names in self._own.items() for name, record in names.items()]

    def set(self, key: Key, record: Record | None) -> None:
        """Replaces a record, which may be published only after a `claim`; None forgets it."""
        if record is None:
            self._own.get(key[0], {}).pop(key[1], None)
        else:
            self._own.setdefault(key[0], SortedDict())[key[1]] = record
        self.disclaim(key)

    def claim(self, key: Key) -> None:
        """Nobody else can publish the name from now on. Raises `Conflict` when another tenant has."""
        if self._published.setdefault(key[1], key) != key:
            raise Conflict(f"another tenant has published an adapter {key[1]}", param="public", code="name_published")

    def disclaim(self, key: Key) -> None:
        """Gives a claim back, unless the record is published."""
        record = self.get(key)
        if self._published.get(key[1]) == key and (record is None or not record.public):
            del self._published[key[1]]


def _not_found(name: str) -> AdapterNotFound:
    return AdapterNotFound(f"there is no adapter {name}", param="adapter")
