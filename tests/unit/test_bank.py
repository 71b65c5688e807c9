"""The slots: referenced adapters stay, the order of eviction is kept, and a starved newcomer gets one emptied."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.lora.bank import Bank
from server.lora.eviction import Policy, order
from server.lora.weights import AdapterWeights


def weights(digest: str, nbytes: int = 10) -> AdapterWeights:
    return AdapterWeights(digest, {}, 1, nbytes)


def bank_of(digests: str, slots: int | None = None) -> Bank:
    """A bank with these adapters resident, loaded in this order."""
    bank = Bank(slots or len(digests))
    for digest in digests:
        load(bank, digest)
    return bank


def load(bank: Bank, digest: str) -> None:
    assert bank.reserve(digest)
    bank.fill(digest, weights(digest))


def test_an_adapter_is_there_once_it_has_been_filled() -> None:
    bank = Bank(2)
    assert bank.acquire("a") is None
    assert not bank.holds("a")
    assert bank.reserve("a")
    assert bank.holds("a")
    assert bank.acquire("a") is None, "it is on its way"
    assert bank.resident() == frozenset()
    bank.fill("a", weights("a"))
    found = bank.acquire("a")
    assert found is not None
    assert found.key == "a"
    assert (bank.references, bank.bytes, bank.resident()) == (1, 10, frozenset("a"))
    bank.release("a")
    assert bank.references == 0
    assert bank.acquire("a") is found, "it stays until its slot is wanted"


def test_the_least_recently_used_goes_first() -> None:
    bank = bank_of("abc")
    for digest in "ab":  # c was loaded last, but a and b have been used since
        assert bank.acquire(digest)
        bank.release(digest)
    gone = []
    for digest in "xyz":
        before = bank.resident()
        load(bank, digest)
        gone += before - bank.resident()
    assert gone == ["c", "a", "b"]
    assert (bank.evictions, bank.loads, len(bank)) == (3, 6, 3)


def test_a_referenced_adapter_is_never_evicted() -> None:
    bank = bank_of("ab")
    assert bank.acquire("a")
    assert bank.acquire("a")
    load(bank, "c")
    assert bank.resident() == frozenset("ac")
    assert bank.acquire("c")
    assert not bank.reserve("d")
    bank.release("a")
    assert not bank.reserve("d"), "one of two references is left"
    bank.release("a")
    assert bank.reserve("d")
    assert not bank.holds("a")


def test_a_slot_on_its_way_is_never_taken() -> None:
    bank = Bank(1)
    assert bank.reserve("a")
    assert not bank.reserve("b")
    bank.fill("a", weights("a"))
    assert bank.reserve("b")


def test_a_failed_load_frees_its_slot() -> None:
    bank = Bank(1)
    assert bank.reserve("a")
    bank.abandon("a")
    assert not bank.holds("a")
    assert bank.reserve("b")
    bank.fill("b", weights("b"))
    bank.abandon("b")
    bank.abandon("never there")
    assert bank.resident() == frozenset("b"), "what has arrived is not abandoned"


@pytest.mark.parametrize("times", [0, 1, 3])
def test_releasing_too_often_raises(times: int) -> None:
    bank = bank_of("ab")
    assert bank.acquire("b")
    for _ in range(times):
        assert bank.acquire("a")
    for _ in range(times):
        bank.release("a")
    with pytest.raises(AssertionError, match="more often"):
        bank.release("a")
    assert bank.references == 1


def test_releasing_what_is_not_there_raises() -> None:
    with pytest.raises(KeyError):
        Bank(1).release("a")


def test_a_draining_slot_takes_nobody_and_falls_free_for_the_starved() -> None:
    bank = bank_of("abc")
    for digest, times in (("a", 2), ("b", 1), ("c", 2)):
        for _ in range(times):
            assert bank.acquire(digest)
    bank.drain_one()
    assert bank.acquire("b") is None, "it has the fewest references"
    assert bank.acquire("a")
    bank.drain_one()
    assert bank.acquire("c"), "only one drains at a time"
    assert not bank.reserve("d")
    bank.release("b")
    assert bank.reserve("d")
    assert not bank.holds("b")


def test_a_drained_slot_goes_before_one_used_longer_ago() -> None:
    bank = bank_of("abc")
    for digest in "acb":
        assert bank.acquire(digest)
    bank.release("b")  # fewest references, and the most recently used
    bank.drain_one()
    bank.release("a")
    assert bank.reserve("d")
    assert bank.holds("a")
    assert not bank.holds("b")


def test_reopening_lets_a_draining_slot_take_requests_again() -> None:
    bank = bank_of("a")
    assert bank.acquire("a")
    bank.drain_one()
    assert bank.acquire("a") is None
    bank.reopen()
    assert bank.acquire("a")
    assert bank.references == 2


def test_nothing_is_drained_while_all_are_on_their_way() -> None:
    bank = Bank(1)
    assert bank.reserve("a")
    bank.drain_one()
    bank.fill("a", weights("a"))
    assert bank.acquire("a")


POLICIES: tuple[Policy, ...] = get_args(Policy)
OPERATIONS = st.sampled_from(["acquire", "release", "reserve", "fill", "abandon", "drain", "reopen"])


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4), st.sampled_from(POLICIES), st.lists(st.tuples(OPERATIONS, st.integers(0, 5)), max_size=80))
def test_any_history_keeps_the_promises(slots: int, policy: Policy, history: list[tuple[str, int]]) -> None:
    bank = Bank(slots, order(policy))
    held: dict[str, int] = {}
    coming: set[str] = set()
    for operation, number in history:
        digest = f"d{number}"
        before = bank.resident()
        if operation == "acquire":
            found = bank.acquire(digest)
            if found is not None:
                assert found.key == digest
                assert digest in before
                held[digest] = held.get(digest, 0) + 1
        elif operation == "release" and held.get(digest):
            bank.release(digest)
            held[digest] -= 1
        elif operation == "reserve" and not bank.holds(digest):
            idle = before - {d for d, count in held.items() if count}
            room = len(before) + len(coming) < slots
            assert bank.reserve(digest) == (room or bool(idle))
            if bank.holds(digest):
                coming.add(digest)
                assert len(before - bank.resident()) == (0 if room else 1)
        elif operation in ("fill", "abandon") and digest in coming:
            coming.remove(digest)
            bank.fill(digest, weights(digest)) if operation == "fill" else bank.abandon(digest)
        elif operation == "drain":
            bank.drain_one()
        elif operation == "reopen":
            bank.reopen()
        assert bank.references == sum(held.values())
        assert len(bank) == len(bank.resident()) + len(coming) <= slots
        assert {d for d, count in held.items() if count} <= bank.resident()
