"""What is known of one HTTP request: gathered on its way, told once when it has ended, for its log line and its trace.

A request has ended when its answer has, and, if the engine took it, when the engine is done with it as well: a client
that goes is the first end of the two, the token counts come with the second.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic, time_ns
from typing import Any, Protocol

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars

from server.api.schemas import ADAPTER_NAME, GenerateRequest
from server.engine.client import Stream
from server.engine.messages import Done, Times
from server.errors import OnebaseError
from server.tenants.accounts import Entry
from server.tenants.tenant import Principal

log = logging.getLogger("onebase.api")
PROMPT_CHARACTERS = 4_000  # of a prompt, in its log line
_NAME = re.compile(ADAPTER_NAME)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_CARRIED = ("traceparent", "tracestate")  # W3C Trace Context


class Traces(Protocol):
    """Where traces go, if they go anywhere."""

    def record(self, trail: Trail) -> str | None:
        """Takes the trace of a request that has ended; its id, unless it is not sampled."""
        ...

    def close(self) -> None:
        """Sends what is left, for a few seconds at most."""
        ...


@dataclass
class Generation:
    """What `/v1/generate` was asked for, and what came of it. `prompt` is there only where the settings say so."""

    operation: str  # as the GenAI conventions call it
    adapter: str | None
    stream: bool
    priority: str
    sampling: dict[str, float | int | None]
    prompt: str | None = None
    taken: Stream | None = None  # by the engine
    entry: Entry | None = None
    lane: str | None = None
    done: Done | None = None

    @property
    def finish_reasons(self) -> list[str]:
        """Of each answer; one without a last token ended as the request did."""
        if self.taken is None or self.done is None:
            return []
        ended = "error" if self.done.outcome == "error" else "cancelled"
        return [self.taken.reasons.get(index, ended) for index in range(self.taken.submit.n)]


@dataclass
class Trail:
    """`began` and `ended` are monotonic seconds, `epoch` what to add for nanoseconds since 1970. `status` is the HTTP
    status that was sent, None if none was; `code` that of the fault that the client was told, or would have been."""

    method: str
    scope: Scope = field(repr=False)
    tell: Callable[[Trail], None] = field(repr=False)
    began: float = field(default_factory=monotonic)
    ended: float | None = None
    status: int | None = None
    code: str | None = None
    generation: Generation | None = None

    def __post_init__(self) -> None:
        self._epoch = time_ns() - int(self.began * 1e9)
        self._open = True

    @property
    def request_id(self) -> str:
        return self.scope["state"].get("request_id", "")

    @property
    def principal(self) -> Principal | None:
        """Who sent it, once its key has been looked at."""
        return self.scope["state"].get("principal")

    @property
    def route(self) -> str | None:
        """The route's path with its parameters' names; a client's own words stay out of it."""
        return getattr(self.scope.get("route"), "path", None)

    @property
    def adapter(self) -> str | None:
        """The adapter that it names, which there may not be."""
        if self.generation is not None:
            return self.generation.adapter
        name = self.scope.get("path_params", {}).get("name", "")
        return name if _NAME.fullmatch(name) else None

    @property
    def carrier(self) -> dict[str, str]:
        """The caller's trace."""
        given = ((name.decode("latin-1"), value.decode("latin-1")) for name, value in self.scope["headers"])
        return {name: value for name, value in given if name in _CARRIED}

    @property
    def outcome(self) -> str:
        """finished, cancelled (the client has gone), refused (before it began), or error."""
        done = self.generation.done if self.generation else None
        if done is not None:
            return "error" if self.code else done.outcome
        if self.status in (None, 499):
            return "cancelled"
        if self.code is None and self.status is not None and self.status < 400:
            return "finished"
        return "error" if self.status in (500, 507) else "refused"

    @property
    def times(self) -> Times | None:
        """When the engine did what."""
        return self.generation.done.times if self.generation and self.generation.done else None

    def nanoseconds(self, moment: float) -> int:
        """A monotonic moment as nanoseconds since 1970; one outside of the request as its nearest end."""
        inside = min(max(moment, self.began), self.ended or moment)
        return self._epoch + int(inside * 1e9)

    def asks(self, body: GenerateRequest, *, prompts: bool) -> None:
        """The body of a generation has been read."""
        wanted = ("max_tokens", "temperature", "top_p", "top_k", "n")
        self.generation = Generation(
            "text_completion" if body.messages is None else "chat",
            body.adapter,
            body.stream,
            body.priority,
            {name: getattr(body, name) for name in wanted},
            _beginning(body) if prompts else None,
        )

    def runs(self, stream: Stream, entry: Entry) -> None:
        """The engine has taken it."""
        assert self.generation is not None
        self.generation.taken, self.generation.entry = stream, entry

    def fails(self, fault: OnebaseError) -> None:
        """The client is told of a fault."""
        self.code = fault.code

    def done(self, done: Done, lane: str) -> None:
        """The engine is done with it."""
        assert self.generation is not None
        self.generation.done, self.generation.lane = done, lane
        if done.error is not None:
            self.fails(done.error)
        self._close()

    def answered(self) -> None:
        """Its answer has ended, or its client has gone."""
        self.ended = monotonic()
        self._close()

    def _close(self) -> None:
        running = self.generation is not None and self.generation.taken is not None and self.generation.done is None
        if self.ended is None or running or not self._open:
            return
        self._open = False
        self.ended = max(self.ended, self.times.ended if self.times else 0.0)
        try:
            self.tell(self)
        except Exception:  # what is told of a request must not change how it ends
            log.exception("a request could not be told of")
        self.scope["state"].pop("trail", None)  # else each would hold the other


class Trails:
    """Pure ASGI middleware: a `Trail` for every request, told when that has ended."""

    def __init__(self, app: ASGIApp, tell: Callable[[Trail], None]):
        self.app, self._tell = app, tell

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # What a client makes up stays out of it, as in OpenTelemetry's conventions.
        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        trail = scope.setdefault("state", {})["trail"] = Trail(method, scope, self._tell)
        bind_contextvars(request_id=trail.request_id)  # other lines of this request's task say it too

        async def seen(message: Message) -> None:
            if message["type"] == "http.response.start":
                trail.status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, seen)
        except Exception as fault:
            trail.fails(fault if isinstance(fault, OnebaseError) else OnebaseError("unexpected"))
            trail.status = trail.status or 500  # it is answered outside of here
            raise
        finally:
            trail.answered()


def trail_of(request: Request) -> Trail:
    """The request's trail; a FastAPI dependency."""
    return request.scope["state"]["trail"]


def fails(request: Request, code: str) -> None:
    """A request is answered with a fault's `code`."""
    trail: Any = request.scope.get("state", {}).get("trail")
    if trail is not None:
        trail.code = code


def _beginning(body: GenerateRequest) -> str:
    if isinstance(body.prompt, str):
        return body.prompt[:PROMPT_CHARACTERS]
    if body.prompt is not None:
        return str(body.prompt[:PROMPT_CHARACTERS])[:PROMPT_CHARACTERS]
    said = "\n".join(f"{one.role}: {one.content[:PROMPT_CHARACTERS]}" for one in body.messages or ())
    return said[:PROMPT_CHARACTERS]
