"""What is stored and merged comes onto the bill while it is there."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from server.api.held import Sampler
from server.engine.stats import CopyFigures
from server.registry.records import ref_of
from server.tenants.holdings import Held
from tests.serving import until


@pytest.fixture
def samples(server, monkeypatch) -> list[tuple[int, set[Held]]]:
    """What the holdings are told, and when, from now on."""
    told: list[tuple[int, set[Held]]] = []

    async def sample(now: int, held: Any, *, only_changed: bool = False) -> None:
        told.append((now, set(held)))

    monkeypatch.setattr(server.state.accounts.holdings, "sample", sample)
    return told


def stored(server, *names: str) -> set[Held]:
    """A name's versions, each once."""
    found = {name: {one.digest: one.bytes for one in server.state.registry.versions(name)} for name in names}
    return {Held("default", name, "storage", sum(sizes.values())) for name, sizes in found.items()}


def test_a_change_of_what_is_stored_is_told_within_seconds(server, samples, adapters, new_adapter):
    assert server.put("b", adapters[1]).status_code == 201
    until(lambda: samples and samples[-1][1] == stored(server, "a", "b"))
    one = stored(server, "b")
    assert server.put("b", new_adapter()).status_code == 200
    until(lambda: samples[-1][1] == stored(server, "a", "b"))
    assert not one & stored(server, "b"), "both versions are stored"
    assert server.put("b", adapters[1]).status_code == 200  # a third version of the first one's bytes
    assert server.http.delete("/adapters/b").status_code == 204
    until(lambda: samples[-1][1] == stored(server, "a"))


def test_only_what_was_asked_for_is_merged_on_the_bill(server, samples):
    ref = ref_of(server.state.registry.get("a"), "default")
    other = ref_of(server.state.registry.get("a"), "nobody")
    stats = server.state.client.stats
    sampler = Sampler(server.state)

    def look(copies: dict[Any, CopyFigures]) -> set[Held]:
        return set(sampler._held(({}, copies)))

    assert not stats.copies
    assert look({ref: CopyFigures(1000, pinned=False, automatic=True)}) == set()
    assert look({ref: CopyFigures(1000, pinned=True, automatic=False)}) == {Held("default", "a", "merged", 1000)}
    assert look({other: CopyFigures(1000, pinned=True, automatic=False)}) == set(), "no such tenant"


def test_nothing_is_told_again_before_a_minute_is_over(server, samples, monkeypatch):
    async def looks() -> int:
        sampler = Sampler(server.state)
        await sampler.look()
        await sampler.look()
        monkeypatch.setattr("server.api.held.SAMPLE_SECONDS", 0.0)
        await sampler.look()
        return len(samples)

    before = len(samples)
    done = asyncio.run_coroutine_threadsafe(looks(), server.state.client.loop).result(20)
    assert done - before >= 2


def test_a_failing_database_ends_nothing(server, monkeypatch, adapters, caplog):
    failures: list[int] = []

    async def fail(now: int, held: Any, *, only_changed: bool = False) -> None:
        failures.append(now)
        raise OSError("no disk")

    with monkeypatch.context() as broken:
        broken.setattr(server.state.accounts.holdings, "sample", fail)
        assert server.put("c", adapters[2]).status_code == 201
        until(lambda: len(failures) > 1)
    assert "could not be written down" in caplog.text
    assert server.http.delete("/adapters/c").status_code == 204
