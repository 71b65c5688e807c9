"""Every family, with every kind of LoRA, gives what transformers and PEFT give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.exactness import assert_same
from tests.families import FAMILIES, VOCABULARY, Oracle, fresh, prompts_of, save_adapter, save_model
from tests.harness import Harness, fresh_base, running


@dataclass
class Bench:
    """One family's base, its oracle and a running engine."""

    name: str
    folder: Path
    oracle: Oracle
    harness: Harness

    def adapter(self, seed: int, **config: Any) -> Path:
        return save_adapter(self.folder, fresh(self.folder.parent, self.name), seed=seed, **config)

    def check(self, *adapters: Path | None, tokens: int = 12, lengths: tuple[int, ...] = (1, 7, 40)) -> None:
        """All at once in one batch, each compared with the oracle by itself."""
        requests = [
            {"prompt": prompt, "adapter": adapter, "max_tokens": tokens, "logprobs": 5}
            for prompt in prompts_of(lengths, VOCABULARY)
            for adapter in adapters
        ]
        for request, answer in zip(requests, self.harness.run(*requests), strict=True):
            assert_same(self.oracle, request["prompt"], request["adapter"], answer)


WITH_KERNELS = [pytest.param((name, True), id=name) for name in FAMILIES]
BY_TORCH = [pytest.param((name, False), id=f"{name} by torch") for name in ("llama", "mistral", "phi3", "gpt2")]


@pytest.fixture(scope="module", params=WITH_KERNELS + BY_TORCH)
def bench(request: pytest.FixtureRequest, models: Path) -> Iterator[Bench]:
    name, kernels = request.param
    folder = models / name
    if not folder.exists():
        save_model(name, folder)
    base = fresh_base(folder, kernels=kernels)
    assert (base.kernels is not None) == kernels
    with running(base, max_batch_tokens=32) as harness:
        yield Bench(name, folder, Oracle(folder), harness)


def test_base(bench: Bench) -> None:
    bench.check(None, lengths=(1, 2, 15, 16, 17, 70))


def test_ranks_and_targets_in_one_batch(bench: Bench) -> None:
    family = FAMILIES[bench.name]
    adapters = [
        bench.adapter(seed, r=rank, lora_alpha=alpha, target_modules=targets)
        for seed, (rank, alpha, targets) in enumerate(
            [(1, 1, family.attention), (4, 16, family.linears), (8, 8, family.mlp), (16, 4, family.linears[:1])]
        )
    ]
    bench.check(None, *adapters)


def test_rslora_rank_pattern_alpha_pattern(bench: Bench) -> None:
    family = FAMILIES[bench.name]
    first, last = family.linears[0], family.linears[-1]
    bench.check(
        bench.adapter(11, r=4, lora_alpha=8, use_rslora=True, target_modules=family.linears),
        bench.adapter(
            12,
            r=4,
            lora_alpha=4,
            target_modules=family.linears,
            rank_pattern={first: 7, rf".*\.1\..*{last.rsplit('.', 1)[-1]}": 2},
            alpha_pattern={last: 9},
        ),
        bench.adapter(
            13, r=3, lora_alpha=5, use_rslora=True, target_modules=family.linears, alpha_pattern={first: 2.5}
        ),
    )


def test_forms_of_target_modules(bench: Bench) -> None:
    family = FAMILIES[bench.name]
    pattern = "h" if bench.name == "gpt2" else "layers"
    bench.check(
        bench.adapter(21, r=2, target_modules="all-linear"),
        bench.adapter(22, r=2, target_modules=rf".*\.[02]\..*{family.attention[0]}"),
        bench.adapter(23, r=2, target_modules=family.linears, layers_to_transform=[1], layers_pattern=pattern),
        bench.adapter(24, r=2, target_modules=family.linears, layers_to_transform=2),
        bench.adapter(25, r=2, target_modules=family.linears, exclude_modules=[family.attention[-1]])
        if len(family.attention) > 1
        else bench.adapter(26, r=2, target_modules="all-linear", exclude_modules=["c_attn"]),
        tokens=8,
    )


def test_default_target_modules(bench: Bench) -> None:
    """`target_modules` left out: PEFT's own default for the model type, where it has one."""
    if bench.name == "phi3":
        with pytest.raises(ValueError, match="target_modules"):
            bench.adapter(30, r=4)
        return
    bench.check(bench.adapter(31, r=4), tokens=8)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_stays_within_its_error(bench: Bench, dtype: str) -> None:
    """Log-probabilities against the float32 oracle: no further away than PEFT in that dtype, give or take."""
    adapter = bench.adapter(41, r=8, target_modules=FAMILIES[bench.name].linears, std=0.05)
    prompt = prompts_of((30,), VOCABULARY)[0]
    with running(fresh_base(bench.folder, dtype=dtype)) as harness:
        [answer] = harness.run({"prompt": prompt, "adapter": adapter, "max_tokens": 8, "logprobs": 0})
    tokens = answer.tokens()
    exact = bench.oracle.logprobs(prompt, tokens, adapter)
    peft = Oracle(bench.folder, dtype=getattr(torch, dtype)).logprobs(prompt, tokens, adapter)
    chosen = torch.tensor(tokens)[:, None]
    ours = torch.tensor([one.logprob for one in answer.logprobs()])
    error = (ours - exact.gather(1, chosen)[:, 0]).abs().max()
    allowed = (peft - exact).abs().max() * 2 + 0.02
    assert error <= allowed
