"""A thousand registered adapters, Zipf requests, RAM for 200 of them and 32 slots: no error, and never over budget."""

from __future__ import annotations

import queue
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.app import build
from server.engine.messages import Delta, Done, Event, Sampling, Submit
from server.registry.holds import Lease
from server.settings import Settings
from tests.families import ATTENTION, save_adapter, save_model
from tests.harness import fresh_base

ADAPTERS, IN_RAM, SLOTS, REQUESTS = 1000, 200, 32, 1200


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("thousand")
    base = save_model("llama", folder / "base")
    return base, save_adapter(base, folder / "adapter", seed=1, r=2, target_modules=ATTENTION)


def test_zipf_requests_over_a_thousand_adapters(template: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = template
    tensors = load_file(adapter / "adapter_model.safetensors")
    one = sum(tensor.numel() * 4 for tensor in tensors.values())
    settings = Settings(
        base=str(base),
        data_dir=tmp_path,
        device="cpu",
        dtype="float32",
        adapter_slots=SLOTS,
        ram_cache_bytes=IN_RAM * one,
        kv_cache_tokens=4096,
    )
    state, engine = build(settings, fresh_base(base))
    for at in range(ADAPTERS):
        with state.store.stage() as staging:
            staging.config_path.write_bytes((adapter / "adapter_config.json").read_bytes())
            torch.manual_seed(at)
            changed = {key: tensor + 0.01 * torch.randn(tensor.shape) for key, tensor in tensors.items()}
            save_file(changed, staging.weights_path)
            state.registry.put(f"a{at:04d}", staging)
    assert len(state.registry) == ADAPTERS

    leases: dict[str, Lease] = {}
    tokens: dict[str, int] = {}
    ended: queue.SimpleQueue[Done] = queue.SimpleQueue()
    most = {"ram": 0, "slots": 0}

    def receive(events: list[Event]) -> None:
        most["ram"] = max(most["ram"], state.cache.used_bytes)
        most["slots"] = max(most["slots"], len(engine.stats.resident))
        for event in events:
            if isinstance(event, Delta):
                tokens[event.id] = tokens.get(event.id, 0) + len(event.token_ids)
            else:
                leases[event.id].release()
                ended.put(event)

    engine._emit = receive
    engine.start()
    rng = random.Random(3)
    drawn = rng.choices(range(ADAPTERS), [1 / (at + 1) for at in range(ADAPTERS)], k=REQUESTS)
    for at, number in enumerate(drawn):
        lease = leases[f"r{at}"] = state.registry.acquire(f"a{number:04d}")
        prompt = tuple(rng.randrange(4, 300) for _ in range(6))
        engine.submit(Submit(f"r{at}", prompt, lease.ref, Sampling(max_tokens=4, ignore_eos=True)))
    dones = [ended.get(timeout=120) for _ in range(REQUESTS)]
    engine.stop()

    assert {done.outcome for done in dones} == {"finished"}
    assert set(tokens.values()) == {4}
    assert len({done.id for done in dones}) == REQUESTS
    assert most["ram"] <= IN_RAM * one
    assert most["slots"] <= SLOTS
    assert len(set(drawn)) > IN_RAM  # more than RAM holds were really asked for
    assert state.cache.evictions > 0
    assert engine.stats.slot_evictions > 0
    assert not state.registry.leases()
