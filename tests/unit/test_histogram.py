"""The plain histogram against counting one by one."""

from __future__ import annotations

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from server.histogram import Histogram

BOUNDS = (0.1, 0.5, 1.0, 10.0)


@given(st.lists(st.floats(0, 20)))
def test_a_bound_holds_all_values_up_to_it(values: list[float]) -> None:
    histogram = Histogram(BOUNDS)
    for value in values:
        histogram.add(value)
    wanted = [(bound, sum(value <= bound for value in values)) for bound in (*BOUNDS, inf)]
    assert histogram.cumulative() == wanted
    assert histogram.total == len(values)
    assert histogram.sum == sum(values)


def test_what_is_absorbed_is_counted_and_a_copy_stays_as_it_is() -> None:
    one, other = Histogram(BOUNDS), Histogram(BOUNDS)
    one.add(0.1)
    other.add(100.0)
    before = one.copy()
    one.absorb(other)
    assert one.cumulative() == [(0.1, 1), (0.5, 1), (1.0, 1), (10.0, 1), (inf, 2)]
    assert one.sum == 100.1
    assert (before.total, before.sum) == (1, 0.1)
