"""onebase's engine without a server: what HTTP, streaming and the client on the same cores cost."""

from __future__ import annotations

from loadtest.peers.peer import Setting
from loadtest.peers.piped import Piped, begin

NAME = "bare engine"


def start(setting: Setting, dtype: str) -> tuple[Piped]:
    """The step loop in a process of its own. Raises NotThere."""
    return (Piped(NAME, dtype, begin("loadtest.peers.engine_main", setting, dtype), {False, True}),)
