"""How names come into lanes of their own and leave them, by request or because their version changes.

Whoever calls has the name to itself (writers.py).
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace

from server.core import AdapterRef, BaseInfo
from server.errors import Conflict, OnebaseError, StorageFailure
from server.registry.catalogue import Catalogue
from server.registry.drafts import known_base
from server.registry.lanes import Lanes
from server.registry.records import Key, Record, ref_of

_log = logging.getLogger(__name__)


class Moves:
    """The records of a catalogue and the engine's `lanes` (none before it runs), changed together."""

    def __init__(self, catalogue: Catalogue, base: BaseInfo):
        self._catalogue, self._base = catalogue, base
        self.lanes: Lanes | None = None

    def change(self, key: Key, record: Record, merged: bool | None, pinned: bool | None) -> None:
        """Into a lane of its own or out of it; None leaves as it is. `record` is what is to be remembered, but for the
        lane. Raises Conflict when there is no room or nothing to pin, and StorageFailure."""
        lanes, ref = self.lanes, ref_of(record.now, key[0])
        assert lanes is not None
        inside = lanes.inside(ref)
        asked = merged is not None
        merged = inside is not None if merged is None else merged
        pinned = bool(inside) and merged if pinned is None else pinned
        if pinned and not merged:
            raise Conflict("only the copy of an adapter with a lane of its own can be pinned", param="pinned")
        if merged:
            known_base(self._base, record.now)
            lanes.enter(ref, pinned)
        # Where nobody says which lane and it has lost its own, it wants the same one as before.
        record = replace(record, merged=merged if asked or merged else record.merged, pinned=pinned)
        if record != self._catalogue.names.get(key):
            self._remember(key, record, inside=inside)
        if asked and not merged:
            self.leave(ref, asked=True)

    def enter_again(self, key: Key) -> None:
        """Into the lane that its record wants, if it still does; nobody makes way. Raises as `change`, and
        AdapterNotFound."""
        lanes, record = self.lanes, self._catalogue.names.own(key)
        assert lanes is not None
        ref = ref_of(record.now, key[0])
        if record.merged and lanes.inside(ref) is None:
            known_base(self._base, record.now)
            lanes.enter(ref, record.pinned, keeps=True)

    def take_over(self, key: Key, after: Record) -> None:
        """Another version becomes current: one with a lane of its own is ready in its own before it is."""
        before, lanes = self._catalogue.names.get(key), self.lanes
        old = ref_of(before.now, key[0]) if before is not None else None
        pinned = lanes.inside(old) if lanes is not None and old is not None else None
        if lanes is not None and pinned is not None:
            known_base(self._base, after.now)
            lanes.enter(ref_of(after.now, key[0]), pinned)
        self._remember(key, after, inside=None)
        if old is not None:
            self.leave(old, replaced=True)

    def leave(self, ref: AdapterRef, *, asked: bool = False, replaced: bool = False) -> None:
        """Out of its lane, if it has one. The change is made already: if the engine has ended, nobody is in any."""
        try:
            if self.lanes is not None:
                self.lanes.leave(ref, asked=asked, replaced=replaced)
        except OnebaseError as fault:
            _log.info("%s: %s", ref.name, fault.message)

    def _remember(self, key: Key, after: Record, *, inside: bool | None) -> None:
        """If that fails, its lane is as it was before: none, or pinned or not."""
        try:
            self._catalogue.switch(key, after)
        except StorageFailure:
            ref = ref_of(after.now, key[0])
            if inside is None:
                self.leave(ref)
            elif self.lanes is not None:
                with suppress(OnebaseError):  # the engine has ended
                    self.lanes.enter(ref, inside)
            raise
