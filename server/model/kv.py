"""Keys and values of all running sequences, in a pool of fixed-size blocks (Kwon et al. 2023, "PagedAttention").

The pool is laid out head by head, so that gathering a row's blocks yields what a batched matmul wants without a
transposing copy.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from server.kernels.ops import Kernels


@dataclass(frozen=True, slots=True)
class KVShape:
    """One layer's keys [kv_heads, token, key_dim] and values [kv_heads, token, value_dim]."""

    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass
class BlockTable:
    """Block ids [n] to gather, and the same as row numbers of a pool: a gather of whole rows is twice as fast."""

    ids: torch.Tensor
    _rows: dict[int, torch.Tensor] = field(default_factory=dict)

    def rows(self, heads: int, blocks: int) -> torch.Tensor:
        """[heads * n]: head h's block b is row h * blocks + b."""
        if heads not in self._rows:
            firsts = torch.arange(heads, device=self.ids.device)[:, None] * blocks
            self._rows[heads] = (firsts + self.ids).view(-1)
        return self._rows[heads]


class KVPool:
    """Keys and values of every block, per layer: [kv_heads, blocks * block_size, dim].

    One block more than `blocks` is kept, always zero: tables of different lengths are padded with it. A stale NaN
    behind a mask would still reach its neighbour (0 x NaN = NaN), so what a row can gather is zero until it is written.
    """

    def __init__(
        self,
        shapes: dict[int, KVShape],
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels | None = None,
    ):
        self.blocks, self.block_size, self.null_block, self.kernels = blocks, block_size, blocks, kernels
        tokens = (blocks + 1) * block_size

        def zeros(heads: int, dim: int) -> torch.Tensor:
            return torch.zeros(heads, tokens, dim, dtype=dtype, device=device)

        self.keys = {layer: zeros(s.kv_heads, s.key_dim) for layer, s in shapes.items()}
        self.values = {layer: zeros(s.kv_heads, s.value_dim) for layer, s in shapes.items()}

    def clear(self, blocks: torch.Tensor) -> None:
        """Zeroes whole blocks; `blocks` [n] int64."""
        for tensors in (self.keys, self.values):
            for tensor in tensors.values():
                tensor.view(tensor.shape[0], -1, self.block_size, tensor.shape[2]).index_fill_(1, blocks, 0)

    def write(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores key and value [kv_heads, tokens, dim] at `slots` [tokens] (block * block_size + offset)."""
        if self.kernels is not None:
            self.kernels.store_kv(key, value, self.keys[layer], self.values[layer], slots)
            return
        self.keys[layer].index_copy_(1, slots, key)
        self.values[layer].index_copy_(1, slots, value)

    def gather(self, layer: int, table: BlockTable) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the table's blocks, in that order: [kv_heads, n * block_size, dim] each."""

        def take(pool: torch.Tensor) -> torch.Tensor:
            heads, _, dim = pool.shape
            rows = pool.view(-1, self.block_size * dim).index_select(0, table.rows(heads, self.blocks + 1))
            return rows.view(heads, -1, dim)

        return take(self.keys[layer]), take(self.values[layer])
