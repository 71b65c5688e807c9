"""Paged attention for CUDA as Triton kernels, over the pool of model/attention.py: [kv_heads, tokens, dim] a layer.

A step's queries are cut into *tiles*: some new tokens of one row, with the query heads of one KV head side by side,
so that a tile reads each key once for all of them (grouped-query attention). A decode row is a tile of one token, a
prefill chunk as many tiles as it needs; both are the same kernel. For a query at position p, with its row's keys 0..p
visible (or only the last `window` of them):

    out = sum over visible k of softmax(scale * q k^T) v_k      online, in float32 (Milakov and Gimelshein 2018)

A few rows with long contexts would leave most of a GPU idle, so a decode row's keys may be split between programs,
whose partial sums are then combined ("flash-decoding"; Dao et al. 2023). Keys are found through the row's block table
(Kwon et al. 2023, "PagedAttention"). A key that no query of the tile may see is read as zero, so whatever another
owner left in a block, NaN included, reaches nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_NO_WINDOW = 1 << 30
_PROGRAMS = 264  # of a decode step: two for each multiprocessor of a large GPU
_LEAST_KEYS = 256  # of a context, worth a program of their own
_MOST_SPLITS = 32
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Tiles:
    """int32 [tiles, 4]: first packed token, tokens, position of the first token, row of the block tables.

    `tokens` is the most that a tile has; `splits` how many programs share a tile's keys (1 unless `tokens` is 1).
    A tile of no tokens does nothing.
    """

    table: torch.Tensor
    tokens: int
    splits: int = 1


def splits_for(rows: int, kv_heads: int, longest: int) -> int:
    """Programs for a decode row's keys, a power of two: enough for the device, none with less than it is worth.

    `longest` is the longest context of any of `rows` rows.
    """
    wanted = min(_PROGRAMS // max(rows * kv_heads, 1), longest // _LEAST_KEYS, _MOST_SPLITS)
    return 1 << (max(wanted, 1).bit_length() - 1)


def queries_for(dtype: torch.dtype, dim: int) -> int:
    """Queries (tokens times heads of a group) of a prefill tile that a program has registers for."""
    return 32 if dtype == torch.float32 else 128 if dim <= 128 else 64


def prefill_tiles(chunks: Sequence[tuple[int, int, int, int]], per: int, queries: int, device: torch.device) -> Tiles:
    """Tiles of the chunks (start, end, context, row): packed tokens start..end after `context` tokens in the pool.

    `per` query heads share a KV head.
    """
    size = max(queries // per, 1)
    tiles = [
        (at, min(size, end - at), context + at - start, row)
        for start, end, context, row in chunks
        for at in range(start, end, size)
    ]
    return Tiles(torch.tensor(tiles, dtype=torch.int32).to(device, non_blocking=True), size)


def write(
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    """Stores key and value [tokens, kv_heads, dim], strided, at `slots` [tokens] of the pools [kv_heads, pool, dim]."""
    tokens, heads, dim = key.shape
    _contiguous(key, value)
    # fmt: off
    _write[(tokens, heads)](
        keys, values, slots, key, value,
        keys.stride(0), values.stride(0), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        DIM=dim, VALUE=value.shape[2], BLOCK_D=_power(dim), BLOCK_V=_power(value.shape[2]), num_warps=1,
    )
    # fmt: on


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    tiles: Tiles,
    out: torch.Tensor,
    *,
    block_size: int,
    scale: float,
    window: int | None = None,
) -> None:
    """Attention of the tiles' tokens, written into `out` [tokens, heads, value_dim]; other tokens are not touched.

    query [tokens, heads, dim], strided; keys and values [kv_heads, pool, dim], which hold the new tokens' own
    already; `tables` int32 [rows, width], contiguous: each row's blocks in order, any valid id after its last.
    """
    _contiguous(query, keys, values, out)
    (kv_heads, _, dim), heads, width = keys.shape, query.shape[1], values.shape[2]
    per, count, splits = heads // kv_heads, len(tiles.table), tiles.splits
    wide = query.dtype == torch.float32 or max(dim, width) > 128
    queries = _power(tiles.tokens * per)
    sums, tops = out, out
    if splits > 1:
        sums = torch.empty(splits, count, heads, width, dtype=torch.float32, device=out.device)
        tops = torch.empty(splits, count, heads, 2, dtype=torch.float32, device=out.device)
    # fmt: off
    _attend[(count, kv_heads, splits)](
        query, keys, values, tables, tiles.table, out, sums, tops, scale * _LOG2_E, window or _NO_WINDOW,
        query.stride(0), query.stride(1), keys.stride(0), values.stride(0), tables.stride(0),
        out.stride(0), out.stride(1),
        PER=per, DIM=dim, VALUE=width, BLOCK=block_size, SPLITS=splits,
        BLOCK_M=queries, BLOCK_N=32 if wide else 64, BLOCK_D=_power(dim), BLOCK_V=_power(width),
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=8 if queries >= 128 else 4, num_stages=2,
    )
    if splits > 1:
        _combine[(count, heads)](
            sums, tops, tiles.table, out, out.stride(0), out.stride(1),
            VALUE=width, SPLITS=splits, BLOCK_V=_power(width), num_warps=1,
        )
    # fmt: on


def _power(n: int) -> int:
    """The smallest block that the matrix units take and that holds n."""
    return max(16, triton.next_power_of_2(n))


def _contiguous(*tensors: torch.Tensor) -> None:
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        raise ValueError("the last dimension of every tensor must be contiguous")


# fmt: off
@triton.jit
def _write(
    keys, values, slots, key, value, keys_head, values_head, key_token, key_head, value_token, value_head,
    DIM: tl.constexpr, VALUE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):
    # fmt: on
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    d, v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    new = tl.load(key + token * key_token + head * key_head + d, mask=d < DIM)
    tl.store(keys + head * keys_head + slot * DIM + d, new, mask=d < DIM)
    new = tl.load(value + token * value_token + head * value_head + v, mask=v < VALUE)
    tl.store(values + head * values_head + slot * VALUE + v, new, mask=v < VALUE)


@triton.jit
def _span(position, tokens, window, split, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first block of keys, and the one after the last, of this program's share of what its tile may see."""
    first = tl.maximum(position - window + 1, 0) // BLOCK_N
    last = tl.cdiv(position + tokens, BLOCK_N)
    share = tl.cdiv(last - first, SPLITS)
    return first + split * share, tl.minimum(first + (split + 1) * share, last)


