"""What the endpoints share, as one object on `app.state.onebase`."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import anyio
from fastapi import Request

from server.api.changes import Changes
from server.api.parts import Lines, Places
from server.api.reads import Reads
from server.api.render import TokenNames
from server.api.trail import Traces
from server.core import AdapterRef
from server.engine.client import EngineClient
from server.metrics.fairness import Fairness
from server.metrics.http import Responses
from server.metrics.traffic import Traffic
from server.model.loader import Base
from server.registry.cache import AdapterCache
from server.registry.registry import Registry
from server.registry.store import Store
from server.settings import Settings
from server.tenants.accounts import Accounts

CHECKS_AT_ONCE = 2  # checking an upload is work for a core; the step loop needs the others
PAGES_AT_ONCE = 4  # of usage, and invoices: a large one takes tens of megabytes while it is made
UPLOADS_AT_ONCE = 16  # each may fill the temporary directory and `staging/` with the largest upload


@dataclass
class Activity:
    """What an adapter's name has been used for since the start."""

    requests: int = 0
    in_flight: int = 0
    last_used: float | None = None


@dataclass
class State:
    """Everything an endpoint may reach. `accounts` are there while the server runs; `traces` is where they go, if
    anywhere; `activity` is by (owner, name); `reads` has the turns at long prompts; `uploads` bounds how many uploads
    are under way, `fetches` the threads that fetch some of them, `checks` how many are checked, `changes` the calls
    that change a name, `pages` how many pages of usage and invoices are made. `responses` and `fairness` are for the
    metrics.
    """

    settings: Settings
    base: Base
    store: Store
    registry: Registry
    cache: AdapterCache
    client: EngineClient
    max_context: int
    accounts: Accounts = field(init=False)
    reads: Reads = field(init=False)
    traces: Traces | None = None
    activity: dict[tuple[str, str], Activity] = field(default_factory=dict)
    responses: Responses = field(default_factory=Counter)
    fairness: Fairness = field(default_factory=Fairness)
    checks: Lines = field(init=False)
    changes: Changes = field(init=False)
    pages: Lines = field(init=False)
    uploads: Places = field(init=False)
    fetches: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(UPLOADS_AT_ONCE))

    def __post_init__(self) -> None:
        shared = self.settings.auth == "on"  # else all is one tenant's
        self.reads = Reads(self.settings.max_queue_requests, shared=shared)
        self.checks = Lines(CHECKS_AT_ONCE, CHECKS_AT_ONCE // 2, shared=shared)
        self.changes = Changes(shared=shared)
        self.pages = Lines(PAGES_AT_ONCE, PAGES_AT_ONCE // 2, shared=shared)
        self.uploads = Places(UPLOADS_AT_ONCE, shared=shared)

    @cached_property
    def traffic(self) -> Traffic:
        """What tenants and adapters do, for the metrics."""
        return Traffic(self.settings.metrics_top)

    @cached_property
    def names(self) -> TokenNames:
        """The names of the base's tokens, which all answers share."""
        return TokenNames(self.base.tokenizer)

    def began(self, adapter: AdapterRef) -> Activity:
        """A request for the adapter was taken. When it ends, `in_flight` of what is returned goes down. Nothing is kept
        for a name that was deleted since it was resolved."""
        one = self.activity.get((adapter.tenant, adapter.name), Activity())
        if self.registry.taken(adapter.name, adapter.tenant):
            self.activity[adapter.tenant, adapter.name] = one
        one.requests, one.in_flight, one.last_used = one.requests + 1, one.in_flight + 1, time.time()
        return one


def state_of(request: Request) -> State:
    """The State of the app that serves `request`; a FastAPI dependency."""
    state: State = request.app.state.onebase
    return state
