"""The RAM tier: bounded bytes, one load a digest, and by default the least recently used goes first."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from server.lora.eviction import order
from server.lora.weights import AdapterWeights
from server.registry.cache import AdapterCache


def weights(digest, nbytes=10):
    return AdapterWeights(digest, {}, 1, nbytes)


def test_least_recently_used_goes_first():
    loads = []
    cache = AdapterCache(lambda digest: loads.append(digest) or weights(digest), 30)
    for digest in "abcad":
        assert cache.get(digest).key == digest
    assert [cache.peek(digest) for digest in "abcd"] == [True, False, True, True]
    assert (cache.hits, cache.misses, cache.evictions, len(cache)) == (1, 4, 1, 3)
    assert cache.used_bytes == cache.capacity_bytes == 30
    cache.drop("a")
    cache.drop("never there")
    assert cache.used_bytes == 20
    assert loads == list("abcd")


def test_peek_is_no_use():
    cache = AdapterCache(weights, 20)
    cache.get("a"), cache.get("b")
    assert cache.peek("a")
    cache.get("c")
    assert not cache.peek("a")


def test_too_large_is_returned_and_not_kept():
    cache = AdapterCache(lambda digest: weights(digest, 31 if digest == "big" else 10), 30)
    cache.get("a")
    assert cache.get("big").nbytes == 31
    assert cache.peek("a")
    assert not cache.peek("big")
    assert cache.evictions == 0


def test_a_failed_load_is_raised_and_forgotten():
    answers = [OSError("disk"), weights("a")]

    def load(_):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    cache = AdapterCache(load, 30)
    with pytest.raises(OSError, match="disk"):
        cache.get("a")
    assert cache.get("a").key == "a"


def test_one_load_for_many_threads_and_different_digests_side_by_side():
    started, go, loads = threading.Barrier(3), threading.Event(), []

    def load(digest):
        loads.append(digest)
        started.wait(5)  # only passes when both digests are loading at once
        go.wait(5)
        return weights(digest)

    cache = AdapterCache(load, 100)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(cache.get, digest) for digest in "abababab"]
        started.wait(5)
        go.set()
        got = [future.result(5) for future in asked]
    assert sorted(loads) == ["a", "b"]
    assert len({id(one) for one in got}) == 2
    assert cache.hits + cache.misses == 8


def test_dropped_while_loading_is_not_kept():
    inside, go = threading.Event(), threading.Event()

    def load(digest):
        inside.set()
        go.wait(5)
        return weights(digest)

    cache = AdapterCache(load, 100)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(cache.get, "a")
        inside.wait(5)
        cache.drop("a")
        go.set()
        assert asked.result(5).key == "a"
    assert not cache.peek("a")
    assert cache.used_bytes == 0


@pytest.mark.parametrize("policy", ["lru", "cost"])
def test_the_bound_holds_under_threads(policy):
    over = []
    cache = AdapterCache(lambda digest: weights(digest, 1 + int(digest) % 7), 25, order(policy))

    def work(seed):
        chance = random.Random(seed)
        for _ in range(300):
            digest = str(chance.randrange(40))
            assert cache.get(digest).key == digest
            if chance.random() < 0.1:
                cache.drop(digest)
            if cache.used_bytes > 25:
                over.append(cache.used_bytes)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert over == []
    assert cache.used_bytes == sum(cache.get(d).nbytes for d in list(cache._held))
