"""Who owns a data directory."""

from __future__ import annotations

import fcntl
import logging
import os
import stat
from pathlib import Path

log = logging.getLogger("onebase.datadir")


def own(data_dir: Path) -> int:
    """Locks the data directory as long as this process lives, or until the descriptor that it gives is closed; raises
    OSError if a server has it. One that is not there is made for this user alone, and one that others may enter is
    warned of: every tenant's adapters and the ledger are in it."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = stat.S_IMODE(data_dir.stat().st_mode)
        if mode & 0o077:
            log.warning("the data directory %s is open to other users (mode %o): chmod 700 closes it", data_dir, mode)
        descriptor = os.open(data_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as fault:
        raise OSError(f"cannot use the data directory {data_dir}: {fault.strerror}") from fault
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OSError(
            f"another onebase server uses the data directory {data_dir}: each needs one of its own (ONEBASE_DATA_DIR)"
        ) from None
    return descriptor
