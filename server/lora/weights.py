"""`adapter_model.safetensors` -> tensors that the bank can take, and the full check of an adapter before it is stored.

The served form of a module is `LoraPair`: the adapter adds `(x @ a.T) @ b` to the module's output. The scaling is
folded into `b` once, in float32, so that no kernel ever sees it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from server.core import BaseInfo
from server.errors import InvalidAdapter
from server.lora.cores import one_core
from server.lora.header import TensorEntry, header_of, read_header
from server.lora.spec import ModuleSpec, check_base, parse_config, resolve

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_UNSUPPORTED_KEYS = (
    ("lora_magnitude_vector", "a DoRA magnitude vector; DoRA is not supported"),
    ("lora_embedding_", "a LoRA on embeddings; embeddings are not supported"),
    ("modules_to_save", "a fully trained module; modules_to_save is not supported"),
    ("trainable_tokens", "trained token embeddings; they are not supported"),
    ("embed_tokens", "an embedding; embeddings are not supported"),
    ("lm_head", "the output head; adapters on it are not supported"),
    (".bias", "a bias; trained biases are not supported"),
)
# Sums of products below this share of the sum of their absolute values are float64 rounding, not an effect.
_CANCELLED = 1e-12


@dataclass(frozen=True, slots=True)
class LoraPair:
    """One module's adapter. a: [rank, in_features]; b: [rank, out_features], B transposed times the scaling."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter in RAM, in the serving dtype. `modules` has the full module names of `BaseInfo.linears`, in order.

    `key` is what caches and slots find it by (`AdapterRef.key`), `rank` the largest of any module, `nbytes` the bytes
    of all tensors. `addresses` is where the CPU's kernels find it: int64 [linears, 3], of each linear the addresses of
    A and B and the rank; 0 where the adapter has nothing.
    """

    key: str
    modules: Mapping[str, LoraPair]
    rank: int
    nbytes: int
    addresses: torch.Tensor | None = None


@dataclass(frozen=True)
class AdapterSummary:
    """What the owner of an adapter is told about it. `targets` are the distinct last name components, sorted."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    parameters: int
    kind: str = "lora"


@one_core()
def inspect_adapter(
    config: bytes,
    weights_path: Path,
    base: BaseInfo,
    *,
    max_rank: int,
    dtype: torch.dtype,
    allow_zero: bool = False,
) -> AdapterSummary:
    """Check everything about an uploaded adapter: that it is LoRA for this base, complete, finite, and does something.

    Needs the memory of one module's tensors at a time. Raises `InvalidAdapter` naming the config field or tensor.
    """
    spec = parse_config(config)
    check_base(spec, base)
    modules = resolve(spec, base, max_rank=max_rank)
    effect = allow_zero
    parameters = 0
    for _, pair in _pairs(weights_path, base, modules, dtype):
        parameters += pair.a.numel() + pair.b.numel()
        effect = effect or _has_effect(pair)
    if not effect:
        raise InvalidAdapter(
            "the adapter has no effect: B A is zero for every module (allow_zero lets it in)",
            param="weights",
            code="zero_effect",
        )
    return AdapterSummary(
        rank=max(module.rank for module in modules.values()),
        alpha=spec.alpha,
        targets=tuple(sorted({name.rsplit(".", 1)[-1] for name in modules})),
        parameters=parameters,
    )


