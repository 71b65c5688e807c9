"""Who gives places and blocks back so that somebody else finds room. Plain Python, no torch.

Batch work gives way to all other work, and tenants that hold more of what is short give way to those that hold less:
always the latest arrival first, which is computed again later (recompute preemption; Kwon et al. 2023).
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Rows

from server.engine.account import Account
from server.engine.blocks import BlockPool
from server.engine.sequence import Sequence
from server.engine.shares import Shares

# So often a sequence gives way to other tenants; after that it keeps what it has to its end, as computing it again and
# again would cost everybody.
MOST = 3


class Room:
    """Places in the batch and blocks, and who has which part of them."""

    def __init__(self, pool: BlockPool, shares: Shares, max_running: int):
        self._pool, self._shares, self._max_running = pool, shares, max_running

    def fits(self, sequence: Sequence, running: int, blocks: int) -> bool:
        """Whether there is room beside so many running sequences with so many blocks free, sharing none."""
        return running < self._max_running and self._pool.needed(len(sequence.tokens)) + running <= blocks

    def makers(self, first: Sequence, running: Rows[Sequence]) -> list[Sequence]:
        """Those of `running`, by place, that are to give way to `first`; none if it has room, or if all that may would
        not do."""
        if self._shares.contended and not self._shares.due(first):
            return []  # it would not get into the step, and others would take the room
        count, blocks = len(running), self._pool.available
        batch, victims = first.request.submit.batch, list[Sequence]()
        for one in reversed(running):
            if batch or not one.request.submit.batch or self.fits(first, count, blocks):
                break
            victims.append(one)
            count -= 1
            blocks += len(one.blocks)
        if self._shares.contended and not self.fits(first, count, blocks):
            others = [one for one in running if one.request.submit.batch == batch]
            victims += self._fairly(first, others, count, blocks)
            count, blocks = len(running) - len(victims), self._pool.available + sum(len(one.blocks) for one in victims)
        return victims if self.fits(first, count, blocks) else []

    def giver(self, sequence: Sequence, running: Rows[Sequence], done: Collection[Sequence]) -> Sequence:
        """Who gives its blocks for the next token of `sequence`, perhaps itself, but none of those in `done`: batch
        work, else the tenant that holds the most over its weight."""
        if not self._shares.contended:
            return running[-1]
        rows = [one for one in running if one not in done]
        if rows[-1].request.submit.batch:
            return rows[-1]
        return max(
            (one for one in rows if one.preempted < MOST),
            key=lambda one: ((tenant := self._shares.of(one)).blocks / tenant.weight, one.order),
            default=rows[-1],
        )

    def _fairly(self, first: Sequence, rows: Rows[Sequence], count: int, blocks: int) -> list[Sequence]:
        """The latest arrivals of those tenants that hold more of what is short than the one of `first`, and still do
        when it has what it needs; so nobody takes it back."""
        shares, victims, needed = self._shares, list[Sequence](), self._pool.needed(len(first.tokens))
        owner = shares.of(first)
        lines: dict[Account, list[Sequence]] = {}
        for one in rows:
            if shares.of(one) is not owner and one.preempted < MOST:
                lines.setdefault(shares.of(one), []).append(one)
        held = {tenant: (tenant.rows, tenant.blocks) for tenant in lines}

        def left(tenant: Account) -> tuple[int, int]:
            """What it holds without its latest arrival."""
            rows, owned = held[tenant]
            return rows - 1, owned - len(lines[tenant][-1].blocks)

        while lines and not self.fits(first, count, blocks):
            short = 0 if count >= self._max_running else 1
            donor = max(lines, key=lambda one: left(one)[short] / one.weight)
            wanted = (owner.rows + 1, owner.blocks + needed)[short]
            if wanted / owner.weight > left(donor)[short] / donor.weight:
                return []
            held[donor] = left(donor)
            one = lines[donor].pop()
            if not lines[donor]:
                del lines[donor]
            victims.append(one)
            count -= 1
            blocks += len(one.blocks)
        return victims
