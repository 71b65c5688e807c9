"""The nouns of this layer: tenants, their limits, their keys, and who a request comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from server.errors import InvalidRequest
from server.tenants.keys import Scope

MAX_COUNT = 10**12  # requests, tokens, adapters
MAX_BYTES = 2**53
MAX_MICROUSD = 10**15  # a billion dollars
MAX_ALLOWED = 10_000  # names in a list of allowed adapters
MAX_WEIGHT = 1_000.0
MAX_NAME = 128

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")  # of tenants and of adapters
_PRINTABLE = re.compile(r"[\x20-\x7e]*")
_DURATION = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_UNIT_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def checked_tenant_id(tenant: str) -> str:
    """`tenant`, or `InvalidRequest`: ids are 1 to 64 of a-z, 0-9, `.`, `_`, `-`, and start with a letter or digit."""
    if not _NAME.fullmatch(tenant):
        raise InvalidRequest("a tenant's id is 1 to 64 of a-z, 0-9, '.', '_' and '-'", param="id")
    return tenant


def checked_text(text: str, param: str) -> str:
    """`text`, or `InvalidRequest`: at most 128 printable ASCII characters, so that it is safe in a log and a header."""
    if len(text) > MAX_NAME or not _PRINTABLE.fullmatch(text):
        raise InvalidRequest(f"{param} is at most {MAX_NAME} printable ASCII characters", param=param)
    return text


def duration_ms(text: str) -> int:
    """`30d`, `1h`, `15m`, `90s` in milliseconds; `InvalidRequest` for anything else."""
    found = _DURATION.fullmatch(text)
    if not found:
        raise InvalidRequest("budget_duration is a number and one of s, m, h, d: '30d'", param="budget_duration")
    return int(found[1]) * _UNIT_MS[found[2]]


def _check(value: float | None, name: str, least: float, most: float) -> None:
    if value is not None and not least <= value <= most:
        raise InvalidRequest(f"{name} must be from {least:g} to {most:g}", param=name)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tenant may use; None is no limit. The names are LiteLLM's; money is in micro-dollars.

    `rpm_limit` and `tpm_limit` are per minute. Budgets count what requests cost, not storage; they are per
    `budget_duration`, whose windows are whole multiples of it since 1970 in UTC (`1d` starts at midnight), or, without
    one, for ever. `allowed_adapters` are names; the base is always allowed. Raises `InvalidRequest` for what is out of
    bounds.
    """

    rpm_limit: int | None = None
    tpm_limit: int | None = None
    max_parallel_requests: int | None = None
    max_budget: int | None = None
    soft_budget: int | None = None
    budget_duration: str | None = None
    allowed_adapters: frozenset[str] | None = None

    def __post_init__(self) -> None:
        for name in ("rpm_limit", "tpm_limit", "max_parallel_requests"):
            _check(getattr(self, name), name, 1, MAX_COUNT)
        for name in ("max_budget", "soft_budget"):
            _check(getattr(self, name), name, 0, MAX_MICROUSD)
        if self.budget_duration is not None:
            duration_ms(self.budget_duration)
        allowed = self.allowed_adapters
        if allowed is not None and (len(allowed) > MAX_ALLOWED or not all(_NAME.fullmatch(name) for name in allowed)):
            raise InvalidRequest(f"at most {MAX_ALLOWED} names of adapters", param="allowed_adapters")


UNLIMITED = Limits()
CLASSES = frozenset({"interactive", "batch"})


@dataclass(frozen=True, slots=True)
class Tenant:
    """A customer. `weight` is its share of the engine beside the others'. `salt` seeds its prefix cache: random, made
    by the server, never shown. `prices` differ from the price book's. `classes` are the priority classes that its
    requests may ask for. `max_adapters` and `max_adapter_bytes` are quotas of what it stores, `max_merged_bytes` of the
    merged copies that it asks for. `customer` is what the
    billing system calls it, where that is not `id`. `created_ms` is milliseconds since 1970. Raises `InvalidRequest`
    for what is out of bounds."""

    id: str
    created_ms: int
    salt: bytes = field(repr=False)
    limits: Limits = UNLIMITED
    weight: float = 1.0
    prices: Mapping[str, Any] = field(default_factory=dict)
    classes: frozenset[str] = CLASSES
    max_adapters: int | None = None
    max_adapter_bytes: int | None = None
    max_merged_bytes: int | None = None
    customer: str | None = None
    disabled: bool = False

    def __post_init__(self) -> None:
        checked_tenant_id(self.id)
        _check(self.weight, "weight", 1 / MAX_WEIGHT, MAX_WEIGHT)
        _check(self.max_adapters, "max_adapters", 0, MAX_COUNT)
        _check(self.max_adapter_bytes, "max_adapter_bytes", 0, MAX_BYTES)
        _check(self.max_merged_bytes, "max_merged_bytes", 0, MAX_BYTES)
        if not self.classes <= CLASSES:
            raise InvalidRequest(f"a priority class is one of {', '.join(sorted(CLASSES))}", param="classes")
        if self.customer is not None:
            checked_text(self.customer, "customer")


@dataclass(frozen=True, slots=True)
class Key:
    """A key without its secret. It is refused from `expires_ms` and from `revoked_ms` on."""

    id: str
    tenant: str
    name: str
    scopes: frozenset[Scope]
    created_ms: int
    expires_ms: int | None = None
    revoked_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a request comes from, and what its key may be used for."""

    tenant: Tenant
    key_id: str
    scopes: frozenset[Scope]

    def may(self, scope: Scope) -> bool:
        """Whether the key has `scope`; `admin` is no other scope: an admin key that should generate says so."""
        return scope in self.scopes
