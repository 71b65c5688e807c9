"""`onebase adapters`: upload, list and manage the adapters of a running server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from server.commands.client import LOCAL, AsJson, Key, Url, call, errors, failed, pages, show_one, show_rows

adapters = typer.Typer(help="Upload, list and manage the adapters of a running server.", no_args_is_help=True)
QUOTE = '"'
Of = Annotated[str | None, typer.Option(help="Another tenant's; needs an admin key.", show_default=False)]


@adapters.command("list")
def list_adapters(url: Url = LOCAL, key: Key = None, as_json: AsJson = False, tenant: Of = None) -> None:
    """Lists one's own adapters and the published ones, or a tenant's own, also a disabled one's."""
    rows = pages(url, key, _adapters(tenant))
    columns = ("name", "own", "public", "version", "rank", "bytes", "residency", "lane", "requests", "digest")
    show_rows(rows, columns, as_json)


@adapters.command("show")
def show_adapter(name: str, url: Url = LOCAL, key: Key = None, as_json: AsJson = False, versions: bool = False) -> None:
    """Shows one adapter, or with --versions its history."""
    if versions:
        rows = call("GET", url, key, f"{_adapter(name)}/versions")["data"]
        show_rows(rows, ("version", "current", "rank", "bytes", "digest"), as_json)
        return
    body = call("GET", url, key, _adapter(name))
    show_one(body, as_json)


@adapters.command("push")
def push(
    name: str,
    folder: Annotated[Path, typer.Argument(help="Directory with adapter_config.json and adapter_model.safetensors.")],
    url: Url = LOCAL,
    key: Key = None,
    as_json: AsJson = False,
    if_match: Annotated[str | None, typer.Option(help="Replace only this digest.")] = None,
    allow_zero: Annotated[bool, typer.Option(help="Take an adapter without any effect.")] = False,
) -> None:
    """Uploads an adapter."""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for path in (config, weights):
        if not path.is_file():
            raise failed(f"no {path.name} in {folder}", 2)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with (
        Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar,
        config.open("rb") as config_file,
        bar.open(weights, "rb", description=f"push {name}") as weights_file,
    ):
        body = call(
            "PUT",
            url,
            key,
            _adapter(name),
            files={"config": (config.name, config_file), "weights": (weights.name, weights_file)},
            params={"allow_zero": "true"} if allow_zero else {},
            headers={"If-Match": f'"{if_match.strip(QUOTE)}"'} if if_match else {},
        )
    show_rows([body], ("name", "version", "rank", "parameters", "bytes", "digest"), as_json)


@adapters.command("rm")
def remove(name: str, url: Url = LOCAL, key: Key = None, as_json: AsJson = False, tenant: Of = None) -> None:
    """Deletes an adapter."""
    call("DELETE", url, key, _adapter(name, tenant))
    if as_json:
        typer.echo(json.dumps({"deleted": name}))
    else:
        errors.print(f"deleted {name}", highlight=False)


@adapters.command("rollback")
def rollback(name: str, version: int, url: Url = LOCAL, key: Key = None, as_json: AsJson = False) -> None:
    """Makes an earlier version current again."""
    body = call("POST", url, key, f"{_adapter(name)}/rollback", json={"version": version})
    show_rows([body], ("name", "version", "rank", "bytes", "digest"), as_json)


@adapters.command("merge")
def merge(
    name: str,
    url: Url = LOCAL,
    key: Key = None,
    as_json: AsJson = False,
    pinned: Annotated[
        bool | None, typer.Option("--pinned/--no-pinned", help="Never give its lane up for another adapter's.")
    ] = None,
) -> None:
    """Gives an adapter a lane of its own: a copy of the base with the adapter merged in."""
    body = call("PATCH", url, key, _adapter(name), json={"lane": "merged", "pinned": pinned})  # null: as it is
    show_rows([body], ("name", "version", "lane", "pinned", "digest"), as_json)


@adapters.command("unmerge")
def unmerge(name: str, url: Url = LOCAL, key: Key = None, as_json: AsJson = False) -> None:
    """Puts an adapter back into the shared lane, and frees its copy."""
    body = call("PATCH", url, key, _adapter(name), json={"lane": "shared"})
    show_rows([body], ("name", "version", "lane", "pinned", "digest"), as_json)


@adapters.command("publish")
def publish(name: str, url: Url = LOCAL, key: Key = None, as_json: AsJson = False) -> None:
    """Lets all tenants use an adapter of one's own."""
    _set_public(name, True, url, key, as_json)


@adapters.command("unpublish")
def unpublish(name: str, url: Url = LOCAL, key: Key = None, as_json: AsJson = False) -> None:
    """Makes an adapter private again; requests that run on it are finished."""
    _set_public(name, False, url, key, as_json)


def _set_public(name: str, public: bool, url: str, key: str | None, as_json: bool) -> None:
    body = call("PATCH", url, key, _adapter(name), json={"public": public})
    show_rows([body], ("name", "version", "public", "digest"), as_json)


def _adapters(tenant: str | None) -> str:
    return "/adapters" if tenant is None else f"/admin/tenants/{quote(tenant, safe='')}/adapters"


def _adapter(name: str, tenant: str | None = None) -> str:
    return f"{_adapters(tenant)}/{quote(name, safe='')}"
