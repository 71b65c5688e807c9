"""Only the engine's thread computes on all cores; that holds whatever the other threads do first."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from server.lora import cores
from tests.families import save_model
from tests.harness import Harness, fresh_base


def in_a_thread(target: Callable[[], object]) -> object:
    """What `target` returns in a new thread."""
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(target()))
    thread.start()
    thread.join()
    return found[0]


def reported() -> dict[str, int]:
    """The numbers of threads as torch, OpenMP and MKL would use them in this thread."""
    pairs = re.findall(r"(\w+\(\)) : (\d+)", torch.__config__.parallel_info())
    return {name: int(count) for name, count in pairs if "max" in name or "at::get_num_threads" in name}


def test_the_engine_computes_on_its_cores_and_others_keep_theirs(models: Path) -> None:
    harness = Harness(fresh_base(save_model("llama", models / "threads-llama")))
    seen: list[dict[str, int]] = []
    run = harness.runner.run
    harness.runner.run = lambda *step: (seen.append(reported()), run(*step))[1]  # type: ignore[method-assign]
    cores.take(1)
    harness.engine.start()
    try:
        assert torch.get_num_threads() == 1
        harness.run({"prompt": [5, 6, 7], "max_tokens": 2})
        assert seen
        assert all(counts and set(counts.values()) == {2} for counts in seen), seen
    finally:
        harness.engine.stop()
        cores.take(2)


def test_one_core_is_this_threads_alone_and_ends() -> None:
    def inside() -> tuple[int, int, int]:
        with cores.one_core():
            return torch.get_num_threads(), in_a_thread(torch.get_num_threads), torch.get_num_threads()

    cores.take(2)
    assert in_a_thread(inside) == (1, 2, 1)
    assert torch.get_num_threads() == 2
    with cores.one_core():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_the_server_has_one_pool_of_threads(models: Path) -> None:
    """A pool shows as threads that Python does not know: the engine's two helpers may be there, and no more."""
    code = f"""
import os, threading
from pathlib import Path
from server.app import create_app
from server.settings import Settings
from fastapi.testclient import TestClient
native = lambda: len(os.listdir("/proc/self/task")) - threading.active_count()
before = native()
settings = Settings(base={str(save_model("llama", models / "pools-llama"))!r}, data_dir=Path({str(models / "pools")!r}),
                    device="cpu", threads=3, kv_cache_tokens=2048)
with TestClient(create_app(settings)) as client:
    body = {{"prompt": list(range(5, 205)), "max_tokens": 4, "ignore_eos": True}}
    assert client.post("/v1/generate", json=body).status_code == 200, "no answer"
    print(native() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2"


def test_large_products_on_one_core_leave_no_pool_behind() -> None:
    """MKL counts its threads by itself: a product on another thread would make a pool of its own, which slows all."""
    code = """
import os, threading, torch
from server.lora import cores
native = lambda: len(os.listdir("/proc/self/task")) - threading.active_count()
def product():
    with cores.one_core():
        torch.randn(600, 64) @ torch.randn(64, 1500)
    print(native() - before)  # while the thread lives, and its pool with it
cores.take(3)
before = native()
thread = threading.Thread(target=product)
thread.start()
thread.join()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0"
