"""The kernels compile for the GPUs that they are meant for; no GPU is needed for that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[2]


def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    """In a process of its own: this one has the interpreter in the compiler's place."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.compile_kernels"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    for kernel in ("_shrink", "_expand", "_write", "_attend", "_combine"):
        for dtype in ("float32", "bfloat16"):
            assert f"{kernel} torch.{dtype}" in result.stdout
