"""Lanes as the registry asks for them: from a worker thread, and waiting until the engine has answered."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Iterable
from typing import Any

from server.api.state import State
from server.core import AdapterRef
from server.errors import Conflict, OnebaseError, TenantNotFound
from server.registry.registry import Registry

log = logging.getLogger("onebase.api")


class EngineLanes:
    """Never called on the event loop, which does the waiting."""

    def __init__(self, state: State):
        self._state, self._client = state, state.client

    def enter(self, adapter: AdapterRef, pinned: bool, *, keeps: bool = False) -> None:
        """Returns when the adapter has its own lane. Raises Conflict when there is no room; where it `keeps` others,
        none of them makes way."""
        self._wait(self._enter(adapter, pinned, keeps))

    def leave(self, adapter: AdapterRef, *, asked: bool = False, replaced: bool = False) -> None:
        """Ends the adapter's own lane, if it has one or is about to; `asked` if somebody wants it in the shared one,
        `replaced` if another version of the name takes over."""
        if asked or self._client.lane(adapter) is not None:
            self._wait(self._client.unmerge(adapter, asked=asked, replaced=replaced))
        else:
            self._client.forget_lane(adapter, replaced=replaced)

    def inside(self, adapter: AdapterRef) -> bool | None:
        """None where nobody asked for a lane of its own; else whether its copy is pinned."""
        figures = self._client.lane(adapter)
        return None if figures is None or figures.automatic else figures.pinned

    async def _enter(self, adapter: AdapterRef, pinned: bool, keeps: bool) -> None:
        if self._state.accounts.directory.disabled(adapter.tenant):
            raise Conflict(f"the tenant {adapter.tenant} is disabled", code="tenant_disabled")
        others = {one.tenant for one in self._client.stats.asked_bytes}  # theirs may have changed since they asked
        parts = merged_parts(self._state, {adapter.tenant} | others)
        await self._client.merge(adapter, pinned=pinned, keeps=keeps, parts=parts)

    def _wait(self, change: Coroutine[Any, Any, None]) -> None:
        assert self._client.loop is not None
        asyncio.run_coroutine_threadsafe(change, self._client.loop).result()


def merged_parts(state: State, tenants: Iterable[str]) -> dict[str, int | None]:
    """Bytes of merged copies that each tenant may ask for; None is no bound. Where keys tell several tenants apart, one
    that is not told otherwise may have half of MERGED_BYTES. Called on the event loop, as the directory is."""
    several = state.settings.auth == "on" and len(state.accounts.directory.tenants(limit=2)) > 1
    half = state.settings.merged_bytes // 2 if several else None
    return {tenant: _part(state, tenant, half) for tenant in tenants}


def _part(state: State, tenant: str, otherwise: int | None) -> int | None:
    with contextlib.suppress(TenantNotFound):  # a database without it: its adapters are still there
        own = state.accounts.directory.show(tenant).max_merged_bytes
        if own is not None:
            return min(own, state.settings.merged_bytes)
    return otherwise


def restore(registry: Registry, whose: str | None = None) -> None:
    """Gives lanes to those that had them when the server last ran, or when the tenant `whose` was disabled, the pinned
    ones first, as far as there is room: nobody makes way. Runs on a thread beside requests."""
    for tenant, name in registry.wishes():
        if whose not in (None, tenant):
            continue
        try:
            registry.enter_again(name, tenant)
        except OnebaseError as fault:
            log.warning("%s stays in the shared lane: %s", name, fault.message)
