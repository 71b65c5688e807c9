"""Whose turn it is, on a clock of our own."""

from __future__ import annotations

import itertools

import pytest

from server.engine.lanes import MERGED_WAIT, SHARED, SHARED_WAIT, Lanes, Urgency


class World:
    """Lanes that are always busy unless told otherwise, with steps of a fixed length each."""

    def __init__(self, share: float, steps: dict[str, float]):
        self.time, self.steps = 0.0, steps
        self.lanes = Lanes(share, lambda: self.time)
        self.spent = dict.fromkeys(steps, 0.0)
        self.log: list[str] = []

    def run(
        self, seconds: float, busy: list[str] | None = None, new: tuple[str, ...] = (), batch: tuple[str, ...] = ()
    ) -> None:
        end = self.time + seconds
        while self.time < end:
            lane = self.lanes.order({one: urgency(one, new, batch) for one in busy or self.steps})[0]
            self.time += self.steps[lane]
            self.spent[lane] += self.steps[lane]
            self.lanes.spent(lane, self.steps[lane])
            self.log.append(lane)


def urgency(lane: str, new: tuple[str, ...], batch: tuple[str, ...]) -> Urgency:
    return Urgency.BATCH if lane in batch else Urgency.FIRST if lane in new else Urgency.NEXT


def test_time_is_shared_as_it_was_said() -> None:
    for share in (0.2, 0.5, 0.8):
        world = World(share, {SHARED: 0.021, "a#1": 0.0095})
        world.run(20)
        assert abs(world.spent["a#1"] / world.time - share) < 0.01


def test_merged_lanes_share_their_part_alike() -> None:
    world = World(0.6, {SHARED: 0.02, "a#1": 0.01, "b#2": 0.013})
    world.run(20)
    assert abs(world.spent[SHARED] / world.time - 0.4) < 0.01
    assert abs(world.spent["a#1"] - world.spent["b#2"]) < 0.2


def test_nobody_waits_for_an_idle_lane_or_is_charged_for_having_been_alone() -> None:
    world = World(0.5, {SHARED: 0.02, "a#1": 0.01})
    world.run(5, busy=["a#1"])
    assert world.spent[SHARED] == 0
    world.log.clear()
    world.run(2)
    assert world.log[:4].count("a#1") >= 1, "its time alone is not held against it"
    assert abs(world.spent["a#1"] - 5 - world.spent[SHARED]) < 0.1
    before = world.spent["a#1"]
    world.run(1, busy=[SHARED])
    world.run(2)
    assert abs(world.spent["a#1"] - before - 1) < 0.1, "what it has not used is not saved either"


def test_a_lane_that_comes_and_goes_does_not_lose_its_debt() -> None:
    world = World(0.5, {SHARED: 0.02, "a#1": 0.1})
    for _ in range(50):
        world.run(0.1)
        world.run(0.02, busy=[SHARED])
    assert world.spent["a#1"] < 0.55 * world.time


def test_first_tokens_come_before_the_shared_lane_until_it_has_waited_long() -> None:
    world = World(0.5, {SHARED: 0.02, "a#1": 0.17})
    world.run(0.6, new=("a#1",))
    assert world.log == ["a#1"] * 4
    world.run(6, new=("a#1",))
    places = [at for at, lane in enumerate(world.log) if lane == SHARED]
    assert places, "it does not wait for ever"
    assert max(b - a for a, b in itertools.pairwise(places)) * 0.17 < SHARED_WAIT + 0.4


def test_a_merged_lane_in_debt_waits_no_longer_than_its_bound() -> None:
    world = World(0.5, {SHARED: 0.02, "a#1": 0.01})
    world.lanes.order(dict.fromkeys(world.steps, Urgency.NEXT))
    world.lanes.spent("a#1", 0.5)
    world.run(3)
    places = [at for at, lane in enumerate(world.log) if lane == "a#1"]
    assert max(b - a for a, b in itertools.pairwise(places)) * 0.02 < MERGED_WAIT + 0.05


def test_a_lane_that_is_no_more_leaves_nothing() -> None:
    world = World(0.5, {SHARED: 0.02, "a#1": 0.01})
    world.run(1)
    world.lanes.forget("a#1")
    assert world.lanes.order({SHARED: Urgency.NEXT}) == [SHARED]
    assert "a#1" not in world.lanes._merged.turns


@pytest.mark.parametrize(
    ("merged", "step", "shared"), [(2, 0.11, 0.15), (2, 0.06, 0.08), (4, 0.02, 0.02), (8, 0.02, 0.02)]
)
def test_many_or_slow_merged_lanes_do_not_take_the_shared_ones_part(merged: int, step: float, shared: float) -> None:
    """Then each of them waits longer than its bound in any case."""
    world = World(0.5, {SHARED: shared, **{f"a#{at}": step for at in range(merged)}})
    world.run(30)
    assert abs(world.spent[SHARED] / world.time - 0.5) < 0.06
    each = [world.spent[f"a#{at}"] for at in range(merged)]
    assert max(each) - min(each) < 3 * step


def test_a_lane_of_batch_work_has_its_share_and_no_more() -> None:
    world = World(0.5, {SHARED: 0.02, "a#1": 0.17})
    world.run(10, batch=("a#1",))
    assert abs(world.spent["a#1"] / world.time - 0.5) < 0.03
    world.lanes.spent("a#1", 0.4)
    world.log.clear()
    world.run(0.5, batch=("a#1",))
    assert "a#1" not in world.log, "it waits until it is behind again"
