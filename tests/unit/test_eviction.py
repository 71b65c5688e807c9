"""Which adapter goes first: by recency, or by what it is worth; and that the second is worth having."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.eviction import ADAPTERS, STREAMS, Load, Replay
from server.lora.bank import Bank
from server.lora.eviction import HALF_LIFE, LeastRecent, LeastWorth, Order, order, reload_cost
from server.lora.weights import AdapterWeights
from server.registry.cache import AdapterCache


def first(one: Order, keys: str) -> str:
    return min(keys, key=one.rank)


def used(one: Order, keys: str, worth: float = 1.0) -> Order:
    for key in keys:
        one.use(key, worth)
    return one


def test_the_policies_by_name() -> None:
    assert isinstance(order("lru"), LeastRecent)
    assert isinstance(order("cost"), LeastWorth)


def test_lru_knows_only_the_last_use() -> None:
    one = used(LeastRecent(), "abcaaabc", worth=7)
    one.use("d", 0.001)
    assert sorted("abcd", key=one.rank) == list("abcd")
    one.leave("a")
    one.use("a", 1)
    assert first(one, "abcd") == "b"
    one.leave("never there")


def test_what_is_used_often_outlives_what_was_used_last() -> None:
    assert first(used(LeastWorth(), "aaaabc"), "abc") == "b"


def test_of_two_used_alike_the_one_worth_less_goes() -> None:
    one = LeastWorth()
    for key, worth in (("a", 9.0), ("b", 1.0), ("c", 3.0)):
        one.use(key, worth)
    assert sorted("abc", key=one.rank) == ["b", "c", "a"]


def test_a_former_favourite_goes_in_the_end() -> None:
    one = used(LeastWorth(), "a" * 50 + "bc")
    assert first(one, "abc") != "a"
    for _ in range(int(20 * HALF_LIFE)):
        used(one, "bc")
    assert first(one, "abc") == "a"


def test_a_popular_adapter_that_comes_back_does_not_begin_anew() -> None:
    one = used(LeastWorth(), "bcaaa")
    one.leave("a")
    used(one, "da")
    assert sorted("abcd", key=one.rank)[-1] == "a"


def test_the_history_stays_a_multiple_of_what_is_held() -> None:
    one = LeastWorth()
    most = 0
    for number in range(5000):
        one.use(str(number), 1.0)
        if number >= 10:
            one.leave(str(number - 10))
        most = max(most, len(one._uses))
    assert most < 25 * HALF_LIFE * 10


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from([1.0, 2.5, 40.0])), min_size=1, max_size=300))
def test_ranks_order_the_decayed_counts_times_their_worth(history: list[tuple[str, float]]) -> None:
    one, counts, worths = LeastWorth(), defaultdict[str, float](float), dict[str, float]()
    for key, worth in history:
        decay = 0.5 ** (1 / (HALF_LIFE * max(1, len(worths))))
        counts = defaultdict(float, {other: count * decay for other, count in counts.items()})
        counts[key] += 1
        worths[key] = worth
        one.use(key, worth)
    for left in worths:
        for right in worths:
            expected = counts[left] * worths[left] - counts[right] * worths[right]
            if abs(expected) > 1e-9 * counts[left] * worths[left]:
                assert (one.rank(left) > one.rank(right)) == (expected > 0)


def test_in_ram_a_large_adapter_goes_before_small_ones_used_as_often() -> None:
    sizes = {"small": 1_000_000, "large": 50_000_000, "other": 1_000_000, "new": 40_000_000}
    for policy, gone in (("lru", {"small", "large"}), ("cost", {"large"})):
        cache = AdapterCache(lambda d: AdapterWeights(d, {}, 1, sizes[d]), 60_000_000, order(policy))  # type: ignore[arg-type]
        for digest in sizes:
            cache.get(digest)
        assert {digest for digest in sizes if not cache.peek(digest)} == gone


def test_on_the_device_a_slot_is_a_slot_and_the_dearer_load_stays() -> None:
    bank = Bank(2, LeastWorth())
    for digest, nbytes in (("dear", 90_000_000), ("cheap", 1_000_000)):
        assert bank.reserve(digest)
        bank.fill(digest, AdapterWeights(digest, {}, 1, nbytes))
    assert bank.reserve("new")
    assert bank.holds("dear")
    assert not bank.holds("cheap")


LOADS = {rank: Load(rank * 460_000, reload_cost(rank * 460_000) * 1e-9) for rank in (8, 16, 32, 64)}


@pytest.mark.parametrize("ranks", [(8,), (8, 16, 32, 64)], ids=["equal sizes", "mixed sizes"])
@pytest.mark.parametrize("stream", STREAMS)
def test_the_default_is_better_than_lru_or_as_good(stream: str, ranks: tuple[int, ...]) -> None:
    rng = random.Random(1)
    loads = [LOADS[rng.choice(ranks)] for _ in range(ADAPTERS)]
    asked = STREAMS[stream](random.Random(2), 6000)
    seconds = {policy: Replay(loads, policy).run(asked)["reload_seconds"] for policy in ("lru", "cost")}
    assert seconds["cost"] <= 1.01 * seconds["lru"]
    if stream in ("zipf 1", "zipf 1.5"):
        assert seconds["cost"] < 0.97 * seconds["lru"]
