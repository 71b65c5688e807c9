"""Whose turn it is, on a clock of our own."""

from __future__ import annotations

import itertools

import pytest

from server.core import DEFAULT_TENANT
from server.engine.lanes import AHEAD, MERGED_WAIT, SHARED, SHARED_WAIT, YIELD, Lanes, Urgency


class World:
    """Lanes that are always busy unless told otherwise, with steps of a fixed length each. `tenants` have work in a
    lane, the default one where nobody is named; `weights` that differ from 1."""

    def __init__(
        self,
        share: float,
        steps: dict[str, float],
        tenants: dict[str, str] | None = None,
        weights: dict[str, float] | None = None,
    ):
        self.time, self.steps, self.tenants = 0.0, steps, tenants or {}
        self.lanes = Lanes(share, lambda tenant: (weights or {}).get(tenant, 1.0), lambda: self.time)
        self.spent = dict.fromkeys(steps, 0.0)
        self.log: list[str] = []

    def busy(self, lane: str, urgency: Urgency) -> dict[str, Urgency]:
        return dict.fromkeys(self.tenants.get(lane, DEFAULT_TENANT).split(), urgency)

    def part(self, *lanes: str) -> float:
        """Of the time that merged lanes had."""
        merged = sum(seconds for lane, seconds in self.spent.items() if lane != SHARED)
        return sum(self.spent[lane] for lane in lanes) / merged

    def run(
        self, seconds: float, busy: list[str] | None = None, new: tuple[str, ...] = (), batch: tuple[str, ...] = ()
    ) -> None:
        end = self.time + seconds
        while self.time < end:
            lane = self.lanes.order({one: self.busy(one, urgency(one, new, batch)) for one in busy or self.steps})[0]
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
    world.lanes.order({lane: world.busy(lane, Urgency.NEXT) for lane in world.steps})
    world.lanes.spent("a#1", 0.5)
    world.run(3)
    places = [at for at, lane in enumerate(world.log) if lane == "a#1"]
    assert max(b - a for a, b in itertools.pairwise(places)) * 0.02 < MERGED_WAIT + 0.05


def test_a_lane_that_is_no_more_leaves_nothing() -> None:
    world = World(0.5, {SHARED: 0.02, "a#1": 0.01})
    world.run(1)
    world.lanes.forget("a#1")
    assert world.lanes.order({SHARED: world.busy(SHARED, Urgency.NEXT)}) == [SHARED]
    assert not world.lanes._merged._tenants
    assert not world.lanes._merged._clocks.turns


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


LEFT = YIELD / (1 + YIELD)  # of the time, to batch work beside interactive work of its tenant


@pytest.mark.parametrize("step", [0.01, 0.17])
def test_batch_work_yields_to_its_tenants_interactive_work_on_the_other_side(step: float) -> None:
    for lane in (SHARED, "a#1"):
        world = World(0.45, {SHARED: 0.02, "a#1": 0.02} | {lane: step})
        world.run(60, batch=(lane,))
        assert abs(world.spent[lane] / world.time - LEFT) < 0.01
        waits = [at for at, one in enumerate(world.log) if one == lane]
        assert max(b - a for a, b in itertools.pairwise(waits)) * 0.02 <= step / YIELD + 0.06, "it does not starve"
        world.run(10)
        before = dict(world.spent)
        world.run(20, batch=(SHARED, "a#1"))
        assert abs(world.spent["a#1"] - before["a#1"] - 0.45 * 20) < 0.6, "where all is batch work, nobody yields"


def test_interactive_work_does_not_wait_for_the_batch_work_before_it_in_its_lane() -> None:
    for lanes in ((SHARED, "a#1"), ("b#2", "a#1")):
        world = World(0.45, dict.fromkeys(lanes, 0.02) | {"a#1": 0.4})
        while world.log[-1:] != ["a#1"]:
            world.run(0.01, batch=("a#1",))
        world.run(0.01, new=("a#1",))
        assert world.log[-1] == "a#1"


def test_a_tenants_batch_lanes_come_after_its_interactive_ones_and_keep_a_part_together() -> None:
    """Whatever else there is, and however many they are."""
    late = {f"late#{at}": 0.03 for at in range(3)}
    world = World(0.5, {SHARED: 0.02, "soon#4": 0.01, "other#5": 0.01, **late}, {"other#5": "bob", SHARED: "bob"})
    world.run(60, batch=tuple(late))
    assert abs(world.spent[SHARED] / world.time - 0.5) < 0.01
    assert abs(world.part("other#5") - 0.5) < 0.01
    assert abs(world.part(*late) - LEFT / 2) < 0.01
    assert min(world.spent[lane] for lane in late) > 0.4


def test_batch_work_alone_in_merged_lanes_has_its_tenants_part_beside_others_and_no_more_than_the_share() -> None:
    """The share is for latency; but one tenant's interactive work takes nothing of another's part."""
    for weight, part in ((0.1, 0.45), (1.0, 0.45), (3.0, 0.25)):
        world = World(0.45, {SHARED: 0.02, "a#1": 0.02}, {SHARED: "ann", "a#1": "bob"}, {"ann": weight})
        world.run(40, batch=("a#1",))
        assert abs(world.spent["a#1"] / world.time - part) < 0.01
    for weight, part in ((0.1, 0.45), (1.0, 0.5), (3.0, 0.75)):
        world = World(0.45, {SHARED: 0.02, "a#1": 0.02}, {SHARED: "bob", "a#1": "ann"}, {"ann": weight})
        world.run(40, batch=(SHARED,))
        assert abs(world.spent["a#1"] / world.time - part) < 0.02


