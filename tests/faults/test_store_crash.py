"""`kill -9` and a full disk at every write of the store: the state before or the state after, never between."""

import errno
import os
import signal
from concurrent.futures import Executor
from pathlib import Path

import pytest
import torch

from server.errors import StorageFailure
from server.lora.weights import AdapterSummary
from server.registry import drafts
from server.registry.registry import Registry
from server.registry.store import Store
from tests.adapters import stage_adapter, tiny_base

BASE = tiny_base(1)
WRITES = ("mkdir", "chmod", "fsync", "link", "rename", "replace", "unlink", "rmdir")
SUMMARY = AdapterSummary(rank=4, alpha=8.0, targets=("q_proj",), parameters=1)


def at_write(monkeypatch, number, happens):
    """Call `happens` instead of the `number`th write, before it; returns the count of writes so far."""
    count = [0]

    def hooked(original):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == number:
                happens()
            return original(*args, **kwargs)

        return call

    for name in WRITES:
        monkeypatch.setattr(os, name, hooked(getattr(os, name)))
    return count


class Inline(Executor):
    """Works at once: threads do not survive a fork, and what they do shall be interrupted too."""

    def submit(self, work, *arguments):
        work(*arguments)


def open_registry(root, **options):
    registry = Registry(Store(root), BASE, max_rank=16, dtype=torch.float32, **options)
    registry._catalogue._sweeper = Inline()
    return registry


def put(registry, seed):
    with stage_adapter(registry._store, BASE, seed=seed) as staging:
        return registry.put("a", staging)


CHANGES = {
    "first put": (0, lambda registry: put(registry, 1)),
    "replace": (1, lambda registry: put(registry, 2)),
    "replace and prune": (2, lambda registry: put(registry, 3)),
    "rollback": (2, lambda registry: registry.rollback("a", 1)),
    "delete": (2, lambda registry: registry.delete("a")),
}


def state(registry):
    page, _ = registry.list(limit=9)
    return [(one.version.version, one.version.digest) for one in page]


def prepare(root, versions):
    registry = open_registry(root, max_versions=2)
    for seed in range(versions):
        put(registry, seed)
    return registry


def outcome(root, change):
    """What the change leads to when nothing goes wrong, in a directory of its own."""
    versions, act = CHANGES[change]
    registry = prepare(root, versions)
    before = state(registry)
    act(registry)
    return before, state(registry)


def check_whole(root, allowed):
    """A restart finds an allowed state, every named byte intact, nothing else on disk, and takes uploads."""
    registry = open_registry(root, max_versions=2)
    found = state(registry)
    assert found in allowed
    named = {version.digest for _, digest in found for version in registry.versions("a")}
    assert set(registry._store.digests()) == named
    for digest in named:
        registry._store.verify(digest)
    assert list((root / "staging").iterdir()) == []
    put(registry, 77)
    assert open_registry(root).get("a").digest == registry.get("a").digest


def killed(act, registry, number, monkeypatch):
    """Run `act` in a child that is killed at its `number`th write. Returns whether it was."""
    child = os.fork()
    if child == 0:
        # Tensor work is not safe in a forked child, and is not what is tested here.
        monkeypatch.setattr(drafts, "inspect_adapter", lambda *args, **kwargs: SUMMARY)
        at_write(monkeypatch, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
        try:
            act(registry)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("change", CHANGES)
def test_killed_at_every_write(tmp_path, monkeypatch, change):
    versions, act = CHANGES[change]
    allowed = outcome(tmp_path / "plain", change)
    number = 0
    while True:
        number += 1
        root = tmp_path / str(number)
        died = killed(act, prepare(root, versions), number, monkeypatch)
        check_whole(root, allowed if died else allowed[1:])
        if not died:
            break
    assert number > (2 if change == "delete" else 3)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_changes_nothing(tmp_path, change, code):
    versions, act = CHANGES[change]
    before, after = outcome(tmp_path / "plain", change)

    messages: list[str] = []

    def full():
        raise OSError(code, os.strerror(code))

    number = 0
    while True:
        number += 1
        root = tmp_path / str(number)
        registry = prepare(root, versions)
        with pytest.MonkeyPatch.context() as patch:
            count = at_write(patch, number, full)
            try:
                act(registry)
                failed = False
            except StorageFailure as exc:
                failed = True
                messages.append(exc.message)
        assert state(registry) == (before if failed else after)
        assert registry._catalogue.holds.uploads == {}
        for _, digest in state(registry):
            registry.load(digest)
        check_whole(root, [before] if failed else [after])
        if count[0] < number:
            break
    assert not any(str(tmp_path) in message for message in messages)


def test_a_full_disk_while_the_name_is_written(tmp_path, monkeypatch):
    registry = prepare(tmp_path, 1)
    before = state(registry)

    class Full:
        def __init__(self, file):
            self._file = file

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            self._file.close()

        def write(self, content):
            self._file.write(content[:5])
            raise OSError(errno.ENOSPC, "full")

    original = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda path, mode="r", **k: Full(original(path, mode)) if mode == "xb" else original(path, mode, **k),
    )
    with pytest.raises(StorageFailure):
        put(registry, 5)
    monkeypatch.undo()
    assert state(registry) == before
    assert len(registry._store.digests()) == 1
    check_whole(tmp_path, [before])
