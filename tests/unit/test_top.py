"""The cap on names: the size is bounded, everything is counted once, no sum falls, the busiest are named."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.metrics import top
from server.metrics.top import Top

NAMES = 5_000


@dataclass
class Count:
    value: int = 0

    def absorb(self, other: Count) -> None:
        self.value += other.value


class Time:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def total(one: Top[int, Count]) -> int:
    return sum(count.value for _, count in one) + one.other.value


def zipf(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(NAMES), [1 / (rank + 1) for rank in range(NAMES)], k=count)


def test_five_thousand_names_take_the_room_of_a_few_and_every_count_is_kept() -> None:
    found: Top[int, Count] = Top(50, Count)
    wanted = dict.fromkeys(range(NAMES), 0)
    for name in [*range(NAMES), *zipf(40_000, 1)]:
        found.of(name, 1.0).value += 1
        wanted[name] += 1
        assert len(found) <= 50
        assert len(found._watched) <= found._room
    assert total(found) == NAMES + 40_000
    named = dict(found)
    assert set(range(20)) <= set(named), "the busiest are among them"
    for name, count in named.items():
        assert count.value <= wanted[name], "nobody is counted under another's name"


def test_fewer_names_than_there_is_room_for_are_exact() -> None:
    found: Top[int, Count] = Top(50, Count)
    for name in random.Random(2).choices(range(50), k=5_000):
        found.of(name, 1.0).value += 1
    assert len(found) == 50
    assert found.other.value == 0


def test_names_that_are_all_alike_do_not_come_and_go() -> None:
    found: Top[int, Count] = Top(50, Count)
    dice, before, changes = random.Random(3), set[int](), 0
    for at in range(50_000):
        found.of(dice.randrange(NAMES), 1.0).value += 1
        if at % 100 == 0:
            now = {name for name, _ in found}
            changes += len(now - before)
            before = now
    assert changes < 500, "more than ten times each"
    assert total(found) == 50_000


def test_who_was_busy_long_ago_makes_room_for_who_is_now() -> None:
    time = Time()
    found: Top[int, Count] = Top(2, Count, time)
    for name in (1, 2):
        found.of(name, 1_000.0).value += 1_000
    found.of(3, 10.0).value += 10
    assert {name for name, _ in found} == {1, 2}
    time.now = 10 * top.HALF_LIFE
    found.of(3, 10.0).value += 10
    assert {name for name, _ in found} & {3}
    assert found.other.value == 1_010, "what the one that left had, and what the newcomer had before it was named"
    assert total(found) == 2_020


@pytest.mark.parametrize("years", [1, 20])
def test_weights_do_not_overflow(years: int) -> None:
    time = Time()
    found: Top[int, Count] = Top(2, Count, time)
    for _ in range(200):
        time.now += years * 365 * 86_400 / 200
        found.of(random.Random(time.now).randrange(10), 1.0).value += 1
    assert total(found) == 200
    assert all(score < float("inf") for score in found._scores.values())


def test_without_room_all_is_other() -> None:
    found: Top[int, Count] = Top(0, Count)
    for name in range(10):
        found.of(name, 1.0).value += 1
    assert not len(found)
    assert found.other.value == 10


@given(
    st.integers(0, 4),
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 50), st.floats(0, 3_000)), max_size=200),
)
def test_sums_are_exact_and_never_fall_whatever_comes(most: int, events: list[tuple[int, int, float]]) -> None:
    time = Time()
    found: Top[int, Count] = Top(most, Count, time)
    found._room = min(found._room, 4)
    counted, other = 0, 0
    for name, amount, pause in events:
        time.now += pause
        found.of(name, float(amount)).value += amount
        counted += amount
        assert total(found) == counted
        assert found.other.value >= other
        other = found.other.value
        assert len(found) <= most
