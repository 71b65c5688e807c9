"""Which adapter goes when a tier is full: the order that the RAM tier and the slots share. Plain Python.

A tier tells its order of every use; the adapter of the lowest rank goes first. What may not go (referenced slots, say)
is the tier's own affair.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

Policy = Literal["lru", "cost"]

HALF_LIFE = 3.0  # uses per adapter held until a use counts half: long enough for frequency, short enough to forget it
_FORGOTTEN = 10.0  # half-lives after which a use counts nothing
# A load takes a time of its own and a time for its bytes; loadtest/eviction.py measures both. This is the first in
# units of the second.
_LOAD_BYTES = 6 * 1024**2


def reload_cost(nbytes: int) -> float:
    """What it costs to bring an adapter of `nbytes` back from disk, in the time that one byte takes."""
    return _LOAD_BYTES + nbytes


class Order(Protocol):
    """An order of eviction. Not safe for several threads: a tier calls it where it changes itself."""

    def use(self, key: str, worth: float) -> None:
        """`key` has come, or was used again; losing it would cost `worth` for each unit of room that it takes."""

    def leave(self, key: str) -> None:
        """`key` is not held any more."""

    def rank(self, key: str) -> float:
        """Of those held, the one of the lowest rank goes first."""


class LeastRecent:
    """LRU: what was used longest ago goes first, whatever it is worth."""

    def __init__(self) -> None:
        self._clock = 0
        self._used: dict[str, int] = {}

    def use(self, key: str, worth: float) -> None:
        self._clock += 1
        self._used[key] = self._clock

    def leave(self, key: str) -> None:
        self._used.pop(key, None)

    def rank(self, key: str) -> float:
        return self._used[key]


class LeastWorth:
    """What would cost least, times how often it is used: each use counts half after HALF_LIFE uses of the tier per
    adapter held. Uses of what has left count on, so that a popular adapter does not begin anew.

    The count is LRFU's (Lee et al., IEEE Transactions on Computers 50(12), 2001), the weight by cost and size that of
    GreedyDual-Size (Cao and Irani, USITS 1997). Ranks are base-2 logarithms on a clock of half-lives: all counts decay
    alike, so a rank only changes when its adapter is used.
    """

    def __init__(self) -> None:
        self._clock = self._swept = 0.0
        self._uses: dict[str, float] = {}  # log2 of the decayed count, plus the clock; of adapters that left as well
        self._ranks: dict[str, float] = {}

    def use(self, key: str, worth: float) -> None:
        self._clock += 1 / (HALF_LIFE * max(1, len(self._ranks)))
        before = self._uses.get(key, -math.inf)
        self._uses[key] = self._clock + math.log2(1 + 2 ** (before - self._clock))
        self._ranks[key] = self._uses[key] + math.log2(worth)
        if self._clock - self._swept > _FORGOTTEN:
            self._sweep()

    def leave(self, key: str) -> None:
        self._ranks.pop(key, None)

    def rank(self, key: str) -> float:
        return self._ranks[key]

    def _sweep(self) -> None:
        """Forgets what was used too long ago to count, so that the history stays a multiple of what is held."""
        oldest = self._swept = self._clock
        oldest -= _FORGOTTEN
        self._uses = {key: uses for key, uses in self._uses.items() if uses > oldest or key in self._ranks}


def order(policy: Policy) -> Order:
    """A new order of this policy, for one tier."""
    return LeastRecent() if policy == "lru" else LeastWorth()
