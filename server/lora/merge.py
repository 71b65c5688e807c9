"""A copy of the base's linears with one adapter merged in: W' = W + B A (the scaling is inside B).

Made in float32 from the pristine base into tensors of its own; nothing is ever subtracted, so the base stays what it is
to the bit. Linears that the adapter does not target are the base's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from server.errors import Conflict
from server.lora.cores import one_core
from server.lora.dense import Dense
from server.lora.layers import Joint, LoraLinears
from server.lora.weights import AdapterWeights, LoraPair


@dataclass(frozen=True)
class MergedCopy:
    """`groups` by the names of their linears: those of which the adapter changes any, as the model's linears want them
    (layers.py on the CPU, grouped.py on CUDA). `nbytes` is what they add to the base; `layers` is what a runner keeps
    with them."""

    key: str
    groups: Mapping[tuple[str, ...], Any]
    nbytes: int
    layers: Any = None


def merged_bytes(groups: Iterable[LoraLinears], weights: AdapterWeights) -> int:
    """What a copy takes."""
    return sum(
        dense.nbytes
        for group in groups
        for name, dense in zip(group.names, group.own.dense, strict=True)
        if name in weights.modules
    )


@torch.inference_mode()
@one_core()
def merge(groups: Iterable[LoraLinears], weights: AdapterWeights) -> MergedCopy:
    """The copy, made on the calling thread. Raises Conflict when a merged weight is not finite in the serving dtype."""
    found, nbytes = {}, 0
    for group in groups:
        if weights.modules.keys().isdisjoint(group.names):
            continue
        dense = []
        for name, base in zip(group.names, group.own.dense, strict=True):
            pair = weights.modules.get(name)
            dense.append(base if pair is None else _merged(name, base, pair))
            nbytes += 0 if pair is None else dense[-1].nbytes
        found[group.names] = Joint(dense, group.own.numbers)
    return MergedCopy(weights.key, found, nbytes)


def merged_weight(name: str, weight: torch.Tensor, pair: LoraPair) -> torch.Tensor:
    """W [out, in] + B A in float32, in W's own dtype and on its device. Raises Conflict when it is not finite there."""
    a, b = (side.to(weight.device).float() for side in (pair.a, pair.b))
    narrow = torch.addmm(weight.float(), b.t(), a).to(weight.dtype)
    if not bool(torch.isfinite(narrow).all()):
        raise Conflict(f"{name}: the merged weight overflows {str(weight.dtype)[6:]}", code="not_finite")
    return narrow


def _merged(name: str, base: Dense, pair: LoraPair) -> Dense:
    return Dense(merged_weight(name, base.weights(), pair), base.bias, base.kernels)
