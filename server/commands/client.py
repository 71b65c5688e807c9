"""What the commands share: the options that name a server, calls to it, and tables."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import httpx
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from server.settings import Settings

Url = Annotated[str, typer.Option(envvar="ONEBASE_URL", help="The server.")]
Key = Annotated[str | None, typer.Option(envvar="ONEBASE_KEY", help="The API key.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PAGE = 1000
MOMENTS = {"created", "expires", "revoked", "last_used"}  # seconds since 1970, which JSON keeps
LOCAL = "http://127.0.0.1:8000"
errors = Console(stderr=True)


def call(method: str, url: str, key: str | None, path: str, **more: Any) -> Any:
    """The answer's JSON, or its text where it is CSV. What goes wrong is said on stderr, with exit status 1."""
    if key and not (key.isascii() and key.isprintable()):
        raise failed("the key has characters that no key has: a line's end, say")
    headers = more.pop("headers", {}) | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        response = httpx.request(method, url.rstrip("/") + path, timeout=300, headers=headers, **more)
    except (httpx.HTTPError, httpx.InvalidURL) as fault:
        raise failed(f"no answer from {url}: {fault}") from None
    try:
        if response.is_success and response.headers.get("content-type", "").startswith("text/csv"):
            return response.text
        body: Any = response.json() if response.content else None
        if response.is_success:
            return body
        message = body["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"{url} does not answer like a onebase server"
    raise failed(f"{response.status_code}: {message}")


def pages(url: str, key: str | None, path: str, **query: Any) -> list[dict[str, Any]]:
    """The rows of all pages."""
    rows: list[dict[str, Any]] = []
    after: dict[str, str] = {}
    while True:
        page = call("GET", url, key, path, params={"limit": str(PAGE)} | query | after)
        rows += page["data"]
        if page["next"] is None:
            return rows
        after = {"after": page["next"]}


def failed(message: str, status: int = 1) -> typer.Exit:
    """Says why on stderr; the exit to be raised."""
    errors.print(Text(message, "red"), soft_wrap=True)
    return typer.Exit(status)


def show_rows(rows: list[dict[str, Any]], columns: tuple[str, ...], as_json: bool) -> None:
    """Prints a table of some columns, or everything as JSON."""
    if as_json:
        typer.echo(json.dumps(rows))
        return
    table = Table()
    for column in columns:  # whole names and digests, on several lines where the terminal is narrow
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(column, ""), column) for column in columns))
    _print(table)


def show_one(body: dict[str, Any], as_json: bool) -> None:
    """Prints one thing: a line a field, or JSON."""
    if as_json:
        typer.echo(json.dumps(body))
        return
    table = Table("field", "value")
    for name, value in body.items():
        table.add_row(name, _cell(value, name))
    _print(table)


def settings_of(flags: dict[str, Any]) -> Settings:
    """The server's settings with these flags, None aside; exits with 2 and names what is wrong with them."""
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as fault:
        for one in fault.errors():
            place = ".".join(str(part) for part in one["loc"]) or "settings"
            errors.print(Text(f"{place}: {one['msg'].removeprefix('Value error, ')}", "red"), soft_wrap=True)
        raise typer.Exit(2) from None


def _cell(value: Any, name: str = "") -> str:
    if name in MOMENTS and isinstance(value, (int, float)):
        return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(one)}" for name, one in value.items() if one is not None)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _print(table: Table) -> None:
    console = Console(markup=False)
    if not console.is_terminal:
        console.width = 1000  # what reads it has no width, and a folded name would be two
    console.print(table)
