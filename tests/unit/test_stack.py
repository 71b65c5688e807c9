"""The stacked adapters of a step: every column belongs to whom it says, through any sequence of changes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.lora.stack import FREE, AdapterStack
from server.lora.weights import AdapterWeights, LoraPair

MODULES = ("q", "k", "down")


def adapter(number: int) -> AdapterWeights:
    """Ranks and targets differ from adapter to adapter; every value names its adapter."""
    ranks = {name: (number * 7 + at * 3) % 9 + 1 for at, name in enumerate(MODULES) if (number + at) % 4}
    pairs = {
        name: LoraPair(torch.full((rank, 5), float(number + 1)), torch.full((rank, 6), float(number + 1)))
        for name, rank in ranks.items()
    }
    return AdapterWeights(f"d{number}", pairs, max(ranks.values()), 0)


ADAPTERS = [adapter(number) for number in range(12)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 11), max_size=10), max_size=12))
def test_columns_hold_their_owner_after_any_change(steps: list[list[int]]) -> None:
    stack = AdapterStack()
    for step in steps:
        owners = stack.activate([ADAPTERS[number] for number in step])  # rows may share an adapter
        assert set(owners) == {f"d{number}" for number in step}
        assert len(set(owners.values())) == len(owners)
        for name in MODULES:
            active = {n: ADAPTERS[n].modules[name] for n in set(step) if name in ADAPTERS[n].modules}
            table = stack.tables.get(name)
            if table is None:
                assert not active
                continue
            assert set(table.owners) - {FREE} == {owners[f"d{n}"] for n in active}
            a, b = table.active
            for n, pair in active.items():
                columns = [c for c, owner in enumerate(table.owners) if owner == owners[f"d{n}"]]
                assert columns == list(range(columns[0], columns[0] + len(pair.a)))
                assert torch.equal(a[columns], pair.a)
                assert torch.equal(b[columns], pair.b)


def test_gaps_do_not_pile_up() -> None:
    stack = AdapterStack()
    for round_ in range(200):
        stack.activate([ADAPTERS[(round_ + at) % 12] for at in range(4)])
    for table in stack.tables.values():
        assert len(table.owners) <= 4 * 9 * 1.5 + 1
        assert len(table.a) <= 128
