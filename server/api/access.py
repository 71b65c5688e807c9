"""Who may call what: the key is looked at before anything of the body is read.

Open are the routers without a `guarded` route class: health.py, and page.py, whose files show nothing of anybody.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Depends, Request, Response, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from server.api.state import State, state_of
from server.errors import Forbidden
from server.tenants.keys import Scope
from server.tenants.tenant import Principal

_READS = frozenset({"GET", "HEAD"})
# For /openapi.json alone: nothing is refused by it.
_SHOWN = Security(
    HTTPBearer(scheme_name="key", description="`ob_<id>_<secret>`; not asked for where AUTH is off", auto_error=False)
)
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def guarded(*, read: Scope | None, write: Scope) -> type[APIRoute]:
    """A router's `route_class`: its calls need a key with the scope `read` (None: any key), or, if they change
    something, `write`. Raises Unauthorized or Forbidden."""

    class Guarded(APIRoute):
        def __init__(self, path: str, endpoint: Callable[..., Any], **more: Any):
            others = [one for one in more.pop("dependencies", None) or () if one is not _SHOWN]
            super().__init__(path, endpoint, dependencies=[_SHOWN, *others], **more)

        def get_route_handler(self) -> Handler:
            handler, scope = super().get_route_handler(), read if (self.methods or set()) <= _READS else write

            async def checked(request: Request) -> Response:
                request.state.principal = _admitted(request, scope)
                return await handler(request)

            return checked

    return Guarded


def _admitted(request: Request, scope: Scope | None) -> Principal:
    state: State = state_of(request)
    if state.settings.auth == "off":
        return state.accounts.anybody()
    principal = state.accounts.directory.authenticate(request.headers.get("authorization"))
    if scope is not None and not principal.may(scope):
        raise Forbidden(f"this key has no scope {scope}", code="scope_missing")
    return principal


def principal_of(request: Request) -> Principal:
    """Who sent a guarded call; a FastAPI dependency."""
    principal: Principal = request.state.principal
    return principal


Caller = Annotated[Principal, Depends(principal_of)]
