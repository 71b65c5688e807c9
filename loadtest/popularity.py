"""Which adapter a request asks for: popularity laws of the literature, adapter 0 always the likeliest."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
Numbers: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, config=STRICT)
class Zipf:
    """Zipf's law over a finite number of adapters: P(i) proportional to 1 / (i + 1)^s; s = 0 is uniform."""

    kind: Literal["zipf"]
    s: float = Field(ge=0, le=10, description="the exponent")

    def draw(self, rng: np.random.Generator, adapters: int, count: int) -> Numbers:
        """`count` adapter numbers, 0 <= number < adapters."""
        return _weighted(rng, np.arange(1, adapters + 1, dtype=np.float64) ** -self.s, count)


@dataclass(frozen=True, config=STRICT)
class Power:
    """S-LoRA's power law (Sheng et al. 2023): floor(x N), where x has the density a x^(a-1) on [0, 1)."""

    kind: Literal["power"]
    a: float = Field(gt=0, le=1, description="0.1 is the most skewed of the paper; 1 is uniform")

    def draw(self, rng: np.random.Generator, adapters: int, count: int) -> Numbers:
        """`count` adapter numbers, 0 <= number < adapters."""
        drawn = np.floor(rng.power(self.a, count) * adapters).astype(np.int64)
        return np.minimum(drawn, adapters - 1)


@dataclass(frozen=True, config=STRICT)
class Identical:
    """Punica (Chen et al. 2023): every request asks for the same adapter."""

    kind: Literal["identical"]

    def draw(self, rng: np.random.Generator, adapters: int, count: int) -> Numbers:
        """`count` zeros."""
        return np.zeros(count, np.int64)


@dataclass(frozen=True, config=STRICT)
class Distinct:
    """Punica: no two requests in a batch share an adapter. The adapters take turns."""

    kind: Literal["distinct"]

    def draw(self, rng: np.random.Generator, adapters: int, count: int) -> Numbers:
        """0, 1, 2 and so on, round and round."""
        return np.arange(count, dtype=np.int64) % adapters


@dataclass(frozen=True, config=STRICT)
class Uniform:
    """Punica: every adapter is as likely as the others."""

    kind: Literal["uniform"]

    def draw(self, rng: np.random.Generator, adapters: int, count: int) -> Numbers:
        """`count` adapter numbers, 0 <= number < adapters."""
        return rng.integers(adapters, size=count)


@dataclass(frozen=True, config=STRICT)
class Geometric:
    """Punica's skewed case: each adapter is `ratio` times as likely as the next one."""

    kind: Literal["geometric"]
    ratio: float = Field(1.5, gt=1, le=100, description="Punica's is 1.5")

    def draw(self, rng: np.random.Generator, adapters: int, count: int) -> Numbers:
        """`count` adapter numbers, 0 <= number < adapters."""
        return _weighted(rng, self.ratio ** -np.arange(adapters, dtype=np.float64), count)


Popularity: TypeAlias = Annotated[
    Zipf | Power | Identical | Distinct | Uniform | Geometric, Field(discriminator="kind")
]


def _weighted(rng: np.random.Generator, weights: NDArray[np.float64], count: int) -> Numbers:
    return rng.choice(len(weights), size=count, p=weights / weights.sum())
