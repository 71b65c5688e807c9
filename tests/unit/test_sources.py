"""PUT from a source: what is allowed, and that nothing beside it is ever read."""

import io
import os
from typing import ClassVar

import pytest
import torch

from server.errors import Forbidden, InvalidRequest, TooLarge
from server.registry.registry import Registry
from server.registry.sources import fetch
from server.registry.store import Store
from tests.adapters import tiny_base, write_adapter

BASE = tiny_base(1)
BIG = 10**7


@pytest.fixture
def place(tmp_path):
    write_adapter(tmp_path / "allowed" / "x", BASE)
    write_adapter(tmp_path / "allowed-evil" / "x", BASE)
    return tmp_path


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "data")


def read(store, source, allowed, limit=BIG):
    with store.stage() as staging:
        fetch(source, staging, allowed, limit, store=store.root)
        return staging.config_path.read_bytes(), staging.weights_path.read_bytes()


def test_a_file_source_becomes_an_adapter(place, store):
    registry = Registry(store, BASE, max_rank=8, dtype=torch.float32)
    for allowed in (f"file://{place}/allowed/", f"file://{place}/allowed", "file:///"):
        with store.stage() as staging:
            fetch(f"file://{place}/allowed/x", staging, [allowed], BIG, store=store.root)
            assert registry.put("a", staging).version.version == 1


@pytest.mark.parametrize(
    "path",
    ["allowed-evil/x", "allowed/../allowed-evil/x", "allowed/%2e%2e/allowed-evil/x", "", "allowed/link", "nothing"],
)
def test_what_is_outside_the_prefix_is_forbidden(place, store, path):
    (place / "allowed" / "link").symlink_to(place / "allowed-evil" / "x")
    with pytest.raises(Forbidden) as caught:
        read(store, f"file://{place}/{path}", [f"file://{place}/allowed/"])
    assert (caught.value.code, caught.value.param) == ("source_not_allowed", "source")
    assert str(place) not in caught.value.message


def test_linked_files_are_followed_only_inside(place, store):
    inside, allowed = place / "allowed" / "y", [f"file://{place}/allowed"]
    inside.mkdir()
    (inside / "adapter_config.json").symlink_to(place / "allowed/x/adapter_config.json")
    weights = inside / "adapter_model.safetensors"
    weights.symlink_to(place / "allowed/x/adapter_model.safetensors")
    assert read(store, f"file://{inside}", allowed)[1]
    weights.unlink()
    weights.symlink_to(place / "allowed-evil/x/adapter_model.safetensors")
    with pytest.raises(Forbidden):
        read(store, f"file://{inside}", allowed)
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(InvalidRequest):
        read(store, f"file://{inside}", allowed)
    weights.unlink()
    with pytest.raises(InvalidRequest) as caught:
        read(store, f"file://{inside}", allowed)
    assert caught.value.code == "source_unreadable"


@pytest.mark.parametrize("way", ["straight", "by a link to the directory", "by links to the files"])
def test_what_the_server_stores_is_no_source_whatever_is_allowed(place, store, way):
    """It is every tenant's."""
    with store.stage() as staging:
        fetch(f"file://{place}/allowed/x", staging, ["file:///"], BIG, store=store.root)
        stored = store.open(store.publish(staging)).weights_path.parent
    source = stored if way == "straight" else place / "allowed" / "y"
    if way == "by a link to the directory":
        source.symlink_to(stored)
    elif way == "by links to the files":
        source.mkdir()
        for file in stored.iterdir():
            (source / file.name).symlink_to(file)
    (place / "data-by-another-name").symlink_to(store.root)
    for root in (store.root, place / "data-by-another-name"):
        with store.stage() as staging, pytest.raises(Forbidden) as caught:
            fetch(f"file://{source}", staging, ["file:///", f"file://{stored}"], BIG, store=root)
        assert caught.value.code == "source_not_allowed"


