"""Layers as one call: which families' are taken over, that they stay what they were, and where they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine import decoder
from server.engine.runner import Runner
from server.lora.layers import install
from server.model import attention, fused
from server.model.kv import KVPool
from server.model.loader import Base, load_base
from tests.families import save_model

TAKEN = {"llama": 3, "mistral": 3, "qwen2": 3, "qwen3": 3, "gemma": 0, "phi3": 0, "gpt2": 0}


def load(family: str, models: Path, dtype: str = "float32") -> Base:
    folder = save_model(family, models / f"decoder-{family}")
    return load_base(str(folder), models / "data", dtype=dtype, device="cpu")


def calls(base: Base) -> list[decoder.Call]:
    return [module.forward for module in base.model.modules() if isinstance(module.forward, decoder.Call)]


@pytest.mark.parametrize("family", list(TAKEN))
def test_which_families(family: str, models: Path) -> None:
    base = load(family, models)
    Runner(base, blocks=8, block_size=16)
    assert len(calls(base)) == TAKEN[family]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block_size", [4, 16])
def test_logits_stay(models: Path, dtype: str, block_size: int) -> None:
    """Also that the probe's blocks are enough, and that a later step does not see an earlier one's record."""
    base = load("qwen3", models, dtype)
    kernels = base.kernels
    assert kernels is not None
    lora = install(base.model, base.info, kernels)
    pool = KVPool(base.kv_shapes, 8, block_size, base.dtype, base.device, kernels)
    before = decoder._logits(base.model, pool)
    assert decoder.install(base.model, kernels, pool, lora) is not None
    for _ in range(2):
        assert fused.close(decoder._logits(base.model, pool), before, base.dtype)
    assert sum(kernels.spent) > 0
    assert all(nanoseconds >= 0 for nanoseconds in kernels.spent)


def test_one_foreign_part_and_no_layer_is_taken(models: Path) -> None:
    base = load("llama", models)
    assert base.kernels is not None
    lora = install(base.model, base.info, base.kernels)
    pool = KVPool(base.kv_shapes, 8, 16, base.dtype, base.device, base.kernels)
    base.model.model.layers[1].post_attention_layernorm = torch.nn.Identity()
    assert decoder.install(base.model, base.kernels, pool, lora) is None
    assert not calls(base)


def test_other_logits_and_no_layer_is_taken(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only looks alike: here a norm that says less of itself than it does."""
    base = load("llama", models)
    assert base.kernels is not None
    lora = install(base.model, base.info, base.kernels)
    pool = KVPool(base.kv_shapes, 8, 16, base.dtype, base.device, base.kernels)
    norm: Any = base.model.model.layers[0].input_layernorm
    forward = norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: forward(x) * 2)
    assert decoder.install(base.model, base.kernels, pool, lora) is None
    assert not calls(base)


def test_a_layer_outside_of_a_batch_is_an_error(models: Path) -> None:
    base = load("llama", models)
    Runner(base, blocks=8, block_size=16)
    with pytest.raises(TypeError, match="needs a step"), attention.step(attention.Probe()):
        base.model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
