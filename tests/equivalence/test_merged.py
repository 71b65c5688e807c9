"""A merged lane gives what PEFT's merge_and_unload gives; the base is untouched; lanes do not meet."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from server.engine import automerge
from server.engine.messages import Merge
from server.kernels.ops import Kernels
from server.lora.layers import LoraStep
from tests.families import ATTENTION, FAMILIES, VOCABULARY, Oracle, prompts_of, save_adapter, save_model
from tests.harness import Harness, Lanes, dear, fresh_base, running


def digest_of(engine: Harness) -> str:
    """Over every weight of the base as the steps read it."""
    whole = hashlib.sha256()
    for group in engine.runner.lora.groups:
        for dense in group.own.dense:
            whole.update(dense.weights().view(torch.uint8).numpy().tobytes())
    for tensor in engine.base.model.state_dict().values():
        whole.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
def test_merged_is_what_peft_merges(family: str, kernels: bool, models: Path) -> None:
    """In float32: greedy tokens, and their log-probabilities, against PEFT's own merged model."""
    folder = save_model(family, models / f"merged-{family}")
    linears = FAMILIES[family].linears
    adapters = [
        save_adapter(folder, models / f"merged-{family}-{at}", seed=70 + at, r=rank, target_modules=targets)
        for at, (rank, targets) in enumerate([(4, linears), (8, linears[:1])])
    ]
    oracle, prompts = Oracle(folder), prompts_of((3, 40), VOCABULARY, seed=8)
    with running(fresh_base(folder, kernels=kernels), merged_bytes=2**30) as engine:
        lanes = Lanes(engine)
        for adapter in adapters:
            lanes.merge(adapter)
        requests = [
            {"prompt": prompt, "adapter": adapter, "max_tokens": 12, "logprobs": 0}
            for prompt in prompts
            for adapter in (*adapters, None)
        ]
        for request, answer in zip(requests, engine.run(*requests), strict=True):
            assert answer.done is not None
            assert answer.done.residency.merged == (request["adapter"] is not None)
            merged = oracle.merged_logprobs(request["prompt"], answer.tokens(), request["adapter"])
            for place, (token, given) in enumerate(zip(answer.tokens(), answer.logprobs(), strict=True)):
                assert merged[place].max() - merged[place, token] < 1e-4
                assert abs(float(merged[place, token]) - given.logprob) < 1e-3


@pytest.fixture(scope="module")
def folder(models: Path) -> Path:
    return save_model("llama", models / "merged-base")


@pytest.fixture(scope="module")
def adapters(folder: Path, models: Path) -> list[Path]:
    return [
        save_adapter(folder, models / f"lane-{at}", seed=300 + at, r=1 + at % 4, target_modules=ATTENTION)
        for at in range(10)
    ]


