"""Shared fixtures: small random bases with adapters, and the real SmolLM2."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: it reads this only once

from transformers.utils import logging as hf_logging

from tests.databases import anyio_backend, database, database_url, postgres, servers_databases  # noqa: F401 - fixtures

hf_logging.disable_progress_bar()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--database postgresql`: servers that tests start use it, each a database of its own."""
    kinds = ("sqlite", "postgresql")
    parser.addoption("--database", choices=kinds, default=kinds[0], help="of the servers that tests start")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests skip without a GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test has logged may be no text that can be sent, as xdist's processes do with reports."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for models and adapters that a whole session shares."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real base, converted once into the default data directory."""
    from server.model.bundled import materialise

    return materialise()
