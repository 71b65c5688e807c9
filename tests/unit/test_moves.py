"""A lane and what is remembered of it change together, or neither does."""

import pytest
import torch

from server.errors import StorageFailure
from server.registry.records import ref_of
from server.registry.registry import Registry
from server.registry.store import Store
from tests.adapters import stage_adapter, tiny_base

BASE = tiny_base(1)
KEY = ("ann", "a")


class Lanes:
    """Who is inside, and whether pinned; there is always room."""

    def __init__(self):
        self.pinned = {}

    def enter(self, adapter, pinned, *, keeps=False):
        self.pinned[adapter] = pinned

    def leave(self, adapter, *, asked=False, replaced=False):
        self.pinned.pop(adapter, None)

    def inside(self, adapter):
        return self.pinned.get(adapter)


class World:
    """One adapter of a tenant's."""

    def __init__(self, folder):
        self.registry = Registry(Store(folder), BASE, max_rank=16, dtype=torch.float32)
        self.registry.moves.lanes = self.lanes = Lanes()
        self.put(1)

    def put(self, seed):
        with stage_adapter(self.registry._store, BASE, seed=seed) as staging:
            self.registry.put("a", staging, tenant="ann")

    def change(self, **wanted):
        self.registry.change("a", tenant="ann", **wanted)

    def seen(self):
        """The lane that it has (None: the shared one; else whether pinned), and what is remembered of that."""
        record = self.registry.snapshot()[KEY]
        return self.lanes.inside(ref_of(record.now, "ann")), record.merged, record.pinned


@pytest.fixture
def world(tmp_path):
    found = World(tmp_path)
    yield found
    found.registry.close()


@pytest.mark.parametrize("before", [None, {"merged": True}, {"merged": True, "pinned": True}])
@pytest.mark.parametrize("wanted", [{"merged": True}, {"merged": True, "pinned": True}, {"pinned": False}])
def test_a_change_that_cannot_be_written_down_leaves_the_lane_as_it_was(world, monkeypatch, before, wanted):
    if before:
        world.change(**before)
    known, asked = world.seen(), []

    def full(*parts):
        asked.append(parts)
        raise StorageFailure("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(world.registry._catalogue, "switch", full)
        try:
            world.change(**wanted)
        except StorageFailure:
            assert asked
        assert world.seen() == known
    world.change(**wanted)
    assert not asked or world.seen() != known


def test_a_version_that_cannot_be_written_down_has_no_lane(world, monkeypatch):
    world.change(merged=True, pinned=True)
    known, inside = world.seen(), dict(world.lanes.pinned)

    def full(*parts):
        raise StorageFailure("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(world.registry._catalogue, "switch", full)
        with pytest.raises(StorageFailure):
            world.put(2)
    assert (world.seen(), world.lanes.pinned) == (known, inside)


def test_a_pin_is_given_up_though_the_lane_is_lost(world):
    world.change(merged=True, pinned=True)
    world.lanes.pinned.clear()
    world.change(pinned=False)
    assert world.seen() == (None, True, False), "it still wants its lane, as one of many"
