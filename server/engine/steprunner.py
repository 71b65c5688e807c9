"""What computes the steps, as the engine sees it: on the CPU runner.py, on CUDA device.py."""

from __future__ import annotations

from typing import Protocol

from server.engine.building import Builder
from server.engine.clock import Clock
from server.engine.sampler import Choice
from server.engine.scheduler import Work
from server.lora.merge import MergedCopy
from server.model.loader import Base


class StepRunner(Builder, Protocol):
    """Computes a step of scheduled work on `base`, or on a merged copy of it, and chooses a token for each item that
    needs one. Tells its `clock` of packing, forward and sampling."""

    base: Base
    clock: Clock

    def run(self, work: list[Work], copy: MergedCopy | None = None) -> list[tuple[Work, Choice]]: ...
