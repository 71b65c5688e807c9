"""The `onebase` command with an engine that counts nothing for the metrics: what counting costs is the difference.

`python -m loadtest.uncounted serve …`, by `loadtest/metrics.py`.
"""

from __future__ import annotations

import contextlib
from typing import Any
from unittest.mock import patch

from starlette.types import Receive, Scope, Send

from server import cli
from server.engine import engine
from server.engine.clock import Clock
from server.engine.counting import Counting
from server.metrics.http import CountResponses
from server.metrics.traffic import Traffic


class Uncounted(Counting):
    """Nothing is counted."""

    def first(self, *_: Any) -> None: ...
    def token(self, *_: Any) -> None: ...
    def step(self, *_: Any) -> None: ...
    def ended(self, *_: Any) -> None: ...


async def _through(self: CountResponses, scope: Scope, receive: Receive, send: Send) -> None:
    await self.app(scope, receive, send)


REPLACED: tuple[tuple[Any, str, Any], ...] = (
    (engine, "Counting", Uncounted),
    (Clock, "mark", lambda *_: 0.0),
    (Clock, "sample", lambda *_: None),
    (Traffic, "ended", lambda *_: None),
    (CountResponses, "__call__", _through),
)

if __name__ == "__main__":
    with contextlib.ExitStack() as stack:
        for owner, name, nothing in REPLACED:
            stack.enter_context(patch.object(owner, name, nothing))
        cli.app()
