"""Runs the server process: start, SIGTERM, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from types import FrameType

import uvicorn

from server import logs
from server.api.state import State
from server.app import create_app
from server.datadir import own
from server.errors import OnebaseError
from server.model.attention import UnsupportedAttention
from server.model.bundled import BaseUnavailable
from server.settings import Settings
from server.tenants.claim import claimed
from server.tenants.database import DatabaseUnusable
from server.tenants.ledger import Ledger

log = logging.getLogger("onebase.run")


class DrainingServer(uvicorn.Server):
    """On a signal: answers 503 to new requests, lets the open ones end, then stops. A second signal ends them.

    uvicorn would raise the signal again at the end; a drained server has done as it was told and exits with 0. When the
    engine fails, open requests end with their error and the server stops too: its supervisor can start a new one.
    """

    def __init__(self, config: uvicorn.Config, state: State):
        super().__init__(config)
        self._state = state
        self._drain: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self.engine_failed = False

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second."""
        if self._state.client.failed and not self.engine_failed:
            log.error("the engine has failed: the server stops")
            self.engine_failed = self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal handler."""
        if self._drain is None:
            self._state.client.draining = True
            self._drain = asyncio.get_event_loop().create_task(self._drain_then_exit())
        elif self._hurry.is_set():
            self.should_exit = self.force_exit = True
        else:
            self._hurry.set()

    async def _drain_then_exit(self) -> None:
        seconds = self._state.settings.drain_seconds
        log.info("draining: %d requests open, at most %g s", self._state.client.open_requests, seconds)
        waits = [asyncio.create_task(one) for one in (self._state.client.drain(seconds), self._hurry.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if self._state.client.open_requests or self._state.client.changing:
            await self._state.client.close()  # what is still open ends with an error, which is still delivered
        self.should_exit = True


def _check_port(host: str, port: int) -> None:
    """Raises OSError at once if the port cannot be had, rather than after the base has been loaded."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as fault:
        raise OSError(f"cannot listen on {host} port {port}: {fault.strerror}") from fault


async def _check_database(url: str) -> None:
    """Raises DatabaseUnusable at once if there is no way into the database or another server has it."""
    async with claimed(url):
        pass


def serve(settings: Settings, *, ledger: type[Ledger] = Ledger) -> int:
    """Serves until a signal; the exit status. `ledger` is what writes usage down."""
    with logs.writing(sys.stderr, settings.log_format, settings.log_level):
        return _serve(settings, ledger)


def _serve(settings: Settings, ledger: type[Ledger]) -> int:
    try:
        _check_port(settings.host, settings.port)
        own(settings.data_dir)
        asyncio.run(_check_database(settings.database))
        app = create_app(settings, ledger=ledger)
    except (BaseUnavailable, UnsupportedAttention, OnebaseError, DatabaseUnusable, OSError) as fault:
        log.error("%s", fault)
        return 1
    state: State = app.state.onebase
    log.info(
        "base %s (%s, %s), context %d, %d adapters",
        state.base.info.name,
        str(state.base.dtype).removeprefix("torch."),
        state.base.device,
        state.max_context,
        len(state.registry),
    )
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        # Not httptools: it bounds neither headers nor URLs, and loses the body of a request that offers an upgrade.
        http="h11",
        loop="asyncio",
        log_config=None,  # uvicorn's lines go the way of all others
        log_level=settings.log_level,
        access_log=False,
        timeout_graceful_shutdown=5,
        server_header=False,
    )
    server = DrainingServer(config, state)
    try:
        server.run()
    except SystemExit:  # the port was taken in the meantime: uvicorn has said so
        return 1
    return 0 if server.started and not server.engine_failed else 1
