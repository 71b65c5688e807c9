"""Runs steps on CUDA: the Triton kernels for attention and LoRA, CUDA graphs for decode steps."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from server.engine import layout
from server.engine.buffers import upload
from server.engine.clock import EVERY, Clock
from server.engine.graphs import Capture, DecodeGraphs, Step
from server.engine.layout import BASE
from server.engine.sampler import Choice, Row, sample
from server.engine.scheduler import Work
from server.lora import grouped
from server.lora.merge import MergedCopy
from server.lora.ops_triton import Segments, cut, is_long
from server.lora.segmented import Moments, SegmentedLora, TimedSegmentedLora
from server.lora.tables import AdapterTables
from server.lora.weights import AdapterWeights
from server.model import attention
from server.model.kv import KVPool
from server.model.loader import Base
from server.model.paged import PagedBatch

log = logging.getLogger("onebase.engine")


class DeviceRunner:
    """Owns the model, the KV pool, the tables of adapters and the graphs. Used by the engine's thread only.

    `slots`: adapters on the device at once, none of a rank over `max_rank`; `forget` must be called for each that
    leaves. `most_rows` and `longest`: running rows, and tokens of one, at most. `capture`: how graphs are made (None:
    no graphs, every step is launched from Python). `clock` is told what the time goes to: of the forward pass the
    launches, of sampling the wait for the device. Every 64th step that is launched from Python with adapters in it is
    looked into by events; in a graph's step there is nothing to be seen from outside.
    """

    def __init__(
        self,
        base: Base,
        *,
        blocks: int,
        block_size: int,
        slots: int,
        max_rank: int,
        most_rows: int,
        longest: int,
        capture: Capture | None,
    ):
        self.base, self.clock, self._launched = base, Clock(), 0
        self._moments: type[Moments] | None = Moments if base.device.type == "cuda" else None
        self._adapters = grouped.install(base.model, base.info)
        self.tables = AdapterTables(base.info, slots=slots, max_rank=max_rank, dtype=base.dtype, device=base.device)
        self.pool = KVPool(base.kv_shapes, blocks, block_size, base.dtype, base.device)
        self._longest = -(-min(longest, blocks * block_size) // block_size) * block_size
        self._graphs: DecodeGraphs | None = None
        self._merging: torch.cuda.Stream | None = None  # that copies are made on: the allocator keeps memory for each
        if capture is not None:
            self._graphs = DecodeGraphs(
                self._replayable,
                capture,
                most_rows=most_rows,
                width=self._longest // block_size,
                block_size=block_size,
                null_block=self.pool.null_block,
                device=base.device,
            )

    def warm(self) -> None:
        """Compiles every kernel and captures every graph, so that no request waits for that."""
        with torch.inference_mode():
            for long in (True, False):
                self._warm_prefill(long)
            if self._graphs is None:
                return
            try:
                self._graphs.warm()
            except RuntimeError:  # the family's own code waits for the device in its forward, say
                log.warning("decode steps run without CUDA graphs: this base cannot be captured", exc_info=True)
                self._graphs = None

    def forget(self, key: str) -> None:
        """An adapter has left the device."""
        self.tables.drop(key)

    def merged_bytes(self, weights: AdapterWeights) -> int:
        """What `merge` would add to the memory in use."""
        return grouped.merged_bytes(self._adapters.groups, weights)

    def merge(self, weights: AdapterWeights) -> MergedCopy:
        """A copy of the base with the adapter merged in, for `run`. Called on any thread, beside the steps."""
        if self.base.device.type != "cuda":
            return grouped.merge(self._adapters.groups, weights)
        if self._merging is None:
            self._merging = torch.cuda.Stream(self.base.device)
        with torch.cuda.stream(self._merging):
            copy = grouped.merge(self._adapters.groups, weights)
        self._merging.synchronize()  # the steps' stream does not wait for this one
        # When the copy goes, steps that read it may still be queued: the next one must not be written there before.
        for joint in copy.groups.values():
            joint.record_stream(torch.cuda.default_stream(self.base.device))
        return copy

    def run(self, work: list[Work], copy: MergedCopy | None = None) -> list[tuple[Work, Choice]]:
        """Computes `work` and returns a choice for each item that reached its sequence's last token."""
        with torch.inference_mode():
            rows = layout.arrange(work, [BASE if copy is not None else self._slot(item) for item in work])
            sampled = [row for row in rows if row.work.samples]
            self.clock.mark("pack")
            # A graph reads the base's own weights.
            logits = self._decode(rows, sampled) if copy is None else None
            if logits is None:
                logits = self._eager(rows, [row.end - 1 for row in sampled], copy)
            self.clock.mark("forward")
            if not sampled:
                return []
            sequences = [row.work.sequence for row in sampled]
            chosen = sample(
                logits.float(), [Row(s.request.submit.sampling, s.index, s.tokens, s.prompt_length) for s in sequences]
            )
            self.clock.mark("sample")
            return [(row.work, choice) for row, choice in zip(sampled, chosen, strict=True)]

    def _slot(self, item: Work) -> int:
        weights = item.sequence.request.weights
        return BASE if weights is None else self.tables.put(weights)

    def _decode(self, rows: list[layout.Row], sampled: list[layout.Row]) -> torch.Tensor | None:
        """The sampled rows' logits by a graph, if there is one for this step."""
        logits = self._graphs.run(rows) if self._graphs is not None else None
        if logits is None or len(sampled) == len(rows):
            return logits
        return logits[[row.start for row in sampled]]

    def _replayable(self, step: Step, lora: bool) -> torch.Tensor:
        """A decode step on buffers that stay where they are: logits of every row."""
        segments = Segments(step["starts"], step["ends"], step["owners"]) if lora else None
        batch = PagedBatch(self.pool, step["slots"], step["tables"], step["decodes"], self._longest)
        return self._forward(step, batch, segments, 0)

    def _eager(self, rows: list[layout.Row], last: list[int], copy: MergedCopy | None = None) -> torch.Tensor:
        """Any step: logits at the packed places `last` (one of no use where there are none)."""
        runs = layout.runs(rows)
        long = is_long(runs)
        host = {
            **layout.tokens(rows, self.pool.block_size),
            **layout.columns(cut(runs, long)),
            "tables": layout.tables(rows, self.pool.block_size, self.pool.null_block),
            "decodes": layout.decodes(rows),
            "last": layout.vector(last or [0]),
        }
        step = upload(host, self.base.device)
        segments = Segments(step["starts"], step["ends"], step["owners"], long) if runs else None
        decodes = step["decodes"] if len(step["decodes"]) else None
        # Not the rows' own longest: the kernels are compiled for a number of splits, and the graphs know this one's.
        batch = PagedBatch(self.pool, step["slots"], step["tables"], decodes, self._longest, layout.chunks(rows))
        self._adapters.merged = copy
        self._launched += segments is not None
        moments = None
        if segments is not None and self._moments is not None and self._launched % EVERY == 0:
            moments = self._moments()
        try:
            return self._forward(step, batch, segments, step["last"], moments)
        finally:
            self._adapters.merged = None

    def _warm_prefill(self, long: bool) -> None:
        """A prompt of token 0 in the null block. A short one will do: kernels are compiled for tiles, not lengths."""
        null, size, tokens = self.pool.null_block, self.pool.block_size, 2
        host = {
            "ids": np.zeros((1, tokens), np.int64),
            "positions": np.arange(tokens)[None],
            "slots": np.full(tokens, null * size),
            "tables": np.full((1, 1), null, np.int32),
            **layout.columns(cut([(0, tokens, 0)], long)),
        }
        step = upload(host, self.base.device)
        batch = PagedBatch(self.pool, step["slots"], step["tables"], None, 0, [(0, tokens, 0, 0)])
        for segments in (None, Segments(step["starts"], step["ends"], step["owners"], long)):
            self._forward(step, batch, segments, 1)

    def _forward(
        self,
        step: Step,
        batch: PagedBatch,
        segments: Segments | None,
        keep: int | torch.Tensor,
        moments: Moments | None = None,
    ) -> torch.Tensor:
        """Logits of the packed places `keep`, or of all (0). With `moments`, waits for the device."""
        packed: Any = batch
        if segments is not None:
            lora = SegmentedLora(self.tables, segments)
            self._adapters.batch = lora if moments is None else TimedSegmentedLora(self.tables, segments, moments)
        start = moments.mark() if moments is not None else None
        try:
            with attention.step(packed):
                out = self.base.model(
                    input_ids=step["ids"], position_ids=step["positions"], use_cache=False, logits_to_keep=keep
                )
        finally:
            self._adapters.batch = None
        if moments is not None and start is not None:
            end = moments.mark()
            end.synchronize()
            self.clock.sample(moments.seconds(), start.elapsed_time(end) / 1e3)
        return out.logits[0]
