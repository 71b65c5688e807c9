"""Cores and free memory under affinity and cgroup v2 limits, read from a made-up /proc and /sys."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from server import machine

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _eight_cores_and_sixteen_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=16 * GIB))


def group(root: Path, path: str = "", **files: str) -> None:
    """Writes the files of a cgroup; `cpu_max` is cpu.max."""
    folder = root / "sys/fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(f"{text}\n")


def member_of(root: Path, text: str) -> None:
    """The process's /proc/self/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(text)


@pytest.mark.parametrize(
    ("cpu_max", "expected"),
    [
        ("max 100000", 8),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("10000 100000", 1),
        ("1600000 100000", 8),
        ("200000 0", 8),
        ("", 8),
        ("nonsense", 8),
    ],
)
def test_the_quota_bounds_the_cores_and_is_rounded_up(cpu_max: str, expected: int, tmp_path: Path) -> None:
    group(tmp_path, cpu_max=cpu_max)
    assert machine.cores(tmp_path) == expected


def test_affinity_bounds_the_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3, 5})
    group(tmp_path, cpu_max="400000 100000")
    assert machine.cores(tmp_path) == 2


def test_without_affinity_the_machines_cores_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """macOS has no sched_getaffinity, and no cgroups."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert machine.cores(tmp_path) == 6


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [
        (str(4 * GIB), str(GIB), 3 * GIB),
        (str(64 * GIB), str(GIB), 16 * GIB),
        ("max", str(GIB), 16 * GIB),
        (str(GIB), str(2 * GIB), 0),
    ],
)
def test_the_limit_bounds_the_free_memory(limit: str, used: str, expected: int, tmp_path: Path) -> None:
    group(tmp_path, memory_max=limit, memory_current=used)
    assert machine.free_memory(tmp_path) == expected


def test_a_limit_without_its_use_says_nothing(tmp_path: Path) -> None:
    group(tmp_path, memory_max=str(GIB))
    assert machine.free_memory(tmp_path) == 16 * GIB


def test_limits_of_the_own_group_and_of_those_above_hold(tmp_path: Path) -> None:
    """As under systemd: the service has a quota, the slice above it a memory limit; another service is not ours."""
    member_of(tmp_path, "0::/system.slice/onebase.service\n")
    group(tmp_path, "system.slice", cpu_max="max 100000", memory_max=str(8 * GIB), memory_current=str(3 * GIB))
    group(tmp_path, "system.slice/onebase.service", cpu_max="300000 100000", memory_max="max", memory_current="1")
    group(tmp_path, "system.slice/other.service", cpu_max="100000 100000", memory_max="1", memory_current="1")
    assert machine.cores(tmp_path) == 3
    assert machine.free_memory(tmp_path) == 5 * GIB


def test_cgroup_v1_is_not_read(tmp_path: Path) -> None:
    member_of(tmp_path, "4:memory:/docker/abc\n1:cpu:/docker/abc\n")
    group(tmp_path, "docker/abc", cpu_max="100000 100000", memory_max="1", memory_current="1")
    assert (machine.cores(tmp_path), machine.free_memory(tmp_path)) == (8, 16 * GIB)


def test_this_machine_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 1 <= machine.cores() <= (os.cpu_count() or 1)
    assert 0 < machine.free_memory() <= psutil.virtual_memory().total
