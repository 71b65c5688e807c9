"""When requests are sent: a closed loop, or at times of their own."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from loadtest.popularity import STRICT


@dataclass(frozen=True, config=STRICT)
class Closed:
    """A closed loop at saturation: each stream sends its next request when its last has ended."""

    kind: Literal["closed"]
    streams: int = Field(ge=1, le=10_000, description="requests that are open at any time")

    def due(self, rng: np.random.Generator, count: int) -> list[None]:
        """No request has a time of its own."""
        return [None] * count


@dataclass(frozen=True, config=STRICT)
class Gamma:
    """An open loop: gaps between requests follow a Gamma distribution, whatever the server does.

    cv is the standard deviation of the gaps over their mean: 1 for Poisson arrivals, more for bursts.
    """

    kind: Literal["gamma"]
    rate: float = Field(gt=0, le=100_000, description="requests a second, on average")
    cv: float = Field(1.0, gt=0, le=100, description="coefficient of variation of the gaps")

    def due(self, rng: np.random.Generator, count: int) -> list[float]:
        """Seconds from the start at which each request is due, ascending."""
        gaps = rng.gamma(self.cv**-2, self.cv**2 / self.rate, count)
        return [float(second) for second in np.cumsum(gaps)]


Arrivals: TypeAlias = Annotated[Closed | Gamma, Field(discriminator="kind")]
