"""What this process may use of the machine: its cores and its free memory, under whatever limits it runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

ROOT = Path("/")


def cores(root: Path = ROOT) -> int:
    """Cores that this process may compute on, at least 1: its affinity (taskset, cpusets) and its cgroup v2 quota."""
    known = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    counts = [len(known)]
    for group in _groups(root):
        quota, period = _numbers(group / "cpu.max", 2)
        if quota is not None and period:
            counts.append(-(-quota // period))
    return max(1, min(counts))


def free_memory(root: Path = ROOT) -> int:
    """Bytes of memory that this process may still take: what the machine has, and what its cgroup v2 limit leaves."""
    free = [psutil.virtual_memory().available]
    for group in _groups(root):
        (limit,), (used,) = _numbers(group / "memory.max", 1), _numbers(group / "memory.current", 1)
        if limit is not None and used is not None:
            free.append(limit - used)
    return max(0, min(free))


def memory_limit(root: Path = ROOT) -> int:
    """Bytes of memory that this process may take at all: the least of the machine's and its cgroups' limits."""
    limits = [_numbers(group / "memory.max", 1)[0] for group in _groups(root)]
    return min([int(psutil.virtual_memory().total), *(limit for limit in limits if limit is not None)])


def _groups(root: Path) -> Iterator[Path]:
    """The process's own cgroup v2 directory and those above it: a limit on any of them holds."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    own = PurePosixPath(next((line.removeprefix("0::") for line in lines if line.startswith("0::/")), "/"))
    yield from (root / "sys/fs/cgroup" / group.relative_to("/") for group in (own, *own.parents))


def _numbers(path: Path, count: int) -> list[int | None]:
    """The `count` numbers in a file; None for "max" and for what is not there."""
    try:
        words = path.read_text().split()
    except OSError:
        words = []
    return [int(word) if word.isdigit() else None for word in (words + [""] * count)[:count]]
