"""The store on disk: identity by content, idempotent publishing, repair, names."""

import errno
import threading

import pytest

from server.errors import AdapterUnavailable, StorageFailure
from server.registry.store import Store, digest_of, storage_errors


def staged(store, config=b"{}", weights=b"weights"):
    staging = store.stage()
    staging.config_path.write_bytes(config)
    staging.weights_path.write_bytes(weights)
    return staging


def leftovers(root):
    return list((root / "staging").iterdir())


def test_digest_depends_on_both_files_and_is_stable():
    # Written out: a change would orphan every adapter that is stored anywhere.
    expected = "sha256:040310c5c805abb049c52cd4a4fc5e89f130c1522d34e665bba3cb06a611b572"
    assert digest_of("0" * 64, "1" * 64) == expected
    assert len({digest_of("a", "b"), digest_of("b", "a"), digest_of("a", "a"), digest_of("ab", "")}) == 4


def test_publish_then_open_verify_remove(tmp_path):
    store = Store(tmp_path)
    with staged(store) as staging:
        digest = store.publish(staging)
    assert leftovers(tmp_path) == []
    stored = store.verify(digest)
    assert stored.config == b"{}"
    assert stored.weights_path.read_bytes() == b"weights"
    assert stored.bytes == 9
    assert store.digests() == [digest]
    assert store.exists(digest)
    with staged(store) as again:
        assert store.publish(again) == digest
    store.sweep()
    assert leftovers(tmp_path) == []
    store.remove(digest)
    store.remove(digest)
    assert store.digests() == []
    assert leftovers(tmp_path) == []
    with pytest.raises(AdapterUnavailable):
        store.open(digest)


def test_an_upload_that_is_not_published_leaves_nothing(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(ZeroDivisionError), staged(store):
        raise ZeroDivisionError
    assert leftovers(tmp_path) == []
    staged(store)
    (tmp_path / "staging" / "stray").write_text("x")
    Store(tmp_path)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "lose"])
def test_damage_is_reported_and_the_same_upload_repairs_it(tmp_path, damage):
    store = Store(tmp_path)
    with staged(store) as staging:
        digest = store.publish(staging)
    path = store.open(digest).weights_path
    path.chmod(0o644)
    if damage == "lose":
        path.unlink()
    else:
        path.write_bytes(b"weightz" if damage == "flip" else b"weigh")
    with pytest.raises(AdapterUnavailable) as caught:
        store.verify(digest)
    assert str(tmp_path) not in caught.value.message
    with staged(store) as staging:
        store.publish(staging)
    assert store.verify(digest).bytes == 9


def test_many_threads_publish_the_same_bytes(tmp_path):
    store, failures = Store(tmp_path), []

    def publish():
        try:
            with staged(store) as staging:
                store.verify(store.publish(staging))
        except Exception as exc:
            failures.append(exc)

    threads = [threading.Thread(target=publish) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(store.digests()) == 1
    store.sweep()
    assert leftovers(tmp_path) == []


def test_files_that_are_replaced_are_freed_by_the_sweep(tmp_path):
    """Freeing a large file takes long: it would tell an uploader that somebody has the same bytes."""
    store = Store(tmp_path)
    with staged(store) as staging:
        digest = store.publish(staging)
    path = store.open(digest).weights_path
    before = path.stat().st_ino
    with staged(store) as staging:
        store.publish(staging)
    assert path.stat().st_ino != before
    assert before in [left.stat().st_ino for left in leftovers(tmp_path)]
    store.sweep()
    assert leftovers(tmp_path) == []
    store.verify(digest)


def test_a_file_system_without_links_stores_all_the_same(tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr("os.link", link)
    store = Store(tmp_path)
    for _ in range(2):
        with staged(store) as staging:
            digest = store.publish(staging)
    store.verify(digest)
    assert leftovers(tmp_path) == []


def test_names(tmp_path):
    store = Store(tmp_path)
    assert store.read_name("t", "a") is None
    assert store.names() == []
    store.write_name("t", "a.json", {"x": 1})
    store.write_name("t", "a", {"x": 1})
    store.write_name("t", "a", {"x": 2})
    assert store.read_name("t", "a") == {"x": 2}
    assert Store(tmp_path).names() == [("t", "a"), ("t", "a.json")]
    store.delete_name("t", "a")
    store.delete_name("t", "a")
    assert store.names() == [("t", "a.json")]
    (tmp_path / "names/t/b.json").write_text("{")
    (tmp_path / "names/t/c.json").write_text("[]")
    for name in "bc":
        with pytest.raises(AdapterUnavailable):
            store.read_name("t", name)


@pytest.mark.parametrize("bad", ["", ".", "..", "../x", "a/b", ".hidden", "a\0"])
def test_a_name_never_leaves_the_directory(tmp_path, bad):
    store = Store(tmp_path)
    for tenant, name in ((bad, "a"), ("t", bad)):
        with pytest.raises(ValueError, match="file name"):
            store.write_name(tenant, name, {})
    for digest in ("sha256:../../x", "x", "sha256:" + "A" * 64):
        with pytest.raises(AdapterUnavailable):
            store.open(digest)


def test_storage_errors_tell_the_reason_and_no_path():
    with pytest.raises(StorageFailure) as caught, storage_errors("keep the upload"):
        raise OSError(errno.ENOSPC, "x", "/secret/path")
    assert caught.value.message == "the data directory could not keep the upload: no space left on device"


def test_an_unusable_root_is_a_storage_failure(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailure):
        Store(tmp_path / "file" / "below")
