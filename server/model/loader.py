"""Loads the base model through transformers and describes it to the rest of the server."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.pytorch_utils import Conv1D

from server.core import BaseInfo, LinearShape
from server.kernels.ops import Kernels, kernels_for
from server.model import attention, bundled, fused, kv
from server.model.bundled import BaseUnavailable, or_unavailable

# Rope types whose frequencies depend on the longest row of the batch: past the original context, one row's length
# would change its neighbours' answers, so the context ends there.
BATCH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True)
class Base:
    """The loaded base model. Its weights are never written to. `longest_token` is in characters.

    `kernels` are the CPU's own, or None: then everything is computed by torch.
    """

    model: Any
    tokenizer: Any
    info: BaseInfo
    dtype: torch.dtype
    device: torch.device
    vocab_size: int
    max_context: int
    eos_ids: frozenset[int]
    kv_shapes: dict[int, kv.KVShape]
    longest_token: int
    kernels: Kernels | None = None

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token over all layers."""
        return sum(s.kv_heads * (s.key_dim + s.value_dim) for s in self.kv_shapes.values()) * self.dtype.itemsize


def load_base(
    spec: str,
    data_dir: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    kernels: bool = True,
    extra_names: Iterable[str] = (),
) -> Base:
    """Loads `spec` (see CONTRACT: bundled name, hub id, directory or .gguf file) for inference.

    `kernels`: whether to use the ones for the CPU, where they can be had.

    Raises BaseUnavailable with a reason a user can act on.
    """
    where = _device(device)
    kind = getattr(torch, dtype) if dtype != "auto" else (torch.bfloat16 if where.type == "cuda" else torch.float32)
    folder, name, known_as = resolve(spec, data_dir)
    model = _load_model(folder, kind).to(where)
    tokenizer = _load_tokenizer(folder)
    config = model.config
    head = model.get_output_embeddings()
    info = BaseInfo(
        name=name,
        known_as=frozenset({*known_as, *extra_names}),
        digest=directory_digest(folder, data_dir),
        model_type=config.model_type,
        model_class=type(model).__name__,
        linears={n: linear_shape(m) for n, m in model.named_modules() if is_linear(m) and m is not head},
        other_modules=frozenset(n for n, m in model.named_modules() if n and (m is head or not is_linear(m))),
    )
    layers = attention.probe(model)
    built = kernels_for(kind, where) if kernels else None
    if built is not None:
        fused.fuse(model, built, layers.calls)
    return Base(
        model=model,
        tokenizer=tokenizer,
        info=info,
        dtype=kind,
        device=where,
        vocab_size=config.vocab_size,
        max_context=_max_context(config),
        eos_ids=_eos_ids(model, tokenizer),
        kv_shapes=layers.shapes,
        longest_token=max(map(len, tokenizer.get_vocab())),
        kernels=built,
    )


def resolve(spec: str, data_dir: Path) -> tuple[Path, str, set[str]]:
    """The directory to load, the public name, and the names under which adapters may know this base."""
    if spec in (bundled.NAME, bundled.HUB_NAME):
        return bundled.materialise(data_dir), bundled.NAME, {bundled.NAME, bundled.HUB_NAME}
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BaseUnavailable(f"no such GGUF file: {spec}")
        return bundled.convert_gguf(path.resolve(), data_dir, path.stem), path.stem, {path.stem}
    if path.is_dir():
        return path, path.resolve().name, {path.resolve().name, *_name_in_config(path)}
    if spec.startswith(("/", ".", "~")) or spec.count("/") != 1:
        raise BaseUnavailable(f"no such base: '{spec}' (a bundled name, org/name[@revision], a directory, a .gguf)")
    repo, _, revision = spec.partition("@")
    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns)), repo, {repo}
    except Exception as fault:  # the hub client raises a dozen kinds; the user needs one sentence
        raise BaseUnavailable(f"the base '{spec}' could not be had from the hub: {type(fault).__name__}") from fault


def is_linear(module: nn.Module) -> bool:
    """Whether LoRA can be put on this module: a plain linear, or GPT-2's Conv1D (a transposed one)."""
    return isinstance(module, nn.Linear | Conv1D)


def linear_shape(module: Any) -> LinearShape:
    """[in, out] of a linear or Conv1D, whose weight is stored the other way round."""
    rows, columns = module.weight.shape
    return LinearShape(rows, columns) if isinstance(module, Conv1D) else LinearShape(columns, rows)


def directory_digest(folder: Path, data_dir: Path) -> str:
    """`sha256:` over the config and every weight file. File hashes are remembered by size and time."""
    memo_path = data_dir / "models" / "digests.json"
    memo: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        memo = json.loads(memo_path.read_text())
    whole, before = hashlib.sha256(), len(memo)
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        stat = path.stat()
        key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if key not in memo:
            with path.open("rb") as file:
                memo[key] = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.name}\n{memo[key]}\n".encode())
    if len(memo) != before:
        memo_path.parent.mkdir(parents=True, exist_ok=True)
        staging = memo_path.with_suffix(f".{os.getpid()}")
        staging.write_text(json.dumps(memo))
        staging.replace(memo_path)
    return f"sha256:{whole.hexdigest()}"


def _device(name: str) -> torch.device:
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        build = "sees no usable GPU or driver" if torch.version.cuda else "is a build for the CPU only"
        raise BaseUnavailable(f"device 'cuda' cannot be used: torch {torch.__version__} {build}; use cpu or auto")
    return torch.device(("cuda" if there else "cpu") if name == "auto" else name)


def _load_model(folder: Path, dtype: torch.dtype) -> Any:
    with or_unavailable(f"the base in '{folder.name}' does not load"):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention.NAME,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    return model.eval().requires_grad_(False)


def _load_tokenizer(folder: Path) -> Any:
    with or_unavailable(f"the base in '{folder.name}' has no usable tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # what some families make of a directory without one
            raise ValueError("it knows no text; is tokenizer.json missing?")
    return tokenizer


def _name_in_config(folder: Path) -> set[str]:
    with contextlib.suppress(OSError, ValueError):
        name = json.loads((folder / "config.json").read_text()).get("_name_or_path")
        return {name} if isinstance(name, str) and name else set()
    return set()


def _max_context(config: Any) -> int:
    longest = int(getattr(config, "max_position_embeddings", 0) or 1 << 17)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in BATCH_DEPENDENT_ROPE:
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        return min(longest, int(original or longest))
    return longest


def _eos_ids(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    generation: GenerationConfig | None = getattr(model, "generation_config", None)
    ids: set[int] = set()
    for source in (generation, model.config, tokenizer):
        eos = getattr(source, "eos_token_id", None)
        ids.update(eos if isinstance(eos, list | tuple) else [] if eos is None else [eos])
    return frozenset(ids)
