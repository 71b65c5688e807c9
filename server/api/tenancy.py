"""The JSON of `/admin`, `/v1/usage` and `/v1/invoices`. Money is whole micro-dollars."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, StringConstraints, ValidationError, WrapValidator, model_validator
from pydantic_core import PydanticCustomError
from pydantic_core.core_schema import ValidatorFunctionWrapHandler

from server.api.schemas import AdapterName, Strict
from server.errors import InvalidRequest
from server.tenants.keys import Scope
from server.tenants.limits import Admission
from server.tenants.prices import MAX_MULTIPLIER, MAX_PRICE, PriceBook
from server.tenants.tenant import MAX_ALLOWED, MAX_BYTES, MAX_COUNT, MAX_MICROUSD, MAX_NAME, MAX_WEIGHT, Key, Tenant

MAX_CLASSES, MAX_RANK = 64, 2**16
TenantId = AdapterName  # the same letters
Text = Annotated[str, StringConstraints(max_length=MAX_NAME, pattern=r"^[\x20-\x7e]*$")]
Duration = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,5}[smhd]$")]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Money = Annotated[int, Field(ge=0, le=MAX_MICROUSD)]
Price = Annotated[int, Field(ge=0, le=MAX_PRICE)]
RankClass = Annotated[
    list[Annotated[int, Field(ge=0, le=max(MAX_RANK, MAX_MULTIPLIER))]], Field(min_length=2, max_length=2)
]
RankClasses = Annotated[list[RankClass], Field(min_length=1, max_length=MAX_CLASSES)]
Priorities = Annotated[list[Literal["interactive", "batch"]], Field(min_length=1, max_length=2)]


def _moment(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError:  # which tells of each kind by itself
        raise PydanticCustomError("moment", "must be ISO 8601 or seconds since 1970, from 0 on") from None


Moment = Annotated[
    Annotated[str, StringConstraints(min_length=1, max_length=40)] | Annotated[float, Field(ge=0, lt=2**43)],
    WrapValidator(_moment),
]
_NULLABLE = {"max_adapters", "max_adapter_bytes", "max_merged_bytes", "customer"}


class LimitsBody(Strict):
    """Of a tenant's requests. What is left out stays as it is; null is no limit."""

    rpm_limit: Count | None = None
    tpm_limit: Count | None = None
    max_parallel_requests: Count | None = None
    max_budget: Money | None = None
    soft_budget: Money | None = None
    budget_duration: Duration | None = None
    allowed_adapters: Annotated[list[AdapterName], Field(max_length=MAX_ALLOWED)] | None = None


class PricesBody(Strict):
    """What differs from the price book. What is left out stays as it is; null is the price book's."""

    prompt: Price | None = None
    cached: Price | None = None
    completion: Price | None = None
    adapter_gb_day: Price | None = None
    merged_gb_hour: Price | None = None
    rank_classes: RankClasses | None = None


class TenantBody(Strict):
    """What is to change of a tenant; what is left out stays."""

    limits: LimitsBody | None = None
    prices: PricesBody | None = None
    weight: float | None = Field(None, ge=1 / MAX_WEIGHT, le=MAX_WEIGHT)
    classes: Priorities | None = None
    max_adapters: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = None
    max_adapter_bytes: Annotated[int, Field(ge=0, le=MAX_BYTES)] | None = None
    max_merged_bytes: Annotated[int, Field(ge=0, le=MAX_BYTES)] | None = None
    customer: Text | None = None

    def changes(self, tenant: Tenant, book: PriceBook) -> dict[str, Any]:
        """What it makes of `tenant`, as `Directory.revise` wants it. Raises InvalidRequest."""
        found: dict[str, Any] = {name: getattr(self, name) for name in _NULLABLE & self.model_fields_set}
        if self.weight is not None:
            found["weight"] = self.weight
        if self.classes is not None:
            found["classes"] = frozenset(self.classes)
        if self.limits is not None:
            given = self.limits.model_dump(exclude_unset=True)
            if given.get("allowed_adapters") is not None:
                given["allowed_adapters"] = frozenset(given["allowed_adapters"])
            found["limits"] = dataclasses.replace(tenant.limits, **given)
        if self.prices is not None:
            both = {**tenant.prices, **self.prices.model_dump(exclude_unset=True)}
            found["prices"] = {name: price for name, price in both.items() if price is not None}
            checked_prices(book, found["prices"], "prices.")
        return found


class TenantPatch(TenantBody):
    """`PATCH`: at least one field."""

    disabled: bool | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("name what is to change")
        return self

    def changes(self, tenant: Tenant, book: PriceBook) -> dict[str, Any]:
        """As above."""
        more = {} if self.disabled is None else {"disabled": self.disabled}
        return super().changes(tenant, book) | more


