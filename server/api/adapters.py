"""`/adapters`: upload, list, show, publish, history, rollback, delete."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio
from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from server.api.access import Caller, guarded
from server.api.limits import FORM_OVERHEAD, media_type
from server.api.queries import AdapterPage
from server.api.schemas import AdapterInfo, AdapterList, AdapterPatch, AdapterStatus, Rollback, Source, VersionList
from server.api.state import Activity, State, state_of
from server.core import MAX_CONFIG_BYTES, AdapterVersion
from server.errors import InvalidRequest, RateLimited, TooLarge
from server.registry import sources
from server.registry.quotas import Quota
from server.registry.records import Named, ref_of
from server.registry.store import Staging, storage_errors
from server.tenants.keys import Scope
from server.tenants.tenant import Tenant

RECEIVE_SECONDS = 900  # an upload that takes longer is given up: only so many are under way at once
OneState = Annotated[State, Depends(state_of)]
IfMatch = Annotated[str | None, Header(max_length=4096)]
router = APIRouter(prefix="/adapters", route_class=guarded(read=None, write=Scope.ADAPTERS_WRITE))
_PUT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["config", "weights"],
                    "properties": {
                        "config": {"type": "string", "format": "binary", "description": "adapter_config.json"},
                        "weights": {"type": "string", "format": "binary", "description": "adapter_model.safetensors"},
                    },
                }
            },
            "application/json": {"schema": Source.model_json_schema()},
        },
    }
}


@router.put(
    "/{name}",
    response_model=AdapterInfo,
    responses={200: {"description": "Replaced, or the same bytes again"}, 201: {"model": AdapterInfo}},
    openapi_extra=_PUT_BODY,
)
async def put_adapter(
    name: str,
    request: Request,
    caller: Caller,
    state: OneState,
    allow_zero: bool = False,
    if_match: IfMatch = None,
    if_none_match: IfMatch = None,
) -> Response:
    """Uploads a PEFT checkpoint: parts `config` and `weights`, or JSON `{"source": …}`.

    201 when the name is new, 200 when it is replaced or the bytes are the current version's.
    """
    kind = media_type(request.scope)
    tenant, quota = caller.tenant.id, Quota(caller.tenant.max_adapters, caller.tenant.max_adapter_bytes)
    state.registry.expect(name, _least_bytes(request), quota=quota, tenant=tenant)
    conditions: dict[str, Any] = {"if_match": if_match, "if_none_match": if_none_match, "tenant": tenant}
    check = partial(state.registry.check, name, allow_zero=allow_zero, **conditions)
    take = partial(state.registry.take, quota=quota, **conditions)
    if kind == "application/json":
        filled = _fetched(await _source(request), state)
    elif kind == "multipart/form-data":
        filled = _received(request, state)
    else:
        raise InvalidRequest("send multipart/form-data with 'config' and 'weights', or application/json with 'source'")
    with _place(caller.tenant, state):
        async with filled as staging:
            draft = await state.checks.run(tenant, partial(check, staging))
            copies = partial(state.registry.laned, name, tenant)
            result = await state.changes.run(tenant, name, partial(take, staging, draft), copies=copies)
    return _with_etag(result.version, 201 if result.created else 200)


@router.get("", response_model=AdapterList)
async def list_adapters(caller: Caller, state: OneState, query: AdapterPage) -> dict[str, Any]:
    """One's own adapters and the published ones by name, a page at a time. Of two of one name, one's own."""
    page, following = state.registry.list(limit=query.limit, after=query.after, tenant=caller.tenant.id)
    return {"data": [status_of(state, caller.tenant.id, found) for found in page], "next": following}


@router.get("/{name}", response_model=AdapterStatus)
async def show_adapter(name: str, response: Response, caller: Caller, state: OneState) -> dict[str, Any]:
    """The current version, and where it is."""
    found = state.registry.find(name, caller.tenant.id)
    response.headers["ETag"] = f'"{found.version.digest}"'
    return status_of(state, caller.tenant.id, found)


@router.get("/{name}/versions", response_model=VersionList)
async def list_versions(name: str, caller: Caller, state: OneState) -> dict[str, Any]:
    """The history of an adapter, oldest first."""
    current = state.registry.get(name, caller.tenant.id).version
    versions = state.registry.versions(name, caller.tenant.id)
    return {"data": [_plain(version) | {"current": version.version == current} for version in versions]}


@router.post("/{name}/rollback", response_model=AdapterInfo)
async def roll_back(name: str, body: Rollback, caller: Caller, state: OneState, if_match: IfMatch = None) -> Response:
    """Makes an earlier version current again, under its own number."""
    tenant = caller.tenant.id
    back = partial(state.registry.rollback, name, body.version, if_match=if_match, tenant=tenant)
    copies = partial(state.registry.laned, name, tenant)
    version = await state.changes.run(tenant, name, back, copies=copies)
    return _with_etag(version, 200)


@router.patch("/{name}", response_model=AdapterStatus)
async def patch_adapter(
    name: str, body: AdapterPatch, caller: Caller, state: OneState, if_match: IfMatch = None
) -> dict[str, Any]:
    """Publishes an adapter or makes it private again; gives it a lane of its own, or takes that back. Answers when that
    is done; 409 when there is no room, or another tenant has published the name."""
    wanted: dict[str, Any] = {"pinned": body.pinned, "public": body.public, "tenant": caller.tenant.id}
    wanted["if_match"] = if_match
    merged = None if body.lane is None else body.lane == "merged"
    change = partial(state.registry.change, name, merged=merged, **wanted)
    found = await state.changes.run(caller.tenant.id, name, change, copies=lambda: merged is True)
    return status_of(state, caller.tenant.id, found)


@router.delete("/{name}", status_code=204)
async def delete_adapter(name: str, caller: Caller, state: OneState, if_match: IfMatch = None) -> Response:
    """Removes an adapter. Requests in flight finish on the version that they began with."""
    return await removed(state, name, caller.tenant.id, if_match)


def _least_bytes(request: Request) -> int:
    """What an upload adds at least, by what it announces."""
    length = request.headers.get("content-length", "")
    form = media_type(request.scope) == "multipart/form-data" and length.isdecimal()
    return max(1, int(length) - FORM_OVERHEAD) if form else 1


@contextlib.contextmanager
def _place(tenant: Tenant, state: State) -> Iterator[None]:
    """A place for an upload during the block. Raises as `Places.taking`; a refusal by the tenant's part is counted and
    carries the headers of its limits, as those of requests do."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(state.uploads.taking(tenant.id))
        except RateLimited as fault:
            state.accounts.admission.refused_by(fault, tenant)
            state.traffic.refused(tenant.id, fault.code)
            raise
        yield


