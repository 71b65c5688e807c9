"""Who the tenants are and which keys they hold: kept in the database, answered from memory.

`authenticate` is called for every request and touches nothing but two dictionaries. Every change is written to the
database first and to memory after, one change at a time. What another process changed is seen after `reload`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

from sqlalchemy import Row, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from server.core import DEFAULT_TENANT
from server.errors import Conflict, InvalidRequest, TenantNotFound, Unauthorized
from server.tenants import keys as apikeys
from server.tenants import tables
from server.tenants.database import Database
from server.tenants.keys import Scope
from server.tenants.tenant import UNLIMITED, Key, Limits, Principal, Tenant, checked_tenant_id, checked_text

MAX_KEYS = 1_000  # of one tenant that are neither revoked nor expired
_SALT_BYTES = 32
_T = TypeVar("_T")
Prepare = Callable[[Tenant], Awaitable[Callable[[], None]]]
_CHANGEABLE = frozenset(
    {
        "limits",
        "weight",
        "prices",
        "classes",
        "max_adapters",
        "max_adapter_bytes",
        "max_merged_bytes",
        "customer",
        "disabled",
    }
)
_UNKNOWN_TENANT = "there is no tenant of that name"


class Directory:
    """Made by `Directory.open`; `clock` gives seconds since 1970. Memory: the tenants, and the keys that may be used.

    A change that was begun is finished, also when its caller is cancelled: memory and database must not differ.
    """

    def __init__(self, database: Database, clock: Callable[[], float]):
        self._database = database
        self._clock = clock
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._tenants: dict[str, Tenant] = {}
        self._keys: dict[str, tuple[Key, bytes]] = {}  # usable ones, with the digest of their secret

    @classmethod
    async def open(cls, database: Database, *, clock: Callable[[], float] = time.time) -> tuple[Directory, str | None]:
        """The directory, and on the first start ever the token of an admin key: to be shown once, as it is not kept."""
        directory = cls(database, clock)
        token = await directory._first_start()
        await directory.reload()
        return directory, token

    async def close(self) -> None:
        """Returns when the changes that were begun are finished; whoever began them is told how."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def authenticate(self, header: str | None) -> Principal:
        """Who sent this `Authorization` header. Raises `Unauthorized`, always in the same words: no key or a malformed
        one, one that is unknown, revoked, expired or not ours, or of a disabled tenant."""
        parsed = apikeys.parse(header)
        if parsed is None:
            raise Unauthorized
        key_id, secret = parsed
        key, digest = self._keys.get(key_id, (None, None))
        if not apikeys.matches(secret, digest) or key is None:
            raise Unauthorized
        tenant = self._tenants[key.tenant]
        if tenant.disabled or not self._lasts(key):
            raise Unauthorized
        return Principal(tenant, key.id, key.scopes)

    async def reload(self) -> None:
        """Read everything again, all of it as of one moment."""
        async with self._changing, self._database.read() as connection:
            tenants = (await connection.execute(select(tables.tenants))).all()
            rows = (await connection.execute(select(tables.keys).where(tables.keys.c.revoked_ms.is_(None)))).all()
            self._tenants = {row.id: _tenant(row) for row in tenants}
            found = ((_key(row), bytes(row.secret_sha256)) for row in rows)
            usable = {key.id: (key, digest) for key, digest in found if self._lasts(key)}
            self._keys = {name: item for name, item in usable.items() if item[0].tenant in self._tenants}

    def show(self, tenant: str) -> Tenant:
        """The tenant of that id. Raises `TenantNotFound`."""
        found = self._tenants.get(tenant)
        if found is None:
            raise TenantNotFound(_UNKNOWN_TENANT)
        return found

    def disabled(self, tenant: str) -> bool:
        """Whether there is such a tenant, and it is disabled; from any thread."""
        found = self._tenants.get(tenant)
        return found is not None and found.disabled

    def tenants(self, *, limit: int | None = None, after: str = "") -> list[Tenant]:
        """Tenants in the order of their ids, from the first behind `after`."""
        names = sorted(name for name in self._tenants if name > after)
        return [self._tenants[name] for name in names[:limit]]

    async def create(self, tenant: str, *, limits: Limits = UNLIMITED, **more: Any) -> Tenant:
        """A new tenant; `more` are fields of `Tenant` that `update` takes. Raises `Conflict` if there is one of that
        id, `InvalidRequest` for what is out of bounds."""
        new = _changed(Tenant(checked_tenant_id(tenant), self._now_ms(), _salt()), {"limits": limits} | more)

        async def change() -> Tenant:
            try:
                async with self._database.write() as connection:
                    await connection.execute(tables.tenants.insert().values(_tenant_row(new)))
            except IntegrityError:
                raise Conflict("there is a tenant of that name already", code="tenant_exists") from None
            self._tenants[tenant] = new
            return new

        return await self._finish(change())

    async def update(self, tenant: str, **changes: Any) -> Tenant:
        """The tenant with other `limits`, `weight`, `prices`, `classes`, `max_adapters`, `max_adapter_bytes`,
        `max_merged_bytes`, `customer` or `disabled`. Raises `TenantNotFound`, `InvalidRequest`."""
        return await self.revise(tenant, lambda _: changes)

    async def revise(
        self, tenant: str, changes: Callable[[Tenant], dict[str, Any]], prepare: Prepare | None = None
    ) -> Tenant:
        """`update` with what `changes` makes of the tenant as it is then: no change in between is lost. `prepare` is
        awaited with the new tenant before anything is changed, and what it gives is called once all is."""

        async def change() -> Tenant:
            made = changes(self.show(tenant))
            new = _changed(self.show(tenant), made)
            finish = await prepare(new) if prepare else None
            row = {name: value for name, value in _tenant_row(new).items() if name in made}
            if row:
                async with self._database.write() as connection:
                    await connection.execute(update(tables.tenants).where(tables.tenants.c.id == tenant).values(row))
            self._tenants[tenant] = new
            if finish:
                finish()
            return new

        return await self._finish(change())

    async def disable(self, tenant: str) -> Tenant:
        """None of its keys is accepted from now on; `update(disabled=False)` undoes it."""
        return await self.update(tenant, disabled=True)

    async def create_key(
        self, tenant: str, scopes: Iterable[Scope], *, name: str = "", expires_ms: int | None = None
    ) -> tuple[Key, str]:
        """A new key and its token, which is not kept. Raises `TenantNotFound`, `InvalidRequest`, and `Conflict` for
        more keys than a tenant may have. Other keys stay valid: that is how one is rotated."""
        made, now = apikeys.make(), self._now_ms()
        key = Key(made.id, tenant, checked_text(name, "name"), frozenset(scopes), now, expires_ms)
        if not key.scopes:
            raise InvalidRequest("a key needs at least one scope", param="scopes")
        if expires_ms is not None and not now < expires_ms < 2**53:
            raise InvalidRequest("a key must expire in the future", param="expires")

        async def change() -> tuple[Key, str]:
            self.show(tenant)
            self._keys = {name: item for name, item in self._keys.items() if self._lasts(item[0])}
            if sum(item.tenant == tenant for item, _ in self._keys.values()) >= MAX_KEYS:
                raise Conflict(f"a tenant has at most {MAX_KEYS} keys that are valid", code="too_many_keys")
            async with self._database.write() as connection:
                await _insert_key(connection, key, made.digest)
            self._keys[key.id] = (key, made.digest)
            return key, made.token

        return await self._finish(change())

    async def keys(self, tenant: str, *, limit: int | None = None, after: str = "") -> list[Key]:
        """The tenant's keys, revoked and expired ones too, in the order of their ids. Raises `TenantNotFound`."""
        self.show(tenant)
        mine = select(tables.keys).where(tables.keys.c.tenant == tenant, tables.keys.c.id > after)
        async with self._database.read() as connection:
            rows = await connection.execute(mine.order_by(tables.keys.c.id).limit(limit))
            return [_key(row) for row in rows]

    async def revoke(self, tenant: str, key_id: str) -> None:
        """The key is refused from now on; a second time changes nothing. Raises `TenantNotFound` for a key that is not
        one of the tenant's."""
        keys = tables.keys
        revoked = func.coalesce(keys.c.revoked_ms, self._now_ms())

        async def change() -> None:
            self.show(tenant)
            mine = (keys.c.tenant == tenant) & (keys.c.id == key_id)
            async with self._database.write() as connection:
                changed = await connection.execute(update(keys).where(mine).values(revoked_ms=revoked))
            if not changed.rowcount:
                raise TenantNotFound("the tenant has no such key", code="key_not_found")
            self._keys.pop(key_id, None)

        await self._finish(change())

    async def _finish(self, change: Coroutine[Any, Any, _T]) -> _T:
        """Makes one change after the other, each in a task of its own, which a cancelled caller does not take along."""

        async def alone() -> _T:
            async with self._changing:
                return await change

        task = asyncio.create_task(alone())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _first_start(self) -> str | None:
        """Makes the default tenant if there is none, and an admin key if there never was a key of any kind."""
        async with self._database.write() as connection:
            row = _tenant_row(Tenant(DEFAULT_TENANT, self._now_ms(), _salt()))
            await connection.execute(
                self._database.insert(tables.tenants).values(row).on_conflict_do_nothing(index_elements=["id"])
            )
            # Held until the end of the transaction: of two servers that start at once, one makes the key.
            await connection.execute(
                select(tables.tenants.c.id).where(tables.tenants.c.id == DEFAULT_TENANT).with_for_update()
            )
            if await connection.scalar(select(func.count()).select_from(tables.keys)):
                return None
            made = apikeys.make()
            key = Key(made.id, DEFAULT_TENANT, "first admin key", frozenset(Scope), self._now_ms())
            await _insert_key(connection, key, made.digest)
        return made.token

    def _now_ms(self) -> int:
        return tables.now_ms(self._clock)

    def _lasts(self, key: Key) -> bool:
        return key.expires_ms is None or self._now_ms() < key.expires_ms


