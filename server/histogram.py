"""A histogram in plain Python, as cheap as one can be had: counted where the work is done, read when somebody looks."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from math import inf

# Seconds of an adapter's way from one tier to the next: the bounds for both.
LOAD = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Histogram:
    """`counts[i]` values were at most `bounds[i]` and above the bound before; the last ones were above all. One thread
    writes; any may read, and sees every value in `counts` whole, `sum` perhaps a moment before or after."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Counts one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def absorb(self, other: Histogram) -> None:
        """Counts all that `other`, of the same bounds, has counted."""
        for at, count in enumerate(other.counts):
            self.counts[at] += count
        self.sum += other.sum

    def copy(self) -> Histogram:
        """One that does not change any more."""
        copy = Histogram(self.bounds)
        copy.counts, copy.sum = list(self.counts), self.sum
        return copy

    @property
    def total(self) -> int:
        """How many values were counted."""
        return sum(self.counts)

    def cumulative(self) -> list[tuple[float, int]]:
        """For each bound, and for infinity, how many values were at most that."""
        return list(zip((*self.bounds, inf), accumulate(list(self.counts)), strict=True))
