"""An adapter packed into one piece of memory and seen through views of it."""

from __future__ import annotations

import pytest
import torch

from server.engine.uploading import Uploader
from server.lora.flat import ALIGNMENT, pack, unpack
from server.lora.weights import AdapterWeights, LoraPair


def adapter(dtype: torch.dtype) -> AdapterWeights:
    pairs = {
        f"m{at}": LoraPair(torch.randn(rank, 7).to(dtype), torch.randn(rank, 13).to(dtype))
        for at, rank in enumerate((1, 3, 16))
    }
    return AdapterWeights("sha256:1", pairs, 16, sum(p.a.nbytes + p.b.nbytes for p in pairs.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_unpacked_is_what_was_packed(dtype: torch.dtype) -> None:
    weights = adapter(dtype)
    flat = pack(weights)
    assert flat.dtype == torch.uint8
    assert weights.nbytes <= len(flat) < weights.nbytes + 6 * ALIGNMENT
    back = unpack(weights, flat.clone())
    assert list(back.modules) == list(weights.modules)
    assert (back.key, back.rank, back.nbytes) == (weights.key, weights.rank, weights.nbytes)
    for name, pair in weights.modules.items():
        assert torch.equal(back.modules[name].a, pair.a)
        assert torch.equal(back.modules[name].b, pair.b)


def test_views_are_aligned_contiguous_and_of_one_memory() -> None:
    weights = adapter(torch.bfloat16)
    flat = pack(weights)
    tensors = [tensor for pair in unpack(weights, flat).modules.values() for tensor in (pair.a, pair.b)]
    for tensor in tensors:
        assert (tensor.data_ptr() - flat.data_ptr()) % ALIGNMENT == 0
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    ends = [tensor.data_ptr() + tensor.nbytes for tensor in tensors]
    assert all(end <= later.data_ptr() for end, later in zip(ends, tensors[1:], strict=False))


def test_an_adapter_of_no_modules_is_no_bytes() -> None:
    nothing = AdapterWeights("sha256:2", {}, 0, 0)
    assert unpack(nothing, pack(nothing)).modules == {}


def test_on_the_cpu_nothing_is_copied() -> None:
    weights = adapter(torch.float32)
    assert Uploader(torch.device("cpu"))(weights) is weights
