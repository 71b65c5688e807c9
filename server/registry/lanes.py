"""What the registry asks of the lanes when a name moves, or its version changes."""

from __future__ import annotations

from typing import Protocol

from server.core import AdapterRef


class Lanes(Protocol):
    """Who has a lane of its own. A version takes over in the lane that the one before had."""

    def enter(self, adapter: AdapterRef, pinned: bool, *, keeps: bool = False) -> None:
        """Returns when the adapter has its own lane. Raises Conflict when there is no room; where it `keeps` others,
        none of them makes way."""

    def leave(self, adapter: AdapterRef, *, asked: bool = False, replaced: bool = False) -> None:
        """Ends the adapter's own lane, if it has one; `asked` if somebody wants it in the shared one, `replaced` if
        another version of the name takes over."""

    def inside(self, adapter: AdapterRef) -> bool | None:
        """None where nobody asked for a lane of its own; else whether its copy is pinned."""
