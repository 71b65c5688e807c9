"""Compiles every kernel for an H100 or H200 (sm_90), as the given shapes would launch it; needs no GPU.

`python -m tests.compile_kernels` prints one line a kernel. The interpreter takes Python that the compiler refuses, so
passing there is not enough.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from server.lora import ops_triton
from server.lora.tables import AdapterTables
from server.model import paged_triton
from tests.kernelcases import adapter_of, base_of, decode_tiles, segments

TARGET = GPUTarget("cuda", 90, 32)
SHARED = 227 * 1024  # bytes that a program may have
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Compiled:
    """Stands in for a kernel: a launch compiles it and does nothing else."""

    def __init__(self, kernel: Any, label: Callable[[], str]):
        self.kernel, self.label = kernel, label

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *args: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
        names = list(inspect.signature(self.kernel.fn).parameters)
        signature, attributes = dict.fromkeys(names, "constexpr"), {}
        plain = {name for name, p in zip(names, self.kernel.params, strict=True) if p.do_not_specialize}
        for place, (name, value) in enumerate(zip(names, args, strict=False)):
            if isinstance(value, torch.Tensor):
                signature[name] = f"*{_TYPES[value.dtype]}"
                aligned = value.data_ptr() % 16 == 0
            elif isinstance(value, int) and value == 1 and name not in plain:
                constants[name] = 1
                continue
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
                aligned = isinstance(value, int) and value % 16 == 0 and name not in plain
            if aligned:
                attributes[(place,)] = [["tt.divisibility", 16]]
        known = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(self.kernel, signature, constexprs=known, attrs=attributes)
        built = triton.compile(source, target=TARGET, options={"num_warps": num_warps, "num_stages": num_stages})
        assert built.metadata.shared <= SHARED, f"{self.kernel.fn.__name__}: {built.metadata.shared} bytes"
        print(f"{self.kernel.fn.__name__} {self.label()}: {built.metadata.shared} bytes of shared memory")


def lora(dtype: torch.dtype) -> None:
    """q, k and v of an 8B Llama as one group, at decode and at prefill."""
    shapes = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024)}
    info = base_of(shapes)
    tables = AdapterTables(info, slots=32, max_rank=64, dtype=dtype, device=torch.device("cpu"))
    tables.put(adapter_of(info, "a", 16, dtype))
    x, y = torch.empty(100, 4096, dtype=dtype), torch.empty(100, 6144, dtype=dtype)
    for end in (1, 100):
        found = segments([(0, end, 0)])
        ops_triton.add(x, y, tables.group(list(shapes)), found)


def attention(dtype: torch.dtype, dim: int, per: int) -> None:
    """Writing, decoding with and without a split, and prefill."""
    heads = 2
    keys = torch.empty(heads, 64, dim, dtype=dtype)
    new = torch.empty(32, heads, dim, dtype=dtype)
    query, table = torch.empty(32, heads * per, dim, dtype=dtype), torch.zeros(2, 64, dtype=torch.int32)
    tokens = torch.zeros(2, dtype=torch.long)
    paged_triton.write(keys, keys.clone(), torch.zeros(32, dtype=torch.long), new, new)
    tiles = [decode_tiles(tokens, tokens, splits) for splits in (1, 8)]
    queries = paged_triton.queries_for(dtype, dim)
    tiles.append(paged_triton.prefill_tiles([(0, 32, 0, 0)], per, queries, torch.device("cpu")))
    for one in tiles:
        paged_triton.attend(query, keys, keys, table, one, query.clone(), block_size=16, scale=0.1)


def main() -> None:
    label = ""
    for module, names in ((ops_triton, ("_shrink", "_expand")), (paged_triton, ("_write", "_attend", "_combine"))):
        for name in names:
            setattr(module, name, Compiled(getattr(module, name), lambda: label))
    for dtype, sizes in ((torch.bfloat16, ((64, 3), (128, 4), (256, 2))), (torch.float32, ((128, 4),))):
        label = str(dtype)
        lora(dtype)
        for dim, per in sizes:
            label = f"{dtype} dim {dim}, {per} heads a group"
            attention(dtype, dim, per)


if __name__ == "__main__":
    main()