def test_no_lora_op_in_a_merged_step(folder: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with running(fresh_base(folder), merged_bytes=2**30) as engine:
        Lanes(engine).merge(adapters[0])
        seen: list[bool] = []
        lora: LoraStep = engine.runner.lora
        forward = engine.runner._forward

        def watched(batch: Any, copy: Any) -> Any:
            assert batch.lora is None or copy is None
            seen.append(copy is not None and batch.lora is None)
            return forward(batch, copy)

        monkeypatch.setattr(engine.runner, "_forward", watched)
        kernels: Kernels = engine.base.kernels  # type: ignore[assignment]
        before = kernels.spent[1]
        engine.run({"prompt": [5, 6, 7], "adapter": adapters[0]}, {"prompt": [5, 6, 7], "adapter": adapters[0]})
        assert kernels.spent[1] == before, "no time goes to adapters"
        assert seen
        assert all(seen)
        assert lora.merged is None


def test_a_thousand_cycles_leave_the_base_as_it_was(folder: Path, adapters: list[Path]) -> None:
    with running(fresh_base(folder), merged_bytes=2**30) as engine:
        lanes, before, grown = Lanes(engine), digest_of(engine), []
        for cycle in range(1000):
            adapter = adapters[cycle % 10]
            lanes.merge(adapter)
            if cycle % 100 == 0:
                assert engine.run({"prompt": [9, 8, 7], "adapter": adapter})[0].done.residency.merged  # type: ignore[union-attr]
            lanes.unmerge(adapter)
            if cycle in (199, 999):
                grown.append(psutil.Process().memory_info().rss)
        assert engine.engine._merged.nbytes == 0
        assert digest_of(engine) == before
        assert grown[1] - grown[0] < 8 * 2**20


def test_requests_finish_where_they_began(folder: Path, adapters: list[Path]) -> None:
    """The lane changes twice under way: the answers are those of undisturbed requests, in the lanes of their starts."""
    prompt = prompts_of((30,), VOCABULARY, seed=4)[0]
    with running(fresh_base(folder), merged_bytes=2**30, prefix_cache=False) as engine:
        lanes = Lanes(engine)
        long = {"adapter": adapters[3], "max_tokens": 200}
        first = engine.submit(prompt, **long)
        lanes.merge(adapters[3])
        second = engine.submit(prompt, **long)
        lanes.unmerge(adapters[3])
        third = engine.submit(prompt, **long)
        answers = [engine.wait(one) for one in (first, second, third)]
        assert [one.done.residency.merged for one in answers] == [False, True, False]  # type: ignore[union-attr]
        assert answers[0].tokens() == answers[2].tokens()
        assert engine.engine._merged.nbytes == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_narrow_formats_it_is_as_near_to_peft_as_the_shared_lane(
    folder: Path, adapters: list[Path], dtype: str
) -> None:
    """Both against PEFT's merge in float32, each on the tokens of its own answer."""
    oracle, prompts = Oracle(folder), prompts_of((3, 20, 40, 60), VOCABULARY, seed=8)
    requests = [
        {"prompt": prompt, "adapter": adapter, "max_tokens": 24, "logprobs": 0}
        for prompt in prompts
        for adapter in adapters[:4]
    ]

    def errors(answers: list[Any]) -> torch.Tensor:
        found = []
        for request, answer in zip(requests, answers, strict=True):
            right = oracle.merged_logprobs(request["prompt"], answer.tokens(), request["adapter"])
            chosen = zip(answer.tokens(), answer.logprobs(), strict=True)
            found += [abs(float(right[at, token]) - given.logprob) for at, (token, given) in enumerate(chosen)]
        return torch.tensor(found)

    with running(fresh_base(folder, dtype), prefix_cache=False) as engine:
        shared, lanes = errors(engine.run(*requests)), Lanes(engine)
        for adapter in adapters[:4]:
            lanes.merge(adapter)
        answers = engine.run(*requests)
        assert all(answer.done.residency.merged for answer in answers)  # type: ignore[union-attr]
        merged = errors(answers)
    assert merged.mean() < 1.5 * shared.mean()
    assert merged.max() < 2 * shared.max()


@pytest.mark.parametrize("blocks", [256, 4])
def test_costs_are_measured_at_the_start(folder: Path, adapters: list[Path], blocks: int) -> None:
    """And the pool is whole afterwards, however few blocks it has."""
    with running(fresh_base(folder), auto_merge=True, blocks=blocks, max_running=8) as engine:
        auto = engine.engine._turns.auto
        assert auto is not None
        for rows in range(1, 9):
            assert 0 < auto.costs.shared_seconds(rows, 0) < 1
            assert 0 < auto.costs.merged_seconds(rows) < 1
        assert engine.scheduler.pool.used == 0
        prompt = prompts_of((30,), VOCABULARY, seed=4)[0]
        assert engine.run({"prompt": prompt, "adapter": adapters[0]})[0].done.outcome == "finished"  # type: ignore[union-attr]


def test_an_adapter_that_is_alone_gets_a_lane_without_being_asked(
    folder: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(automerge, "PATIENCE", 0.05)
    monkeypatch.setattr(automerge, "TICK", 0.01)
    caplog.set_level(logging.INFO, "onebase.engine")
    request = {"prompt": prompts_of((30,), VOCABULARY, seed=4)[0], "adapter": adapters[3], "max_tokens": 100}
    with running(fresh_base(folder), auto_merge=True, prefix_cache=False) as engine:
        engine.engine._turns.auto.costs = dear()  # type: ignore[union-attr]
        shared = engine.run(request)[0]
        assert not shared.done.residency.merged  # type: ignore[union-attr]
        for _ in range(100):
            merged = engine.run(request)[0]
            if merged.done.residency.merged:  # type: ignore[union-attr]
                break
        assert merged.done.residency.merged  # type: ignore[union-attr]
        assert merged.tokens() == shared.tokens()
        stats = engine.engine.stats
        assert stats.copies[engine.ref(adapters[3])].automatic  # type: ignore[index]
        assert stats.lane_changes == {("merge", "alone"): 1}
        assert not stats.merged_byte_seconds, "nobody asked for it, nobody pays"
        assert "gets a lane of its own (alone)" in caplog.text


def test_a_weight_that_overflows_is_refused(folder: Path, models: Path) -> None:
    """In float16 its sum with the base is too large; each of both is not."""
    base = fresh_base(folder, "float16")
    huge = save_adapter(folder, models / "lane-huge", seed=1, r=1, target_modules=["q_proj"], std=250.0)
    with running(base, merged_bytes=2**30) as engine:
        change = Lanes(engine).change(Merge, huge, False)
        assert change.error is not None
        assert "overflows float16" in change.error.message
