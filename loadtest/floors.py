"""What the machine itself can do: the rate at which memory is read, and matmul rates at the shapes that count.

A comparison is measured between two runs of this; figures from between two different machines count for nothing.
`python -m loadtest.floors` prints JSON: gigabytes and gigaflops a second, the best of several, for what else ran on the
machine for a moment is not the machine.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable

import torch

REPEATS = 15
READ_BYTES = 1 << 30
FLOP = 8e9  # of one repeat
HIDDEN, INNER, VOCABULARY = 576, 1536, 49_152  # of SmolLM2-135M
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PREFILL_ROWS = 256  # a prefill chunk


def floors() -> dict[str, float]:
    """Every figure by its name; the unit is its end."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with torch.inference_mode():
        found = {"read GB/s": _read()}
        for name, dtype in DTYPES.items():
            found[f"stream {name} 1 row GB/s"] = _stream(dtype, 1)
            found[f"stream {name} 16 rows GB/s"] = _stream(dtype, 16)
            found[f"matmul {name} 16 rows, head GFLOP/s"] = _matmul(dtype, 16, HIDDEN, VOCABULARY)
            found[f"matmul {name} {PREFILL_ROWS} rows GFLOP/s"] = _matmul(dtype, PREFILL_ROWS, HIDDEN, INNER)
            found[f"matmul {name} 2048 rows GFLOP/s"] = _matmul(dtype, 2048, HIDDEN, INNER)
    return found


def _read() -> float:
    values = torch.ones(READ_BYTES // 4)
    return READ_BYTES / _seconds(values.amax) / 1e9  # faster than a sum


def _stream(dtype: torch.dtype, rows: int) -> float:
    """Weights too many for the caches, each packed for oneDNN and used once, as in a decode step."""
    weights = [
        torch.ops.mkldnn._reorder_linear_weight(torch.randn(INNER, HIDDEN).to(dtype), rows)
        for _ in range(READ_BYTES // 4 // (INNER * HIDDEN))
    ]
    x = torch.randn(rows, HIDDEN).to(dtype)

    def step() -> None:
        for weight in weights:
            torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    return len(weights) * INNER * HIDDEN * dtype.itemsize / _seconds(step) / 1e9


def _matmul(dtype: torch.dtype, rows: int, into: int, out: int) -> float:
    x = torch.randn(rows, into).to(dtype)
    weight = torch.ops.mkldnn._reorder_linear_weight(torch.randn(out, into).to(dtype), rows)
    times = max(1, int(FLOP / (2 * rows * into * out)))

    def several() -> None:
        for _ in range(times):
            torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    return 2 * rows * into * out * times / _seconds(several) / 1e9


def _seconds(function: Callable[[], object]) -> float:
    found = []
    for at in range(REPEATS + 1):
        start = time.perf_counter()
        function()
        if at:  # the first one warms up
            found.append(time.perf_counter() - start)
    return min(found)


if __name__ == "__main__":
    print(json.dumps(floors()))
