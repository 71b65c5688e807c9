"""How many cores torch computes on, thread by thread.

The engine's thread has all of them and every other thread one, from the start of the process. OpenMP keeps a pool for
each thread that has ever computed on several cores; once there are more threads in all pools than cores, it stops
spinning between operations and each one waits to be woken: a decode step took 95 ms instead of 62 with one idle pool
of two threads beside the engine's. Two busy pools are far worse.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import torch


def take(cores: int) -> None:
    """This thread computes on `cores` cores. MKL takes it for the whole process: whoever calls last rules there."""
    torch.set_num_threads(cores)
    torch.get_num_threads()  # binds the number to this thread; else it would be asked for at the first operation


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Inside, OpenMP gives this thread one core; no other thread notices, as it would with torch.set_num_threads."""
    cores = torch.get_num_threads()  # bound now: torch would bind it later and undo what follows
    openmp = ctypes.CDLL(None)  # torch has loaded it
    if not hasattr(openmp, "omp_set_num_threads"):
        yield
        return
    openmp.omp_set_num_threads(1)
    try:
        yield
    finally:
        openmp.omp_set_num_threads(cores)
