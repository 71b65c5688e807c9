"""The kernels on tensors. All of them are for CPU tensors of one number format, contiguous unless it says otherwise.

They see addresses, not tensors: what is of another format would be read as numbers that it does not hold. So what
comes from the model's own code is looked at first, and a TypeError says what is wrong.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from server.kernels.layer import LAYER_PARTS, Layer, Step
from server.kernels.library import library

_FIELDS, _OUTPUT = 5, 2  # of a product's record, and where its output stands
_VALUES = {torch.float32: "float", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight [outs, ins] laid out for `Kernels.linears`. `bias` [outs] is float32."""

    data: torch.Tensor
    bias: torch.Tensor | None
    outs: int
    steps: int


class Products:
    """Weights that are multiplied by the same x, as linear.cpp is told of them: with their numbers in the tables of
    adapters, where they have any. One thread uses an object at a time."""

    def __init__(self, weights: Sequence[Packed], modules: Sequence[int] | None = None):
        self.weights, self.count, self.steps = weights, len(weights), weights[0].steps
        self.outs = [weight.outs for weight in weights]
        rows = [
            (weight.data.data_ptr(), 0 if weight.bias is None else weight.bias.data_ptr(), 0, weight.outs, module)
            for weight, module in zip(weights, modules or [0] * self.count, strict=True)
        ]
        self.records = (ctypes.c_int64 * (_FIELDS * self.count))(*itertools.chain.from_iterable(rows))
        self.address = ctypes.addressof(self.records)


def kernels_for(dtype: torch.dtype, device: torch.device) -> Kernels | None:
    """The kernels for this number format; None for another device or format, or where nothing can be compiled."""
    value = _VALUES.get(dtype) if device.type == "cpu" else None
    built = library(value) if value else None
    return Kernels(built, dtype) if built is not None else None


