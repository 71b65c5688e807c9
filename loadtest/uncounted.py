"""The `onebase` command with an engine that counts nothing for the metrics: what counting costs is the difference.

`python -m loadtest.uncounted serve …`, by `loadtest/metrics.py`.
"""

from __future__ import annotations

from typing import Any

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


def _unmarked(clock: Clock, part: str) -> float:
    return 0.0


def _unsampled(clock: Clock, lora: float, forward: float) -> None: ...


def _untold(traffic: Traffic, *_: Any) -> None: ...


async def _through(self: CountResponses, scope: Scope, receive: Receive, send: Send) -> None:
    await self.app(scope, receive, send)


if __name__ == "__main__":
    engine.Counting = Uncounted  # type: ignore[attr-defined]
    Clock.mark, Clock.sample = _unmarked, _unsampled  # type: ignore[assignment]
    Traffic.ended = _untold  # type: ignore[assignment]
    CountResponses.__call__ = _through  # type: ignore[method-assign]
    cli.app()
