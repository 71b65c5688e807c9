"""Arrays that go to the device in one piece."""

from __future__ import annotations

import numpy as np
import torch

from server.engine.buffers import Buffers, upload

CPU = torch.device("cpu")


def test_arrays_arrive_by_name_shape_and_type() -> None:
    arrays = {
        "a": np.arange(6, dtype=np.int32).reshape(2, 3),
        "none": np.zeros((0, 4), np.int32),
        "b": np.array([[1 << 40, -1]], np.int64),
    }
    there = upload(arrays, CPU)
    for name, array in arrays.items():
        assert there[name].tolist() == array.tolist()
        assert there[name].shape == array.shape
    assert (there["a"].dtype, there["b"].dtype) == (torch.int32, torch.int64)
    assert all(tensor.data_ptr() % 16 == 0 for tensor in there.values())


def test_buffers_stay_in_place_and_change_only_when_sent() -> None:
    buffers = Buffers({"a": ((3,), np.int32), "b": ((2,), np.int64)}, CPU)
    where = buffers.device["b"].data_ptr()
    view = buffers.device["b"]
    buffers.host["b"][:] = (7, 8)
    assert view.tolist() == [0, 0]
    buffers.wait()
    buffers.send()
    assert view.tolist() == [7, 8]
    assert buffers.device["b"].data_ptr() == where
    assert buffers.device["a"].tolist() == [0, 0, 0]
