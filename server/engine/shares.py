"""Who may have how much of the next step, tenant by tenant. Plain Python, no torch.

Where virtual token counters (counters.py) come from, they order the queue. Here, steps are shared as well, for their
time grows with their rows: whoever is far ahead is left out of them until the others have caught up. Nothing of it
matters while one tenant alone has work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from heapq import heapify, heappop, heapreplace

from server.engine.account import Account
from server.engine.counters import AHEAD, OVERHEAD, Counters
from server.engine.sequence import Sequence

# For so many steps after several tenants had work, prompts are cut small: somebody may come back soon.
LINGER = 64


_Head = tuple[bool, bool, float, int, Sequence, Account, Iterator[Sequence]]


class Shares(Counters):
    """The accounts, and what they allow. `rows` and `blocks` are there to be had at once."""

    def __init__(self, step_tokens: int, rows: int, blocks: int):
        super().__init__(step_tokens)
        self._rows, self._blocks = rows, blocks
        self._first: Account | None = None
        self._limit = self._last = 0.0  # counters: of the first, and of who is furthest behind
        self._reach = AHEAD  # how far ahead of the first one may be, in full steps
        self._piece = self._left = max(1, step_tokens // 4)
        self._prompts: Mapping[Account, bool] = {}  # who has prompts under way, and whether all are batch work
        self._quiet = LINGER  # steps since several tenants had work

    def begin(self, wanted: Mapping[Account, int], prompts: Mapping[Account, bool]) -> None:
        """A step begins in which these tenants could have so many tokens each, with `prompts` among them, which may all
        be batch work. Who is behind may have all; the others as much as leaves them so far ahead of where that one is
        now, or half as far where a prompt of that one is to be computed."""
        self._quiet = 0 if self.contended else self._quiet + 1
        for tenant, tokens in wanted.items():
            tenant.factor = 1 + OVERHEAD * self._step_tokens / max(1, min(tokens, self._step_tokens))
        self._first, self._left, self._prompts = None, self._piece, prompts
        if self.contended:
            self._settle()
            self._last = self._least()
        if len(wanted) > 1:
            self._first = first = min(wanted, key=_counter)
            self._limit, self._reach = first.counter, AHEAD / 2 if first in prompts else AHEAD

    def grant(self, sequence: Sequence, count: int) -> int:
        """How many of `count` tokens the sequence's tenant may have now; at least one, or none."""
        if self._first is None:
            return count
        tenant = self.of(sequence)
        if tenant is self._first:
            return count
        room = self._bound(tenant) - tenant.counter
        return 0 if room < 0 else min(count, 1 + int(room / (tenant.unit * tenant.factor)))

    def chunk(self, sequence: Sequence, count: int) -> int:
        """How many of `count` tokens of its prompt a sequence may have now. The prompts of all that are far ahead, or
        alone for the moment, are together no more than a piece, for who is behind waits for the step to end."""
        if self._quiet >= LINGER:
            return count
        tenant = self.of(sequence)
        if not self._open(tenant):
            return 0
        if self._ahead(tenant):
            count = min(count, self._left)
            self._left -= count
        return count

    def pick(self, rows: list[Sequence]) -> list[Sequence]:
        """Those of `rows`, by place, that are in the step: who is behind first, and of who cannot have all of them in
        it those whose turn it is."""
        if self._first is None:
            return rows
        by_tenant: dict[Account, list[Sequence]] = {}
        for row in rows:
            by_tenant.setdefault(self.of(row), []).append(row)
        picked: list[Sequence] = []
        for tenant in sorted(by_tenant, key=_counter):
            own = by_tenant[tenant]
            count = self.grant(own[0], len(own))
            if count and tenant is not self._first and self._yields(tenant, own[0]):
                continue
            picked += own if count == len(own) else tenant.turn(own, count)
        return picked

    def fairly(self, rows: list[Sequence]) -> list[Sequence]:
        """`rows`, by place, in the order in which they are to have what is left of a step: who is behind first."""
        return rows if self._first is None else sorted(rows, key=lambda one: self.of(one).counter)

    def line(self, *, bounded: bool = False) -> Iterator[Sequence]:
        """The sequences that wait for nothing but room, in the order in which they get it: batch work last; then
        tenants with more than their part of places or blocks last; then who is behind first; then by arrival. Where it
        is `bounded`, without those that can have nothing of this step."""
        heads = [head for tenant in self._busy.values() if (head := self._head(tenant, iter(tuple(tenant.waiting))))]
        heapify(heads)  # a tenant's place in it changes with what it is given itself, and with nothing else
        while heads:
            *_, sequence, tenant, rest = heads[0]
            if bounded and not self._open(tenant):
                heappop(heads)
                continue
            yield sequence
            following = self._head(tenant, rest)
            if following:
                heapreplace(heads, following)
            else:
                heappop(heads)

    def over(self, tenant: Account) -> bool:
        """Whether it holds more than its part of the places or of the blocks."""
        part = tenant.weight / self._weights
        return tenant.rows > self._rows * part or tenant.blocks > self._blocks * part

    def due(self, sequence: Sequence) -> bool:
        """Whether its tenant is near enough to who is furthest behind to be in every step."""
        tenant = self.of(sequence)
        return tenant.counter <= self._least() + self._steps(tenant, AHEAD / 2)

    def _ahead(self, tenant: Account) -> bool:
        if not self.contended:
            return self._quiet < LINGER
        return tenant.counter > self._last + self._steps(tenant, AHEAD / 2)

    def _open(self, tenant: Account) -> bool:
        """Whether its prompts may have anything of this step."""
        if self._first is not None and tenant is not self._first and tenant.counter > self._bound(tenant):
            return False
        return self._left > 0 or not self._ahead(tenant)

    def _bound(self, tenant: Account) -> float:
        """As far as its counter may be to have anything of this step, if it is not the first."""
        return self._limit + self._steps(tenant, self._reach)

    def _yields(self, tenant: Account, row: Sequence) -> bool:
        """Whether its rows, of which that is the most urgent, leave this step to its prompts. Where it is far ahead
        they do every other time, or they would keep it at its bound; but only where all that it has open would be in
        its part of the places, and not to batch work."""
        few = tenant.open * self._weights <= self._rows * tenant.weight
        batch = [one.place[0] for one in tenant.waiting[:1]]
        if tenant in self._prompts:
            batch.append(self._prompts[tenant])
        tenant.yields = not tenant.yields and few and self._ahead(tenant) and any(one <= row.place[0] for one in batch)
        return tenant.yields

    def _head(self, tenant: Account, rest: Iterator[Sequence]) -> _Head | None:
        """The next one of a tenant's line, and what says who of all goes first."""
        for one in rest:
            if one.request.ready:
                return one.place[0], self.over(tenant), tenant.counter, one.order, one, tenant, rest
        return None


def _counter(tenant: Account) -> float:
    return tenant.counter
