"""Copies adapters to the device beside the step loop."""

from __future__ import annotations

import torch

from server.lora.flat import pack, unpack
from server.lora.weights import AdapterWeights


class Uploader:
    """Called by loading threads; returns when the adapter is there, so that no step ever waits for a copy.

    All copies go through one stream of their own: memory that one adapter leaves on it is there for the next.
    On the CPU an adapter is where it should be already.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, weights: AdapterWeights) -> AdapterWeights:
        """The adapter on the device."""
        if self._stream is None:
            return weights
        host = pack(weights, pinned=True)
        with torch.cuda.stream(self._stream):
            flat = host.to(self._device, non_blocking=True)
            done = self._stream.record_event()
        done.synchronize()  # this thread waits, and lets others run; `host` is free to be used again
        # When the last reference goes, steps that read the memory may still be queued on the engine's stream: the
        # next adapter must not be written there before they have run.
        flat.record_stream(torch.cuda.default_stream(self._device))
        return unpack(weights, flat)