# fmt: off
@triton.jit(do_not_specialize=["window", "tables_row"])  # they change from step to step
def _attend(
    query, keys, values, tables, tiles, out, sums, tops, scale, window,
    query_token, query_head, keys_head, values_head, tables_row, out_token, out_head,
    PER: tl.constexpr, DIM: tl.constexpr, VALUE: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # fmt: on
    tile, group, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    start, tokens = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1)
    position, blocks = tl.load(tiles + tile * 4 + 2), tables + tl.load(tiles + tile * 4 + 3) * tables_row
    m, d, v = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    live = (m // PER < tokens)[:, None]
    token, head, seen = (start + m // PER).to(tl.int64)[:, None], (group * PER + m % PER)[:, None], position + m // PER
    q = tl.load(query + token * query_token + head * query_head + d[None, :], mask=live & (d < DIM)[None, :], other=0.0)
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
    low, high = _span(position, tokens, window, split, SPLITS, BLOCK_N)
    for number in range(low, high):
        n = number * BLOCK_N + tl.arange(0, BLOCK_N)
        there = (n < position + tokens) & (n > position - window)
        slot = tl.load(blocks + n // BLOCK, mask=there, other=0).to(tl.int64) * BLOCK + n % BLOCK
        place = keys + group * keys_head + slot[None, :] * DIM + d[:, None]
        k = tl.load(place, mask=there[None, :] & (d < DIM)[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        visible = (n[None, :] <= seen[:, None]) & (n[None, :] > seen[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing visible so far: all weights are 0, not NaN
        weights = tl.math.exp2(scores - base[:, None])
        kept = tl.math.exp2(top - base)
        place = values + group * values_head + slot[:, None] * VALUE + v[None, :]
        held = tl.load(place, mask=there[:, None] & (v < VALUE)[None, :], other=0.0)
        mixed = tl.dot(weights.to(held.dtype), held, mixed * kept[:, None], input_precision=PRECISION)
        total, top = total * kept + tl.sum(weights, 1), higher
    there = live & (v < VALUE)[None, :]
    if SPLITS == 1:
        mixed = mixed / total[:, None]
        tl.store(out + token * out_token + head * out_head + v[None, :], mixed.to(out.dtype.element_ty), mask=there)
    else:
        entry = ((split * tl.num_programs(0) + tile) * tl.num_programs(1)).to(tl.int64) * PER + head
        tl.store(sums + entry * VALUE + v[None, :], mixed, mask=there)
        tl.store(tops + entry * 2, top[:, None], mask=live)
        tl.store(tops + entry * 2 + 1, total[:, None], mask=live)


# fmt: off
@triton.jit
def _combine(
    sums, tops, tiles, out, out_token, out_head, VALUE: tl.constexpr, SPLITS: tl.constexpr, BLOCK_V: tl.constexpr,
):
    # fmt: on
    tile, head, v = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK_V)
    token, tokens = tl.load(tiles + tile * 4).to(tl.int64), tl.load(tiles + tile * 4 + 1)
    split = tl.arange(0, SPLITS)
    entry = ((split * tl.num_programs(0) + tile) * tl.num_programs(1) + head).to(tl.int64)
    if tokens > 0:
        top = tl.load(tops + entry * 2)
        kept = tl.math.exp2(top - tl.max(top, 0))
        total = tl.sum(tl.load(tops + entry * 2 + 1) * kept, 0)
        parts = tl.load(sums + entry[:, None] * VALUE + v[None, :], mask=(v < VALUE)[None, :], other=0.0)
        mixed = tl.sum(parts * kept[:, None], 0) / total
        tl.store(out + token * out_token + head * out_head + v, mixed.to(out.dtype.element_ty), mask=v < VALUE)
