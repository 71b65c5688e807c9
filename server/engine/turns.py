"""The lanes' turns on the device: who is next, and how much of a prompt a shared step may hold. Plain Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic

from server.engine.automerge import AutoMerge
from server.engine.costs import SMALLEST, StepCosts
from server.engine.lanes import SHARED, Busy, Lanes, Urgency
from server.engine.messages import Merge, Unmerge
from server.engine.scheduler import Scheduler, Work

# Seconds after a merged lane's last step in which shared prompts are still cut small: its next request comes soon.
LINGER = 1.0
LEAST = 2 * SMALLEST  # tokens of a prompt in a shared step: a smaller chunk takes nearly as long


class Turns:
    """Asked for the next step while there are merged copies, and told what every step took. `auto`, if any, learns
    from that when a lane pays."""

    def __init__(self, scheduler: Scheduler, share: float, now: Callable[[], float] = monotonic):
        self._scheduler, self._lanes = scheduler, Lanes(share, scheduler.shares.weight, now)
        self.auto: AutoMerge | None = None
        self._merged, self._shared = StepCosts(), StepCosts()
        self._chunked = False  # whether the last step held a shared prompt's chunk
        self._now, self._urgent_at = now, -LINGER

    def next(self) -> tuple[str, list[Work]]:
        """The lane whose turn it is and its work; none where no lane can compute anything."""
        busy = self._scheduler.lanes()
        for lane in self._in_turn(busy) if busy else ():
            work = self._scheduler.schedule(lane, self._chunk(busy) if lane == SHARED else None)
            if work:
                return lane, work
        return SHARED, []

    @property
    def share(self) -> float:
        """What all merged lanes have of the device's time."""
        return self._lanes.share

    def taken(self, lane: str, work: Sequence[Work], seconds: float, *, failed: bool = False) -> None:
        """The step took so long; one that failed is charged, and tells nothing of others."""
        self._lanes.spent(lane, seconds)
        if failed:
            return
        (self._shared if lane == SHARED else self._merged).add(sum(item.count for item in work), seconds)
        self._chunked = lane == SHARED and any(item.count > 1 for item in work)
        if lane != SHARED and not all(item.sequence.request.submit.batch for item in work):
            self._urgent_at = self._now()
        if self.auto is not None:
            self.auto.learn(lane, work, seconds)
            self.auto.look(self._scheduler.running)

    def changed(self, message: object) -> None:
        """A lane has been asked for, or to be given up."""
        if self.auto is not None and isinstance(message, Merge | Unmerge):
            self.auto.told(message)

    def forget(self, lane: str) -> None:
        """The lane is no more."""
        self._lanes.forget(lane)

    def _in_turn(self, busy: Busy) -> list[str]:
        """After one chunk of a shared prompt a merged lane comes first, whatever the clocks say."""
        order = self._lanes.order(busy)
        if self._chunked and _urgent(busy):
            order.sort(key=lambda lane: lane == SHARED)
        return order

    def _chunk(self, busy: Busy) -> int | None:
        """So many tokens of prompts that the shared step takes what is due to it beside a merged one, or twice what its
        decodes take without them; None: no bound, as nobody in a merged lane waits for a token, or comes back soon."""
        urgent = _urgent(busy)
        if not self._merged or (not urgent and self._now() - self._urgent_at > LINGER):
            return None
        rows = max((self._scheduler.decoding(lane) for lane in urgent), default=1)
        due = self._merged.seconds(max(rows, 1)) * self._lanes.ratio()
        decoding, most = self._scheduler.decoding(SHARED), self._scheduler.max_batch_tokens
        if decoding and self._shared:
            # Many rows that decode make long steps anyway. Were their prompts cut as small as beside none, fewer of
            # them would decode at a time, which costs more by the token.
            due = max(due, 2 * self._shared.seconds(decoding))
        return max(self._shared.tokens_within(due, most) - decoding, LEAST)


def _urgent(busy: Busy) -> list[str]:
    """The merged lanes in which there is more than batch work."""
    return [lane for lane, tenants in busy.items() if lane != SHARED and max(tenants.values()) > Urgency.BATCH]
