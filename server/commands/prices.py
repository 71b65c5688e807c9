"""`onebase prices`: the price book of a running server. A tenant's own: `onebase tenants update --price-…`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from server.commands.client import LOCAL, AsJson, Key, Url, call, failed, show_one, show_rows
from server.commands.tenants import rank_classes

prices = typer.Typer(help="The price book of a running server; needs an admin key.", no_args_is_help=True)
PATH = "/admin/prices"
OF = {
    "prompt": "a million prompt tokens that are not cached",
    "cached": "a million cached ones",
    "completion": "a million completion tokens",
    "adapter_gb_day": "10^9 bytes stored for a day",
    "merged_gb_hour": "10^9 bytes of merged copies for an hour",
    "rank_classes": "largest rank:thousandths that token prices are multiplied with",
}
Price = Annotated[int | None, typer.Option(min=0, help="Micro-dollars, millionths of a dollar.", show_default=False)]
Classes = Annotated[
    str | None,
    typer.Option("--rank-classes", help=f"{OF['rank_classes']}: 16:1000,256:3000.", show_default=False),
]


@prices.command("show")
def show(url: Url = LOCAL, key: Key = None, as_json: AsJson = False) -> None:
    """Shows the prices in force."""
    _show(call("GET", url, key, PATH), as_json)


@prices.command("set")
def change(
    url: Url = LOCAL,
    key: Key = None,
    as_json: AsJson = False,
    prompt: Price = None,
    cached: Price = None,
    completion: Price = None,
    adapter_gb_day: Price = None,
    merged_gb_hour: Price = None,
    classes: Classes = None,
) -> None:
    """Changes what the options name, for requests that come from now on; the rest stays."""
    given = {
        "prompt": prompt,
        "cached": cached,
        "completion": completion,
        "adapter_gb_day": adapter_gb_day,
        "merged_gb_hour": merged_gb_hour,
        "rank_classes": None if classes is None else rank_classes(classes),
    }
    named = {name: value for name, value in given.items() if value is not None}
    if not named:
        raise failed("name what is to change, as --completion 200000", 2)
    before = call("GET", url, key, PATH)
    _show(call("PUT", url, key, PATH, json={name: before[name] for name in OF} | named), as_json)


def _show(book: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_one(book, as_json)
        return
    shown = book | {"rank_classes": ",".join(f"{rank}:{times}" for rank, times in book["rank_classes"])}
    rows = [{"price": name, "micro-dollars": shown[name], "of": of} for name, of in OF.items()]
    show_rows(rows, ("price", "micro-dollars", "of"), as_json)
    typer.echo(f"version {book['version']}")
