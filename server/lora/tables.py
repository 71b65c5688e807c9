"""Where each slot's adapter lies on the device, for the kernels of lora/ops_triton.py."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import gcd

import torch

from server.core import BaseInfo
from server.lora.ops_triton import FIELDS, RANK_STEP, Group
from server.lora.weights import AdapterWeights

ALIGNMENT = 16  # bytes; what the kernels' widest reads ask of an address
_WIDEST = 16  # columns; a larger common divisor of a group's columns is of no use


class AdapterTables:
    """One int64 table [modules, slots, (address of A, address of B, rank)], at one place for as long as it lives.

    An adapter that comes or goes is one small copy into its slot's column; CUDA graphs that were captured before go
    on reading the same table. Owned by the engine's thread: a change is queued on its stream, behind the steps that
    still use the old entry. The weights are held while their addresses are in the table.
    """

    def __init__(self, info: BaseInfo, *, slots: int, max_rank: int, dtype: torch.dtype, device: torch.device):
        self.slots, self.dtype, self.device = slots, dtype, device
        self.capacity = -(-max_rank // RANK_STEP) * RANK_STEP
        self._linears = info.linears
        self._rows = {name: row for row, name in enumerate(info.linears)}
        self._table = torch.zeros(len(self._rows), slots, FIELDS, dtype=torch.int64, device=device)
        self._free = list(range(slots - 1, -1, -1))
        self._held: dict[str, tuple[int, AdapterWeights]] = {}
        self._groups: dict[tuple[str, ...], Group] = {}

    def __len__(self) -> int:
        return len(self._held)

    def slot(self, key: str) -> int:
        """The slot of an adapter that was put; KeyError when it is not here."""
        return self._held[key][0]

    def put(self, weights: AdapterWeights) -> int:
        """Enters an adapter, whose tensors must be on the device already, into a free slot; returns the slot.

        Raises ValueError when the adapter does not fit the tables, and IndexError when no slot is free.
        """
        if weights.key in self._held:
            return self.slot(weights.key)
        column = torch.tensor(self._column(weights), dtype=torch.int64)
        slot = self._free.pop()
        self._held[weights.key] = (slot, weights)
        self._table[:, slot].copy_(column)
        return slot

    def drop(self, key: str) -> None:
        """The adapter's slot is free again; its weights are let go. Of no effect when it is not here."""
        if key in self._held:
            slot, _ = self._held.pop(key)
            self._table[:, slot].zero_()
            self._free.append(slot)

    def group(self, names: Sequence[str]) -> Group:
        """The modules `names`, next to each other in the model and of one input, whose outputs lie side by side."""
        key = tuple(names)
        if key not in self._groups:
            self._groups[key] = self._group(key)
        return self._groups[key]

    def _group(self, names: tuple[str, ...]) -> Group:
        first = self._rows[names[0]]
        shapes = [self._linears[name] for name in names]
        if [self._rows[name] for name in names] != list(range(first, first + len(names))):
            raise ValueError(f"{', '.join(names)} are not next to each other")
        if len({shape.in_features for shape in shapes}) != 1:
            raise ValueError(f"{', '.join(names)} have no common input")
        widths = [shape.out_features for shape in shapes]
        starts = list(accumulate(widths[:-1], initial=0))
        columns = torch.tensor(list(zip(starts, widths, strict=True)), dtype=torch.int32, device=self.device)
        table = self._table[first : first + len(names)]
        return Group(table, columns, shapes[0].in_features, max(widths), gcd(_WIDEST, *starts, *widths), self.capacity)

    def _column(self, weights: AdapterWeights) -> list[tuple[int, int, int]]:
        """One entry for each module; (0, 0, 0) where the adapter lacks it."""
        if weights.rank > self.capacity:
            raise ValueError(f"rank {weights.rank} is over the tables' {self.capacity}")
        column = [(0, 0, 0)] * len(self._rows)
        for name, pair in weights.modules.items():
            for tensor in (pair.a, pair.b):
                if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT:
                    raise ValueError(f"{name}: the kernels need aligned, contiguous tensors")
                if tensor.dtype != self.dtype or tensor.device.type != self.device.type:
                    raise ValueError(f"{name}: {tensor.dtype} on {tensor.device} is not what the tables serve")
            column[self._rows[name]] = (pair.a.data_ptr(), pair.b.data_ptr(), len(pair.a))
        return column
