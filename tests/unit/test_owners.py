"""Whose an adapter is: published names, quotas, and what must not tell that somebody else has the same."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from server.core import AdapterRef, digest_in
from server.errors import AdapterNotFound, Conflict, Forbidden, StorageFailure
from server.registry import store as store_module
from server.registry.cache import AdapterCache
from server.registry.quotas import Quota
from server.registry.records import Record
from server.registry.registry import Registry
from server.registry.store import Store
from server.registry.writers import Writers
from tests.adapters import settle, stage_adapter, stored, tiny_base

BASE = tiny_base(1)


@pytest.fixture
def make(tmp_path):
    made = []

    def make():
        for before in made:
            settle(before)
        made.append(Registry(Store(tmp_path), BASE, max_rank=16, dtype=torch.float32))
        return made[-1]

    return make


def put(registry, name, seed, tenant, **more):
    with stage_adapter(registry._store, BASE, seed=seed) as staging:
        return registry.put(name, staging, tenant=tenant, **more).version


def refusal(call, *arguments):
    with pytest.raises(AdapterNotFound) as refused:
        call(*arguments)
    return refused.value.envelope()


def test_a_bare_name_is_ones_own_else_a_published_one(make):
    registry = make()
    theirs = put(registry, "a", 1, "ann")
    registry.change("a", public=True, tenant="ann")
    assert registry.get("a", "bob") == theirs
    assert registry.acquire("a", "bob").ref == AdapterRef("a", 1, theirs.digest, theirs.rank, "ann")
    mine = put(registry, "a", 2, "bob")
    for again in (registry, make()):
        assert again.get("a", "bob") == mine
        assert again.get("a", "cyd") == theirs
        assert again.find("a", "cyd").public
    registry.delete("a", tenant="bob")
    assert registry.get("a", "bob") == theirs
    assert put(registry, "a", 3, "ann").version == 2
    assert registry.get("a", "bob").version == 2, "a new version is as public as the one before"


def test_only_the_owner_changes_what_is_published(make):
    registry = make()
    theirs = put(registry, "a", 1, "ann")
    registry.change("a", public=True, tenant="ann")
    for write in (
        lambda name: registry.change(name, public=False, tenant="bob"),
        lambda name: registry.change(name, merged=True, tenant="bob"),
        lambda name: registry.rollback(name, 1, tenant="bob"),
        lambda name: registry.delete(name, tenant="bob"),
    ):
        with pytest.raises(Forbidden, match="only its owner"):
            write("a")
        assert refusal(write, "b") == AdapterNotFound("there is no adapter b", param="adapter").envelope()
    assert registry.find("a", "bob").version == theirs


def test_what_was_begun_outlives_publishing(make):
    registry = make()
    put(registry, "a", 1, "ann")
    registry.change("a", public=True, tenant="ann")
    first, second = registry.acquire("a", "bob"), registry.acquire("a", "bob")
    registry.change("a", public=False, tenant="ann")
    refusal(registry.acquire, "a", "bob")
    assert registry.load(first.ref.key).key == first.ref.key
    first.release()
    registry.delete("a", tenant="ann")
    assert registry.load(second.ref.key).rank == second.ref.rank
    second.release()
    assert stored(registry) == []


def test_of_two_that_publish_a_name_one_does(make):
    registry = make()
    for tenant in ("ann", "bob"):
        put(registry, "a", 1, tenant)
    start = threading.Barrier(2)

    def publish(tenant):
        start.wait(5)
        try:
            return registry.change("a", public=True, tenant=tenant).public
        except Conflict as fault:
            return fault.code

    with ThreadPoolExecutor(2) as pool:
        assert sorted(map(str, pool.map(publish, ("ann", "bob")))) == ["True", "name_published"]
    owner = registry.find("a", "cyd").owner
    registry.change("a", public=False, tenant=owner)
    other = "bob" if owner == "ann" else "ann"
    assert registry.change("a", public=True, tenant=other).owner == other
    registry.delete("a", tenant=other)
    assert registry.change("a", public=True, tenant=owner).public, "a deleted name is free"


def test_what_could_not_be_published_is_private_and_its_name_free(make, monkeypatch):
    registry = make()
    for tenant in ("ann", "bob"):
        put(registry, "a", 1, tenant)

    def full(*record):
        raise StorageFailure("full")

    with monkeypatch.context() as patch:
        patch.setattr(registry._store, "write_name", full)
        with pytest.raises(StorageFailure):
            registry.change("a", public=True, tenant="ann")
    refusal(registry.get, "a", "cyd")
    assert registry.change("a", public=True, tenant="bob").public


def test_two_records_that_say_public_are_one_after_a_start(make, tmp_path):
    registry = make()
    for tenant in ("ann", "bob"):
        put(registry, "a", 1, tenant)
    registry.change("a", public=True, tenant="ann")
    path = tmp_path / "names/bob/a.json"
    path.write_text(path.read_text().replace('"public": false', '"public": true'))
    restarted = make()
    assert restarted.find("a", "cyd").owner == "ann"
    assert not restarted.find("a", "bob").public


def test_a_private_name_costs_what_one_that_nobody_has_costs(make, monkeypatch):
    """The same words, the same look-ups, and nothing on the disk."""
    registry = make()
    put(registry, "secret", 1, "ann"), put(registry, "mine", 1, "bob")

    class Counting(dict):
        asked = 0

        def get(self, *arguments):
            Counting.asked += 1
            return super().get(*arguments)

    names = registry._names
    names._own = Counting({tenant: Counting(records) for tenant, records in names._own.items()})
    names._published = Counting(names._published)
    monkeypatch.setattr(registry._catalogue, "_store", None)
    monkeypatch.setattr(registry, "_store", None)
    calls = (registry.find, registry.get, registry.versions, registry.acquire)
    counts = {}
    for name in ("secret", "nobodys"):
        Counting.asked = 0
        told = {json(refusal(call, name, "bob"), name) for call in calls}
        told |= {json(refusal(lambda n: registry.delete(n, tenant="bob"), name), name)}
        told |= {json(refusal(lambda n: registry.change(n, public=True, tenant="bob"), name), name)}
        counts[name] = Counting.asked, told
    assert counts["secret"] == counts["nobodys"]


def json(envelope, name):
    return str(envelope).replace(name, "NAME")


def test_quotas_count_adapters_and_all_their_versions(make):
    registry = make()
    size = put(registry, "a", 1, "ann", quota=Quota(2, None)).bytes
    put(registry, "b", 1, "ann", quota=Quota(2, None))
    with pytest.raises(Conflict, match="may keep 2 adapters and has 2") as refused:
        put(registry, "c", 1, "ann", quota=Quota(2, None))
    assert refused.value.code == "quota_exceeded"
    put(registry, "c", 1, "bob", quota=Quota(1, None))  # others' do not count
    put(registry, "b", 2, "ann", quota=Quota(2, 3 * size + 100))
    with pytest.raises(Conflict, match=f"may keep {3 * size + 100} bytes") as refused:
        put(registry, "b", 3, "ann", quota=Quota(2, 3 * size + 100))
    assert refused.value.code == "quota_exceeded"
    assert registry.get("b", "ann").version == 2
    assert put(registry, "b", 2, "ann", quota=Quota(0, 0)).version == 2, "the same bytes again need no room"
    with pytest.raises(Conflict, match="may keep"):
        put(make(), "b", 3, "ann", quota=Quota(2, 3 * size + 100))  # it is known after a start
    registry.delete("a", tenant="ann")
    assert put(registry, "b", 3, "ann", quota=Quota(1, 3 * size + 100)).version == 3


@pytest.mark.parametrize("failing", [False, True])
def test_uploads_that_race_do_not_exceed_a_quota(make, monkeypatch, failing):
    registry = make()
    size = put(registry, "first", 0, "ann").bytes
    quota = Quota(3, 3 * size + 100)
    start, write = threading.Barrier(6), registry._store.write_name

    def slow(tenant, name, record):
        if failing and name == "a0":
            raise StorageFailure("full")
        write(tenant, name, record)

    monkeypatch.setattr(registry._store, "write_name", slow)

    def upload(number):
        start.wait(5)
        try:
            return put(registry, f"a{number}", number, "ann", quota=quota).version
        except (Conflict, StorageFailure) as fault:
            return fault.code

    with ThreadPoolExecutor(6) as pool:
        told = list(pool.map(upload, range(6)))
    kept, _ = registry.list(limit=9, tenant="ann")
    assert len(kept) == 1 + told.count(1) <= 3
    assert sum(one.version.bytes for one in kept) <= quota.bytes
    assert failing or told.count(1) == 2
    missing = 3 - len(kept)
    for number in range(missing):  # what failed has taken no room
        put(registry, f"b{number}", 9, "ann", quota=quota)
    with pytest.raises(Conflict):
        put(registry, "c", 9, "ann", quota=quota)


def test_an_upload_is_refused_beforehand_only_where_that_is_certain(make):
    registry = make()
    size = put(registry, "a", 1, "ann").bytes
    registry.expect("b", size, quota=Quota(2, 2 * size), tenant="ann")
    registry.expect("a", 9 * size, quota=Quota(1, size), tenant="ann")  # may be the bytes that it has
    registry.expect("b", size, quota=Quota(1, size), tenant="bob")
    for quota in (Quota(1, None), Quota(None, 2 * size - 1)):
        with pytest.raises(Conflict) as refused:
            registry.expect("b", size, quota=quota, tenant="ann")
        assert refused.value.code == "quota_exceeded"


def test_equal_versions_count_once_in_a_name_and_again_in_another(make):
    registry = make()
    size = put(registry, "a", 1, "ann").bytes
    room = Quota(None, 2 * size)
    for seed in (2, 1):
        put(registry, "a", seed, "ann", quota=room)
    assert len(registry.versions("a", "ann")) == 3
    assert registry.snapshot()["ann", "a"].bytes == 2 * size
    with pytest.raises(Conflict):
        put(registry, "b", 1, "ann", quota=room)
    put(registry, "b", 1, "ann", quota=Quota(None, 3 * size))


def calls_of_this_thread(monkeypatch, act):
    """The names of the file system calls that `act` makes, or tries, on this thread."""
    seen, here = [], threading.get_ident()

    def noting(name, original):
        def call(*args, **more):
            if threading.get_ident() == here:
                seen.append(name)
            return original(*args, **more)

        return call

    with monkeypatch.context() as patch:
        for name in ("mkdir", "chmod", "fsync", "link", "rename", "replace", "unlink", "rmdir"):
            patch.setattr(os, name, noting(name, getattr(os, name)))
        act()
    return seen


def test_no_call_does_more_where_another_tenant_has_the_same_bytes(make, monkeypatch):
    """Nor less: what is freed, or stays because somebody else has it, is another thread's work."""
    registry = make()

    def change():
        put(registry, "a", 1, "ann")
        put(registry, "a", 2, "ann")
        put(registry, "a", 2, "ann")
        with pytest.raises(Conflict):
            put(registry, "b", 1, "ann", quota=Quota(1, None))
        registry.delete("a", tenant="ann")

    put(registry, "x", 3, "ann")  # which makes the directory of her names
    alone = calls_of_this_thread(monkeypatch, change)
    for seed in (1, 2):
        put(registry, f"a{seed}", seed, "bob")
    assert calls_of_this_thread(monkeypatch, change) == alone
    assert "unlink" in alone  # of the record
    assert len(stored(registry)) == 3


