"""The queue's bounds: what one tenant may have of them, and what is left for the others."""

from __future__ import annotations

import random

import pytest

from server.engine.bounds import FEW, Bounds
from server.errors import Overloaded, QueueShare


def bounds(requests: int = 120, tokens: int = 120_000, *, shared: bool = True) -> Bounds:
    return Bounds(requests, tokens, "tokens", shared=shared)


def flood(queue: Bounds, tenant: str, weight: float = 1.0, amount: int = 1) -> int:
    """Takes as much as it gets; how many requests that were."""
    taken = 0
    while True:
        try:
            queue.take(tenant, weight, amount)
        except (QueueShare, Overloaded):
            return taken
        taken += 1


def test_without_shares_one_tenant_may_fill_all_and_is_then_told_so() -> None:
    queue = bounds(3, 100, shared=False)
    assert flood(queue, "a") == 3
    with pytest.raises(Overloaded, match="3 requests") as caught:
        queue.check("b", 1, 1)
    assert (caught.value.status, caught.value.code, caught.value.retry_after) == (503, "queue_full", 1)
    queue = bounds(30, 100, shared=False)
    queue.take("a", 1, 90)
    with pytest.raises(Overloaded, match="100 tokens"):
        queue.check("a", 1, 11)
    queue.check("a", 1, 10)


@pytest.mark.parametrize(("amount", "unit"), [(1, "requests"), (2_000, "tokens")])
def test_a_tenant_alone_fills_half(amount: int, unit: str) -> None:
    queue = bounds()
    half = 60 if unit == "requests" else 30
    assert flood(queue, "a", amount=amount) == half
    with pytest.raises(QueueShare, match=unit) as caught:
        queue.take("a", 1, amount)
    assert (caught.value.status, caught.value.code, caught.value.retry_after) == (429, "queue_share", 1)
    assert queue.requests == half, "what was refused is not counted"
    queue.give_back("a", amount)
    queue.take("a", 1, amount)


def test_floods_that_come_and_go_end_with_equal_parts_and_room_for_the_next() -> None:
    queue, chance = bounds(), random.Random(5)
    held = {"a": flood(queue, "a"), "b": flood(queue, "b")}
    assert held["a"] == 60
    assert 0 < held["b"] < 60
    for _ in range(1000):  # one ends, and both would like to have its place
        queue.give_back(ended := chance.choice([name for name in held if held[name]]), 1)
        held[ended] -= 1
        for name in sorted(held, key=lambda _: chance.random()):
            held[name] += flood(queue, name)
    assert held == {"a": 40, "b": 40}
    assert flood(queue, "c") == 20


def test_parts_are_by_weight() -> None:
    queue = bounds(150)
    held = {"light": flood(queue, "light", 1.0), "heavy": flood(queue, "heavy", 3.0)}
    assert held["light"] == 75, "alone it has as much as any"
    for _ in range(400):
        for name, weight in (("light", 1.0), ("heavy", 3.0)):
            if held[name]:
                queue.give_back(name, 1)
                held[name] += flood(queue, name, weight) - 1
    assert 2.5 < held["heavy"] / held["light"] < 3.5
    assert sum(held.values()) > 75


def test_whoever_has_little_gets_in_however_small_its_weight() -> None:
    queue = bounds(640)
    assert flood(queue, "flood", 1000.0) == 320
    assert flood(queue, "small", 0.001) == 640 * FEW
    queue = bounds(640, 1000)
    assert flood(queue, "flood", 1000.0, 100) == 5
    assert flood(queue, "small", 0.001, 400) == 1, "a request alone may be as large as what is left"


def test_no_single_request_takes_more_than_half() -> None:
    queue = bounds(tokens=1001)
    with pytest.raises(QueueShare, match="tokens"):
        queue.check("a", 1, queue.largest + 1)
    queue.take("a", 1, queue.largest)
    queue.take("b", 1, queue.largest)
    alone = bounds(tokens=1001, shared=False)
    alone.take("a", 1, alone.largest)
    assert (queue.amount, alone.amount) == (1000, 1001)


def test_below_the_half_it_is_anybodys() -> None:
    queue = bounds()
    queue.take("heavy", 1000, 1)
    assert flood(queue, "light", 0.001) == 59


def test_each_of_many_newcomers_finds_room() -> None:
    queue = bounds(1024)
    got = [flood(queue, f"t{number}") for number in range(9)]
    assert all(got), got
    assert got[0] == 512
    for number, count in enumerate(got):
        for _ in range(count):
            queue.give_back(f"t{number}", 1)
    assert (queue.requests, queue.amount) == (0, 0)
    assert flood(queue, "again") == 512, "who has nothing open any more takes no part"
