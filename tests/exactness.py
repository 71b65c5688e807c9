"""What "the same" means: greedy tokens in float32, and log-probabilities where two tokens are nearly tied."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.families import Oracle
from tests.harness import Answer

TIE = 2e-3  # the oracle's two best tokens closer than this may come out either way
CLOSE = 2e-3  # log-probabilities, float32


def assert_same(oracle: Oracle, prompt: list[int], adapter: Path | None, answer: Answer, index: int = 0) -> None:
    """Our tokens are the oracle's greedy choice at every place, given the tokens before; log-probabilities agree.

    Teacher forcing over our own tokens checks every place, also those after a near tie.
    """
    assert answer.done is not None
    assert answer.done.error is None, answer.done.error
    tokens = answer.tokens(index)
    table = oracle.logprobs(prompt, tokens, adapter)
    best = table.max(-1).values
    chosen = table.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    behind = (best - chosen).max().item()
    assert behind < TIE, f"a token {behind:.4f} behind the oracle's choice; {adapter}"
    for place, item in enumerate(answer.logprobs(index)):
        assert item.token_id == tokens[place]
        assert abs(item.logprob - chosen[place].item()) < CLOSE
        for token, logprob in item.top:
            assert abs(logprob - table[place, token].item()) < CLOSE
