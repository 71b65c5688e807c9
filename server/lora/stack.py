"""The adapters of the running rows, side by side in one pair of matrices per module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from server.lora.weights import AdapterWeights, LoraPair

FREE = -1
_GRAIN = 64  # columns a table grows by


@dataclass
class Table:
    """One module's stacked adapters: `a` [columns, in], `b` [columns, out]; column c belongs to adapter owners[c].

    Removing an adapter leaves a gap that the next one of its rank fills; gaps hold finite numbers and are masked.
    """

    a: torch.Tensor
    b: torch.Tensor
    owners: list[int] = field(default_factory=list)

    @classmethod
    def like(cls, pair: LoraPair) -> Table:
        return cls(pair.a.new_zeros(0, pair.a.shape[1]), pair.b.new_zeros(0, pair.b.shape[1]))

    @property
    def active(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a[: len(self.owners)], self.b[: len(self.owners)]

    def put(self, owner: int, pair: LoraPair) -> None:
        rank = len(pair.a)
        start = self._gap(rank)
        end = start + rank
        if end > len(self.a):
            self._grow(end)
        self.owners[start:end] = [owner] * rank
        self.a[start:end].copy_(pair.a)
        self.b[start:end].copy_(pair.b)

    def drop(self, gone: set[int]) -> None:
        self.owners = [FREE if owner in gone else owner for owner in self.owners]
        while self.owners and self.owners[-1] == FREE:
            self.owners.pop()
        if self.owners.count(FREE) * 3 > len(self.owners):
            self._compact()

    def _gap(self, rank: int) -> int:
        """Start of the first run of `rank` free columns, or the end."""
        run = 0
        for column, owner in enumerate(self.owners):
            run = run + 1 if owner == FREE else 0
            if run == rank:
                return column + 1 - rank
        return len(self.owners)

    def _grow(self, columns: int) -> None:
        capacity = -(-max(columns, len(self.a) * 3 // 2) // _GRAIN) * _GRAIN
        for name in ("a", "b"):
            old = getattr(self, name)
            new = old.new_zeros(capacity, old.shape[1])
            new[: len(old)] = old
            setattr(self, name, new)

    def _compact(self) -> None:
        keep = [column for column, owner in enumerate(self.owners) if owner != FREE]
        index = torch.tensor(keep, dtype=torch.long, device=self.a.device)
        self.owners = [self.owners[column] for column in keep]
        room = -(-max(len(keep), 1) // _GRAIN) * _GRAIN
        for name in ("a", "b"):
            old = getattr(self, name)
            new = old.new_zeros(room, old.shape[1])
            new[: len(keep)] = old.index_select(0, index)
            setattr(self, name, new)


class AdapterStack:
    """Keeps one Table per module for the adapters of the current step; a change costs only what changed."""

    def __init__(self) -> None:
        self.tables: dict[str, Table] = {}
        self._owner: dict[str, int] = {}  # digest -> owner number
        self._numbers: list[int] = []  # given back, to be used again
        self._columns: dict[tuple[int, ...], torch.Tensor] = {}
        self._nbytes = 0

    def activate(self, adapters: Sequence[AdapterWeights]) -> dict[str, int]:
        """Makes exactly `adapters` the stacked ones; returns digest -> owner number."""
        wanted = {adapter.digest: adapter for adapter in adapters}  # many rows may share one
        gone = [digest for digest in self._owner if digest not in wanted]
        if gone:
            self._remove(gone)
        new = [adapter for digest, adapter in wanted.items() if digest not in self._owner]
        for adapter in new:
            self._add(adapter)
        if gone or new:
            self._nbytes = sum(table.a.nbytes + table.b.nbytes for table in self.tables.values())
        return self._owner

    @property
    def nbytes(self) -> int:
        """Bytes of all tables, with the room that they have to grow."""
        return self._nbytes

    def columns(self, table: Table) -> tuple[tuple[int, ...], torch.Tensor]:
        """The table's owners as a hashable key and as int64 [columns]; modules of equal layout share both."""
        key = tuple(table.owners)
        if key not in self._columns:
            self._columns[key] = torch.tensor(key, dtype=torch.long, device=table.a.device)
        return key, self._columns[key]

    def _add(self, adapter: AdapterWeights) -> None:
        owner = self._numbers.pop() if self._numbers else len(self._owner)
        self._owner[adapter.digest] = owner
        self._columns.clear()
        for name, pair in adapter.modules.items():
            if name not in self.tables:
                self.tables[name] = Table.like(pair)
            self.tables[name].put(owner, pair)

    def _remove(self, digests: list[str]) -> None:
        gone = {self._owner.pop(digest) for digest in digests}
        self._numbers.extend(gone)
        self._columns.clear()
        for name, table in list(self.tables.items()):
            table.drop(gone)
            if not table.owners:
                del self.tables[name]
