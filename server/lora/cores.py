"""How many cores torch computes on, thread by thread.

The engine's thread has all of them and every other thread one, from the start of the process. OpenMP keeps a pool for
each thread that has ever computed on several cores; once there are more threads in all pools than cores, it stops
spinning between operations and each one waits to be woken: a decode step took 95 ms instead of 62 with one idle pool
of two threads beside the engine's. Two busy pools are far worse.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def take(cores: int) -> None:
    """This thread computes on `cores` cores. MKL takes it for the whole process: whoever calls last rules there."""
    torch.set_num_threads(cores)
    torch.get_num_threads()  # binds the number to this thread; else it would be asked for at the first operation


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Inside, OpenMP and MKL give this thread one core; no other thread notices, as it would with
    torch.set_num_threads."""
    cores = torch.get_num_threads()  # bound now: torch would bind it later and undo what follows
    openmp, mkl = _limits()
    if openmp is not None:
        openmp(1)
    before = mkl(1) if mkl is not None else 0
    try:
        yield
    finally:
        if mkl is not None:
            mkl(before)
        if openmp is not None:
            openmp(cores)


@functools.cache
def _limits() -> tuple[Any, Any]:
    """What sets the calling thread's number of threads in OpenMP, and in MKL, whose products go by one of their own;
    None where torch has come without."""
    torch_cpu = Path(torch.__file__).parent / "lib/libtorch_cpu.so"
    mkl = ctypes.CDLL(str(torch_cpu)) if torch_cpu.exists() else None  # loaded already, its names are not public
    return (
        getattr(ctypes.CDLL(None), "omp_set_num_threads", None),
        getattr(mkl, "MKL_Set_Num_Threads_Local", None),
    )
