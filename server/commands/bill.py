"""`onebase usage` and `onebase invoice`: what a tenant used, and what it owes."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal
from urllib.parse import quote

import typer

from server.commands.client import LOCAL, AsJson, Key, Url, call, errors, pages, show_one, show_rows

Of = Annotated[str | None, typer.Option("--tenant", help="Another tenant; needs a key with the scope admin.")]
AsCsv = Annotated[bool, typer.Option("--csv", help="Print CSV.")]
_COLUMNS = {
    "request": ("request_id", "adapter", "status", "prompt_tokens", "cached_tokens", "completion_tokens"),
    "adapter": ("adapter", "requests", "prompt_tokens", "cached_tokens", "completion_tokens"),
    "day": ("day", "requests", "prompt_tokens", "cached_tokens", "completion_tokens"),
}


def usage(
    url: Url = LOCAL,
    key: Key = None,
    as_json: AsJson = False,
    tenant: Of = None,
    group_by: Annotated[Literal["adapter", "day", "request"], typer.Option(help="A row for each.")] = "adapter",
    since: Annotated[str | None, typer.Option("--from", help="ISO 8601 or seconds since 1970, inclusive.")] = None,
    until: Annotated[str | None, typer.Option("--to", help="The same, exclusive.")] = None,
) -> None:
    """Shows what a tenant used: requests that have ended, by adapter, day or one by one."""
    given = {"tenant": tenant, "from": since, "to": until}
    query = {name: value for name, value in given.items() if value is not None}
    rows = pages(url, key, "/v1/usage", group_by=group_by, **query)
    columns = (*_COLUMNS[group_by], "cost_microusd")
    show_rows(rows if as_json else [_row(row, group_by) for row in rows], columns, as_json)


def invoice(
    month: Annotated[str | None, typer.Argument(help="yyyy-mm, in UTC; the present one if left out.")] = None,
    url: Url = LOCAL,
    key: Key = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    tenant: Of = None,
) -> None:
    """Shows a tenant's bill of a month as it stands."""
    month = month or time.strftime("%Y-%m", time.gmtime())
    query = ({} if tenant is None else {"tenant": tenant}) | ({"format": "csv"} if as_csv else {})
    bill = call("GET", url, key, f"/v1/invoices/{quote(month, safe='')}", params=query)
    if as_csv:
        typer.echo(bill, nl=False)
    elif as_json:
        show_one(bill, as_json)
    else:
        lines = [line | {"adapter": line["adapter"] or "(base)"} for line in bill["lines"]]
        show_rows(lines, ("adapter", "kind", "quantity", "unit", "amount_microusd"), as_json)
        typer.echo(
            f"{bill['tenant']}, {bill['month']}: {bill['requests']} requests, {bill['total']} {bill['currency']}"
        )
        if bill["running"]:
            errors.print(f"{bill['running']} requests still run and will be on it", highlight=False)


def _row(row: dict[str, Any], group_by: str) -> dict[str, Any]:
    if group_by == "day":
        return row | {"day": time.strftime("%Y-%m-%d", time.gmtime(row["created"]))}
    return row | {"adapter": row["adapter"] or "(base)"}
