"""What one tenant has in the engine, and has had. Plain Python, no torch."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

from server.engine.sequence import Sequence


def place(sequence: Sequence) -> tuple[bool, int]:
    """The key of every queue."""
    return sequence.place


@dataclass(eq=False, slots=True)
class Account:
    """Kept while the tenant has work, and until what it had is made up for.

    `counter` and `served` are priced tokens, the first over the weight; `price` is that of its dearest token, `unit`
    what such a one costs over the weight, and `factor` what a token costs in this step over its price. `open`
    sequences wait or hold `rows` places and `blocks`. `cursor` is the place of the last row in a step that did not
    take all; `yields` says that they have left their last turn to its prompts.
    """

    name: str
    weight: float = 1.0
    price: float = 0.0
    unit: float = 1.0
    counter: float = 0.0
    factor: float = 1.0
    served: float = 0.0
    open: int = 0
    rows: int = 0
    blocks: int = 0
    cursor: tuple[bool, int] = (False, -1)
    yields: bool = False
    waiting: list[Sequence] = field(default_factory=list)  # by place

    def turn(self, rows: list[Sequence], count: int) -> list[Sequence]:
        """`count` of its rows, which are by place: batch work last, of each kind those after the last turn."""
        urgent = sum(not row.place[0] for row in rows)
        kept, turning = ([], rows[:urgent]) if urgent >= count else (rows[:urgent], rows[urgent:])
        at = bisect_right(turning, self.cursor, key=place)
        chosen = (turning[at:] + turning[:at])[: count - len(kept)]
        if chosen:
            self.cursor = chosen[-1].place
        return kept + chosen
