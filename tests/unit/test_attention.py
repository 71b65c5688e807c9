"""Paged attention over packed steps against dense attention in float64, and what a stale block may not do."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch

from server.kernels.ops import Kernels, kernels_for
from server.model.attention import AttentionBatch, DecodeGroup, PrefillChunk
from server.model.kv import BlockTable, KVPool, KVShape

SIZE = 4
BLOCKS = 96


@dataclass
class Line:
    """One sequence: all its keys, values and queries [heads, length, dim], of which the last `new` are this step's."""

    context: int
    new: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    blocks: list[int] = field(default_factory=list)
    start: int = 0

    @property
    def length(self) -> int:
        return self.context + self.new


def line(context: int, new: int, heads: int, kv_heads: int, dims: tuple[int, int]) -> Line:
    length, (dim, value_dim) = context + new, dims
    return Line(
        context,
        new,
        torch.randn(heads, length, dim),
        torch.randn(kv_heads, length, dim),
        torch.randn(kv_heads, length, value_dim),
    )


def dense(one: Line, scale: float, window: int | None) -> torch.Tensor:
    """The definition, in float64, for the new tokens: [new, heads, value_dim]."""
    q, k, v = one.query.double(), one.key.double(), one.value.double()
    per = len(q) // len(k)
    out = torch.empty(one.new, len(q), v.shape[2], dtype=torch.float64)
    for head in range(len(q)):
        for at in range(one.context, one.length):
            first = 0 if window is None else max(0, at - window + 1)
            weights = (k[head // per, first : at + 1] @ q[head, at] * scale).softmax(0)
            out[at - one.context, head] = weights @ v[head // per, first : at + 1]
    return out


@pytest.fixture(params=[True, False], ids=["kernels", "torch"])
def kernels(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def built(wanted: bool, dtype: torch.dtype = torch.float32) -> Kernels | None:
    found = kernels_for(dtype, torch.device("cpu")) if wanted else None
    assert found is not None or not wanted, "the kernels do not compile here"
    return found


def pool_of(kv_heads: int, dims: tuple[int, int], kernels: bool, stale: float = 0.0) -> KVPool:
    """A pool whose blocks (all but the null block) hold what a last owner may have left."""
    device = torch.device("cpu")
    pool = KVPool({0: KVShape(kv_heads, *dims)}, BLOCKS, SIZE, torch.float32, device, built(kernels))
    for tensors in (pool.keys, pool.values):
        tensors[0][:, : BLOCKS * SIZE] = stale
    return pool


def tensor(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long)


def lay_out(lines: list[Line], pool: KVPool, dice: random.Random, group: int) -> AttentionBatch:
    """Gives each line scattered blocks (cleared, as the runner does), writes its context, and describes the step."""
    free = list(range(BLOCKS))
    dice.shuffle(free)
    slots: list[int] = []
    for one in lines:
        one.blocks = [free.pop() for _ in range(-(-one.length // SIZE))]
        pool.clear(tensor(one.blocks))
        places = [one.blocks[at // SIZE] * SIZE + at % SIZE for at in range(one.length)]
        if one.context:
            old = tensor(places[: one.context])
            pool.write(0, old, one.key[:, : one.context], one.value[:, : one.context])
        one.start = len(slots)
        slots += places[one.context :]
    chunks = [
        PrefillChunk(one.start, one.start + one.new, one.context, BlockTable(tensor(one.blocks)))
        for one in lines
        if one.new > 1
    ]
    decodes = [one for one in lines if one.new == 1]
    groups = []
    for first in range(0, len(decodes), group):
        rows = decodes[first : first + group]
        width = max(len(one.blocks) for one in rows)
        table = [b for one in rows for b in one.blocks + [pool.null_block] * (width - len(one.blocks))]
        groups.append(
            DecodeGroup(
                tensor([one.start for one in rows]),
                tensor(table).int().view(len(rows), width),
                tensor([one.context for one in rows]),
                width * SIZE,
            )
        )
    return AttentionBatch(pool, tensor(slots), groups, chunks)


def run(lines: list[Line], batch: AttentionBatch, scale: float, window: int | None) -> torch.Tensor:
    def packed(name: str) -> torch.Tensor:
        return torch.cat([getattr(one, name)[:, one.context :] for one in lines], 1)

    return batch.run(0, packed("query"), packed("key"), packed("value"), scale, window)


def assert_right(lines: list[Line], out: torch.Tensor, scale: float, window: int | None) -> None:
    for one in lines:
        found = out[one.start : one.start + one.new].double()
        assert torch.isfinite(found).all()
        assert (found - dense(one, scale, window)).abs().max() < 2e-5


@pytest.mark.parametrize("window", [None, 1, 3, 7, 1000])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (9, 3), (4, 1), (1, 1)])
def test_any_packed_step_is_dense_attention(heads: int, kv_heads: int, window: int | None, kernels: bool) -> None:
    """Random lengths, chunks and decodes in one step, groups of uneven rows, and NaN left in every other block."""
    torch.manual_seed(heads * 10 + kv_heads)
    dice = random.Random(f"{heads} {kv_heads} {window}")
    for _ in range(4):
        dims = dice.choice([(8, 8), (8, 6), (5, 8)])
        lines = [
            line(
                dice.choice([0, 1, 3, 4, 5, 8, 17]),
                dice.choice([1, 1, 1, 2, 4, 5, 11]),
                heads,
                kv_heads,
                dims,
            )
            for _ in range(dice.randint(1, 8))
        ]
        scale = dice.choice([dims[0] ** -0.5, 0.2, 1.0])
        batch = lay_out(lines, pool_of(kv_heads, dims, kernels, torch.nan), dice, group=dice.choice([1, 3, 8]))
        assert_right(lines, run(lines, batch, scale, window), scale, window)


@pytest.mark.parametrize("window", [None, 6])
def test_a_prompt_in_chunks_then_token_by_token_is_the_prompt_at_once(window: int | None, kernels: bool) -> None:
    torch.manual_seed(0)
    whole = line(0, 30, 6, 2, (8, 8))
    reference = dense(whole, 0.3, window)
    pool, blocks = pool_of(2, (8, 8), kernels, torch.nan), [40, 3, 77, 12, 5, 60, 1, 90]
    pool.clear(tensor(blocks))
    done = 0
    for count in (5, 1, 8, 2, 7, 1, 1, 5):
        places = [blocks[at // SIZE] * SIZE + at % SIZE for at in range(done, done + count)]
        table = blocks[: -(-(done + count) // SIZE)]
        if count == 1:
            group = DecodeGroup(tensor([0]), tensor(table).int()[None], tensor([done]), len(table) * SIZE)
            batch = AttentionBatch(pool, tensor(places), [group], [])
        else:
            chunk = PrefillChunk(0, count, done, BlockTable(tensor(table)))
            batch = AttentionBatch(pool, tensor(places), [], [chunk])
        parts = [side[:, done : done + count] for side in (whole.query, whole.key, whole.value)]
        out = batch.run(0, *parts, 0.3, window)
        assert (out.double() - reference[done : done + count]).abs().max() < 2e-5
        done += count
    assert done == 30


@pytest.mark.parametrize("window", [None, 1, 50, 100])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dims"), [(9, 3, (64, 64)), (4, 4, (20, 36)), (40, 1, (8, 8)), (200, 2, (5, 3))]
)
def test_long_prompts_are_dense_attention_and_their_chunks_the_whole(
    heads: int, kv_heads: int, dims: tuple[int, int], window: int | None
) -> None:
    """Several tiles of keys and of queries, tiles that end anywhere; to the bit the same in chunks as at once."""
    torch.manual_seed(heads)
    one, scale = line(0, 170, heads, kv_heads, dims), dims[0] ** -0.5
    pool = pool_of(kv_heads, dims, True, torch.nan)
    whole = run([one], lay_out([one], pool, random.Random(1), 8), scale, window)
    assert_right([one], whole, scale, window)
    done = 0
    for count in (2, 63, 3, 98, 4):
        places = [one.blocks[at // SIZE] * SIZE + at % SIZE for at in range(done, done + count)]
        chunk = PrefillChunk(0, count, done, BlockTable(tensor(one.blocks)))
        batch = AttentionBatch(pool, tensor(places), [], [chunk])
        parts = [side[:, done : done + count] for side in (one.query, one.key, one.value)]
        assert torch.equal(batch.run(0, *parts, scale, window), whole[done : done + count])
        done += count
    assert done == 170


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_others_left_or_compute_does_not_leak(bad: float, kernels: bool) -> None:
    """One row's own numbers are not finite, in a decode group and in a chunk; all others come out to the bit."""
    torch.manual_seed(1)
    shapes = [(9, 1), (5, 1), (9, 1), (0, 6), (4, 5), (0, 6)]
    lines = [line(context, new, 4, 2, (8, 8)) for context, new in shapes]
    clean = run(lines, lay_out(lines, pool_of(2, (8, 8), kernels), random.Random(2), group=8), 0.4, None)
    for number in (1, 4, 5):
        for side in (lines[number].query, lines[number].key, lines[number].value):
            side.fill_(bad)
    pool = pool_of(2, (8, 8), kernels, bad)
    dirty = run(lines, lay_out(lines, pool, random.Random(2), group=8), 0.4, None)
    for number in (0, 2, 3):
        rows = slice(lines[number].start, lines[number].start + lines[number].new)
        assert torch.equal(dirty[rows], clean[rows])
    for number in (1, 4, 5):
        rows = slice(lines[number].start, lines[number].start + lines[number].new)
        assert not torch.isfinite(dirty[rows]).any()
    for tensors in (pool.keys, pool.values):
        assert not tensors[0][:, BLOCKS * SIZE :].any(), "the null block stays zero"


def test_a_cleared_block_shows_nothing_and_its_neighbours_keep_theirs() -> None:
    pool = pool_of(2, (8, 6), False, 3.0)
    pool.clear(tensor([5, 7]))
    for tensors in (pool.keys, pool.values):
        blocks = tensors[0][:, : BLOCKS * SIZE].view(2, BLOCKS, -1)
        assert not blocks[:, [5, 7]].any()
        assert (blocks[:, [4, 6, 8]] == 3).all()


def test_layers_do_not_share_their_keys() -> None:
    shapes = {0: KVShape(2, 8, 8), 1: KVShape(1, 4, 6)}
    pool = KVPool(shapes, BLOCKS, SIZE, torch.float32, torch.device("cpu"))
    pool.write(1, tensor([9]), torch.ones(1, 1, 4), torch.ones(1, 1, 6))
    assert not pool.keys[0].any()
    key, value = pool.gather(1, BlockTable(tensor([2, 0])))
    assert (key.shape, value.shape) == ((1, 2 * SIZE, 4), (1, 2 * SIZE, 6))
    assert key[0, 1].eq(1).all()
    assert key.sum() == 4
    assert value.sum() == 6


@pytest.mark.parametrize(
    ("dtype", "kernels"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, False)]
)
def test_half_precision_is_right_within_its_error(dtype: torch.dtype, kernels: bool) -> None:
    torch.manual_seed(3)
    lines = [line(context, new, 6, 2, (16, 16)) for context, new in ((11, 1), (30, 1), (0, 9), (6, 7))]
    for one in lines:
        one.query, one.key, one.value = (side.to(dtype) for side in (one.query, one.key, one.value))
    pool = KVPool({0: KVShape(2, 16, 16)}, BLOCKS, SIZE, dtype, torch.device("cpu"), built(kernels, dtype))
    out = run(lines, lay_out(lines, pool, random.Random(4), group=8), 0.25, None)
    assert out.dtype == dtype
    for one in lines:
        assert (out[one.start : one.start + one.new].double() - dense(one, 0.25, None)).abs().max() < 0.03
