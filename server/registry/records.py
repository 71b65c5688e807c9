"""What is remembered of one adapter's name: its versions, and which of them is current."""

from __future__ import annotations

from dataclasses import dataclass

from server.core import AdapterVersion

Versions = list[AdapterVersion]


@dataclass(frozen=True, slots=True)
class Record:
    """All about one name. `versions` are oldest first; `next` is the number that the next version gets."""

    current: int
    next: int
    versions: tuple[AdapterVersion, ...]

    def version(self, number: int) -> AdapterVersion | None:
        return next((version for version in self.versions if version.version == number), None)

    @property
    def now(self) -> AdapterVersion:
        return next(version for version in self.versions if version.version == self.current)


def parse_record(raw: dict[str, object]) -> Record:
    """A `Record` from its JSON. Raises KeyError, TypeError, ValueError or StopIteration when it is damaged."""
    versions = raw["versions"]
    current, following = raw["current"], raw["next"]
    if not isinstance(versions, list) or not isinstance(current, int) or not isinstance(following, int):
        raise TypeError("damaged record")
    parsed = tuple(AdapterVersion(**{**version, "targets": tuple(version["targets"])}) for version in versions)
    record = Record(current, following, parsed)
    _ = record.now
    return record
