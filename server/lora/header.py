"""The header of a safetensors file, checked by hand before a byte of any tensor is read. Plain Python.

Layout: 8 bytes little-endian header length, a JSON header, then the tensors' bytes. The header comes from a stranger
and is believed in nothing: every offset must follow from the shapes, and the tensors must cover the data exactly.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.errors import InvalidAdapter
from server.lora.strictjson import JsonError, parse_object

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
MAX_HEADER_BYTES = 8 * 1024 * 1024
# A tensor's entry is its name and about 80 characters; names are bounded below.
BYTES_PER_TENSOR = 512
HEADER_SLACK = 64 * 1024
MAX_NAME = 512
MAX_METADATA = 256
MAX_DIMENSIONS = 8
MAX_SIZE = 2**48
_OTHER_FORMATS = (
    (b"PK\x03\x04", "a zip archive (PyTorch pickle); pickles are never read"),
    (b"\x80", "a Python pickle; pickles are never read"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip file"),
)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `start` is its offset from the beginning of the file, `nbytes` its length in bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def _refuse(reason: str, param: str = "weights") -> InvalidAdapter:
    return InvalidAdapter(f"adapter_model.safetensors: {reason}", param=param)


def read_header(path: Path, *, max_tensors: int) -> dict[str, TensorEntry]:
    """The tensors of the file by name, in file order. Raises `InvalidAdapter` naming the tensor at fault."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = _header_length(start, size, max_tensors)
            raw = file.read(length)
    except OSError as exc:
        raise _refuse("the file cannot be read") from exc
    return _parse(raw, length, size, max_tensors)


def header_of(content: memoryview, *, max_tensors: int) -> dict[str, TensorEntry]:
    """The same for a file that is in memory."""
    length = _header_length(bytes(content[:8]), len(content), max_tensors)
    return _parse(bytes(content[8 : 8 + length]), length, len(content), max_tensors)


def _parse(raw: bytes, length: int, size: int, max_tensors: int) -> dict[str, TensorEntry]:
    if len(raw) != length or not raw.startswith(b"{"):
        raise _refuse("it is not a safetensors file (no JSON header)")
    try:
        header = parse_object(raw)
    except JsonError as exc:
        raise _refuse(f"the header is refused: {exc}") from exc
    _check_metadata(header.pop("__metadata__", {}))
    if len(header) > max_tensors:
        raise _refuse(f"it holds {len(header)} tensors; an adapter for this base model has at most {max_tensors}")
    if not header:
        raise _refuse("it holds no tensor")
    entries = {name: _entry(name, value, 8 + length) for name, value in header.items()}
    _check_cover(entries, 8 + length, size)
    return entries


def _header_length(start: bytes, size: int, max_tensors: int) -> int:
    """The length in the first 8 bytes, bounded by the file and by what an adapter for this base can need."""
    for magic, what in _OTHER_FORMATS:
        if start.startswith(magic):
            # A safetensors header whose length happens to begin like this has a `{` behind it: 0x80 is common.
            if magic == b"\x80" and start[3:] == b"\0" * 5:
                continue
            raise _refuse(f"it is not safetensors but {what}")
    if len(start) < 8:
        raise _refuse("it is not a safetensors file (shorter than its own length field)")
    length = int.from_bytes(start, "little")
    limit = min(MAX_HEADER_BYTES, HEADER_SLACK + BYTES_PER_TENSOR * max_tensors)
    if length > size - 8:
        raise _refuse("it is not a safetensors file, or it is truncated: its header would not fit into the file")
    if length < 2 or length > limit:
        raise _refuse(f"its header has {length} bytes; between 2 and {limit} are taken for this base model")
    return length


def _check_metadata(value: Any) -> None:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _refuse("__metadata__ must map text to text", "__metadata__")
    if len(value) > MAX_METADATA:
        raise _refuse(f"__metadata__ has more than {MAX_METADATA} entries", "__metadata__")


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SIZE


def _entry(name: str, value: Any, data_start: int) -> TensorEntry:
    shown = name[:MAX_NAME]
    if not name or len(name) > MAX_NAME:
        raise _refuse(f"the tensor name {shown[:80]!r} is empty or too long", shown)
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _refuse(f"the entry of {shown} must have dtype, shape and data_offsets", shown)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _refuse(f"{shown} has dtype {str(dtype)[:40]!r}; {', '.join(ITEM_BYTES)} are taken", shown)
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_natural, shape)):
        raise _refuse(f"the shape of {shown} is not a short list of sizes", shown)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
        raise _refuse(f"the data_offsets of {shown} are not two offsets", shown)
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise _refuse(f"the data_offsets of {shown} do not hold the {nbytes} bytes of its shape", shown)
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], nbytes)


def _check_cover(entries: dict[str, TensorEntry], data_start: int, size: int) -> None:
    """The tensors must lie end to end from the header to the end of the file: no gap, no overlap, nothing behind."""
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start + entry.nbytes > size:
            raise _refuse(f"the data_offsets of {name} reach beyond the file: it is truncated", name)
        if entry.start != position:
            raise _refuse(f"the data of {name} overlaps another tensor's or leaves a gap", name)
        position += entry.nbytes
    if position != size:
        raise _refuse(f"{size - position} bytes behind the last tensor belong to none")
