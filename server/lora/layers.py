"""Linear layers that add each row's own adapter to the base's product."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from server.core import BaseInfo
from server.lora.dense import Dense
from server.lora.stack import AdapterStack
from server.lora.weights import AdapterWeights


@dataclass
class LoraBatch:
    """Which adapter each token of a step belongs to.

    Tokens `start..end` of the packed step belong to many adapters, `owners` [end - start] says to which (numbers of
    `stack`); each of `segments` (start, end, adapter) is a longer run of one adapter. Tokens in neither are the
    base's and cost nothing.
    """

    stack: AdapterStack
    start: int
    end: int
    owners: torch.Tensor | None
    segments: list[tuple[int, int, AdapterWeights]]
    _foreign: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    def add(self, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """y [tokens, out] += (x [tokens, in] A^T) B^T of each token's adapter, in place; scaling is inside B.

        Mixed tokens: with A [columns, in] and B [columns, out] of all their adapters stacked,
        y += where(column is the row's own, x A^T, 0) B. Two matmuls for any mix of ranks, each adapter read once.
        The mask selects, it does not multiply: 0 x NaN is NaN, and one row's NaN is not its neighbours' business.
        """
        table = self.stack.tables.get(name) if self.end > self.start else None
        if table is not None:
            a, b = table.active
            shrunk = linear(x[self.start : self.end], a).masked_fill_(self._mask(name), 0)
            y[self.start : self.end].addmm_(shrunk, b)
        for start, end, adapter in self.segments:
            pair = adapter.modules.get(name)
            if pair is not None:
                y[start:end].addmm_(linear(x[start:end], pair.a), pair.b)

    def _mask(self, name: str) -> torch.Tensor:
        """[rows, columns], True where the column is another adapter's (or nobody's)."""
        key, columns = self.stack.columns(self.stack.tables[name])
        if key not in self._foreign:
            assert self.owners is not None
            self._foreign[key] = columns[None, :] != self.owners[:, None]
        return self._foreign[key]


class LoraStep:
    """The batch of the step in progress, shared by all layers of one model; None while no row has an adapter."""

    def __init__(self) -> None:
        self.batch: LoraBatch | None = None


class LoraLinear(nn.Module):
    """The base's product plus each row's adapter."""

    def __init__(self, name: str, base: nn.Module, step: LoraStep):
        super().__init__()
        self.name, self.dense, self.step = name, Dense(base), step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.dense(x)
        if self.step.batch is not None:
            self.step.batch.add(self.name, x.reshape(-1, self.dense.in_features), y.view(-1, self.dense.out_features))
        return y


def install(model: Any, info: BaseInfo) -> LoraStep:
    """Replaces the linear layers of `model` by LoRA-aware ones, and the output head by a packed one."""
    step = LoraStep()
    for name in info.linears:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoraLinear(name, model.get_submodule(name), step))
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        model.set_output_embeddings(Dense(head))
    return step
