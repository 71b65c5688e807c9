"""The bad-file corpus: each is refused with a reason that names the culprit, and the version before still serves."""

import json
import pickle
import struct

import pytest
import torch

from server.errors import InvalidAdapter
from server.registry.registry import Registry
from server.registry.store import Store
from tests.adapters import config, container, entries_of, stage_adapter, targeted, tensors, tiny_base

BASE = tiny_base(1)
VALUES = tensors(BASE, targeted(BASE))
HEADER, DATA = entries_of(VALUES)
FIRST, LAST = next(iter(HEADER)), list(HEADER)[-1]
GOOD = container(HEADER, DATA)


def lie(**fields):
    """The good file with some fields of its first entry replaced."""
    return container({**HEADER, FIRST: {**HEADER[FIRST], **fields}}, DATA)


def doubled_key():
    raw = json.dumps(HEADER)
    return container((raw[:-1] + ", " + raw[1:]).encode(), DATA)


WHOLE = {
    "empty": b"",
    "seven bytes": b"1234567",
    "pickle": pickle.dumps({"a": 1}),
    "torch zip": b"PK\x03\x04" + b"\0" * 100,
    "gguf": b"GGUF\x03\0\0\0" + b"\0" * 100,
    "gzip": b"\x1f\x8b\x08" + b"\0" * 50,
    "hdf5": b"\x89HDF\r\n\x1a\n" + b"\0" * 50,
    "text": b"hello, this is no adapter at all",
    "header of zero bytes": struct.pack("<Q", 0) + DATA,
    "header length beyond the file": container(HEADER, DATA, length=len(GOOD)),
    "header length of 2**63": container(HEADER, DATA, length=2**63),
    "header length of 2**64 - 1": container(HEADER, DATA, length=2**64 - 1),
    "header over the bound": container(b"{" + b" " * 9_000_000 + b"}", DATA),
    "header that is a list": container([1], DATA),
    "header that is not JSON": container(b"{]", DATA),
    "header that is not UTF-8": container(b'{"\xff": 1}', DATA),
    "header that is deep": container(b'{"a":' * 5000, DATA),
    "header with a key twice": doubled_key(),
    "header with NaN": container(b'{"a": NaN}', DATA),
    "no tensor": container({}),
    "only metadata": container({"__metadata__": {}}),
    "bytes behind the end": GOOD + b"\0",
    "too many tensors": container({str(n): {} for n in range(500)}, DATA),
}
METADATA = {"list": [1], "number": {"a": 1}, "large": {str(n): "" for n in range(300)}}
ENTRY = {
    "no dtype": container({**HEADER, FIRST: {"shape": [1], "data_offsets": [0, 4]}}, DATA),
    "an extra field": lie(code="import os"),
    "not an object": container({**HEADER, FIRST: [1]}, DATA),
    "unknown dtype": lie(dtype="F64"),
    "integer dtype": lie(dtype="I32"),
    "dtype that is no text": lie(dtype=["F32"]),
    "dtype of another size": lie(dtype="F16"),
    "negative size": lie(shape=[-4, -16]),
    "true as a size": lie(shape=[True, 64]),
    "fraction as a size": lie(shape=[4.0, 16]),
    "shape that overflows 64 bits": lie(shape=[2**32, 2**32 + 1]),
    "shape that wraps to the right size": lie(shape=[2**62 + 4, 16]),
    "many dimensions": lie(shape=[1] * 99),
    "shape that is no list": lie(shape="4,16"),
    "wrong shape, same bytes": lie(shape=[16, 4]),
    "one offset": lie(data_offsets=[0]),
    "offsets reversed": lie(data_offsets=[256, 0]),
    "negative offset": lie(data_offsets=[-256, 0]),
    "huge offset": lie(data_offsets=[2**63, 2**63 + 256]),
    "one byte short": lie(data_offsets=[0, 255]),
}


@pytest.fixture
def registry(tmp_path):
    registry = Registry(Store(tmp_path), BASE, max_rank=16, dtype=torch.float32)
    with stage_adapter(registry._store, BASE, seed=7) as staging:
        registry.put("a", staging)
    return registry


def refused(registry, weights=GOOD, settings=None) -> InvalidAdapter:
    """Put the file, see it refused, and the version before it whole."""
    before = registry.get("a")
    with registry._store.stage() as staging:
        staging.config_path.write_bytes(json.dumps(config()).encode() if settings is None else settings)
        staging.weights_path.write_bytes(weights)
        with pytest.raises(InvalidAdapter) as caught:
            registry.put("a", staging)
    assert registry.get("a") == before
    assert registry._store.digests() == [before.digest]
    lease = registry.acquire("a")
    assert registry.load(lease.ref.digest).key == before.digest
    lease.release()
    assert caught.value.status == 422
    assert str(registry._store._objects.parent) not in caught.value.message
    return caught.value


