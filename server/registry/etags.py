"""`If-Match` and `If-None-Match` (RFC 9110): the entity tag of an adapter is its quoted digest."""

from __future__ import annotations

import re

from server.errors import InvalidRequest, PreconditionFailed

MAX_HEADER = 8192
_ETAG = re.compile(r'\s*(W/)?"([^"]*)"\s*')


def check_preconditions(digest: str | None, if_match: str | None, if_none_match: str | None) -> None:
    """Hold both headers against the current digest (None: there is no such adapter).

    Raises `PreconditionFailed`, or `InvalidRequest` for a header that is not a list of tags: one that was ignored
    would let a change through that its sender meant to guard.
    """
    if if_match is not None and not _matches(if_match, digest, "if-match", weak=False):
        raise PreconditionFailed("If-Match does not name the current version", param="if-match")
    if if_none_match is not None and _matches(if_none_match, digest, "if-none-match", weak=True):
        raise PreconditionFailed("If-None-Match names the current version", param="if-none-match")


def _matches(header: str, digest: str | None, param: str, *, weak: bool) -> bool:
    """Whether a tag of the header is the digest. If-Match compares strongly (a weak tag never matches)."""
    if header.strip() == "*":
        return digest is not None
    matched = False
    for part in header[:MAX_HEADER].split(","):
        tag = _ETAG.fullmatch(part)
        if tag is None:
            raise InvalidRequest(f"{param} must be * or a list of quoted entity tags", param=param)
        matched = matched or (tag[2] == digest and (weak or not tag[1]))
    return matched
