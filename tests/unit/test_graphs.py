"""The bookkeeping of decode graphs: buckets, buffers, padding. No kernel runs here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from server.engine import layout
from server.engine.graphs import Bucket, DecodeGraphs, buckets
from server.engine.scheduler import Work

BLOCK, NULL = 4, 99


def work(length: int, count: int, blocks: list[int]) -> Work:
    """`length` tokens (their ids are their positions + 100), of which `count` are to be computed."""
    sequence: Any = SimpleNamespace(
        tokens=list(range(100, 100 + length)), computed=length - count, pending=count, blocks=blocks
    )
    return Work(sequence, count)


def rows(*items: tuple[int, int]) -> list[layout.Row]:
    """Decode rows (length, slot) with blocks of their own."""
    works = [work(length, 1, [10 * at + b for b in range(-(-length // BLOCK))]) for at, (length, _) in enumerate(items)]
    return layout.arrange(works, [slot for _, slot in items])


@pytest.mark.parametrize("most", [1, 2, 3, 7, 64, 65, 200, 1000])
def test_buckets_reach_exactly_what_may_run(most: int) -> None:
    sizes = buckets(most)
    assert sizes[-1] == most
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1


def test_tokens_of_an_adapter_lie_together_and_the_base_comes_first() -> None:
    found = layout.arrange([work(9, 3, [1, 2, 3]), work(5, 1, [4, 5]), work(2, 2, [6]), work(1, 1, [7])], [2, -1, 0, 2])
    assert [(row.slot, row.start, row.end) for row in found] == [(-1, 0, 1), (0, 1, 3), (2, 3, 6), (2, 6, 7)]
    assert layout.runs(found) == [(1, 3, 0), (3, 7, 2)]
    assert layout.chunks(found) == [(1, 3, 0, 1), (3, 6, 6, 2)]
    assert layout.decodes(found).tolist() == [[0, 1, 4, 0], [6, 1, 0, 3]]
    packed = layout.tokens(found, BLOCK)
    assert packed["ids"].tolist() == [[104, 100, 101, 106, 107, 108, 100]]
    assert packed["positions"].tolist() == [[4, 0, 1, 6, 7, 8, 0]]
    assert packed["slots"].tolist() == [20, 24, 25, 10, 11, 12, 28]
    assert layout.tables(found, BLOCK, NULL).tolist() == [[4, 5, NULL], [6, NULL, NULL], [1, 2, 3], [7, NULL, NULL]]


def test_a_bucket_holds_the_step_and_padding_that_harms_nobody() -> None:
    bucket = Bucket(4, 3, BLOCK, NULL, torch.device("cpu"))
    bucket.fill(rows((6, 1), (9, layout.BASE), (2, 1)))
    there = {name: tensor.tolist() for name, tensor in bucket.buffers.device.items()}
    assert there["ids"] == [[108, 105, 101, 0]]
    assert there["positions"] == [[8, 5, 1, 0]]
    assert there["slots"] == [12 * BLOCK, 1 * BLOCK + 1, 20 * BLOCK + 1, NULL * BLOCK]
    assert there["decodes"] == [[0, 1, 8, 0], [1, 1, 5, 1], [2, 1, 1, 2], [3, 1, 0, 3]]
    assert [row[:need] for row, need in zip(there["tables"], (3, 2, 1, 1), strict=True)] == [
        [10, 11, 12],
        [0, 1],
        [20],
        [NULL],
    ]
    assert [there[name] for name in ("starts", "ends", "owners")] == [[1, 0, 0, 0], [3, 0, 0, 0], [1, 0, 0, 0]]


def test_nothing_of_an_earlier_step_is_left() -> None:
    fresh, used = (Bucket(4, 3, BLOCK, NULL, torch.device("cpu")) for _ in range(2))
    used.fill(rows((9, 0), (9, 1), (9, 2), (9, 3)))
    step = rows((3, 5), (4, layout.BASE))
    for bucket in (fresh, used):
        bucket.fill(step)
    for name, wanted in fresh.buffers.device.items():
        got = used.buffers.device[name]
        if name == "tables":  # what lies beyond a row's own blocks is never read
            assert [got[0, 0], got[1, 0], got[2, 0], got[3, 0]] == [wanted[at, 0] for at in range(4)]
        else:
            assert torch.equal(got, wanted), name


def test_many_rows_of_one_adapter_are_several_segments() -> None:
    bucket = Bucket(40, 1, BLOCK, NULL, torch.device("cpu"))
    bucket.fill(rows(*[(1, 3)] * 40))
    pieces = [bucket.buffers.device[name].tolist()[:4] for name in ("starts", "ends", "owners")]
    assert pieces == [[0, 16, 32, 0], [16, 32, 40, 0], [3, 3, 3, 0]]


class Fake:
    """Answers with each row's token id, and notes which graph ran."""

    def __init__(self) -> None:
        self.captured: list[tuple[int, bool]] = []
        self.ran: list[tuple[int, bool]] = []

    def forward(self, step: Any, lora: bool) -> torch.Tensor:
        self.last = (step["ids"].shape[1], lora)
        return step["ids"][0][:, None] * 2

    def capture(self, work: Any) -> Any:
        work()
        self.captured.append(self.last)

        def replay() -> torch.Tensor:
            out = work()
            self.ran.append(self.last)
            return out

        return SimpleNamespace(replay=replay)


def test_a_step_takes_the_smallest_graph_that_fits() -> None:
    fake = Fake()
    graphs = DecodeGraphs(
        fake.forward, fake.capture, most_rows=4, width=3, block_size=BLOCK, null_block=NULL, device=torch.device("cpu")
    )
    graphs.warm()
    assert fake.captured == [(4, True), (4, False), (2, True), (2, False), (1, True), (1, False)]
    for items, used in (
        ([(5, -1)], (1, False)),
        ([(5, 0)], (1, True)),
        ([(5, 0), (6, -1), (7, -1)], (4, True)),
        ([(5, -1), (6, -1)], (2, False)),
    ):
        step = rows(*items)
        logits = graphs.run(step)
        assert logits is not None
        assert logits[:, 0].tolist() == [2 * (99 + len(row.work.sequence.tokens)) for row in step]
        assert fake.ran[-1] == used
    assert graphs.run(rows(*[(2, -1)] * 5)) is None
    assert graphs.run(layout.arrange([work(5, 2, [1, 2])], [-1])) is None
    assert graphs.run(rows((12, -1))) is not None
    assert graphs.run(rows((13, -1))) is None  # one block more than the buffers have room for
