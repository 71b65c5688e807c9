"""What the Triton kernels must compute, in plain torch and float64; the same cases run interpreted and on a GPU."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from server.core import BaseInfo, LinearShape
from server.lora.weights import AdapterWeights, LoraPair

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
RANKS = (1, 4, 8, 16, 64)
BLOCK = 16


def teach_the_interpreter_bfloat16() -> None:
    """Triton's interpreter keeps bfloat16 as its 16 bits, and multiplies those as integers in a dot (3.6, 3.7)."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    teach_the_interpreter_bfloat16()


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The relative error in the Euclidean norm; infinite when a value is not finite."""
    got, wanted = got.double().cpu(), wanted.double().cpu()
    distance = (got - wanted).norm() / wanted.norm().clamp_min(1e-9)
    return distance.item() if torch.isfinite(got).all() else float("inf")


def popularity(kind: str, rows: int, seed: int) -> list[int]:
    """Punica's four: which adapter each of `rows` rows asks for, the rows of one adapter together."""
    chooser = random.Random(seed)
    if kind == "identical":
        return [0] * rows
    if kind == "distinct":
        return list(range(rows))
    if kind == "uniform":
        return sorted(chooser.randrange(max(round(rows**0.5), 1)) for _ in range(rows))
    return sorted(min(int(chooser.expovariate(0.405)), rows - 1) for _ in range(rows))  # geometric, ratio 1.5


def runs_of(owners: Sequence[int], lengths: Sequence[int], gap: int = 1) -> list[tuple[int, int, int]]:
    """(start, end, adapter) of neighbouring rows of one adapter, after `gap` tokens of no adapter."""
    runs: list[tuple[int, int, int]] = []
    at = gap
    for owner, length in zip(owners, lengths, strict=True):
        if runs and runs[-1][2] == owner:
            runs[-1] = (runs[-1][0], at + length, owner)
        else:
            runs.append((at, at + length, owner))
        at += length
    return runs


def segments(runs: Sequence[tuple[int, int, int]]) -> Any:
    """The segments of the runs (start, end, slot), on the device."""
    from server.lora.ops_triton import Segments, cut, is_long

    pieces = torch.tensor(cut(runs, is_long(runs)) or [(0, 0, 0)], dtype=torch.int32)
    starts, ends, slots = (column.contiguous().to(DEVICE) for column in pieces.unbind(1))
    return Segments(starts, ends, slots, is_long(runs))


def decode_tiles(tokens: torch.Tensor, positions: torch.Tensor, splits: int) -> Any:
    """One tile for each decode row: its packed token and its position [rows]; row r uses the block table's row r."""
    from server.model.paged_triton import Tiles

    rows = torch.arange(len(tokens), device=tokens.device)
    columns = (tokens, torch.ones_like(tokens), positions, rows)
    return Tiles(torch.stack([column.to(torch.int32) for column in columns], 1), 1, splits)


def base_of(shapes: dict[str, tuple[int, int]]) -> BaseInfo:
    """A base of these linears, name -> (in, out)."""
    linears = {name: LinearShape(*shape) for name, shape in shapes.items()}
    return BaseInfo("tiny", frozenset(), "sha256:0", "llama", "LlamaForCausalLM", linears)


def adapter_of(
    info: BaseInfo, digest: str, rank: int, dtype: torch.dtype, *, lacks: Sequence[str] = (), seed: int = 0
) -> AdapterWeights:
    """A random adapter on all of the base's linears but `lacks`, on the device."""
    maker = torch.Generator().manual_seed(hash((digest, seed)) % (1 << 31))
    pairs = {}
    for name, shape in info.linears.items():
        if name not in lacks:
            a = torch.randn(rank, shape.in_features, generator=maker) / shape.in_features**0.5
            b = torch.randn(rank, shape.out_features, generator=maker) / rank**0.5
            pairs[name] = LoraPair(a.to(DEVICE, dtype), b.to(DEVICE, dtype))
    return AdapterWeights(digest, pairs, rank, sum(p.a.nbytes + p.b.nbytes for p in pairs.values()))


def lora(
    x: torch.Tensor, y: torch.Tensor, names: Sequence[str], runs: Sequence[tuple[int, int, AdapterWeights]]
) -> torch.Tensor:
    """What y must become: each run's adapter added to the group's outputs, side by side."""
    wanted, column = y.double(), 0
    for name in names:
        width = 0
        for start, end, adapter in runs:
            pair = adapter.modules.get(name)
            if pair is not None:
                width = pair.b.shape[1]
                delta = x[start:end].double() @ pair.a.double().t() @ pair.b.double()
                wanted[start:end, column : column + width] += delta
        column += width
    return wanted


@dataclass
class Paged:
    """Rows of given contexts in a pool whose every other value is NaN."""

    contexts: Sequence[int]
    kv_heads: int
    dim: int
    value_dim: int
    dtype: torch.dtype
    seed: int = 0

    def __post_init__(self) -> None:
        maker = torch.Generator().manual_seed(self.seed)
        blocks = [-(-context // BLOCK) for context in self.contexts]
        order = torch.randperm(sum(blocks) + 3, generator=maker)
        pool = len(order) * BLOCK
        self.keys = torch.full((self.kv_heads, pool, self.dim), float("nan"), dtype=self.dtype, device=DEVICE)
        self.values = torch.full((self.kv_heads, pool, self.value_dim), float("nan"), dtype=self.dtype, device=DEVICE)
        self.tables = torch.full((len(blocks), max(blocks) + 1), int(order[-1]), dtype=torch.int32)
        self.rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.slots: list[torch.Tensor] = []
        at = 0
        for row, context in enumerate(self.contexts):
            own = order[at : at + blocks[row]]
            at += blocks[row]
            self.tables[row, : len(own)] = own.to(torch.int32)
            places = torch.arange(context)
            self.slots.append((own[places // BLOCK] * BLOCK + places % BLOCK).to(DEVICE))
            key = torch.randn(context, self.kv_heads, self.dim, generator=maker)
            value = torch.randn(context, self.kv_heads, self.value_dim, generator=maker)
            self.rows.append((key.to(DEVICE, self.dtype), value.to(DEVICE, self.dtype)))
        self.tables = self.tables.to(DEVICE)

    def wanted(self, row: int, position: int, query: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
        """Attention of one query [heads, dim] at `position`: [heads, value_dim] in float64."""
        low = 0 if window is None else max(position - window + 1, 0)
        per = query.shape[0] // self.kv_heads
        key, value = (part[low : position + 1].double().repeat_interleave(per, 1) for part in self.rows[row])
        weights = (torch.einsum("hd,khd->hk", query.double(), key) * scale).softmax(-1)
        return torch.einsum("hk,khd->hd", weights, value)

    def queries(self, tokens: int, heads: int, dtype: Any = None) -> torch.Tensor:
        """[tokens, heads, dim], strided as transformers has them: a transposed view."""
        maker = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(heads, tokens, self.dim, generator=maker).to(DEVICE, dtype or self.dtype).transpose(0, 1)
