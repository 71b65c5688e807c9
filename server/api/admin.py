"""`/admin`: tenants, their keys, the prices, and the events of usage. A change is in force for the next request."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Depends, Path, Response

from server.api import tenancy
from server.api.access import Caller, guarded
from server.api.adapters import IfMatch, removed, status_of
from server.api.lanes import restore
from server.api.moments import moment_ms
from server.api.queries import PLAIN, AdminPage
from server.api.schemas import AdapterList
from server.api.state import State, state_of
from server.api.tenancy import Book, BookBody, KeyList, KeyMade, NewKeyBody, NewTenant, Revived, TenantInfo, TenantList
from server.errors import Conflict
from server.tenants.keys import Scope
from server.tenants.tenant import Principal, Tenant

router = APIRouter(prefix="/admin", route_class=guarded(read=Scope.ADMIN, write=Scope.ADMIN))
OneState = Annotated[State, Depends(state_of)]
TenantName = Annotated[str, Path(max_length=64)]
KeyName = Annotated[str, Path(max_length=64, pattern=PLAIN)]


@router.post("/tenants", status_code=201, response_model=TenantInfo)
async def create_tenant(body: NewTenant, caller: Caller, state: OneState) -> dict[str, Any]:
    """Makes a tenant, without any key."""
    accounts = state.accounts
    blank = Tenant(body.id, 0, b"")
    tenant = await accounts.directory.create(body.id, **body.changes(blank, accounts.book))
    return _shown(state, tenant)


@router.get("/tenants", response_model=TenantList)
async def list_tenants(caller: Caller, state: OneState, query: AdminPage) -> dict[str, Any]:
    """All tenants by id, a page at a time."""
    found = state.accounts.directory.tenants(limit=query.limit + 1, after=query.after)
    data = [_shown(state, tenant) for tenant in found[: query.limit]]
    return {"data": data, "next": data[-1]["id"] if len(found) > query.limit else None}


@router.get("/tenants/{tenant}", response_model=TenantInfo)
async def show_tenant(tenant: TenantName, caller: Caller, state: OneState) -> dict[str, Any]:
    """One tenant, and what it does now."""
    return _shown(state, state.accounts.directory.show(tenant))


@router.patch("/tenants/{tenant}", response_model=TenantInfo)
async def change_tenant(
    tenant: TenantName, body: tenancy.TenantPatch, caller: Caller, state: OneState, after: BackgroundTasks
) -> dict[str, Any]:
    """Changes what the body names. Requests that run go on as they were admitted. A tenant that is enabled again gets
    the lanes back that its adapters had, after the answer and as far as there is room."""
    if body.disabled:
        _not_oneself(caller, tenant)
    accounts = state.accounts
    before = accounts.directory.disabled(tenant)
    changed = await accounts.update(tenant, lambda before: body.changes(before, accounts.book))
    if changed.disabled:
        await _without_lanes(state, tenant)
    elif before:
        after.add_task(restore, state.registry, tenant)
    return _shown(state, changed)


@router.post("/tenants/{tenant}/disable", response_model=TenantInfo)
async def disable_tenant(tenant: TenantName, caller: Caller, state: OneState) -> dict[str, Any]:
    """Refuses all of its keys from now on, takes what it has published from others, and ends its merged lanes. Requests
    that run are finished."""
    _not_oneself(caller, tenant)
    disabled = await state.accounts.directory.disable(tenant)
    await _without_lanes(state, tenant)
    return _shown(state, disabled)


@router.get("/tenants/{tenant}/adapters", response_model=AdapterList)
async def list_tenants_adapters(
    tenant: TenantName, caller: Caller, state: OneState, query: AdminPage
) -> dict[str, Any]:
    """A tenant's own adapters by name, a page at a time, as it sees them; also a disabled one's."""
    whose = state.accounts.directory.show(tenant).id
    page, following = state.registry.list(limit=query.limit, after=query.after or None, tenant=whose, own=True)
    return {"data": [status_of(state, whose, found) for found in page], "next": following}


@router.delete("/tenants/{tenant}/adapters/{name}", status_code=204)
async def delete_tenants_adapter(
    tenant: TenantName, name: KeyName, caller: Caller, state: OneState, if_match: IfMatch = None
) -> Response:
    """Removes a tenant's adapter, whether it is enabled or not. Requests in flight finish on it."""
    return await removed(state, name, state.accounts.directory.show(tenant).id, if_match)


@router.post("/tenants/{tenant}/keys", status_code=201, response_model=KeyMade)
async def create_key(
    tenant: TenantName, body: NewKeyBody, caller: Caller, state: OneState, response: Response
) -> dict[str, Any]:
    """Makes a key. Its token is in this answer and nowhere else; the tenant's other keys stay valid."""
    expires = None if body.expires is None else moment_ms(body.expires, "expires")
    scopes = {Scope(scope) for scope in body.scopes}
    made = await state.accounts.directory.create_key(tenant, scopes, name=body.name, expires_ms=expires)
    response.headers["Cache-Control"] = "no-store"
    key, token = made
    return tenancy.key_info(key) | {"token": token}


@router.get("/tenants/{tenant}/keys", response_model=KeyList)
async def list_keys(tenant: TenantName, caller: Caller, state: OneState, query: AdminPage) -> dict[str, Any]:
    """Its keys without their secrets, also those that are revoked or have expired."""
    found = await state.accounts.directory.keys(tenant, limit=query.limit + 1, after=query.after)
    data = [tenancy.key_info(key) for key in found[: query.limit]]
    return {"data": data, "next": data[-1]["id"] if len(found) > query.limit else None}


@router.delete("/tenants/{tenant}/keys/{key}", status_code=204)
async def revoke_key(tenant: TenantName, key: KeyName, caller: Caller, state: OneState) -> Response:
    """Refuses the key from now on."""
    await state.accounts.directory.revoke(tenant, key)
    return Response(status_code=204)


@router.get("/prices", response_model=Book)
async def show_prices(caller: Caller, state: OneState) -> dict[str, Any]:
    """The price book in force."""
    return _priced(state)


@router.put("/prices", response_model=Book)
async def change_prices(body: BookBody, caller: Caller, state: OneState) -> dict[str, Any]:
    """A new version of the price book, for what is admitted from now on."""
    await state.accounts.reprice(tenancy.checked_prices(state.accounts.book, body.model_dump()))
    return _priced(state)


@router.post("/events/revive", response_model=Revived)
async def revive_events(caller: Caller, state: OneState) -> dict[str, int]:
    """Tries the events again that were parked because the receiver had refused them too often."""
    deliverer = state.accounts.deliverer
    if deliverer is None:
        raise Conflict("this server tells nobody of usage: it has no EVENTS_URL", code="no_events")
    return {"revived": await deliverer.revive()}


async def _without_lanes(state: State, tenant: str) -> None:
    """Returns when none of the tenant's adapters has a merged lane."""
    leave = partial(state.registry.leave_lanes, tenant)
    await state.changes.run(tenant, "", leave, copies=lambda: False)  # of all names, in the tenant's own line


def _shown(state: State, tenant: Tenant) -> dict[str, Any]:
    return tenancy.tenant_info(tenant, state.accounts.admission)


def _priced(state: State) -> dict[str, Any]:
    book = state.accounts.book.as_dict()
    return book | {"rank_classes": [list(pair) for pair in book["rank_classes"]]}


def _not_oneself(caller: Principal, tenant: str) -> None:
    """Nobody would be left to undo it."""
    if caller.tenant.id == tenant:
        raise Conflict("this key is of that very tenant: disable it with another one's", code="own_tenant")
