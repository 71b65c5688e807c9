"""Brings adapters to the device beside the step loop, and gives each request the one it waits for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

import torch

from server.engine.messages import Loaded, Residency
from server.engine.sequence import Request
from server.engine.uploading import Uploader
from server.errors import AdapterUnavailable, OnebaseError
from server.lora.bank import Bank
from server.lora.weights import AdapterWeights

log = logging.getLogger("onebase.engine")

PATIENCE = 2.0  # seconds a request waits for a slot before one is emptied for it
_THREADS = 2


class AdapterLoader:
    """Requests without their adapter wait here, in the order of arrival; none of them holds anything up.

    Everything but the loading itself happens on the engine's thread, so there are no locks.
    """

    def __init__(
        self,
        bank: Bank,
        fetch: Callable[[str], AdapterWeights],
        post: Callable[[Loaded], None],
        device: torch.device,
    ):
        self.bank, self._fetch, self._post, self._upload = bank, fetch, post, Uploader(device)
        self._lacking: dict[str, Request] = {}  # by request id, in the order of arrival
        self._threads = ThreadPoolExecutor(_THREADS, "onebase-load")

    def __len__(self) -> int:
        return len(self._lacking)

    def want(self, request: Request) -> None:
        """A new request names an adapter; it is given at once if it is resident."""
        digest = request.digest
        assert digest is not None
        request.weights = self.bank.acquire(digest)
        if request.weights is None:
            request.residency = Residency(cold=digest not in self.bank.digests())
            self._lacking[request.submit.id] = request

    def give_up(self, request: Request) -> None:
        """The request has ended: its reference goes back, once."""
        self._lacking.pop(request.submit.id, None)
        if request.weights is not None:
            assert request.digest is not None
            self.bank.release(request.digest)
            request.weights = None

    def serve(self) -> None:
        """Gives adapters that have come to those who wait, and starts loading where there is a slot."""
        starving, full = False, False
        for request in list(self._lacking.values()):
            digest = request.digest
            assert digest is not None
            request.weights = self.bank.acquire(digest)
            if request.weights is not None:
                del self._lacking[request.submit.id]
                waited = (monotonic() - request.arrived) * 1e3
                request.residency = Residency(request.residency.cold, waited)
                continue
            if not self.bank.holds(digest) and not full:
                request.residency = Residency(cold=True)  # it was here and being drained, and has gone
                if self.bank.reserve(digest):
                    self._threads.submit(self._load, digest)
                    continue
                full = True
            starving |= full and monotonic() - request.arrived > PATIENCE
        if starving:
            self.bank.drain_one()
        elif self.bank.reopen():
            self.serve()  # those who were turned away from the slot can have it now

    def arrived(self, message: Loaded) -> list[Request]:
        """A load has ended; returns the requests that must fail with it."""
        if message.fault is None:
            assert isinstance(message.weights, AdapterWeights)
            self.bank.fill(message.digest, message.weights)
            return []
        self.bank.abandon(message.digest)
        return [request for request in self._lacking.values() if request.digest == message.digest]

    def close(self) -> None:
        """Waits for loads under way; none is started any more."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _load(self, digest: str) -> None:
        try:
            weights = self._upload(self._fetch(digest))
        except OnebaseError as fault:
            self._post(Loaded(digest, None, fault))
        except Exception:  # whatever it is, the requests that wait for it must end
            log.exception("loading an adapter failed")
            self._post(Loaded(digest, None, AdapterUnavailable("the adapter could not be loaded")))
        else:
            self._post(Loaded(digest, weights, None))
