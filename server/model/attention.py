"""Paged attention for packed batches, plugged in through transformers' attention interface.

A step is one packed row `[1, tokens]`: decode rows bring one token each, prefill chunks a run of tokens.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from server.kernels.ops import Kernels
from server.model.kv import BlockTable, KVPool, KVShape

NAME = "onebase"

# What a family may hand to its attention that changes the result in a way this module does not compute.
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask")

_current = threading.local()  # the batch of the step that this thread is running


class UnsupportedAttention(RuntimeError):
    """The base's attention needs something that this server does not compute."""


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What one layer's attention hands over beside its tensors: the scale of its scores, and its sliding window."""

    scale: float
    window: int | None


@dataclass
class DecodeGroup:
    """Rows of one new token each; without kernels, their contexts are about as long.

    `tokens` [rows]: where each row's token lies in the packed step. `tables` [rows, width] int32: each row's blocks,
    padded with the null block. `positions` [rows]: the position of the new token, so keys 0..position are visible.
    `length` is width in tokens.
    """

    tokens: torch.Tensor
    tables: torch.Tensor
    positions: torch.Tensor
    length: int
    _gathered: BlockTable | None = None
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def gathered(self) -> BlockTable:
        """The tables one after the other."""
        if self._gathered is None:
            self._gathered = BlockTable(self.tables.view(-1).long())
        return self._gathered

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask [rows, 1, length]: 0 where a key is visible, -inf elsewhere."""
        if window not in self._masks:
            keys = torch.arange(self.length, device=self.positions.device)
            hidden = keys > self.positions[:, None]
            if window is not None:
                hidden |= keys <= self.positions[:, None] - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
            self._masks[window] = mask[:, None]
        return self._masks[window]


@dataclass
class PrefillChunk:
    """A run of one row's prompt: packed tokens start..end, after `context` tokens that the pool holds already."""

    start: int
    end: int
    context: int
    table: BlockTable
    _masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor | None:
        """Boolean mask [new, context + new], True where visible; None when plain causal says it all."""
        if window not in self._masks:
            new, length = self.end - self.start, self.context + self.end - self.start
            plain = self.context == 0 and (window is None or length <= window)
            self._masks[window] = None if plain else self._visible(new, length, window)
        return self._masks[window]

    def _visible(self, new: int, length: int, window: int | None) -> torch.Tensor:
        keys = torch.arange(length, device=self.table.ids.device)
        queries = torch.arange(self.context, length, device=self.table.ids.device)[:, None]
        visible = keys <= queries
        return visible if window is None else visible & (keys > queries - window)


