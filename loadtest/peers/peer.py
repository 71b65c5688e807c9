"""What every side of a comparison is: a process that can be paused, and a measurement of one case."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

from loadtest.workload import Request

Figures: TypeAlias = dict[str, float]
START_SECONDS = 600.0
RANK, TARGETS = 8, "attention"  # of every adapter


class NotThere(Exception):
    """A peer is not installed or does not start; the message says why."""


@dataclass(frozen=True)
class Case:
    """Requests sent at the same time: each for an adapter of its own, or all for the base."""

    key: str
    rows: int
    adapters: bool
    most: int | None = None  # tokens out, where they are bounded

    def requests(self, prompt: int, new: int, seed: int) -> list[Request]:
        """The same for every side; another seed gives other prompts, so that no prefix cache helps."""
        new = min(new, self.most or new)
        return [Request(at, None, at if self.adapters else None, prompt, new, seed) for at in range(self.rows)]


def cases(rows: int) -> tuple[Case, ...]:
    """What every side that can is asked for."""
    return (
        Case("adapters", rows, True),
        Case("base", rows, False),
        Case("one", 1, False),
        Case("prefill", rows, False, most=1),
    )


@dataclass(frozen=True)
class Setting:
    """What is the same for every side."""

    base: Path
    adapters: list[Path]
    folder: Path  # for logs and data, removed afterwards
    threads: int
    context: int  # tokens of the longest request


class Peer(Protocol):
    """One side. The figures of a case are `tokens_per_s` (prefill included), `ttft_ms` (median), `seconds`, for one
    request alone `decode_tokens_per_s` (from the first token on), and where there are streams `gap_p99_ms`.
    """

    name: str
    dtype: str
    process: Process

    def can(self, case: Case) -> bool:
        """Whether it has this case at all."""
        ...

    def measure(self, case: Case, requests: list[Request]) -> Figures:
        """Raises RuntimeError with the reason when a request fails."""
        ...


@dataclass
class Process:
    """A process with its children, in a group of their own. Paused it takes no processor time, however it waits."""

    command: list[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    piped: bool = False

    def __post_init__(self) -> None:
        pipe = subprocess.PIPE if self.piped else None
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(
                self.command,
                stdin=pipe or subprocess.DEVNULL,
                stdout=pipe or log,
                stderr=log,
                env=os.environ | self.environment,
                start_new_session=True,
                text=True,
            )

    def wait(self, ready: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        """Waits until `ready()`. Raises NotThere with the end of the log when the process ends or takes too long."""
        deadline = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline and self.popen.poll() is None:
                if ready():
                    return
                time.sleep(0.5)
            raise NotThere(self.tail() or "did not start")
        except BaseException:
            self.stop()
            raise

    def tail(self) -> str:
        """The last line of the log that says something."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines()]
        return next((line[:300] for line in reversed(lines) if line), "")

    def pause(self) -> None:
        """Stops the whole group where it is."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets it go on."""
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """Ends it, with force after a while."""
        self.resume()
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(30)
        self._signal(signal.SIGKILL)
        self.popen.wait(30)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)
