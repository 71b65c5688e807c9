"""Runs the server process: start, SIGTERM, drain, stop."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import sys
from pathlib import Path
from types import FrameType

import uvicorn

from server.api.state import State
from server.app import create_app
from server.errors import OnebaseError
from server.model.attention import UnsupportedAttention
from server.model.bundled import BaseUnavailable
from server.settings import Settings

log = logging.getLogger("onebase.run")


class DrainingServer(uvicorn.Server):
    """On a signal: answers 503 to new requests, lets the open ones end, then stops. A second signal ends them.

    uvicorn would raise the signal again at the end; a drained server has done as it was told and exits with 0.
    """

    def __init__(self, config: uvicorn.Config, state: State):
        super().__init__(config)
        self._state = state
        self._drain: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

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
        if self._state.client.open_requests:
            await self._state.client.close()  # what is still open ends with an error, which is still delivered
        self.should_exit = True


def _own(data_dir: Path) -> None:
    """Locks the data directory for as long as this process lives; raises OSError if another server has it."""
    data_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(data_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o600)  # closed, and unlocked, by the exit
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(f"another onebase server uses the data directory {data_dir}") from None


def serve(settings: Settings) -> int:
    """Serves until a signal; the exit status."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for noisy in ("httpx", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        _own(settings.data_dir)
        app = create_app(settings)
    except (BaseUnavailable, UnsupportedAttention, OnebaseError, OSError) as fault:
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
        log_level="info",
        access_log=False,
        timeout_graceful_shutdown=5,
        server_header=False,
    )
    server = DrainingServer(config, state)
    server.run()
    return 0 if server.started else 1
