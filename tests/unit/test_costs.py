"""What a step is expected to take."""

from __future__ import annotations

import pytest

from server.engine.costs import SMALLEST, StepCosts


def learned(seconds: dict[int, float]) -> StepCosts:
    costs = StepCosts()
    for tokens, took in seconds.items():
        costs.add(tokens, took)
    return costs


def test_nothing_is_known_at_first() -> None:
    costs = StepCosts()
    assert not costs
    assert costs.tokens_within(1.0, 256) == SMALLEST
    assert costs.tokens_within(1.0, 4) == 4


def test_between_and_beyond_what_was_seen() -> None:
    costs = learned({1: 0.010, 16: 0.020, 256: 0.200})
    assert costs.seconds(1) == 0.010
    assert costs.seconds(16) == 0.020
    assert 0.010 < costs.seconds(8) < 0.020
    assert costs.seconds(136) == pytest.approx(0.110)
    assert costs.seconds(512) == pytest.approx(0.400)


def test_a_few_rows_alone_say_nothing_of_many_but_that_they_are_no_cheaper() -> None:
    costs = learned({1: 0.010})
    assert costs.seconds(16) == 0.010
    assert costs.seconds(64) == pytest.approx(0.040)


def test_new_steps_outweigh_old_ones() -> None:
    costs = learned({16: 0.020})
    for _ in range(30):
        costs.add(16, 0.040)
    assert costs.seconds(16) == pytest.approx(0.040, rel=0.01)


def test_tokens_within_a_time() -> None:
    costs = learned({1: 0.010, 16: 0.012, 256: 0.160})
    for seconds in (0.0, 0.012, 0.05, 0.1, 9.0):
        tokens = costs.tokens_within(seconds, 256)
        assert SMALLEST <= tokens <= 256
        assert tokens == SMALLEST or costs.seconds(tokens) <= seconds
        assert tokens == 256 or costs.seconds(tokens + SMALLEST) > seconds