@contextlib.asynccontextmanager
async def _received(request: Request, state: State) -> AsyncIterator[Staging]:
    """The parts of the body, staged; they come by way of temporary files."""
    async with _staging(state) as staging:
        form = await _receive(request)
        try:
            config, weights = _parts(form, state.settings.max_upload_bytes)
            await run_in_threadpool(_keep, config, weights, staging)
        finally:
            await form.close()
        yield staging


@contextlib.asynccontextmanager
async def _fetched(source: str, state: State) -> AsyncIterator[Staging]:
    """What is at the address, staged."""
    async with _staging(state) as staging:
        await anyio.to_thread.run_sync(_fetch, source, staging, state, limiter=state.fetches)
        yield staging


async def _receive(request: Request) -> FormData:
    try:
        async with asyncio.timeout(RECEIVE_SECONDS):  # outermost: its TimeoutError is an OSError
            with storage_errors("receive the upload"):
                return await request.form(max_files=2, max_fields=2, max_part_size=MAX_CONFIG_BYTES)
    except TimeoutError as fault:
        raise InvalidRequest(f"the upload took longer than {RECEIVE_SECONDS} s", code="upload_timeout") from fault
    except UnicodeError as fault:  # the charset that the client names is unknown, or its bytes are not of it
        raise InvalidRequest("a part is not text in the charset that the request names") from fault
    except HTTPException as fault:
        if "maximum size" in fault.detail:
            raise TooLarge(f"a text part is larger than {MAX_CONFIG_BYTES} bytes", param="config") from fault
        if "Too many" in fault.detail:
            raise InvalidRequest("send exactly one part 'config' and one part 'weights'", param="part") from fault
        raise


