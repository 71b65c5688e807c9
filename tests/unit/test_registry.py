"""Names, versions, preconditions and leases."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from server.errors import (
    AdapterNotFound,
    AdapterUnavailable,
    Conflict,
    InvalidAdapter,
    InvalidRequest,
    PreconditionFailed,
)
from server.registry.registry import Registry
from server.registry.store import Store
from tests.adapters import settle, stage_adapter, stored, tiny_base

BASE = tiny_base(1)


@pytest.fixture
def make(tmp_path):
    made = []

    def make(**options):
        for before in made:
            settle(before)
        made.append(Registry(Store(tmp_path), BASE, max_rank=16, dtype=torch.float32, **options))
        return made[-1]

    return make


def put(registry, name, seed, *, rank=4, tenant="default", **conditions):
    with stage_adapter(registry._store, BASE, seed=seed, rank=rank) as staging:
        return registry.put(name, staging, tenant=tenant, **conditions)


def test_put_replace_repeat_and_restart(make):
    registry = make()
    first = put(registry, "a", 1)
    assert (first.created, first.changed, first.version.version) == (True, True, 1)
    second = put(registry, "a", 2, rank=8)
    assert (second.created, second.changed, second.version.version) == (False, True, 2)
    again = put(registry, "a", 2, rank=8)
    assert (again.created, again.changed, again.version) == (False, False, second.version)
    third = put(registry, "a", 1)
    assert third.version.version == 3
    assert third.version.digest == first.version.digest
    assert second.version.bytes == registry._store.open(second.version.digest).bytes
    restarted = make()
    assert restarted.get("a") == third.version
    assert restarted.versions("a") == registry.versions("a")
    assert len(restarted.versions("a")) == 3
    assert restarted.load(third.version.digest).rank == 4


def test_a_name_that_is_put_as_public_is_so_in_its_first_record(make, monkeypatch):
    """A crash between two records would leave it private for ever."""
    registry, written = make(), []
    write = Store.write_name

    def noting(store, tenant, name, record):
        written.append((name, record["public"]))
        write(store, tenant, name, record)

    monkeypatch.setattr(Store, "write_name", noting)
    put(registry, "a", 1, public=True)
    assert written == [("a", True)]
    assert registry.find("a", "other").public
    assert make().find("a", "other").public
    registry = make()
    registry.change("a", public=False)
    put(registry, "a", 2, public=True)
    assert not registry.find("a").public, "what its owner has said since holds"
    put(registry, "b", 1, public=True, tenant="other")
    with pytest.raises(Conflict) as taken:
        put(registry, "b", 1, public=True)
    assert taken.value.code == "name_published"
    assert not registry.taken("b"), "it is left out, and tried again at the next start"
    registry.delete("b", tenant="other")
    assert put(registry, "b", 1, public=True).created


def test_a_refused_upload_changes_nothing(make):
    registry = make()
    before = put(registry, "a", 1).version
    with pytest.raises(InvalidAdapter):
        put(registry, "a", 2, rank=17)
    assert registry.get("a") == before
    assert stored(registry) == [before.digest]
    assert registry._catalogue.holds.uploads == {}


def test_rollback_keeps_the_number_and_the_next_put_gets_a_new_one(make):
    registry = make()
    versions = [put(registry, "a", seed).version for seed in range(3)]
    assert registry.rollback("a", 1) == versions[0] == registry.get("a") == make().get("a")
    assert registry.rollback("a", 1) == versions[0]
    assert put(registry, "a", 9).version.version == 4
    assert [version.version for version in registry.versions("a")] == [1, 2, 3, 4]
    for number in (0, 5):
        with pytest.raises(AdapterNotFound):
            registry.rollback("a", number)


def test_history_is_bounded_and_what_it_forgets_leaves_the_disk(make):
    registry = make(max_versions=2)
    versions = [put(registry, "a", seed).version for seed in range(4)]
    assert registry.versions("a") == versions[2:]
    assert sorted(stored(registry)) == sorted(version.digest for version in versions[2:])
    registry.rollback("a", 3)
    assert put(registry, "a", 9).version.version == 5


def test_delete_forgets_and_a_new_one_begins_at_1(make):
    registry = make()
    put(registry, "a", 1), put(registry, "a", 2)
    registry.delete("a")
    for call in (registry.get, registry.versions, registry.acquire, registry.delete, make().get):
        with pytest.raises(AdapterNotFound):
            call("a")
    assert stored(registry) == []
    assert put(registry, "a", 2).version.version == 1


def test_etags(make):
    registry = make()
    with pytest.raises(PreconditionFailed):
        put(registry, "a", 1, if_match="*")
    old = f'"{put(registry, "a", 1, if_none_match="*").version.digest}"'
    for conditions in ({"if_none_match": "*"}, {"if_match": f"W/{old}"}, {"if_match": '"x"'}, {"if_none_match": old}):
        with pytest.raises(PreconditionFailed):
            put(registry, "a", 2, **conditions)
    with pytest.raises(PreconditionFailed):
        put(registry, "a", 2, if_none_match=f'"x", W/{old}')
    new = f'"{put(registry, "a", 2, if_match=f"W/{old}, {old}").version.digest}"'
    put(registry, "a", 3, if_none_match=old)
    for call in (registry.delete, lambda name, **c: registry.rollback(name, 1, **c)):
        with pytest.raises(PreconditionFailed):
            call("a", if_match=new)
    for header in ("", "sha256:abc", '"a" "b"', '"a",', "*, *"):
        with pytest.raises(InvalidRequest):
            put(registry, "a", 4, if_match=header)
    registry.delete("a", if_match="*")


def test_a_precondition_that_falls_during_validation_is_seen(make, monkeypatch):
    registry = make()
    old = put(registry, "a", 1).version
    publish, raced = registry._store.publish, []

    def slow(staging):
        if not raced:
            raced.append(True)
            put(registry, "a", 2)
        return publish(staging)

    monkeypatch.setattr(registry._store, "publish", slow)
    with pytest.raises(PreconditionFailed):
        put(registry, "a", 3, if_match=f'"{old.digest}"')
    assert registry.get("a").version == 2
    assert len(stored(registry)) == 2


@pytest.mark.parametrize("name", ["", "A", "-a", ".a", "a/b", "../a", "a" * 65, "a\n", "é", "a b"])
def test_bad_names(make, name):
    registry = make()
    for call in (registry.get, registry.acquire, registry.delete, registry.versions):
        with pytest.raises(InvalidRequest) as caught:
            call(name)
        assert caught.value.param == "name"


def test_tenants_do_not_see_each_other(make):
    registry = make()
    put(registry, "a", 1), put(registry, "a", 2, tenant="other")
    assert registry.get("a").digest != registry.get("a", "other").digest
    registry.delete("a")
    assert registry.get("a", "other").version == 1
    assert make().list(limit=9, tenant="default") == ([], None)
    with pytest.raises(InvalidRequest):
        registry.get("a", "../x")


def test_pages_and_limits(make):
    registry = make(max_adapters=5)
    for seed, name in enumerate(["c", "a", "e", "b", "d"]):
        put(registry, name, seed)
    with pytest.raises(Conflict):
        put(registry, "f", 9)
    assert len(stored(registry)) == 5
    put(registry, "a", 9)
    seen, after = [], None
    while True:
        page, after = registry.list(limit=2, after=after)
        seen += [one.version.name for one in page]
        if after is None:
            break
    assert seen == ["a", "b", "c", "d", "e"]


def test_leases_keep_bytes_until_the_last_is_given_back_once(make):
    registry = make()
    digest = put(registry, "a", 1).version.digest
    first, second = registry.acquire("a"), registry.acquire("a")
    assert registry.leases() == {digest: 2}
    assert first.ref.digest == digest
    registry.delete("a")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: first.release(), range(16)))
    assert registry.leases() == {digest: 1}
    assert registry.load(digest).key == digest
    second.release(), second.release()
    assert registry.leases() == {}
    assert stored(registry) == []
    with pytest.raises(AdapterUnavailable):
        registry.load(digest)


def test_another_base_of_the_same_shape_gets_none_of_the_old_adapters(make, tmp_path):
    """Shapes fit, weights do not: nobody may be answered with them until they are uploaded for this base."""
    registry = make()
    old = put(registry, "a", 1).version
    other = Registry(
        Store(tmp_path), replace(BASE, digest="sha256:other", name="other"), max_rank=16, dtype=torch.float32
    )
    with pytest.raises(InvalidAdapter, match=f"for another base model \\({BASE.name}\\)") as refused:
        other.acquire("a")
    assert (refused.value.code, other.leases()) == ("base_mismatch", {})
    assert other.get("a") == old  # it can be seen and deleted
    again = put(other, "a", 1)
    assert (again.changed, again.version.version, again.version.digest) == (True, 2, old.digest)
    assert other.acquire("a").ref.version == 2
    other.rollback("a", 1)
    with pytest.raises(InvalidAdapter):
        other.acquire("a")
    assert make().acquire("a").ref.version == 1


def test_what_nobody_holds_is_freed_elsewhere(make, tmp_path, monkeypatch):
    """The event loop releases leases: it must not wait for a large file to go."""
    registry = make()
    put(registry, "a", 1)
    lease = registry.acquire("a")
    registry.delete("a")
    assert len(stored(registry)) == 1
    threads, retire = [], registry._store.retire
    monkeypatch.setattr(
        registry._catalogue.holds, "_retire", lambda d: (threads.append(threading.get_ident()), retire(d))
    )
    lease.release()
    registry.close()
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()
    assert list((tmp_path / "staging").iterdir()) == []
    assert registry._store.digests() == []


def test_what_is_let_go_after_the_end_stays_for_the_next_start(make):
    registry = make()
    digest = put(registry, "a", 1).version.digest
    registry.close()
    registry.delete("a")
    assert registry._store.digests() == [digest]
    assert stored(Registry(Store(registry._store.root), BASE, max_rank=16, dtype=torch.float32)) == []


def test_two_names_share_one_object(make):
    registry = make()
    digest = put(registry, "a", 1).version.digest
    put(registry, "b", 1)
    registry.delete("a")
    assert make().load(digest).key == registry.load(digest).key == digest


def test_start_collects_garbage_and_survives_damage(make, tmp_path):
    registry = make()
    kept, lost = put(registry, "a", 1).version, put(registry, "b", 2).version
    with stage_adapter(registry._store, BASE, seed=3) as staging:
        garbage = registry._store.publish(staging)
    registry._store.remove(lost.digest)
    restarted = make()
    assert stored(restarted) == [kept.digest]
    assert garbage != kept.digest
    with pytest.raises(AdapterUnavailable):
        restarted.load(restarted.acquire("b").ref.digest)
    assert put(restarted, "b", 2).changed is False  # the same bytes again bring the object back
    assert restarted.load(lost.digest).key == lost.digest
    (tmp_path / "names/default/a.json").write_text('{"versions": 3}')
    damaged = make()
    assert damaged._store.exists(kept.digest)  # the damaged record may still name it
    with pytest.raises(AdapterNotFound):
        damaged.get("a")
    assert [damaged.taken(name) for name in "abc"] == [True, True, False]
    assert put(damaged, "a", 1).version.version == 1
    damaged.delete("a")
    assert not damaged.taken("a"), "nothing damaged is left of it"


def test_get_and_acquire_do_not_wait_for_a_put(make, monkeypatch):
    registry = make()
    put(registry, "a", 1)
    inside, go = threading.Event(), threading.Event()
    publish = registry._store.publish
    monkeypatch.setattr(registry._store, "publish", lambda s: (inside.set(), go.wait(5), publish(s))[2])
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(put, registry, "a", 2)
        inside.wait(5)
        assert registry.get("a").version == 1
        registry.acquire("a").release()
        go.set()
        assert upload.result(5).version.version == 2


def test_threads_leave_counts_at_zero_and_every_lease_readable(make):
    registry = make(max_versions=2)

    def work(seed):
        chance = random.Random(seed)
        for _ in range(12):
            name = chance.choice("ab")
            try:
                action = chance.randrange(4)
                if action == 0:
                    put(registry, name, chance.randrange(4))
                elif action == 1:
                    registry.delete(name)
                else:
                    lease = registry.acquire(name)
                    assert registry.load(lease.ref.digest).key == lease.ref.digest
                    lease.release()
            except AdapterNotFound:
                pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    named = {
        v.digest
        for name in "ab"
        if (name in [one.version.name for one in registry.list(limit=9)[0]])
        for v in registry.versions(name)
    }
    assert registry.leases() == {}
    assert registry._catalogue.holds.uploads == {}
    assert set(stored(registry)) == named
    assert {digest for digest, count in registry._catalogue.holds.named.items() if count} == named
