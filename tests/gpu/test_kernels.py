"""The kernels compiled, at the shapes of an 8B Llama. The small cases of tests/unit run compiled here as well."""

from __future__ import annotations

import pytest
import torch

from tests.kernelcases import (
    BLOCK,
    DEVICE,
    TOLERANCE,
    Paged,
    adapter_of,
    base_of,
    decode_tiles,
    error,
    lora,
    popularity,
    runs_of,
    segments,
)

pytest.importorskip("triton", reason="triton is not installed")

from server.lora.ops_triton import add
from server.lora.tables import AdapterTables
from server.model.paged_triton import attend, prefill_tiles, queries_for, splits_for, write

pytestmark = pytest.mark.gpu

QKV = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024)}
DOWN = {"down": (14_336, 4096)}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", [QKV, DOWN], ids=["qkv", "down"])
@pytest.mark.parametrize("kind", ["identical", "distinct", "uniform", "geometric"])
def test_decode_of_32_rows(kind: str, shapes: dict[str, tuple[int, int]], dtype: torch.dtype) -> None:
    owners = popularity(kind, 32, seed=1)
    _check(shapes, dtype, runs_of(owners, [1] * 32), 34)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", [QKV, DOWN], ids=["qkv", "down"])
def test_prefill_of_2048_tokens(shapes: dict[str, tuple[int, int]], dtype: torch.dtype) -> None:
    _check(shapes, dtype, runs_of([0, 1, 2, 3, 4], [1000, 1, 515, 400, 100]), 2048)


def _check(
    shapes: dict[str, tuple[int, int]], dtype: torch.dtype, runs: list[tuple[int, int, int]], tokens: int
) -> None:
    info, names = base_of(shapes), list(shapes)
    ranks = (16, 1, 64, 8, 4)
    adapters = [adapter_of(info, f"a{at}", ranks[at % 5], dtype) for at in range(max(owner for *_, owner in runs) + 1)]
    tables = AdapterTables(info, slots=len(adapters), max_rank=64, dtype=dtype, device=DEVICE)
    x = torch.randn(tokens, shapes[names[0]][0], device=DEVICE, dtype=dtype)
    y = torch.randn(tokens, sum(out for _, out in shapes.values()), device=DEVICE, dtype=dtype)
    before = y.clone()
    add(x, y, tables.group(names), segments([(s, e, tables.put(adapters[a])) for s, e, a in runs]))
    wanted = lora(x, before, names, [(s, e, adapters[a]) for s, e, a in runs])
    assert error(y, wanted) < TOLERANCE[dtype]
    last = max(end for _, end, _ in runs)
    assert torch.equal(y[last:], before[last:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 500])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_attention_of_long_contexts(dim: int, window: int | None, dtype: torch.dtype) -> None:
    contexts = (1, 130, 1000, 4096)
    paged = Paged(contexts, 2, dim, dim, dtype)
    for (key, value), slots in zip(paged.rows, paged.slots, strict=True):
        write(paged.keys, paged.values, slots, key, value)
    query = paged.queries(4, 8)
    positions = torch.tensor(contexts, device=DEVICE) - 1
    for splits in (1, splits_for(4, 2, 4096)):
        out = torch.full((4, 8, dim), float("nan"), dtype=dtype, device=DEVICE)
        tiles = decode_tiles(torch.arange(4, device=DEVICE), positions, splits)
        attend(query, paged.keys, paged.values, paged.tables, tiles, out, block_size=BLOCK, scale=0.1, window=window)
        wanted = [paged.wanted(row, c - 1, query[row], 0.1, window) for row, c in enumerate(contexts)]
        assert error(out, torch.stack(wanted)) < TOLERANCE[dtype]
    query = paged.queries(700, 8)
    out = torch.full((700, 8, dim), float("nan"), dtype=dtype, device=DEVICE)
    tiles = prefill_tiles([(0, 300, 700, 2), (300, 700, 3696, 3)], 4, queries_for(dtype, dim), DEVICE)
    attend(query, paged.keys, paged.values, paged.tables, tiles, out, block_size=BLOCK, scale=0.1, window=window)
    for at in range(0, 700, 37):
        row, position = (2, 700 + at) if at < 300 else (3, 3396 + at)
        assert error(out[at], paged.wanted(row, position, query[at], 0.1, window)) < TOLERANCE[dtype]
