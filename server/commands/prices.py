"""`onebase prices`: the price book of a running server. A tenant's own: `onebase tenants update --price-…`."""

from __future__ import annotations

import sys
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
GROWTH = 10  # times a price: more than that is asked about
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask about a price that grows more than tenfold.")]
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
    yes: Yes = False,
) -> None:
    """Changes what the options name, for requests that come from now on, and from the next day (UTC) on for what is
    stored and merged; the rest stays. Asks first when a price grows more than tenfold."""
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
    if grown := [] if yes else leaps(before, named):
        _confirm(grown)
    _show(call("PUT", url, key, PATH, json={name: before[name] for name in OF} | named), as_json)


def leaps(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What of the new prices `after` is more than ten times what it was, in words; a price of 0 has no tenfold."""
    found = [
        f"{name}: {before[name]} to {price}"
        for name, price in after.items()
        if name != "rank_classes" and 0 < GROWTH * before[name] < price
    ]
    classes = after.get("rank_classes", [])
    ranks = sorted({pair[0] for pair in (*before["rank_classes"], *classes) if len(pair) == 2})
    for rank in ranks if classes else []:
        old, new = _times(before["rank_classes"], rank), _times(classes, rank)
        if 0 < GROWTH * old < new:
            found.append(f"rank {rank}: {old} to {new} thousandths")
    return found


def _times(classes: list[list[int]], rank: int) -> int:
    """The multiplier of a rank; beyond the last class, the last one's, and without any, one."""
    fit = [pair for pair in classes if len(pair) == 2]  # what else there is, the server refuses
    return next((times for most, times in fit if rank <= most), fit[-1][1] if fit else 1000)


def _confirm(grown: list[str]) -> None:
    """Asks on a terminal. Raises typer.Exit, or typer.Abort for a no."""
    said = f"more than tenfold: {'; '.join(grown)}"
    if not sys.stdin.isatty():
        raise failed(f"{said}. Nothing was changed; --yes if it is meant", 2)
    typer.confirm(f"{said}. Change it?", abort=True, err=True)


def _show(book: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_one(book, as_json)
        return
    shown = book | {"rank_classes": ",".join(f"{rank}:{times}" for rank, times in book["rank_classes"])}
    rows = [{"price": name, "micro-dollars": shown[name], "of": of} for name, of in OF.items()]
    show_rows(rows, ("price", "micro-dollars", "of"), as_json)
    typer.echo(f"version {book['version']}")
