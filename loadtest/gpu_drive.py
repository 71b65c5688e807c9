"""Drives an engine in this process, without HTTP: closed-loop requests, and the time of every step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from server.core import AdapterRef
from server.engine.blocks import BlockPool
from server.engine.device import DeviceRunner
from server.engine.engine import Engine
from server.engine.layout import Row
from server.engine.messages import Delta, Done, Event, Sampling, Submit
from server.engine.sampler import Choice
from server.engine.scheduler import Scheduler, Work
from server.lora.bank import Bank
from server.lora.merge import MergedCopy
from server.lora.weights import AdapterWeights
from server.model.loader import Base

BLOCK_SIZE = 16
Job = tuple[tuple[int, ...], str | None]  # prompt, adapter's digest


@dataclass(frozen=True, slots=True)
class StepTime:
    """Rows of a step of decodes only (0 for any other); when it began, how long it took, and how long the device
    worked on it (0 if unknown), in seconds."""

    rows: int
    began: float
    seconds: float
    device_seconds: float


class TimedRunner(DeviceRunner):
    """Notes the time of every step. Sampling waits for the device, so the clock sees all of it."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.steps: list[StepTime] = []
        self._between: list[torch.cuda.Event] = []

    def run(self, work: list[Work], copy: MergedCopy | None = None) -> list[tuple[Work, Choice]]:
        start = time.perf_counter()
        chosen = super().run(work, copy)
        seconds = time.perf_counter() - start
        device = self._between[0].elapsed_time(self._between[1]) / 1e3 if self._between and chosen else 0.0
        decodes = len(work) if all(item.count == 1 for item in work) else 0
        self.steps.append(StepTime(decodes, start, seconds, device))
        return chosen

    def _decode(self, rows: list[Row], sampled: list[Row]) -> torch.Tensor | None:
        if self.base.device.type != "cuda":
            return super()._decode(rows, sampled)
        self._between = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._between[0].record()
        logits = super()._decode(rows, sampled)
        self._between[1].record()
        if logits is None:
            self._between = []  # the step is launched from Python, and not here
        return logits

    @contextmanager
    def without_graphs(self) -> Iterator[None]:
        """Inside, every step is launched from Python."""
        graphs, self._graphs = self._graphs, None
        try:
            yield
        finally:
            self._graphs = graphs


@dataclass
class Result:
    """What a run of requests came to; times in seconds. `first` and `cold_first`: to the first token."""

    seconds: float = 0.0
    tokens: int = 0
    errors: int = 0
    first: list[float] = field(default_factory=list)
    cold_first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    steps: list[StepTime] = field(default_factory=list)


class Drive:
    """One engine; `run` keeps `concurrency` requests in it until all jobs are done."""

    def __init__(
        self, base: Base, fetch: Callable[[str], AdapterWeights], *, rows: int, longest: int, slots: int, **options: Any
    ):
        blocks = 2 * rows * -(-longest // BLOCK_SIZE)
        sizes = {"blocks": blocks, "block_size": BLOCK_SIZE, "slots": slots, "most_rows": rows, "longest": longest}
        self.runner = TimedRunner(base, **sizes, **options)
        scheduler = Scheduler(
            BlockPool(blocks, BLOCK_SIZE), max_batch_tokens=2048, max_running=rows, prefix_cache=False
        )
        self.bank = Bank(slots, None, self.runner.forget)
        self.engine = Engine(
            self.runner, scheduler, self.bank, fetch=fetch, emit=self._emit, threads=1, prefetch_bytes=0
        )
        self._lock = threading.Lock()
        self._number = 0

    def run(self, jobs: list[Job], *, new: int, concurrency: int) -> Result:
        """Every job to its end, `new` tokens each."""
        self._jobs, self._new, self._result, self._open = list(reversed(jobs)), new, Result(), len(jobs)
        self._began: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._over = threading.Event()
        self.runner.steps = []
        start = time.perf_counter()
        for _ in range(min(concurrency, len(jobs))):
            self._next()
        while not self._over.wait(1.0):
            if not self.engine.alive:
                raise RuntimeError("the engine has failed")
        self._result.seconds = time.perf_counter() - start
        self._result.steps = self.runner.steps
        return self._result

    def _next(self) -> None:
        with self._lock:
            if not self._jobs:
                return
            prompt, digest = self._jobs.pop()
            self._number += 1
            name = f"r{self._number}"
        adapter = None if digest is None else AdapterRef(digest, 1, digest)
        self._began[name] = time.perf_counter()
        self.engine.submit(Submit(name, prompt, adapter, Sampling(self._new, ignore_eos=True)))

    def _emit(self, events: list[Event]) -> None:
        now = time.perf_counter()
        for event in events:
            if isinstance(event, Done):
                self._result.errors += event.error is not None
                self._open -= 1
                self._next()
            elif isinstance(event, Delta):
                self._note(event, now)
        if not self._open:
            self._over.set()

    def _note(self, event: Delta, now: float) -> None:
        result, name = self._result, event.id
        result.tokens += len(event.token_ids)
        if name in self._last:
            result.gaps.append(now - self._last[name])
        else:
            (result.cold_first if event.residency.cold else result.first).append(now - self._began[name])
        self._last[name] = now
