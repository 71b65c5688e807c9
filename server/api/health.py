"""`/healthz`, `/readyz`, `/metrics`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from server.api.state import State, state_of
from server.errors import Overloaded
from server.metrics import TenantsCollector, make_registry

router = APIRouter()
FAILED_STEPS = 3  # so many in a row are the device's fault, not a request's
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
async def metrics(state: OneState) -> Response:
    """Prometheus text 0.0.4, whatever the client would rather have."""
    accounts = state.accounts
    tenants = TenantsCollector(accounts.ledger, accounts.admission, accounts.deliverer)
    text = generate_latest(make_registry(state.client.stats, state.cache, len(state.registry), tenants))
    return Response(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)
