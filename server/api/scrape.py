"""`/metrics`: who sees what of it, and the moment that is shown."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version

import torch
from fastapi import Request

from server.api.state import State
from server.core import digest_in
from server.engine.stats import Stats
from server.errors import Forbidden
from server.metrics.engine import Queue
from server.metrics.page import Moment, ready
from server.metrics.process import Machine
from server.registry.records import Key, Record, ref_of
from server.tenants.keys import Scope

FAILED_STEPS = 3  # so many in a row are the device's fault, not a request's


async def text(request: Request, state: State) -> bytes:
    """Everything for a key that may see it, and where AUTH is off; without a key what names no tenant. What takes long
    is not done on the event loop. Raises Unauthorized for a wrong key, Forbidden for one without the scope."""
    moment = _moment(state, everything=_may_see_all(request, state))
    return await asyncio.to_thread(moment.text)


def stepping(state: State) -> bool:
    """Whether the engine's thread runs, no step hangs, and not all of the last few failed."""
    client = state.client
    return client.alive and not client.stalled and client.stats.failed_steps < FAILED_STEPS


def _may_see_all(request: Request, state: State) -> bool:
    header = request.headers.get("authorization")
    if state.settings.auth == "off" or header is None:
        return state.settings.auth == "off"
    principal = state.accounts.directory.authenticate(header)
    if not (principal.may(Scope.METRICS_READ) or principal.may(Scope.ADMIN)):
        raise Forbidden(f"this key has no scope {Scope.METRICS_READ}", code="scope_missing")
    return True


def _moment(state: State, *, everything: bool) -> Moment:
    client, accounts, stats = state.client, state.accounts, state.client.stats
    return Moment(
        stats=stats,
        queue=Queue(
            client.bounds.max_requests,
            client.bounds.max_amount,
            client.bounds.requests,
            client.bounds.amount,
            dict(client.refused),
            stepping(state),
        ),
        ram=state.cache,
        registered=len(state.registry),
        merged_capacity=state.settings.merged_bytes,
        responses=dict(state.responses),
        machine=_machine(state),
        ready=ready(accounts.ledger, accounts.admission, accounts.deliverer, state.fairness, stats.shares),
        shown=state.traffic.shown() if everything else None,
        resident=partial(_resident, stats, state.registry.snapshot()) if state.settings.vllm_metrics else None,
    )


def _resident(stats: Stats, records: Mapping[Key, Record]) -> frozenset[str]:
    """The names whose current version is on the device, or has a merged copy."""
    slots, copies = stats.resident, {ref.key for ref in stats.copies}
    digests = {digest_in(key) for key in slots | copies}
    found = (ref_of(record.now, tenant) for (tenant, _), record in records.items() if record.now.digest in digests)
    return frozenset(ref.name for ref in found if ref.key in slots or ref.key in copies)


def _machine(state: State) -> Machine:
    base = state.base
    dtype, kind, device = str(base.dtype).removeprefix("torch."), base.device.type, {}
    if kind == "cuda":
        free, total = torch.cuda.mem_get_info(base.device)
        device = {"used": total - free, "free": free, "reserved": torch.cuda.memory_reserved(base.device)}
    return Machine(version("onebase"), base.info.name, dtype, kind, device)
