"""Bounds the body of every request while it is read, with or without a Content-Length."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.settings import MIB

MAX_JSON_BYTES = 8 * MIB
FORM_OVERHEAD = 128 * 1024  # boundaries, part headers and the config, beside an upload's weights


def media_type(scope: Scope) -> str:
    """The Content-Type without its parameters."""
    return Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()


class BodyLimit:
    """Pure ASGI middleware. Raises 413 where the body is read, so that the answer is made like any other fault's."""

    def __init__(self, app: ASGIApp, limit: Callable[[Scope], int]):
        self.app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit, total = self._limit(scope), 0
        length = Headers(scope=scope).get("content-length", "")
        announced = int(length) if length.isdecimal() else 0

        async def limited() -> Message:
            nonlocal total
            if announced > limit:
                raise _too_large(limit)  # before the first byte: a client that asked `Expect: 100-continue` sends none
            message = await receive()
            total += len(message.get("body", b""))
            if total > limit:
                raise _too_large(limit)
            return message

        await self.app(scope, limited, send)


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"the body is larger than {limit} bytes")


def by_kind(max_upload_bytes: int) -> Callable[[Scope], int]:
    """Uploads may be as large as the settings say; everything else is JSON."""

    def limit(scope: Scope) -> int:
        upload = scope["method"] == "PUT" and media_type(scope) == "multipart/form-data"
        return max_upload_bytes + FORM_OVERHEAD if upload else MAX_JSON_BYTES

    return limit
