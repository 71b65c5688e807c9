"""Tenants on a real scheduler, with steps that take as long as a model says: no clock, the same figures every time."""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import dataclass, field

from server.engine.blocks import BlockPool
from server.engine.messages import Prices
from server.engine.scheduler import Scheduler, Work
from tests.unit.test_scheduler import FakeRequest, FakeSequence, FakeSubmit

BLOCK = 16


CONTEXT = 1.2e-6  # seconds to read one token's keys and values, 23 kB, from memory that others use as well
SHARED_READ = 0.15  # of that for each token of a prompt: those of a piece share what is read


def seconds(work: list[Work]) -> float:
    """A step of SmolLM2-135M in bfloat16 on 2 cores: 9 ms for a row, 28 for 16, 90 for 64, 150 for a prompt of 256; and
    what is read of the context."""
    rows = [item for item in work if item.count == 1]
    prompts = [item for item in work if item.count > 1]
    read = sum(len(item.sequence.tokens) for item in rows)
    read += SHARED_READ * sum(item.sequence.computed * item.count for item in prompts)
    return 0.0077 + 0.00129 * len(rows) + 0.000556 * sum(item.count for item in prompts) + CONTEXT * read


@dataclass(eq=False)
class Load:
    """A tenant: `flood` requests at the start, `clients` that send one after the other with pauses of about `pause`
    seconds, `rate` a second at random. `firsts` are the seconds to the first token, `made` its completion tokens after
    `warm` seconds."""

    name: str
    prompt: int
    out: int
    flood: int = 0
    clients: int = 0
    pause: float = 0.0
    rate: float = 0.0
    since: float = 0.0
    weight: float = 1.0
    prices: Prices = field(default_factory=Prices)
    firsts: list[float] = field(default_factory=list)
    made: int = 0

    def arrivals(self, dice: random.Random, until: float) -> list[float]:
        times = [self.since] * self.flood + [self.since + dice.random() * self.pause for _ in range(self.clients)]
        at = self.since
        while self.rate and at < until:
            at += dice.expovariate(self.rate)
            times.append(at)
        return times

    def p99(self) -> float:
        return sorted(self.firsts)[int(0.99 * len(self.firsts))]


class Row(FakeSequence):
    """Knows whose it is and when it came."""

    load: Load
    at: float


def run(*loads: Load, until: float = 30.0, warm: float = 3.0, blocks: int = 4096, seed: int = 1) -> Scheduler:
    """Lets the tenants go on until then; fills in what they had of it."""
    scheduler = Scheduler(BlockPool(blocks, BLOCK), max_batch_tokens=256, max_running=64, prefix_cache=False)
    dice, orders, now = random.Random(seed), itertools.count(), 0.0
    coming = [(at, next(orders), load) for load in loads for at in load.arrivals(dice, until)]
    heapq.heapify(coming)
    while now < until:
        while coming and coming[0][0] <= now:
            scheduler.add(_row(*heapq.heappop(coming), dice))
        work = scheduler.schedule()
        if not work:
            now = max(now, coming[0][0]) if coming else until
            continue
        now += seconds(work)
        chosen = [item.sequence for item in work if item.samples]
        scheduler.computed(work)
        for row in chosen:
            assert isinstance(row, Row)
            if now >= warm:
                row.load.made += 1
                if row.produced == 0:
                    row.load.firsts.append(now - row.at)
            row.tokens.append(0)
            if len(row.tokens) >= row.end:
                scheduler.remove(row)
                if row.load.clients:
                    again = now + row.load.pause * dice.uniform(0.5, 1.5)
                    heapq.heappush(coming, (again, next(orders), row.load))
    return scheduler


def _row(at: float, order: int, load: Load, dice: random.Random) -> Row:
    prompt, out = (max(1, round(size * dice.uniform(0.5, 1.5))) for size in (load.prompt, load.out))
    submit = FakeSubmit(tenant=load.name, weight=load.weight, prices=load.prices)
    row = Row(order, [0] * prompt, prompt + out, FakeRequest(submit=submit))
    row.load, row.at = load, at
    return row
