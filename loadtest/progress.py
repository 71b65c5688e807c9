"""How far a long piece of work has come, on stderr; nothing where that is no terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

Tick: TypeAlias = Callable[..., None]
Progress: TypeAlias = Callable[[str, int], contextlib.AbstractContextManager[Tick]]
REFRESHES = 2  # a second; the bar must not take the cores from what is measured


@contextlib.contextmanager
def bar(what: str, total: int) -> Iterator[Tick]:
    """Yields a function to call after each of `total` steps."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(
        *columns, console=console, transient=True, refresh_per_second=REFRESHES, disable=not console.is_terminal
    ) as shown:
        task = shown.add_task(what, total=total)
        yield lambda *_: shown.advance(task)


@contextlib.contextmanager
def quiet(what: str, total: int) -> Iterator[Tick]:
    """Shows nothing."""
    yield lambda *_: None
