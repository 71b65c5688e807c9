"""Which objects of the store must stay: those that a version names, a lease holds, or an upload is about to name."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable

from server.core import AdapterRef
from server.errors import StorageFailure

_log = logging.getLogger(__name__)


class Lease:
    """A hold on the exact bytes of `ref`: they stay on disk until `release`, whatever happens to the name."""

    def __init__(self, ref: AdapterRef, unlease: Callable[[str], None]):
        self.ref = ref
        self._unlease = unlease
        self._once = threading.Lock()

    def release(self) -> None:
        """Give the hold back. Any number of calls from any threads give back exactly one."""
        if self._once.acquire(blocking=False):
            self._unlease(self.ref.digest)


class Holds:
    """Counts by digest. Its caller's lock guards every call: no upload may find an object and then lose it. `retire`
    takes an object out of the store, quickly. What is not held any more stays until `collect`."""

    def __init__(self, retire: Callable[[str], None]):
        self._retire = retire
        self.named: Counter[str] = Counter()  # versions that name it
        self.leases: Counter[str] = Counter()  # live leases
        self.uploads: Counter[str] = Counter()  # uploads about to name it

    def rename(self, before: Iterable[str], after: Iterable[str]) -> None:
        """The versions of a name were of the digests `before` and are of `after` now."""
        self.named.update(after)
        self.named.subtract(before)

    def release(self, digest: str, holds: Counter[str]) -> None:
        """One of `holds` less."""
        holds[digest] -= 1
        if not holds[digest]:
            del holds[digest]

    def held(self, digest: str) -> bool:
        """Whether anything holds the object."""
        return any(holds[digest] > 0 for holds in (self.named, self.leases, self.uploads))

    def collect(self, digest: str) -> None:
        """Retires the object if nothing holds it."""
        if self.held(digest):
            return
        for holds in (self.named, self.leases, self.uploads):
            holds.pop(digest, None)
        try:
            self._retire(digest)
        except StorageFailure as exc:
            _log.warning("an unused adapter object stays until the next start: %s", exc.message)
