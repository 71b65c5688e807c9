"""Adapters on disk: immutable objects named by their content, and small name records that point at them.

    objects/<aa>/<hex>/{adapter_config.json, adapter_model.safetensors}
    names/<tenant>/<name>.json
    staging/<random>/

Everything is written in `staging/`, flushed to the disk and then renamed into place, so that a crash at any moment
leaves the state before or the state after. One server owns the directory at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from server.errors import AdapterUnavailable, StorageFailure

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def digest_of(config_sha256: str, weights_sha256: str) -> str:
    """The identity of an adapter, from the hex SHA-256 of its two files."""
    return "sha256:" + hashlib.sha256(f"onebase-adapter-1\n{config_sha256}\n{weights_sha256}\n".encode()).hexdigest()


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turn an `OSError` of the data directory into `StorageFailure`: "the data directory could not <doing>"."""
    try:
        yield
    except OSError as exc:
        reason = os.strerror(exc.errno) if exc.errno else "input/output error"
        raise StorageFailure(f"the data directory could not {doing}: {reason.lower()}") from exc


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """An object of the store: the bytes of its config, where its weights lie, and the size of both files."""

    config: bytes
    weights_path: Path
    bytes: int


class Staging:
    """A private directory for one upload. As a context manager it is deleted on exit, published or not.

    Write `config_path` and `weights_path` (wrap the writes in `storage_errors`); after `digest()` they must not change.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config_path = path / CONFIG_FILE
        self.weights_path = path / WEIGHTS_FILE
        self._digest: str | None = None

    def digest(self) -> str:
        """The digest of the two files, hashed once. Raises `StorageFailure` when they cannot be read."""
        if self._digest is None:
            with storage_errors("read the upload back"):
                self._digest = digest_of(_sha256(self.config_path), _sha256(self.weights_path))
        return self._digest

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


class Store:
    """The directory `root` of adapters. Safe to call from several threads; the registry decides what may be removed."""

    def __init__(self, root: Path):
        self.root = root
        self._objects, self._names, self._staging = root / "objects", root / "names", root / "staging"
        self._swap = threading.Lock()
        self._graves: list[Path] = []
        with storage_errors("be prepared"):
            for private in (root.parent, root):  # those that are there stay as they are
                private.mkdir(mode=0o700, parents=True, exist_ok=True)
            for directory in (self._objects, self._names, self._staging):
                directory.mkdir(parents=True, exist_ok=True)
            for byte in range(256):  # all of them now: one made for an upload would tell that it is the first below it
                (self._objects / f"{byte:02x}").mkdir(exist_ok=True)
            _fsync(self._objects)
            for stale in self._staging.iterdir():
                _delete_tree(stale)

    def stage(self) -> Staging:
        """A new private directory for an upload. Raises `StorageFailure`."""
        with storage_errors("start an upload"):
            path = self._staging / secrets.token_hex(8)
            path.mkdir(mode=0o700)
        return Staging(path)

    def publish(self, staging: Staging) -> str:
        """Make the staged files an object and return its digest. Raises `StorageFailure`.

        Idempotent. The staged files take the place of those of an object that is there already, intact or damaged: no
        work is skipped, and the space of the old files is freed by `sweep`, so that an upload does not tell by its time
        that somebody else has stored the same bytes. After a failure or a crash the object may be there, whole or in
        part: the caller, or the next start, removes it where no name needs it.
        """
        digest = staging.digest()
        target = self._object_path(digest)
        with storage_errors("store the adapter"):
            for path in (staging.config_path, staging.weights_path):
                os.chmod(path, 0o444)
                _fsync(path)
            _fsync(staging.path)
            with self._swap:
                target.mkdir(mode=0o700, exist_ok=True)
                for path in (staging.config_path, staging.weights_path):  # one that is there is never without either
                    self._keep_for_later(target / path.name)
                    os.replace(path, target / path.name)
            _fsync(target)
            _fsync(target.parent)
        return digest

    def open(self, digest: str) -> StoredAdapter:
        """The object without a check of its content. Raises `AdapterUnavailable` when it is not there."""
        path = self._object_path(digest)
        try:
            config = (path / CONFIG_FILE).read_bytes()
            size = (path / WEIGHTS_FILE).stat().st_size
        except OSError as exc:
            raise AdapterUnavailable(f"the stored adapter {digest} cannot be read") from exc
        return StoredAdapter(config, path / WEIGHTS_FILE, len(config) + size)

    def verify(self, digest: str) -> StoredAdapter:
        """The object, hashed again. Raises `AdapterUnavailable` when it is missing or its bytes have changed."""
        stored = self.open(digest)
        try:
            found = digest_of(_hex(stored.config), _sha256(stored.weights_path))
        except OSError as exc:
            raise AdapterUnavailable(f"the stored adapter {digest} cannot be read") from exc
        self._compare(digest, found)
        return stored

    def read(self, digest: str) -> tuple[bytes, bytearray]:
        """Config and weights of the object, read once and hashed. Raises `AdapterUnavailable` like `verify`."""
        stored = self.open(digest)
        try:
            weights = bytearray(stored.weights_path.stat().st_size)
            with stored.weights_path.open("rb", buffering=0) as file:
                view = memoryview(weights)
                while view and (count := file.readinto(view)):  # one call reads 2 GiB at most
                    view = view[count:]
        except OSError as exc:
            raise AdapterUnavailable(f"the stored adapter {digest} cannot be read") from exc
        self._compare(digest, digest_of(_hex(stored.config), _hex(weights)))
        return stored.config, weights

    def exists(self, digest: str) -> bool:
        """Whether the object's directory is there, whatever is in it."""
        return self._object_path(digest).is_dir()

    def remove(self, digest: str) -> None:
        """Delete an object if it is there. Raises `StorageFailure`."""
        self.retire(digest)
        self.sweep()

    def retire(self, digest: str) -> None:
        """The quick half of `remove`: one rename, so that the object is gone whole. Raises `StorageFailure`."""
        with storage_errors("remove an adapter"):
            self._retire(digest)

    def sweep(self) -> None:
        """The slow half of `remove`: free the space of what was retired. What fails is left for the next start."""
        while self._graves:
            try:
                grave = self._graves.pop()
            except IndexError:  # another thread took the last one
                return
            with suppress(OSError):
                _delete_tree(grave)

    def _keep_for_later(self, path: Path) -> None:
        """Another name for a file that is about to be replaced, so that `sweep` frees it: a large one takes long."""
        grave = self._staging / secrets.token_hex(8)
        with suppress(OSError):  # there is none, or the file system has no links: then it is freed at once
            os.link(path, grave)
            self._graves.append(grave)

    def _retire(self, digest: str) -> None:
        target = self._object_path(digest)
        if target.exists():
            grave = self._staging / secrets.token_hex(8)
            os.rename(target, grave)
            self._graves.append(grave)

    def digests(self) -> list[str]:
        """Every object in the store."""
        return [f"sha256:{path.name}" for path in self._objects.glob("??/*") if len(path.name) == 64]

    def names(self) -> list[tuple[str, str]]:
        """Every (tenant, name) with a record."""
        return sorted((path.parent.name, path.name.removesuffix(".json")) for path in self._names.glob("*/*.json"))

    def read_name(self, tenant: str, name: str) -> dict[str, Any] | None:
        """The record of a name, None when there is none. Raises `AdapterUnavailable` when it cannot be read."""
        try:
            record = json.loads(self._name_path(tenant, name).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as exc:
            raise AdapterUnavailable(f"the record of the adapter {name} cannot be read") from exc
        if not isinstance(record, dict):
            raise AdapterUnavailable(f"the record of the adapter {name} is damaged")
        return record

    def write_name(self, tenant: str, name: str, record: Mapping[str, Any]) -> None:
        """Replace the record of a name in one step. On `StorageFailure` the old record stands."""
        target = self._name_path(tenant, name)
        with storage_errors("record the adapter's name"):
            if not target.parent.is_dir():
                target.parent.mkdir(exist_ok=True)
                _fsync(self._names)
            before = target.read_bytes() if target.exists() else None
            self._replace(target, json.dumps(record).encode())
            self._settle(target, before)

    def delete_name(self, tenant: str, name: str) -> None:
        """Remove the record of a name, if there is one. On `StorageFailure` it stands."""
        target = self._name_path(tenant, name)
        with storage_errors("remove the adapter's name"):
            if target.exists():
                before = target.read_bytes()
                os.unlink(target)
                self._settle(target, before)

    def _settle(self, target: Path, before: bytes | None) -> None:
        """Flush the directory of a changed record. If that fails the caller hears of a failure, so that a restart
        must find the old record again (None: there was none)."""
        try:
            _fsync(target.parent)
        except OSError:
            if before is None:
                os.unlink(target)
            else:
                self._replace(target, before)
            raise

    def _replace(self, target: Path, content: bytes) -> None:
        temporary = self._staging / secrets.token_hex(8)
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    @staticmethod
    def _compare(wanted: str, found: str) -> None:
        if found != wanted:
            raise AdapterUnavailable(f"the stored adapter {wanted} is damaged: its bytes do not match its digest")

    def _object_path(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise AdapterUnavailable(f"{digest[:80]!r} is not a digest of this store")
        hexdigits = digest.removeprefix("sha256:")
        return self._objects / hexdigits[:2] / hexdigits

    def _name_path(self, tenant: str, name: str) -> Path:
        for part in (tenant, name):
            if not part or part.startswith(".") or "/" in part or "\0" in part:
                # The registry checks names first, so this is a fault of the caller and never a user's.
                raise ValueError(f"{part!r} cannot be a file name")
        return self._names / tenant / f"{name}.json"


def _delete_tree(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _hex(content: bytes | bytearray) -> str:
    return hashlib.sha256(content).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
