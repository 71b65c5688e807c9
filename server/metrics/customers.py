"""Tenants and adapters by name, the busiest of them. Only for whoever may see every tenant's figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

from prometheus_client.core import Metric

from server.engine.stats import ShareFigures
from server.metrics.families import Family
from server.metrics.traffic import OTHER, OUTCOMES, REFUSED, AdapterTraffic, Shown, TenantTraffic

PARTS = ("load", "queue", "prefill", "decode")  # of a request's time
KINDS = ("prompt", "cached", "completion")  # of tokens

_of_adapter = partial(Family, "counter", labels=("tenant", "adapter"))
_of_tenant = partial(Family, labels=("tenant",))

REQUESTS = Family(
    "counter",
    "onebase_adapter_requests",
    "Ended requests by who asked and what for; the base is (base).",
    "requests",
    ("tenant", "adapter", "outcome"),
)
TOKENS = Family(
    "counter",
    "onebase_adapter_tokens",
    "Their tokens; prompt includes cached.",
    "tokens",
    ("tenant", "adapter", "kind"),
)
COST = _of_adapter(
    "onebase_adapter_cost_microusd",
    "What they cost; what a fault of the server's ended costs nothing.",
    "micro-dollars",
)
FIRST_SECONDS = _of_adapter(
    "onebase_adapter_ttft_seconds", "Seconds to the first token, of all that had one.", "seconds"
)
FIRSTS = _of_adapter("onebase_adapter_ttft_requests", "Requests that had a first token.", "requests")
COLD = _of_adapter("onebase_adapter_cold_starts", "Requests whose adapter was not on the device.", "requests")
LOAD = _of_adapter("onebase_adapter_load_wait_seconds", "What these waited for it.", "seconds")
QUEUE = _of_adapter(
    "onebase_adapter_queue_wait_seconds", "What requests waited for room in a step, adapter at hand.", "seconds"
)
PREFILL = _of_adapter("onebase_adapter_prefill_seconds", "From requests' first steps to their first tokens.", "seconds")
DECODE = _of_adapter("onebase_adapter_decode_seconds", "From the first token to the end, of all requests.", "seconds")

TENANT_REQUESTS = Family(
    "counter",
    "onebase_tenant_requests",
    "The tenant's ended requests, of all adapters and the base.",
    "requests",
    ("tenant", "outcome"),
)
TENANT_TOKENS = Family(
    "counter", "onebase_tenant_tokens", "Tokens of these; prompt includes cached.", "tokens", ("tenant", "kind")
)
TENANT_COST = _of_tenant(
    "counter",
    "onebase_tenant_cost_microusd",
    "What these cost; stored adapters and merged lanes come on top of it on the bill.",
    "micro-dollars",
)
TENANT_PARTS = Family(
    "counter",
    "onebase_tenant_request_part_seconds",
    "Where the time of these went: load (waiting for the adapter), queue (for room in a step), prefill, decode.",
    "seconds",
    ("tenant", "part"),
)
TENANT_FIRST = _of_tenant(
    "histogram", "onebase_tenant_ttft_seconds", "From submission to the first token, counted at the end.", "seconds"
)
REFUSALS = Family(
    "counter",
    "onebase_tenant_limit_refusals",
    "Requests over the tenant's own limits.",
    "requests",
    ("tenant", "code"),
)
RUNNING = _of_tenant("gauge", "onebase_tenant_running", "The tenant's sequences in the batch.", "sequences")
WAITING = _of_tenant("gauge", "onebase_tenant_waiting", "The tenant's sequences that wait.", "sequences")
SERVED = _of_tenant(
    "counter",
    "onebase_tenant_served_tokens",
    "Tokens of ended requests, each as much as it counts in the tenant's fair share (its price).",
    "priced tokens",
)


def families(shown: Shown, shares: Mapping[str, ShareFigures]) -> Iterator[Metric]:
    """All of this module."""
    adapters = shown.adapters
    yield REQUESTS.by(_parts(adapters, OUTCOMES))
    yield TOKENS.by(_parts(adapters, KINDS))
    for family, part in (
        (COST, "cost"),
        (FIRST_SECONDS, "first_seconds"),
        (FIRSTS, "firsts"),
        (COLD, "cold"),
        (LOAD, "load_seconds"),
        (QUEUE, "queue_seconds"),
        (PREFILL, "prefill_seconds"),
        (DECODE, "decode_seconds"),
    ):
        yield family.by({name: getattr(one, part) for name, one in adapters})
    yield from _tenants(shown.tenants)
    named = {name for name, _ in shown.tenants}
    running, waiting = dict.fromkeys(named, 0), dict.fromkeys(named, 0)
    for tenant, share in shares.items():
        name = tenant if tenant in named else OTHER
        running[name] += share.running
        waiting[name] += share.waiting
    yield RUNNING.by(running)
    yield WAITING.by(waiting)


def _tenants(tenants: Sequence[tuple[str, TenantTraffic]]) -> Iterator[Metric]:
    whole = [((name,), one.all) for name, one in tenants]
    yield TENANT_REQUESTS.by(_parts(whole, OUTCOMES))
    yield TENANT_TOKENS.by(_parts(whole, KINDS))
    yield TENANT_COST.by({name: one.cost for name, one in whole})
    yield TENANT_PARTS.by({(*name, part): getattr(one, f"{part}_seconds") for name, one in whole for part in PARTS})
    yield TENANT_FIRST.histograms(((name,), one.first) for name, one in tenants)
    yield REFUSALS.by(
        {(name, code): one.refused[code] for name, one in tenants for code in dict.fromkeys((*REFUSED, *one.refused))}
    )
    yield SERVED.by({name: one.served for name, one in tenants})


def _parts(
    traffic: Iterable[tuple[tuple[str, ...], AdapterTraffic]], parts: Iterable[str]
) -> dict[tuple[str, ...], int]:
    """Some of what was counted, each with its own name as the last label."""
    return {(*name, part): getattr(one, part) for name, one in traffic for part in parts}