def test_the_same_bytes_of_two_tenants_are_two_in_memory_and_one_on_disk(make):
    registry = make()
    for tenant in ("ann", "bob"):
        put(registry, "a", 1, tenant)
    refs = [registry.acquire("a", tenant).ref for tenant in ("ann", "bob")]
    assert refs[0].digest == refs[1].digest == digest_in(refs[0].key) == digest_in(refs[1].key)
    assert refs[0].key != refs[1].key
    assert AdapterRef("a", 1, "sha256:1").key == "sha256:1"
    assert stored(registry) == [refs[0].digest]
    cache = AdapterCache(registry.load, 1 << 20)
    assert cache.get(refs[0].key).key == refs[0].key
    assert not cache.peek(refs[1].key)
    cache.get(refs[1].key)
    assert cache.misses == 2


def test_storing_bytes_that_are_stored_skips_no_flush(make, monkeypatch):
    """Nor are they read back: the time of an upload must not say that somebody else has made it."""
    registry, flushed = make(), []
    put(registry, "a", 1, "ann")
    stored = registry._store.open(registry.get("a", "ann").digest).weights_path
    before, fsync = stored.stat().st_ino, store_module._fsync
    monkeypatch.setattr(store_module, "_fsync", lambda path: (flushed.append(path.name), fsync(path)))
    monkeypatch.setattr(registry._store, "verify", None)
    put(registry, "a", 1, "bob")
    assert stored.stat().st_ino != before
    assert {"adapter_config.json", "adapter_model.safetensors", stored.parent.name} <= set(flushed)


