"""On CUDA the app runs steps by the kernels' runner, and tells it of every adapter that leaves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from server import app
from server.engine import device, graphs
from server.lora.weights import AdapterWeights
from server.settings import Settings


class Fake:
    """Notes what it was made with, and what was asked of it."""

    def __init__(self, base: Any, **options: Any):
        self.base, self.options = base, options
        self.warmed = False
        self.forgotten: list[str] = []

    def warm(self) -> None:
        self.warmed = True

    def forget(self, digest: str) -> None:
        self.forgotten.append(digest)


def test_a_cuda_base_gets_kernels_graphs_and_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "DeviceRunner", Fake)
    monkeypatch.setattr(graphs, "CudaCapture", lambda: "capture")
    settings = Settings(adapter_slots=2, max_rank=32, max_running=9)
    base: Any = SimpleNamespace(device=torch.device("cuda"))
    runner, bank = app.runner_and_bank(settings, base, blocks=50, longest=700)
    assert isinstance(runner, Fake)
    assert runner.warmed
    assert runner.options == {
        "blocks": 50,
        "block_size": app.BLOCK_SIZE,
        "slots": 2,
        "max_rank": 32,
        "most_rows": 9,
        "longest": 700,
        "capture": "capture",
    }
    for digest in "abc":
        assert bank.reserve(digest)
        bank.fill(digest, AdapterWeights(digest, {}, 1, 0))
    assert runner.forgotten == ["a"]
