"""When, on what machine, at which commit and by which command something was measured; no names of hosts or people."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def stamp(command: str) -> dict[str, str]:
    """What goes into every file of results."""
    return {"when": time.strftime("%Y-%m-%d"), "commit": commit(), "command": command, "machine": machine()}


def again(before: dict[str, Any], report: dict[str, Any], parts: Iterable[str]) -> dict[str, Any]:
    """The earlier report `before` with these parts of `report` in it; its `again` has their stamps."""
    stamped = {name: report[name] for name in ("when", "commit", "command")}
    new = {part: report[part] for part in parts}
    return {**before, **new, "again": {**before.get("again", {}), **dict.fromkeys(new, stamped)}}


def machine() -> str:
    """Processor, cores and library versions."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    except OSError:
        pass
    try:
        torch = f", torch {version('torch')}"
    except PackageNotFoundError:
        torch = ""
    return f"{os.cpu_count()} cores of {model}{torch}, Python {platform.python_version()}"


def commit() -> str:
    """The commit that was measured; `-dirty` when files differ from it (results of earlier runs aside)."""
    described = _git("describe", "--always", "--abbrev=7", "--exclude=*")
    dirty = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!loadtest/results")
    return (described or "unknown") + ("-dirty" if dirty else "")


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
