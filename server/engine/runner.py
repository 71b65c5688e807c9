"""Runs one step: packed tokens through the base with each row's adapter, and a choice for every finished row."""

from __future__ import annotations

from dataclasses import replace

import torch

from server.engine import batch as batches
from server.engine import decoder
from server.engine.clock import EVERY, Clock
from server.engine.sampler import Choice, Row, sample
from server.engine.scheduler import Work
from server.kernels.layer import LAYER_PARTS
from server.lora.layers import LoraStep, TimedLora, install
from server.lora.merge import MergedCopy, merge, merged_bytes
from server.lora.weights import AdapterWeights
from server.model import attention
from server.model.kv import KVPool
from server.model.loader import Base

_LORA = LAYER_PARTS.index("lora")


class Runner:
    """Owns the model and the KV pool. Used by the engine's thread only. `clock` is told what the time goes to,
    and what of it to adapters: the kernels count that themselves; without them every 64th step is looked into."""

    def __init__(self, base: Base, *, blocks: int, block_size: int):
        self.base, self.clock, self._steps = base, Clock(), 0
        self.lora: LoraStep = install(base.model, base.info, base.kernels)
        self.pool = KVPool(base.kv_shapes, blocks, block_size, base.dtype, base.device, base.kernels)
        self._layers: decoder.Layers | None = None
        if base.kernels is not None:
            self._layers = decoder.install(base.model, base.kernels, self.pool, self.lora)

    def merged_bytes(self, weights: AdapterWeights) -> int:
        """What `merge` would add to the memory in use."""
        return merged_bytes(self.lora.groups, weights)

    def merge(self, weights: AdapterWeights) -> MergedCopy:
        """A copy of the base with the adapter merged in, for `run`. Called on any thread, beside the steps."""
        copy = merge(self.lora.groups, weights)
        return copy if self._layers is None else replace(copy, layers=self._layers.described(copy))

    def run(self, work: list[Work], copy: MergedCopy | None = None) -> list[tuple[Work, Choice]]:
        """Computes `work`, which is of one lane: the shared one, or that of a merged copy. Returns a choice for each
        item that reached its sequence's last token."""
        with torch.inference_mode():
            batch = batches.build(work, self.pool, self.base.device, lora=copy is None)
            if batch.fresh is not None and self.base.kernels is None:
                # Behind a mask a stale NaN would still show; kernels read nothing that is not the row's own.
                self.pool.clear(batch.fresh)
            self.clock.mark("pack")
            logits = self._timed(batch, copy)
            if not batch.sampled:
                return []
            rows = [
                Row(s.request.submit.sampling, s.index, s.tokens, s.prompt_length)
                for s in (item.sequence for item in batch.sampled)
            ]
            choices = list(zip(batch.sampled, sample(logits, rows), strict=True))
            self.clock.mark("sample")
            return choices

    def _timed(self, batch: batches.Batch, copy: MergedCopy | None) -> torch.Tensor:
        """`_forward`, with the share of it that adapters take where that is to be had."""
        self._steps += 1
        kernels, timed = self.base.kernels, TimedLora(())
        looked = copy is None and (kernels is not None or self._steps % EVERY == 0)
        if looked and kernels is None and batch.lora is not None:
            batch.lora = timed = TimedLora(batch.lora.runs)
        before = kernels.spent[_LORA] if kernels is not None else 0
        logits = self._forward(batch, copy)
        seconds = self.clock.mark("forward")
        if looked:
            self.clock.sample((kernels.spent[_LORA] - before) / 1e9 if kernels is not None else timed.seconds, seconds)
        return logits

    def _forward(self, batch: batches.Batch, copy: MergedCopy | None) -> torch.Tensor:
        """Logits [sampled rows, vocabulary] in float32."""
        self.lora.batch, self.lora.merged = batch.lora, copy
        try:
            with attention.step(batch.attention):
                out = self.base.model(
                    input_ids=batch.ids,
                    position_ids=batch.positions,
                    use_cache=False,
                    logits_to_keep=batch.logits_at,
                )
        finally:
            self.lora.batch = self.lora.merged = None
        return out.logits[0].float()
