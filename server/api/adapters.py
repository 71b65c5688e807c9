"""`/adapters`: upload, list, show, history, rollback, delete."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio
from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from server.api.limits import media_type
from server.api.schemas import AdapterInfo, AdapterList, AdapterStatus, LanePatch, Rollback, Source, VersionList
from server.api.state import Activity, State, state_of
from server.core import MAX_CONFIG_BYTES, AdapterRef, AdapterVersion
from server.errors import InvalidRequest, Overloaded, TooLarge
from server.registry import sources
from server.registry.records import PutResult
from server.registry.store import Staging, storage_errors

RECEIVE_SECONDS = 900  # an upload that takes longer is given up: only so many are received at once
OneState = Annotated[State, Depends(state_of)]
IfMatch = Annotated[str | None, Header(max_length=4096)]
router = APIRouter(prefix="/adapters")
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
    state: OneState,
    allow_zero: bool = False,
    if_match: IfMatch = None,
    if_none_match: IfMatch = None,
) -> Response:
    """Uploads a PEFT checkpoint: parts `config` and `weights`, or JSON `{"source": …}`.

    201 when the name is new, 200 when it is replaced or the bytes are the current version's.
    """
    kind = media_type(request.scope)
    conditions = {"if_match": if_match, "if_none_match": if_none_match, "allow_zero": allow_zero}
    if kind == "application/json":
        source = await _source(request)
        async with _staging(state) as staging:
            await anyio.to_thread.run_sync(_fetch, source, staging, state, limiter=state.fetches)
            result = await _put(state, name, staging, conditions)
    elif kind == "multipart/form-data":
        async with _form(request, state) as form, _staging(state) as staging:
            config, weights = _parts(form, state.settings.max_upload_bytes)
            await run_in_threadpool(_keep, config, weights, staging)
            result = await _put(state, name, staging, conditions)
    else:
        raise InvalidRequest("send multipart/form-data with 'config' and 'weights', or application/json with 'source'")
    return _with_etag(result.version, 201 if result.created else 200)


@router.get("", response_model=AdapterList)
async def list_adapters(
    state: OneState,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(max_length=64)] = None,
) -> dict[str, Any]:
    """All adapters by name, a page at a time."""
    page, following = state.registry.list(limit=limit, after=after)
    return {"data": [_status(state, version) for version in page], "next": following}


@router.get("/{name}", response_model=AdapterStatus)
async def show_adapter(name: str, response: Response, state: OneState) -> dict[str, Any]:
    """The current version, and where it is."""
    version = state.registry.get(name)
    response.headers["ETag"] = f'"{version.digest}"'
    return _status(state, version)


@router.get("/{name}/versions", response_model=VersionList)
async def list_versions(name: str, state: OneState) -> dict[str, Any]:
    """The history of an adapter, oldest first."""
    current = state.registry.get(name).version
    versions = state.registry.versions(name)
    return {"data": [_plain(version) | {"current": version.version == current} for version in versions]}


@router.post("/{name}/rollback", response_model=AdapterInfo)
async def roll_back(name: str, body: Rollback, state: OneState, if_match: IfMatch = None) -> Response:
    """Makes an earlier version current again, under its own number."""
    version = await run_in_threadpool(state.registry.rollback, name, body.version, if_match=if_match)
    return _with_etag(version, 200)


@router.patch("/{name}", response_model=AdapterStatus)
async def patch_adapter(name: str, body: LanePatch, state: OneState) -> dict[str, Any]:
    """Gives an adapter a lane of its own, or takes it back. Answers when it is there; 409 when there is no room."""
    merged = None if body.lane is None else body.lane == "merged"
    change = partial(state.registry.set_lane, name, merged=merged, pinned=body.pinned)
    return _status(state, await anyio.to_thread.run_sync(change, limiter=state.changes))


@router.delete("/{name}", status_code=204)
async def delete_adapter(name: str, state: OneState, if_match: IfMatch = None) -> Response:
    """Removes an adapter. Requests in flight finish on the version that they began with."""
    digest = state.registry.get(name).digest
    await run_in_threadpool(state.registry.delete, name, if_match=if_match)
    state.activity.pop(name, None)
    state.cache.drop(digest)
    return Response(status_code=204)


async def _put(state: State, name: str, staging: Staging, conditions: dict[str, Any]) -> PutResult:
    put = partial(state.registry.put, name, staging, **conditions)
    return await anyio.to_thread.run_sync(put, limiter=state.checks)


@contextlib.asynccontextmanager
async def _form(request: Request, state: State) -> AsyncIterator[FormData]:
    """The parts of an upload, spooled to temporary files. Raises Overloaded when too many are being received."""
    try:
        state.receiving.acquire_on_behalf_of_nowait(request)
    except anyio.WouldBlock:
        raise Overloaded("too many uploads are being received", code="uploads_full", retry_after=5) from None
    try:
        form = await _receive(request)
        try:
            yield form
        finally:
            await form.close()
    finally:
        state.receiving.release_on_behalf_of(request)


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
    sources.fetch(source, staging, state.settings.adapter_sources, state.settings.max_upload_bytes)


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


def _status(state: State, version: AdapterVersion) -> dict[str, Any]:
    activity = state.activity.get(version.name, Activity())
    figures = state.client.lane(AdapterRef(version.name, version.version, version.digest))
    return _plain(version) | {
        "residency": _residency(state, version.digest),
        "lane": "shared" if figures is None else "merged",
        "pinned": figures is not None and figures.pinned,
        "in_flight": activity.in_flight,
        "last_used": activity.last_used,
        "requests": activity.requests,
    }


def _residency(state: State, digest: str) -> Literal["disk", "ram", "device"]:
    if digest in state.client.stats.resident:
        return "device"
    return "ram" if state.cache.peek(digest) else "disk"
