"""Segmented LoRA for CUDA as two Triton kernels: y[t] += (x[t] A^T) B with each token's own adapter.

The tokens of one adapter lie next to each other in a packed step: segment s is the tokens starts[s]..ends[s], and
slots[s] is its adapter. For a module whose adapter in that slot is A [rank, in], B [rank, out] (scaling inside B):

    shrink   h[p, t, r]  = sum over k of part p of  x[t, k] A[r, k]            float32, one partial sum per part of `in`
    expand   y[t, o]    += sum over r < rank of  (sum over p of h[p, t, r]) B[r, o]

- Nothing is copied when the set of adapters changes: a table (lora/tables.py) has the addresses of A and B and the
  rank for every slot. Rank 0 says that the adapter lacks the module. So a captured CUDA graph serves any adapters.
- Ranks are walked in steps of 16 up to the segment's own, so a mix does no work for the largest.
- Splitting `in` gives a decode step enough programs to draw the memory's full bandwidth. The partial sums are stored
  and added in order by the expand rather than atomically, so a result does not depend on timing.
- A token's numbers meet no other token's: what is masked is read as zero, never multiplied away (0 x NaN = NaN).
- Modules that share their input (q, k and v; gate and up) may be one launch: a group's outputs lie side by side in y.

Segmented gather of adapters for a mixed batch: Chen et al. 2023, "Punica" (SGMV). Mixed ranks without padding: Sheng
et al. 2023, "S-LoRA". Both read adapters from a pool of theirs; the pointer table is what replaces it here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

RANK_STEP = 16
Run = tuple[int, int, int]  # first token, the one after the last, slot: tokens of one adapter next to each other
FIELDS = 3  # of a table's entry: address of A, address of B, rank


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tokens, and columns of `in` and of `out`, that one program works on at a time; parts that `in` is cut into."""

    tokens: int
    inner: int
    outer: int
    parts: int


_SHORT = Tiling(16, 256, 256, 8)  # decoding: a segment is a few tokens, the adapters' bytes are the cost
_LONG = Tiling(64, 128, 128, 4)  # prefill: a segment is many tokens, the arithmetic is


@dataclass(frozen=True, slots=True)
class Segments:
    """int32 [segments] each; an empty segment (start == end) does nothing. `long`: made of tiles for prefill."""

    starts: torch.Tensor
    ends: torch.Tensor
    slots: torch.Tensor
    long: bool = False


def is_long(runs: Sequence[Run]) -> bool:
    """Whether some run is long enough for prefill's tiles."""
    return any(end - start > _LONG.tokens for start, end, _ in runs)


def cut(runs: Sequence[Run], long: bool) -> list[Run]:
    """The runs in pieces of one tile each, so that many programs share a long one."""
    size = _LONG.tokens if long else _SHORT.tokens
    return [(at, min(at + size, end), slot) for start, end, slot in runs for at in range(start, end, size)]


@dataclass(frozen=True, slots=True)
class Group:
    """Modules that read one input. `table` int64 [modules, slots, 3]; `columns` int32 [modules, 2]: where in y each
    module's output begins, and its width, all multiples of `align`. `capacity`: the largest rank of any slot, or more.
    """

    table: torch.Tensor
    columns: torch.Tensor
    in_features: int
    widest: int
    align: int
    capacity: int


