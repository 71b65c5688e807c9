"""What each tenant has had, as virtual token counters. Plain Python, no torch.

Every token adds its price over the tenant's weight as it is scheduled (Sheng et al. 2024, "Fairness in Serving Large
Language Models"), and more for what it reads; who is behind goes first (shares.py).
"""

from __future__ import annotations

from bisect import insort

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
_REBASE = 2.0**20  # full steps, after which all counters go down by what the clock shows
_IDLE = 64  # accounts without work that are kept unseen, at least


class Counters:
    """The accounts; owned by the engine's thread. A step holds at most `step_tokens`."""

    def __init__(self, step_tokens: int):
        self._step_tokens = step_tokens
        self._tenants: dict[str, Account] = {}
        self._busy: dict[str, Account] = {}  # those with work
        self._weights = 0.0  # of the busy
        self._dearest = 1.0  # the highest price of a token of theirs
        self._step = 0.0  # a full step of the tenant to which that is the least
        self._sweep_at = _IDLE
        self._clock = 0.0  # what each tenant with work would have had by now, had all been served alike

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

    def figures(self) -> dict[str, ShareFigures]:
        """What each tenant that is known has had, and has open."""
        known = self._tenants.values()
        return {one.name: ShareFigures(one.served, len(one.waiting), one.rows, one.weight) for one in known}

    def _least(self) -> float:
        """The counter of who is furthest behind of those with work."""
        return min(tenant.counter for tenant in self._busy.values())

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
        self._clock = max(self._clock, self._least())
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
