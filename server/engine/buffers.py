"""Named arrays in one piece of memory, here and on the device, so that one copy brings all of them over."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

_ALIGNMENT = 64  # bytes; a kernel is compiled anew for an argument that is aligned less than before

Shape = tuple[tuple[int, ...], type[np.int32] | type[np.int64]]


class Buffers:
    """`host` are NumPy arrays to fill (pinned memory on CUDA), `device` tensors of the same names and shapes, which
    have what was in `host` when `send` was called. Both stay where they are."""

    def __init__(self, shapes: Mapping[str, Shape], device: torch.device):
        places, size = {}, 0
        for name, (shape, kind) in shapes.items():
            length = int(np.prod(shape)) * np.dtype(kind).itemsize
            places[name] = (size, size + length)
            size += -(-length // _ALIGNMENT) * _ALIGNMENT
        self._cuda = device.type == "cuda"
        self._host = torch.zeros(size, dtype=torch.uint8, pin_memory=self._cuda)
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self._sent: torch.cuda.Event | None = None
        memory = self._host.numpy()
        self.host: dict[str, np.ndarray] = {}
        self.device: dict[str, torch.Tensor] = {}
        for name, (shape, kind) in shapes.items():
            start, end = places[name]
            self.host[name] = memory[start:end].view(kind).reshape(shape)
            dtype = torch.int32 if kind is np.int32 else torch.int64
            self.device[name] = self._device[start:end].view(dtype).view(shape)

    def wait(self) -> None:
        """Until the last `send` has read `host`, so that it may be filled again."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self) -> None:
        """Queues the copy on the current stream."""
        self._device.copy_(self._host, non_blocking=True)
        if self._cuda:
            self._sent = torch.cuda.Event()
            self._sent.record()


def upload(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """int32 and int64 arrays as tensors on the device, by one copy."""
    buffers = Buffers({name: (array.shape, array.dtype.type) for name, array in arrays.items()}, device)
    for name, array in arrays.items():
        buffers.host[name][...] = array
    buffers.send()
    return buffers.device
