"""`/healthz`, `/readyz`, `/metrics`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from server.api.state import State, state_of
from server.metrics import make_registry

router = APIRouter()
OneState = Annotated[State, Depends(state_of)]


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz", responses={503: {"description": "Not ready"}})
async def readyz(state: OneState) -> JSONResponse:
    """Base loaded, engine running, not draining; 503 otherwise."""
    if state.client.ready:
        return JSONResponse({"status": "ready", "base": state.base.info.name})
    reason = "draining" if state.client.draining else "the engine is not running"
    return JSONResponse({"status": "not ready", "reason": reason}, status_code=503)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(state: OneState) -> Response:
    """Prometheus text 0.0.4, whatever the client would rather have."""
    text = generate_latest(make_registry(state.client.stats, state.cache, len(state.registry)))
    return Response(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)
