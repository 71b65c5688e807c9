"""Decoder layers of Llama's kind as one call of the kernels each: between two layers' calls there is all the Python
of a step, and none of it within.

A layer is taken over when its own code is that of a family known to do what kernels/layer.cpp does, all its parts are
already ours, and the model's logits stay what they were.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from server.kernels import layer as records
from server.kernels.ops import Kernels, Products
from server.lora.groups import GroupMember
from server.lora.layers import LoraLinears, LoraStep, Merged
from server.model import attention, fused
from server.model.attention import AttentionBatch, PrefillChunk
from server.model.kv import BlockTable, KVPool

log = logging.getLogger("onebase.engine")

_PROBE_TOKENS = 12


def install(model: Any, kernels: Kernels, pool: KVPool, lora: LoraStep) -> Layers | None:
    """Takes over the layers of `model`, all or none."""
    layers = [module for module in model.modules() if fused.does_what(module, (LlamaDecoderLayer,))]
    found = Layers(layers, pool)
    own = found.described(None)
    if own is None or len(own) != len(pool.keys):
        return None
    wanted, steps = _logits(model, pool), Steps(kernels, lora, own)
    for number, layer in enumerate(layers):
        layer.forward = Call(steps, own, number)  # names and weights stay where they are
    if fused.close(_logits(model, pool), wanted, kernels.dtype):
        return found
    log.info("%s keeps its own layers", type(model).__name__)
    for layer in layers:
        del layer.forward
    return None


class Layers:
    """The layers of a model that are called whole."""

    def __init__(self, layers: list[Any], pool: KVPool):
        self._layers, self._pool = layers, pool

    def described(self, merged: Merged | None) -> list[Description] | None:
        """All layers on the base's weights or a merged copy's; None when a part of one is not ours."""
        found = [_describe(layer, self._pool, merged) for layer in self._layers]
        described = [one for one in found if one is not None]
        return described if found and len(described) == len(found) else None


@dataclass(frozen=True, slots=True)
class Description:
    """A layer's record, and what it points to."""

    record: records.Layer
    hidden: int
    kept: tuple[object, ...]


