"""The status page at `/`: files that never change and show nothing by themselves. Everything on it is asked for by the
browser, with the key of whoever looks."""

from __future__ import annotations

from importlib.resources import files
from pathlib import PurePath

from fastapi import APIRouter, Response

# Only what is in these files runs, and only this server is talked to; markup made of text is refused by the browser.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # after an update no old file may meet a new one
}
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_FILES = {file.name: file.read_bytes() for file in files("server").joinpath("page").iterdir()}
PATHS = frozenset("/" if name == "index.html" else f"/page/{name}" for name in _FILES)
router = APIRouter()  # open: see access.py


def _serve(path: str, name: str) -> None:
    async def send() -> Response:
        return Response(_FILES[name], media_type=_KINDS[PurePath(name).suffix], headers=HEADERS)

    router.add_api_route(path, send, methods=["GET", "HEAD"], include_in_schema=False)


for _name in _FILES:
    _serve("/" if _name == "index.html" else f"/page/{_name}", _name)