def test_a_tenants_interactive_work_takes_nothing_of_anothers_lanes() -> None:
    merged = {"ann#1": 0.01, "bob#2": 0.01}
    tenants = {"ann#1": "ann", "bob#2": "bob"}
    world = World(0.5, merged, tenants)
    world.run(20, batch=("bob#2",))
    assert abs(world.part("bob#2") - 0.5) < 0.01, "batch work too has its tenant's part"
    for batch in (("ann#1",), ("ann#1", "bob#2")):
        world = World(0.45, {SHARED: 0.02, **merged}, {SHARED: "ann", **tenants})
        world.run(40, batch=batch)
        assert world.spent["bob#2"] / world.time > 0.225
        assert world.spent[SHARED] / world.time > 0.54
        assert world.part("ann#1") < 0.1, "what yields is hers"
    world = World(0.45, {SHARED: 0.02, "ann#1": 0.01}, {SHARED: "ann bob", "ann#1": "ann"})
    world.run(40, batch=(SHARED,))
    assert abs(world.spent[SHARED] / world.time - 0.55) < 0.03, "bob is in there as well"


def test_a_lane_of_another_tenants_batch_work_has_its_share_and_no_more() -> None:
    world = World(0.5, {SHARED: 0.02, "a#1": 0.17}, {SHARED: "ann", "a#1": "bob"})
    world.run(10, batch=("a#1",))
    assert abs(world.spent["a#1"] / world.time - 0.5) < 0.03
    world.lanes.spent("a#1", 0.4)
    world.log.clear()
    world.run(0.5, batch=("a#1",))
    assert "a#1" not in world.log, "it waits until it is behind again"


def test_who_comes_back_after_everybody_had_gone_waits_for_nothing_of_the_past() -> None:
    world = World(0.5, {SHARED: 0.02, "a#1": 0.01, "b#2": 0.01})
    world.run(60)
    world.run(0.1, busy=[SHARED])
    world.run(0.1, busy=["a#1"])  # nobody of those who were last busy
    before = dict(world.spent)
    world.run(2)
    assert abs(world.spent[SHARED] - before[SHARED] - 1) < 0.1
    assert abs(world.spent["b#2"] - before["b#2"] - 0.5) < 0.1


FIVE = {f"many#{at}": 0.01 for at in range(5)}


def test_five_lanes_of_one_tenant_have_no_more_than_one_of_another() -> None:
    world = World(0.5, {SHARED: 0.02, "one#9": 0.013, **FIVE}, {"one#9": "ann", **dict.fromkeys(FIVE, "bob")})
    world.run(40)
    assert abs(world.spent[SHARED] / world.time - 0.5) < 0.01, "nor do they take of the shared lane's part"
    assert abs(world.part("one#9") - 0.5) < 0.01
    each = [world.spent[lane] for lane in FIVE]
    assert max(each) - min(each) < 0.03, "its own share that part alike"
    world.run(5, busy=list(FIVE))
    assert world.log[-1] in FIVE, "what the other does not use is theirs"


def test_tenants_have_time_by_their_weights() -> None:
    world = World(0.5, {"one#9": 0.01, **FIVE}, {"one#9": "ann", **dict.fromkeys(FIVE, "bob")}, {"ann": 3.0})
    world.run(40)
    assert abs(world.part("one#9") - 0.75) < 0.01


def test_a_lane_of_several_tenants_has_the_turns_of_all_of_them() -> None:
    lanes = {"house#1": 0.01, "own#2": 0.01, "other#3": 0.01}
    world = World(0.5, lanes, {"house#1": "ann bob", "own#2": "bob", "other#3": "cyd"})
    world.run(60)
    assert abs(world.part("house#1") - 1 / 2) < 0.01, "all of one tenant's third, and half of another's"
    assert abs(world.part("own#2") - 1 / 6) < 0.01
    assert abs(world.part("other#3") - 1 / 3) < 0.01


def test_a_flood_of_first_tokens_does_not_take_another_tenants_part_or_that_of_its_own_lanes() -> None:
    world = World(0.5, {"flood#1": 0.05, "calm#2": 0.01, "own#3": 0.01}, {"flood#1": "f", "calm#2": "c", "own#3": "f"})
    world.run(0.5, new=("flood#1",))
    assert set(world.log) == {"flood#1"}, "first tokens come first"
    world.run(60, new=("flood#1",))
    assert abs(world.spent["calm#2"] - world.time / 2) < AHEAD + 0.1
    assert abs(world.spent["own#3"] - world.time / 4) < AHEAD + 0.1


def test_tenants_come_and_go_and_leave_nothing() -> None:
    world = World(0.5, {"a#1": 0.01, "b#2": 0.01}, {"a#1": "ann bob", "b#2": "bob"})
    world.run(1)
    world.lanes.forget("a#1")
    world.lanes.spent("a#1", 0.01)  # its last step
    assert set(world.lanes._merged._tenants) == {"bob"}
    world.run(1, busy=["b#2"])
    world.lanes.forget("b#2")
    assert not world.lanes._merged._tenants
    assert not world.lanes._merged._clocks.turns
