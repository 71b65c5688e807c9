"""The base model's own matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from server.kernels.ops import Kernels, Products


class Dense:
    """y = x W^T + bias with W [out, in] of a linear or Conv1D; x [..., in] -> y [..., out], freshly allocated.

    With kernels, the weight is laid out once in the order in which they read it, and kept in that form only. Not an
    `nn.Module`: looking one up and calling it costs more than a small product.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, kernels: Kernels | None):
        self.out_features, self.in_features = weight.shape
        self.bias, self.kernels = bias, kernels
        self.packed = kernels.pack(weight, bias) if kernels is not None else None
        self._products = Products([self.packed]) if self.packed is not None else None
        self._weight = weight if self.packed is None else None

    @classmethod
    def of(cls, base: Any, kernels: Kernels | None) -> Dense:
        """The product of a linear or Conv1D of the model."""
        weight, bias = base.weight.detach(), getattr(base, "bias", None)
        weight = weight.t().contiguous() if isinstance(base, Conv1D) else weight
        return cls(weight, None if bias is None else bias.detach(), kernels)

    @property
    def nbytes(self) -> int:
        """What the weight takes."""
        held = self._weight if self.packed is None else self.packed.data
        assert held is not None
        return held.numel() * held.element_size()

    def weights(self) -> torch.Tensor:
        """W [out, in]; a copy where it is kept in the kernels' layout."""
        if self.packed is not None and self.kernels is not None:
            return self.kernels.unpack(self.packed)
        assert self._weight is not None
        return self._weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._products is not None and self.kernels is not None:
            return self.kernels.linears(x, self._products)[0]
        assert self._weight is not None
        return linear(x, self._weight, self.bias)


class Head(nn.Module):
    """The output head: logits of hidden states."""

    def __init__(self, base: Any, kernels: Kernels | None):
        super().__init__()
        self._dense = Dense.of(base, kernels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._dense(x)
