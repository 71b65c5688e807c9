"""The CUDA path for tests: on a GPU as it is, on a CPU with interpreted kernels and graphs that are run again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from server.engine.device import DeviceRunner
from server.engine.graphs import CudaCapture, Graph
from server.model.loader import Base
from tests.kernelcases import DEVICE  # also mends the interpreter


class Rerun:
    """Stands in for a captured graph: runs the work again on the same tensors, into the same output."""

    def __init__(self, work: Callable[[], torch.Tensor]):
        self._work, self._out, self.replays = work, work().clone(), 0

    def replay(self) -> torch.Tensor:
        self.replays += 1
        self._out.copy_(self._work())
        return self._out


class Recorder:
    """Makes graphs and keeps them in sight."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []
        self._capture: Callable[[Callable[[], torch.Tensor]], Graph] = CudaCapture() if DEVICE.type == "cuda" else Rerun

    def __call__(self, work: Callable[[], torch.Tensor]) -> Graph:
        self.graphs.append(self._capture(work))
        return self.graphs[-1]


def device_runner(capture: Any = None, **more: Any) -> Callable[..., DeviceRunner]:
    """For `running(base, runner=...)`: no graphs unless `capture` makes them."""

    def make(base: Base, *, blocks: int, block_size: int) -> DeviceRunner:
        sizes: dict[str, Any] = {"slots": 16, "max_rank": 64, "most_rows": 4, "longest": base.max_context, **more}
        runner: Any = DeviceRunner(base, blocks=blocks, block_size=block_size, capture=capture, **sizes)
        if capture is not None:
            runner.warm()
        return runner

    return make
