"""The adapters of one step on CUDA, as every LoRA-aware linear asks for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


class Moments:
    """When adapters' launches began and ended on the device, of one step that was launched from Python."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Any, Any]] = []

    def mark(self) -> Any:
        """An event that is reached when all launches before it are done."""
        event: Any = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any) -> None:
        """What lies between `start` and now is the adapters'."""
        self._pairs.append((start, self.mark()))

    def seconds(self) -> float:
        """Of all pairs together; the device must have come past them."""
        return float(sum(start.elapsed_time(end) for start, end in self._pairs)) / 1e3


@dataclass(frozen=True, slots=True)
class TimedSegmentedLora(SegmentedLora):
    """The same, with the moments of its launches."""

    moments: Moments

    def add(self, names: tuple[str, ...], x: torch.Tensor, y: torch.Tensor) -> None:
        start = self.moments.mark()
        SegmentedLora.add(self, names, x, y)
        self.moments.between(start)
