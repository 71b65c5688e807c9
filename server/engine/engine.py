"""The engine: one thread that owns scheduler, blocks, slots and model. Commands come in, events go out.

A step is schedule -> forward -> sample -> events. Every request that is submitted gets exactly one `Done`.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import monotonic
from typing import Protocol

from server.engine.blocks import chain_seed
from server.engine.loading import AdapterLoader
from server.engine.messages import Cancel, Delta, Done, Event, Fetched, Loaded, Residency, Stats, Submit
from server.engine.sampler import Choice
from server.engine.scheduler import Scheduler, Work
from server.engine.sequence import Request, Sequence
from server.engine.text import TextStream
from server.errors import EngineFailure, OnebaseError, Overloaded
from server.lora import cores
from server.lora.bank import Bank
from server.lora.weights import AdapterWeights
from server.model.loader import Base

log = logging.getLogger("onebase.engine")


@dataclass(frozen=True, slots=True)
class Stop:
    """Ends the engine; requests that are still open end with `fault`."""

    fault: OnebaseError


class StepRunner(Protocol):
    """Computes a step of scheduled work on `base`, and chooses a token for each item that needs one."""

    base: Base

    def run(self, work: list[Work]) -> list[tuple[Work, Choice]]: ...


class Engine:
    """Runs until `stop`. `emit` is called on the engine's thread with the events of a step, in order. `prefetch_bytes`
    bounds the adapters that are held in RAM for requests without a slot."""

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
    ):
        self._runner, self._scheduler, self._emit, self._threads = runner, scheduler, emit, threads
        self._inbox: queue.SimpleQueue[Submit | Cancel | Loaded | Fetched | Stop] = queue.SimpleQueue()
        self._loader = AdapterLoader(bank, fetch, self._inbox.put, runner.base.device, prefetch_bytes)
        self._requests: dict[str, Request] = {}
        self._events: list[Event] = []
        self._order = 0
        self._fault: OnebaseError | None = None
        self.stats = Stats(blocks=scheduler.pool.count, slots=bank.capacity)
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
        if adapter is None or adapter.digest in self.stats.resident or not self._loader.may_begin(adapter.digest):
            self._inbox.put(submit)
            return
        self._inbox.put(replace(submit, early=True))
        self._loader.begin(adapter.digest)

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
        self._started.set()
        try:
            self._loop()
        except Exception:  # a fault of our own: the server is not ready any more, but no request is left hanging
            log.exception("the engine failed")
            self._fault = EngineFailure("the engine failed")
        self._close()

    def _loop(self) -> None:
        idle = True
        while self._fault is None:
            self._receive(block=idle)
            self._loader.serve()
            work = self._scheduler.schedule() if self._fault is None else []
            if work:
                self._step(work)
            self._publish()
            idle = not work  # then nothing changes until a message comes

    def _close(self) -> None:
        """Ends what is open, and what was submitted too late. What is submitted after that finds `alive` False."""
        self._closing = True
        for request in list(self._requests.values()):
            try:
                self._end(request, "error", self._fault)
            except Exception:  # a broken account must not keep the others from ending
                log.exception("a request could not give back what it held")
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, Submit):
                self._events.append(Done(message.id, "error", 0, 0, 0, Residency(), self._fault))
        self._publish()
        self._loader.close()  # last: it waits for a load under way

    def _receive(self, block: bool) -> None:
        """Handles the messages that are there; if there is nothing else to do, waits for one."""
        while block or not self._inbox.empty():
            message = self._inbox.get()
            block = False
            if isinstance(message, Submit):
                self._open(message)
            elif isinstance(message, Cancel):
                request = self._requests.get(message.id)
                if request is not None:
                    self._end(request, "cancelled")
            elif isinstance(message, Fetched):
                self._loader.fetched(message)
            elif isinstance(message, Loaded):
                for request in self._loader.arrived(message):
                    self._end(request, "error", message.fault)
            else:
                self._fault = message.fault

    def _open(self, submit: Submit) -> None:
        adapter = submit.adapter.digest if submit.adapter else ""
        seed = chain_seed(self._runner.base.info.digest.encode(), adapter.encode(), submit.salt)
        request = Request(submit, seed, monotonic())
        self._requests[submit.id] = request
        if submit.adapter is not None:
            self._loader.want(request)
        for index in range(submit.n):
            self._order += 1
            text = TextStream(self._runner.base.tokenizer, submit.sampling.stop)
            sequence = Sequence(request, index, self._order, list(submit.prompt), text)
            request.sequences.append(sequence)
            self._scheduler.add(sequence)

    def _step(self, work: list[Work]) -> None:
        self.stats.step_began = monotonic()
        try:
            choices = self._runner.run(work)
        except Exception:  # a failed step costs the rows that were in it, and nobody else
            log.exception("a step failed")
            self.stats.failed_steps += 1
            for item in work:
                self._end(item.sequence.request, "error", EngineFailure("the step that held this request failed"))
            return
        finally:
            self.stats.step_began = None
        self._scheduler.computed(work)
        self.stats.steps += 1
        self.stats.failed_steps = 0
        for item, choice in choices:
            if item.sequence.finish_reason is None and item.sequence.request.submit.id in self._requests:
                try:
                    self._take(item.sequence, choice)
                except Exception:  # a tokenizer that cannot decode, say: that request's fault alone
                    log.exception("a token could not be taken")
                    self._end(item.sequence.request, "error", EngineFailure("the answer could not be decoded"))

    def _take(self, sequence: Sequence, choice: Choice) -> None:
        request, sampling = sequence.request, sequence.request.submit.sampling
        if not choice.finite:
            fault = EngineFailure("the model's output for this request was not finite", code="not_finite")
            self._end(request, "error", fault)
            return
        sequence.tokens.append(choice.token)
        self.stats.generated_tokens += 1
        ended = choice.token in self._runner.base.eos_ids and not sampling.ignore_eos
        text = "" if ended else sequence.text.push(choice.token)
        if ended or sequence.text.stopped:
            sequence.finish_reason = "stop"
        elif sequence.produced >= sampling.max_tokens:
            sequence.finish_reason = "length"
        if sequence.finish_reason:
            text += sequence.text.finish()
            if sequence.text.stopped:
                sequence.finish_reason = "stop"
            self._scheduler.remove(sequence)
        logprobs = [choice.logprob] if choice.logprob else []
        self._events.append(
            Delta(
                request.submit.id,
                sequence.index,
                text,
                [choice.token],
                logprobs,
                request.residency,
                sequence.finish_reason,
            )
        )
        if all(s.finish_reason for s in request.sequences):
            self._end(request, "finished")

    def _end(self, request: Request, outcome: str, error: OnebaseError | None = None) -> None:
        """The one way a request ends: its Done goes out with the step's events, and everything it holds goes back."""
        if self._requests.pop(request.submit.id, None) is None:
            return
        cached = request.sequences[0].cached or 0 if request.sequences else 0
        prompt = len(request.submit.prompt)
        made = sum(sequence.produced for sequence in request.sequences)
        self._events.append(Done(request.submit.id, outcome, prompt, cached, made, request.residency, error))
        self.stats.prompt_tokens += prompt
        self.stats.cached_tokens += cached
        self.stats.outcomes[outcome] = self.stats.outcomes.get(outcome, 0) + 1
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                self._scheduler.remove(sequence)
        self._loader.give_up(request)

    def _publish(self) -> None:
        scheduler, bank, stats = self._scheduler, self._loader.bank, self.stats
        stats.running, stats.waiting, stats.loading = (
            len(scheduler.running),
            len(scheduler.waiting),
            len(self._loader),
        )
        stats.blocks_used, stats.preemptions = scheduler.pool.used, scheduler.preemptions
        stats.resident, stats.slot_bytes = bank.digests(), bank.bytes
        stats.slot_references, stats.slot_evictions, stats.slot_loads = bank.references, bank.evictions, bank.loads
        stats.prefetches = dict(self._loader.prefetches)
        if self._events:
            events, self._events = self._events, []
            self._emit(events)
