"""An adapter's tensors in one piece of memory, so that bringing it to a device is one copy and one allocation."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from server.lora.weights import AdapterWeights, LoraPair

ALIGNMENT = 256  # bytes; what a CUDA allocation of its own would have


def pack(weights: AdapterWeights, *, pinned: bool = False) -> torch.Tensor:
    """uint8 [bytes]: a copy of every tensor, each at a multiple of ALIGNMENT; in pinned memory for a GPU to read."""
    places = list(_places(weights))
    flat = torch.zeros(places[-1][3] if places else 0, dtype=torch.uint8, pin_memory=pinned)
    for tensor, start, end, _ in places:
        flat[start:end].copy_(tensor.contiguous().view(torch.uint8).view(-1))
    return flat


def unpack(weights: AdapterWeights, flat: torch.Tensor) -> AdapterWeights:
    """The adapter `weights` as views of `flat`, which has what `pack(weights)` gave, on whatever device."""
    views = iter([flat[start:end].view(tensor.dtype).view(tensor.shape) for tensor, start, end, _ in _places(weights)])
    modules = {name: LoraPair(next(views), next(views)) for name in weights.modules}
    return AdapterWeights(weights.key, modules, weights.rank, weights.nbytes)


def _places(weights: AdapterWeights) -> Iterator[tuple[torch.Tensor, int, int, int]]:
    """Every tensor with its start, its end, and where the next one starts."""
    at = 0
    for pair in weights.modules.values():
        for tensor in (pair.a, pair.b):
            start, end = at, at + tensor.nbytes
            at = -(-end // ALIGNMENT) * ALIGNMENT
            yield tensor, start, end, at