def _salt() -> bytes:
    return secrets.token_bytes(_SALT_BYTES)


def _changed(tenant: Tenant, changes: dict[str, Any]) -> Tenant:
    wrong = changes.keys() - _CHANGEABLE
    if wrong:
        raise InvalidRequest(f"not a setting of a tenant: {sorted(wrong)[0]}", param=sorted(wrong)[0])
    return dataclasses.replace(tenant, **changes)


def _tenant_row(tenant: Tenant) -> dict[str, Any]:
    row = {item.name: getattr(tenant, item.name) for item in dataclasses.fields(tenant)}
    limits = dataclasses.asdict(tenant.limits)
    if tenant.limits.allowed_adapters is not None:
        limits["allowed_adapters"] = sorted(tenant.limits.allowed_adapters)
    kept = {name: value for name, value in limits.items() if value is not None}
    return row | {"limits": kept, "prices": dict(tenant.prices), "classes": sorted(tenant.classes)}


def _tenant(row: Row[Any]) -> Tenant:
    limits = dict(row.limits)
    if "allowed_adapters" in limits:
        limits["allowed_adapters"] = frozenset(limits["allowed_adapters"])
    fields = dict(row._mapping) | {"limits": Limits(**limits), "classes": frozenset(row.classes)}
    return Tenant(**fields | {"salt": bytes(row.salt)})


async def _insert_key(connection: AsyncConnection, key: Key, digest: bytes) -> None:
    row = dataclasses.asdict(key) | {"scopes": sorted(key.scopes), "secret_sha256": digest}
    await connection.execute(tables.keys.insert().values(row))


def _key(row: Row[Any]) -> Key:
    fields = {item.name: getattr(row, item.name) for item in dataclasses.fields(Key)}
    return Key(**fields | {"scopes": frozenset(Scope(scope) for scope in row.scopes)})
