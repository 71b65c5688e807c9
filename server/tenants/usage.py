"""What a tenant used, as pages: by request, by adapter, by day. Requests that still run are not on them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, Select, and_, func, or_, select

from server.errors import InvalidRequest
from server.tenants.database import Database
from server.tenants.tables import OPEN, usage

GroupBy = Literal["adapter", "day", "request"]
MAX_LIMIT = 100_000
DAY_MS = 86_400_000
_COST = usage.c.cost_prompt + usage.c.cost_cached + usage.c.cost_completion
_SUMS = (
    func.count().label("requests"),
    func.sum(usage.c.prompt).label("prompt_tokens"),
    func.sum(usage.c.cached).label("cached_tokens"),
    func.sum(usage.c.completion).label("completion_tokens"),
    func.sum(_COST).label("cost_microusd"),
)
_BASE = ""  # how the base sorts among adapters: before all of them
_CURSOR = "adapter:"  # so that the base's cursor is not empty
_ADAPTER = func.coalesce(usage.c.adapter, _BASE)
_DAY = usage.c.created_ms // DAY_MS
_EPOCH_DAY = re.compile(r"\d{1,8}", re.ASCII)
_NAME = re.compile(rf"{_CURSOR}([a-z0-9._-]{{0,64}})")
_REQUEST = re.compile(r"(\d{1,18}):([\x21-\x7e]{1,128})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Page:
    """Rows, and what to ask for as `after` to get those that follow; None after the last."""

    data: list[dict[str, Any]]
    next: str | None


async def page(
    database: Database,
    tenant: str,
    *,
    from_ms: int = 0,
    to_ms: int = 2**62,
    group_by: GroupBy = "request",
    limit: int = 100,
    after: str | None = None,
) -> Page:
    """The requests that were admitted from `from_ms` until before `to_ms`, oldest first; days and adapters in their
    order.

    Raises `InvalidRequest` for a limit out of bounds and for an `after` that no page gave out.
    """
    if not 1 <= limit <= MAX_LIMIT:
        raise InvalidRequest(f"limit must be from 1 to {MAX_LIMIT}", param="limit")
    mine = and_(
        usage.c.tenant == tenant, usage.c.status != OPEN, usage.c.created_ms >= from_ms, usage.c.created_ms < to_ms
    )
    query, show, cursor = {"request": _by_request, "adapter": _by_adapter, "day": _by_day}[group_by](mine, after)
    async with database.read() as connection:
        rows = (await connection.execute(query.limit(limit + 1))).all()
    more = len(rows) > limit
    return Page([show(row) for row in rows[:limit]], cursor(rows[limit - 1]) if more else None)


async def spent(database: Database, tenant: str, since_ms: int) -> int:
    """Micro-dollars of a tenant's closed requests that were admitted since then."""
    query = select(func.coalesce(func.sum(_COST), 0)).where(usage.c.tenant == tenant, usage.c.created_ms >= since_ms)
    async with database.read() as connection:
        return int(await connection.scalar(query) or 0)


_Shape = tuple[Select[*tuple[Any, ...]], Any, Any]


def _by_request(mine: ColumnElement[bool], after: str | None) -> _Shape:
    query = select(usage, _COST.label("cost_microusd")).where(mine).order_by(usage.c.created_ms, usage.c.request_id)
    if after is not None:
        match = _REQUEST.fullmatch(after)
        if match is None:
            raise _no_such(after)
        created, name = int(match[1]), match[2]
        later = and_(usage.c.created_ms == created, usage.c.request_id > name)
        query = query.where(or_(usage.c.created_ms > created, later))

    def show(row: Any) -> dict[str, Any]:
        return {
            "request_id": row.request_id,
            "adapter": row.adapter,
            "digest": row.digest,
            "status": row.status,
            "prompt_tokens": row.prompt,
            "cached_tokens": row.cached,
            "completion_tokens": row.completion,
            "cost_microusd": row.cost_microusd,
            "created": row.created_ms // 1000,
        }

    return query, show, lambda row: f"{row.created_ms}:{row.request_id}"


def _by_adapter(mine: ColumnElement[bool], after: str | None) -> _Shape:
    """The base is the first; its `adapter` is null."""
    query = select(_ADAPTER.label("name"), *_SUMS).where(mine).group_by("name").order_by("name")
    if after is not None:
        match = _NAME.fullmatch(after)
        if match is None:
            raise _no_such(after)
        query = query.where(_ADAPTER.op(">")(match[1]))
    return query, lambda row: {"adapter": row.name or None} | _sums(row), lambda row: f"{_CURSOR}{row.name}"


def _by_day(mine: ColumnElement[bool], after: str | None) -> _Shape:
    """Days of UTC; `created` is when a day began."""
    query = select(_DAY.label("day"), *_SUMS).where(mine).group_by("day").order_by("day")
    if after is not None:
        if not _EPOCH_DAY.fullmatch(after):
            raise _no_such(after)
        query = query.where(usage.c.created_ms >= (int(after) + 1) * DAY_MS)
    return query, lambda row: {"created": int(row.day) * DAY_MS // 1000} | _sums(row), lambda row: str(int(row.day))


def _sums(row: Any) -> dict[str, int]:
    """PostgreSQL's sums of whole numbers come as decimals."""
    return {column.name: int(getattr(row, column.name)) for column in _SUMS}


def _no_such(after: str) -> InvalidRequest:
    return InvalidRequest("after must be the next of the page before", param="after")
