"""`onebase events`: what a running server tells others of usage."""

from __future__ import annotations

import typer

from server.commands.client import LOCAL, AsJson, Key, Url, call, show_one

events = typer.Typer(help="Events of usage that a running server delivers; needs an admin key.", no_args_is_help=True)


@events.callback()
def _group() -> None:
    """A group also while it has one command."""


@events.command("revive")
def revive(url: Url = LOCAL, key: Key = None, as_json: AsJson = False) -> None:
    """Tries the parked events again, once whatever their receiver refused is mended."""
    show_one(call("POST", url, key, "/admin/events/revive"), as_json)
