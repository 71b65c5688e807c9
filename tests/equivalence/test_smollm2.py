"""The real SmolLM2-135M with adapters of every size, and the shipped ones, against PEFT."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.exactness import assert_same
from tests.families import ATTENTION, MLP, Oracle, prompts_of, save_adapter
from tests.harness import Harness, fresh_base, running

pytestmark = pytest.mark.real
SHIPPED = sorted(path.parent for path in Path("adapters").glob("*/adapter_config.json"))


@pytest.fixture(scope="module")
def harness(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    data = tmp_path_factory.mktemp("data")
    with running(fresh_base(smollm2, data_dir=data), slots=16, blocks=512, max_batch_tokens=512) as harness:
        yield harness


def test_thirty_two_rows_over_sixteen_adapters(harness: Harness, smollm2: Path, models: Path) -> None:
    targets = [ATTENTION, MLP, ATTENTION + MLP, ["v_proj"], ["o_proj", "up_proj"]]
    adapters = [
        save_adapter(
            smollm2,
            models / f"real-{at}",
            seed=400 + at,
            std=0.03,
            r=(1, 4, 8, 16, 64)[at % 5],
            target_modules=targets[(at * 3) % 5],
        )
        for at in range(16)
    ]
    prompts = prompts_of([5 + at for at in range(34)], 49152, seed=21)
    pairs = [(prompt, adapters[at % 16] if at < 32 else None) for at, prompt in enumerate(prompts)]
    answers = harness.run(*({"prompt": p, "adapter": a, "max_tokens": 16, "logprobs": 2} for p, a in pairs))
    oracle = Oracle(smollm2)
    for adapter in (*adapters, None):
        for (prompt, used), answer in zip(pairs, answers, strict=True):
            if used == adapter:
                assert_same(oracle, prompt, adapter, answer)
        oracle.forget()  # one copy of the base at a time


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_shipped_adapters(harness: Harness, smollm2: Path, folder: Path) -> None:
    """The demo question of every shipped adapter, with the answer that PEFT gives."""
    demo = json.loads((folder / "demo.json").read_text())
    tokenizer = harness.base.tokenizer
    text = tokenizer.apply_chat_template(demo["messages"], tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    [answer] = harness.run({"prompt": prompt, "adapter": folder, "max_tokens": 24, "logprobs": 1})
    assert_same(Oracle(smollm2), prompt, folder, answer)


def test_there_are_four_shipped_adapters() -> None:
    assert len(SHIPPED) >= 4
