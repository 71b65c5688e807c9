"""The base's linears on CUDA, with LoRA. A group of one input (lora/groups.py) is one product with one pair of LoRA
launches.

A decode step on a GPU is bound by its bytes and by the number of its launches; the bytes stay the same, the launches of
a layer go from 7 products and 14 of LoRA's to 4 and 8.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from server.core import BaseInfo
from server.lora.groups import grouped, put
from server.lora.merge import MergedCopy, merged_weight
from server.lora.segmented import SegmentedLora
from server.lora.weights import AdapterWeights


class Adapters:
    """The adapters of the step in progress, shared by all groups of one model; None while no row has one. In a merged
    lane's step there is `merged` instead. `groups` are all linears of the model."""

    def __init__(self) -> None:
        self.batch: SegmentedLora | None = None
        self.merged: MergedCopy | None = None
        self.groups: list[JointLinear] = []


class JointLinear:
    """The joint weight [sum of outs, in] of a group's members."""

    def __init__(self, names: tuple[str, ...], members: Sequence[nn.Module], adapters: Adapters):
        self.names, self.adapters = names, adapters
        weights, biases = zip(*(_dense(member) for member in members), strict=True)
        self.weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.bias: torch.Tensor | None = None
        if any(bias is not None for bias in biases):
            zeros = [weight.new_zeros(len(weight)) for weight in weights]
            self.bias = torch.cat([z if bias is None else bias for z, bias in zip(zeros, biases, strict=True)])
        self.widths = [len(weight) for weight in weights]

    def outputs(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """x [..., in] -> each member's output [..., out], views of the joint one."""
        merged = self.adapters.merged
        y = linear(x, self.weight if merged is None else merged.groups.get(self.names, self.weight), self.bias)
        if self.adapters.batch is not None:
            self.adapters.batch.add(self.names, x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
        return y.split(self.widths, -1)


def install(model: Any, info: BaseInfo) -> Adapters:
    """Replaces every linear that takes adapters; a group's weights are held once, jointly."""
    adapters = Adapters()
    for names in grouped(info):
        group = JointLinear(names, [model.get_submodule(name) for name in names], adapters)
        adapters.groups.append(group)
        put(model, names, group)
    return adapters


def merged_bytes(groups: Iterable[JointLinear], weights: AdapterWeights) -> int:
    """What a merged copy takes: whole groups of which the adapter changes anything."""
    touched = (group.weight for group in groups if not weights.modules.keys().isdisjoint(group.names))
    return sum(weight.numel() * weight.element_size() for weight in touched)


@torch.inference_mode()
def merge(groups: Iterable[JointLinear], weights: AdapterWeights) -> MergedCopy:
    """A copy on the groups' device; see lora/merge.py. Raises Conflict when a merged weight is not finite."""
    found: dict[tuple[str, ...], torch.Tensor] = {}
    for group in groups:
        if weights.modules.keys().isdisjoint(group.names):
            continue
        joint, place = group.weight.clone(), 0
        for name, width in zip(group.names, group.widths, strict=True):
            pair = weights.modules.get(name)
            if pair is not None:
                joint[place : place + width] = merged_weight(name, joint[place : place + width], pair)
            place += width
        found[group.names] = joint
    nbytes = sum(joint.numel() * joint.element_size() for joint in found.values())
    return MergedCopy(weights.key, found, nbytes)


def _dense(member: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [out, in] and bias of a linear, or of a Conv1D, which holds its weight the other way round."""
    weight, bias = member.weight.detach(), getattr(member, "bias", None)
    return weight.t().contiguous() if isinstance(member, Conv1D) else weight, None if bias is None else bias.detach()
