"""The commands `run` and `prepare`; `run` is also `onebase bench`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

# What they need is imported when they run: `onebase --help` must not wait for it.

Url = Annotated[str, typer.Option(envvar="ONEBASE_URL", help="The server.")]
Key = Annotated[
    str | None, typer.Option(envvar="ONEBASE_KEY", help="The API key, where the server wants one.", show_default=False)
]
Name = Annotated[str, typer.Option(help="A shipped workload, or a .toml or .json file.")]
BaseDir = Annotated[
    Path | None, typer.Option(help="The served base's directory, for the adapters' shapes; else the bundled base's.")
]
LOCAL = "http://127.0.0.1:8000"
PICTURES = (".png", ".svg", ".pdf")


def run(
    url: Url = LOCAL,
    workload: Name = "smoke",
    api: Annotated[
        Literal["auto", "onebase", "openai", "llama"], typer.Option(help="What the server speaks; auto: ask it.")
    ] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here; - prints it.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the report as Markdown here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the report here (.png, .svg, .pdf).")] = None,
    baseline: Annotated[bool, typer.Option(help="Afterwards send the same requests to the base, and compare.")] = False,
    prepare: Annotated[bool, typer.Option(help="First upload the adapters that a onebase server lacks.")] = False,
    base: BaseDir = None,
    names: Annotated[str, typer.Option(help="Adapters to use instead of the workload's own, with commas.")] = "",
    requests: Annotated[int | None, typer.Option(help="Instead of the workload's number of requests.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Instead of the workload's bound in time.")] = None,
    seed: Annotated[int | None, typer.Option(help="Instead of the workload's: other prompts, nothing cached.")] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one request may take.")] = 600,
    key: Key = None,
) -> None:
    """Sends a workload to a server and reports throughput and latencies."""
    from loadtest import adapters, dialects
    from loadtest.markdown import render
    from loadtest.measure import Target, measure
    from loadtest.progress import bar
    from loadtest.workload import plan

    _need_matplotlib(plot)
    _need_folders(json_file, markdown, plot)
    chosen = _load(workload, {"requests": requests, "seconds": seconds, "seed": seed})
    url, key = _address(url), _checked(key)
    with _faults(url):
        plan(chosen)  # what is wrong with it is said before anything is sent
        spoken = dialects.detect(url, key) if api == "auto" else api
        if prepare:
            _prepare(url, key, spoken, chosen, base)
        used = [one for one in names.split(",") if one] or [one.name for one in adapters.of(chosen)]
        if len(used) < chosen.adapters:
            raise _failed(f"--names has {len(used)} names, the workload {chosen.adapters} adapters", 2)
        target = Target(url, spoken, dialects.connect(url, spoken, used, key), timeout, key)
        report, traces = measure(target, chosen, command=_command(), baseline=baseline, progress=bar)
    _write(report, json_file, markdown, render(report))
    if plot is not None:
        from loadtest.plot import plot as draw

        draw(report, traces, plot)
    cut = report["interrupted"] or bool(report["baseline"] and report["baseline"]["interrupted"])
    raise typer.Exit(130 if cut else 0 if report["requests"]["finished"] else 1)


def prepare(
    url: Url = LOCAL,
    workload: Name = "smoke",
    base: BaseDir = None,
    folder: Annotated[
        Path | None, typer.Option(help="Write the adapters here instead of uploading them, for another server.")
    ] = None,
    key: Key = None,
) -> None:
    """Makes the random adapters of a workload and uploads those that the server lacks."""
    chosen, key = _load(workload, {}), _checked(key)
    with _faults(url):
        if folder is not None:
            from loadtest import adapters

            typer.echo(f"{len(adapters.write(adapters.of(chosen), _base(base), folder))} adapters in {folder}")
            return
        typer.echo(f"{_prepare(_address(url), key, 'onebase', chosen, base)} adapters uploaded")


def _prepare(url: str, key: str | None, api: str, workload: Any, base: Path | None) -> int:
    from loadtest import adapters
    from loadtest.progress import bar

    if api != "onebase":
        raise _failed("adapters are uploaded to onebase only; for others: python -m loadtest prepare --folder DIR", 2)
    needed = adapters.of(workload)
    if not needed:
        return 0
    with bar("adapters", len(needed)) as tick:
        return adapters.register(url, needed, _base(base), tick, key)


def _base(given: Path | None) -> Path:
    if given is not None:
        return given
    from server.model.bundled import DEFAULT_DATA_DIR, BaseUnavailable, materialise

    try:
        # Where the server of this machine has it, if it was told another place.
        return materialise(Path(os.environ.get("ONEBASE_DATA_DIR") or DEFAULT_DATA_DIR).expanduser())
    except BaseUnavailable as fault:
        raise _failed(f"{fault}; give --base") from None


def _load(name: str, given: dict[str, Any]) -> Any:
    from loadtest.workload import change, load

    with _faults():
        return change(load(name), **{key: value for key, value in given.items() if value is not None})


def _write(report: dict[str, Any], json_file: Path | None, markdown: Path | None, page: str) -> None:
    text = json.dumps(report, indent=2) + "\n"
    if json_file == Path("-"):
        typer.echo(text, nl=False)
    else:
        typer.echo(page)
        if json_file is not None:
            json_file.write_text(text, encoding="utf-8")
    if markdown is not None:
        markdown.write_text(page, encoding="utf-8")


@contextlib.contextmanager
def _faults(url: str = "") -> Iterator[None]:
    """What a user can cause is said on stderr, without a traceback; `url` is the server that is spoken to."""
    import httpx

    from loadtest.adapters import UnfitBase
    from loadtest.dialects import UnknownServer
    from loadtest.workload import BadWorkload

    try:
        yield
    except (BadWorkload, UnfitBase) as fault:
        raise _failed(str(fault), 2) from None
    except httpx.HTTPStatusError as fault:
        raise _failed(str(fault)) from None
    except httpx.HTTPError as fault:
        raise _failed(f"no answer from {url}: {str(fault) or type(fault).__name__}") from None
    except (UnknownServer, OSError) as fault:
        raise _failed(str(fault) or type(fault).__name__) from None


def _address(url: str) -> str:
    """The server's address without a slash at its end."""
    import httpx

    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as fault:
        raise _failed(f"--url {url}: {fault}", 2) from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise _failed(f"--url {url}: not the address of a server, such as {LOCAL}", 2)
    return url.rstrip("/")


