"""The paged attention kernels: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernelcases import BLOCK, DEVICE, TOLERANCE, Paged, decode_tiles, error

pytest.importorskip("triton", reason="triton is not installed")

from server.model.paged_triton import attend, prefill_tiles, queries_for, splits_for, write

# numpy's, in the interpreter, about NaN put there
pytestmark = [pytest.mark.filterwarnings("ignore:invalid value"), pytest.mark.filterwarnings("ignore:All-NaN")]

SCALE = 0.25
CONTEXTS = (1, 15, 16, 17, 64, 150, 300)


def filled(contexts: tuple[int, ...], kv_heads: int, dim: int, value_dim: int, dtype: torch.dtype) -> Paged:
    """The pool with every row's keys and values written by the kernel; what nobody wrote stays NaN."""
    paged = Paged(contexts, kv_heads, dim, value_dim, dtype)
    for (key, value), slots in zip(paged.rows, paged.slots, strict=True):
        write(paged.keys, paged.values, slots, key, value)
    return paged


def decode(paged: Paged, per: int, splits: int, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and what it must be, for one new token of every row: its last."""
    rows, heads = len(paged.contexts), paged.kv_heads * per
    query = paged.queries(rows, heads)
    positions = torch.tensor(paged.contexts, device=DEVICE) - 1
    out = torch.full((rows, heads, paged.value_dim), float("nan"), dtype=paged.dtype, device=DEVICE)
    tiles = decode_tiles(torch.arange(rows, device=DEVICE), positions, splits)
    attend(query, paged.keys, paged.values, paged.tables, tiles, out, block_size=BLOCK, scale=SCALE, window=window)
    wanted = [paged.wanted(row, c - 1, query[row], SCALE, window) for row, c in enumerate(paged.contexts)]
    return out, torch.stack(wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [None, 1, 40])
def test_decode_of_mixed_contexts(window: int | None, dtype: torch.dtype) -> None:
    out, wanted = decode(filled(CONTEXTS, 2, 32, 32, dtype), 2, 1, window)
    assert error(out, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 40])
def test_decode_with_the_keys_split(window: int | None, dtype: torch.dtype) -> None:
    """Also a row with fewer keys than there are programs for them."""
    out, wanted = decode(filled((1, 300), 1, 32, 24, dtype), 2, 4, window)
    assert error(out, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize(("kv_heads", "per"), [(1, 1), (3, 3), (1, 7), (2, 8), (1, 20)])
@pytest.mark.parametrize(("dim", "value_dim"), [(16, 16), (24, 40), (64, 64), (128, 128), (160, 96)])
def test_decode_of_any_grouping_and_size(kv_heads: int, per: int, dim: int, value_dim: int) -> None:
    out, wanted = decode(filled((9, 70), kv_heads, dim, value_dim, torch.float32), per, 1, None)
    assert error(out, wanted) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("per", [1, 3, 4])
def test_prefill_of_chunks_with_context(per: int, window: int | None, dtype: torch.dtype) -> None:
    """Chunks of rows 0..3: a whole prompt, one after a context, one token of many, and a short one."""
    paged = filled((70, 90, 150, 5), 2, 32, 24, dtype)
    chunks = [(0, 70, 0, 0), (70, 110, 50, 1), (111, 112, 149, 2), (112, 116, 1, 3)]
    query = paged.queries(117, 2 * per)
    out = torch.full((117, 2 * per, 24), float("nan"), dtype=dtype, device=DEVICE)
    tiles = prefill_tiles(chunks, per, queries_for(dtype, 32), DEVICE)
    attend(query, paged.keys, paged.values, paged.tables, tiles, out, block_size=BLOCK, scale=SCALE, window=window)
    for start, end, context, row in chunks:
        rows = [paged.wanted(row, context + t - start, query[t], SCALE, window) for t in range(start, end)]
        assert error(out[start:end], torch.stack(rows)) < TOLERANCE[dtype]
    assert torch.isnan(out[[110, 116]]).all()  # no chunk's tokens


def test_wide_tiles_of_a_device() -> None:
    """128 queries a tile, as in 16 bits on a GPU, whatever the dtype."""
    paged = filled((100,), 1, 16, 16, torch.float32)
    query, out = paged.queries(100, 3), torch.empty(100, 3, 16, device=DEVICE)
    tiles = prefill_tiles([(0, 100, 0, 0)], 3, 128, DEVICE)
    assert tiles.tokens == 42
    attend(query, paged.keys, paged.values, paged.tables, tiles, out, block_size=BLOCK, scale=SCALE)
    wanted = torch.stack([paged.wanted(0, at, query[at], SCALE, None) for at in range(100)])
    assert error(out, wanted) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("splits", [1, 4])
def test_nan_of_a_neighbour_or_a_former_owner_reaches_nobody(splits: int) -> None:
    """`filled` has NaN in every place that no row owns; here a row itself is NaN as well."""
    paged = filled((20, 70, 33), 2, 32, 32, torch.float32)
    clean, wanted = decode(paged, 2, splits, None)
    assert error(clean, wanted) < TOLERANCE[torch.float32]
    paged.keys[:, paged.slots[1]] = float("nan")
    paged.values[:, paged.slots[1]] = float("inf")
    out, _ = decode(paged, 2, splits, None)
    assert torch.isnan(out[1]).all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


def test_write_takes_strided_rows_and_touches_nothing_else() -> None:
    keys, values = torch.zeros(2, 64, 24, device=DEVICE), torch.zeros(2, 64, 16, device=DEVICE)
    key = torch.randn(2, 3, 24).to(DEVICE).transpose(0, 1)
    value = torch.randn(3, 5, 16).to(DEVICE)[:, 1:3]
    slots = torch.tensor([40, 3, 63], device=DEVICE)
    write(keys, values, slots, key, value)
    assert torch.equal(keys[:, slots], key.transpose(0, 1))
    assert torch.equal(values[:, slots], value.transpose(0, 1))
    rest = torch.ones(64, dtype=torch.bool, device=DEVICE)
    rest[slots] = False
    assert not keys[:, rest].any()
    assert not values[:, rest].any()
    with pytest.raises(ValueError, match="contiguous"):
        write(keys, values, slots, key.transpose(1, 2), value)


def test_a_row_is_the_same_in_any_company() -> None:
    contexts = (17, 150, 64)
    paged = filled(contexts, 1, 32, 32, torch.float32)
    query = paged.queries(3, 4)
    many = torch.empty(3, 4, 32, device=DEVICE)
    positions = torch.tensor(contexts, device=DEVICE) - 1
    tiles = decode_tiles(torch.arange(3, device=DEVICE), positions, 2)
    attend(query, paged.keys, paged.values, paged.tables, tiles, many, block_size=BLOCK, scale=SCALE)
    one = torch.empty(1, 4, 32, device=DEVICE)
    tiles = decode_tiles(torch.zeros(1, device=DEVICE, dtype=torch.long), positions[1:2], 2)
    attend(query[1:2], paged.keys, paged.values, paged.tables[1:2], tiles, one, block_size=BLOCK, scale=SCALE)
    assert torch.equal(one[0], many[1])


def test_how_often_keys_are_split() -> None:
    assert splits_for(1, 8, 8192) == 32
    assert splits_for(1, 8, 255) == 1
    assert splits_for(1, 8, 1024) == 4
    assert splits_for(8, 8, 8192) == 4
    assert splits_for(64, 8, 100_000) == 1
    assert splits_for(0, 8, 1) == 1
