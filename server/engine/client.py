"""The engine as asyncio sees it: submit a request, read its events, cancel it. Keeps the queue within its bounds."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from time import monotonic

from server.core import AdapterRef
from server.engine.bounds import Bounds
from server.engine.engine import Engine
from server.engine.messages import Delta, Done, Event, LaneChanged, Merge, Residency, Submit, Times, Unmerge
from server.engine.stats import CopyFigures, Stats
from server.errors import EngineFailure, OnebaseError, Overloaded

log = logging.getLogger("onebase.engine")

STALL_SECONDS = 120  # far longer than any step
OnDone = Callable[[Done], asyncio.Future[None] | None]


class Stream:
    """The events of one request: any number of Deltas, then one Done."""

    def __init__(self, submit: Submit, on_done: OnDone):
        self.submit, self.on_done = submit, on_done
        self.cached, self.made = 0, 0  # tokens of the prompt that were cached, and tokens made, so far
        self.reasons: dict[int, str] = {}  # why its answers ended, by index
        self.left = False  # whether its reader has gone
        self.ended = False  # whether its Done has come
        self._events: asyncio.Queue[Delta | Done] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[Delta | Done]:
        while True:
            event = await self._events.get()
            yield event
            if isinstance(event, Done):
                return

    def put(self, event: Delta | Done) -> None:
        """Called on the event loop."""
        if isinstance(event, Delta):
            self.cached, self.made = event.cached, self.made + len(event.token_ids)
            if event.finish_reason is not None:
                self.reasons[event.index] = event.finish_reason
        self._events.put_nowait(event)


class EngineClient:
    """Used from one event loop. `max_requests` and `max_tokens` bound what is open, or ended and not yet read; where
    they are `shared`, one tenant cannot fill them."""

    def __init__(self, *, max_requests: int, max_tokens: int, shared: bool = False):
        self.bounds = Bounds(max_requests, max_tokens, "tokens", shared=shared)
        self.draining = False
        self._refused: Counter[str] = Counter()  # requests that came when none were taken
        self._streams: dict[str, Stream] = {}
        self._counted: set[str] = set()  # requests that have a share of the bounds
        self._idle = asyncio.Event()
        self._idle.set()
        self._changes: dict[str, asyncio.Future[LaneChanged]] = {}
        self._numbers = itertools.count()
        self.loop: asyncio.AbstractEventLoop | None = None
        self._engine: Engine | None = None

    def attach(self, engine: Engine) -> None:
        """Starts `engine`, whose `emit` must be this client's. Called on the event loop."""
        self.loop, self._engine = asyncio.get_running_loop(), engine
        engine.start()

    @property
    def open_requests(self) -> int:
        """Requests without their Done."""
        return len(self._streams)

    @property
    def refused(self) -> Counter[str]:
        """Requests that were not taken, by why."""
        return self._refused + self.bounds.refused

    @property
    def open_tokens(self) -> int:
        """Prompt + max_tokens of all that counts against the bounds."""
        return self.bounds.amount

    @property
    def changing(self) -> bool:
        """Whether somebody waits for a lane."""
        return bool(self._changes)

    @property
    def ready(self) -> bool:
        """Whether new requests are taken and the engine runs and, if it has work, steps."""
        return self.alive and not self.draining and not self.stalled

    @property
    def alive(self) -> bool:
        """Whether the engine runs."""
        return self._engine is not None and self._engine.alive

    @property
    def failed(self) -> bool:
        """Whether the engine has ended by itself."""
        return self._engine is not None and not self._engine.alive and not self.draining

    @property
    def stalled(self) -> bool:
        """Whether a step has been under way for a long time."""
        began = self.stats.step_began
        return began is not None and monotonic() - began > STALL_SECONDS

    @property
    def stats(self) -> Stats:
        """The engine's latest figures."""
        return self._engine.stats if self._engine else Stats()

    def emit(self, events: list[Event]) -> None:
        """The engine's way out; called on its thread."""
        assert self.loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self.loop.call_soon_threadsafe(self._dispatch, events)

    def check(self, tenant: str, weight: float, tokens: int) -> None:
        """Whether a request of so many tokens would be taken now. Raises as `submit` does, and changes nothing."""
        if not self.ready:
            self._refused["draining" if self.draining else "not_ready"] += 1
            raise Overloaded("the server is not taking requests now", code="not_ready", retry_after=5)
        self.bounds.check(tenant, weight, tokens)

    def submit(self, submit: Submit, on_done: OnDone) -> Stream:
        """Hands a request to the engine. `on_done` is called once, whether or not anybody still reads the stream; the
        reader gets the Done when the future that it returns is done, or one with the future's fault.
        Whoever reads the stream says so with `leave` when that ends, however it ends.

        Raises Overloaded when the queue is full or the server is draining, QueueShare when the tenant has its part
        of the queue; then `on_done` is not called.
        """
        self.check(submit.tenant, submit.weight, submit.worst)
        self.bounds.take(submit.tenant, submit.weight, submit.worst)
        stream = Stream(submit, on_done)
        self._streams[submit.id] = stream
        self._counted.add(submit.id)
        self._idle.clear()
        assert self._engine is not None
        self._engine.submit(submit)
        if not self._engine.alive:  # it died just now, perhaps without having seen this request
            fault = EngineFailure("the engine failed")
            times = Times(submit.arrived, ended=monotonic())
            lost: list[Event] = [Done(submit.id, "error", 0, 0, 0, Residency(), fault, times)]
            asyncio.get_running_loop().call_soon(self._dispatch, lost)
        return stream

    def cancel(self, request_id: str) -> None:
        """The client has gone. The request still ends with a Done."""
        if self._engine is not None and request_id in self._streams:
            self._engine.cancel(request_id)

    async def merge(
        self, adapter: AdapterRef, *, pinned: bool, keeps: bool = False, parts: Mapping[str, int | None]
    ) -> None:
        """Gives the adapter a lane of its own and waits until it has it; nobody else loses one if it `keeps` them.
        `parts` bound, by tenant, the bytes of all copies that it asks for. Raises Conflict when there is no room,
        AdapterUnavailable, or Overloaded when the engine has ended."""
        await self._change_lane(lambda number: Merge(number, adapter, pinned, keeps, parts))

    async def unmerge(self, adapter: AdapterRef, *, asked: bool = False, replaced: bool = False) -> None:
        """Ends the adapter's own lane, if it has one or is about to; requests that have begun in it finish there."""
        await self._change_lane(lambda number: Unmerge(number, adapter, asked, replaced))

    def forget_lane(self, adapter: AdapterRef, *, replaced: bool = False) -> None:
        """As `unmerge`, for an adapter that has no lane yet, and without waiting for the step under way; from any
        thread."""
        if self._engine is not None:
            self._engine.change_lane(Unmerge("", adapter, replaced=replaced))

    def lane(self, adapter: AdapterRef) -> CopyFigures | None:
        """The adapter's own lane, if new requests for it run in one."""
        return self.stats.copies.get(adapter)

    async def _change_lane(self, message: Callable[[str], Merge | Unmerge]) -> None:
        if self._engine is None or not self._engine.alive:
            raise Overloaded("the server is not taking requests now", code="not_ready", retry_after=5)
        number, answer = f"lane-{next(self._numbers)}", asyncio.get_running_loop().create_future()
        self._changes[number] = answer
        try:
            self._engine.change_lane(message(number))
            while not answer.done() and self._engine.alive:  # it may have died just now, without having seen this
                await asyncio.wait((answer,), timeout=1)
            if not answer.done():
                raise Overloaded("the engine has ended", code="not_ready", retry_after=5)
            change: LaneChanged = answer.result()
        finally:
            del self._changes[number]
        if change.error is not None:
            raise change.error

    def leave(self, stream: Stream) -> None:
        """The reader has gone, and if the request is still open, so has its client. Of no effect the second time."""
        stream.left = True
        self.cancel(stream.submit.id)
        self._give_back(stream)

    async def drain(self, seconds: float) -> bool:
        """Takes no more requests and waits for the open ones; False when some were still open after `seconds`."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Stops the engine; what is still open ends with an error."""
        self.draining = True
        if self._engine is not None and self._engine.alive:
            await asyncio.to_thread(self._engine.stop)
            await asyncio.sleep(0)  # lets the last events be dispatched

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, LaneChanged):
                change = self._changes.get(event.id)
                if change is not None and not change.done():
                    change.set_result(event)
                continue
            stream = self._streams.get(event.id)
            if stream is None:
                continue
            if isinstance(event, Delta):
                stream.put(event)
            else:
                self._end(stream, event)

    def _end(self, stream: Stream, done: Done) -> None:
        if stream.ended:  # the engine died as the request came to it, and both it and `submit` have ended it
            return
        stream.ended = True
        try:
            written = stream.on_done(done)
        except Exception as fault:  # the events of others come after it
            log.exception("ending a request failed")
            self._tell(stream, done, fault)
            return
        if written is None:
            self._tell(stream, done, None)
        else:
            written.add_done_callback(lambda future: self._tell(stream, done, _fault(future)))

    def _tell(self, stream: Stream, done: Done, fault: BaseException | None) -> None:
        """The last event of a request."""
        if fault is not None and done.error is None:
            error = (
                fault if isinstance(fault, OnebaseError) else EngineFailure("the request could not be accounted for")
            )
            done = replace(done, outcome="error", error=error)
        self._streams.pop(done.id, None)
        self._give_back(stream)
        if not self._streams:
            self._idle.set()
        stream.put(done)

    def _give_back(self, stream: Stream) -> None:
        """Ends a request's share of the bounds once it has its Done and its reader has gone: until then its events take
        memory, which a client that never reads could otherwise fill.
        """
        submit = stream.submit
        if stream.left and submit.id not in self._streams and submit.id in self._counted:
            self._counted.remove(submit.id)
            self.bounds.give_back(submit.tenant, submit.worst)


def _fault(future: asyncio.Future[None]) -> BaseException | None:
    return asyncio.CancelledError() if future.cancelled() else future.exception()
