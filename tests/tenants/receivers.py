"""A receiver of usage events on a free port of this machine, as faulty as a test wants it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qs

from aiohttp import web

REPEATED = {"transaction_id": ["value_already_exist"]}  # as Lago says it


class Receiver:
    """`calls` are the requests' headers and bodies, `got` how often each event was taken, by its idempotency key.
    What `faults` holds is answered first, one a call: a status, a status and headers, `hang`, or `lost` (the event is
    taken and the answer is not sent). A call with one of `poison` is refused."""

    def __init__(self) -> None:
        self.calls: list[tuple[dict[str, str], str]] = []
        self.got: dict[str, int] = {}
        self.faults: list[Any] = []
        self.poison: set[str] = set()
        self.url = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        text = await request.text()
        self.calls.append((dict(request.headers), text))
        fault = self.faults.pop(0) if self.faults else None
        if fault == "hang":
            await asyncio.sleep(30)
        if isinstance(fault, int):
            return web.Response(status=fault)
        if isinstance(fault, tuple):
            return web.Response(status=fault[0], headers=fault[1])
        response = self.take(request.path, text)
        if fault == "lost":
            assert request.transport is not None
            request.transport.close()
        return response

    def take(self, path: str, text: str) -> web.Response:
        ids = self.keys(path, text)
        if self.poison & set(ids):
            return web.Response(status=400, text="bad event")
        repeated = {key for key in ids if key in self.got}
        if repeated and path == "/stripe":
            error = {"type": "invalid_request_error", "message": f"An event already exists with identifier {ids[0]}."}
            return web.json_response({"error": error}, status=400)
        if repeated and path == "/lago":
            details = {
                str(at): {"transaction_id": ["value_already_exist"]} for at, key in enumerate(ids) if key in repeated
            }
            return web.json_response({"code": "validation_errors", "error_details": details}, status=422)
        for key in ids:
            self.got[key] = self.got.get(key, 0) + 1
        return web.Response(status=204)

    def keys(self, path: str, text: str) -> list[str]:
        """The idempotency keys of a call's events."""
        if path == "/stripe":
            return parse_qs(text)["identifier"]
        body = json.loads(text)
        if path == "/lago":
            return [event["transaction_id"] for event in body["events"]]
        return [event["id"] for event in (body if isinstance(body, list) else [body])]


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    """A receiver that listens until the block ends."""
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/{tail:.*}", receiver.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    receiver.url = f"http://{host}:{port}"
    try:
        yield receiver
    finally:
        await runner.cleanup()
