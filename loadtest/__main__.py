"""`python -m loadtest`: measures a running server."""

from __future__ import annotations

import typer

from loadtest import commands

app = typer.Typer(help="Sends workloads to a running server and measures what it does.", no_args_is_help=True)
app.command("run")(commands.run)
app.command("prepare")(commands.prepare)

if __name__ == "__main__":
    app()
