"""`onebase tenants`: tenants and their keys on a running server, and a new admin key where the last one was lost."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from server.commands.client import (
    LOCAL,
    AsJson,
    Key,
    Url,
    call,
    errors,
    failed,
    pages,
    settings_of,
    show_one,
    show_rows,
)

tenants = typer.Typer(help="Tenants of a running server; all but admin-key need an admin key.", no_args_is_help=True)
keys = typer.Typer(help="API keys of a tenant.", no_args_is_help=True)
tenants.add_typer(keys, name="keys")
COLUMNS = ("id", "disabled", "weight", "classes", "limits", "prices", "running", "budget_left")
KEY_COLUMNS = ("id", "name", "scopes", "created", "expires", "revoked")
NONE = "none"  # takes a limit, a price, a quota away
KEPT = {"weight", "classes"}  # a tenant always has these


def _number(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no whole number") from None


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not math.isfinite(share):
        raise typer.BadParameter(f"{text!r} is no number")
    return share


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def rank_classes(text: str) -> list[list[int]]:
    """`16:1000,256:2000` as JSON has it. Raises typer.BadParameter."""
    return [[_number(part) for part in pair.split(":")] for pair in _list(text)]


# Option -> the part of the body that it is in ("" is the body itself), how it is read, what it is.
_PRICE = "micro-dollars, instead of the price book's"
FIELDS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "rpm_limit": ("limits", _number, "requests a minute"),
    "tpm_limit": ("limits", _number, "tokens a minute"),
    "max_parallel_requests": ("limits", _number, "requests that run at once"),
    "max_budget": ("limits", _number, "micro-dollars of a budget_duration"),
    "soft_budget": ("limits", _number, "micro-dollars after which the server's log warns"),
    "budget_duration": ("limits", str, "30d, 12h, 15m, 90s; without one a budget is for ever"),
    "allowed_adapters": ("limits", _list, "comma list of names"),
    "weight": ("", _share, "share of the engine beside the others', 1 at first"),
    "classes": ("", _list, "comma list of interactive, batch"),
    "max_adapters": ("", _number, "adapters that it may store"),
    "max_adapter_bytes": ("", _number, "bytes that it may store"),
    "max_merged_bytes": ("", _number, "bytes of merged copies that it may ask for"),
    "customer": ("", str, "what the billing system calls it"),
    "prompt": ("prices", _number, f"a million prompt tokens: {_PRICE}"),
    "cached": ("prices", _number, f"a million cached ones: {_PRICE}"),
    "completion": ("prices", _number, f"a million completion tokens: {_PRICE}"),
    "adapter_gb_day": ("prices", _number, f"a GB stored for a day: {_PRICE}"),
    "merged_gb_hour": ("prices", _number, f"a GB merged for an hour: {_PRICE}"),
    "rank_classes": ("prices", rank_classes, "comma list of rank:thousandths, as 16:1000,256:2000"),
}


def _with_fields(function: Callable[..., None]) -> Callable[..., None]:
    """Gives the command an option for each of FIELDS, in place of its `fields`."""
    given = inspect.signature(function, eval_str=True)
    kept = [one for one in given.parameters.values() if one.name != "fields"]
    for name, (part, _, about) in FIELDS.items():
        flag = f"--{'price-' if part == 'prices' else ''}{name.replace('_', '-')}"
        note = about if name in KEPT else f"{about}; '{NONE}' takes it away"
        option = typer.Option(flag, help=note, show_default=False)
        kind = inspect.Parameter.KEYWORD_ONLY
        kept.append(inspect.Parameter(name, kind, default=None, annotation=Annotated[str | None, option]))
    function.__signature__ = given.replace(parameters=kept)  # type: ignore[attr-defined]
    function.__annotations__ = {one.name: one.annotation for one in kept}
    return function


def _body(fields: dict[str, str | None]) -> dict[str, Any]:
    body: dict[str, Any] = {}
    for name, text in fields.items():
        if text is None:
            continue
        part, read, _ = FIELDS[name]
        inside = body.setdefault(part, {}) if part else body
        inside[name] = None if text == NONE and name not in KEPT else read(text)
    return body


@tenants.command("create")
@_with_fields
def create(name: str, url: Url = LOCAL, key: Key = None, as_json: AsJson = False, **fields: str | None) -> None:
    """Makes a tenant. It needs a key next: onebase tenants keys create."""
    show_one(call("POST", url, key, "/admin/tenants", json={"id": name} | _body(fields)), as_json)


@tenants.command("list")
def list_tenants(url: Url = LOCAL, key: Key = None, as_json: AsJson = False) -> None:
    """Lists every tenant."""
    show_rows(pages(url, key, "/admin/tenants"), COLUMNS, as_json)


@tenants.command("show")
def show(name: str, url: Url = LOCAL, key: Key = None, as_json: AsJson = False) -> None:
    """Shows one tenant."""
    show_one(call("GET", url, key, _tenant(name)), as_json)


@tenants.command("update")
@_with_fields
def update(
    name: str,
    url: Url = LOCAL,
    key: Key = None,
    as_json: AsJson = False,
    enable: Annotated[bool, typer.Option("--enable", help="Undo disable.")] = False,
    **fields: str | None,
) -> None:
    """Changes what the options name, for the next request."""
    body = _body(fields) | ({"disabled": False} if enable else {})
    show_one(call("PATCH", url, key, _tenant(name), json=body), as_json)


@tenants.command("disable")
def disable(name: str, url: Url = LOCAL, key: Key = None, as_json: AsJson = False) -> None:
    """Refuses all keys of a tenant, and takes what it published from others; requests that run are finished."""
    show_one(call("POST", url, key, f"{_tenant(name)}/disable"), as_json)


@keys.command("create")
def create_key(
    tenant: str,
    url: Url = LOCAL,
    key: Key = None,
    as_json: AsJson = False,
    scope: Annotated[list[str] | None, typer.Option(help="generate (the default), adapters:write, …")] = None,
    name: Annotated[str, typer.Option(help="What it is for.")] = "",
    expires: Annotated[str | None, typer.Option(help="ISO 8601 or seconds since 1970.")] = None,
) -> None:
    """Makes a key and prints its token, once: it is kept nowhere. Other keys of the tenant stay valid."""
    body = {"scopes": scope or ["generate"], "name": name, "expires": expires}
    made = call("POST", url, key, f"{_tenant(tenant)}/keys", json=body)
    if as_json:
        typer.echo(json.dumps(made))
        return
    errors.print(f"key {made['id']} of {tenant}: {', '.join(made['scopes'])}", highlight=False)
    typer.echo(made["token"])


@keys.command("list")
def list_keys(tenant: str, url: Url = LOCAL, key: Key = None, as_json: AsJson = False) -> None:
    """Lists the keys of a tenant, without their secrets."""
    show_rows(pages(url, key, f"{_tenant(tenant)}/keys"), KEY_COLUMNS, as_json)


@keys.command("revoke")
def revoke_key(tenant: str, key_id: str, url: Url = LOCAL, key: Key = None, as_json: AsJson = False) -> None:
    """Refuses a key from now on."""
    call("DELETE", url, key, f"{_tenant(tenant)}/keys/{quote(key_id, safe='')}")
    if as_json:
        typer.echo(json.dumps({"revoked": key_id}))
    else:
        errors.print(f"revoked {key_id}", highlight=False)


@tenants.command("admin-key")
def admin_key(
    data_dir: Annotated[Path | None, typer.Option(help="The server's DATA_DIR.", show_default=False)] = None,
    database_url: Annotated[str | None, typer.Option(help="Its DATABASE_URL.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Makes a new admin key where the last one was lost, on the server's machine while the server is stopped."""
    from server.commands.recover import recover  # SQLAlchemy takes a while to import

    settings = settings_of({"data_dir": data_dir, "database_url": database_url, "host": "127.0.0.1"})
    try:
        token = asyncio.run(recover(settings.data_dir, settings.database))
    except OSError as fault:
        raise failed(str(fault)) from None
    typer.echo(json.dumps({"token": token}) if as_json else token)


def _tenant(name: str) -> str:
    return f"/admin/tenants/{quote(name, safe='')}"