@one_core()
def read_adapter(key: str, config: bytes, weights: bytearray, base: BaseInfo, dtype: torch.dtype) -> AdapterWeights:
    """The tensors of a stored adapter, on the CPU in `dtype`, from the content of its two files. They lie in one piece
    of memory of their own. Raises `InvalidAdapter` if it does not fit the base.

    A request waits for this beside a busy step loop, where every operation on a tensor may have to wait for the
    interpreter: hence few of them, over all modules at once where that can be.
    """
    modules = resolve(parse_config(config), base)
    entries = header_of(memoryview(weights), max_tensors=_most_tensors(base))
    _check_entries(entries, base, modules)
    keys = [_key(module, side) for module in modules for side in "AB"]
    sizes = [math.prod(entries[key].shape) for key in keys]
    served = torch.empty(sum(sizes), dtype=dtype)
    pieces = iter(served.split(sizes))
    pairs = {}
    for module, spec in modules.items():
        stored_a, stored_b = (_stored(weights, entries[_key(module, side)]) for side in "AB")
        pair = LoraPair(next(pieces).view(stored_a.shape), next(pieces).view(stored_b.shape[::-1]))
        _convert(stored_a, stored_b, spec.scaling, pair)
        pairs[module] = pair
    if not _finite(served):
        for module, pair in pairs.items():
            stored_a, stored_b = (_stored(weights, entries[_key(module, side)]) for side in "AB")
            _check_finite(module, stored_a, stored_b, pair)
    return AdapterWeights(
        key=key,
        modules=pairs,
        rank=max(module.rank for module in modules.values()),
        nbytes=served.nbytes,
        addresses=_addresses(pairs, base),
    )


def _addresses(pairs: Mapping[str, LoraPair], base: BaseInfo) -> torch.Tensor:
    found = (pairs.get(name) for name in base.linears)
    return torch.tensor([(p.a.data_ptr(), p.b.data_ptr(), len(p.a)) if p else (0, 0, 0) for p in found])


def _pairs(
    path: Path, base: BaseInfo, modules: Mapping[str, ModuleSpec], dtype: torch.dtype
) -> Iterator[tuple[str, LoraPair]]:
    """Every adapted module's pair, finite as stored and as served. The names and shapes are all checked first."""
    entries = read_header(path, max_tensors=_most_tensors(base))
    _check_entries(entries, base, modules)
    try:
        with path.open("rb", buffering=0) as file:
            for module, spec in modules.items():
                yield module, _read_pair(file, entries, module, spec.scaling, dtype)
    except OSError as exc:
        raise InvalidAdapter("adapter_model.safetensors: the file cannot be read", param="weights") from exc


def _most_tensors(base: BaseInfo) -> int:
    return 2 * len(base.linears) + 64


def _check_entries(entries: Mapping[str, TensorEntry], base: BaseInfo, modules: Mapping[str, ModuleSpec]) -> None:
    _check_names(entries, base, modules)
    for module, spec in modules.items():
        _check_shapes(entries, base, module, spec.rank)


def _key(module: str, side: str) -> str:
    return f"{_PREFIX}{module}.lora_{side}.weight"


def _check_names(entries: Mapping[str, TensorEntry], base: BaseInfo, modules: Mapping[str, ModuleSpec]) -> None:
    """Every tensor must belong to a targeted module, and every targeted module must have both of its tensors."""
    for name in entries:
        found = _KEY.fullmatch(name)
        if found is None or found[1] not in modules:
            raise InvalidAdapter(_why_unknown(name, found[1] if found else None, base), param=name)
    for module in modules:
        for side in "AB":
            if _key(module, side) not in entries:
                raise InvalidAdapter(
                    f"{module} is targeted by the config but has no lora_{side}.weight", param=_key(module, side)
                )


def _why_unknown(name: str, module: str | None, base: BaseInfo) -> str:
    shown = name[:200]
    if module in base.linears:
        return f"{shown}: the config does not target {module}"
    for part, what in _UNSUPPORTED_KEYS:
        if part in name:
            return f"{shown} is {what}"
    if module is None:
        return f"{shown} is not of the form {_PREFIX}<module>.lora_A.weight or lora_B.weight"
    if module in base.other_modules:
        return f"{shown}: {module} is not a linear layer that this server adapts"
    return f"{shown} matches no module of {base.name}"


