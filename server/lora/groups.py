"""Linears that read the same input (q, k and v; gate and up) and are computed together.

The model's own code goes on calling its linears one by one: the first of a group computes for all of them and the
others hand out what is theirs, provided that they are given the very same input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from server.core import BaseInfo

# Names of neighbours that many families feed with one tensor. A wrong guess costs time, not correctness.
_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Group(Protocol):
    """What computes a group."""

    def outputs(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """x [..., in] -> each member's output [..., out], nobody else's to write to."""


class Shared:
    """What the last computation of a group has left for its members."""

    def __init__(self, group: Group):
        self.group = group
        self._input: torch.Tensor | None = None
        self._parts: dict[int, torch.Tensor] = {}

    def part(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """The output of member `number` for x [..., in]; computed anew for an input that is not the one just seen, or
        when the member asks again."""
        if self._input is not x or number not in self._parts:
            self._input, self._parts = x, dict(enumerate(self.group.outputs(x)))
        part = self._parts.pop(number)
        if not self._parts:
            self._input = None  # nobody waits for it any more
        return part


class GroupMember(nn.Module):
    """Stands where one linear of a group stood."""

    def __init__(self, shared: Shared, number: int):
        super().__init__()
        self.shared, self.number = shared, number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared.part(self.number, x)


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


def put(model: nn.Module, names: Sequence[str], group: Group) -> None:
    """Puts the members of `group` in the place of the linears `names`."""
    shared = Shared(group)
    for number, name in enumerate(names):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, GroupMember(shared, number))


def _joinable(names: tuple[str, ...], there: list[str], info: BaseInfo) -> bool:
    return tuple(there) == names and len({info.linears[name].in_features for name in names}) == 1
