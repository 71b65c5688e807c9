"""JSON from a stranger: no duplicate keys, no NaN or Infinity, a bounded depth. Plain Python."""

from __future__ import annotations

import json
from typing import Any, NoReturn

MAX_DEPTH = 16


class JsonError(ValueError):
    """The bytes are not the JSON object that is asked for; the text says why."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise JsonError(f"the key {key[:80]!r} stands twice")
            seen.add(key)
    return found


def _no_constant(text: str) -> NoReturn:
    raise JsonError(f"{text} is not JSON")


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return False
    return True


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw` (UTF-8), or `JsonError` with the reason. The caller bounds the size of `raw`."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except JsonError:
        raise
    except UnicodeDecodeError as exc:
        raise JsonError("it is not UTF-8 text") from exc
    except RecursionError as exc:
        raise JsonError("it is nested too deeply") from exc
    except ValueError as exc:  # also integers of more digits than Python reads
        raise JsonError("it is not valid JSON") from exc
    if not isinstance(value, dict):
        raise JsonError("it is not a JSON object")
    if _too_deep(value):
        raise JsonError("it is nested too deeply")
    return value
