"""When the model says that a lane of its own pays, on costs and a clock of our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from server.core import AdapterRef
from server.engine.automerge import PATIENCE, STAY, AutoMerge, Load, reason
from server.engine.costs import DecodeCosts
from server.engine.messages import Merge, Sampling, Submit, Unmerge
from server.engine.sequence import Request, Sequence

SHARE = 0.5


def costs(seconds: Callable[[int], float], lora: float = 0.0) -> DecodeCosts:
    """Of steps that take so long by their rows, and so much more for a row on an adapter."""
    made = DecodeCosts()
    for rows in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        made.learn(merged=False, rows=rows, adapted=0, context=0, seconds=seconds(rows))
        made.learn(merged=True, rows=rows, adapted=0, context=0, seconds=seconds(rows))
    for _ in range(200):
        made.learn(merged=False, rows=16, adapted=16, context=0, seconds=seconds(16) + 16 * lora)
    return made


def flat(rows: int) -> float:
    """Reading the weights is all that counts: two lanes take twice the time."""
    return 0.010


def steep(rows: int) -> float:
    """Arithmetic is all that counts: two lanes take the time of one."""
    return 0.001 * rows


def ref(name: str) -> AdapterRef:
    return AdapterRef(name, 1, name)


def rows(name: str | None, count: int, *, batch: bool = False, held: Any = None) -> list[Sequence]:
    adapter = ref(name) if name else None
    submit = Submit("", (1, 2), adapter, Sampling(max_tokens=4), batch=batch)
    return [Sequence(Request(submit, b"", 0.0, held=held), 0, at, [1, 2], cast(Any, None)) for at in range(count)]


class Copies:
    """Those that the engine would have, made at once unless `slow`, or never if `refused`."""

    def __init__(self) -> None:
        self.asked: set[AdapterRef] = set()
        self.own: dict[AdapterRef, bool] = {}
        self.log: list[tuple[str, str]] = []
        self.slow = self.refused = False

    def has(self, adapter: AdapterRef) -> bool:
        return adapter in self.asked or adapter in self.own

    def automatic(self) -> dict[AdapterRef, bool]:
        return dict(self.own)

    def volunteer(self, adapter: AdapterRef, why: str) -> None:
        self.log.append((adapter.name, why))
        if not self.refused:
            self.own[adapter] = not self.slow

    def dismiss(self, adapter: AdapterRef) -> None:
        self.log.append((adapter.name, "dismissed"))
        del self.own[adapter]


class World:
    def __init__(self, costs: DecodeCosts):
        self.time, self.copies = 0.0, Copies()
        self.auto = AutoMerge(costs, self.copies, SHARE, lambda: self.time)

    def run(self, seconds: float, running: list[Sequence]) -> list[tuple[str, str]]:
        """What was changed in that time."""
        before = len(self.copies.log)
        for _ in range(round(seconds / 0.05)):
            self.time += 0.05
            self.auto.look(running)
        return self.copies.log[before:]


class Lane:
    lane = "a#1"


class Other:
    lane = "b#2"


def test_alone_it_pays_wherever_lora_costs_anything() -> None:
    model = costs(flat, lora=0.0001)
    assert reason(Load.of(rows("a", 16), ref("a")), model, SHARE, 0.02) == "alone"
    assert reason(Load.of(rows("a", 16), ref("a")), costs(flat), SHARE, 0.0) is None, "nothing is gained"


def test_beside_others_it_pays_where_arithmetic_counts_and_lora_is_dear() -> None:
    mixed = [*rows("a", 12), *rows("b", 4)]
    assert reason(Load.of(mixed, ref("a")), costs(steep, lora=0.0002), SHARE, 0.02) == "throughput"
    assert reason(Load.of(mixed, ref("b")), costs(steep, lora=0.0001), SHARE, 0.02) == "throughput"
    assert reason(Load.of(mixed, ref("a")), costs(flat, lora=0.0002), SHARE, 0.02) is None
    with_base = [*rows("a", 8), *rows(None, 8)]
    assert Load.of(with_base, ref("a")) == Load(rows=16, adapted=8, own=8, urgent=False, lanes=0)


def test_an_interactive_adapter_among_batch_work_gets_a_lane_for_its_latency() -> None:
    model = costs(lambda count: 0.008 + 0.001 * count)
    among = [*rows("a", 1), *rows("b", 15, batch=True)]
    assert reason(Load.of(among, ref("a")), model, SHARE, 0.02) == "latency"
    assert reason(Load.of(among, ref("b")), model, SHARE, 0.02) is None, "batch work yields"
    also = [*among, *rows(None, 1)]
    assert reason(Load.of(also, ref("a")), model, SHARE, 0.02) is None, "another's latency counts as well"
    assert reason(Load.of(among, ref("a")), model, 0.2, 0.02) is None, "a small share would make it wait longer"


def test_batch_work_beside_interactive_work_gets_no_lane_in_which_it_would_yield() -> None:
    model = costs(steep, lora=0.0002)
    batch = rows("a", 12, batch=True)
    assert reason(Load.of([*batch, *rows("b", 4, batch=True)], ref("a")), model, SHARE, 0.02) == "throughput"
    assert reason(Load.of([*batch, *rows("b", 4)], ref("a")), model, SHARE, 0.02) is None
    apart = [*batch, *rows("b", 4, held=Lane())]
    assert reason(Load.of(apart, ref("a")), model, SHARE, 0.02) == "alone", "those have a lane of their own"


def test_rows_in_other_lanes_are_not_the_shared_ones() -> None:
    mixed = [*rows("a", 4), *rows("b", 4, held=Lane()), *rows(None, 2)]
    assert Load.of(mixed, ref("a")) == Load(rows=6, adapted=4, own=4, urgent=False, lanes=1)
    assert Load.of(mixed, ref("b")) == Load(rows=10, adapted=8, own=4, urgent=False, lanes=0)


def test_it_waits_before_and_after() -> None:
    world = World(costs(flat, lora=0.0002))
    assert world.run(PATIENCE - 0.5, rows("a", 8)) == []
    world.run(0.5, [*rows("a", 8), *rows("b", 8)])  # no longer alone: the time counts from anew
    assert world.run(PATIENCE - 0.5, rows("a", 8)) == []
    assert world.run(1, rows("a", 8)) == [("a", "alone")]
    others = [*rows("a", 1, held=Lane()), *rows("b", 15)]
    assert world.run(STAY - 1.5, others) == []
    assert world.run(2, others) == [("a", "dismissed")]
    assert world.run(STAY - 0.5, rows("a", 8)) == [], "nor does it come back at once"
    assert world.run(2, rows("a", 8)) == [("a", "alone")]


def test_two_lanes_that_pay_only_because_of_each_other_do_not_stay() -> None:
    world = World(costs(flat, lora=0.0002))
    world.copies.own = {ref("a"): True, ref("b"): True}
    both = [*rows("a", 8, held=Lane()), *rows("b", 8, held=Other())]
    assert world.run(PATIENCE + 1, both)[0][1] == "dismissed"


def test_one_that_pays_stays() -> None:
    world = World(costs(flat, lora=0.0002))
    world.run(PATIENCE + 1, rows("a", 8))
    assert world.run(3 * STAY, rows("a", 8, held=Lane())) == []


def test_a_copy_without_requests_goes_once_others_run() -> None:
    world = World(costs(flat, lora=0.0002))
    world.run(PATIENCE + 1, rows("a", 8))
    changed = world.run(STAY + PATIENCE, rows("b", 8))
    assert changed[:1] == [("a", "dismissed")] or changed == [("b", "alone"), ("a", "dismissed")]
    assert ref("a") not in world.copies.own


def test_one_copy_is_made_at_a_time() -> None:
    world = World(costs(steep, lora=0.0005))
    world.copies.slow = True
    assert len(world.run(3 * PATIENCE, [*rows("a", 8), *rows("b", 8)])) == 1


def test_what_was_refused_is_not_asked_for_again_at_once() -> None:
    world = World(costs(flat, lora=0.0002))
    world.copies.refused = True
    assert len(world.run(STAY, rows("a", 8))) == 1
    assert len(world.run(PATIENCE + 1, rows("a", 8))) == 1


def test_copies_that_were_asked_for_and_adapters_told_where_to_be_are_left_alone() -> None:
    world = World(costs(flat, lora=0.0002))
    world.copies.asked.add(ref("a"))
    assert world.run(2 * STAY, rows("a", 8, held=Lane())) == []
    world.auto.told(Unmerge("u", ref("b")))
    assert world.run(STAY, rows("b", 8)) == [("b", "alone")], "a version that is no longer current says nothing"
    world.auto.told(Unmerge("u", ref("c"), asked=True))
    assert world.run(2 * STAY, rows("c", 8))[1:] == [], "its owner wants it in the shared lane"
    world.auto.told(Merge("m", ref("c"), False))
    assert ("c", "alone") in world.run(2 * STAY, rows("c", 8)), "until it is asked for a lane"


def test_the_base_alone_is_nobodys() -> None:
    world = World(costs(flat, lora=0.0002))
    assert world.run(STAY, rows(None, 8)) == []


def test_what_an_adapters_row_costs_is_learnt_beside_context() -> None:
    model = DecodeCosts(context=1e-6)
    model.learn(merged=False, rows=16, adapted=0, context=16_000, seconds=0.036)
    assert model.shared_seconds(16, 0) == pytest.approx(0.020)
    for _ in range(200):
        model.learn(merged=False, rows=16, adapted=8, context=16_000, seconds=0.040)
    assert model.shared_seconds(16, 16) == pytest.approx(0.028, rel=0.01)
    model.learn(merged=True, rows=16, adapted=16, context=16_000, seconds=0.036)
    assert model.merged_seconds(16) == pytest.approx(0.020)
    assert model.shared_seconds(0, 0) == 0
