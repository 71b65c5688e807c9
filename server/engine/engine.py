"""The engine: one thread that owns scheduler, blocks, slots and model. Commands come in, events go out.

A step is schedule -> forward -> sample -> events, of one lane at a time. Every request that is submitted gets exactly
one `Done`, every merge and unmerge exactly one `LaneChanged`.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from time import monotonic

from server.core import AdapterRef
from server.engine.automerge import AutoMerge
from server.engine.calibrate import calibrate
from server.engine.counting import Counting
from server.engine.figures import Figures
from server.engine.lanes import SHARED
from server.engine.loading import AdapterLoader
from server.engine.merging import LaneMessage, MergedCopies
from server.engine.messages import (
    Cancel,
    Done,
    Event,
    Fetched,
    LaneChanged,
    Loaded,
    Merge,
    Residency,
    Stop,
    Submit,
    Times,
    Unmerge,
)
from server.engine.requests import Requests
from server.engine.scheduler import Scheduler, Work
from server.engine.steprunner import StepRunner
from server.engine.turns import Turns
from server.errors import EngineFailure, OnebaseError, Overloaded
from server.lora import cores
from server.lora.bank import Bank
from server.lora.merge import MergedCopy
from server.lora.weights import AdapterWeights

log = logging.getLogger("onebase.engine")


Message = Submit | Cancel | Loaded | Fetched | LaneMessage | Stop


class Engine:
    """Runs until `stop`. `emit` is called on the engine's thread with the events of a step, in order. `prefetch_bytes`
    bounds the adapters that are held in RAM for requests without a slot, `merged_bytes` the merged copies;
    `merged_share` is what their lanes have of the device's time while the shared lane has work. With `auto_merge`
    it makes copies of its own accord."""

    def __init__(
        self,
        runner: StepRunner,
        scheduler: Scheduler,
        bank: Bank,
        *,
        fetch: Callable[[str], AdapterWeights],
        emit: Callable[[list[Event]], None],
        threads: int,
        prefetch_bytes: int,
        merged_bytes: int = 0,
        merged_share: float = 0.45,
        auto_merge: bool = False,
    ):
        self._runner, self._scheduler, self._emit, self._threads = runner, scheduler, emit, threads
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._loader = AdapterLoader(bank, fetch, self._inbox.put, runner.base.device, prefetch_bytes)
        self._events: list[Event] = []
        self._turns = Turns(scheduler, merged_share)
        self._merged = MergedCopies(
            runner, fetch, self._inbox.put, self._tell, freed=self._turns.forget, most=merged_bytes
        )
        self._auto_merge = auto_merge
        self._fault: OnebaseError | None = None
        self._clock, self._counts = runner.clock, Counting(runner.clock)
        pool = scheduler.pool
        self.stats = Figures(self._counts, blocks=pool.count, block_size=pool.block_size, slots=bank.capacity)
        self._requests = Requests(
            runner.base, scheduler, self._loader, self._merged, self._counts, self.stats, self._tell
        )
        self._started = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="onebase-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread, which takes the cores (lora/cores.py says what that asks of all others)."""
        self._thread.start()
        self._started.wait()

    def submit(self, submit: Submit) -> None:
        """From any thread. Ends in exactly one Done."""
        adapter = submit.adapter
        if adapter is None or self._at_hand(adapter, key := adapter.key) or not self._loader.may_begin(key):
            self._inbox.put(submit)
            return
        self._inbox.put(replace(submit, early=True))
        self._loader.begin(key)

    def change_lane(self, message: Merge | Unmerge) -> None:
        """From any thread. Ends in exactly one LaneChanged."""
        self._inbox.put(message)

    def cancel(self, request_id: str) -> None:
        """From any thread; of no effect on a request that has ended."""
        self._inbox.put(Cancel(request_id))

    def stop(self, fault: OnebaseError | None = None) -> None:
        """From any thread: ends the engine and waits for it."""
        self._inbox.put(Stop(fault or Overloaded("the server is shutting down", code="shutting_down")))
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread runs and reads what is submitted."""
        return self._thread.is_alive() and not self._closing

    def _run(self) -> None:
        cores.take(self._threads)
        try:
            if self._auto_merge:
                costs = calibrate(self._runner, self._scheduler.pool, self._scheduler.max_running)
                self._turns.auto = AutoMerge(costs, self._merged, self._turns.share)
            self._started.set()
            self._clock.restart()
            self._loop()
        except Exception:  # a fault of our own: the server is not ready any more, but no request is left hanging
            log.exception("the engine failed")
            self._fault = EngineFailure("the engine failed")
        self._started.set()
        self._close()

    def _loop(self) -> None:
        idle = True
        while self._fault is None:
            self._receive(block=idle)
            self._loader.serve()
            work = self._turn() if self._fault is None else []
            self._publish()
            self._clock.mark("emit")
            idle = not work  # then nothing changes until a message comes

    def _turn(self) -> list[Work]:
        """One step of the lane whose turn it is; its work, if there was any."""
        start = monotonic()
        lane, work = self._turns.next() if self._merged else (SHARED, self._scheduler.schedule())
        self._clock.mark("schedule")
        if work:
            failed = not self._step(work, self._merged.copy_of(lane))
            seconds = monotonic() - start
            if not failed:
                self._counts.step("shared" if lane == SHARED else "merged", seconds, work)
            self._turns.taken(lane, work, seconds, failed=failed)
        return work

    def _close(self) -> None:
        """Ends what is open, and what was submitted too late. What is submitted after that finds `alive` False."""
        self._closing = True
        self._merged.give_all_up(self._fault)
        self._requests.end_all(self._fault)
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, Submit):
                times = Times(message.arrived, ended=monotonic())
                self._events.append(Done(message.id, "error", 0, 0, 0, Residency(), self._fault, times))
            elif isinstance(message, Merge | Unmerge):
                self._events.append(LaneChanged(message.id, error=self._fault))
        self._publish()
        self._merged.close()  # last: these wait for what is under way
        self._loader.close()

    def _receive(self, block: bool) -> None:
        """Handles the messages that are there; if there is nothing else to do, waits for one."""
        while block or not self._inbox.empty():
            message = self._clock.idle(self._inbox.get) if block else self._inbox.get()
            self._clock.mark("schedule")
            block = False
            if isinstance(message, Submit):
                self._requests.open(message)
            elif isinstance(message, Cancel):
                self._requests.cancel(message.id)
            elif isinstance(message, Fetched):
                self._loader.fetched(message)
            elif isinstance(message, LaneMessage):
                self._merged.handle(message)
                self._turns.changed(message)
            elif isinstance(message, Loaded):
                for request in self._loader.arrived(message):
                    self._requests.end(request, "error", message.fault)
            else:
                self._fault = message.fault

    def _step(self, work: list[Work], copy: MergedCopy | None) -> bool:
        """Whether it did not fail."""
        self.stats.step_began = began = monotonic()
        for item in work:
            if item.sequence.request.scheduled is None:
                item.sequence.request.scheduled = began
        try:
            choices = self._runner.run(work, copy)
        except Exception:  # a failed step costs the rows that were in it, and nobody else
            log.exception("a step failed")
            self.stats.failed_steps += 1
            self._counts.failed += 1
            for item in work:
                fault = EngineFailure("the step that held this request failed")
                self._requests.end(item.sequence.request, "error", fault)
            return False
        finally:
            self.stats.step_began = None
        self._scheduler.computed(work)
        self.stats.steps += 1
        self.stats.failed_steps = 0
        now = monotonic()
        for item, choice in choices:
            self._requests.take(item.sequence, choice, now)
        return True

    def _tell(self, event: Event) -> None:
        self._events.append(event)

    def _at_hand(self, adapter: AdapterRef, key: str) -> bool:
        return key in self.stats.resident or adapter in self.stats.copies

    def _publish(self) -> None:
        self.stats.take(self._scheduler, self._loader, self._merged)
        if self._events:
            events, self._events = self._events, []
            self._emit(events)