def add(x: torch.Tensor, y: torch.Tensor, group: Group, segments: Segments) -> None:
    """y [tokens, outputs of the group] += the adapters' share of x [tokens, in], in place.

    Rows of both may be strided, the columns of a row lie next to each other. Tokens of no segment are not touched.
    """
    if x.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError("the columns of x and y must lie next to each other")
    tiling = _LONG if segments.long else _SHORT
    span = triton.cdiv(triton.cdiv(group.in_features, tiling.parts), tiling.inner) * tiling.inner
    parts = triton.cdiv(group.in_features, span)
    modules, slots, _ = group.table.shape
    tokens, count = x.shape[0], segments.starts.shape[0]
    shrunk = torch.empty(parts, modules, tokens, group.capacity, dtype=torch.float32, device=x.device)
    precision = "ieee" if x.dtype == torch.float32 else "tf32"  # says nothing about 16-bit operands
    # fmt: off
    _shrink[(count, modules, parts)](
        x, shrunk, group.table, segments.starts, segments.ends, segments.slots,
        tokens, x.stride(0), slots, group.capacity,
        IN=group.in_features, SPAN=span, BLOCK_M=tiling.tokens, BLOCK_R=RANK_STEP, BLOCK_K=tiling.inner,
        PRECISION=precision, num_warps=4, num_stages=3,
    )
    _expand[(count, modules, triton.cdiv(group.widest, tiling.outer))](
        y, shrunk, group.table, group.columns, segments.starts, segments.ends, segments.slots,
        tokens, y.stride(0), slots, group.capacity,
        PARTS=parts, ALIGN=group.align, BLOCK_M=tiling.tokens, BLOCK_R=RANK_STEP, BLOCK_N=tiling.outer,
        PRECISION=precision, num_warps=4, num_stages=2,
    )
    # fmt: on


# fmt: off
@triton.jit(do_not_specialize=["tokens"])
def _shrink(
    x, shrunk, table, starts, ends, owners, tokens, x_stride, slots, capacity,
    IN: tl.constexpr, SPAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # fmt: on
    segment, module, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = tl.load(starts + segment), tl.load(ends + segment)
    entry = table + (module * slots + tl.load(owners + segment)) * 3
    a = tl.multiple_of(tl.load(entry).to(tl.pointer_type(x.dtype.element_ty)), 16)
    rank = tl.load(entry + 2).to(tl.int32)
    first = part * SPAN
    last = tl.minimum(first + SPAN, IN)
    rows = shrunk + (part * tl.num_programs(1) + module).to(tl.int64) * tokens * capacity
    for at in range(start, end, BLOCK_M):
        token = (at + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
        for low in range(0, rank, BLOCK_R):
            r = low + tl.arange(0, BLOCK_R)
            total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            for begin in range(first, last, BLOCK_K):
                k = begin + tl.arange(0, BLOCK_K)
                there = (token < end) & (k < last)[None, :]
                left = tl.load(x + token * x_stride + k[None, :], mask=there, other=0.0)
                there = (r < rank)[None, :] & (k < last)[:, None]
                right = tl.load(a + r[None, :] * IN + k[:, None], mask=there, other=0.0)
                total = tl.dot(left, right, total, input_precision=PRECISION)
            tl.store(rows + token * capacity + r[None, :], total, mask=(token < end) & (r < rank)[None, :])


# fmt: off
@triton.jit(do_not_specialize=["tokens"])
def _expand(
    y, shrunk, table, columns, starts, ends, owners, tokens, y_stride, slots, capacity,
    PARTS: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # fmt: on
    segment, module, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = tl.load(starts + segment), tl.load(ends + segment)
    entry = table + (module * slots + tl.load(owners + segment)) * 3
    b = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(y.dtype.element_ty)), 16)
    rank = tl.load(entry + 2).to(tl.int32)
    column = tl.multiple_of(tl.load(columns + module * 2), ALIGN)
    width = tl.multiple_of(tl.load(columns + module * 2 + 1), ALIGN)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    if (rank > 0) & (block * BLOCK_N < width):
        for at in range(start, end, BLOCK_M):
            token = (at + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
            total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for low in range(0, rank, BLOCK_R):
                r = low + tl.arange(0, BLOCK_R)
                there = (token < end) & (r < rank)[None, :]
                hidden = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
                for part in tl.static_range(PARTS):
                    rows = shrunk + (part * tl.num_programs(1) + module).to(tl.int64) * tokens * capacity
                    hidden += tl.load(rows + token * capacity + r[None, :], mask=there, other=0.0)
                there = (r < rank)[:, None] & (n < width)[None, :]
                right = tl.load(b + r[:, None] * width + n[None, :], mask=there, other=0.0)
                total = tl.dot(hidden.to(right.dtype), right, total, input_precision=PRECISION)
            place = y + token * y_stride + (column + n)[None, :]
            there = (token < end) & (n < width)[None, :]
            before = tl.load(place, mask=there, other=0.0)
            tl.store(place, (before.to(tl.float32) + total).to(before.dtype), mask=there)
