"""A step's work as the CUDA kernels want it: the tokens of one adapter next to each other, a table of blocks."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from server.engine.scheduler import Work

BASE = -1  # the slot of a row without adapter


@dataclass(frozen=True, slots=True)
class Row:
    """One item of the step: packed tokens start..end, after `context` tokens; `slot` is its adapter's, or BASE."""

    work: Work
    slot: int
    start: int
    end: int

    @property
    def context(self) -> int:
        return self.work.sequence.computed

    def blocks(self, block_size: int) -> list[int]:
        """The blocks that its keys lie in, the new ones included."""
        return self.work.sequence.blocks[: -(-(self.context + self.work.count) // block_size)]


def arrange(work: Seq[Work], slots: Seq[int]) -> list[Row]:
    """The base's rows first, then adapter by adapter; `slots` [work] are the adapters' (BASE without one)."""
    rows: list[Row] = []
    end = 0
    for item, slot in sorted(zip(work, slots, strict=True), key=lambda pair: pair[1]):
        rows.append(Row(item, slot, end, end + item.count))
        end += item.count
    return rows


def runs(rows: Seq[Row]) -> list[tuple[int, int, int]]:
    """(start, end, slot) of each adapter's tokens."""
    found = []
    for slot, group in groupby(rows, key=lambda row: row.slot):
        if slot != BASE:
            members = list(group)
            found.append((members[0].start, members[-1].end, slot))
    return found


def tokens(rows: Seq[Row], block_size: int) -> dict[str, np.ndarray]:
    """`ids`, `positions` [1, tokens] and `slots` [tokens], where keys and values go, all int64."""
    ids: list[int] = []
    positions: list[int] = []
    places: list[int] = []
    for row in rows:
        sequence, last = row.work.sequence, row.context + row.work.count
        ids += sequence.tokens[row.context : last]
        positions += range(row.context, last)
        places += [sequence.blocks[at // block_size] * block_size + at % block_size for at in range(row.context, last)]
    wide = {"ids": np.array([ids], np.int64), "positions": np.array([positions], np.int64)}
    return wide | {"slots": np.array(places, np.int64)}


def tables(rows: Seq[Row], block_size: int, null_block: int) -> np.ndarray:
    """int32 [rows, longest]: each row's blocks, then the null block."""
    blocks = [row.blocks(block_size) for row in rows]
    table = np.full((len(rows), max(map(len, blocks))), null_block, np.int32)
    for place, own in zip(table, blocks, strict=True):
        place[: len(own)] = own
    return table


def decodes(rows: Seq[Row]) -> np.ndarray:
    """int32 [rows of one token, 4]: their tiles (see paged_triton.Tiles)."""
    found = [(row.start, 1, row.context, number) for number, row in enumerate(rows) if row.work.count == 1]
    return np.array(found, np.int32).reshape(-1, 4)


def chunks(rows: Seq[Row]) -> list[tuple[int, int, int, int]]:
    """(start, end, context, row) of the rows of several tokens."""
    return [(row.start, row.end, row.context, number) for number, row in enumerate(rows) if row.work.count > 1]


def vector(values: Seq[int]) -> np.ndarray:
    """int64 [n]."""
    return np.array(values, np.int64)


def columns(pieces: Seq[tuple[int, int, int]]) -> dict[str, np.ndarray]:
    """`starts`, `ends`, `owners` of segments (start, end, slot), int32 [segments] each; one that is empty if none."""
    table = np.array(pieces or [(0, 0, 0)], np.int32)
    return dict(zip(("starts", "ends", "owners"), table.T, strict=True))
