"""Times as clients write them."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime

from server.errors import InvalidRequest

_SECONDS = re.compile(r"\d{1,13}(\.\d{1,9})?", re.ASCII)
LAST_MS = 2**53


def moment_ms(given: str | float, param: str) -> int:
    """Milliseconds since 1970 of seconds, or of ISO 8601 (UTC where it names no zone). Raises InvalidRequest."""
    try:
        if isinstance(given, str) and not _SECONDS.fullmatch(given):
            moment = datetime.fromisoformat(given)
            seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        else:
            seconds = float(given)
    except (ValueError, OverflowError) as fault:
        raise _wrong(param) from fault
    found = math.floor(round(seconds * 1000, 3))  # a float's last digit must not become a millisecond less
    if not 0 <= found < LAST_MS:
        raise _wrong(param)
    return found


def _wrong(param: str) -> InvalidRequest:
    return InvalidRequest(f"{param} is seconds since 1970 or ISO 8601, as 2026-11-01T00:00:00Z", param=param)
