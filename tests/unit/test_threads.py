"""Only the engine's thread computes on all cores; that holds whatever the other threads do first."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch

from server.engine.engine import Engine
from tests.families import save_model
from tests.harness import Harness, fresh_base


def threads_of(target: Any) -> int:
    """What torch says in a new thread."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(target()))
    thread.start()
    thread.join()
    return found[0]


def test_the_engine_keeps_its_cores_and_others_have_one(models: Path) -> None:
    folder = models / "threads-llama"
    harness = Harness(fresh_base(save_model("llama", folder)))
    seen: list[int] = []
    run = harness.runner.run
    harness.runner.run = lambda work: (seen.append(torch.get_num_threads()), run(work))[1]  # type: ignore[method-assign]
    assert isinstance(harness.engine, Engine)
    harness.engine.start()
    try:
        assert torch.get_num_threads() == 1
        assert threads_of(torch.get_num_threads) == 1
        harness.run({"prompt": [5, 6, 7], "max_tokens": 2})
        assert set(seen) == {2}
    finally:
        harness.engine.stop()
        torch.set_num_threads(2)
