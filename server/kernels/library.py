"""The C++ kernels: compiled once for this machine's processor, kept in the user's cache, called through ctypes.

They exist where the obvious PyTorch call was measured to be slower (docs/decisions/0006-kernels-for-the-cpu.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

log = logging.getLogger("onebase.kernels")

_FOLDER = Path(__file__).parent
_SOURCES = tuple(sorted(_FOLDER.glob("*.cpp")))
# OpenMP without naming its library: torch has loaded one, and a second one would be a second pool of threads.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared", "-std=c++17", "-Wl,-Bsymbolic")
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_KEPT = 4  # libraries of a number format: versions of this code, and machines that share a home
_SIGNATURES = {
    "linear": (_POINTER, _INT, _INT, _POINTER, _INT, _POINTER, _POINTER),
    "rope": (_POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT, _INT, _INT, _INT),
    "store_kv": (_POINTER, _INT, _INT, _POINTER, _INT, _INT, _POINTER, _POINTER, _POINTER, *(_INT,) * 5),
    "decode": (
        *(_POINTER, _INT, _INT, _POINTER, _POINTER, _POINTER, _INT, _POINTER, _POINTER),
        *(_INT,) * 8,
        *(_FLOAT, _POINTER),
    ),
    "prefill": (_POINTER, _INT, _INT, _POINTER, _POINTER, _POINTER, *(_INT,) * 8, _FLOAT, _POINTER),
    "rms_norm": (_POINTER, _POINTER, _POINTER, _INT, _INT, _FLOAT, _FLOAT),
    "layer": (_POINTER,) * 4,
    "silu_mul": (_POINTER, _POINTER, _INT),
}


@functools.cache
def library(value: str) -> ctypes.CDLL | None:
    """The kernels for a number format ("float" or "bfloat16"), compiled if need be; None where that cannot be done."""
    try:
        library = ctypes.CDLL(str(_compiled(value)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as fault:  # RuntimeError: a user without a home
        detail = (getattr(fault, "stderr", None) or str(fault)).strip().splitlines()
        log.warning("no kernels of our own (%s): steps take longer", detail[0] if detail else fault)
        return None
    for name, types in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    library.panel_width.restype = _INT
    return library


def _compiled(value: str) -> Path:
    """The library's file, made unless it is there whole. Beside it stands its digest: one that was cut short would
    not fail to load but kill the process. Its time of change is when it was last used."""
    target = _cache() / f"kernels-{value}-{_fingerprint()}.so"
    digest = target.with_suffix(".sha256")
    with contextlib.suppress(OSError):  # before it is read: another process may be about to forget it
        os.utime(target)
    with contextlib.suppress(OSError):
        if digest.read_text() == hashlib.sha256(target.read_bytes()).hexdigest():
            return target
    compiler = shutil.which("g++")
    if compiler is None:
        raise OSError("there is no g++")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # several processes may do this at once
        made = Path(folder) / target.name
        command = [compiler, *_FLAGS, f"-DVALUE={value}", *map(str, _SOURCES), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        noted = made.with_suffix(".sha256")
        noted.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        made.replace(target)
        noted.replace(digest)
    _forget(value, target)
    return target


def _forget(value: str, made: Path) -> None:
    """Of a number format's libraries only `made` and those that were used last stay."""
    with contextlib.suppress(OSError):  # another process does the same
        others = [path for path in made.parent.glob(f"kernels-{value}-*.so") if path != made]
        for old in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)[_KEPT - 1 :]:
            old.unlink(missing_ok=True)
            old.with_suffix(".sha256").unlink(missing_ok=True)


def _fingerprint() -> str:
    """Changes with the sources and the processor, for a home may be shared by several machines."""
    whole = hashlib.sha256(repr(_FLAGS).encode() + platform.machine().encode())
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        whole.update(next((line for line in file if line.startswith(("flags", "Features"))), "").encode())
    for path in sorted(_FOLDER.glob("*.[ch]*")):
        whole.update(path.read_bytes())
    return whole.hexdigest()[:16]


def _cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onebase"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"others can write to {folder}")  # and so put code into this process
    return folder
