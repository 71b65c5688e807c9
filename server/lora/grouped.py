"""Linears that read the same input, as one product with one pair of LoRA launches (q, k and v; gate and up).

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

from server.core import BaseInfo
from server.lora.layers import LoraStep

# Names of neighbours that many families feed with one tensor. A wrong guess costs memory traffic, not correctness.
_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Group:
    """The joint weight [sum of outs, in] of the members, and what the last product has left for them."""

    def __init__(self, names: tuple[str, ...], members: list[nn.Linear], step: LoraStep):
        self.names, self.step = names, step
        widths = [member.out_features for member in members]
        self.weight = torch.cat([member.weight.detach() for member in members])
        self.bias: torch.Tensor | None = None
        if any(member.bias is not None for member in members):
            none = self.weight.new_zeros(max(widths))
            self.bias = torch.cat([none[: m.out_features] if m.bias is None else m.bias.detach() for m in members])
        self._widths = widths
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
        batch: Any = self.step.batch
        if batch is not None:
            batch.add_group(self.names, x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
        return y


class GroupMember(nn.Module):
    """Stands where one linear of a group stood."""

    def __init__(self, group: Group, number: int):
        super().__init__()
        self._group, self._number = group, number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._group.part(self._number, x)


def joinable(model: Any, info: BaseInfo) -> list[tuple[str, ...]]:
    """Names of the linears that can be joined, group by group: plain ones, of one input, next to each other in the
    model's order (as the tables of adapters want them)."""
    order = list(info.linears)
    found = []
    for at, name in enumerate(order):
        parent, _, child = name.rpartition(".")
        for group in _GROUPS:
            names = tuple(f"{parent}.{member}" for member in group)
            if child == group[0] and tuple(order[at : at + len(names)]) == names:
                inputs = {info.linears[member].in_features for member in names}
                plain = all(type(model.get_submodule(member)) is nn.Linear for member in names)
                if plain and len(inputs) == 1:
                    found.append(names)
    return found


def join(model: Any, groups: Sequence[tuple[str, ...]], step: LoraStep) -> None:
    """Replaces the linears of each group, whose weights are then held once, jointly."""
    for names in groups:
        group = Group(names, [model.get_submodule(name) for name in names], step)
        for number, name in enumerate(names):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, GroupMember(group, number))
