"""Linear layers that add each row's own adapter to the base's product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from server.core import BaseInfo
from server.kernels.ops import Kernels
from server.lora.dense import Dense, Head
from server.lora.weights import AdapterWeights


@dataclass
class LoraBatch:
    """Which adapter each token of a step belongs to; tokens that nobody claims are the base's and cost nothing.

    `touched` are the modules that any adapter of the step has. With kernels, `tables` [tokens] int64 holds for each
    token the address of its adapter's table (AdapterWeights.addresses), or 0; the requests of the step keep the
    adapters alive. Without, `runs` (start, end, adapter) are the packed tokens of each.
    """

    touched: frozenset[str]
    tables: torch.Tensor | None = None
    runs: Sequence[tuple[int, int, AdapterWeights]] = ()

    def add(self, linear: LoraLinear, x: torch.Tensor, y: torch.Tensor) -> None:
        """y [tokens, out] += (x [tokens, in] A^T) B of each token's adapter, in place; scaling is inside B.

        No token's numbers ever meet another adapter's: one row's NaN is not its neighbours' business.
        """
        if self.tables is not None and linear.dense.kernels is not None:
            linear.dense.kernels.lora(x, y, self.tables, linear.number)
        for start, end, adapter in self.runs:
            pair = adapter.modules.get(linear.name)
            if pair is not None:
                y[start:end].addmm_(x[start:end] @ pair.a.t(), pair.b)


class LoraStep:
    """The batch of the step in progress, shared by all layers of one model; None while no row has an adapter."""

    def __init__(self) -> None:
        self.batch: LoraBatch | None = None


class LoraLinear(nn.Module):
    """The base's product plus each row's adapter."""

    def __init__(self, name: str, number: int, dense: Dense, step: LoraStep):
        super().__init__()
        self.name, self.number, self.dense, self.step = name, number, dense, step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, batch = self.dense(x), self.step.batch
        if batch is not None and self.name in batch.touched:
            batch.add(self, x.reshape(-1, self.dense.in_features), y.view(-1, self.dense.out_features))
        return y


def install(model: Any, info: BaseInfo, kernels: Kernels | None) -> LoraStep:
    """Replaces the linear layers of `model` by LoRA-aware ones, and the output head by a packed one."""
    step = LoraStep()
    for number, name in enumerate(info.linears):
        parent, _, child = name.rpartition(".")
        dense = Dense(model.get_submodule(name), kernels)
        setattr(model.get_submodule(parent), child, LoraLinear(name, number, dense, step))
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        model.set_output_embeddings(Head(head, kernels))
    return step