class SlowLanes:
    """Every adapter of `slow` has a lane, and a copy for its next version takes until `go` is set."""

    def __init__(self, slow):
        self.slow, self.building, self.go = slow, threading.Event(), threading.Event()

    def enter(self, adapter, pinned, *, keeps=False):
        self.building.set()
        assert self.go.wait(30)

    def leave(self, adapter, *, asked=False, replaced=False):
        pass

    def inside(self, adapter):
        return False if adapter.tenant == self.slow else None


class ToldLanes:
    """Nobody has one; `told` is who leaves, and why."""

    def __init__(self):
        self.told = []

    def leave(self, adapter, *, asked=False, replaced=False):
        self.told.append((adapter.version, asked, replaced))

    def inside(self, adapter):
        return None


def test_lanes_are_told_whether_a_version_is_replaced_or_a_name_is_no_more(make):
    registry = make()
    registry.moves.lanes = lanes = ToldLanes()
    put(registry, "a", 1, "ann")
    put(registry, "a", 2, "ann")
    registry.rollback("a", 1, tenant="ann")
    registry.change("a", merged=False, tenant="ann")
    registry.delete("a", tenant="ann")
    assert lanes.told == [(1, False, True), (2, False, True), (1, True, False), (1, False, False)]


def test_a_copy_that_is_being_made_holds_up_nobody_elses_names(make):
    registry = make()
    put(registry, "a", 1, "ann")
    put(registry, "b", 1, "ann")
    registry.moves.lanes = lanes = SlowLanes("ann")
    names = [f"n{number}" for number in range(198)] + ["a", "b"]
    with ThreadPoolExecutor(3) as pool:
        held = [pool.submit(put, registry, name, 2, "ann") for name in ("a", "b", "a")]
        assert lanes.building.wait(5)
        for name in names:  # this thread would wait until the copies are there, and they wait for it
            put(registry, name, 1, "bob")
            registry.change(name, public=True, tenant="bob")
            registry.rollback(name, 1, tenant="bob")
            registry.delete(name, tenant="bob")
        assert not any(one.done() for one in held)
        lanes.go.set()
        assert sorted(one.result(5).version for one in held) == [2, 2, 2]
    assert len(registry._writers) == 0


