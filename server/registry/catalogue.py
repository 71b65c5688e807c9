"""Name records on disk and in memory, and which objects must stay for them.

A record is written to the disk before memory, so that a crash at any moment leaves the one before or the one after. An
object lives as long as a version names it, a lease holds it or an upload is about to name it; the start collects what a
crash left behind.

Objects go on a thread of their own, and that thread alone asks whether one must stay: how long a call takes does not
tell whether somebody else has stored the same bytes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from itertools import islice

from server.core import AdapterVersion
from server.errors import AdapterUnavailable, Conflict
from server.registry.holds import Holds, Lease
from server.registry.names import Names
from server.registry.quotas import Quota, Stock
from server.registry.records import Key, Record, digests_of, parse_record, ref_of
from server.registry.store import Store

_log = logging.getLogger(__name__)


class Catalogue:
    """Safe to call from several threads; of one name, the caller lets only one thread change anything at a time."""

    def __init__(self, store: Store, most: int):
        self._store = store
        self._lock = threading.Lock()  # guards what is in memory; never held over more than a rename
        self.names = Names()
        self._stock = Stock(most)
        self.damaged: set[Key] = set()  # records on disk that could not be read at the start
        self.holds = Holds(store.retire)
        self._sweeper: Executor = ThreadPoolExecutor(1, "onebase-sweep")
        self._load()

    def page(self, tenant: str, after: str | None, most: int, *, own: bool = False) -> list[tuple[Key, Record]]:
        """What the first `most` names after `after` mean to the tenant, in their order, with their owners' keys; with
        `own`, its own ones alone."""
        with self._lock:
            return list(islice(self.names.visible(tenant, after, own=own), most))

    def items(self) -> list[tuple[Key, Record]]:
        """All records of all tenants."""
        with self._lock:
            return self.names.items()

    def leases(self) -> dict[str, int]:
        """Live leases by digest."""
        with self._lock:
            return dict(self.holds.leases)

    def lease(self, key: Key, check: Callable[[AdapterVersion], None]) -> Lease:
        """A lease on the current version of what the name means. Raises `AdapterNotFound`, or what `check` raises."""
        with self._lock:
            owner, record = self.names.find(key)
            now = record.now
            check(now)
            self.holds.leases[now.digest] += 1
        return Lease(ref_of(now, owner[0]), self._unlease)

    def switch(self, key: Key, after: Record | None) -> None:
        """Disk first, then memory, then what nobody needs any more; None forgets the name. Raises `StorageFailure`."""
        if after is None:
            self._store.delete_name(*key)
        else:
            self._store.write_name(*key, {"format": 1, **asdict(after)})
        with self._lock:
            before = self.names.get(key)
            self._set(key, after)
            self.damaged.discard(key)
            self.holds.rename(digests_of(before), digests_of(after))
        self._let_go(digests_of(before))

    def expect(self, key: Key, nbytes: int, quota: Quota) -> None:
        """An upload of at least `nbytes` is coming. Raises `Conflict` if it is certain that there is no room for it;
        what a name that is there will come to is not: the bytes may be those that it has."""
        with self._lock:
            if self.names.get(key) is None:
                self._stock.check(key, nbytes, quota)

    @contextmanager
    def room(self, key: Key, after: Record, quota: Quota) -> Iterator[None]:
        """Room for a record that the block makes the name's own. Raises `Conflict` when there is none."""
        with self._lock:
            self._stock.reserve(key, after.bytes, quota)
        try:
            yield
        finally:
            with self._lock:
                record = self.names.get(key)
                self._stock.set(key, record.bytes if record else None)

    @contextmanager
    def claim(self, key: Key) -> Iterator[None]:
        """The block may publish the name. Raises `Conflict` when another tenant has."""
        with self._lock:
            self.names.claim(key)
        try:
            yield
        finally:
            with self._lock:
                self.names.disclaim(key)

    @contextmanager
    def upload(self, digest: str) -> Iterator[None]:
        """Keeps an object that no version names yet; afterwards it goes if none does."""
        with self._lock:
            self.holds.uploads[digest] += 1
        try:
            yield
        finally:
            with self._lock:
                self.holds.release(digest, self.holds.uploads)
            self._let_go([digest])

    def close(self) -> None:
        """Frees what nobody holds. What is let go afterwards stays until the next start."""
        self._sweeper.shutdown(wait=True)

    def _set(self, key: Key, record: Record | None) -> None:
        self.names.set(key, record)
        self._stock.set(key, record.bytes if record else None)

    def _unlease(self, digest: str) -> None:
        """Called on the event loop: freeing the space of a large adapter takes too long for it."""
        with self._lock:
            self.holds.release(digest, self.holds.leases)
            held = self.holds.held(digest)
        if not held:
            self._let_go([digest])

    def _let_go(self, digests: Iterable[str]) -> None:
        """Somebody holds these no longer, whoever else does."""
        with suppress(RuntimeError):  # closed
            self._sweeper.submit(self._sweep, frozenset(digests))

    def _sweep(self, digests: frozenset[str]) -> None:
        for digest in digests:
            with self._lock:
                self.holds.collect(digest)
        self._store.sweep()

    def _load(self) -> None:
        for key in self._store.names():
            try:
                record = parse_record(self._store.read_name(*key) or {})
            except (AdapterUnavailable, KeyError, TypeError, ValueError, StopIteration):
                self.damaged.add(key)
                _log.error("the record of adapter %s of tenant %s is damaged; it is left out", key[1], key[0])
                continue
            self._set(key, self._as_published(key, record))
            self.holds.named.update(digests_of(record))
        for digest in [digest for digest in self.holds.named if not self._store.exists(digest)]:
            _log.warning("the stored adapter %s is missing", digest)
        # A damaged record may have named any object, so none is collected until somebody has looked at it.
        for digest in [] if self.damaged else self._store.digests():
            self.holds.collect(digest)
        self._store.sweep()

    def _as_published(self, key: Key, record: Record) -> Record:
        """Of two records that say so, as no server wrote them, only the first is."""
        try:
            if record.public:
                self.names.claim(key)
        except Conflict:
            _log.error("the adapter %s of tenant %s stays private: another's is published", key[1], key[0])
            return replace(record, public=False)
        return record