class Kernels:
    """One compiled library and its number format. `spent`: nanoseconds of all calls of `linears` and `layer`, by
    LAYER_PARTS."""

    def __init__(self, built: ctypes.CDLL, dtype: torch.dtype):
        self._built, self.dtype = built, dtype
        self.spent = (ctypes.c_int64 * len(LAYER_PARTS))()
        self._linear = built.linear
        self._panel = int(built.panel_width())
        self._per_word = 4 // dtype.itemsize

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Packed | None:
        """A weight [outs, ins] in the kernel's layout; None when its rows are no whole number of 4-byte words,
        or when it is kept in another number format than the model."""
        outs, ins = weight.shape
        if ins % self._per_word or weight.dtype != self.dtype:
            return None
        panels, steps = -(-outs // self._panel), ins // self._per_word
        if panels * self._panel != outs:
            weight = torch.cat((weight, weight.new_zeros(panels * self._panel - outs, ins)))
        data = weight.view(panels, self._panel, steps, self._per_word).transpose(1, 2).contiguous()
        return Packed(data, None if bias is None else bias.float().contiguous(), outs, steps)

    def unpack(self, packed: Packed) -> torch.Tensor:
        """The weight [outs, ins] again, bit for bit."""
        whole = packed.data.transpose(1, 2).reshape(-1, packed.steps * self._per_word)
        return whole[: packed.outs].contiguous()

    def linears(self, x: torch.Tensor, products: Products, tables: torch.Tensor | None = None) -> list[torch.Tensor]:
        """x [..., ins] -> for each weight x W^T + bias [..., outs], plus (x A^T) B of each token's own adapter.

        `tables` [tokens] int64: the address of the token's adapter table ([modules, 3] int64: A, B, rank), 0: none.
        A row's result does not depend on the others.
        """
        self._check(x)
        x = x.contiguous()
        shape, records = x.shape[:-1], products.records
        found = [x.new_empty((*shape, outs)) for outs in products.outs]
        for number, y in enumerate(found):
            records[_FIELDS * number + _OUTPUT] = y.data_ptr()
        rows = found[0].numel() // products.outs[0]
        adapters = 0 if tables is None else tables.data_ptr()
        self._linear(x.data_ptr(), rows, products.steps, records, products.count, adapters, self.spent)
        return found

    def rope(self, query: torch.Tensor, key: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> None:
        """Rotary embedding in place: query, key [tokens, heads, dim]; cosine, sine [tokens, rotary <= dim], which may
        be strided."""
        self._check(query, key, cosine, sine)
        cosine, sine = cosine.contiguous(), sine.contiguous()
        tokens, heads, dim = query.shape
        self._built.rope(
            query.data_ptr(),
            key.data_ptr(),
            cosine.data_ptr(),
            sine.data_ptr(),
            tokens,
            heads,
            key.shape[1],
            dim,
            cosine.shape[-1],
        )

    def store_kv(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        """key, value [kv_heads, tokens, dim] (dim dense) to places `slots` of the pool [kv_heads, places, dim]."""
        self._check(key, value, dense=True)
        self._built.store_kv(
            *(key.data_ptr(), key.stride(1), key.stride(0)),
            *(value.data_ptr(), value.stride(1), value.stride(0)),
            *(keys.data_ptr(), values.data_ptr(), slots.data_ptr(), slots.shape[0]),
            *(keys.shape[0], keys.shape[2], values.shape[2], keys.shape[1]),
        )

    def decode(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tables: torch.Tensor,
        positions: torch.Tensor,
        tokens: torch.Tensor,
        block_size: int,
        scale: float,
        window: int | None,
        out: torch.Tensor,
    ) -> None:
        """Attention of rows with one new token each, into rows `tokens` [rows] of `out` [all tokens, heads, value_dim].

        query [heads, all tokens, dim] (any strides, dim dense); the pool keys, values [kv_heads, places, dim];
        `tables` [rows, width] int32: each row's blocks; `positions` [rows]: keys 0..position are seen.
        """
        self._check(query, dense=True)
        self._built.decode(
            *(query.data_ptr(), query.stride(1), query.stride(0), keys.data_ptr(), values.data_ptr()),
            *(tables.data_ptr(), tables.shape[1], positions.data_ptr(), tokens.data_ptr(), tokens.shape[0]),
            *(query.shape[0], keys.shape[0], keys.shape[2], values.shape[2], keys.shape[1], block_size),
            *(window or 0, scale, out.data_ptr()),
        )

    def prefill(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        chunks: torch.Tensor,
        block_size: int,
        scale: float,
        window: int | None,
        out: torch.Tensor,
    ) -> None:
        """Attention of runs of new tokens, whose keys and values are in the pool already, into their rows of `out`.

        `chunks` [n, 4] int64: first packed token, how many, tokens before it, address of its blocks' int64 numbers;
        the rest as for `decode`.
        """
        self._check(query, dense=True)
        self._built.prefill(
            *(query.data_ptr(), query.stride(1), query.stride(0), keys.data_ptr(), values.data_ptr()),
            *(chunks.data_ptr(), chunks.shape[0], query.shape[0], keys.shape[0], keys.shape[2], values.shape[2]),
            *(keys.shape[1], block_size, window or 0, scale, out.data_ptr()),
        )

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        """(offset + weight) * x / sqrt(mean(x^2) + eps) over the last dimension."""
        x = x.contiguous()
        y = torch.empty_like(x)
        dim = x.shape[-1]
        self._built.rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // dim, dim, eps, offset)
        return y

    def layer(self, hidden: torch.Tensor, layer: Layer, step: Step) -> None:
        """A whole decoder layer on hidden [..., hidden], contiguous, in place."""
        self._check(hidden)
        self._built.layer(hidden.data_ptr(), ctypes.byref(layer), ctypes.byref(step), self.spent)

    def _check(self, *tensors: torch.Tensor, dense: bool = False) -> None:
        for tensor in tensors:
            if tensor.dtype is not self.dtype:
                raise TypeError(f"the kernels are for {self.dtype}, not {tensor.dtype}")
            if dense and tensor.stride(-1) != 1:
                raise TypeError("the numbers of a head must lie next to each other")

    def silu_mul(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """gate := silu(gate) * up, and `gate` back."""
        self._built.silu_mul(gate.data_ptr(), up.data_ptr(), gate.numel())
        return gate
