"""The `onebase` command."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from loadtest import commands
from server.settings import Settings

app = typer.Typer(help="One frozen base model, shared by many LoRA adapters.", no_args_is_help=True)
adapters = typer.Typer(help="Upload, list and manage the adapters of a running server.", no_args_is_help=True)
app.add_typer(adapters, name="adapters")

Url = Annotated[str, typer.Option(envvar="ONEBASE_URL", help="The server.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PAGE = 1000
QUOTE = '"'
LOCAL = "http://127.0.0.1:8000"
_errors = Console(stderr=True)


def _serve(print_config: bool = False, **flags: Any) -> None:
    """Starts the server. Every flag is also a variable: --ram-cache-bytes is ONEBASE_RAM_CACHE_BYTES."""
    try:
        settings = Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as fault:
        for one in fault.errors():
            place = ".".join(str(part) for part in one["loc"]) or "settings"
            _errors.print(Text(f"{place}: {one['msg'].removeprefix('Value error, ')}", "red"), soft_wrap=True)
        raise typer.Exit(2) from None
    if print_config:
        typer.echo(settings.model_dump_json(indent=2))
        return
    from server.run import serve  # torch and transformers take seconds to import: only where they are needed

    raise typer.Exit(serve(settings))


def _with_settings_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Gives the command one option per setting."""
    parameters = [
        inspect.Parameter(
            "print_config",
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, typer.Option("--print-config", help="Print the effective settings and stop.")],
        )
    ]
    for name, field in Settings.model_fields.items():
        kind = bool if field.annotation is bool else int if field.annotation is int else str
        note = f"{field.description or ''} [default: {field.default if field.default != () else ''}]".strip()
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[kind | None, typer.Option(help=note, show_default=False)],
            )
        )
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {one.name: one.annotation for one in parameters}
    return function


app.command("serve")(_with_settings_flags(_serve))
app.command("bench")(commands.run)


@adapters.command("list")
def list_adapters(url: Url = LOCAL, as_json: AsJson = False) -> None:
    """Lists every adapter."""
    rows: list[dict[str, Any]] = []
    after: str | None = None
    while True:
        query = {"limit": str(PAGE)} | ({"after": after} if after else {})
        page = _call("GET", url, "/adapters", params=query)
        rows += page["data"]
        after = page["next"]
        if after is None:
            break
    _show(rows, ("name", "version", "rank", "bytes", "residency", "lane", "requests", "digest"), as_json)


@adapters.command("show")
def show(name: str, url: Url = LOCAL, as_json: AsJson = False, versions: bool = False) -> None:
    """Shows one adapter, or with --versions its history."""
    if versions:
        rows = _call("GET", url, f"{_adapter(name)}/versions")["data"]
        _show(rows, ("version", "current", "rank", "bytes", "digest"), as_json)
        return
    body = _call("GET", url, _adapter(name))
    if as_json:
        typer.echo(json.dumps(body))
        return
    table = Table("field", "value")
    for key, value in body.items():
        table.add_row(key, ", ".join(value) if isinstance(value, list) else str(value))
    _print(table)


@adapters.command("push")
def push(
    name: str,
    folder: Annotated[Path, typer.Argument(help="Directory with adapter_config.json and adapter_model.safetensors.")],
    url: Url = LOCAL,
    as_json: AsJson = False,
    if_match: Annotated[str | None, typer.Option(help="Replace only this digest.")] = None,
    allow_zero: Annotated[bool, typer.Option(help="Take an adapter without any effect.")] = False,
) -> None:
    """Uploads an adapter."""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for path in (config, weights):
        if not path.is_file():
            raise _failed(f"no {path.name} in {folder}", 2)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with (
        Progress(*columns, console=_errors, transient=True, disable=not _errors.is_terminal) as bar,
        config.open("rb") as config_file,
        bar.open(weights, "rb", description=f"push {name}") as weights_file,
    ):
        body = _call(
            "PUT",
            url,
            _adapter(name),
            files={"config": (config.name, config_file), "weights": (weights.name, weights_file)},
            params={"allow_zero": "true"} if allow_zero else {},
            headers={"If-Match": f'"{if_match.strip(QUOTE)}"'} if if_match else {},
        )
    _show([body], ("name", "version", "rank", "parameters", "bytes", "digest"), as_json)


@adapters.command("rm")
def remove(name: str, url: Url = LOCAL, as_json: AsJson = False) -> None:
    """Deletes an adapter."""
    _call("DELETE", url, _adapter(name))
    if as_json:
        typer.echo(json.dumps({"deleted": name}))
    else:
        _errors.print(f"deleted {name}", highlight=False)


@adapters.command("rollback")
def rollback(name: str, version: int, url: Url = LOCAL, as_json: AsJson = False) -> None:
    """Makes an earlier version current again."""
    body = _call("POST", url, f"{_adapter(name)}/rollback", json={"version": version})
    _show([body], ("name", "version", "rank", "bytes", "digest"), as_json)


@adapters.command("merge")
def merge(
    name: str,
    url: Url = LOCAL,
    as_json: AsJson = False,
    pinned: Annotated[bool, typer.Option(help="Never give its lane up for another adapter's.")] = False,
) -> None:
    """Gives an adapter a lane of its own: a copy of the base with the adapter merged in."""
    body = _call("PATCH", url, _adapter(name), json={"lane": "merged", "pinned": pinned})
    _show([body], ("name", "version", "lane", "pinned", "digest"), as_json)


@adapters.command("unmerge")
def unmerge(name: str, url: Url = LOCAL, as_json: AsJson = False) -> None:
    """Puts an adapter back into the shared lane, and frees its copy."""
    body = _call("PATCH", url, _adapter(name), json={"lane": "shared"})
    _show([body], ("name", "version", "lane", "pinned", "digest"), as_json)


def _call(method: str, url: str, path: str, **more: Any) -> Any:
    """The answer's JSON. What goes wrong is said on stderr, with exit status 1."""
    try:
        response = httpx.request(method, url.rstrip("/") + path, timeout=300, **more)
    except (httpx.HTTPError, httpx.InvalidURL) as fault:
        raise _failed(f"no answer from {url}: {fault}") from None
    try:
        body: Any = response.json() if response.content else None
        if response.is_success:
            return body
        message = body["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"{url} does not answer like a onebase server"
    raise _failed(f"{response.status_code}: {message}")


def _adapter(name: str) -> str:
    return f"/adapters/{quote(name, safe='')}"


def _failed(message: str, status: int = 1) -> typer.Exit:
    _errors.print(Text(message, "red"), soft_wrap=True)
    return typer.Exit(status)


def _show(rows: list[dict[str, Any]], columns: tuple[str, ...], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows))
        return
    table = Table()
    for column in columns:  # whole names and digests, on several lines where the terminal is narrow
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    _print(table)


def _print(table: Table) -> None:
    console = Console(markup=False)
    if not console.is_terminal:
        console.width = 200  # what reads it has no width, and a folded name would be two
    console.print(table)


if __name__ == "__main__":
    app()
