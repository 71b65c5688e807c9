"""On a CUDA device: every family and a mixed batch give what the CPU oracle gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.model.loader import load_base
from tests.exactness import assert_same
from tests.families import FAMILIES, VOCABULARY, Oracle, prompts_of, save_adapter, save_model
from tests.harness import running

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", list(FAMILIES))
def test_mixed_batch_on_the_device(family: str, tmp_path: Path) -> None:
    folder = save_model(family, tmp_path / "base")
    linears = FAMILIES[family].linears
    adapters = [
        save_adapter(folder, tmp_path / f"a{at}", seed=at, r=rank, target_modules=linears)
        for at, rank in enumerate((1, 8, 16))
    ]
    base = load_base(str(folder), tmp_path / "data", dtype="float32", device="cuda")
    requests = [
        {"prompt": prompt, "adapter": adapter, "max_tokens": 12, "logprobs": 1}
        for prompt in prompts_of((1, 9, 50, 80), VOCABULARY)
        for adapter in (None, *adapters)
    ]
    oracle = Oracle(folder)
    with running(base, max_batch_tokens=64, slots=2) as harness:
        for request, answer in zip(requests, harness.run(*requests), strict=True):
            assert_same(oracle, request["prompt"], request["adapter"], answer)  # type: ignore[arg-type]
