"""The thread that weighs and builds merged copies; their accounts are in merging.py."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from server.engine.messages import Built, Weighed
from server.errors import AdapterUnavailable, OnebaseError
from server.lora.merge import MergedCopy
from server.lora.weights import AdapterWeights

log = logging.getLogger("onebase.engine")


class Builder(Protocol):
    """What makes the copies; called on the building thread."""

    def merged_bytes(self, weights: AdapterWeights) -> int: ...

    def merge(self, weights: AdapterWeights) -> MergedCopy: ...


class BuildingThread:
    """Does one thing after the other beside the steps. `fetch` brings an adapter by its key; every order is answered by
    one message to `post`, the engine's inbox."""

    def __init__(
        self,
        builder: Builder,
        fetch: Callable[[str], AdapterWeights],
        post: Callable[[Weighed | Built], None],
    ):
        self._builder, self._fetch, self._post = builder, fetch, post
        self._thread = ThreadPoolExecutor(1, "onebase-merge")

    def weigh(self, lane: str, key: str) -> None:
        """Has the adapter fetched, and its copy's size told by a `Weighed`."""
        self._thread.submit(self._weigh, lane, key)

    def build(self, lane: str, weights: AdapterWeights) -> None:
        """Has the copy made, and told by a `Built`."""
        self._thread.submit(self._build, lane, weights)

    def close(self) -> None:
        """Waits for what is under way; the rest is not begun."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _weigh(self, lane: str, key: str) -> None:
        try:
            weights = self._fetch(key)
            self._post(Weighed(lane, weights, self._builder.merged_bytes(weights), None))
        except OnebaseError as fault:
            self._post(Weighed(lane, None, 0, fault))
        except Exception:  # whoever waits must hear of it
            log.exception("fetching an adapter to merge failed")
            self._post(Weighed(lane, None, 0, AdapterUnavailable("the adapter could not be loaded")))

    def _build(self, lane: str, weights: AdapterWeights) -> None:
        try:
            self._post(Built(lane, self._builder.merge(weights), None))
        except OnebaseError as fault:
            self._post(Built(lane, None, fault))
        except Exception:
            log.exception("merging an adapter failed")
            self._post(Built(lane, None, AdapterUnavailable("the adapter could not be merged")))
