"""transformers and PEFT in a process of their own: static batches of equal lengths, which is their best case."""

from __future__ import annotations

from loadtest.peers.peer import Setting
from loadtest.peers.piped import Piped, begin


def start(setting: Setting, dtype: str) -> tuple[Piped, Piped]:
    """transformers for the base, PEFT's mixed batch for adapters (on the base alone it is transformers, and slower);
    they share a process. Raises NotThere."""
    process = begin("loadtest.peers.static_main", setting, dtype)
    return Piped("transformers", dtype, process, {False}), Piped("PEFT", dtype, process, {True})
