"""The RAM tier: adapters as tensors, bounded by bytes; lora/eviction.py says which goes first."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from time import monotonic

from server.histogram import LOAD, Histogram
from server.lora.eviction import LeastRecent, Order, reload_cost
from server.lora.weights import AdapterWeights


class AdapterCache:
    """Adapters by key. `used_bytes` never exceeds `capacity_bytes`, not even for a moment.

    Adapters that are still being loaded, or that somebody holds after they were evicted, are not counted: they belong
    to whoever asked for them. Safe to call from several threads; no lock is held while loading.
    """

    def __init__(self, load: Callable[[str], AdapterWeights], capacity_bytes: int, order: Order | None = None):
        self._load = load
        self._capacity = capacity_bytes
        self._lock = threading.Lock()
        self._held: dict[str, AdapterWeights] = {}
        self._order = order or LeastRecent()
        self._loading: dict[str, Future[AdapterWeights]] = {}
        self._used = self._hits = self._misses = self._evictions = 0
        self.load_seconds = Histogram(LOAD)  # of what `load` gave; changed under the lock

    def get(self, key: str) -> AdapterWeights:
        """The adapter, from RAM or loaded now. One load a key however many threads ask; raises what `load` raises.

        A failed load is not remembered. An adapter larger than the capacity is returned and not kept.
        """
        with self._lock:
            held = self._held.get(key)
            if held is not None:
                self._use(key, held.nbytes)
                self._hits += 1
                return held
            self._misses += 1
            loading = self._loading.get(key)
            mine = loading is None
            if loading is None:
                loading = self._loading[key] = Future()
        if mine:
            self._run(key, loading)
        return loading.result()

    def peek(self, key: str) -> bool:
        """Whether the adapter is in RAM. Does not count as a use."""
        with self._lock:
            return key in self._held

    def drop(self, key: str) -> None:
        """Forget an adapter; one that is being loaded reaches those who wait for it and is not kept."""
        with self._lock:
            self._loading.pop(key, None)
            self._forget(key)

    def _run(self, key: str, loading: Future[AdapterWeights]) -> None:
        start = monotonic()
        try:
            weights = self._load(key)
        except BaseException as exc:
            with self._lock:
                self._finish(key, loading)
            loading.set_exception(exc)
            return
        with self._lock:
            self.load_seconds.add(monotonic() - start)
            if self._finish(key, loading):
                self._keep(key, weights)
        loading.set_result(weights)

    def _finish(self, key: str, loading: Future[AdapterWeights]) -> bool:
        """Take the load off the list; whether it still stood there (it was not dropped meanwhile)."""
        if self._loading.get(key) is not loading:
            return False
        del self._loading[key]
        return True

    def _keep(self, key: str, weights: AdapterWeights) -> None:
        if weights.nbytes > self._capacity:
            return
        self._forget(key)
        while self._used + weights.nbytes > self._capacity:
            self._forget(min(self._held, key=self._order.rank))
            self._evictions += 1
        self._held[key] = weights
        self._used += weights.nbytes
        self._use(key, weights.nbytes)

    def _use(self, key: str, nbytes: int) -> None:
        self._order.use(key, reload_cost(nbytes) / max(1, nbytes))

    def _forget(self, key: str) -> None:
        weights = self._held.pop(key, None)
        if weights is not None:
            self._used -= weights.nbytes
            self._order.leave(key)

    def __len__(self) -> int:
        return len(self._held)

    @property
    def used_bytes(self) -> int:
        """Bytes of all adapters that are kept."""
        return self._used

    @property
    def capacity_bytes(self) -> int:
        """The most bytes that are kept."""
        return self._capacity

    @property
    def hits(self) -> int:
        """How often an adapter was in RAM when it was asked for."""
        return self._hits

    @property
    def misses(self) -> int:
        """How often it was not, waiting for somebody else's load included."""
        return self._misses

    @property
    def evictions(self) -> int:
        """How many adapters made room for others."""
        return self._evictions
