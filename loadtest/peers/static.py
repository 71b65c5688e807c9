"""transformers and PEFT in a process of their own: static batches of equal lengths, which is their best case."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from loadtest.peers.peer import Case, Figures, Process, Setting
from loadtest.workload import Request

START_SECONDS = 300.0


class Static:
    """A running `static_main.py`: transformers for cases on the base, PEFT's mixed batch for adapters."""

    def __init__(self, name: str, dtype: str, process: Process, adapters: bool):
        self.name, self.dtype, self.process, self._adapters = name, dtype, process, adapters

    def can(self, case: Case) -> bool:
        """transformers has no adapters; PEFT on the base alone is transformers, and slower."""
        return case.adapters == self._adapters

    def measure(self, case: Case, requests: list[Request]) -> Figures:
        """One batch."""
        assert self.process.popen.stdin is not None
        assert self.process.popen.stdout is not None
        self.process.popen.stdin.write(json.dumps([asdict(one) for one in requests]) + "\n")
        self.process.popen.stdin.flush()
        line = self.process.popen.stdout.readline()
        if not line:
            raise RuntimeError(self.process.tail() or "ended")
        figures: Figures = json.loads(line)
        return figures


def start(setting: Setting, dtype: str) -> tuple[Static, Static]:
    """transformers and PEFT, which share a process. Raises NotThere."""
    command = [sys.executable, "-m", "loadtest.peers.static_main", str(setting.base), dtype, str(setting.threads)]
    command += map(str, setting.adapters)
    process = Process(command, setting.folder / f"static-{dtype}.log", {"HF_HUB_OFFLINE": "1"}, piped=True)
    assert process.popen.stdout is not None
    ready = process.popen.stdout  # it says so when it has loaded, or ends
    process.wait(lambda: ready.readline().strip() == "ready", START_SECONDS)
    return Static("transformers", dtype, process, False), Static("PEFT", dtype, process, True)
