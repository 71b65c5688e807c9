"""Brings adapters to the device beside the step loop, and gives each request the one it waits for.

An adapter comes from disk to RAM and from there to its slot; on the CPU the second move is none. The first one does not
wait for a slot: it begins when the request is submitted, or while it waits (prefetch).
"""

from __future__ import annotations

import logging
import queue
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

import torch

from server.engine.messages import Fetched, Loaded, Residency, Submit
from server.engine.sequence import Request
from server.engine.uploading import Uploader
from server.errors import AdapterUnavailable, OnebaseError
from server.histogram import LOAD, Histogram
from server.lora.bank import Bank
from server.lora.weights import AdapterWeights

log = logging.getLogger("onebase.engine")

PATIENCE = 2.0  # seconds a request waits for a slot before one is emptied for it
_THREADS = 3
_PREFETCHES = 2  # at once; a thread is left for adapters that have a slot


class AdapterLoader:
    """Requests without their adapter wait here, in the order of arrival; none of them holds anything up.

    Everything but the loading itself and `begin` happens on the engine's thread, so there are no locks. Adapters that
    were prefetched for requests without a slot are held here, whatever the RAM tier evicts meanwhile: `prefetch_bytes`
    of them at most, those of the earliest requests.
    """

    def __init__(
        self,
        bank: Bank,
        fetch: Callable[[str], AdapterWeights],
        post: Callable[[Loaded | Fetched], None],
        device: torch.device,
        prefetch_bytes: int,
    ):
        self.bank, self._fetch, self._post, self._upload = bank, fetch, post, Uploader(device)
        self._device, self._prefetch_bytes = device, prefetch_bytes
        self._lacking: dict[str, Request] = {}  # by request id, in the order of arrival
        self._loading: set[str] = set()  # on their way to the slot they have
        self._fetching: set[str] = set()  # on their way to RAM
        self._ahead: dict[str, AdapterWeights] = {}  # in RAM, for requests that are lacking
        self._spoilt: set[str] = set()  # could not be prefetched: left to the load itself
        self._largest = 0  # bytes of an adapter
        self._begun: dict[str, object] = {}  # prefetches under way; any thread changes it, atomically
        self._full = False  # whether somebody waits for a slot; read by other threads
        self.prefetches: Counter[str] = Counter()  # by what came of them
        self.hits = self.misses = self.failures = 0  # requests that found their adapter here, or not; loads that failed
        self.seconds = Histogram(LOAD)  # of an adapter's way from RAM to the device
        self._threads = ThreadPoolExecutor(_THREADS, "onebase-load")
        self._permits: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(_PREFETCHES):
            self._permits.put(None)

    def __len__(self) -> int:
        return len(self._lacking)

    @property
    def lacking(self) -> frozenset[str]:
        """The names of the adapters that requests wait for."""
        found = (request.submit.adapter for request in self._lacking.values())
        return frozenset(adapter.name for adapter in found if adapter is not None)

    def may_begin(self, key: str) -> bool:
        """From any thread: whether a request about to be submitted may have its adapter fetched before the engine's
        thread sees it, which is after the step under way. If so, `begin` must follow."""
        return not self._full and self._permitted(key)

    def begin(self, key: str) -> None:
        """From any thread, after the request was handed to the engine, marked `early`."""
        try:
            self._threads.submit(self._prefetch, key)
        except RuntimeError:  # the engine has ended, or there are no more threads to be had: then the load itself waits
            self._ended(key, None)

    def want(self, request: Request) -> None:
        """A new request names an adapter; it is given at once if it is resident."""
        key = request.key
        assert key is not None
        if request.submit.early:
            self._fetching.add(key)
        request.weights = self.bank.acquire(key)
        if request.weights is not None:
            self.hits += 1
            return
        self.misses += 1
        request.residency = Residency(cold=key not in self.bank.resident())
        self._lacking[request.submit.id] = request

    def unasked(self, submit: Submit) -> None:
        """A new request has no use for its adapter here; if it is being fetched for it, that is for nobody."""
        if submit.early and submit.adapter is not None:
            self._fetching.add(submit.adapter.key)

    def give_up(self, request: Request) -> None:
        """The request has ended: its reference goes back, once."""
        key = request.key
        if self._lacking.pop(request.submit.id, None) is not None and not self._wanted(key):
            assert key is not None
            self._spoilt.discard(key)
            if self._ahead.pop(key, None) is not None:
                self.prefetches["unused"] += 1
            if key not in self._loading:  # its slot waited for a prefetch: nobody would ever fill it
                self.bank.abandon(key)
        if request.weights is not None:
            assert key is not None
            self.bank.release(key)
            request.weights = None

    def serve(self) -> None:
        """Gives adapters that have come to those who wait, and starts loading where there is a slot."""
        starving, full = False, False
        for request in list(self._lacking.values()):
            if self._give(request):
                continue
            key = request.key
            assert key is not None
            if not self.bank.holds(key) and not full:
                request.residency = Residency(cold=True)  # it was here and being drained, and has gone
                full = not self.bank.reserve(key)
            if self.bank.awaits(key):
                self._load(key)
                if self._give(request):
                    continue
            elif not self.bank.holds(key):
                self._look_ahead(key)
            starving |= full and monotonic() - request.arrived > PATIENCE
        self._full = full
        self._trim()
        if starving:
            self.bank.drain_one()
        elif self.bank.reopen():
            self.serve()  # those who were turned away from the slot can have it now

    def fetched(self, message: Fetched) -> None:
        """A prefetch has ended. If it failed, so much the worse for it alone: the load itself will say why."""
        key, weights = message.key, message.weights
        self._fetching.discard(key)
        if not isinstance(weights, AdapterWeights):
            self.prefetches["failed"] += 1
            if self._wanted(key):
                self._spoilt.add(key)
            return
        self._largest = max(self._largest, weights.nbytes)
        if self._wanted(key) and key not in self._ahead:
            self._ahead[key] = weights
        else:
            self.prefetches["unused"] += 1

    def arrived(self, message: Loaded) -> list[Request]:
        """A load has ended; returns the requests that must fail with it."""
        self._loading.discard(message.key)
        if message.fault is None:
            assert isinstance(message.weights, AdapterWeights)
            self._largest = max(self._largest, message.weights.nbytes)
            self.bank.fill(message.key, message.weights)
            self.seconds.add(message.seconds)
            return []
        self.failures += 1
        self.bank.abandon(message.key)
        return [request for request in self._lacking.values() if request.key == message.key]

    def close(self) -> None:
        """Waits for loads under way; none is started any more."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _wanted(self, key: str | None) -> bool:
        return any(request.key == key for request in self._lacking.values())

    def _give(self, request: Request) -> bool:
        """Gives the request its adapter if it is on the device."""
        key = request.key
        assert key is not None
        request.weights = self.bank.acquire(key)
        if request.weights is None:
            return False
        del self._lacking[request.submit.id]
        self._spoilt.discard(key)
        if self._ahead.pop(key, None) is not None:  # it came on another way as well
            self.prefetches["unused"] += 1
        request.given = monotonic()
        request.residency = Residency(request.residency.cold, (request.given - request.arrived) * 1e3)
        return True

    def _load(self, key: str) -> None:
        """The next move of an adapter that has a slot, unless one is being made."""
        if key in self._loading:
            return
        weights = self._ahead.pop(key, None)
        if weights is not None:
            self.prefetches["used"] += 1
            if self._device.type == "cpu":  # it is where it should be
                self.bank.fill(key, weights)
                self.seconds.add(0.0)
                return
        elif key in self._fetching:
            return
        self._loading.add(key)
        self._threads.submit(self._bring, key, weights)

    def _look_ahead(self, key: str) -> None:
        """Has the adapter brought to RAM while there is no slot, if it and all before it can be held there."""
        if key in self._ahead or key in self._fetching or key in self._spoilt:
            return
        coming = (len(self._fetching) + 1) * self._largest
        if self._held() + coming <= self._prefetch_bytes and self._permitted(key):
            self._fetching.add(key)
            self.begin(key)

    def _trim(self) -> None:
        """Those that began early are not counted beforehand: the last to come are let go."""
        while self._held() > self._prefetch_bytes:
            self._ahead.popitem()
            self.prefetches["unused"] += 1

    def _held(self) -> int:
        return sum(weights.nbytes for weights in self._ahead.values())

    def _permitted(self, key: str) -> bool:
        """Whether the caller may begin a prefetch of it; `_ended` must follow, once for each."""
        if key in self._begun:
            return False
        try:
            self._permits.get_nowait()
        except queue.Empty:
            return False
        mine = object()
        if self._begun.setdefault(key, mine) is mine:
            return True
        self._permits.put(None)  # another thread was first
        return False

    def _ended(self, key: str, weights: AdapterWeights | None) -> None:
        """A prefetch is not under way any more; whoever says so first gives its permit back."""
        if self._begun.pop(key, None) is not None:
            self._permits.put(None)
        self._post(Fetched(key, weights))

    def _prefetch(self, key: str) -> None:
        weights = None
        try:
            weights = self._fetch(key)
        except Exception:
            log.debug("a prefetch failed", exc_info=True)
        finally:
            self._ended(key, weights)

    def _bring(self, key: str, weights: AdapterWeights | None) -> None:
        try:
            weights = weights or self._fetch(key)
            start = monotonic()
            weights = self._upload(weights)
            seconds = monotonic() - start
        except OnebaseError as fault:
            log.warning("%s", fault, exc_info=fault.__cause__)
            self._post(Loaded(key, None, fault))
        except Exception:  # whatever it is, the requests that wait for it must end
            log.exception("loading the adapter %s failed", key)
            self._post(Loaded(key, None, AdapterUnavailable("the adapter could not be loaded")))
        else:
            self._post(Loaded(key, weights, None, seconds))
