"""Names, versions and leases: which bytes a name means now, and which bytes must stay on disk.

A version is written to the store before its name record, and the record before memory, so that a crash at any moment
leaves the old version or the new one. An object lives as long as a version names it, a lease holds it or an upload is
about to name it; the start collects what a crash left behind.

A deleted name is forgotten: put again, it starts at version 1.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch

from server.core import DEFAULT_TENANT, AdapterVersion, BaseInfo
from server.errors import (
    AdapterNotFound,
    AdapterUnavailable,
    Conflict,
    InvalidAdapter,
    OnebaseError,
    StorageFailure,
)
from server.lora.weights import AdapterWeights, read_adapter
from server.registry.drafts import Checks
from server.registry.etags import check_preconditions
from server.registry.holds import Holds, Lease
from server.registry.lanes import Lanes
from server.registry.records import (
    Key,
    PutResult,
    Record,
    Versions,
    digest_of,
    digests_of,
    key_of,
    parse_record,
    ref_of,
)
from server.registry.store import Staging, Store

_log = logging.getLogger(__name__)
_STRIPES = 64
Keys = list[Key]


class Registry:
    """The adapters of every tenant. Safe to call from several threads. `acquire`, `get` and a lease's release wait for
    no more than a rename; the event loop may call them."""

    def __init__(
        self,
        store: Store,
        base: BaseInfo,
        *,
        max_rank: int,
        dtype: torch.dtype,
        max_versions: int = 32,
        max_adapters: int = 100_000,
    ):
        self._store, self._base, self._checks = store, base, Checks(base, max_rank, dtype)
        self._max_versions, self._max_adapters = max(1, max_versions), max_adapters
        self._lock = threading.Lock()  # guards the dictionaries below; never held over more than a rename
        self._writers = [threading.Lock() for _ in range(_STRIPES)]  # one writer a name
        self._records: dict[Key, Record] = {}
        self._damaged: set[Key] = set()  # records on disk that could not be read at the start
        self._holds = Holds(store.retire)
        self._sweeper = ThreadPoolExecutor(1, "onebase-sweep")
        self.lanes: Lanes | None = None  # none before the engine runs
        self._load_names()

    def put(
        self,
        name: str,
        staging: Staging,
        *,
        if_match: str | None = None,
        if_none_match: str | None = None,
        allow_zero: bool = False,
        tenant: str = DEFAULT_TENANT,
    ) -> PutResult:
        """Check the staged adapter and make it the current version of `name`.

        Raises `InvalidAdapter`, `PreconditionFailed`, `Conflict` (too many adapters), `InvalidRequest` (the name) or
        `StorageFailure`; the version before then still stands. The current bytes again change nothing.
        """
        key = key_of(tenant, name)
        check_preconditions(digest_of(self._records.get(key)), if_match, if_none_match)
        draft = self._checks.draft(name, staging, allow_zero)
        with self._upload(draft.digest):
            self._store.publish(staging)
            with self._writer(key):
                before = self._records.get(key)
                check_preconditions(digest_of(before), if_match, if_none_match)
                if before is not None and self._same(before.now, draft):
                    return PutResult(before.now, created=False, changed=False)
                if before is None and len(self._records) >= self._max_adapters:
                    raise Conflict(f"there are {self._max_adapters} adapters already", code="too_many_adapters")
                version = replace(draft, version=before.next if before else 1)
                versions = (*(before.versions if before else ()), version)
                wish = (before.merged, before.pinned) if before else (False, False)
                self._take_over(key, self._pruned(Record(version.version, version.version + 1, versions, *wish)))
                return PutResult(version, created=before is None, changed=True)

    def taken(self, name: str, tenant: str = DEFAULT_TENANT) -> bool:
        """Whether the name has a record, readable or not: putting it would replace something."""
        key = key_of(tenant, name)
        return key in self._records or key in self._damaged

    def get(self, name: str, tenant: str = DEFAULT_TENANT) -> AdapterVersion:
        """The current version. Raises `AdapterNotFound`."""
        return self._record(key_of(tenant, name)).now

    def list(
        self, *, limit: int, after: str | None = None, tenant: str = DEFAULT_TENANT
    ) -> tuple[Versions, str | None]:
        """A page of current versions in the order of their names, and the `after` of the next page (None: no more)."""
        with self._lock:
            mine = [(key[1], record) for key, record in self._records.items() if key[0] == tenant]
        rest = sorted((item for item in mine if after is None or item[0] > after), key=lambda item: item[0])
        page = [record.now for _, record in rest[:limit]]
        return page, page[-1].name if page and len(rest) > limit else None

    def versions(self, name: str, tenant: str = DEFAULT_TENANT) -> Versions:
        """The history, oldest first. The current one is that of `get`. Raises `AdapterNotFound`."""
        return [*self._record(key_of(tenant, name)).versions]

    def rollback(
        self, name: str, version: int, *, if_match: str | None = None, tenant: str = DEFAULT_TENANT
    ) -> AdapterVersion:
        """Make an older version current again, under its own number. Raises `AdapterNotFound` without such a one."""
        key = key_of(tenant, name)
        with self._writer(key):
            before = self._record(key)
            check_preconditions(digest_of(before), if_match, None)
            wanted = before.version(version)
            if wanted is None:
                raise AdapterNotFound(f"the adapter {name} has no version {version}", param="version")
            if version != before.current:
                self._take_over(key, replace(before, current=version))
            return wanted

    def set_lane(
        self, name: str, *, merged: bool | None, pinned: bool | None, tenant: str = DEFAULT_TENANT
    ) -> AdapterVersion:
        """Move a name to a lane of its own or back, and remember it; None leaves as it is. Returns when that is done.

        Raises `AdapterNotFound`, `Conflict` (no room for another copy), `StorageFailure`.
        """
        key, lanes = key_of(tenant, name), self.lanes
        assert lanes is not None
        with self._writer(key):
            record = self._record(key)
            ref = ref_of(record.now)
            inside = lanes.inside(ref)
            asked = merged is not None
            merged = inside is not None if merged is None else merged
            pinned = bool(inside) and merged if pinned is None else pinned
            if pinned and not merged:
                raise Conflict("only the copy of an adapter with a lane of its own can be pinned", param="pinned")
            if merged:
                self._known_base(record.now)
                lanes.enter(ref, pinned)
            if asked or merged:  # else there is nothing to pin, and the lane is as it was
                self._remember(key, replace(record, merged=merged, pinned=pinned), entered=merged and inside is None)
            if asked and not merged:
                self._leave(record.now, asked=True)
            return record.now

    def wishes(self) -> Keys:
        """The names that are to have lanes of their own, the pinned ones first."""
        with self._lock:
            found = [(key, record) for key, record in self._records.items() if record.merged]
        return [key for key, record in sorted(found, key=lambda item: (not item[1].pinned, item[0]))]

    def enter_again(self, name: str, tenant: str = DEFAULT_TENANT) -> None:
        """Gives a name the lane that its record wants, if it still does, and nobody else's. Raises as `set_lane`."""
        key, lanes = key_of(tenant, name), self.lanes
        assert lanes is not None
        with self._writer(key):
            record = self._record(key)
            if record.merged and lanes.inside(ref_of(record.now)) is None:
                self._known_base(record.now)
                lanes.enter(ref_of(record.now), record.pinned, keeps=True)

    def delete(self, name: str, *, if_match: str | None = None, tenant: str = DEFAULT_TENANT) -> None:
        """Forget a name and its history; bytes with leases stay until these are given back."""
        key = key_of(tenant, name)
        with self._writer(key):
            record = self._record(key)
            check_preconditions(record.now.digest, if_match, None)
            self._switch(key, None)
            self._leave(record.now)

    def acquire(self, name: str, tenant: str = DEFAULT_TENANT) -> Lease:
        """A lease on the current version. Raises `AdapterNotFound`, or `InvalidAdapter` (`base_mismatch`) when it was
        checked against another base than the one that is served now: shapes may fit where weights do not.
        """
        key = key_of(tenant, name)
        with self._lock:
            now = self._record(key).now
            self._known_base(now)
            self._holds.leases[now.digest] += 1
        return Lease(ref_of(now), self._unlease)

    def load(self, digest: str) -> AdapterWeights:
        """Disk to tensors, hashed again. Raises `AdapterUnavailable`."""
        return read_adapter(digest, *self._store.read(digest), self._base, self._checks.dtype)

    def leases(self) -> dict[str, int]:
        """Live leases by digest."""
        with self._lock:
            return dict(self._holds.leases)

    def __len__(self) -> int:
        """Adapters of all tenants."""
        with self._lock:
            return len(self._records)

    def _record(self, key: Key) -> Record:
        record = self._records.get(key)
        if record is None:
            raise AdapterNotFound(f"there is no adapter {key[1]}", param="adapter")
        return record

    @staticmethod
    def _same(current: AdapterVersion, draft: AdapterVersion) -> bool:
        return (current.digest, current.base_digest) == (draft.digest, draft.base_digest)

    def _pruned(self, record: Record) -> Record:
        """Without the oldest versions over the limit; the current one, always the newest here, stays."""
        return replace(record, versions=record.versions[-self._max_versions :])

    def _switch(self, key: Key, after: Record | None) -> None:
        """Disk first, then memory, then what nobody needs any more. The caller holds the name's writer lock."""
        if after is None:
            self._store.delete_name(*key)
        else:
            self._store.write_name(*key, {"format": 1, **asdict(after)})
        with self._lock:
            before = self._records.pop(key, None)
            if after is not None:
                self._records[key] = after
            self._holds.rename(digests_of(before), digests_of(after))
        self._store.sweep()

    def _take_over(self, key: Key, after: Record) -> None:
        """`_switch` to another version: one with a lane of its own is ready in its own before it is current."""
        before, lanes = self._records.get(key), self.lanes
        pinned = lanes.inside(ref_of(before.now)) if lanes is not None and before is not None else None
        if lanes is not None and pinned is not None:
            self._known_base(after.now)
            lanes.enter(ref_of(after.now), pinned)
        self._remember(key, after, entered=pinned is not None)
        if before is not None:
            self._leave(before.now)

    def _remember(self, key: Key, after: Record, *, entered: bool) -> None:
        """`_switch`; a lane that was `entered` for it is left again if that fails."""
        try:
            self._switch(key, after)
        except StorageFailure:
            if entered:
                self._leave(after.now)
            raise

    def _leave(self, version: AdapterVersion, *, asked: bool = False) -> None:
        """The change is made already: if the engine has ended, nobody is in any lane."""
        try:
            if self.lanes is not None:
                self.lanes.leave(ref_of(version), asked=asked)
        except OnebaseError as fault:
            _log.info("%s: %s", version.name, fault.message)

    def _known_base(self, version: AdapterVersion) -> None:
        if version.base_digest != self._base.digest:
            raise InvalidAdapter(
                f"the adapter {version.name} was uploaded for another base model ({version.base}) than the one served "
                f"now ({self._base.name}); upload it again if it fits",
                param="adapter",
                code="base_mismatch",
            )

    def _writer(self, key: Key) -> threading.Lock:
        return self._writers[hash(key) % _STRIPES]

    @contextmanager
    def _upload(self, digest: str) -> Iterator[None]:
        """Keep an object that no version names yet; afterwards it goes if none does."""
        with self._lock:
            self._holds.uploads[digest] += 1
        try:
            yield
        finally:
            with self._lock:
                self._holds.release(digest, self._holds.uploads)
            self._store.sweep()

    def _unlease(self, digest: str) -> None:
        """Called on the event loop: freeing the space of a large adapter takes too long for it."""
        with self._lock:
            self._holds.release(digest, self._holds.leases)
        if self._store.unswept:
            self._sweeper.submit(self._store.sweep)

    def _load_names(self) -> None:
        for key in self._store.names():
            try:
                record = parse_record(self._store.read_name(*key) or {})
            except (AdapterUnavailable, KeyError, TypeError, ValueError, StopIteration):
                self._damaged.add(key)
                _log.error("the record of adapter %s of tenant %s is damaged; it is left out", key[1], key[0])
                continue
            self._records[key] = record
            self._holds.named.update(digests_of(record))
        for digest in [digest for digest in self._holds.named if not self._store.exists(digest)]:
            _log.warning("the stored adapter %s is missing", digest)
        # A damaged record may have named any object, so none is collected until somebody has looked at it.
        for digest in [] if self._damaged else self._store.digests():
            self._holds.collect(digest)
        self._store.sweep()
