"""The CUDA path through the whole engine gives what transformers and PEFT give; interpreted where there is no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from server.model.loader import Base, load_base
from tests.device import Recorder, device_runner
from tests.exactness import assert_same
from tests.families import FAMILIES, VOCABULARY, Oracle, prompts_of, save_adapter, save_model
from tests.harness import running
from tests.kernelcases import DEVICE


def base_at(folder: Path) -> Base:
    return load_base(str(folder), folder.parent / "data", dtype="float32", device=DEVICE.type)


def made(family: str, folder: Path, ranks: tuple[int, ...]) -> tuple[Path, list[Path]]:
    base = save_model(family, folder / "base")
    linears = FAMILIES[family].linears
    adapters = [
        save_adapter(base, folder / f"a{at}", seed=at, r=rank, target_modules=linears) for at, rank in enumerate(ranks)
    ]
    return base, adapters


def check(oracle: Oracle, harness: Any, requests: list[dict[str, Any]]) -> None:
    for request, answer in zip(requests, harness.run(*requests), strict=True):
        assert_same(oracle, request["prompt"], request["adapter"], answer)
        assert len(answer.tokens()) == request["max_tokens"]


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "gpt2"])
def test_families_with_mixed_adapters(family: str, tmp_path: Path) -> None:
    """Prompts in chunks beside decodes, rows of the base and of two ranks; a window in mistral, fused qkv in phi3."""
    folder, adapters = made(family, tmp_path, (3, 16))
    requests = [
        {"prompt": prompt, "adapter": adapter, "max_tokens": 3, "logprobs": 1}
        for prompt, adapter in zip(prompts_of((1, 40, 23), VOCABULARY), (None, *adapters), strict=True)
    ]
    with running(base_at(folder), max_batch_tokens=24, runner=device_runner()) as harness:
        check(Oracle(folder), harness, requests)


def test_graphs_give_the_same_and_are_used(tmp_path: Path) -> None:
    """Rows come and go, so the same graphs run with other rows, adapters and padding; slots are used again."""
    folder, adapters = made("llama", tmp_path, (2, 8, 4))
    recorder = Recorder()
    requests = [
        {"prompt": prompt, "adapter": adapter, "max_tokens": tokens, "logprobs": 0}
        for prompt, adapter, tokens in zip(
            prompts_of((5, 17, 2, 9), VOCABULARY),
            (adapters[0], None, adapters[1], adapters[2]),
            (6, 3, 5, 2),
            strict=True,
        )
    ]
    with running(base_at(folder), slots=2, runner=device_runner(recorder, slots=2, longest=64)) as harness:
        assert len(recorder.graphs) == 2 * 3  # 1, 2 and 4 rows, with adapters and without
        check(Oracle(folder), harness, requests)
        assert harness.bank.evictions > 0
        assert len(harness.runner.tables) == 2
    if DEVICE.type == "cpu":
        assert sum(graph.replays for graph in recorder.graphs) >= 4
