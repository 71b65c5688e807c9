"""Adapters that are fetched instead of uploaded: `file://`, `hf://` and `s3://`, each only where the settings allow.

A source is compared with the allowed prefixes one path component at a time, so that `hf://acme` does not admit
`hf://acme-evil/x`. Nothing but the two files of an adapter is ever read, and never more than the byte cap.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from server.core import MAX_CONFIG_BYTES
from server.errors import Forbidden, InvalidRequest, TooLarge
from server.registry.store import CONFIG_FILE, WEIGHTS_FILE, Staging, storage_errors

MAX_SOURCE = 2048
_CHUNK = 1024 * 1024
_COMPONENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")
_HF = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?/?", re.ASCII)


def fetch(source: str, staging: Staging, allowed: Sequence[str], max_bytes: int, *, store: Path) -> None:
    """Copy the adapter at `source` into `staging`.

    `allowed` are URL prefixes (`file:///srv/adapters/`, `hf://acme/`, `s3://bucket/dir/`); nothing below `store`, where
    every tenant's adapters lie, is read whatever they allow; `max_bytes` bounds both files together. Raises
    `Forbidden`, `InvalidRequest` (the source is malformed or cannot be read), `TooLarge`, or `StorageFailure`.
    """
    scheme, separator, _ = source.partition("://")
    if not separator or scheme not in ("file", *_OPENERS) or len(source) > MAX_SOURCE or not source.isprintable():
        raise InvalidRequest("source must be a file://, hf:// or s3:// address", param="source")
    prefixes = [prefix for prefix in allowed if prefix.startswith(f"{scheme}://")]
    if not prefixes:
        raise _forbidden()
    opener = _FileSource(source, prefixes, store) if scheme == "file" else _OPENERS[scheme](source, prefixes)
    left = max_bytes
    for name, target in ((CONFIG_FILE, staging.config_path), (WEIGHTS_FILE, staging.weights_path)):
        limit = min(left, MAX_CONFIG_BYTES) if name == CONFIG_FILE else left
        with closing(_guarded(opener.open, name)) as file:
            left -= _copy(file, target, limit, name)


def _forbidden() -> Forbidden:
    return Forbidden("the settings do not allow this source", code="source_not_allowed", param="source")


def _unreadable(what: str) -> InvalidRequest:
    return InvalidRequest(f"{what} could not be read from the source", code="source_unreadable", param="source")


def _guarded(call: Any, *arguments: Any) -> Any:
    """A call into a foreign library. Its errors may hold paths and tokens, so only the kind of failure is told."""
    try:
        return call(*arguments)
    except (Forbidden, InvalidRequest):
        raise
    except ImportError as exc:
        raise InvalidRequest(
            f"this server cannot read that kind of source: the package {exc.name} is not installed",
            code="source_unavailable",
            param="source",
        ) from exc
    except Exception as exc:  # every client library brings its own
        raise _unreadable(str(arguments[0]) if arguments else "the adapter") from exc


def _copy(file: BinaryIO, target: Path, limit: int, name: str) -> int:
    """Copy at most `limit` bytes; returns how many. Raises `TooLarge` at the first byte over it."""
    total = 0
    with storage_errors("keep the upload"):
        out = target.open("wb")
    with out:
        while chunk := _read(file, name):
            total += len(chunk)
            if total > limit:
                raise TooLarge(f"{name} is larger than the {limit} bytes that are left for it", param="source")
            with storage_errors("keep the upload"):
                out.write(chunk)
        with storage_errors("keep the upload"):
            out.flush()
    return total


def _read(file: BinaryIO, name: str) -> bytes:
    try:
        return file.read(_CHUNK)
    except Exception as exc:  # a network client's error, as above
        raise _unreadable(name) from exc


class _FileSource:
    """`file://`: a directory of this machine, with every symbolic link resolved before it is compared."""

    def __init__(self, source: str, prefixes: Sequence[str], store: Path):
        self._roots, self._store = [_local_path(prefix).resolve() for prefix in prefixes], store.resolve()
        self._directory = self._inside(_local_path(source))

    def open(self, name: str) -> BinaryIO:
        # The link may be in the last component (a hub cache is made of them), so each file is resolved by itself.
        path = self._inside(self._directory / name)
        # A pipe or a device would hang or never end: opened without waiting, and only a regular file is read.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise _unreadable(name)
        return os.fdopen(descriptor, "rb")

    def _inside(self, path: Path) -> Path:
        try:
            resolved = path.resolve()
        except (OSError, RuntimeError) as exc:  # a loop of links
            raise _forbidden() from exc
        allowed = any(resolved.is_relative_to(root) for root in self._roots)
        if not allowed or resolved.is_relative_to(self._store):
            raise _forbidden()
        return resolved


def _local_path(url: str) -> Path:
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or not path.startswith("/") or "\0" in path:
        raise InvalidRequest("a file source is file:///an/absolute/directory", param="source")
    return Path(path)


class _HubSource:
    """`hf://org/repo[@revision]`: both files from the one commit that the revision is now."""

    def __init__(self, source: str, prefixes: Sequence[str]):
        found = _HF.fullmatch(source)
        if found is None or ".." in source:
            raise InvalidRequest("a hub source is hf://org/repo or hf://org/repo@revision", param="source")
        whole = found["repo"].split("/")
        pinned = [*whole[:-1], f"{whole[-1]}@{found['revision']}"]
        if not any(_below(prefix, whole) or _below(prefix, pinned) for prefix in prefixes):
            raise _forbidden()
        self._repo, self._revision = found["repo"], found["revision"]
        self._commit: str | None = None

    def open(self, name: str) -> BinaryIO:
        import huggingface_hub

        if self._commit is None:
            self._commit = huggingface_hub.HfApi().model_info(self._repo, revision=self._revision).sha
        # A block size of 0 streams the file, so that the byte cap ends the download and not only the copy.
        files = huggingface_hub.HfFileSystem()
        opened: BinaryIO = files.open(f"{self._repo}@{self._commit}/{name}", "rb", block_size=0)
        return opened


class _S3Source:
    """`s3://bucket/directory`, through fsspec and s3fs."""

    def __init__(self, source: str, prefixes: Sequence[str]):
        components = _components(source)
        # No empty component, no "..", no pattern character that a file system library would expand.
        if len(components) < 2 or not all(_COMPONENT.fullmatch(component) for component in components):
            raise InvalidRequest("an S3 source is s3://bucket/directory", param="source")
        if not any(_below(prefix, components) for prefix in prefixes):
            raise _forbidden()
        self._directory = "/".join(components)

    def open(self, name: str) -> BinaryIO:
        import fsspec

        opened: BinaryIO = fsspec.filesystem("s3").open(f"{self._directory}/{name}", "rb")
        return opened


def _components(url: str) -> list[str]:
    return url.partition("://")[2].removesuffix("/").split("/")


def _below(prefix: str, components: Sequence[str]) -> bool:
    wanted = [component for component in _components(prefix) if component]
    return [*components[: len(wanted)]] == wanted


_OPENERS: dict[str, Any] = {"hf": _HubSource, "s3": _S3Source}
