"""Every name's record in memory: a tenant's own, and those that others have published."""

from __future__ import annotations

from server.errors import AdapterNotFound, Conflict
from server.registry.records import Key, Record


class Names:
    """Its caller's lock guards every change; one look-up needs none. A published name is unique among the published."""

    def __init__(self) -> None:
        self._own: dict[str, dict[str, Record]] = {}  # by tenant, then by name
        self._published: dict[str, Key] = {}  # by name; also those that are about to be published

    def get(self, key: Key) -> Record | None:
        """The tenant's own record of that name."""
        return self._own.get(key[0], {}).get(key[1])

    def own(self, key: Key) -> Record:
        """The same. Raises `AdapterNotFound`."""
        record = self.get(key)
        if record is None:
            raise _not_found(key[1])
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
        if owner is None or record is None or not record.public:
            raise _not_found(key[1])
        return owner, record

    def visible(self, tenant: str) -> dict[str, tuple[Key, Record]]:
        """All that names mean to the tenant."""
        owners = ((name, owner, self.get(owner)) for name, owner in self._published.items())
        published = {name: (owner, record) for name, owner, record in owners if record is not None and record.public}
        return published | {name: ((tenant, name), record) for name, record in self._own.get(tenant, {}).items()}

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
            self._own.setdefault(key[0], {})[key[1]] = record
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
