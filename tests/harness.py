"""A real engine for tests: the server's own wiring, without HTTP."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from server.core import AdapterRef
from server.engine.blocks import BlockPool
from server.engine.costs import DecodeCosts
from server.engine.engine import Engine
from server.engine.messages import Delta, Done, Event, LaneChanged, Merge, Sampling, Submit, Unmerge
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.lora.bank import Bank
from server.lora.weights import AdapterWeights, read_adapter
from server.model.loader import Base, load_base


@dataclass
class Answer:
    """What a request came to."""

    deltas: list[Delta] = field(default_factory=list)
    done: Done | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    dones: int = 0

    def tokens(self, index: int = 0) -> list[int]:
        return [t for d in self.deltas if d.index == index for t in d.token_ids]

    def text(self, index: int = 0) -> str:
        return "".join(d.text for d in self.deltas if d.index == index)

    def finish_reason(self, index: int = 0) -> str | None:
        return [d for d in self.deltas if d.index == index][-1].finish_reason

    def logprobs(self, index: int = 0) -> list[Any]:
        return [lp for d in self.deltas if d.index == index for lp in d.logprobs]


class Harness:
    """One base, one engine; adapters are directories on disk, named by their path."""

    def __init__(
        self,
        base: Base,
        *,
        slots: int = 16,
        blocks: int = 256,
        block_size: int = 16,
        max_batch_tokens: int = 256,
        max_running: int = 64,
        prefix_cache: bool = True,
        prefetch_bytes: int = 2**30,
        merged_bytes: int = 2**30,
        auto_merge: bool = False,
        runner: Callable[..., Any] | None = None,
    ):
        self.base = base
        self.folders: dict[str, Path] = {}
        self.fetched: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.answers: dict[str, Answer] = {}
        self.event_log: list[tuple[str, int]] = []
        self._ids = itertools.count()
        self.scheduler = Scheduler(
            BlockPool(blocks, block_size),
            max_batch_tokens=max_batch_tokens,
            max_running=max_running,
            prefix_cache=prefix_cache,
        )
        self.runner: Any = (runner or Runner)(base, blocks=blocks, block_size=block_size)
        self.bank = Bank(slots, None, getattr(self.runner, "forget", lambda digest: None))
        self.engine = Engine(
            self.runner,
            self.scheduler,
            self.bank,
            fetch=self.fetch,
            emit=self._emit,
            threads=2,
            prefetch_bytes=prefetch_bytes,
            merged_bytes=merged_bytes,
            auto_merge=auto_merge,
        )

    def fetch(self, digest: str) -> AdapterWeights:
        self.fetched.put(digest)
        folder = self.folders[digest]
        return read_adapter(
            digest,
            (folder / "adapter_config.json").read_bytes(),
            bytearray((folder / "adapter_model.safetensors").read_bytes()),
            self.base.info,
            self.base.dtype,
        )

    def ref(self, folder: Path | None) -> AdapterRef | None:
        if folder is None:
            return None
        digest = f"sha256:{folder}"
        self.folders[digest] = folder
        return AdapterRef(folder.name, 1, digest)

    def submit(
        self, prompt: Sequence[int], adapter: Path | None = None, *, n: int = 1, salt: bytes = b"", **sampling: Any
    ) -> Answer:
        """Queues a request; its answer fills as the engine works."""
        request_id = f"r{next(self._ids)}"
        answer = self.answers[request_id] = Answer()
        settings = Sampling(**{"max_tokens": 16, "ignore_eos": True, **sampling})
        self.engine.submit(Submit(request_id, tuple(prompt), self.ref(adapter), settings, n=n, salt=salt))
        answer.id = request_id  # type: ignore[attr-defined]
        return answer

    def run(self, *requests: dict[str, Any], timeout: float = 120) -> list[Answer]:
        """Submits all at once and waits for all."""
        answers = [self.submit(**request) for request in requests]
        return [self.wait(answer, timeout) for answer in answers]

    def wait(self, answer: Answer, timeout: float = 120) -> Answer:
        assert answer.ended.wait(timeout), "the request did not end"
        return answer

    def _emit(self, events: list[Event]) -> None:
        for event in events:
            answer = self.answers[event.id]
            if isinstance(event, Done):
                answer.done, answer.dones = event, answer.dones + 1
                answer.ended.set()
            else:
                answer.deltas.append(event)
                self.event_log.append((event.id, event.index))

    def idle(self) -> None:
        """Asserts that nothing is held any more."""
        stats = self.engine.stats
        assert (stats.running, stats.waiting, stats.loading) == (0, 0, 0)
        assert self.bank.references == 0
        assert self.scheduler.pool.used == 0
        assert not self.engine._merged._leaving


@contextlib.contextmanager
def running(base: Base, **options: Any) -> Iterator[Harness]:
    """A started engine; afterwards nothing may be held."""
    harness = Harness(base, **options)
    harness.engine.start()
    torch.set_num_threads(2)  # for the oracle, which computes while the engine is idle
    try:
        yield harness
        harness.idle()
    finally:
        harness.engine.stop()


def fresh_base(folder: Path, dtype: str = "float32", data_dir: Path | None = None, *, kernels: bool = True) -> Base:
    """Loads a base of its own: an engine changes the model's modules, so none is shared."""
    return load_base(str(folder), data_dir or folder.parent / "data", dtype=dtype, device="cpu", kernels=kernels)


class Lanes:
    """Merges and unmerges, waiting for the engine's answer."""

    def __init__(self, engine: Harness):
        self.engine, self._answers, self._count = engine, dict[str, LaneChanged](), 0
        self._came = threading.Condition()
        emit = engine.engine._emit

        def listen(events: list[Any]) -> None:
            with self._came:
                self._answers.update({one.id: one for one in events if isinstance(one, LaneChanged)})
                self._came.notify_all()
            emit([one for one in events if not isinstance(one, LaneChanged)])

        engine.engine._emit = listen

    def change(self, kind: Any, adapter: Path, *more: Any) -> LaneChanged:
        self._count += 1
        number, reference = f"lane-{self._count}", self.engine.ref(adapter)
        self.engine.engine.change_lane(kind(number, reference, *more))
        with self._came:
            assert self._came.wait_for(lambda: number in self._answers, 60), "no answer"
            return self._answers.pop(number)

    def merge(self, adapter: Path) -> None:
        assert self.change(Merge, adapter, False).error is None

    def unmerge(self, adapter: Path) -> None:
        assert self.change(Unmerge, adapter).error is None


def dear() -> DecodeCosts:
    """Costs of adapters as never seen, that nothing which the engine measures changes."""
    costs = DecodeCosts()
    for merged in (False, True):
        costs.learn(merged=merged, rows=1, adapted=0, context=0, seconds=0.01)
    for _ in range(100):
        costs.learn(merged=False, rows=1, adapted=1, context=0, seconds=0.02)
    costs.learn = lambda **seen: None  # type: ignore[method-assign]
    return costs
