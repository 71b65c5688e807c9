"""One step's attention on CUDA: what server/model/attention.py computes, by the kernels of paged_triton.py."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from server.model.kv import KVPool
from server.model.paged_triton import Tiles, attend, prefill_tiles, queries_for, splits_for, write


@dataclass
class PagedBatch:
    """A step as attention sees it. `slots` [tokens]: where each token's key and value go. `tables` int32
    [rows, width]: each row's blocks. `decodes` int32 [decode rows, 4]: one tile each (see Tiles), whose contexts are
    at most `longest` tokens; `chunks`: (start, end, context, row of the tables) of each run of a prompt.
    """

    pool: KVPool
    slots: torch.Tensor
    tables: torch.Tensor
    decodes: torch.Tensor | None
    longest: int
    chunks: list[tuple[int, int, int, int]] = field(default_factory=list)
    _tiles: dict[tuple[int, int], Tiles] = field(default_factory=dict)

    def run(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """query [heads, tokens, dim], key and value [kv_heads, tokens, dim] -> [tokens, heads, value_dim]."""
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        write(keys, values, self.slots, key.transpose(0, 1), value.transpose(0, 1))
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[2])
        for tiles in self._kinds(query, key):
            attend(
                query.transpose(0, 1),
                keys,
                values,
                self.tables,
                tiles,
                out,
                block_size=self.pool.block_size,
                scale=scale,
                window=window,
            )
        return out

    def _kinds(self, query: torch.Tensor, key: torch.Tensor) -> list[Tiles]:
        """The decode rows' tiles and the chunks'."""
        kinds = []
        heads, _, dim = query.shape
        if self.decodes is not None:
            kinds.append(Tiles(self.decodes, 1, splits_for(len(self.decodes), len(key), self.longest)))
        if self.chunks:
            shape = (heads // len(key), dim)
            if shape not in self._tiles:  # of most models, all layers share one
                queries = queries_for(query.dtype, dim)
                self._tiles[shape] = prefill_tiles(self.chunks, shape[0], queries, query.device)
            kinds.append(self._tiles[shape])
        return kinds
