"""When, on what machine, at which commit and by which command something was measured; no names of hosts or people."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version


def stamp(command: str) -> dict[str, str]:
    """What goes into every file of results."""
    return {"when": time.strftime("%Y-%m-%d"), "commit": commit(), "command": command, "machine": machine()}


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
