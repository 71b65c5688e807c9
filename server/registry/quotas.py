"""How many adapters a tenant keeps, of how many bytes, and how many it may."""

from __future__ import annotations

from dataclasses import dataclass

from server.errors import Conflict
from server.registry.records import Key


@dataclass(frozen=True, slots=True)
class Quota:
    """Of one tenant; None is no bound. Every version that is kept counts with its bytes; those of one name that are the
    same bytes count once, those of two names each."""

    adapters: int | None = None
    bytes: int | None = None


class Stock:
    """The bytes of every name. Its caller's lock guards every call. `most` adapters of all tenants together."""

    def __init__(self, most: int):
        self._most, self._count = most, 0
        self._names: dict[str, dict[str, int]] = {}  # by tenant
        self._bytes: dict[str, int] = {}

    def check(self, key: Key, nbytes: int, quota: Quota) -> None:
        """Raises `Conflict` when the name cannot come to `nbytes`."""
        names = self._names.get(key[0], {})
        before = names.get(key[1])
        kept = self._bytes.get(key[0], 0) - (before or 0)
        if before is None and quota.adapters is not None and len(names) >= quota.adapters:
            raise _exceeded(f"this tenant may keep {quota.adapters} adapters and has {len(names)}")
        if quota.bytes is not None and kept + nbytes > quota.bytes and nbytes > (before or 0):
            raise _exceeded(
                f"this tenant may keep {quota.bytes} bytes of adapters: {kept} of others and {nbytes} of {key[1]}, "
                "with its older versions, are more"
            )
        if before is None and self._count >= self._most:
            raise Conflict(f"there are {self._most} adapters already", code="too_many_adapters")

    def reserve(self, key: Key, nbytes: int, quota: Quota) -> None:
        """Books `nbytes` for the name before they are written; `set` says what came of it. Raises as `check`."""
        self.check(key, nbytes, quota)
        self.set(key, max(nbytes, self._names.get(key[0], {}).get(key[1], 0)))

    def set(self, key: Key, nbytes: int | None) -> None:
        """What the name has now; None where there is none."""
        names = self._names.setdefault(key[0], {})
        self._count -= len(names)
        self._bytes[key[0]] = self._bytes.get(key[0], 0) - names.pop(key[1], 0) + (nbytes or 0)
        if nbytes is not None:
            names[key[1]] = nbytes
        self._count += len(names)


def _exceeded(message: str) -> Conflict:
    return Conflict(message, code="quota_exceeded")