@contextlib.asynccontextmanager
async def _staging(state: State) -> AsyncIterator[Staging]:
    """A directory for one upload; made and removed beside the event loop, removed also for a client that has gone."""
    staging = await run_in_threadpool(state.store.stage)
    try:
        yield staging
    finally:
        with anyio.CancelScope(shield=True):
            await run_in_threadpool(staging.__exit__, None, None, None)


async def _source(request: Request) -> str:
    try:
        return Source.model_validate_json(await request.body()).source
    except ValidationError as fault:
        raise InvalidRequest(f"source: {fault.errors()[0]['msg']}", param="source") from fault


def _parts(form: FormData, max_bytes: int) -> tuple[UploadFile | str, UploadFile]:
    for key, _ in form.multi_items():
        if key not in ("config", "weights"):
            raise InvalidRequest(f"unknown part '{key}'", param="part")
    for key in ("config", "weights"):
        if len(form.getlist(key)) != 1:
            raise InvalidRequest(f"send exactly one part '{key}'", param=key)
    config, weights = form["config"], form["weights"]
    if not isinstance(weights, UploadFile):
        raise InvalidRequest("'weights' must be a file", param="weights")
    if (weights.size or 0) > max_bytes:
        raise TooLarge(f"the weights have {weights.size} bytes; at most {max_bytes} are taken", param="weights")
    if isinstance(config, UploadFile) and (config.size or 0) > MAX_CONFIG_BYTES:
        raise TooLarge(f"the config has {config.size} bytes; at most {MAX_CONFIG_BYTES} are taken", param="config")
    return config, weights


def _keep(config: UploadFile | str, weights: UploadFile, staging: Staging) -> None:
    with storage_errors("keep the upload"):
        if isinstance(config, str):
            staging.config_path.write_bytes(config.encode("utf-8", "surrogatepass"))  # refused when it is read as JSON
        else:
            _copy(config, staging.config_path)
        _copy(weights, staging.weights_path)


def _fetch(source: str, staging: Staging, state: State) -> None:
    settings = state.settings
    sources.fetch(source, staging, settings.adapter_sources, settings.max_upload_bytes, store=state.store.root)


def _copy(part: UploadFile, target: Path) -> None:
    part.file.seek(0)
    with target.open("wb") as out:
        shutil.copyfileobj(part.file, out, 1 << 20)


def _plain(version: AdapterVersion) -> dict[str, Any]:
    public = asdict(version) | {"targets": list(version.targets)}
    del public["base_digest"]
    return public


def _with_etag(version: AdapterVersion, status: int) -> JSONResponse:
    return JSONResponse(_plain(version), status_code=status, headers={"ETag": f'"{version.digest}"'})


async def removed(state: State, name: str, tenant: str, if_match: str | None) -> Response:
    """A tenant's adapter, deleted. Raises as `Registry.delete`."""
    delete = partial(state.registry.delete, name, if_match=if_match, tenant=tenant)
    last = await state.changes.run(tenant, name, delete, copies=lambda: False)
    state.activity.pop((tenant, name), None)
    state.cache.drop(last.key)
    return Response(status_code=204)


def status_of(state: State, tenant: str, found: Named) -> dict[str, Any]:
    """An adapter as the tenant sees it."""
    version, own = found.version, found.owner == tenant
    ref = ref_of(version, found.owner)
    activity = state.activity.get((found.owner, version.name)) if own else None
    activity = activity or Activity()
    figures = state.client.lane(ref)
    note = state.client.stats.lane_notes.get((found.owner, version.name)) if own and figures is None else None
    return _plain(version) | {
        "own": own,
        "public": found.public,
        "residency": _residency(state, ref.key),
        "lane": "shared" if figures is None else "merged",
        "lane_note": note,
        "pinned": own and figures is not None and figures.pinned,
        "in_flight": activity.in_flight,
        "last_used": activity.last_used,
        "requests": activity.requests,
    }


def _residency(state: State, key: str) -> Literal["disk", "ram", "device"]:
    if key in state.client.stats.resident:
        return "device"
    return "ram" if state.cache.peek(key) else "disk"
