"""Which pieces of which family are replaced, and that one which only looks alike is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from server.kernels.ops import kernels_for
from server.model import attention, fused
from tests.families import save_model

NORMS, MLPS, ATTENTION = fused.RmsNorm, fused.GatedMlp, fused.RotaryAttention
REPLACED = {
    "llama": {NORMS: 7, MLPS: 3, ATTENTION: 3},
    "mistral": {NORMS: 7, MLPS: 3, ATTENTION: 3},
    "qwen2": {NORMS: 7, MLPS: 3, ATTENTION: 3},
    "qwen3": {NORMS: 13, MLPS: 3, ATTENTION: 3},  # norms of q and k as well
    "gemma": {NORMS: 7, MLPS: 0, ATTENTION: 3},  # its MLP has a GELU
    "phi3": {NORMS: 7, MLPS: 0, ATTENTION: 0},  # fused projections
    "gpt2": {NORMS: 0, MLPS: 0, ATTENTION: 0},
}


def load(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention.NAME)
    return model.eval().requires_grad_(False)


def fuse(model: Any) -> None:
    kernels = kernels_for(torch.float32, torch.device("cpu"))
    assert kernels is not None
    fused.fuse(model, kernels, attention.probe(model).calls)


def count(model: Any, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize("family", list(REPLACED))
def test_what_is_replaced(family: str, models: Path) -> None:
    folder = models / f"fused-{family}"
    model = load(save_model(family, folder))
    names = set(model.state_dict())
    fuse(model)
    assert {kind: count(model, kind) for kind in (NORMS, MLPS, ATTENTION)} == REPLACED[family]
    assert set(model.state_dict()) == names, "every weight keeps its name"


def test_rotary_embedding_of_another_kind_stays(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that rotates neighbours instead of halves looks the same and gives other logits."""
    model = load(save_model("llama", models / "fused-interleaved"))

    def interleaved(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        def turn(x: torch.Tensor) -> torch.Tensor:
            even, odd = x[..., ::2], x[..., 1::2]
            return torch.stack((-odd, even), -1).flatten(-2)

        return q * cos + turn(q) * sin, k * cos + turn(k) * sin

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", interleaved)
    fuse(model)
    assert (count(model, NORMS), count(model, MLPS), count(model, ATTENTION)) == (7, 3, 0)


def test_a_norm_with_another_formula_stays(models: Path) -> None:
    model = load(save_model("llama", models / "fused-norm"))

    class OddRMSNorm(modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * 1.01

    for layer in model.model.layers:
        layer.input_layernorm.__class__ = OddRMSNorm
    fuse(model)
    assert count(model, NORMS) == 4
    assert count(model, OddRMSNorm) == 3


class FarAttention(modeling_llama.LlamaAttention):
    """Like Ministral 3's: another scale from some position on, which a few tokens at the beginning do not show."""

    def forward(self, hidden_states: torch.Tensor, position_embeddings: Any, position_ids: Any, **kwargs: Any) -> Any:
        far = (position_ids >= 400)[..., None]
        return super().forward(torch.where(far, hidden_states * 2, hidden_states), position_embeddings, **kwargs)


class ClippedMlp(modeling_llama.LlamaMLP):
    """Like those of some mixtures of experts: clamps what is large, which ordinary tokens are not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-1e4, 1e4))


def test_what_only_shows_far_on_or_for_large_values_stays(models: Path) -> None:
    model = load(save_model("llama", models / "fused-far"))
    model.model.layers[0].self_attn.__class__ = FarAttention
    model.model.layers[1].mlp.__class__ = ClippedMlp
    fuse(model)
    assert (count(model, FarAttention), count(model, ClippedMlp)) == (1, 1)
    assert (count(model, NORMS), count(model, MLPS), count(model, ATTENTION)) == (7, 2, 2)


def test_a_rotary_embedding_in_another_number_format_stays(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(save_model("llama", models / "fused-wide"))
    rotary = model.model.rotary_emb
    forward = rotary.forward
    monkeypatch.setattr(rotary, "forward", lambda *a, **named: tuple(part.double() for part in forward(*a, **named)))
    monkeypatch.setattr(
        modeling_llama,
        "apply_rotary_pos_emb",
        lambda q, k, cos, sin, apply=modeling_llama.apply_rotary_pos_emb: apply(q, k, cos.float(), sin.float()),
    )
    fuse(model)
    assert (count(model, NORMS), count(model, MLPS), count(model, ATTENTION)) == (7, 3, 0)
