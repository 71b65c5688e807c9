"""How many tokens the KV cache gets, and how many threads the engine: from the settings, else from the machine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from server import app, machine
from server.core import LinearShape
from server.errors import AdapterUnavailable
from server.lora.weights import AdapterWeights
from server.settings import Settings
from tests.families import save_model
from tests.harness import fresh_base

MIB = 1 << 20
LINEARS = {"q": LinearShape(1000, 3000), "k": LinearShape(1000, 1000)}  # in + out: 6000 values a rank


def a_base(device: str, per_token: int = 1000) -> Any:
    """As much of a Base as the arithmetic needs, in bfloat16."""
    return SimpleNamespace(
        device=torch.device(device),
        dtype=torch.bfloat16,
        kv_bytes_per_token=per_token,
        info=SimpleNamespace(linears=LINEARS),
    )


def gpu(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (free, 80 << 30))


@pytest.mark.parametrize(("max_rank", "counted"), [(64, 16), (16, 16), (8, 8)])
def test_every_slot_has_room(max_rank: int, counted: int) -> None:
    settings = Settings(adapter_slots=32, max_rank=max_rank)
    assert app.adapter_room(settings, a_base("cuda")) == 32 * counted * 6000 * 2


def test_the_gpus_kv_cache_leaves_adapters_and_merged_copies_their_room(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, free=100 * MIB)
    settings = Settings(adapter_slots=10, merged_bytes=20 * MIB)
    room = 10 * 16 * 6000 * 2 + 20 * MIB
    assert app.kv_tokens(settings, a_base("cuda")) == int((100 * MIB - room) * 0.85) // 1000
    more = Settings(adapter_slots=20, merged_bytes=20 * MIB)
    assert app.kv_tokens(more, a_base("cuda")) < app.kv_tokens(settings, a_base("cuda"))


def test_the_bounds_hold_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, free=MIB)  # less than the adapters' room alone
    assert app.kv_tokens(Settings(), a_base("cuda")) == 2048
    gpu(monkeypatch, free=80 << 30)
    assert app.kv_tokens(Settings(), a_base("cuda")) == 1_000_000


def test_the_cpus_kv_cache_is_sized_from_what_the_process_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: 40 * MIB)
    assert app.kv_tokens(Settings(), a_base("cpu")) == 10 * MIB // 1000
    monkeypatch.setattr(machine, "free_memory", lambda: 0)
    assert app.kv_tokens(Settings(), a_base("cpu")) == 2048
    monkeypatch.setattr(machine, "free_memory", lambda: 1 << 40)
    assert app.kv_tokens(Settings(), a_base("cpu")) == 32_768


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_setting_wins_over_the_machine(device: str) -> None:
    assert app.kv_tokens(Settings(kv_cache_tokens=4096), a_base(device)) == 4096


@pytest.mark.parametrize(("threads", "expected"), [(0, 3), (2, 2)])
def test_the_engine_takes_the_cores_of_the_process(
    threads: int, expected: int, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(machine, "cores", lambda: 3)
    engine = app.Engine

    def seen_engine(*args: Any, **named: Any) -> Any:
        seen.append(named["threads"])
        return engine(*args, **named)

    monkeypatch.setattr(app, "Engine", seen_engine)
    base = fresh_base(save_model("llama", models / "sizes-llama"))
    app.build(Settings(data_dir=tmp_path, threads=threads, kv_cache_tokens=2048), base)
    assert seen == [expected]


def test_on_the_gpu_an_adapter_over_the_rank_is_that_requests_fault_alone() -> None:
    kept = AdapterWeights("sha256:1", {}, 32, 0)
    assert app.within_rank(lambda _: kept, 32)("sha256:1") is kept
    with pytest.raises(AdapterUnavailable, match="rank 32 is over this server's MAX_RANK of 16"):
        app.within_rank(lambda _: kept, 16)("sha256:1")
