"""`POST /v1/generate`: one prompt, one adapter or the base, answered whole or as a stream."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response, StreamingResponse
from fastapi.sse import format_sse_event
from starlette.types import Message, Receive, Scope, Send

from server.api import prompts
from server.api.render import Answer
from server.api.schemas import GenerateRequest, GenerateResponse
from server.api.state import Activity, State, state_of
from server.engine.client import Stream
from server.engine.messages import Delta, Done, Sampling, Submit
from server.errors import EngineFailure, InvalidRequest, OnebaseError

log = logging.getLogger("onebase.api")
router = APIRouter()
_UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # no proxy may hold a stream back
OneState = Annotated[State, Depends(state_of)]


@router.post(
    "/v1/generate",
    response_model=GenerateResponse,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def generate(body: GenerateRequest, request: Request, state: OneState) -> Response:
    """Answers with the whole text, or with Server-Sent Events when `stream` is true."""
    stream, answer = await _open(body, state)
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
            chunks = _chunks(first, events, answer, stream.submit.n)
            return _Answered(chunks, end, media_type="text/event-stream", headers=_UNBUFFERED)
        async for event in stream:
            answer.add(event)
        answer.raise_fault()
        content = await asyncio.to_thread(_whole, answer) if answer.large else _whole(answer)
        return _Answered(
            _once(content), end, media_type="application/json", headers={"Content-Length": str(len(content))}
        )
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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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


async def _open(body: GenerateRequest, state: State) -> tuple[Stream, Answer]:
    """Resolves the adapter, reads the prompt and queues the request. The lease ends with the request, once."""
    lease = state.registry.acquire(body.adapter) if body.adapter is not None else None
    try:
        read = partial(prompts.encode, body, state.base, state.max_context)
        if prompts.size(body) > prompts.LONG:
            prompt = await anyio.to_thread.run_sync(read, limiter=state.reads)
        else:
            prompt = read()
        most = (len(prompt) + body.max_tokens) * body.n
        if most > state.client.max_tokens:  # waiting would not help
            raise InvalidRequest(
                f"prompt + max_tokens, {body.n} times, are {most} tokens; this server takes {state.client.max_tokens}",
                param="n" if body.n > 1 else "max_tokens",
            )
        submit = Submit(
            id=f"gen-{secrets.token_hex(12)}",
            prompt=prompt,
            adapter=lease.ref if lease else None,
            sampling=_sampling(body),
            n=body.n,
            salt=state.salt,
            batch=body.priority == "batch",
        )

        activity: Activity | None = None

        def on_done(done: Done) -> None:
            if lease is not None:
                lease.release()
            if activity is not None:
                activity.in_flight -= 1

        stream = state.client.submit(submit, on_done)
    except BaseException:
        if lease is not None:
            lease.release()
        raise
    if lease is not None:
        activity = state.began(lease.ref.name)
    return stream, Answer(submit, state.base, state.names, int(time.time()))


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
    first: Delta | Done, events: AsyncIterator[Delta | Done], answer: Answer, left: int
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
        yield format_sse_event(event="error", data_str=answer.dump(fault.envelope()))
    except Exception:
        log.exception("a stream could not be continued")
        told = EngineFailure("the stream could not be continued")
        yield format_sse_event(event="error", data_str=answer.dump(told.envelope()))


async def _chain(first: Delta | Done, rest: AsyncIterator[Delta | Done]) -> AsyncIterator[Delta | Done]:
    yield first
    async for event in rest:
        yield event