def test_nothing_is_allowed_by_default_and_malformed_sources_are_refused(place, store):
    for source in (f"file://{place}/allowed/x", "hf://a/b", "s3://a/b"):
        with pytest.raises(Forbidden):
            read(store, source, [])
    everything = ["file:///", "hf://", "s3://"]
    for source in (
        "",
        "x",
        "http://x/y",
        "FILE:///x",
        "file://host/x",
        "file://x",
        "hf://a",
        "hf://a/b/c",
        "hf://../x",
    ):
        with pytest.raises(InvalidRequest):
            read(store, source, everything)
    for source in (
        "s3://a",
        "s3://a/../b",
        "s3://a//b",
        "s3://a/*",
        "hf://a/b@../c",
        "file:///x\n",
        "hf://" + "a" * 2000,
    ):
        with pytest.raises(InvalidRequest):
            read(store, source, everything)


def test_the_byte_cap_ends_the_copy(place, store):
    source, allowed = f"file://{place}/allowed/x", [f"file://{place}"]
    size = sum(len(part) for part in read(store, source, allowed))
    read(store, source, allowed, size)
    for limit in (size - 1, 10):
        with pytest.raises(TooLarge):
            read(store, source, allowed, limit)


class FakeHub:
    """Stands in for both clients of the hub library; remembers what was opened."""

    sha = "c0ffee"
    opened: ClassVar[list] = []

    def model_info(self, repo, revision=None):
        if repo == "acme/secret":
            raise OSError("token abc is wrong")
        self.opened.append((repo, revision))
        return self

    def open(self, path, mode, block_size=None):
        assert mode == "rb"
        self.opened.append(path)
        return io.BytesIO(path.rsplit("/", 1)[1].encode())


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr("huggingface_hub.HfFileSystem", FakeHub)
    monkeypatch.setattr(FakeHub, "opened", [])
    return FakeHub.opened


def test_the_hub_gives_both_files_of_one_commit(store, hub):
    assert read(store, "hf://acme/x@main", ["hf://acme/"]) == (b"adapter_config.json", b"adapter_model.safetensors")
    paths = ["acme/x@c0ffee/adapter_config.json", "acme/x@c0ffee/adapter_model.safetensors"]
    assert hub == [("acme/x", "main"), *paths]
    with pytest.raises(InvalidRequest) as caught:
        read(store, "hf://acme/secret", ["hf://acme"])
    assert "abc" not in caught.value.message


@pytest.mark.parametrize(
    ("source", "allowed", "fine"),
    [
        ("hf://acme/x", "hf://", True),
        ("hf://acme/x", "hf://acme", True),
        ("hf://acme-evil/x", "hf://acme", False),
        ("hf://acme/x", "hf://acme/x", True),
        ("hf://acme/x@v1", "hf://acme/x", True),
        ("hf://acme/x-y", "hf://acme/x", False),
        ("hf://acme/x@v1", "hf://acme/x@v1", True),
        ("hf://acme/x@v2", "hf://acme/x@v1", False),
        ("hf://acme/x", "hf://acme/x@v1", False),
        ("hf://acme/x", "s3://acme/", False),
    ],
)
def test_prefixes_are_compared_component_by_component(store, hub, source, allowed, fine):
    if fine:
        read(store, source, [allowed])
    else:
        with pytest.raises(Forbidden):
            read(store, source, [allowed])
        assert hub == []


def test_s3_goes_through_fsspec(store, monkeypatch):
    monkeypatch.setattr("fsspec.filesystem", lambda protocol: FakeHub())
    assert read(store, "s3://bucket/dir/x", ["s3://bucket/dir"])[0] == b"adapter_config.json"
    for source in ("s3://bucket/dir-evil/x", "s3://bucket-evil/dir/x", "s3://bucket/d"):
        with pytest.raises(Forbidden):
            read(store, source, ["s3://bucket/dir"])

    def absent(protocol):
        raise ImportError("no", name="s3fs")

    monkeypatch.setattr("fsspec.filesystem", absent)
    with pytest.raises(InvalidRequest) as caught:
        read(store, "s3://bucket/x", ["s3://bucket"])
    assert caught.value.code == "source_unavailable"
    assert "s3fs" in caught.value.message
