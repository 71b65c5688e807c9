"""Turns every fault into the error envelope, and gives every answer an `x-request-id`."""

from __future__ import annotations

import json
import logging
import re
import secrets
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.trail import fails
from server.errors import InvalidRequest, OnebaseError

log = logging.getLogger("onebase.api")

_CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
MAX_PARAM = 200
RETRY_AFTER = 1  # seconds, where the fault knows nothing better
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}


class RequestId:
    """Pure ASGI middleware: `x-request-id` of the client if it is a plain token, else one of our own."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _CLIENT_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        await self.app(scope, receive, with_id)


def answer(request: Request, fault: OnebaseError) -> Response:
    """The HTTP answer of a fault."""
    fails(request, fault.code)
    wait = fault.retry_after or (RETRY_AFTER if fault.status == 503 else None)
    headers = fault.headers | ({"Retry-After": str(wait)} if wait else {})
    content = json.dumps(fault.envelope())  # in ASCII: a message may repeat what is no valid text
    return Response(content, status_code=fault.status, headers=headers, media_type="application/json")


def install(app: FastAPI) -> None:
    """Registers the handlers on `app`."""
    app.add_middleware(RequestId)
    app.add_exception_handler(OnebaseError, _on_fault)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ClientDisconnect, _on_gone)
    app.add_exception_handler(Exception, _on_unexpected)


async def _on_fault(request: Request, fault: Any) -> Response:
    return answer(request, fault)


async def _on_invalid(request: Request, fault: Any) -> Response:
    first = fault.errors()[0]
    if first["type"] == "json_invalid":
        return answer(request, InvalidRequest(f"the body is not JSON: {first['ctx']['error']}"))
    _, *place = first["loc"]  # without `body`, `query`, …; and without the tags that schemas.py gives to forms
    param = ".".join(str(part) for part in place if not str(part).startswith("<"))[:MAX_PARAM] or None
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] in ("missing", "model_attributes_type") and first["loc"] == ("body",):
        message = "the body must be a JSON object, sent as application/json"
    return answer(request, InvalidRequest(f"{param}: {message}" if param else message, param=param))


async def _on_http(request: Request, fault: Any) -> Response:
    if fault.status_code == 400:  # the framework's word for a body that it cannot parse
        return answer(request, InvalidRequest(str(fault.detail)))
    kind = _TYPES.get(fault.status_code, "invalid_request_error")
    code = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}.get(fault.status_code, "http_error")
    fails(request, code)
    body = {
        "message": str(fault.detail),
        "type": kind,
        "param": None,
        "code": code,
    }
    return JSONResponse({"error": body}, status_code=fault.status_code, headers=getattr(fault, "headers", None))


async def _on_gone(request: Request, fault: Any) -> Response:
    return Response(status_code=499)  # while its body was read: nobody is there to read this


async def _on_unexpected(request: Request, fault: Any) -> Response:
    log.error("unexpected fault", exc_info=fault)
    response = answer(request, OnebaseError("an unexpected error; the server's log has more"))
    response.headers["Connection"] = "close"  # uvicorn closes it after a fault; a client must not send more on it
    request_id = request.scope.get("state", {}).get("request_id")
    if request_id:  # this handler's answer is sent outside the middleware that adds it
        response.headers["x-request-id"] = request_id
    return response
