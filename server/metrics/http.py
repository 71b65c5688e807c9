"""Answers by what was called and how it went: a refused request never reaches the engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from prometheus_client.core import Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.metrics.families import Family

# By the beginning of the path; whatever else is called has one label, or a stranger could make any number of them.
_ROUTES = (
    ("generate", ("/v1/generate",)),
    ("openai", ("/v1/completions", "/v1/chat/", "/v1/models")),
    ("adapters", ("/adapters",)),
    ("usage", ("/v1/usage", "/v1/invoices")),
    ("admin", ("/admin",)),
    ("health", ("/healthz", "/readyz", "/metrics")),
)
_OWN = {429: "429", 503: "503"}

RESPONSES = Family(
    "counter",
    "onebase_http_responses",
    "Answers begun, by group of routes and status: 2xx, 3xx, 4xx (429 apart), 5xx (503 apart). A stream that fails "
    "after its first chunk was a 2xx; onebase_requests_total knows.",
    "answers",
    ("route", "status"),
)
Responses = Counter[tuple[str, str]]


class CountResponses:
    """Pure ASGI middleware: counts in `responses`."""

    def __init__(self, app: ASGIApp, responses: Responses):
        self.app, self._responses = app, responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        async def counting(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._responses[route(scope["path"]), status(message["status"])] += 1
            await send(message)

        try:
            await self.app(scope, receive, counting)
        except Exception:
            if not begun:  # answered outside of all middleware
                self._responses[route(scope["path"]), "5xx"] += 1
            raise


def route(path: str) -> str:
    """The group of routes that a path is in."""
    return next((name for name, starts in _ROUTES if path.startswith(starts)), "other")


def status(code: int) -> str:
    """The status, or its class."""
    return _OWN.get(code, f"{code // 100}xx")


def families(responses: Mapping[tuple[str, str], int]) -> Iterator[Metric]:
    """All of this module. Errors of generation are there from the start, for a rate needs a value to begin with."""
    begin = {("generate", one): 0 for one in ("2xx", "4xx", "429", "5xx", "503")}
    yield RESPONSES.by(begin | dict(responses))
