"""API keys: `ob_<id>_<secret>`. Pure functions; what is stored of a secret is its SHA-256.

A secret has 256 random bits, so that one round of SHA-256 is as good as a slow hash: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from enum import StrEnum

_ID_BYTES, _SECRET_BYTES = 8, 32
_HEADER = re.compile(r"bearer +ob_(?P<id>[0-9a-f]{16})_(?P<secret>[A-Za-z0-9_-]{43})", re.IGNORECASE | re.ASCII)
_MAX_HEADER = 256  # characters: nothing longer is looked at
_NOBODY = hashlib.sha256(secrets.token_bytes(_SECRET_BYTES)).digest()  # a secret that nobody has


class Scope(StrEnum):
    """What a key may be used for."""

    GENERATE = "generate"
    ADAPTERS_WRITE = "adapters:write"
    USAGE_READ = "usage:read"
    METRICS_READ = "metrics:read"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key just made. `token` is what its owner sends; it exists only here and is never written anywhere."""

    id: str
    token: str = field(repr=False)
    digest: bytes


def make() -> NewKey:
    """A new key: an id of 64 random bits and a secret of 256."""
    key_id, secret = secrets.token_hex(_ID_BYTES), secrets.token_urlsafe(_SECRET_BYTES)
    return NewKey(id=key_id, token=f"ob_{key_id}_{secret}", digest=digest(secret))


def digest(secret: str) -> bytes:
    """The 32 bytes that are stored of a secret."""
    return hashlib.sha256(secret.encode("ascii")).digest()


def parse(header: str | None) -> tuple[str, str] | None:
    """Id and secret of an `Authorization` header, or None for whatever is not one of our keys."""
    if header is None or len(header) > _MAX_HEADER:
        return None
    found = _HEADER.fullmatch(header)
    return (found["id"].lower(), found["secret"]) if found else None


def matches(secret: str, stored: bytes | None) -> bool:
    """Whether `secret` is the one whose digest is `stored`, in the same time whether it is or not.

    With None, for an id that nobody has, the same work is done and the answer is no.
    """
    same = hmac.compare_digest(digest(secret), _NOBODY if stored is None else stored)
    return same and stored is not None
