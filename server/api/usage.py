"""`/v1/usage` and `/v1/invoices`: what a tenant used and what it owes, as JSON or CSV."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Response
from pydantic import BaseModel

from server.api.access import Caller, guarded
from server.api.moments import moment_ms
from server.api.queries import OfInvoice, OfUsage
from server.api.state import State, state_of
from server.api.tenancy import AdapterRow, DayRow, InvoiceInfo, RequestRow, UsagePage
from server.errors import Forbidden
from server.tenants import usage
from server.tenants.invoice import invoice
from server.tenants.keys import Scope
from server.tenants.tenant import Principal
from server.tenants.usage import Page

PART, GROUPS = 2_000, 10_000  # requests and groups that are read at once: some milliseconds of the event loop
NEXT = "x-next-after"  # a CSV's `next`
router = APIRouter(prefix="/v1", route_class=guarded(read=Scope.USAGE_READ, write=Scope.USAGE_READ))
OneState = Annotated[State, Depends(state_of)]
Accept = Annotated[str, Header(max_length=4096)]
_ROWS: dict[str, type[BaseModel]] = {"request": RequestRow, "adapter": AdapterRow, "day": DayRow}
_KINDS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/csv": {"schema": {"type": "string"}}}}}


@router.get("/usage", response_model=UsagePage, responses=_KINDS)
async def show_usage(caller: Caller, state: OneState, query: OfUsage, accept: Accept = "") -> Response:
    """Requests that have ended and were admitted from `from` until before `to`, a page at a time, oldest first."""
    chosen: dict[str, Any] = {"group_by": query.group_by, "from_ms": moment_ms(query.since, "from")}
    if query.until is not None:
        chosen["to_ms"] = moment_ms(query.until, "to")
    whose = _whose(caller, query.tenant, state)
    as_csv = _is_csv(query.as_format, accept)
    columns = list(_ROWS[query.group_by].model_fields)
    dump = (lambda rows: _csv_rows(rows, columns)) if as_csv else _json_rows
    async with state.pages.turn(caller.tenant.id):
        parts, following = await _gather(state, whose, chosen, query.limit, query.after, dump)
    if as_csv:
        headers = {} if following is None else {NEXT: following}
        body = ",".join(columns) + "\r\n" + "".join(parts)
        return Response(body, media_type="text/csv", headers=headers)
    inside = ",".join(part for part in parts if part)
    return Response(f'{{"data":[{inside}],"next":{json.dumps(following)}}}', media_type="application/json")


@router.get("/invoices/{month}", response_model=InvoiceInfo, responses=_KINDS)
async def show_invoice(
    month: Annotated[str, Path(max_length=16, description="yyyy-mm, in UTC")],
    caller: Caller,
    state: OneState,
    query: OfInvoice,
    accept: Accept = "",
) -> Response:
    """The bill of a month as it stands: a line for each adapter and kind of charge, which add up to the total."""
    whose, as_csv = _whose(caller, query.tenant, state), _is_csv(query.as_format, accept)
    async with state.pages.turn(caller.tenant.id):
        bill = await invoice(state.accounts.database, whose, month)
        body = await asyncio.to_thread(bill.as_csv if as_csv else lambda: json.dumps(bill.as_dict()))
    return Response(body, media_type="text/csv" if as_csv else "application/json")


async def _gather(
    state: State,
    tenant: str,
    chosen: dict[str, Any],
    limit: int,
    after: str | None,
    dump: Callable[[list[dict[str, Any]]], str],
) -> tuple[list[str], str | None]:
    """A page's rows as text, and its `next`. They are read part by part, so that a hundred thousand of them do not hold
    up the event loop; of groups more at once, as each part of them adds up all that follow."""
    parts: list[str] = []
    most = PART if chosen["group_by"] == "request" else GROUPS
    while True:
        found: Page = await usage.page(state.accounts.database, tenant, limit=min(limit, most), after=after, **chosen)
        parts.append(await asyncio.to_thread(dump, found.data))
        limit, after = limit - len(found.data), found.next
        if after is None or limit <= 0:
            return parts, after


def _whose(caller: Principal, tenant: str | None, state: State) -> str:
    """Raises Forbidden for another's without the scope admin, and then TenantNotFound."""
    if tenant is None or tenant == caller.tenant.id:
        return caller.tenant.id
    if not caller.may(Scope.ADMIN):
        raise Forbidden("only an admin key reads another tenant's", param="tenant", code="scope_missing")
    return state.accounts.directory.show(tenant).id


def _is_csv(asked: str | None, accept: str) -> bool:
    if asked is not None:
        return asked == "csv"
    kinds = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    return "text/csv" in kinds and "application/json" not in kinds


def _json_rows(rows: list[dict[str, Any]]) -> str:
    """Without the list's brackets."""
    return json.dumps(rows, separators=(",", ":"))[1:-1]


def _csv_rows(rows: list[dict[str, Any]], columns: list[str]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns).writerows(rows)
    return text.getvalue()
