"""Names, versions and leases: which bytes a name means now, and which bytes must stay on disk.

A version is written to the store before its name record, and the record before memory, so that a crash at any moment
leaves the old version or the new one. An object lives as long as a version names it, a lease holds it or an upload is
about to name it; the start collects what a crash left behind.

A deleted name is forgotten: put again, it starts at version 1.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch

from server.core import DEFAULT_TENANT, MAX_CONFIG_BYTES, AdapterRef, AdapterVersion, BaseInfo
from server.errors import (
    AdapterNotFound,
    AdapterUnavailable,
    Conflict,
    InvalidAdapter,
    InvalidRequest,
    StorageFailure,
)
from server.lora.weights import AdapterWeights, inspect_adapter, read_adapter
from server.registry.etags import check_preconditions
from server.registry.records import Record, Versions, parse_record
from server.registry.store import Staging, Store, storage_errors

_log = logging.getLogger(__name__)
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_STRIPES = 64
Key = tuple[str, str]  # (tenant, name)


@dataclass(frozen=True, slots=True)
class PutResult:
    """`created`: the name is new. `changed`: another version is current now than before."""

    version: AdapterVersion
    created: bool
    changed: bool


class Lease:
    """A hold on the exact bytes of `ref`: they stay on disk until `release`, whatever happens to the name."""

    def __init__(self, registry: Registry, ref: AdapterRef):
        self.ref = ref
        self._registry = registry
        self._once = threading.Lock()

    def release(self) -> None:
        """Give the hold back. Any number of calls from any threads give back exactly one."""
        if self._once.acquire(blocking=False):
            self._registry._unlease(self.ref.digest)


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
        self._store, self._base, self._max_rank, self._dtype = store, base, max_rank, dtype
        self._max_versions, self._max_adapters = max(1, max_versions), max_adapters
        self._lock = threading.Lock()  # guards the dictionaries below; never held over more than a rename
        self._writers = [threading.Lock() for _ in range(_STRIPES)]  # one writer a name
        self._records: dict[Key, Record] = {}
        self._damaged: set[Key] = set()  # records on disk that could not be read at the start
        self._named: Counter[str] = Counter()  # digest -> versions that name it
        self._leases: Counter[str] = Counter()  # digest -> live leases
        self._uploads: Counter[str] = Counter()  # digest -> uploads about to name it
        self._sweeper = ThreadPoolExecutor(1, "onebase-sweep")
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
        key = _key(tenant, name)
        check_preconditions(_digest(self._records.get(key)), if_match, if_none_match)
        draft = self._inspect(name, staging, allow_zero)
        with self._upload(draft.digest):
            self._store.publish(staging)
            with self._writer(key):
                before = self._records.get(key)
                check_preconditions(_digest(before), if_match, if_none_match)
                if before is not None and self._same(before.now, draft):
                    return PutResult(before.now, created=False, changed=False)
                if before is None and len(self._records) >= self._max_adapters:
                    raise Conflict(f"there are {self._max_adapters} adapters already", code="too_many_adapters")
                version = replace(draft, version=before.next if before else 1)
                versions = (*(before.versions if before else ()), version)
                self._switch(key, self._pruned(Record(version.version, version.version + 1, versions)))
                return PutResult(version, created=before is None, changed=True)

    def taken(self, name: str, tenant: str = DEFAULT_TENANT) -> bool:
        """Whether the name has a record, readable or not: putting it would replace something."""
        key = _key(tenant, name)
        return key in self._records or key in self._damaged

    def get(self, name: str, tenant: str = DEFAULT_TENANT) -> AdapterVersion:
        """The current version. Raises `AdapterNotFound`."""
        return self._record(_key(tenant, name)).now

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
        return [*self._record(_key(tenant, name)).versions]

    def rollback(
        self, name: str, version: int, *, if_match: str | None = None, tenant: str = DEFAULT_TENANT
    ) -> AdapterVersion:
        """Make an older version current again, under its own number. Raises `AdapterNotFound` without such a one."""
        key = _key(tenant, name)
        with self._writer(key):
            before = self._record(key)
            check_preconditions(_digest(before), if_match, None)
            wanted = before.version(version)
            if wanted is None:
                raise AdapterNotFound(f"the adapter {name} has no version {version}", param="version")
            if version != before.current:
                self._switch(key, replace(before, current=version))
            return wanted

    def delete(self, name: str, *, if_match: str | None = None, tenant: str = DEFAULT_TENANT) -> None:
        """Forget a name and its history; bytes with leases stay until these are given back."""
        key = _key(tenant, name)
        with self._writer(key):
            check_preconditions(self._record(key).now.digest, if_match, None)
            self._switch(key, None)

    def acquire(self, name: str, tenant: str = DEFAULT_TENANT) -> Lease:
        """A lease on the current version. Raises `AdapterNotFound`, or `InvalidAdapter` (`base_mismatch`) when it was
        checked against another base than the one that is served now: shapes may fit where weights do not.
        """
        key = _key(tenant, name)
        with self._lock:
            now = self._record(key).now
            if now.base_digest != self._base.digest:
                raise InvalidAdapter(
                    f"the adapter {name} was uploaded for another base model ({now.base}) than the one served now "
                    f"({self._base.name}); upload it again if it fits",
                    param="adapter",
                    code="base_mismatch",
                )
            self._leases[now.digest] += 1
        return Lease(self, AdapterRef(now.name, now.version, now.digest))

    def load(self, digest: str) -> AdapterWeights:
        """Disk to tensors, hashed again. Raises `AdapterUnavailable`."""
        return read_adapter(digest, *self._store.read(digest), self._base, self._dtype)

    def leases(self) -> dict[str, int]:
        """Live leases by digest."""
        with self._lock:
            return dict(self._leases)

    def __len__(self) -> int:
        """Adapters of all tenants."""
        with self._lock:
            return len(self._records)

    def _record(self, key: Key) -> Record:
        record = self._records.get(key)
        if record is None:
            raise AdapterNotFound(f"there is no adapter {key[1]}", param="adapter")
        return record

    def _inspect(self, name: str, staging: Staging, allow_zero: bool) -> AdapterVersion:
        """The upload as a version without a number. Holds no lock: this is the slow part."""
        with storage_errors("read the upload back"):
            config_size, weights_size = staging.config_path.stat().st_size, staging.weights_path.stat().st_size
            if config_size > MAX_CONFIG_BYTES:
                raise InvalidAdapter(f"adapter_config.json is larger than {MAX_CONFIG_BYTES} bytes", param="config")
            config = staging.config_path.read_bytes()
        summary = inspect_adapter(
            config,
            staging.weights_path,
            self._base,
            max_rank=self._max_rank,
            dtype=self._dtype,
            allow_zero=allow_zero,
        )
        return AdapterVersion(
            name=name,
            version=0,
            digest=staging.digest(),
            rank=summary.rank,
            alpha=summary.alpha,
            targets=summary.targets,
            parameters=summary.parameters,
            bytes=config_size + weights_size,
            kind=summary.kind,
            base=self._base.name,
            base_digest=self._base.digest,
            created=time.time(),
        )

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
                self._named.update(version.digest for version in after.versions)
            gone = [version.digest for version in before.versions] if before else []
            self._named.subtract(gone)
            for digest in set(gone):
                self._collect(digest)
        self._store.sweep()

    def _writer(self, key: Key) -> threading.Lock:
        return self._writers[hash(key) % _STRIPES]

    @contextmanager
    def _upload(self, digest: str) -> Iterator[None]:
        """Keep an object that no version names yet; afterwards it goes if none does."""
        with self._lock:
            self._uploads[digest] += 1
        try:
            yield
        finally:
            self._unhold(digest, self._uploads)
            self._store.sweep()

    def _unlease(self, digest: str) -> None:
        """Called on the event loop: freeing the space of a large adapter takes too long for it."""
        self._unhold(digest, self._leases)
        if self._store.unswept:
            self._sweeper.submit(self._store.sweep)

    def _unhold(self, digest: str, holds: Counter[str]) -> None:
        with self._lock:
            holds[digest] -= 1
            if not holds[digest]:
                del holds[digest]
            self._collect(digest)

    def _collect(self, digest: str) -> None:
        """Remove the object if nothing holds it. Under the lock: no upload may find it and then lose it."""
        if self._named[digest] > 0 or self._leases[digest] > 0 or self._uploads[digest] > 0:
            return
        for holds in (self._named, self._leases, self._uploads):
            holds.pop(digest, None)
        try:
            self._store.retire(digest)
        except StorageFailure as exc:
            _log.warning("an unused adapter object stays until the next start: %s", exc.message)

    def _load_names(self) -> None:
        for key in self._store.names():
            try:
                record = parse_record(self._store.read_name(*key) or {})
            except (AdapterUnavailable, KeyError, TypeError, ValueError, StopIteration):
                self._damaged.add(key)
                _log.error("the record of adapter %s of tenant %s is damaged; it is left out", key[1], key[0])
                continue
            self._records[key] = record
            self._named.update(version.digest for version in record.versions)
        for digest in [digest for digest in self._named if not self._store.exists(digest)]:
            _log.warning("the stored adapter %s is missing", digest)
        # A damaged record may have named any object, so none is collected until somebody has looked at it.
        for digest in [] if self._damaged else self._store.digests():
            self._collect(digest)
        self._store.sweep()


def _digest(record: Record | None) -> str | None:
    return record.now.digest if record else None


def _key(tenant: str, name: str) -> Key:
    if not _NAME.fullmatch(name):
        raise InvalidRequest("an adapter name is 1 to 64 of a-z 0-9 . _ - and begins with a-z or 0-9", param="name")
    if not _TENANT.fullmatch(tenant):
        raise InvalidRequest("that is not the name of a tenant", param="tenant")
    return tenant, name
