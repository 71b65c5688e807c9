"""Who may have how much of the next step, tenant by tenant. Plain Python, no torch.

A virtual token counter per tenant (Sheng et al. 2024, "Fairness in Serving Large Language Models"): every token adds
its price over the tenant's weight as it is scheduled, and who is behind goes first. There, that orders the queue. Here,
steps are shared as well, for their time grows with their rows: whoever is far ahead is left out of them until the
others have caught up. Nothing of it matters while one tenant alone has work.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Mapping
from heapq import heapify, heappop, heapreplace

from server.engine.account import Account, place
from server.engine.sequence import Sequence
from server.engine.stats import ShareFigures

# How far, in full steps of its own dearest tokens, a tenant may be ahead of another and still be in its steps; and how
# far behind the others, in full steps of the cheapest tenant's, one begins that comes back. It lets a few prompts
# through before the others have their turn.
AHEAD = 4.0
# What a step costs beside its tokens, as a part of the largest step's tokens. Each tenant in a step is charged for it
# as if it were alone there; else one row of one tenant would hold all the others to one row as well.
OVERHEAD = 1 / 64
# What reading its context adds to what a token costs, as a part of its price for each token that is read: the keys and
# values of some thousand take about as long as the products. Those of a prompt's piece are read for all of it together.
CONTEXT = 1 / 1024
TOGETHER = 0.15
# A token costs at least so much of the dearest there is, or one at no price would be served for ever.
CHEAPEST = 0.01
# How far a counter may be from the clock, in the same steps. Further away is who was served in a lane of its own, or
# waited for something else than its share.
FURTHEST = 16
# For so many steps after several tenants had work, prompts are cut small: somebody may come back soon.
LINGER = 64
_REBASE = 2.0**20  # full steps, after which all counters go down by what the clock shows
_IDLE = 64  # accounts without work that are kept unseen, at least


_Head = tuple[bool, bool, float, int, Sequence, Account, Iterator[Sequence]]


class Shares:
    """The accounts; owned by the engine's thread. A step holds at most `step_tokens`; `rows` and `blocks` are there to
    be had at once."""

    def __init__(self, step_tokens: int, rows: int, blocks: int):
        self._step_tokens, self._rows, self._blocks = step_tokens, rows, blocks
        self._tenants: dict[str, Account] = {}
        self._busy: dict[str, Account] = {}  # those with work
        self._weights = 0.0  # of the busy
        self._dearest = 1.0  # the highest price of a token of theirs
        self._step = 0.0  # a full step of the tenant to which that is the least
        self._sweep_at = _IDLE
        self._clock = 0.0  # what each tenant with work would have had by now, had all been served alike
        self._first: Account | None = None
        self._limit = self._least = 0.0  # counters: of the first, and of who is furthest behind
        self._reach = AHEAD  # how far ahead of the first one may be, in full steps
        self._piece = self._left = max(1, step_tokens // 4)
        self._prompts: Mapping[Account, bool] = {}  # who has prompts under way, and whether all are batch work
        self._quiet = LINGER  # steps since several tenants had work

    @property
    def contended(self) -> bool:
        """Whether several tenants have work."""
        return len(self._busy) > 1

    def of(self, sequence: Sequence) -> Account:
        """The account of a sequence that has entered."""
        return self._tenants[sequence.request.submit.tenant]

    def weight(self, tenant: str) -> float:
        """The part of a tenant with work beside the others'."""
        return self._tenants[tenant].weight

    def enter(self, sequence: Sequence) -> None:
        """A sequence has come. A tenant that had no work begins behind the others by as much as they may be ahead of
        one that asks for little, or where it left: being idle saves no more than that."""
        submit = sequence.request.submit
        tenant = self._tenants.get(submit.tenant)
        if tenant is None:
            tenant = self._tenants[submit.tenant] = Account(submit.tenant)
        price = max(submit.prices.prompt, submit.prices.completion)
        if tenant.open == 0:
            self._join(tenant)
        if tenant.open == 0 or price > tenant.price or submit.weight != tenant.weight:
            tenant.price, tenant.weight = price, submit.weight
            self._changed()
        tenant.open += 1

    def leave(self, sequence: Sequence) -> None:
        """A sequence has ended, or was given up."""
        tenant = self.of(sequence)
        tenant.open -= 1
        if tenant.open == 0:
            del self._busy[tenant.name]
            self._changed()
            self._forget()

    def queued(self, sequence: Sequence) -> None:
        """A sequence that has entered waits for room."""
        insort(self.of(sequence).waiting, sequence, key=place)

    def unqueued(self, sequence: Sequence) -> None:
        """It waits no longer."""
        self.of(sequence).waiting.remove(sequence)

    def placed(self, sequence: Sequence) -> None:
        """A sequence has been given a place, and its blocks."""
        tenant = self.of(sequence)
        tenant.rows += 1
        tenant.blocks += len(sequence.blocks)

    def stopped(self, sequence: Sequence) -> None:
        """A sequence is about to give its place and its blocks back."""
        tenant = self.of(sequence)
        tenant.rows -= 1
        tenant.blocks -= len(sequence.blocks)

    def hit(self, sequence: Sequence) -> None:
        """Charges what a sequence found in the prefix cache when it was first given room: of a request's answers, the
        first one's, as on the bill."""
        sequence.charged = sequence.computed
        if sequence.computed and not sequence.index:
            self._charge(self.of(sequence), sequence.computed * sequence.request.submit.prices.cached, 0)

    def charge(self, sequence: Sequence, count: int) -> None:
        """Charges the next `count` tokens, which a step is about to compute, and the one that may be chosen after them.
        What is computed again after a preemption was charged the first time; a prompt is charged once a request, as on
        the bill."""
        submit = sequence.request.submit
        end = sequence.computed + count
        price, tokens = (submit.prices.completion, 1) if end == len(sequence.tokens) else (0.0, 0)
        length = sequence.prompt_length
        reading = CONTEXT * sequence.computed * (1.0 if count == 1 else TOGETHER)
        if sequence.charged < length:
            new = min(end, length) - max(sequence.charged, sequence.computed)
            if new > 0:
                price += 0.0 if sequence.index else new * submit.prices.prompt
                tokens += new
                sequence.charged = min(end, length)
        self._charge(self._tenants[submit.tenant], price, tokens, 1 + reading)

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
            self._least = min(tenant.counter for tenant in self._busy.values())
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
        least = min(tenant.counter for tenant in self._busy.values())
        tenant = self.of(sequence)
        return tenant.counter <= least + self._steps(tenant, AHEAD / 2)

    def figures(self) -> dict[str, ShareFigures]:
        """What each tenant that is known has had, and has open."""
        known = self._tenants.values()
        return {one.name: ShareFigures(one.served, len(one.waiting), one.rows, one.weight) for one in known}

    def _ahead(self, tenant: Account) -> bool:
        if not self.contended:
            return self._quiet < LINGER
        return tenant.counter > self._least + self._steps(tenant, AHEAD / 2)

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

    def _charge(self, tenant: Account, price: float, tokens: int, reading: float = 1.0) -> None:
        tenant.served += price
        price, least = price * reading, CHEAPEST * self._dearest * tokens
        cost = (price if price > least else least) / tenant.weight * tenant.factor
        tenant.counter += cost
        self._clock += cost * tenant.weight / self._weights

    def _steps(self, tenant: Account, count: float) -> float:
        """What so many full steps of its dearest tokens add to its counter."""
        return count * self._step_tokens * tenant.unit

    def _join(self, tenant: Account) -> None:
        """It has work again."""
        if self._busy:
            self._settle()
            tenant.counter = max(tenant.counter, self._clock - AHEAD * self._step)
        else:
            tenant.counter = max(tenant.counter, self._clock)
        self._busy[tenant.name] = tenant
        if self._clock > _REBASE * self._step:
            for one in self._tenants.values():
                one.counter -= self._clock
            self._clock = 0.0

    def _changed(self) -> None:
        """Others have work than before, or at other prices."""
        busy = self._busy.values()
        self._weights = sum(tenant.weight for tenant in busy)
        self._dearest = max((tenant.price for tenant in busy), default=0.0) or 1.0
        for tenant in busy:
            tenant.unit = max(tenant.price, CHEAPEST * self._dearest) / tenant.weight
        self._step = self._step_tokens * min((tenant.unit for tenant in busy), default=1.0)

    def _settle(self) -> None:
        """Keeps the clock and the counters of those with work near each other."""
        self._clock = max(self._clock, min(tenant.counter for tenant in self._busy.values()))
        # Who is behind must be able to be so by as much as any other may be ahead.
        dearest = max(tenant.unit for tenant in self._busy.values())
        behind = max(FURTHEST * self._step, AHEAD * self._step_tokens * dearest)
        for tenant in self._busy.values():
            most = self._clock + self._steps(tenant, FURTHEST)
            tenant.counter = min(max(tenant.counter, self._clock - behind), most)

    def _forget(self) -> None:
        """Drops who has no work and would not begin further ahead for being known."""
        if len(self._tenants) - len(self._busy) < self._sweep_at:
            return
        start = self._clock - AHEAD * self._step
        self._tenants = {name: one for name, one in self._tenants.items() if one.open or one.counter > start}
        self._sweep_at = max(_IDLE, 2 * (len(self._tenants) - len(self._busy)))


def _counter(tenant: Account) -> float:
    return tenant.counter
