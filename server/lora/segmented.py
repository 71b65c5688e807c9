"""The adapters of one step on CUDA, as every LoRA-aware linear asks for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from server.lora.ops_triton import Segments, add
from server.lora.tables import AdapterTables


@dataclass(frozen=True, slots=True)
class SegmentedLora:
    """Which tokens of the packed step belong to which slot of the tables."""

    tables: AdapterTables
    segments: Segments

    def add(self, names: tuple[str, ...], x: torch.Tensor, y: torch.Tensor) -> None:
        """y [tokens, outs] += each token's own adapter's share of x [tokens, in], in place, for the modules `names`,
        which read the same x and whose outputs lie side by side in y: one pair of launches for all."""
        add(x, y, self.tables.group(names), self.segments)
