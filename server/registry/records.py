"""What is remembered of one adapter's name: its versions, and which of them is current."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from server.core import AdapterRef, AdapterVersion
from server.errors import InvalidRequest

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
Versions = list[AdapterVersion]
Key = tuple[str, str]  # (tenant, name)


@dataclass(frozen=True, slots=True)
class Record:
    """All about one name. `versions` are oldest first; `next` is the number that the next version gets. `merged`: its
    owner wants a lane of its own for it, and `pinned`, that it keeps it. `public`: all tenants may use it."""

    current: int
    next: int
    versions: tuple[AdapterVersion, ...]
    merged: bool = False
    pinned: bool = False
    public: bool = False

    def version(self, number: int) -> AdapterVersion | None:
        return next((version for version in self.versions if version.version == number), None)

    @property
    def bytes(self) -> int:
        """On disk, of all its versions; what two of them share counts once."""
        return sum({version.digest: version.bytes for version in self.versions}.values())

    @property
    def now(self) -> AdapterVersion:
        return next(version for version in self.versions if version.version == self.current)


@dataclass(frozen=True, slots=True)
class Named:
    """What a name means to a tenant: the current version, whose it is, and whether that is published."""

    owner: str
    version: AdapterVersion
    public: bool


@dataclass(frozen=True, slots=True)
class PutResult:
    """`created`: the name is new. `changed`: another version is current now than before."""

    version: AdapterVersion
    created: bool
    changed: bool


def parse_record(raw: dict[str, object]) -> Record:
    """A `Record` from its JSON. Raises KeyError, TypeError, ValueError or StopIteration when it is damaged."""
    versions = raw["versions"]
    current, following = raw["current"], raw["next"]
    if not isinstance(versions, list) or not isinstance(current, int) or not isinstance(following, int):
        raise TypeError("damaged record")
    parsed = tuple(AdapterVersion(**{**version, "targets": tuple(version["targets"])}) for version in versions)
    flags = (raw.get(flag) is True for flag in ("merged", "pinned", "public"))
    record = Record(current, following, parsed, *flags)
    _ = record.now
    return record


def key_of(tenant: str, name: str) -> Key:
    """The name's key. Raises InvalidRequest for what cannot be a name."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest("an adapter name is 1 to 64 of a-z 0-9 . _ - and begins with a-z or 0-9", param="name")
    if not _TENANT.fullmatch(tenant):
        raise InvalidRequest("that is not the name of a tenant", param="tenant")
    return tenant, name


def ref_of(version: AdapterVersion, tenant: str) -> AdapterRef:
    """What a request says of the version that it uses, whose owner is `tenant`."""
    return AdapterRef(version.name, version.version, version.digest, version.rank, tenant)


def digests_of(record: Record | None) -> list[str]:
    """Of all its versions; none without a record."""
    return [version.digest for version in record.versions] if record else []


def digest_of(record: Record | None) -> str | None:
    """Of the current version; None without a record."""
    return record.now.digest if record else None


def same_weights(current: AdapterVersion, draft: AdapterVersion) -> bool:
    """Whether the draft is the version that is current."""
    return (current.digest, current.base_digest) == (draft.digest, draft.base_digest)


def with_version(before: Record | None, draft: AdapterVersion, *, public: bool, most: int) -> Record:
    """The record with a new version, without the oldest ones over `most`; the new one stays. Only a first record is
    `public` for the asking."""
    if before is None:
        return Record(1, 2, (replace(draft, version=1),), public=public)
    versions = (*before.versions, replace(draft, version=before.next))
    return replace(before, current=before.next, next=before.next + 1, versions=versions[-most:])


def named(key: Key, record: Record) -> Named:
    """What the name means now, and whose it is."""
    return Named(key[0], record.now, record.public)
