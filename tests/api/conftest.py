"""A small random base, adapters for it, and a server a module."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.families import ATTENTION, save_adapter
from tests.serving import Gate, Server, chat_base, ids_of
from tests.tenancy import Admin, administered

_seeds = itertools.count(1000)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return chat_base(tmp_path_factory.mktemp("bases") / "tiny-llama")


@pytest.fixture(scope="session")
def adapters(base, tmp_path_factory) -> list[Path]:
    """Three adapters of ranks 4, 8 and 16."""
    folder = tmp_path_factory.mktemp("adapters")
    return [
        save_adapter(base, folder / f"a{rank}", seed=rank, r=rank, lora_alpha=2 * rank, target_modules=ATTENTION)
        for rank in (4, 8, 16)
    ]


@pytest.fixture
def new_adapter(base, tmp_path) -> Callable[[], Path]:
    """Makes an adapter that no server has seen yet."""

    def make() -> Path:
        seed = next(_seeds)
        return save_adapter(base, tmp_path / f"n{seed}", seed=seed, r=2, lora_alpha=4, target_modules=["q_proj"])

    return make


@pytest.fixture(scope="module")
def options() -> dict[str, Any]:
    """Settings of the module's server; a module may bring its own."""
    return {}


@pytest.fixture(scope="module")
def server(base, adapters, options, tmp_path_factory) -> Iterator[Server]:
    """The module's server, with the adapter `a` registered."""
    with Server(base, tmp_path_factory.mktemp("data"), **options) as server:
        assert server.put("a", adapters[0]).status_code == 201
        yield server


@pytest.fixture(scope="module")
def admin(base, tmp_path_factory) -> Iterator[Admin]:
    """The admin of a server of the module's own, with AUTH on."""
    with administered(base, tmp_path_factory.mktemp("data")) as admin:
        yield admin


@pytest.fixture
def idle(server) -> Iterator[None]:
    """The test leaves nothing held."""
    yield
    server.idle()


@pytest.fixture
def gate(server, monkeypatch) -> Iterator[Gate]:
    """Stands before every step of the engine; closed at first."""
    gate = Gate(server.runner.run)
    monkeypatch.setattr(server.runner, "run", gate)
    yield gate
    gate.open()


@pytest.fixture
def script(server, monkeypatch) -> Callable[[str | list[int]], None]:
    """Makes the model answer a given text byte by byte, or given tokens."""
    run = server.runner.run

    def answer(text: str | list[int]) -> None:
        ids = ids_of(text) if isinstance(text, str) else text

        def scripted(work, copy):
            choices = run(work, copy)
            return [(item, replace(choice, token=ids[item.sequence.produced % len(ids)])) for item, choice in choices]

        monkeypatch.setattr(server.runner, "run", scripted)

    return answer
