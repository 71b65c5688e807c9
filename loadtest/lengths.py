"""How long prompts and answers are, in tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

import numpy as np
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from loadtest.popularity import STRICT

MOST = 1_000_000


@dataclass(frozen=True, config=STRICT)
class Fixed:
    """Always the same."""

    kind: Literal["fixed"]
    tokens: int = Field(ge=1, le=MOST, description="tokens")

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """`count` lengths."""
        return [self.tokens] * count


@dataclass(frozen=True, config=STRICT)
class Between:
    """Uniform from `low` to `high`, both included."""

    kind: Literal["uniform"]
    low: int = Field(ge=1, le=MOST, description="the shortest")
    high: int = Field(ge=1, le=MOST, description="the longest")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError("low is more than high")
        return self

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """`count` lengths."""
        return [int(length) for length in rng.integers(self.low, self.high, count, endpoint=True)]


Lengths: TypeAlias = Annotated[Fixed | Between, Field(discriminator="kind")]


def read_pairs(path: Path) -> list[tuple[int, int]]:
    """Prompt and output lengths from a file of JSON lines `{"prompt_tokens": 31, "output_tokens": 120}`.

    Raises ValueError with the line's number, OSError when the file cannot be read.
    """
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            pair = (row["prompt_tokens"], row["output_tokens"])
        except (ValueError, KeyError, TypeError) as fault:
            raise ValueError(f"{path.name} line {number}: not prompt_tokens and output_tokens ({fault!r})") from None
        if not all(type(one) is int and 1 <= one <= MOST for one in pair):
            raise ValueError(f"{path.name} line {number}: lengths are whole numbers from 1 to {MOST:,}")
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{path.name} is empty")
    return pairs
