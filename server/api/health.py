"""`/healthz`, `/readyz`, `/metrics`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from server.api import scrape
from server.api.scrape import FAILED_STEPS
from server.api.state import State, state_of
from server.errors import Overloaded

router = APIRouter()
OneState = Annotated[State, Depends(state_of)]


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", responses={503: {"description": "Not ready"}})
async def readyz(state: OneState) -> dict[str, str]:
    """Base loaded, engine stepping, ledger written, not draining; 503 otherwise."""
    failed = state.client.stats.failed_steps
    if state.client.draining:
        raise Overloaded("the server is draining", code="draining", retry_after=5)
    if not state.client.ready or failed >= FAILED_STEPS:
        reason = f"the last {failed} steps failed" if failed >= FAILED_STEPS else "the engine does not step"
        raise Overloaded(f"not ready: {reason}", code="not_ready", retry_after=5)
    if not state.accounts.ledger.healthy:
        raise Overloaded("not ready: the ledger cannot be written", code="not_ready", retry_after=5)
    return {"status": "ready", "base": state.base.info.name}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request, state: OneState) -> Response:
    """Prometheus text 0.0.4, whatever the client would rather have. With AUTH on and no key, nothing that names a
    tenant or an adapter; with one, its scope must be `metrics:read` or `admin`."""
    return Response(await scrape.text(request, state), media_type=CONTENT_TYPE_PLAIN_0_0_4)
