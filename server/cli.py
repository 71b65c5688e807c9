"""The `onebase` command."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from loadtest import commands
from server.commands import bill
from server.commands.adapters import adapters
from server.commands.client import settings_of
from server.commands.events import events
from server.commands.prices import prices
from server.commands.tenants import tenants
from server.settings import Settings

app = typer.Typer(help="One frozen base model, shared by many LoRA adapters.", no_args_is_help=True)
app.add_typer(adapters, name="adapters")
app.add_typer(tenants, name="tenants")
app.add_typer(prices, name="prices")
app.add_typer(events, name="events")


def _serve(print_config: bool = False, **flags: Any) -> None:
    """Starts the server. Every flag is also a variable: --ram-cache-bytes is ONEBASE_RAM_CACHE_BYTES."""
    settings = settings_of(flags)
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
app.command("usage")(bill.usage)
app.command("invoice")(bill.invoice)


if __name__ == "__main__":
    app()
