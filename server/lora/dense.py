"""The base model's own matrix products, with weights laid out once for the machine's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

# Rows that a packed weight is laid out for. oneDNN's layout for a decode batch also serves prefill well.
_PACK_ROWS = 16


class Dense(nn.Module):
    """y = x W^T + bias with W [out, in] of a linear or Conv1D; x [..., in] -> y [..., out], freshly allocated.

    On the CPU, `linear` repacks the weight at every call; here that is done once (docs/performance.md has figures).
    """

    def __init__(self, base: Any):
        super().__init__()
        weight = base.weight.detach()
        weight = weight.t().contiguous() if isinstance(base, Conv1D) else weight
        self.out_features, self.in_features = weight.shape
        bias = getattr(base, "bias", None)
        self.bias = None if bias is None else bias.detach()
        self.packed = packable(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS) if self.packed else weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return linear(x, self.weight, self.bias)


def packable(weight: torch.Tensor) -> bool:
    """Whether oneDNN can hold this weight in a layout of its own."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32
