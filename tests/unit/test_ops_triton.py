"""The segmented LoRA kernels: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.kernelcases import DEVICE, RANKS, TOLERANCE, adapter_of, base_of, error, lora, popularity, runs_of, segments

pytest.importorskip("triton", reason="triton is not installed")

from server.lora.ops_triton import add
from server.lora.tables import AdapterTables
from server.lora.weights import AdapterWeights

pytestmark = pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, in the interpreter, about NaN put there

SMALL = {"q": (48, 40), "k": (48, 24), "v": (48, 24)}


def tables_of(adapters: list[AdapterWeights], shapes: dict[str, tuple[int, int]], slots: int = 0) -> AdapterTables:
    dtype = next(iter(adapters[0].modules.values())).a.dtype
    tables = AdapterTables(base_of(shapes), slots=slots or len(adapters), max_rank=64, dtype=dtype, device=DEVICE)
    for adapter in adapters:
        tables.put(adapter)
    return tables


def check(
    shapes: dict[str, tuple[int, int]],
    adapters: list[AdapterWeights],
    runs: list[tuple[int, int, int]],
    dtype: torch.dtype,
    tokens: int,
) -> None:
    """One group of all modules, against the reference; and tokens of no segment are what they were, bit by bit."""
    names = list(shapes)
    torch.manual_seed(tokens)
    x = torch.randn(tokens, shapes[names[0]][0]).to(DEVICE, dtype)
    y = torch.randn(tokens, sum(out for _, out in shapes.values())).to(DEVICE, dtype)
    before = y.clone()
    tables = tables_of(adapters, shapes)
    found = segments([(s, e, tables.slot(adapters[a].key)) for s, e, a in runs])
    add(x, y, tables.group(names), found)
    wanted = lora(x, before, names, [(s, e, adapters[a]) for s, e, a in runs])
    distance = error(y, wanted)
    assert distance < TOLERANCE[dtype]
    outside = torch.ones(tokens, dtype=torch.bool, device=DEVICE)
    for start, end, _ in runs:
        outside[start:end] = False
    assert outside.any()
    assert torch.equal(y[outside], before[outside])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("kind", ["identical", "distinct", "uniform", "geometric"])
def test_decode_of_any_popularity_with_mixed_ranks(kind: str, rows: int, dtype: torch.dtype) -> None:
    owners = popularity(kind, rows, seed=rows)
    info = base_of(SMALL)
    adapters = [adapter_of(info, f"a{at}", RANKS[at % 5], dtype) for at in range(max(owners) + 1)]
    check(SMALL, adapters, runs_of(owners, [1] * rows), dtype, rows + 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_prefill_beside_decodes(rank: int, dtype: torch.dtype) -> None:
    adapters = [adapter_of(base_of(SMALL), f"a{at}", r, dtype) for at, r in enumerate((rank, 4, 64))]
    check(SMALL, adapters, [(1, 2, 1), (2, 71, 0), (71, 72, 2), (72, 140, 2)], dtype, 141)


@pytest.mark.parametrize("shape", [(576, 1536), (1536, 576), (2048, 264)])
def test_sizes_that_are_no_power_of_two(shape: tuple[int, int]) -> None:
    """`in` is cut into parts whose last one is short."""
    adapters = [adapter_of(base_of({"m": shape}), f"a{at}", rank, torch.float32) for at, rank in enumerate((16, 5))]
    check({"m": shape}, adapters, [(0, 2, 0), (3, 4, 1)], torch.float32, 5)


@pytest.mark.parametrize("shapes", [{"a": (24, 7)}, {"a": (24, 7), "b": (24, 90), "c": (24, 16)}])
def test_outputs_of_any_width(shapes: dict[str, tuple[int, int]]) -> None:
    adapters = [adapter_of(base_of(shapes), f"a{at}", rank, torch.float32) for at, rank in enumerate((3, 16))]
    check(shapes, adapters, [(0, 1, 0), (2, 4, 1)], torch.float32, 5)


def test_an_adapter_that_lacks_a_module_leaves_its_columns() -> None:
    full, part = (
        adapter_of(base_of(SMALL), name, 8, torch.float32, lacks=lacks) for name, lacks in (("f", ()), ("p", "k"))
    )
    tables = tables_of([full, part], SMALL)
    x, y = torch.randn(2, 48).to(DEVICE), torch.randn(2, 88).to(DEVICE)
    before = y.clone()
    add(x, y, tables.group(list(SMALL)), segments([(0, 1, tables.slot("f")), (1, 2, tables.slot("p"))]))
    assert torch.equal(y[1, 40:64], before[1, 40:64])
    assert not torch.equal(y[0, 40:64], before[0, 40:64])
    assert not torch.equal(y[1, 64:], before[1, 64:])


@pytest.mark.parametrize("length", [1, 40])
def test_nan_in_one_row_stays_there(length: int) -> None:
    adapters = [adapter_of(base_of(SMALL), f"a{at}", 8, torch.float32) for at in range(3)]
    tables = tables_of(adapters, SMALL)
    runs = [(at * length, (at + 1) * length, tables.slot(f"a{at}")) for at in range(3)]
    x, y = torch.randn(3 * length, 48).to(DEVICE), torch.randn(3 * length, 88).to(DEVICE)
    clean = y.clone()
    found, group = segments(runs), tables.group(list(SMALL))
    add(x, clean, group, found)
    x[length] = float("nan")
    add(x, y, group, found)
    assert torch.isnan(y[length]).all()
    others = torch.arange(3 * length, device=DEVICE) != length
    assert torch.equal(y[others], clean[others])


def test_an_adapter_of_nan_reaches_only_its_own_rows() -> None:
    good = adapter_of(base_of(SMALL), "good", 4, torch.float32)
    bad = adapter_of(base_of(SMALL), "bad", 64, torch.float32)
    for pair in bad.modules.values():
        pair.a.fill_(float("nan"))
        pair.b.fill_(float("inf"))
    tables = tables_of([bad, good], SMALL)
    x, y = torch.randn(3, 48).to(DEVICE), torch.randn(3, 88).to(DEVICE)
    add(x, y, tables.group(list(SMALL)), segments([(0, 1, tables.slot("bad")), (1, 2, tables.slot("good"))]))
    assert torch.isnan(y[0]).all()
    assert torch.isfinite(y[1:]).all()


def test_strided_rows_and_empty_segments() -> None:
    adapter = adapter_of(base_of(SMALL), "a", 8, torch.float32)
    tables = tables_of([adapter], SMALL)
    x, y = torch.randn(4, 60)[:, :48].to(DEVICE), torch.randn(4, 100).to(DEVICE)[:, :88]
    before = y.clone()
    wanted = lora(x, y, list(SMALL), [(1, 3, adapter)])
    add(x, y, tables.group(list(SMALL)), segments([(1, 3, 0), (0, 0, 0)]))
    assert error(y, wanted) < 1e-5
    assert torch.equal(y[3], before[3])
    with pytest.raises(ValueError, match="next to each other"):
        add(x.t(), y, tables.group(list(SMALL)), segments([]))


def test_a_result_does_not_depend_on_the_neighbours() -> None:
    adapters = [adapter_of(base_of(SMALL), f"a{at}", rank, torch.float32) for at, rank in enumerate((4, 64))]
    tables = tables_of(adapters, SMALL)
    x, y = torch.randn(8, 48).to(DEVICE), torch.zeros(8, 88, device=DEVICE)
    group = tables.group(list(SMALL))
    add(x, y, group, segments([(0, 3, tables.slot("a0")), (3, 8, tables.slot("a1"))]))
    alone = torch.zeros(1, 88, device=DEVICE)
    add(x[4:5], alone, group, segments([(0, 1, tables.slot("a1"))]))
    assert torch.equal(alone[0], y[4])
