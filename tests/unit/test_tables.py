"""The tables of adapter addresses: they stay where they are while adapters come and go."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from tests.kernelcases import DEVICE, adapter_of, base_of, segments

pytest.importorskip("triton", reason="triton is not installed")

from server.lora.ops_triton import add
from server.lora.tables import AdapterTables
from server.lora.weights import AdapterWeights, LoraPair

SHAPES = {"q": (32, 32), "k": (32, 16), "o": (32, 32), "up": (24, 48)}
INFO = base_of(SHAPES)


def tables(slots: int = 2, max_rank: int = 20) -> AdapterTables:
    return AdapterTables(INFO, slots=slots, max_rank=max_rank, dtype=torch.float32, device=DEVICE)


def test_an_entry_is_where_the_weights_lie() -> None:
    here, adapter = tables(), adapter_of(INFO, "a", 5, torch.float32, lacks=["o"])
    slot = here.put(adapter)
    group = here.group(["q", "k"])
    pair = adapter.modules["k"]
    assert group.table[1, slot].tolist() == [pair.a.data_ptr(), pair.b.data_ptr(), 5]
    assert here.group(["o"]).table[0, slot].tolist() == [0, 0, 0]
    assert group.columns.tolist() == [[0, 32], [32, 16]]
    assert (group.in_features, group.widest, group.align, group.capacity) == (32, 32, 16, 32)


def test_slots_are_used_again_and_the_table_stays_in_place() -> None:
    here = tables(slots=1)
    group = here.group(["q"])
    where = group.table.data_ptr()
    x = torch.randn(1, 32).to(DEVICE)
    for name in "abc":
        adapter = adapter_of(INFO, name, 4, torch.float32)
        slot = here.put(adapter)
        assert here.put(adapter) == slot == here.slot(name)
        y = torch.zeros(1, 32, device=DEVICE)
        add(x, y, group, segments([(0, 1, slot)]))
        pair = adapter.modules["q"]
        torch.testing.assert_close(y, x @ pair.a.t() @ pair.b, rtol=1e-4, atol=1e-4)
        here.drop(name)
        here.drop(name)
        assert len(here) == 0
        y.zero_()
        add(x, y, group, segments([(0, 1, slot)]))
        assert not y.any()  # an empty slot adds nothing
    assert group.table.data_ptr() == where == here.group(["q"]).table.data_ptr()


def test_weights_live_while_they_are_listed() -> None:
    here = tables()
    adapter = adapter_of(INFO, "a", 4, torch.float32)
    alive = weakref.ref(adapter)
    here.put(adapter)
    del adapter
    gc.collect()
    assert alive() is not None
    here.drop("a")
    gc.collect()
    assert alive() is None


def test_what_does_not_fit_is_refused_and_takes_no_slot() -> None:
    here = tables(slots=1, max_rank=16)
    with pytest.raises(ValueError, match="rank 17"):
        here.put(adapter_of(INFO, "a", 17, torch.float32))
    with pytest.raises(ValueError, match="not what the tables serve"):
        here.put(adapter_of(INFO, "a", 4, torch.float16))
    pair = LoraPair(torch.zeros(2, 33, device=DEVICE)[:, :32], torch.zeros(2, 32, device=DEVICE))
    with pytest.raises(ValueError, match="contiguous"):
        here.put(AdapterWeights("a", {"q": pair}, 2, 0))
    here.put(adapter_of(INFO, "a", 16, torch.float32))
    with pytest.raises(IndexError):
        here.put(adapter_of(INFO, "b", 4, torch.float32))
    assert len(here) == 1


def test_groups_are_neighbours_of_one_input() -> None:
    with pytest.raises(ValueError, match="not next to each other"):
        tables().group(["q", "o"])
    with pytest.raises(ValueError, match="no common input"):
        tables().group(["o", "up"])
