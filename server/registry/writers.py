"""One writer a name, and none that waits for another name's: a lane that is being made can take seconds."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from server.registry.records import Key


@dataclass(slots=True)
class _Turn:
    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0  # threads that hold it or wait for it


class Writers:
    """A lock for every name, there while a thread holds it or waits for it. Safe to call from several threads."""

    def __init__(self) -> None:
        self._guard = threading.Lock()  # of what follows; held for no longer than a look-up
        self._turns: dict[Key, _Turn] = {}

    def __len__(self) -> int:
        """Names that somebody is changing, or waits to change."""
        return len(self._turns)

    @contextmanager
    def alone(self, key: Key) -> Iterator[None]:
        """Nobody else changes that name during the block."""
        with self._guard:
            turn = self._turns.setdefault(key, _Turn())
            turn.users += 1
        try:
            with turn.lock:
                yield
        finally:
            with self._guard:
                turn.users -= 1
                if not turn.users:
                    del self._turns[key]
