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

    def __init__(self, base: Any, kernels: Kernels | None):
        weight = base.weight.detach()
        weight = weight.t().contiguous() if isinstance(base, Conv1D) else weight
        self.out_features, self.in_features = weight.shape
        bias = getattr(base, "bias", None)
        self.bias = None if bias is None else bias.detach()
        self.kernels = kernels
        self.packed = kernels.pack(weight, self.bias) if kernels is not None else None
        self._products = Products([self.packed]) if self.packed is not None else None
        self.weight = weight if self.packed is None else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._products is not None and self.kernels is not None:
            return self.kernels.linears(x, self._products)[0]
        assert self.weight is not None
        return linear(x, self.weight, self.bias)


class Head(nn.Module):
    """The output head: logits of hidden states."""

    def __init__(self, base: Any, kernels: Kernels | None):
        super().__init__()
        self._dense = Dense(base, kernels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._dense(x)
