"""The base's linears on CUDA, with LoRA. Those that read the same input (q, k and v; gate and up) are one product with
one pair of LoRA launches.

A decode step on a GPU is bound by its bytes and by the number of its launches; the bytes stay the same, the launches of
a layer go from 7 products and 14 of LoRA's to 4 and 8. The model's own code goes on calling its linears one by one: the
first of a group computes for all of them and the others hand out their columns, provided that they are given the very
same input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from server.core import BaseInfo
from server.lora.segmented import SegmentedLora

# Names of neighbours that many families feed with one tensor. A wrong guess costs time, not correctness.
_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Adapters:
    """The adapters of the step in progress, shared by all groups of one model; None while no row has one."""

    def __init__(self) -> None:
        self.batch: SegmentedLora | None = None


class Group:
    """The joint weight [sum of outs, in] of the members, and what the last product has left for them."""

    def __init__(self, names: tuple[str, ...], members: Sequence[nn.Module], adapters: Adapters):
        self.names, self.adapters = names, adapters
        weights, biases = zip(*(_dense(member) for member in members), strict=True)
        self.weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.bias: torch.Tensor | None = None
        if any(bias is not None for bias in biases):
            zeros = [weight.new_zeros(len(weight)) for weight in weights]
            self.bias = torch.cat([z if bias is None else bias for z, bias in zip(zeros, biases, strict=True)])
        self._widths = [len(weight) for weight in weights]
        self._input: torch.Tensor | None = None
        self._parts: dict[int, torch.Tensor] = {}

    def part(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """The output of member `number` for x [..., in], a view of the joint one; computed anew for an input that is
        not the one just seen, or when the member asks again."""
        if self._input is not x or number not in self._parts:
            self._input, self._parts = x, dict(enumerate(self._product(x).split(self._widths, -1)))
        part = self._parts.pop(number)
        if not self._parts:
            self._input = None  # nobody waits for it any more
        return part

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        y = linear(x, self.weight, self.bias)
        if self.adapters.batch is not None:
            self.adapters.batch.add(self.names, x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
        return y


class GroupMember(nn.Module):
    """Stands where one linear of a group stood."""

    def __init__(self, group: Group, number: int):
        super().__init__()
        self._group, self._number = group, number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._group.part(self._number, x)


def grouped(info: BaseInfo) -> list[tuple[str, ...]]:
    """The names of all linears, group by group; those that are joined are of one input and next to each other in the
    model's order (as the tables of adapters want them)."""
    order = list(info.linears)
    found: list[tuple[str, ...]] = []
    at = 0
    while at < len(order):
        parent, _, child = order[at].rpartition(".")
        candidates = (tuple(f"{parent}.{name}" for name in group) for group in _GROUPS if child == group[0])
        names = next((names for names in candidates if _joinable(names, order[at : at + len(names)], info)), None)
        found.append(names or (order[at],))
        at += len(found[-1])
    return found


def _joinable(names: tuple[str, ...], there: list[str], info: BaseInfo) -> bool:
    return tuple(there) == names and len({info.linears[name].in_features for name in names}) == 1


def install(model: Any, info: BaseInfo) -> Adapters:
    """Replaces every linear that takes adapters; a group's weights are held once, jointly."""
    adapters = Adapters()
    for names in grouped(info):
        group = Group(names, [model.get_submodule(name) for name in names], adapters)
        for number, name in enumerate(names):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, GroupMember(group, number))
    return adapters


def _dense(member: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [out, in] and bias of a linear, or of a Conv1D, which holds its weight the other way round."""
    weight, bias = member.weight.detach(), getattr(member, "bias", None)
    return weight.t().contiguous() if isinstance(member, Conv1D) else weight, None if bias is None else bias.detach()