@dataclass
class AttentionBatch:
    """What attention needs to know of a step. `slots` [tokens] is where each token's key and value go."""

    pool: KVPool
    slots: torch.Tensor
    groups: list[DecodeGroup]
    chunks: list[PrefillChunk]
    _records: torch.Tensor | None = None

    def run(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """query [heads, tokens, dim], key and value [kv_heads, tokens, dim] -> [tokens, heads, value_dim]."""
        self.pool.write(layer, self.slots, key, value)
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[2])
        if self.pool.kernels is not None:
            self._in_place(self.pool.kernels, layer, query, scale, window, out)
            return out
        for group in self.groups:
            out.index_copy_(0, group.tokens, self._decode(group, layer, query, scale, window))
        for chunk in self.chunks:
            out[chunk.start : chunk.end] = self._prefill(chunk, layer, query, key, value, scale, window)
        return out

    def _in_place(
        self, kernels: Kernels, layer: int, query: torch.Tensor, scale: float, window: int | None, out: torch.Tensor
    ) -> None:
        keys, values, size = self.pool.keys[layer], self.pool.values[layer], self.pool.block_size
        for group in self.groups:
            rows = (group.tables, group.positions, group.tokens)
            kernels.decode(query, keys, values, *rows, size, scale, window, out)
        if self.chunks:
            kernels.prefill(query, keys, values, self.records(), size, scale, window, out)

    def records(self) -> torch.Tensor:
        """The chunks as `Kernels.prefill` wants them."""
        if self._records is None:
            rows = [(c.start, c.end - c.start, c.context, c.table.ids.data_ptr()) for c in self.chunks]
            self._records = torch.tensor(rows, dtype=torch.long)
        return self._records

    def _decode(
        self, group: DecodeGroup, layer: int, query: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """One query per row. The query heads that share a KV head are laid as the rows of one matmul."""
        key, value = self.pool.gather(layer, group.gathered())
        rows, (heads, _, dim), kv_heads = len(group.tokens), query.shape, key.shape[0]
        batch, per = kv_heads * rows, heads // kv_heads
        q = query.index_select(1, group.tokens).view(kv_heads, per, rows, dim).transpose(1, 2).reshape(batch, per, dim)
        mask = group.mask(window, query.dtype).expand(kv_heads, rows, per, -1).reshape(batch, per, -1)
        keys = key.view(batch, group.length, dim).transpose(1, 2)
        scores = torch.baddbmm(mask, q, keys, alpha=scale)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
        mixed = torch.bmm(weights, value.view(batch, group.length, -1))
        return mixed.view(kv_heads, rows, per, -1).transpose(0, 1).reshape(rows, heads, -1)

    def _prefill(
        self,
        chunk: PrefillChunk,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        if chunk.context:
            key, value = self.pool.gather(layer, chunk.table)
            length = chunk.context + chunk.end - chunk.start
            key, value = key[:, :length], value[:, :length]
        else:
            key, value = key[:, chunk.start : chunk.end], value[:, chunk.start : chunk.end]
        (heads, _, dim), kv_heads, new = query.shape, key.shape[0], chunk.end - chunk.start
        q = query[:, chunk.start : chunk.end].reshape(kv_heads, heads // kv_heads, new, dim)
        shape = (-1, heads // kv_heads, -1, -1)
        mask = chunk.mask(window)
        mixed = scaled_dot_product_attention(
            q,
            key[:, None].expand(shape),
            value[:, None].expand(shape),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
        )
        return mixed.reshape(heads, new, -1).transpose(0, 1)


@dataclass
class Probe:
    """Stands in for a batch while the base is loaded: notes every layer's shapes, computes plain causal attention."""

    shapes: dict[int, KVShape] = field(default_factory=dict)
    calls: dict[int, LayerCall] = field(default_factory=dict)

    def run(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        self.shapes[layer] = KVShape(key.shape[0], key.shape[2], value.shape[2])
        self.calls[layer] = LayerCall(scale, window)
        per = query.shape[0] // key.shape[0]
        key, value = key.repeat_interleave(per, 0), value.repeat_interleave(per, 0)
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale).transpose(0, 1)


@contextlib.contextmanager
def step(batch: AttentionBatch | Probe) -> Iterator[None]:
    """Makes `batch` the one that attention calls of this thread refer to."""
    _current.batch = batch
    try:
        yield
    finally:
        del _current.batch


def current() -> AttentionBatch | Probe:
    """The batch of the step that this thread is running."""
    batch: AttentionBatch | Probe = _current.batch
    return batch


def probe(model: Any) -> Probe:
    """Runs two tokens through `model` and returns what each layer's attention looks like.

    Raises UnsupportedAttention when the family does not go through the attention interface in every layer.
    """
    device = next(model.parameters()).device
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    recorder = Probe()
    with torch.inference_mode(), step(recorder):
        model(input_ids=ids, position_ids=torch.arange(2, device=device)[None], use_cache=False)
    expected = model.config.get_text_config().num_hidden_layers
    if len(recorder.shapes) != expected:
        raise UnsupportedAttention(
            f"{len(recorder.shapes)} of {expected} layers of {type(model).__name__} use the attention interface"
        )
    return recorder


def _forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [1, heads, tokens, dim] each -> [1, tokens, heads, dim]."""
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise UnsupportedAttention(f"{type(module).__name__} uses '{name}', which this server does not compute")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer: Any = module.layer_idx
    out = current().run(layer, query[0], key[0], value[0], scale, sliding_window)
    return out[None], None


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
