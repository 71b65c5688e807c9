"""Who owns a data directory."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def own(data_dir: Path) -> int:
    """Locks the data directory as long as this process lives, or until the descriptor that it gives is closed; raises
    OSError if a server has it."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(data_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as fault:
        raise OSError(f"cannot use the data directory {data_dir}: {fault.strerror}") from fault
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OSError(f"another onebase server uses the data directory {data_dir}") from None
    return descriptor