def test_the_good_file_is_good(registry):
    with registry._store.stage() as staging:
        staging.config_path.write_text(json.dumps(config()))
        staging.weights_path.write_bytes(container({"__metadata__": {"format": "pt"}, **HEADER}, DATA))
        assert registry.put("a", staging).version.version == 2


@pytest.mark.parametrize("kind", WHOLE)
def test_files_that_are_no_safetensors(registry, kind):
    assert refused(registry, WHOLE[kind]).param == "weights"


@pytest.mark.parametrize("kind", ["pickle", "torch zip", "gguf"])
def test_other_formats_are_called_by_their_name(registry, kind):
    assert any(word in refused(registry, WHOLE[kind]).message for word in ("pickle", "GGUF"))


@pytest.mark.parametrize("kind", METADATA)
def test_bad_metadata(registry, kind):
    weights = container({"__metadata__": METADATA[kind], **HEADER}, DATA)
    assert refused(registry, weights).param == "__metadata__"


@pytest.mark.parametrize("kind", ENTRY)
def test_entries_that_lie(registry, kind):
    assert refused(registry, ENTRY[kind]).param == FIRST


@pytest.mark.parametrize("cut", [1, 100, len(DATA) - 1, len(DATA)])
def test_truncated_data(registry, cut):
    assert refused(registry, GOOD[:-cut]).param in HEADER


@pytest.mark.parametrize("cut", [len(DATA) + 1, len(GOOD) - 9, len(GOOD) - 8])
def test_truncated_header(registry, cut):
    assert refused(registry, GOOD[:-cut]).param == "weights"


def test_overlapping_and_gapped_tensors(registry):
    second = list(HEADER)[2]
    overlap = {**HEADER, second: {**HEADER[second], "data_offsets": HEADER[FIRST]["data_offsets"]}}
    assert refused(registry, container(overlap, DATA)).param in HEADER
    start, end = HEADER[LAST]["data_offsets"]
    gap = {**HEADER, LAST: {**HEADER[LAST], "data_offsets": [start + 4, end + 4]}}
    assert refused(registry, container(gap, DATA + b"\0" * 4)).param == LAST


def test_an_empty_tensor_cannot_hide(registry):
    extra = {"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
    assert refused(registry, container({**HEADER, **extra}, DATA)).param == "x"


def test_a_long_name_is_cut_in_the_message(registry):
    extra = {"x" * 5000: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
    error = refused(registry, container({**HEADER, **extra}, DATA))
    assert len(error.message) < 400
    assert len(error.param) < 600


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("auto_mapping", {"base_model_class": "os.system", "parent_library": "os"}),
        ("use_dora", True),
        ("base_model_name_or_path", "acme/another"),
        ("r", 17),
        ("target_modules", ["lm_head"]),
        ("peft_type", "IA3"),
    ],
)
def test_configs_that_do_not_fit(registry, field, value):
    assert refused(registry, settings=json.dumps(config(**{field: value})).encode()).param == field


def test_a_config_over_the_bound_is_not_even_read(registry):
    assert refused(registry, settings=b" " * 70_000).param == "config"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite(registry, bad):
    values = {name: value.clone() for name, value in VALUES.items()}
    values[LAST][-1, -1] = bad
    assert refused(registry, container(*entries_of(values))).param == LAST


def test_an_adapter_without_effect(registry):
    values = {name: value * ("lora_A" in name) for name, value in VALUES.items()}
    assert refused(registry, container(*entries_of(values))).code == "zero_effect"


def test_any_flipped_byte_of_the_header_is_refused_or_harmless(registry):
    """No single damaged byte makes the check fail in another way than by its own error."""
    length = 8 + int.from_bytes(GOOD[:8], "little")
    reasons: list[str | None] = []
    for position in range(0, length, 3):
        weights = bytearray(GOOD)
        weights[position] ^= 0x15
        with registry._store.stage() as staging:
            staging.config_path.write_text(json.dumps(config()))
            staging.weights_path.write_bytes(weights)
            try:
                registry._checks.draft("a", staging, False)
            except InvalidAdapter as exc:
                reasons.append(exc.param)
    assert reasons
    assert all(reasons)
