"""A side that is a process told over a pipe: a JSON list of requests on a line, a JSON object of figures back."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from dataclasses import asdict

from loadtest.peers.peer import Case, Figures, Process, Setting
from loadtest.workload import Request

START_SECONDS = 300.0


class Piped:
    """`adapters`: whether it has cases with adapters (True), on the base (False), or both."""

    def __init__(self, name: str, dtype: str, process: Process, adapters: Collection[bool]):
        self.name, self.dtype, self.process, self._adapters = name, dtype, process, adapters

    def can(self, case: Case) -> bool:
        """Whether it has this kind of case."""
        return case.adapters in self._adapters

    def measure(self, case: Case, requests: list[Request]) -> Figures:
        """All at once."""
        assert self.process.popen.stdin is not None
        assert self.process.popen.stdout is not None
        self.process.popen.stdin.write(json.dumps([asdict(one) for one in requests]) + "\n")
        self.process.popen.stdin.flush()
        line = self.process.popen.stdout.readline()
        if not line:
            raise RuntimeError(self.process.tail() or "ended")
        figures: Figures = json.loads(line)
        return figures


def begin(module: str, setting: Setting, dtype: str) -> Process:
    """`module` with base, dtype, threads and adapters as its arguments, once it has loaded. Raises NotThere."""
    command = [sys.executable, "-m", module, str(setting.base), dtype, str(setting.threads)]
    command += map(str, setting.adapters)
    log = setting.folder / f"{module.rpartition('.')[2]}-{dtype}.log"
    process = Process(command, log, {"HF_HUB_OFFLINE": "1"}, piped=True)
    assert process.popen.stdout is not None
    ready = process.popen.stdout  # it says so when it has loaded, or ends
    process.wait(lambda: ready.readline().strip() == "ready", START_SECONDS)
    return process