class NewTenant(TenantBody):
    """`POST`."""

    id: TenantId


class NewKeyBody(Strict):
    """A key to be made."""

    scopes: Annotated[
        list[Literal["generate", "adapters:write", "usage:read", "metrics:read", "admin"]],
        Field(min_length=1, max_length=5),
    ]
    name: Text = ""
    expires: Moment | None = None


class BookBody(Strict):
    """A whole price book."""

    prompt: Price
    cached: Price
    completion: Price
    adapter_gb_day: Price
    merged_gb_hour: Price
    rank_classes: RankClasses


class TenantInfo(BaseModel):
    """A tenant, and what it does now."""

    id: str
    created: float
    disabled: bool
    weight: float
    limits: dict[str, Any]
    prices: dict[str, Any]
    classes: list[str]
    max_adapters: int | None
    max_adapter_bytes: int | None
    max_merged_bytes: int | None
    customer: str | None
    running: int
    budget_left: int | None


class TenantList(BaseModel):
    """A page of tenants by id."""

    data: list[TenantInfo]
    next: str | None


class Revived(BaseModel):
    """How many parked events are tried again."""

    revived: int


class KeyInfo(BaseModel):
    """A key without its secret."""

    id: str
    tenant: str
    name: str
    scopes: list[Scope]
    created: float
    expires: float | None
    revoked: float | None


class KeyMade(KeyInfo):
    """A new key; its token is in this answer only."""

    token: str


class KeyList(BaseModel):
    """A page of keys by id."""

    data: list[KeyInfo]
    next: str | None


class Book(BookBody):
    """One version of the prices; an early one may have no classes."""

    version: int
    rank_classes: list[RankClass]


class Sums(BaseModel):
    """Of several requests."""

    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost_microusd: int


class AdapterRow(Sums):
    """All requests of an adapter; null is the base."""

    adapter: str | None


class DayRow(Sums):
    """All requests of a day; `created` is its begin, in UTC."""

    created: int


class RequestRow(BaseModel):
    """One request; `request_id` is the answer's `id`."""

    request_id: str
    adapter: str | None
    digest: str | None
    status: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost_microusd: int
    created: int


class UsagePage(BaseModel):
    """A page of rows; `next` is the `after` of the following one, or null."""

    data: list[RequestRow] | list[AdapterRow] | list[DayRow]
    next: str | None


class InvoiceLine(BaseModel):
    """An adapter (null: the base) and a kind of charge."""

    adapter: str | None
    kind: Literal["prompt", "cached", "completion", "storage", "merged"]
    quantity: int
    unit: Literal["tokens", "byte_seconds"]
    amount_microusd: int


class InvoiceInfo(BaseModel):
    """A month's bill as it stands; `running` requests are not on it yet."""

    tenant: str
    month: str
    currency: Literal["USD"]
    requests: int
    running: int
    lines: list[InvoiceLine]
    total_microusd: int
    total: str


def checked_prices(book: PriceBook, differing: dict[str, Any], place: str = "") -> PriceBook:
    """`book` with other prices, which are in the body at `place`. Raises InvalidRequest."""
    try:
        found = book.override(differing)
    except ValueError as fault:  # the bounds of single prices are the schema's
        raise InvalidRequest(str(fault), param=f"{place}rank_classes") from fault
    if found.cached > found.prompt:
        raise InvalidRequest(
            f"a cached token ({found.cached}) must not cost more than one that is not ({found.prompt})",
            param=f"{place}cached",
        )
    return found


def tenant_info(tenant: Tenant, admission: Admission) -> dict[str, Any]:
    """As `TenantInfo`; the salt is nobody's to see."""
    limits = dataclasses.asdict(tenant.limits)
    if limits["allowed_adapters"] is not None:
        limits["allowed_adapters"] = sorted(limits["allowed_adapters"])
    shown = {field.name: getattr(tenant, field.name) for field in dataclasses.fields(tenant)}
    del shown["salt"], shown["created_ms"]
    return shown | {
        "created": tenant.created_ms / 1000,
        "limits": limits,
        "prices": dict(tenant.prices),
        "classes": sorted(tenant.classes),
        "running": admission.running(tenant.id),
        "budget_left": admission.budget_left(tenant),
    }


def key_info(key: Key) -> dict[str, Any]:
    """As `KeyInfo`."""
    return {
        "id": key.id,
        "tenant": key.tenant,
        "name": key.name,
        "scopes": sorted(key.scopes),
        "created": key.created_ms / 1000,
        "expires": None if key.expires_ms is None else key.expires_ms / 1000,
        "revoked": None if key.revoked_ms is None else key.revoked_ms / 1000,
    }