def _check_shapes(entries: Mapping[str, TensorEntry], base: BaseInfo, module: str, rank: int) -> None:
    linear = base.linears[module]
    for side, wanted in (("A", (rank, linear.in_features)), ("B", (linear.out_features, rank))):
        name = _key(module, side)
        if entries[name].shape != wanted:
            raise InvalidAdapter(
                f"{name} has shape {list(entries[name].shape)}; the config and the base model ask for {list(wanted)}",
                param=name,
            )


def _read_pair(
    file: BinaryIO, entries: Mapping[str, TensorEntry], module: str, scaling: float, dtype: torch.dtype
) -> LoraPair:
    stored_a, stored_b = (_read_tensor(file, entries[key], key) for key in (_key(module, "A"), _key(module, "B")))
    pair = LoraPair(torch.empty(stored_a.shape, dtype=dtype), torch.empty(stored_b.shape[::-1], dtype=dtype))
    _convert(stored_a, stored_b, scaling, pair)
    _check_finite(module, stored_a, stored_b, pair)
    return pair


def _convert(stored_a: torch.Tensor, stored_b: torch.Tensor, scaling: float, pair: LoraPair) -> None:
    """Fills `pair` with the served form."""
    pair.a.copy_(stored_a)
    pair.b.copy_((stored_b.to(torch.float32) * scaling).t())


def _check_finite(module: str, stored_a: torch.Tensor, stored_b: torch.Tensor, pair: LoraPair) -> None:
    # Neither the cast nor the scaling makes a finite value of one that is not (even 0 x Inf is NaN), so the served
    # form is looked at first and the stored one only to say why.
    for side, stored, served in (("A", stored_a, pair.a), ("B", stored_b, pair.b)):
        if not _finite(served):
            name = _key(module, side)
            reason = "overflows in the serving dtype with the scaling folded in" if _finite(stored) else "is not finite"
            raise InvalidAdapter(f"{name}: a value {reason}", param=name)


def _stored(weights: bytearray, entry: TensorEntry) -> torch.Tensor:
    """A tensor of the file as it lies in `weights`; one at an odd place is copied to where its values can be read."""
    dtype, start = _DTYPES[entry.dtype], entry.start
    if start % dtype.itemsize:
        weights, start = weights[start : start + entry.nbytes], 0
    return torch.frombuffer(weights, dtype=dtype, count=math.prod(entry.shape), offset=start).view(entry.shape)


def _read_tensor(file: BinaryIO, entry: TensorEntry, name: str) -> torch.Tensor:
    """One tensor, read into memory of its own (a mapped file that shrinks would kill the process)."""
    tensor = torch.empty(entry.shape, dtype=_DTYPES[entry.dtype])
    view = memoryview(tensor.view(torch.uint8).reshape(-1).numpy().data)
    file.seek(entry.start)
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise InvalidAdapter(f"{name}: the file ends before the tensor does", param=name)
        view = view[count:]
    return tensor


def _finite(tensor: torch.Tensor) -> bool:
    """Whether every value is finite. The float32 sum answers in one pass; a sum that overflows asks each value."""
    return math.isfinite(tensor.sum(dtype=torch.float32).item()) or bool(torch.isfinite(tensor).all())


def _has_effect(pair: LoraPair) -> bool:
    """Whether b^T a is anything but zero: a random float64 vector through it sees every effect, cancelled ones too.

    Rank r gives `hidden[r] * b[r, o]` to output o; the sum over r must stand out of its own rounding.
    """
    if not pair.b.any() or not pair.a.any():
        return False
    generator = torch.Generator().manual_seed(0x0B5E)
    probe = torch.randn(pair.a.shape[1], generator=generator, dtype=torch.float64)
    a, b = pair.a.to(torch.float64), pair.b.to(torch.float64)
    hidden = a @ probe
    size = (a.abs() @ probe.abs()) @ b.abs()
    return bool(((hidden @ b).abs() > _CANCELLED * size).any())
