"""However a request is batched, cut, cached, preempted or surrounded, its answer is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from server.lora.groups import GroupMember
from tests.exactness import assert_same
from tests.families import ATTENTION, FAMILIES, MLP, VOCABULARY, Oracle, prompts_of, save_adapter, save_model
from tests.harness import fresh_base, running

LENGTHS = (1, 5, 16, 33, 64, 100)


@pytest.fixture(scope="module")
def folder(models: Path) -> Path:
    path = models / "llama"
    return path if path.exists() else save_model("llama", path)


@pytest.fixture(scope="module")
def adapters(folder: Path, models: Path) -> list[Path]:
    shapes = [(2, ATTENTION), (8, ATTENTION + MLP), (5, MLP), (16, ["q_proj", "down_proj"])]
    return [
        save_adapter(folder, models / f"batching-{at}", seed=100 + at, r=rank, target_modules=targets)
        for at, (rank, targets) in enumerate(shapes)
    ]


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)


def requests_of(adapters: list[Path], **more: Any) -> list[dict[str, Any]]:
    prompts = prompts_of(LENGTHS, VOCABULARY, seed=5)
    return [
        {"prompt": prompt, "adapter": adapter, "max_tokens": 20, "logprobs": 0, **more}
        for prompt in prompts
        for adapter in (None, *adapters)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch_tokens": 16},  # every prompt in chunks, mixed with decodes
        {"max_batch_tokens": 2048},  # everything at once
        {"max_running": 1},  # each alone
        {"blocks": 14},  # two or three at a time, preempting each other
        {"slots": 1},  # one adapter at a time
        {"prefix_cache": False, "block_size": 4, "blocks": 512},
    ],
    ids=lambda options: ",".join(f"{key}={value}" for key, value in options.items()),
)
def test_any_way_of_batching(folder: Path, adapters: list[Path], oracle: Oracle, options: dict[str, Any]) -> None:
    requests = requests_of(adapters)
    with running(fresh_base(folder), **options) as harness:
        answers = harness.run(*requests)
        if "blocks" in options and "block_size" not in options:
            assert harness.engine.stats.preemptions > 0
    for request, answer in zip(requests, answers, strict=True):
        assert_same(oracle, request["prompt"], request["adapter"], answer)
        assert len(answer.tokens()) == 20


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_company_and_chunks_change_no_bit(folder: Path, adapters: list[Path], dtype: str) -> None:
    """With the kernels; unless a row is preempted. Twice over, so that the second pass begins in the prefix cache."""

    def answers(**options: Any) -> list[Any]:
        with running(fresh_base(folder, dtype), **options) as engine:
            found = [answer for _ in range(2) for answer in engine.run(*requests_of(adapters))]
            cached = any(answer.done is not None and answer.done.cached_tokens for answer in found)
            assert cached == options.get("prefix_cache", True)
            return [(answer.tokens(), answer.logprobs()) for answer in found]

    alone = answers(max_running=1, max_batch_tokens=2048, blocks=2048)
    assert answers(max_batch_tokens=16, blocks=2048) == alone
    assert answers(max_batch_tokens=37, blocks=2048, prefix_cache=False) == alone


def test_thirty_two_rows_over_sixteen_adapters(folder: Path, models: Path, oracle: Oracle) -> None:
    """Ranks 1, 4, 8, 16, 64 and different targets, with base rows among them."""
    targets = [ATTENTION, MLP, ATTENTION + MLP, ["v_proj"], ["o_proj", "up_proj"]]
    adapters = [
        save_adapter(
            folder,
            models / f"sixteen-{at}",
            seed=200 + at,
            r=(1, 4, 8, 16, 64)[at % 5],
            target_modules=targets[(at * 3) % 5],
            std=0.1,
        )
        for at in range(16)
    ]
    prompts = prompts_of([3 + at * 2 for at in range(34)], VOCABULARY, seed=9)
    requests = [
        {"prompt": prompt, "adapter": adapters[at] if at < 16 else adapters[at - 16] if at < 32 else None}
        for at, prompt in enumerate(prompts)
    ]
    with running(fresh_base(folder), slots=16) as harness:
        answers = harness.run(*({**request, "max_tokens": 24, "logprobs": 3} for request in requests))
    for request, answer in zip(requests, answers, strict=True):
        assert_same(oracle, request["prompt"], request["adapter"], answer)


def test_shared_prompts_are_cached_per_adapter_and_salt(folder: Path, adapters: list[Path], oracle: Oracle) -> None:
    prompt = prompts_of((70,), VOCABULARY, seed=11)[0]
    with running(fresh_base(folder)) as harness:
        for adapter in (None, *adapters):
            [first] = harness.run({"prompt": prompt, "adapter": adapter})
            [again] = harness.run({"prompt": prompt, "adapter": adapter})
            [other] = harness.run({"prompt": prompt, "adapter": adapter, "salt": b"another tenant"})
            assert first.done is not None
            assert again.done is not None
            assert other.done is not None
            assert (first.done.cached_tokens, again.done.cached_tokens, other.done.cached_tokens) == (0, 64, 0)
            for answer in (first, again, other):
                assert_same(oracle, prompt, adapter, answer)


def test_one_prompt_a_block_long_is_still_computed(folder: Path, oracle: Oracle) -> None:
    """A prompt that is cached whole keeps its last block to compute: the next token needs its logits."""
    prompt = prompts_of((32,), VOCABULARY, seed=12)[0]
    with running(fresh_base(folder)) as harness:
        for cached in (0, 16):
            [answer] = harness.run({"prompt": prompt})
            assert answer.done is not None
            assert answer.done.cached_tokens == cached
            assert_same(oracle, prompt, None, answer)


def test_nan_stays_in_its_row(folder: Path, models: Path, adapters: list[Path], oracle: Oracle) -> None:
    """An adapter whose numbers overflow ends its own request, in the same batch as others and in their old blocks."""
    wild = save_adapter(folder, models / "wild", seed=300, r=4, target_modules=ATTENTION + MLP, std=1e18)
    prompt = prompts_of((40,), VOCABULARY, seed=13)[0]
    with running(fresh_base(folder), blocks=20, prefix_cache=False) as harness:
        for _ in range(3):  # twenty blocks: the second round runs where the first one's NaN lay
            answers = harness.run(
                *({"prompt": prompt, "adapter": adapter, "max_tokens": 8} for adapter in (wild, *adapters, wild, None))
            )
            for adapter, answer in zip((wild, *adapters, wild, None), answers, strict=True):
                assert answer.done is not None
                if adapter is wild:
                    assert answer.done.error is not None
                    assert answer.done.error.code == "not_finite"
                    assert answer.done.outcome == "error"
                else:
                    assert_same(oracle, prompt, adapter, answer)


def test_slots_are_reused_without_a_trace(folder: Path, adapters: list[Path], oracle: Oracle) -> None:
    prompt = prompts_of((20,), VOCABULARY, seed=14)[0]
    with running(fresh_base(folder), slots=2) as harness:
        for turn in range(12):
            chosen = [adapters[turn % 4], adapters[(turn * 3 + 1) % 4], None]
            requests = [{"prompt": prompt, "adapter": adapter, "max_tokens": 6} for adapter in chosen]
            for request, answer in zip(requests, harness.run(*requests), strict=True):
                assert_same(oracle, prompt, request["adapter"], answer)  # type: ignore[arg-type]
        assert harness.bank.evictions > 4


def test_families_list_is_the_tested_one() -> None:
    assert set(FAMILIES) == {"llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt2"}


def test_the_base_is_never_written_to(folder: Path, adapters: list[Path]) -> None:
    base = fresh_base(folder)
    with running(base, blocks=40, slots=2) as harness:
        before = _weights(base.model)
        harness.run(*requests_of(adapters))
        after = _weights(base.model)
    assert before.keys() == after.keys()
    assert len(before) > 20
    for name, weight in before.items():
        assert torch.equal(weight, after[name]), name


def _weights(model: Any) -> dict[str, torch.Tensor]:
    """Copies of every weight: parameters, and those that are laid out anew for the machine."""
    copies = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        group = getattr(module.shared, "group", None) if isinstance(module, GroupMember) else None
        dense = group.own.dense[module.number] if group else getattr(module, "_dense", None)
        if dense is not None:
            copies[name] = (dense.packed.data if dense.packed is not None else dense.weight).clone()
    return copies
