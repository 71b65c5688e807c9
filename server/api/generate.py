"""`POST /v1/generate`: one prompt, one adapter or the base, answered whole or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response, StreamingResponse
from fastapi.sse import format_sse_event
from starlette.types import Message, Receive, Send
from starlette.types import Scope as AsgiScope

from server.api import prompts
from server.api.access import Caller, guarded
from server.api.render import Answer
from server.api.schemas import GenerateRequest, GenerateResponse
from server.api.state import Activity, State, state_of
from server.api.trail import Trail, trail_of
from server.engine.client import Stream
from server.engine.messages import Delta, Done, Prices, Sampling, Submit
from server.errors import EngineFailure, InvalidRequest, OnebaseError, QueueShare, RateLimited
from server.metrics.traffic import Traffic
from server.registry.holds import Lease
from server.tenants.accounts import Entry
from server.tenants.keys import Scope
from server.tenants.tenant import Principal

log = logging.getLogger("onebase.api")
router = APIRouter(route_class=guarded(read=None, write=Scope.GENERATE))
_UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # no proxy may hold a stream back
OneState = Annotated[State, Depends(state_of)]


@router.post(
    "/v1/generate",
    response_model=GenerateResponse,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def generate(body: GenerateRequest, request: Request, caller: Caller, state: OneState) -> Response:
    """Answers with the whole text, or with Server-Sent Events when `stream` is true."""
    trail = trail_of(request)
    trail.asks(body, prompts=state.settings.log_prompts)
    stream, answer = await _open(body, caller, state, trail)
    watcher = asyncio.create_task(_cancel_when_gone(request, state, stream))

    def end() -> None:
        watcher.cancel()
        state.client.leave(stream)

    try:
        if body.stream:
            events = aiter(stream)
            first = await anext(events)
            if isinstance(first, Done) and first.error is not None:
                raise first.error  # nothing has been sent yet: the fault can still have its own status
            chunks = _chunks(first, events, answer, stream.submit.n, trail)
            headers = _UNBUFFERED | state.accounts.admission.headers(caller.tenant)
            return _Answered(chunks, end, media_type="text/event-stream", headers=headers)
        async for event in stream:
            answer.add(event)
        answer.raise_fault()
        content = await asyncio.to_thread(_whole, answer) if answer.large else _whole(answer)
        headers = state.accounts.admission.headers(caller.tenant) | {"Content-Length": str(len(content))}
        return _Answered(_once(content), end, media_type="application/json", headers=headers)
    except BaseException:
        end()
        raise


class _Answered(StreamingResponse):
    """Calls `end` when the client has taken all but what the connection buffers, or when no more will be sent. A
    `finally` in `content` would not do: it does not run if nothing is ever sent, and runs late if the client goes while
    it does not read.
    """

    def __init__(self, content: AsyncIterator[bytes], end: Callable[[], None], **more: Any):
        super().__init__(content, **more)
        self._end = end

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        async def telling(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                self._end()  # before the client's next request can come: it must find the share free

        try:
            await super().__call__(scope, receive, telling)
        finally:
            self._end()


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content


def _whole(answer: Answer) -> bytes:
    return answer.dump(answer.whole()).encode()


async def _open(body: GenerateRequest, caller: Principal, state: State, trail: Trail) -> tuple[Stream, Answer]:
    """Resolves the adapter, reads the prompt if its tenant could have an answer, books the request and queues it. The
    lease ends with the request, once, and so does its entry in the accounts."""
    prompts.check(body, state.base, state.max_context)
    lease = state.registry.acquire(body.adapter, caller.tenant.id) if body.adapter is not None else None
    entry: Entry | None = None
    try:
        prompt = await _read(body, caller, state, lease)
        request_id = f"gen-{secrets.token_hex(12)}"
        with _counted(caller, state):
            entry = state.accounts.admit(
                caller,
                request_id,
                len(prompt),
                body.max_tokens * body.n,
                lease.ref if lease else None,
                batch=body.priority == "batch",
            )
        submit = _submit(body, request_id, prompt, lease, caller, entry)
        ending = _Ending(entry, trail, lease, submit, state.traffic)
        stream = state.client.submit(submit, ending)
    except BaseException as fault:
        if entry is not None:
            entry.refuse()
        if lease is not None:
            lease.release()
        if isinstance(fault, QueueShare):
            state.accounts.admission.refused_by(fault, caller.tenant)
        if isinstance(fault, RateLimited):
            state.traffic.refused(caller.tenant.id, fault.code)
        raise
    entry.runs(lambda: (stream.cached, stream.made))
    trail.runs(stream, entry)
    if lease is not None:
        ending.activity = state.began(lease.ref)
    return stream, Answer(submit, state.base, state.names, int(time.time()), entry.rates)


async def _read(body: GenerateRequest, caller: Principal, state: State, lease: Lease | None) -> tuple[int, ...]:
    """The prompt's tokens, if the request could be taken now: reading costs more than refusing."""
    size, tenant = prompts.size(body), caller.tenant
    _check(body, caller, state, lease)
    if size <= prompts.LONG:
        with _counted(caller, state):
            return _encoded(body, state)
    async with state.reads.turn(tenant.id, tenant.weight, size):
        _check(body, caller, state, lease)  # it may have waited for long
        with _counted(caller, state):
            return await anyio.to_thread.run_sync(partial(_encoded, body, state))


