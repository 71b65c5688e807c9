"""The CUDA path through the whole engine gives what transformers and PEFT give; interpreted where there is no GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from server.engine import layout
from server.engine.scheduler import Work
from server.engine.uploading import Uploader
from server.lora.weights import read_adapter
from server.model.loader import Base, load_base
from tests.device import Recorder, device_runner
from tests.exactness import assert_same
from tests.families import FAMILIES, VOCABULARY, Oracle, prompts_of, save_adapter, save_model
from tests.harness import Lanes, running
from tests.kernelcases import DEVICE


def base_at(folder: Path) -> Base:
    return load_base(str(folder), folder.parent / "data", dtype="float32", device=DEVICE.type, kernels=False)


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


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_a_merged_copy_beside_the_others(family: str, tmp_path: Path) -> None:
    """One adapter merged, one shared, and the base, with graphs where they can be used; then the copy is given up."""
    folder, adapters = made(family, tmp_path, (2, 8))
    requests = [
        {"prompt": prompt, "adapter": adapter, "max_tokens": 4}
        for prompt in prompts_of((3, 30), VOCABULARY, seed=6)
        for adapter in (*adapters, None)
    ]
    with running(base_at(folder), max_batch_tokens=24, runner=device_runner(Recorder())) as harness:
        before = [group.weight.clone() for group in harness.runner._adapters.groups]
        lanes = Lanes(harness)
        lanes.merge(adapters[0])
        answers = harness.run(*requests)
        for request, answer in zip(requests, answers, strict=True):
            assert_same(Oracle(folder), request["prompt"], request["adapter"], answer)
            assert answer.done is not None
            assert answer.done.residency.merged == (request["adapter"] == adapters[0])
        lanes.unmerge(adapters[0])
        assert harness.engine._merged.nbytes == 0
        check(Oracle(folder), harness, requests[:3])
        for group, weight in zip(harness.runner._adapters.groups, before, strict=True):
            assert torch.equal(group.weight, weight)


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


def sequence(prompt: list[int], first: int, weights: Any) -> Any:
    """What the runner needs of a sequence whose blocks begin at `first`."""
    blocks = list(range(first, first + 4))
    return SimpleNamespace(
        tokens=prompt, computed=0, pending=1, blocks=blocks, request=SimpleNamespace(weights=weights)
    )


def test_a_padded_step_has_the_logits_of_the_step_itself(tmp_path: Path) -> None:
    folder, [adapter] = made("llama", tmp_path, (4,))
    base = base_at(folder)
    config, weights = (adapter / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    read = read_adapter("sha256:1", config.read_bytes(), bytearray(weights.read_bytes()), base.info, base.dtype)
    read = Uploader(base.device)(read)
    runner = device_runner(Recorder(), longest=64)(base, blocks=16, block_size=16)
    sequences = [
        sequence(prompt, 4 * at, read if at else None)
        for at, prompt in enumerate(prompts_of((20, 5, 33), VOCABULARY, seed=3))
    ]
    with torch.inference_mode():
        for one in sequences:
            slot = layout.BASE if one.request.weights is None else runner.tables.put(read)
            runner._eager(layout.arrange([Work(one, len(one.tokens) - 1)], [slot]), [0])
            one.computed = len(one.tokens) - 1
        rows = layout.arrange([Work(one, 1) for one in sequences], [layout.BASE, 0, 0])
        padded = runner._graphs.run(rows).clone()
        itself = runner._eager(rows, [0, 1, 2])
        assert padded.shape == itself.shape
        torch.testing.assert_close(padded, itself, rtol=1e-4, atol=1e-4)
        # Padding leaves the blocks of others alone.
        again = runner._graphs.run(rows)
        torch.testing.assert_close(again, padded, rtol=0, atol=0)


def test_a_base_that_cannot_be_captured_runs_without_graphs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(work: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    folder, [adapter] = made("llama", tmp_path, (4,))
    requests = [{"prompt": [5, 6, 7], "adapter": adapter, "max_tokens": 2}]
    with running(base_at(folder), runner=device_runner(refuse)) as harness:
        assert "without CUDA graphs" in caplog.text
        check(Oracle(folder), harness, requests)
