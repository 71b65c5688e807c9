"""What is stored and merged comes onto the bill while it is there."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from server.api.held import Sampler
from server.registry.records import ref_of
from server.tenants.holdings import Held
from tests.serving import on_the_engine, until


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


def test_only_what_was_asked_for_is_merged_on_the_bill(server, samples, adapters):
    """Until its last request has ended: a copy takes its room also after its lane was given up."""

    def merged() -> set[Held]:
        return {one for one in samples[-1][1] if one.kind == "merged"} if samples else set()

    copies, ref = server.engine._merged, ref_of(server.state.registry.get("a"), "default")
    assert server.http.patch("/adapters/a", json={"lane": "merged"}).status_code == 200
    whole = Held("default", "a", "merged", copies.nbytes)
    until(lambda: merged() == {whole})
    held = on_the_engine(server, lambda: copies.acquire(ref))  # as a request does
    assert server.http.patch("/adapters/a", json={"lane": "shared"}).json()["lane"] == "shared"
    assert server.put("again", adapters[1]).status_code == 201  # so that there is another sample
    until(lambda: any(one.adapter == "again" for one in samples[-1][1]))
    assert merged() == {whole}
    on_the_engine(server, lambda: copies.release(held))
    until(lambda: merged() == set())
    assert server.http.delete("/adapters/again").status_code == 204


def test_what_belongs_to_nobody_is_on_no_bill(server):
    ref, other = (ref_of(server.state.registry.get("a"), tenant) for tenant in ("default", "nobody"))
    held = set(Sampler(server.state)._held(({}, {ref: 1000, other: 1000})))
    assert held == {Held("default", "a", "merged", 1000)}


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
