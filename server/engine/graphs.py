"""CUDA graphs for decode steps: a step of n rows replays what was captured for the next larger bucket of rows.

A decode step of a large model is some thousand launches, and issuing them from Python takes longer than running them.
A captured graph is one launch, but its tensors and shapes are fixed: so each bucket has buffers of its own, a step is
copied into them, and rows that the step lacks are padding. A padding row computes token 0 at position 0, writes to the
null block, belongs to no adapter, and nobody reads its logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Protocol

import numpy as np
import torch

from server.engine import layout
from server.engine.buffers import Buffers
from server.engine.layout import Row
from server.lora.ops_triton import cut

Step = Mapping[str, torch.Tensor]
Forward = Callable[[Step, bool], torch.Tensor]  # a step's tensors, whether any row has an adapter -> logits


class Graph(Protocol):
    """Something captured, which reads and writes the same tensors each time."""

    def replay(self) -> torch.Tensor: ...


Capture = Callable[[Callable[[], torch.Tensor]], Graph]


def buckets(most: int) -> list[int]:
    """Numbers of rows that graphs are made for, up to `most`: close together where a row more costs most."""
    steps = [1, 2, 4, 8, *range(16, 33, 8), *range(48, 65, 16), *range(96, 257, 32), *range(320, most, 64)]
    return [size for size in steps if size < most] + [most]


class Bucket:
    """The buffers of one number of rows, and the graphs that read them: without adapters and with them."""

    def __init__(self, rows: int, width: int, block_size: int, null_block: int, device: torch.device):
        one, wide = np.int32, np.int64
        segments = dict.fromkeys(("starts", "ends", "owners"), ((rows,), one))
        self.buffers = Buffers(
            {
                "ids": ((1, rows), wide),
                "positions": ((1, rows), wide),
                "slots": ((rows,), wide),
                "decodes": ((rows, 4), one),
                "tables": ((rows, width), one),
                **segments,
            },
            device,
        )
        self.rows, self._block_size, self._null_block = rows, block_size, null_block
        self.graphs: dict[bool, Graph] = {}
        self._blocks: list[list[int]] = [[] for _ in range(rows)]  # what each row of the table holds

    def fill(self, rows: Seq[Row]) -> None:
        """Copies a step of decode rows into the buffers, in their order; the rest is padding."""
        self.buffers.wait()
        host, count = self.buffers.host, len(rows)
        tokens = layout.tokens(rows, self._block_size)
        for name, padding in (("ids", 0), ("positions", 0), ("slots", self._null_block * self._block_size)):
            host[name][..., :count] = tokens[name]
            host[name][..., count:] = padding
        host["decodes"][:, 0] = host["decodes"][:, 3] = np.arange(self.rows)
        host["decodes"][:, 1] = 1
        host["decodes"][:, 2] = host["positions"][0]
        for place in range(self.rows):
            self._table_row(place, rows[place].blocks(self._block_size) if place < count else [self._null_block])
        for name, column in layout.columns(cut(layout.runs(rows), long=False)).items():
            host[name][: len(column)] = column
            host[name][len(column) :] = 0
        self.buffers.send()

    def _table_row(self, place: int, blocks: list[int]) -> None:
        if self._blocks[place] != blocks:  # mostly the same as in the last step
            self.buffers.host["tables"][place, : len(blocks)] = blocks
            self._blocks[place] = blocks


class DecodeGraphs:
    """Decode steps by graphs. `width` is the most blocks that a row may have. Used by the engine's thread only."""

    def __init__(
        self,
        forward: Forward,
        capture: Capture,
        *,
        most_rows: int,
        width: int,
        block_size: int,
        null_block: int,
        device: torch.device,
    ):
        self._forward, self._capture, self._most_tokens = forward, capture, width * block_size
        self._buckets = [Bucket(rows, width, block_size, null_block, device) for rows in buckets(most_rows)]

    def warm(self) -> None:
        """Captures every graph, the largest first: the others then find room in its memory."""
        for bucket in reversed(self._buckets):
            bucket.fill([])
            for lora in (True, False):
                self._make(bucket, lora)

    def run(self, rows: Seq[Row]) -> torch.Tensor | None:
        """Logits [rows, vocabulary] of a step, good until the next one; None where no graph fits: a row of several
        tokens or too long a one, or too many rows."""
        bucket = self._fitting(len(rows))
        if bucket is None or any(row.work.count != 1 or row.context >= self._most_tokens for row in rows):
            return None
        bucket.fill(rows)
        lora = any(row.slot != layout.BASE for row in rows)
        return bucket.graphs[lora].replay()[: len(rows)]

    def _fitting(self, rows: int) -> Bucket | None:
        return next((bucket for bucket in self._buckets if bucket.rows >= rows), None)

    def _make(self, bucket: Bucket, lora: bool) -> None:
        bucket.graphs[lora] = self._capture(lambda: self._forward(bucket.buffers.device, lora))


class _Captured:
    def __init__(self, graph: torch.cuda.CUDAGraph, out: torch.Tensor):
        self._graph, self._out = graph, out

    def replay(self) -> torch.Tensor:
        self._graph.replay()
        return self._out


class CudaCapture:
    """Captures on a CUDA device; all graphs share one pool of memory, since only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], torch.Tensor]) -> Graph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()  # compiles the kernels and makes what is made once: neither can be captured
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = work()
        return _Captured(graph, out)
