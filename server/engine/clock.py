"""What the engine thread's time goes to."""

from __future__ import annotations

import queue
from time import perf_counter
from typing import Protocol, TypeVar

# So many steps from one that is looked into to the next, where looking costs time.
EVERY = 64
PARTS = ("schedule", "pack", "forward", "sample", "emit", "idle")
# What is idle is counted at least so often: whoever reads sees no jump when it ends.
IDLE_SECONDS = 1.0

Taken = TypeVar("Taken", covariant=True)


class Take(Protocol[Taken]):
    """Gives something; raises queue.Empty if there is nothing for `timeout` seconds."""

    def __call__(self, *, timeout: float) -> Taken: ...


class Clock:
    """`parts`: seconds of the thread, all of them, by PARTS. `lora` and `sampled`: seconds that adapters took in the
    forward passes that were looked into, and all seconds of those. Owned by the engine's thread."""

    def __init__(self) -> None:
        self.parts = dict.fromkeys(PARTS, 0.0)
        self.lora = self.sampled = 0.0
        self._last = perf_counter()

    def mark(self, part: str) -> float:
        """What has passed since the last mark went to `part`; returns it, in seconds."""
        now = perf_counter()
        seconds = now - self._last
        self.parts[part] += seconds
        self._last = now
        return seconds

    def idle(self, take: Take[Taken]) -> Taken:
        """What `take` gives, however long there is nothing; all of that time is idle."""
        while True:
            try:
                return take(timeout=IDLE_SECONDS)
            except queue.Empty:
                continue
            finally:
                self.mark("idle")

    def sample(self, lora: float, forward: float) -> None:
        """Of `forward` seconds of a forward pass, `lora` went to adapters."""
        self.lora += lora
        self.sampled += forward

    def restart(self) -> None:
        """Forgets what was: calibration is not service."""
        self.parts.update(dict.fromkeys(PARTS, 0.0))
        self.lora = self.sampled = 0.0
        self._last = perf_counter()
