"""Names and versions: which bytes a name means now, and to whom.

A version is written to the store before its name record. A bare name means one's own adapter, else the one that another
tenant has published; whatever is changed is one's own.

A deleted name is forgotten: put again, it starts at version 1.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from server.core import DEFAULT_TENANT, AdapterRef, AdapterVersion, BaseInfo, digest_in
from server.errors import AdapterNotFound
from server.lora.weights import AdapterWeights, read_adapter
from server.registry.catalogue import Catalogue
from server.registry.drafts import Checks, known_base
from server.registry.etags import check_preconditions
from server.registry.holds import Lease
from server.registry.moves import Moves
from server.registry.quotas import Quota
from server.registry.records import (
    Key,
    Named,
    PutResult,
    Record,
    Versions,
    digest_of,
    key_of,
    named,
    ref_of,
    same_weights,
    with_version,
)
from server.registry.store import Staging, Store
from server.registry.writers import Writers

_NO_QUOTA = Quota()
Keys = list[Key]


class Registry:
    """The adapters of every tenant. Safe to call from several threads. `acquire`, `find`, `get`, `list` and a lease's
    release wait for no more than a rename; the event loop may call them."""

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
        self._max_versions = max(1, max_versions)
        self._writers = Writers()
        self._catalogue = Catalogue(store, max_adapters)
        self._names = self._catalogue.names
        self.moves = Moves(self._catalogue, base)

    def put(
        self,
        name: str,
        staging: Staging,
        *,
        if_match: str | None = None,
        if_none_match: str | None = None,
        allow_zero: bool = False,
        quota: Quota = _NO_QUOTA,
        public: bool = False,
        tenant: str = DEFAULT_TENANT,
    ) -> PutResult:
        """Check the staged adapter and make it the current version of `name`. A new name is `public` from its first
        record on.

        Raises `InvalidAdapter`, `PreconditionFailed`, `Conflict` (more adapters or bytes than the quota or the server
        allows, or published by another tenant), `InvalidRequest` (the name) or `StorageFailure`; the version before
        then still stands. The current bytes again change nothing.
        """
        draft = self.check(
            name, staging, if_match=if_match, if_none_match=if_none_match, allow_zero=allow_zero, tenant=tenant
        )
        more: dict[str, Any] = {"quota": quota, "public": public, "tenant": tenant}
        return self.take(staging, draft, if_match=if_match, if_none_match=if_none_match, **more)

    def check(
        self,
        name: str,
        staging: Staging,
        *,
        if_match: str | None = None,
        if_none_match: str | None = None,
        allow_zero: bool = False,
        tenant: str = DEFAULT_TENANT,
    ) -> AdapterVersion:
        """The first half of `put`: what a core works on, and nothing that waits for another. Raises as `put`."""
        check_preconditions(digest_of(self._names.get(key_of(tenant, name))), if_match, if_none_match)
        return self._checks.draft(name, staging, allow_zero)

    def take(
        self,
        staging: Staging,
        draft: AdapterVersion,
        *,
        if_match: str | None = None,
        if_none_match: str | None = None,
        quota: Quota = _NO_QUOTA,
        public: bool = False,
        tenant: str = DEFAULT_TENANT,
    ) -> PutResult:
        """The second half, of what `check` gave for `staging`: waits for the disk, for who else changes the name, and
        where it has a lane of its own, for the new copy. Raises as `put`."""
        key = key_of(tenant, draft.name)
        with self._catalogue.upload(draft.digest):
            self._store.publish(staging)
            with self._writers.alone(key):
                before = self._names.get(key)
                check_preconditions(digest_of(before), if_match, if_none_match)
                if before is not None and same_weights(before.now, draft):
                    return PutResult(before.now, created=False, changed=False)
                after = with_version(before, draft, public=public, most=self._max_versions)
                claimed = self._catalogue.claim(key) if public and before is None else nullcontext()
                with self._catalogue.room(key, after, quota), claimed:
                    self.moves.take_over(key, after)
                return PutResult(after.now, created=before is None, changed=True)

    def expect(self, name: str, nbytes: int, *, quota: Quota, tenant: str = DEFAULT_TENANT) -> None:
        """An upload of at least `nbytes` is about to be received. Raises `Conflict` if it is certain that its tenant
        has no room for it, or `InvalidRequest` (the name)."""
        self._catalogue.expect(key_of(tenant, name), nbytes, quota)

    def taken(self, name: str, tenant: str = DEFAULT_TENANT) -> bool:
        """Whether the tenant has a record of that name, readable or not: putting it would replace something."""
        key = key_of(tenant, name)
        return self._names.get(key) is not None or key in self._catalogue.damaged

    def laned(self, name: str, tenant: str = DEFAULT_TENANT) -> bool:
        """Whether the tenant wants a lane of its own for it: another version of it waits for a merged copy."""
        record = self._names.get(key_of(tenant, name))
        return record is not None and record.merged

    def find(self, name: str, tenant: str = DEFAULT_TENANT) -> Named:
        """What the name means to the tenant. Raises `AdapterNotFound`."""
        return named(*self._names.find(key_of(tenant, name)))

    def get(self, name: str, tenant: str = DEFAULT_TENANT) -> AdapterVersion:
        """The current version of it. Raises `AdapterNotFound`."""
        return self.find(name, tenant).version

    def list(
        self, *, limit: int, after: str | None = None, tenant: str = DEFAULT_TENANT, own: bool = False
    ) -> tuple[list[Named], str | None]:
        """A page of what names mean to the tenant (`own`: its own alone), in their order, and the `after` of the next
        page (None: no more)."""
        found = self._catalogue.page(tenant, after, limit + 1, own=own)
        page = [named(*one) for one in found[:limit]]
        return page, page[-1].version.name if len(found) > limit else None

    def versions(self, name: str, tenant: str = DEFAULT_TENANT) -> Versions:
        """The history, oldest first. The current one is that of `get`. Raises `AdapterNotFound`."""
        _, record = self._names.find(key_of(tenant, name))
        return [*record.versions]

    def rollback(
        self, name: str, version: int, *, if_match: str | None = None, tenant: str = DEFAULT_TENANT
    ) -> AdapterVersion:
        """Make an older version current again, under its own number. Raises `AdapterNotFound` without such a one."""
        key = key_of(tenant, name)
        with self._writers.alone(key):
            before = self._names.own(key)
            check_preconditions(digest_of(before), if_match, None)
            wanted = before.version(version)
            if wanted is None:
                raise AdapterNotFound(f"the adapter {name} has no version {version}", param="version")
            if version != before.current:
                self.moves.take_over(key, replace(before, current=version))
            return wanted

    def change(
        self,
        name: str,
        *,
        merged: bool | None = None,
        pinned: bool | None = None,
        public: bool | None = None,
        if_match: str | None = None,
        tenant: str = DEFAULT_TENANT,
    ) -> Named:
        """Move a name to a lane of its own or back, publish it or make it private, and remember that; None leaves as it
        is, and so does a fault. Returns when it is done.

        Raises `AdapterNotFound`, `PreconditionFailed`, `Conflict` (no room for another copy, or another tenant has
        published the name), `StorageFailure`.
        """
        key = key_of(tenant, name)
        with self._writers.alone(key):
            record = self._names.own(key)
            check_preconditions(record.now.digest, if_match, None)
            wanted = record if public is None else replace(record, public=public)
            with self._catalogue.claim(key) if public else nullcontext():
                if merged is not None or pinned is not None:
                    self.moves.change(key, wanted, merged, pinned)
                elif wanted != record:
                    self._catalogue.switch(key, wanted)
            return named(key, self._names.own(key))

    def wishes(self) -> Keys:
        """The names that are to have lanes of their own, the pinned ones first."""
        found = [(key, record) for key, record in self._catalogue.items() if record.merged]
        return [key for key, record in sorted(found, key=lambda item: (not item[1].pinned, item[0]))]

    def enter_again(self, name: str, tenant: str = DEFAULT_TENANT) -> None:
        """Gives a name the lane that its record wants, if it still does, and nobody else's. Raises as `change`."""
        key = key_of(tenant, name)
        with self._writers.alone(key):
            self.moves.enter_again(key)

    def withdraw_where(self, disabled: Callable[[str], bool]) -> None:
        """Nobody else has what an owner has published while it is `disabled`."""
        self._names.withdrawn = disabled

    def leave_lanes(self, tenant: str) -> None:
        """Ends the lanes that a tenant's adapters have, asked for or not. What its records want stays."""
        for key in [key for key, _ in self._catalogue.items() if key[0] == tenant]:
            with self._writers.alone(key):
                record = self._names.get(key)
                if record is not None:
                    self.moves.leave(ref_of(record.now, tenant))

    def delete(self, name: str, *, if_match: str | None = None, tenant: str = DEFAULT_TENANT) -> AdapterRef:
        """Forget a name and its history; bytes with leases stay until these are given back. What it was last."""
        key = key_of(tenant, name)
        with self._writers.alone(key):
            record = self._names.own(key)
            check_preconditions(record.now.digest, if_match, None)
            self._catalogue.switch(key, None)
            last = ref_of(record.now, tenant)
            self.moves.leave(last)
            return last

    def acquire(self, name: str, tenant: str = DEFAULT_TENANT) -> Lease:
        """A lease on the current version of what the name means to the tenant. Raises `AdapterNotFound`, or
        `InvalidAdapter` (`base_mismatch`) when it was checked against another base than the one that is served now:
        shapes may fit where weights do not.
        """
        return self._catalogue.lease(key_of(tenant, name), partial(known_base, self._base))

    def load(self, key: str) -> AdapterWeights:
        """Disk to tensors, hashed again; `key` is an `AdapterRef.key`. Raises `AdapterUnavailable`."""
        return read_adapter(key, *self._store.read(digest_in(key)), self._base, self._checks.dtype)

    def close(self) -> None:
        """Frees the space of what nobody holds. What is let go afterwards stays until the next start."""
        self._catalogue.close()

    def leases(self) -> dict[str, int]:
        """Live leases by digest."""
        return self._catalogue.leases()

    def __len__(self) -> int:
        """Adapters of all tenants."""
        return len(self._names)

    def snapshot(self) -> dict[Key, Record]:
        """What every tenant's names mean now."""
        return dict(self._catalogue.items())
