"""What the endpoints share, as one object on `app.state.onebase`."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field

from fastapi import Request

from server.engine.client import EngineClient
from server.model.loader import Base
from server.registry.cache import AdapterCache
from server.registry.registry import Registry
from server.registry.store import Store
from server.settings import Settings


@dataclass
class Activity:
    """What an adapter's name has been used for since the start."""

    requests: int = 0
    in_flight: int = 0
    last_used: float | None = None


@dataclass
class State:
    """Everything an endpoint may reach. `salt` separates this tenant's prompts in the prefix cache."""

    settings: Settings
    base: Base
    store: Store
    registry: Registry
    cache: AdapterCache
    client: EngineClient
    max_context: int
    salt: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    activity: dict[str, Activity] = field(default_factory=dict)

    def began(self, name: str) -> None:
        """A request for the adapter `name` was taken."""
        one = self.activity.setdefault(name, Activity())
        one.requests, one.in_flight, one.last_used = one.requests + 1, one.in_flight + 1, time.time()

    def ended(self, name: str) -> None:
        """It has ended, however it did."""
        if name in self.activity:
            self.activity[name].in_flight -= 1


def state_of(request: Request) -> State:
    """The State of the app that serves `request`; a FastAPI dependency."""
    state: State = request.app.state.onebase
    return state