def _checked(key: str | None) -> str | None:
    if key is not None and not (key.isascii() and key.isprintable()):
        raise _failed("--key: a key is printable ASCII text", 2)
    return key


def _need_matplotlib(plot: Path | None) -> None:
    if plot is not None and find_spec("matplotlib") is None:
        raise _failed("--plot needs matplotlib: pip install 'onebase[bench]'", 2)
    if plot is not None and plot.suffix not in PICTURES:
        raise _failed(f"--plot {plot}: give a name that ends in {', '.join(PICTURES)}", 2)


def _need_folders(*files: Path | None) -> None:
    """Said before the run, not after it."""
    for file in files:
        if file is None or file == Path("-"):
            continue
        if not (file.parent.is_dir() and os.access(file.parent, os.W_OK)):
            raise _failed(f"{file} cannot be written: {file.parent} is no directory that can be written to", 2)
        if file.is_dir():
            raise _failed(f"{file} cannot be written: it is a directory", 2)


def _failed(message: str, status: int = 1) -> typer.Exit:
    Console(stderr=True).print(Text(message, "red"), soft_wrap=True)
    return typer.Exit(status)


def _command() -> str:
    """The command as it was given, without the directory that the program is in, and without the key: reports are
    passed on."""
    program = Path(sys.argv[0])
    start = "python -m loadtest" if program.name == "__main__.py" else program.name
    shown = [re.sub(r"^--key=.*", "--key=...", word, flags=re.DOTALL) for word in sys.argv[1:]]
    shown = ["..." if before == "--key" else word for before, word in zip(["", *shown], shown, strict=False)]
    return shlex.join([*shlex.split(start), *shown])