class Steps:
    """The record of the step in progress, made by the first layer that is called in it."""

    def __init__(self, kernels: Kernels, lora: LoraStep, layers: list[Description]):
        self.kernels, self._lora = kernels, lora
        self._numbers = max(one.record.numbers(1, one.hidden, one.record.down.ins) for one in layers)
        self._room = torch.empty(0, dtype=kernels.dtype)
        self._batch: object = None
        self._record = records.Step()
        self._kept: tuple[object, ...] = ()

    @property
    def layers(self) -> list[Description] | None:
        """The layers of the merged copy that this step runs on, if it does."""
        return self._lora.merged.layers if self._lora.merged is not None else None

    def of(self, hidden: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> records.Step:
        """The record for this layer's input [1, tokens, hidden] and its cosines and sines [1, tokens, rotary]."""
        batch = attention.current()
        if batch is not self._batch or angles is not self._kept[0]:
            if not isinstance(batch, AttentionBatch):
                raise TypeError("a layer that is taken over needs a step's batch")
            self._batch, self._record = batch, self._make(batch, hidden.shape[1], angles)
        return self._record

    def _make(self, batch: AttentionBatch, tokens: int, angles: tuple[torch.Tensor, torch.Tensor]) -> records.Step:
        cosine, sine = (side.to(self.kernels.dtype).contiguous() for side in angles)
        if len(self._room) < tokens * self._numbers:
            self._room = torch.empty(tokens * self._numbers, dtype=self.kernels.dtype)
        tables = self._lora.batch.tables if self._lora.batch is not None else None
        self._kept = (angles, cosine, sine, tables)
        step = records.Step(
            tokens=tokens,
            cosine=cosine.data_ptr(),
            sine=sine.data_ptr(),
            rotary=cosine.shape[-1],
            slots=batch.slots.data_ptr(),
            adapters=0 if tables is None else tables.data_ptr(),
            room=self._room.data_ptr(),
        )
        if batch.groups:
            (group,) = batch.groups
            step.tables, step.width = group.tables.data_ptr(), group.tables.shape[1]
            step.positions, step.places, step.decodes = (
                group.positions.data_ptr(),
                group.tokens.data_ptr(),
                len(group.tokens),
            )
        if batch.chunks:
            step.chunks, step.chunk_count = batch.records().data_ptr(), len(batch.chunks)
        return step


class Call:
    """Stands for the forward of one layer."""

    def __init__(self, steps: Steps, own: list[Description], number: int):
        self._steps, self._own, self._number = steps, own, number

    def __call__(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: object
    ) -> torch.Tensor:
        """hidden_states [1, tokens, hidden], contiguous; changed in place and handed back."""
        steps = self._steps
        layers = self._own if steps.layers is None else steps.layers
        steps.kernels.layer(hidden_states, layers[self._number].record, steps.of(hidden_states, position_embeddings))
        return hidden_states


def _describe(layer: Any, pool: KVPool, merged: Merged | None) -> Description | None:
    """None when a part of the layer is not one of ours."""
    of, mlp = layer.self_attn, layer.mlp
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    ours = isinstance(of, fused.RotaryAttention) and isinstance(mlp, fused.GatedMlp)
    heads = (norm for norm in (of.q_norm, of.k_norm) if norm is not None) if ours else ()
    if not ours or not all(isinstance(norm, fused.RmsNorm) for norm in (*norms, *heads)):
        return None
    sides = (of.q_proj, of.k_proj, of.v_proj), (of.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)
    parts = [_linears(modules, merged) for modules in sides]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        return None
    qkv, out, gate_up, down = (record for record, _ in found)
    keys, values = pool.keys[of.layer_idx], pool.values[of.layer_idx]
    kv_heads, places, dim = keys.shape
    record = records.Layer(
        *(_norm(norm) for norm in (*norms, of.q_norm, of.k_norm)),
        *(qkv, out, gate_up, down, keys.data_ptr(), values.data_ptr()),
        *(out.ins // dim, kv_heads, dim, places, pool.block_size, of.call.window or 0, of.call.scale),
    )
    return Description(record, qkv.ins, (found, norms, of.q_norm, of.k_norm, keys, values))


def _norm(norm: fused.RmsNorm | None) -> records.Norm:
    return records.Norm() if norm is None else records.Norm(norm.weight.data_ptr(), norm.eps, norm.offset)


def _linears(modules: tuple[Any, ...], merged: Merged | None) -> tuple[records.Linears, Products] | None:
    """The record of linears that are computed together, and what it points to."""
    members = [module for module in modules if isinstance(module, GroupMember)]
    groups = {id(member.shared): member.shared.group for member in members}
    if len(members) < len(modules) or len(groups) != 1:
        return None
    (group,) = groups.values()
    if not isinstance(group, LoraLinears) or len(group.names) != len(modules):
        return None
    joint = group.own if merged is None else merged.groups.get(group.names, group.own)
    products = joint.products
    if products is None:
        return None
    return records.Linears(products.address, products.count, products.steps, joint.dense[0].in_features), products


def _logits(model: Any, pool: KVPool) -> torch.Tensor:
    """Of a short prompt in the pool's first blocks, which nobody has yet."""
    count = min(_PROBE_TOKENS, pool.blocks * pool.block_size)
    places = torch.arange(count)
    ids = (places * 7919 + 5) % model.config.get_text_config().vocab_size
    blocks = torch.arange(-(-count // pool.block_size))
    batch = AttentionBatch(pool, places, [], [PrefillChunk(0, count, 0, BlockTable(blocks))])
    with torch.inference_mode(), attention.step(batch):
        out = model(input_ids=ids[None], position_ids=places[None], use_cache=False)
    return out.logits[0].float()
