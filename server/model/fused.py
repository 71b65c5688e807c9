"""Pieces of transformers' model code done in one kernel each, where that gives the same result.

Norms, the gated MLP's product, and rotary embedding with paged attention are many small operations in the model's own
code; on a CPU their number is what a step of few rows costs. Each piece is recognised by its code (a norm by what it
computes), replaced, and kept only if the whole model's logits stay what they were: a family that differs keeps its own
code. Logits alone would not do: what only acts on far positions or large values is not seen in a few tokens.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from server.kernels.ops import Kernels
from server.model import attention

log = logging.getLogger("onebase.model")

# The most that logits may differ from those of the family's own code, as a share of the largest of them.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
_PROBE_TOKENS = 12
# Whose code the replacements do; most families of transformers have a copy of one of these.
_ATTENTIONS = (LlamaAttention, MistralAttention, Qwen2Attention, Qwen3Attention)
_MLPS = (LlamaMLP, MistralMLP)


class RmsNorm(nn.Module):
    """x / rms(x) * (offset + weight)."""

    def __init__(self, kernels: Kernels, weight: torch.Tensor, eps: float, offset: float):
        super().__init__()
        self._kernels, self.eps, self.offset = kernels, eps, offset
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.rms_norm(x, self.weight, self.eps, self.offset)


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, kernels: Kernels, original: Any):
        super().__init__()
        self._kernels = kernels
        self.gate_proj, self.up_proj, self.down_proj = original.gate_proj, original.up_proj, original.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self._kernels.silu_mul(self.gate_proj(x), self.up_proj(x)))


class RotaryAttention(nn.Module):
    """Attention with separate q, k and v projections, optional norms of each head, and rotary embedding."""

    def __init__(self, kernels: Kernels, original: Any, call: attention.LayerCall):
        super().__init__()
        self._kernels, self.call, self._head_dim = kernels, call, original.head_dim
        self.layer_idx = original.layer_idx
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            getattr(original, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        )
        self.q_norm, self.k_norm = getattr(original, "q_norm", None), getattr(original, "k_norm", None)

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: object
    ) -> tuple[torch.Tensor, None]:
        tokens = hidden_states.shape[1]
        shape = (tokens, -1, self._head_dim)
        query, key = self.q_proj(hidden_states).view(shape), self.k_proj(hidden_states).view(shape)
        value = self.v_proj(hidden_states).view(shape)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        cosine, sine = position_embeddings
        self._kernels.rope(query, key, cosine, sine)
        heads = (query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1))
        out = attention.current().run(self.layer_idx, *heads, self.call.scale, self.call.window)
        return self.o_proj(out.reshape(1, tokens, -1)), None


def fuse(model: Any, kernels: Kernels, calls: dict[int, attention.LayerCall]) -> None:
    """Replaces what can be replaced in `model`; `calls` are what each layer hands to its attention."""
    wanted, dtype = _logits(model), kernels.dtype
    for kind, make in (("norms", _norm), ("MLPs", _mlp), ("attention", _attention(calls))):
        replaced = _replace(model, kernels, make)
        if replaced and not _gives(model, wanted, dtype):
            for parent, name, original in replaced:
                setattr(parent, name, original)
            log.info("%s keeps its own %s", type(model).__name__, kind)


Make = Callable[[nn.Module, Kernels], nn.Module | None]


def _replace(model: Any, kernels: Kernels, make: Make) -> list[tuple[nn.Module, str, nn.Module]]:
    replaced = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            new = make(child, kernels)
            if new is not None:
                setattr(parent, name, new)
                replaced.append((parent, name, child))
    return replaced


def _norm(module: Any, kernels: Kernels) -> nn.Module | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or weight is None or weight.dim() != 1 or eps is None:
        return None
    if weight.dtype != kernels.dtype:
        return None
    x = torch.randn(3, len(weight), dtype=weight.dtype)
    for offset in (0.0, 1.0):
        new = RmsNorm(kernels, weight, eps, offset)
        if close(new(x), module(x), weight.dtype):
            return new
    return None


def _mlp(module: Any, kernels: Kernels) -> nn.Module | None:
    if not does_what(module, _MLPS):
        return None
    x = torch.linspace(-8, 8, 64)
    silu = torch.equal(module.act_fn(x), nn.functional.silu(x))
    return GatedMlp(kernels, module) if silu else None


def _attention(calls: dict[int, attention.LayerCall]) -> Make:
    def make(module: Any, kernels: Kernels) -> nn.Module | None:
        return RotaryAttention(kernels, module, calls[module.layer_idx]) if does_what(module, _ATTENTIONS) else None

    return make


def does_what(module: object, kinds: tuple[Any, ...]) -> bool:
    """Whether the module's forward is, instruction by instruction, that of one of `kinds`."""
    kind: Any = type(module)
    return _code(kind) in map(_code, kinds)


@functools.cache
def _code(kind: Any) -> Hashable:
    forward: Any = inspect.unwrap(kind.forward)
    code = getattr(forward, "__code__", None)
    if code is None:
        return kind
    return code.co_code, code.co_names, tuple(value for value in code.co_consts if value != forward.__doc__)


def _logits(model: Any) -> torch.Tensor:
    ids = (torch.arange(_PROBE_TOKENS) * 7919 + 5) % model.config.get_text_config().vocab_size
    with torch.inference_mode(), attention.step(attention.Probe()):
        out = model(input_ids=ids[None], position_ids=torch.arange(_PROBE_TOKENS)[None], use_cache=False)
    return out.logits[0].float()


def _gives(model: Any, wanted: torch.Tensor, dtype: torch.dtype) -> bool:
    try:
        return close(_logits(model), wanted, dtype)
    except TypeError:  # a number format that the kernels are not for
        return False


def close(new: torch.Tensor, old: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether `new` is `old` but for rounding in `dtype`."""
    most = float(old.abs().max()) * _TOLERANCE[dtype]
    return bool((new.float() - old.float()).abs().max() <= most)
