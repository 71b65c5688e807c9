"""On a CUDA device: every family and a mixed batch give what the CPU oracle gives, with graphs and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from server.model.loader import load_base
from tests.device import Recorder, device_runner
from tests.exactness import assert_same
from tests.families import FAMILIES, VOCABULARY, Oracle, prompts_of, save_adapter, save_model
from tests.harness import running

pytestmark = pytest.mark.gpu


def requests_of(adapters: list[Path], tokens: int = 12) -> list[dict[str, Any]]:
    return [
        {"prompt": prompt, "adapter": adapter, "max_tokens": tokens, "logprobs": 1}
        for prompt in prompts_of((1, 9, 50, 80), VOCABULARY)
        for adapter in (None, *adapters)
    ]


def made(family: str, folder: Path) -> tuple[Path, list[Path]]:
    base = save_model(family, folder / "base")
    linears = FAMILIES[family].linears
    ranks = (1, 8, 16)
    adapters = [
        save_adapter(base, folder / f"a{at}", seed=at, r=rank, target_modules=linears) for at, rank in enumerate(ranks)
    ]
    return base, adapters


@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "graphs"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_mixed_batch_on_the_device(family: str, graphs: bool, tmp_path: Path) -> None:
    """More requests than rows and more adapters than slots, so that rows, padding and slots change all the time."""
    folder, adapters = made(family, tmp_path)
    base = load_base(str(folder), tmp_path / "data", dtype="float32", device="cuda")
    requests, oracle = requests_of(adapters), Oracle(folder)
    runner = device_runner(Recorder() if graphs else None, slots=2, most_rows=10)
    with running(base, max_batch_tokens=64, max_running=10, slots=2, runner=runner) as harness:
        for request, answer in zip(requests, harness.run(*requests), strict=True):
            assert_same(oracle, request["prompt"], request["adapter"], answer)
        assert harness.bank.evictions > 0


def test_graphs_and_launches_choose_the_same_tokens(tmp_path: Path) -> None:
    folder, adapters = made("llama", tmp_path)
    answers = []
    for capture in (Recorder(), None):
        base = load_base(str(folder), tmp_path / "data", dtype="float32", device="cuda")
        with running(base, slots=4, runner=device_runner(capture, slots=4, most_rows=16)) as harness:
            done = harness.run(*requests_of(adapters, tokens=40))
        answers.append([answer.tokens() for answer in done])
    assert answers[0] == answers[1]


def test_preempted_rows_come_back_the_same(tmp_path: Path) -> None:
    """Blocks are handed on with other rows' keys and values still in them."""
    folder, adapters = made("llama", tmp_path)
    base = load_base(str(folder), tmp_path / "data", dtype="float32", device="cuda")
    requests, oracle = requests_of(adapters), Oracle(folder)
    with running(base, blocks=14, slots=4, runner=device_runner(Recorder(), slots=4, most_rows=16)) as harness:
        for request, answer in zip(requests, harness.run(*requests), strict=True):
            assert_same(oracle, request["prompt"], request["adapter"], answer)
        assert harness.engine.stats.preemptions > 0
