"""A counter for each of the busiest names, and one for all others: however many names there are, its size is bounded.

Which names are busiest is decided by decayed traffic in a sketch of bounded size (Space-Saving: Metwally, Agrawal & El
Abbadi 2005, "Efficient Computation of Frequent and Top-k Elements in Data Streams"). The counters themselves are exact:
everything is counted once, under its name or under `other`, and what a name has that is no longer named goes to
`other`, so that no sum ever falls.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from time import monotonic
from typing import Generic, Protocol, Self, TypeVar

HALF_LIFE = 600.0  # seconds after which traffic counts half
# How many times the traffic of the least busy of the named another must have had, to be named in its place: names that
# come and go are of no use to whoever reads rates.
MARGIN = 1.5
_SPARE = 1  # names that are watched for each that is named, and
_LEAST = 64  # at least
_REBASE = 256  # half-lives, after which weights begin anew


class Counted(Protocol):
    """What is counted of a name."""

    def absorb(self, other: Self) -> None: ...


Name = TypeVar("Name", bound=Hashable)
Value = TypeVar("Value", bound=Counted)


class Top(Generic[Name, Value]):
    """`most` names have a value of their own, made by `make`; `other` is everybody else's, and that of the name that
    `other` goes by outside (`reserved`), if somebody is called so. For one thread."""

    def __init__(
        self,
        most: int,
        make: Callable[[], Value],
        now: Callable[[], float] = monotonic,
        *,
        reserved: Name | None = None,
    ):
        self.most, self._make, self._now, self._reserved = most, make, now, reserved
        self.other = make()
        self._named: dict[Name, Value] = {}
        self._scores: dict[Name, float] = {}  # decayed traffic of the named
        self._least = 0.0  # not above the least of these
        self._watched: dict[
            Name, tuple[float, float]
        ] = {}  # an upper bound of others' traffic, and how far it may be off
        self._room = max(_LEAST, _SPARE * most) if most else 0
        self._epoch = now()

    def __iter__(self) -> Iterator[tuple[Name, Value]]:
        """The named."""
        return iter(self._named.items())

    def __len__(self) -> int:
        return len(self._named)

    def of(self, name: Name, traffic: float) -> Value:
        """What to count `traffic`, more than nothing, of `name` in."""
        if name == self._reserved:
            return self.other
        weight = self._weight(traffic)
        if name in self._named:
            self._scores[name] += weight
            return self._named[name]
        if len(self._named) < self.most:
            return self._enter(name, weight)
        if not self.most:
            return self.other
        score, error = self._watch(name, weight)
        if score - error <= MARGIN * self._least:
            return self.other
        least = min(self._scores, key=self._scores.__getitem__)
        self._least = self._scores[least]
        if score - error <= MARGIN * self._least:
            return self.other
        self.other.absorb(self._named.pop(least))
        self._watched[least] = self._scores.pop(least), 0.0
        del self._watched[name]
        return self._enter(name, score - error)

    def _enter(self, name: Name, score: float) -> Value:
        self._scores[name] = score
        value = self._named[name] = self._make()
        return value

    def _watch(self, name: Name, weight: float) -> tuple[float, float]:
        known = self._watched.get(name)
        if known is None and len(self._watched) >= self._room:
            # The quietest makes room, and what it had may have been the newcomer's.
            quietest = min(self._watched, key=lambda one: self._watched[one][0])
            known = (self._watched.pop(quietest)[0],) * 2
        score, error = known or (0.0, 0.0)
        self._watched[name] = found = (score + weight, error)
        return found

    def _weight(self, traffic: float) -> float:
        """Old traffic is not made less; new traffic weighs more, which comes to the same."""
        age = (self._now() - self._epoch) / HALF_LIFE
        if age > _REBASE:
            scale = 2.0**-age
            self._scores = {name: score * scale for name, score in self._scores.items()}
            self._watched = {name: (a * scale, b * scale) for name, (a, b) in self._watched.items()}
            self._least *= scale
            self._epoch, age = self._now(), 0.0
        return traffic * 2.0**age
