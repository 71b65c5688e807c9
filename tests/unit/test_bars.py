"""The aims beside what is reached."""

from __future__ import annotations

import pytest

from loadtest.bars import Bar, bars, bars_table
from loadtest.compare import RESULTS


@pytest.mark.parametrize(
    ("bar", "met"),
    [
        (Bar("a", 0.9, "c", at_least=0.9), True),
        (Bar("a", 0.89, "c", at_least=0.9), False),
        (Bar("a", 51, "c", at_most=50), False),
        (Bar("a", 50, "c", at_most=50), True),
        (Bar("a", None, "c", at_least=0.9), None),
    ],
)
def test_met(bar: Bar, met: bool | None) -> None:
    assert bar.met is met


def test_every_aim_has_a_line_with_its_figure_and_commit() -> None:
    found = list(bars(RESULTS))
    assert len({bar.what for bar in found}) == len(found)
    assert all(bar.reached is not None and bar.commit for bar in found)
    assert all((bar.at_least is None) != (bar.at_most is None) for bar in found)
    page = bars_table(RESULTS)
    assert page.count("\n") == len(found) + 2
    assert page.count("**no**") == sum(bar.met is False for bar in found)
