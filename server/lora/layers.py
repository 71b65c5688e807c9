"""Linear layers that add each row's own adapter to the base's product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import nn

from server.core import BaseInfo
from server.kernels.ops import Kernels, Products
from server.lora.dense import Dense, Head
from server.lora.groups import grouped, put
from server.lora.weights import AdapterWeights


@dataclass
class LoraBatch:
    """Which adapter each token of a step belongs to; tokens that nobody claims are the base's and cost nothing.

    `runs` (start, end, adapter) are the packed tokens of each. For the kernels, `tables` [tokens] int64 holds for each
    token the address of its adapter's table (AdapterWeights.addresses), or 0; the requests of the step keep the
    adapters alive.
    """

    runs: Sequence[tuple[int, int, AdapterWeights]]
    tables: torch.Tensor | None = None

    def add(self, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """y [tokens, out] += (x [tokens, in] A^T) B of each run's adapter, in place; scaling is inside B.

        No token's numbers ever meet another adapter's: one row's NaN is not its neighbours' business.
        """
        for start, end, adapter in self.runs:
            pair = adapter.modules.get(name)
            if pair is not None:
                y[start:end].addmm_(x[start:end] @ pair.a.t(), pair.b)


@dataclass
class TimedLora(LoraBatch):
    """The same, which counts the `seconds` that adapters take."""

    seconds: float = 0.0

    def add(self, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        start = perf_counter()
        super().add(name, x, y)
        self.seconds += perf_counter() - start


class Joint:
    """Products of one input: `dense`, which have `numbers` in the tables of adapters."""

    def __init__(self, dense: Sequence[Dense], numbers: Sequence[int]):
        self.dense, self.numbers = dense, numbers
        packed = [one.packed for one in dense if one.packed is not None]
        self.products = Products(packed, numbers) if len(packed) == len(dense) else None


class Merged(Protocol):
    """A merged copy, as the linears ask for it (lora/merge.py)."""

    @property
    def groups(self) -> Mapping[tuple[str, ...], Joint]: ...

    @property
    def layers(self) -> Any: ...


class LoraStep:
    """The batch of the step in progress, shared by all layers of one model; None while no row has an adapter. In a
    merged lane's step there is `merged` instead. `groups` are all linears of the model."""

    def __init__(self) -> None:
        self.batch: LoraBatch | None = None
        self.merged: Merged | None = None
        self.groups: list[LoraLinears] = []


class LoraLinears:
    """The base's products of one input, plus each row's adapter; or a merged copy's products."""

    def __init__(self, names: tuple[str, ...], own: Joint, step: LoraStep):
        self.names, self.own, self._step, self._kernels = names, own, step, own.dense[0].kernels

    def outputs(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """x [..., in] -> each linear's output [..., out]."""
        merged, batch = self._step.merged, self._step.batch
        joint = self.own if merged is None else merged.groups.get(self.names, self.own)
        if self._kernels is not None and joint.products is not None:
            return self._kernels.linears(x, joint.products, batch.tables if batch is not None else None)
        found = [one(x) for one in joint.dense]
        if batch is not None:
            for name, y in zip(self.names, found, strict=True):
                batch.add(name, x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
        return found


def install(model: Any, info: BaseInfo, kernels: Kernels | None) -> LoraStep:
    """Replaces the linear layers of `model` by LoRA-aware ones, and the output head by a packed one."""
    step, numbers = LoraStep(), {name: number for number, name in enumerate(info.linears)}
    for names in grouped(info):
        dense = [Dense.of(model.get_submodule(name), kernels) for name in names]
        group = LoraLinears(names, Joint(dense, [numbers[name] for name in names]), step)
        step.groups.append(group)
        put(model, names, group)
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        model.set_output_embeddings(Head(head, kernels))
    return step
