"""Counters for the `limits` library that live in memory: one number and one end for each key.

The library's own memory storage starts a thread whenever something is counted, to sweep it, and keeps an entry for
every token of a moving window. This one belongs to the event loop's thread, takes nothing back that has ended, and
reads the clock that it is given.
"""

from __future__ import annotations

from collections.abc import Callable

from limits.storage import Storage

SWEEP_SECONDS = 60.0


class Windows(Storage):
    """`clock` gives seconds since 1970. Memory: two numbers a key that was counted within the last minute or so."""

    STORAGE_SCHEME = None

    def __init__(self, clock: Callable[[], float]):
        super().__init__()
        self._clock = clock
        self._counts: dict[str, tuple[int, float]] = {}  # key -> what was counted, when the window ends
        self._sweep = clock() + SWEEP_SECONDS

    def __len__(self) -> int:
        return len(self._counts)

    @property
    def base_exceptions(self) -> type[Exception]:
        return ValueError

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        """Count `amount`; the first to do so begins a window of `expiry` seconds."""
        now = self._clock()
        self._drop_ended(now)
        count, end = self._live(key, now) or (0, now + expiry)
        self._counts[key] = (count + amount, end)
        return count + amount

    def give_back(self, key: str, end: float, amount: int) -> None:
        """Take `amount` out of the window that ends at `end`, if it still lasts."""
        found = self._live(key, self._clock())
        if found and found[1] == end:
            self._counts[key] = (found[0] - amount, end)

    def get(self, key: str) -> int:
        found = self._live(key, self._clock())
        return found[0] if found else 0

    def get_expiry(self, key: str) -> float:
        """When the key's window ends; now, if there is none."""
        now = self._clock()
        found = self._live(key, now)
        return found[1] if found else now

    def check(self) -> bool:
        return True

    def reset(self) -> int:
        count = len(self._counts)
        self._counts.clear()
        return count

    def clear(self, key: str) -> None:
        self._counts.pop(key, None)

    def _live(self, key: str, now: float) -> tuple[int, float] | None:
        found = self._counts.get(key)
        return found if found and found[1] > now else None

    def _drop_ended(self, now: float) -> None:
        if now >= self._sweep:
            self._counts = {key: found for key, found in self._counts.items() if found[1] > now}
            self._sweep = now + SWEEP_SECONDS