def test_writers_of_one_name_take_turns_and_leave_nothing():
    writers, inside, most = Writers(), [], []

    def write(number):
        key = ("ann", f"n{number % 3}")
        with writers.alone(key):
            inside.append(key)
            most.append(inside.count(key))
            time.sleep(0)
            inside.remove(key)
            if number % 5 == 0:
                raise StorageFailure("full")

    with ThreadPoolExecutor(8) as pool:
        faults = [pool.submit(write, number).exception() for number in range(300)]
    assert set(most) == {1}
    assert sum(fault is not None for fault in faults) == 60
    assert len(writers) == 0


def test_a_page_shows_and_costs_only_what_it_shows(make):
    """Others' private names are not even looked at, nor are one's own beyond the page."""
    registry = make()
    version = put(registry, "a", 1, "ann")
    names = registry._names

    def keep(tenant, name, public=False):
        record = Record(1, 2, (replace(version, name=name),), public=public)
        if public:
            names.claim((tenant, name))
        registry._catalogue._set((tenant, name), record)

    for number in range(300):
        keep("bob", f"n{number:03}")
        keep("ann", f"n{number:03}-private")
    for number in range(0, 300, 100):
        keep("ann", f"n{number:03}-shown", public=True)
        keep("ann", f"n{number:03}", public=True)  # bob has his own
    names.claim(("ann", "n001-private"))  # about to be published
    looked = []
    get = names.get
    names.get = lambda key: (looked.append(key), get(key))[1]
    names._own = {tenant: own for tenant, own in names._own.items() if tenant == "bob"} | {"ann": Private(names, "ann")}
    page, following = registry.list(limit=3, after="n099", tenant="bob")
    assert [(one.owner, one.version.name) for one in page] == [("bob", "n100"), ("ann", "n100-shown"), ("bob", "n101")]
    assert following == "n101"
    assert len(looked) == 4
    names.get = get
    seen, after = [], None
    while (page := registry.list(limit=7, after=after, tenant="bob"))[1]:
        seen, after = seen + page[0], page[1]
    shown = [one.version.name for one in seen + page[0]]
    assert shown == sorted([f"n{number:03}" for number in range(300)] + ["n000-shown", "n100-shown", "n200-shown"])
    assert registry.list(limit=2, after="n200-shown", tenant="cyd") == ([], None)
    assert [one.version.name for one in registry.list(limit=2, after="n100", tenant="cyd")[0]] == ["n100-shown", "n200"]


class Private(dict):
    """A tenant's records, of which only the published ones may be looked at."""

    def __init__(self, names, tenant):
        super().__init__(names._own[tenant])

    def get(self, name):
        found = super().get(name)
        assert found.public or name == "n001-private", "that one is private"
        return found

    def irange(self, *arguments, **more):
        raise AssertionError("another's names are no part of a page")

    __iter__ = keys = items = values = irange
