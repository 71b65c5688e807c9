"""The engine as asyncio sees it, with an engine that dies at the wrong moment."""

import asyncio

import pytest

from server.engine.client import EngineClient
from server.engine.messages import Done, Residency, Sampling, Submit
from server.errors import EngineFailure


class Dying:
    """It ends the one request that has come, and dies before `submit` returns."""

    alive = True

    def __init__(self, client):
        self._client = client

    def submit(self, submit):
        self.alive = False
        self._client.emit([Done(submit.id, "error", 0, 0, 0, Residency(), EngineFailure("the engine failed"))])


@pytest.mark.anyio
async def test_a_request_ends_once_though_the_engine_and_submit_both_end_it():
    client = EngineClient(max_requests=2, max_tokens=100)
    client.loop, client._engine = asyncio.get_running_loop(), Dying(client)
    client.check = lambda *parts: None  # it was alive when the request came
    written, ended = asyncio.get_running_loop().create_future(), []

    def on_done(done):
        ended.append(done)
        return written

    stream = client.submit(Submit("a", (1,), None, Sampling(max_tokens=1)), on_done)
    await asyncio.sleep(0.01)
    assert len(ended) == 1
    written.set_result(None)
    assert [event.outcome async for event in stream] == ["error"]
    client.leave(stream)
    assert client.bounds.requests == 0
