"""Adapters that come to a device beside the steps: what arrives is what was sent, and memory is not handed on early."""

from __future__ import annotations

import pytest
import torch

from server.engine.uploading import Uploader
from server.lora.weights import AdapterWeights, LoraPair

pytestmark = pytest.mark.gpu


def adapter(value: float, size: int = 1 << 20) -> AdapterWeights:
    pair = LoraPair(torch.full((4, size), value), torch.full((4, size // 2), -value))
    return AdapterWeights(f"sha256:{value}", {"m": pair}, 4, pair.a.nbytes + pair.b.nbytes)


def test_what_arrives_is_what_was_sent() -> None:
    upload = Uploader(torch.device("cuda"))
    for value in (1.0, 2.0, 3.0):
        there = upload(adapter(value)).modules["m"]
        assert there.a.device.type == "cuda"
        assert torch.equal(there.a.cpu(), torch.full_like(there.a, value, device="cpu"))
        assert torch.equal(there.b.cpu(), torch.full_like(there.b, -value, device="cpu"))


def test_memory_of_an_evicted_adapter_waits_for_the_steps_that_read_it() -> None:
    """A slow step that reads the adapter is queued, its last reference goes, and the next one is uploaded."""
    upload = Uploader(torch.device("cuda"))
    busy = torch.randn(4096, 4096, device="cuda")
    sums = []
    for value in range(1, 6):
        there = upload(adapter(float(value)))
        for _ in range(40):
            busy = (busy @ busy).clamp_(-1, 1)
        sums.append(there.modules["m"].a.sum() / there.modules["m"].a.numel())
        del there
    assert [total.item() for total in sums] == [1.0, 2.0, 3.0, 4.0, 5.0]
