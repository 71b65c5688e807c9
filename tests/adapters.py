"""Builders of small PEFT checkpoints, and of the bases that they fit."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from server.core import BaseInfo, LinearShape
from server.registry.registry import Registry
from server.registry.store import Staging, Store

HIDDEN, INNER, KEYS = 16, 24, 8
SHAPES = {
    "self_attn.q_proj": LinearShape(HIDDEN, HIDDEN),
    "self_attn.k_proj": LinearShape(HIDDEN, KEYS),
    "self_attn.v_proj": LinearShape(HIDDEN, KEYS),
    "self_attn.o_proj": LinearShape(HIDDEN, HIDDEN),
    "mlp.gate_proj": LinearShape(HIDDEN, INNER),
    "mlp.up_proj": LinearShape(HIDDEN, INNER),
    "mlp.down_proj": LinearShape(INNER, HIDDEN),
}


def tiny_base(layers: int = 3, *, scale: int = 1, **changes: Any) -> BaseInfo:
    """A Llama-like base of `layers` layers; `scale` multiplies every size."""
    linears = {
        f"model.layers.{layer}.{name}": LinearShape(shape.in_features * scale, shape.out_features * scale)
        for layer in range(layers)
        for name, shape in SHAPES.items()
    }
    others = {"model", "model.embed_tokens", "model.layers", "model.norm", "lm_head"}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        others |= {prefix, f"{prefix}.self_attn", f"{prefix}.mlp", f"{prefix}.mlp.act_fn"}
        others |= {f"{prefix}.input_layernorm", f"{prefix}.post_attention_layernorm"}
    fields: dict[str, Any] = {
        "name": "tiny",
        "known_as": frozenset({"tiny", "acme/Tiny-Llama"}),
        "digest": "sha256:" + "0" * 64,
        "model_type": "llama",
        "model_class": "LlamaForCausalLM",
        "linears": linears,
        "other_modules": frozenset(others),
    }
    return BaseInfo(**{**fields, **changes})


def config(**changes: Any) -> dict[str, Any]:
    """An `adapter_config.json` as PEFT saves it; a change to `...` removes the field."""
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": "acme/Tiny-Llama",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        **changes,
    }
    return {field: value for field, value in fields.items() if value is not ...}


def tensors(
    base: BaseInfo,
    ranks: Mapping[str, int],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    std: float = 0.1,
) -> dict[str, torch.Tensor]:
    """Random A and B for every module of `ranks`, under the names that PEFT saves."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    for module, rank in ranks.items():
        shape = base.linears[module]
        for side, size in (("A", (rank, shape.in_features)), ("B", (shape.out_features, rank))):
            value = torch.randn(size, generator=generator) * std
            found[f"base_model.model.{module}.lora_{side}.weight"] = value.to(dtype)
    return found


def targeted(base: BaseInfo, names: tuple[str, ...] = ("q_proj", "v_proj"), rank: int = 4) -> dict[str, int]:
    """The rank of every module whose last name is in `names`."""
    return {module: rank for module in base.linears if module.rsplit(".", 1)[-1] in names}


def write_adapter(
    directory: Path, base: BaseInfo, *, rank: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A checkpoint on q_proj and v_proj in `directory`; `changes` go into its config."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = config(r=rank, lora_alpha=2 * rank, **changes)
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors(base, targeted(base, rank=rank), seed=seed, dtype=dtype), directory / "adapter_model.safetensors")
    return directory


def stage_adapter(store: Store, base: BaseInfo, **options: Any) -> Staging:
    """The checkpoint of `write_adapter`, staged in a store."""
    staging = store.stage()
    write_adapter(staging.path, base, **options)
    return staging


def settle(registry: Registry) -> None:
    """Waits until what was let go is gone."""
    registry._catalogue._sweeper.submit(int).result()


def stored(registry: Registry) -> list[str]:
    """The objects on disk, once that is done."""
    settle(registry)
    return registry._store.digests()


def container(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """The bytes of a safetensors file with any header at all (an object, or raw bytes) and any length field."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entries_of(values: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], bytes]:
    """A truthful float32 header and its data, to tell lies with."""
    header: dict[str, Any] = {}
    data = b""
    for name, value in values.items():
        raw = value.to(torch.float32).contiguous().numpy().tobytes()
        assert len(raw) == 4 * math.prod(value.shape)
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return header, data
