"""Servers by the dozen: imports everything once and forks a real server for each line that it reads.

`python -m tests.faults.forking NAME=VALUE...`, settings in JSON. Each line of its output is a server's process id and
port. What it forks has no threads of the parent's, which has computed nothing yet.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import Any

import uvicorn

from server.app import create_app
from server.run import DrainingServer
from server.settings import Settings


def serve(settings: Settings, listening: socket.socket) -> None:
    """Serves until it is killed."""
    app = create_app(settings)
    config = uvicorn.Config(app, http="h11", loop="asyncio", log_level="warning", access_log=False)
    DrainingServer(config, app.state.onebase).run([listening])


def main(**settings: Any) -> None:
    """A server a line, until the input ends."""
    made = Settings(**settings)
    children = []
    for _ in sys.stdin:
        listening = socket.socket(proto=socket.IPPROTO_TCP)  # see tests/serving.py
        listening.bind(("127.0.0.1", 0))
        child = os.fork()
        if not child:
            serve(made, listening)
            os._exit(1)
        print(child, listening.getsockname()[1], flush=True)
        listening.close()
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(**{name: json.loads(value) for name, _, value in (word.partition("=") for word in sys.argv[1:])})
