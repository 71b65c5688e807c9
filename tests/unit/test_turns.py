"""Lanes' turns on a real scheduler, with steps that take as long as we say."""

from __future__ import annotations

import itertools

from server.engine.lanes import SHARED
from server.engine.scheduler import Work
from server.engine.turns import LEAST, LINGER, Turns
from tests.unit.test_scheduler import laned, play, scheduler_of, sequence

LONG = 400


class World:
    """A long prompt in the shared lane and a row in a merged one; a step takes `least` seconds and 1 ms a token."""

    def __init__(self, *, batch: bool = False, decodes: int = 0, least: float = 0.01) -> None:
        self.least = least
        self.time, self.scheduler = 0.0, scheduler_of(blocks=400, tokens=64, running=32)
        self.turns = Turns(self.scheduler, 0.5, lambda: self.time)
        self.row = laned(0, 1, "a#1", batch=batch)
        self.scheduler.add(self.row)
        for order in range(decodes):
            self.scheduler.add(sequence(2 + order, 1))
        for _ in range(4):
            self.step()
        self.scheduler.add(sequence(9, LONG))

    def step(self) -> tuple[str, list[Work]]:
        lane, work = self.turns.next()
        seconds = self.least + 0.001 * sum(item.count for item in work)
        self.time += seconds
        self.turns.taken(lane, work, seconds)
        play(self.scheduler, work)
        return lane, work


def test_a_shared_prompt_delays_a_merged_token_by_one_small_chunk() -> None:
    world = World()
    steps = [world.step() for _ in range(60)]
    lanes = [lane for lane, _ in steps]
    assert SHARED in lanes
    assert (SHARED, SHARED) not in list(itertools.pairwise(lanes))
    assert max(sum(item.count for item in work) for _, work in steps) <= LEAST


def test_beside_its_own_decodes_a_prompt_gets_a_larger_chunk() -> None:
    world = World(decodes=16, least=0.03)
    alone, both = 0.03 + 16 * 0.001, list[list[Work]]()
    for _ in range(60):
        began = world.time
        lane, work = world.step()
        if lane == SHARED and any(item.count > 1 for item in work):
            both.append(work)
            assert world.time - began <= 2 * alone
    assert max(item.count for work in both for item in work) > LEAST


def test_without_a_merged_row_for_a_while_prompts_are_not_cut() -> None:
    world = World()
    world.scheduler.remove(world.row)
    assert sum(item.count for item in world.step()[1]) <= LEAST, "it may come back"
    world.time += LINGER + 1
    assert sum(item.count for item in world.step()[1]) == 64


def test_batch_work_in_a_merged_lane_cuts_no_prompts() -> None:
    world = World(batch=True)
    assert max(sum(item.count for item in world.step()[1]) for _ in range(10)) == 64


def test_batch_work_in_a_merged_lane_yields_to_the_shared_ones_interactive_work() -> None:
    world = World(batch=True, decodes=4)
    lanes = [world.step()[0] for _ in range(120)]
    assert 0 < lanes.count("a#1") < 20, "its steps are as long as the others', or shorter"


def test_tenants_in_one_lane_and_in_several_each_have_their_turns() -> None:
    """Ann and Bob use the house's lane, she with many rows; Bob, who is ahead by his tokens in two lanes of his own and
    so not in every step of the house's, costs Cyd nothing."""
    scheduler = scheduler_of(blocks=2000, tokens=16, running=32)
    turns = Turns(scheduler, 0.5, lambda: 0.0)
    lanes = ["house#1"] * 12 + ["bob#2", "bob#3", "house#1", "cyd#4"]
    tenants = ["ann"] * 12 + ["bob"] * 3 + ["cyd"]
    for order, (lane, tenant) in enumerate(zip(lanes, tenants, strict=True)):
        row = laned(order, 1, lane)
        row.request.submit.tenant = tenant
        scheduler.add(row)
    spent = dict.fromkeys(lanes, 0.0)
    for _ in range(1200):
        lane, work = turns.next()
        turns.taken(lane, work, 0.01)
        play(scheduler, work)
        spent[lane] += 0.01
    parts = {lane: seconds / sum(spent.values()) for lane, seconds in spent.items()}
    assert abs(parts["cyd#4"] - 1 / 3) < 0.1
    assert abs(parts["house#1"] - 4 / 9) < 0.1
    assert abs(parts["bob#2"] - 1 / 9) < 0.1