def _encoded(body: GenerateRequest, state: State) -> tuple[int, ...]:
    prompt = prompts.encode(body, state.base, state.max_context)
    _fits(body, len(prompt), state)
    return prompt


@contextlib.contextmanager
def _counted(caller: Principal, state: State) -> Iterator[None]:
    """What cannot be served, as its prompt shows once it is read, has cost the reading: it is one of the minute."""
    try:
        yield
    except InvalidRequest:
        state.accounts.admission.count(caller.tenant)
        raise


def _check(body: GenerateRequest, caller: Principal, state: State, lease: Lease | None) -> None:
    """Raises what the request would be refused with, were its prompt a single token; books nothing."""
    _fits(body, 1, state)
    adapter, batch = lease.ref if lease else None, body.priority == "batch"
    state.client.check(caller.tenant.id, caller.tenant.weight, (1 + body.max_tokens) * body.n)
    state.accounts.check(caller, 1 + body.max_tokens * body.n, adapter, batch=batch)


def _fits(body: GenerateRequest, prompt: int, state: State) -> None:
    most, taken = (prompt + body.max_tokens) * body.n, state.client.bounds.largest
    if most > taken:  # waiting would not help
        raise InvalidRequest(
            f"prompt + max_tokens, {body.n} times, are {most} tokens; this server takes {taken} at most",
            param="n" if body.n > 1 else "max_tokens",
        )


def _submit(
    body: GenerateRequest,
    request_id: str,
    prompt: tuple[int, ...],
    lease: Lease | None,
    caller: Principal,
    entry: Entry,
) -> Submit:
    return Submit(
        id=request_id,
        prompt=prompt,
        adapter=lease.ref if lease else None,
        sampling=_sampling(body),
        n=body.n,
        salt=caller.tenant.salt,
        batch=body.priority == "batch",
        tenant=caller.tenant.id,
        weight=caller.tenant.weight,
        prices=Prices(*entry.weights),
        most=entry.most,
    )


@dataclass
class _Ending:
    """What is done, once, when the request has ended: everything goes back, and it is written down."""

    entry: Entry
    trail: Trail
    lease: Lease | None
    submit: Submit
    traffic: Traffic
    activity: Activity | None = None

    def __call__(self, done: Done) -> asyncio.Future[None]:
        if self.lease is not None:
            self.lease.release()
        if self.activity is not None:
            self.activity.in_flight -= 1
        lane = "base" if self.lease is None else "merged" if done.residency.merged else "shared"
        try:
            written = self.entry.close(
                done.outcome, lane, done.prompt_tokens, done.cached_tokens, done.completion_tokens, free=done.free
            )
        finally:
            self.trail.done(done, lane)
        adapter = self.submit.adapter.name if self.submit.adapter else None
        self.traffic.ended(self.submit.tenant, adapter, done, self.entry.cost, self.submit.prices)
        return written


def _sampling(body: GenerateRequest) -> Sampling:
    return Sampling(
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        seed=body.seed if body.seed is not None else secrets.randbits(64),
        stop=body.stops,
        ignore_eos=body.ignore_eos,
        logprobs=body.logprobs,
    )


async def _cancel_when_gone(request: Request, state: State, stream: Stream) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    state.client.cancel(stream.submit.id)


async def _chunks(
    first: Delta | Done, events: AsyncIterator[Delta | Done], answer: Answer, left: int, trail: Trail
) -> AsyncIterator[bytes]:
    """Chunks of `left` answers, the last one with usage, then `[DONE]`; or, after a fault, `event: error` as the last.
    The stream never just stops.
    """
    try:
        last: Delta | None = None
        async for event in _chain(first, events):
            if isinstance(event, Done):
                answer.add(event)
                answer.raise_fault()
                yield format_sse_event(data_str=answer.chunk(last, event))
                continue
            left -= event.finish_reason is not None
            if left:
                yield format_sse_event(data_str=answer.chunk(event))
            else:
                last = event  # held back until its Done, which comes with it: the very last one carries the usage
        yield format_sse_event(data_str="[DONE]")
    except OnebaseError as fault:
        trail.fails(fault)
        yield format_sse_event(event="error", data_str=answer.dump(fault.envelope()))
    except Exception:
        log.exception("a stream could not be continued")
        told = EngineFailure("the stream could not be continued")
        trail.fails(told)
        yield format_sse_event(event="error", data_str=answer.dump(told.envelope()))


async def _chain(first: Delta | Done, rest: AsyncIterator[Delta | Done]) -> AsyncIterator[Delta | Done]:
    yield first
    async for event in rest:
        yield event
