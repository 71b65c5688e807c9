"""Merged copies: room, references, and everybody told once, with a builder of our own."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import pytest

from server.core import AdapterRef
from server.engine.merging import MergedCopies
from server.engine.messages import Built, LaneChanged, Merge, Unmerge, Weighed
from server.errors import AdapterUnavailable, Conflict
from server.lora.merge import MergedCopy

SIZE = 100


class Builder:
    def __init__(self) -> None:
        self.faults: dict[str, Exception] = {}
        self.built: list[str] = []

    def merged_bytes(self, weights: Any) -> int:
        return SIZE

    def merge(self, weights: Any) -> MergedCopy:
        if weights in self.faults:
            raise self.faults[weights]
        self.built.append(weights)
        return MergedCopy(weights, {}, SIZE)


class Desk:
    """Does by hand what the engine's thread does."""

    def __init__(self, most: int):
        self.inbox: queue.SimpleQueue[Weighed | Built] = queue.SimpleQueue()
        self.answers: list[LaneChanged] = []
        self.builder = Builder()
        self.missing: set[str] = set()
        self.freed: list[str] = []
        self.copies = MergedCopies(
            self.builder, self.fetch, self.inbox.put, self.answers.append, freed=self.freed.append, most=most
        )

    def fetch(self, digest: str) -> Any:
        if digest in self.missing:
            raise AdapterUnavailable("gone")
        return digest

    def handle(self) -> None:
        message = self.inbox.get(timeout=10)
        if isinstance(message, Weighed):
            self.copies.weighed(message)
        else:
            self.copies.built(message)

    def merge(self, name: str, *, version: int = 1, pinned: bool = False, messages: int = 2) -> LaneChanged:
        self.copies.want(Merge(f"m-{name}", ref(name, version), pinned))
        for _ in range(messages):
            self.handle()
        return self.answers.pop()

    def close(self) -> None:
        self.copies.close()


def ref(name: str, version: int = 1) -> AdapterRef:
    return AdapterRef(name, version, f"{name}-{version}")


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk(2 * SIZE)
    yield made
    made.close()


def test_a_copy_is_made_used_and_freed(desk: Desk) -> None:
    assert desk.copies.acquire(ref("a")) is None
    assert desk.merge("a") == LaneChanged("m-a")
    held = desk.copies.acquire(ref("a"))
    assert held is not None
    assert desk.copies.copy_of(held.lane) is held.copy
    assert desk.copies.acquire(ref("a", 2)) is None, "another version is another copy"
    desk.copies.give_up(Unmerge("u", ref("a")))
    assert desk.answers.pop() == LaneChanged("u")
    assert desk.copies.acquire(ref("a")) is None
    assert desk.copies.nbytes == SIZE, "a request still runs on it"
    assert desk.copies.copy_of(held.lane) is not None
    desk.copies.release(held)
    assert desk.copies.nbytes == 0
    assert not desk.copies
    assert desk.copies.copy_of(held.lane) is None
    assert desk.freed == [held.lane]
    assert desk.copies.byte_seconds > 0
    assert desk.copies.changes == {("merge", "asked"): 1, ("unmerge", "asked"): 1}


def test_what_was_asked_for_is_on_the_bill_from_when_it_is_there_until_it_is_gone(desk: Desk) -> None:
    """Also after it was given up, while somebody's requests run on it."""
    time = [0.0]
    desk.copies._now = lambda: time[0]
    desk.copies.want(Merge("m", ref("a"), False))
    desk.handle()
    time[0] += 100
    assert desk.copies.nbytes == SIZE, "its room is taken while it is made"
    assert desk.copies.asked() == {}
    desk.handle()
    time[0] += 1
    held = desk.copies.acquire(ref("a"))
    assert held is not None
    desk.copies.give_up(Unmerge("u", ref("a")))
    assert desk.copies.figures() == {}
    assert desk.copies.asked() == {ref("a"): SIZE}
    time[0] += 2
    desk.copies.want(Merge("m", ref("a"), False))
    desk.handle()
    desk.handle()
    assert desk.copies.asked() == {ref("a"): 2 * SIZE}, "there are two of them"
    time[0] += 3
    desk.copies.release(held)
    assert desk.copies.asked() == {ref("a"): SIZE}
    desk.copies.give_up(Unmerge("u", ref("a")))
    time[0] += 100
    desk.copies.count()
    assert desk.copies.asked() == {}
    assert desk.copies.byte_seconds == (1 + 2 + 3 + 3) * SIZE


def test_what_nobody_asked_for_is_not_on_the_bill_after_it_was_given_up_either(desk: Desk) -> None:
    desk.copies.volunteer(ref("a"), "alone")
    desk.handle()
    desk.handle()
    assert desk.copies.acquire(ref("a")) is not None
    desk.copies.give_up(Unmerge("u", ref("a")))
    desk.copies.count()
    assert desk.copies
    assert desk.copies.asked() == {}
    assert not desk.copies.byte_seconds


def test_asked_twice_it_is_made_once_and_both_are_told(desk: Desk) -> None:
    desk.copies.want(Merge("1", ref("a"), False))
    desk.copies.want(Merge("2", ref("a"), True))
    desk.handle()
    desk.handle()
    assert [one.id for one in desk.answers] == ["1", "2"]
    desk.copies.want(Merge("3", ref("a"), False))
    assert desk.answers[-1] == LaneChanged("3")
    assert desk.builder.built == ["a-1"]
    assert not desk.copies.figures()[ref("a")].pinned, "the last word counts"


def test_without_room_the_least_recently_used_idle_copy_goes(desk: Desk) -> None:
    desk.merge("a")
    desk.merge("b")
    held = desk.copies.acquire(ref("a"))
    assert held is not None
    desk.copies.release(held)
    assert desk.merge("c").error is None
    assert desk.copies.acquire(ref("b")) is None
    assert desk.copies.nbytes == 2 * SIZE


def test_pinned_copies_and_those_in_use_stay_and_the_refusal_has_the_numbers(desk: Desk) -> None:
    desk.merge("a", pinned=True)
    desk.merge("b")
    held = desk.copies.acquire(ref("b"))
    assert held is not None
    refused = desk.merge("c", messages=1).error
    assert isinstance(refused, Conflict)
    assert refused.code == "merged_full"
    assert "100 bytes" in refused.message
    assert "200" in refused.message
    assert desk.builder.built == ["a-1", "b-1"]
    desk.copies.release(held)
    assert desk.merge("c").error is None
    assert set(desk.copies.figures()) == {ref("a"), ref("c")}


def test_a_refusal_says_what_would_make_room() -> None:
    small = Desk(most=SIZE // 2)
    refused = small.merge("a", messages=1).error
    small.close()
    assert refused is not None
    assert "no copy of this size fits" in refused.message
    one = Desk(most=SIZE + SIZE // 2)
    one.merge("a")
    refused = one.merge("a", version=2, messages=1).error
    one.close()
    assert refused is not None
    assert f"its earlier version takes {SIZE}" in refused.message


def test_a_refusal_does_not_tell_what_others_have(desk: Desk) -> None:
    desk.copies.want(Merge("1", AdapterRef("x", 1, "x-1", tenant="other"), True))
    desk.handle()
    desk.handle()
    desk.merge("a", pinned=True)
    refused = desk.merge("b", messages=1).error
    assert refused is not None
    assert f"{SIZE} by this tenant" in refused.message


def test_given_up_while_it_is_made(desk: Desk) -> None:
    desk.copies.want(Merge("1", ref("a"), False))
    desk.handle()  # weighed: its room is taken
    desk.copies.give_up(Unmerge("2", ref("a")))
    assert [one.id for one in desk.answers] == ["1", "2"]
    assert desk.answers[0].error is not None
    assert desk.copies.nbytes == SIZE, "the builder still fills it"
    desk.handle()
    assert desk.copies.nbytes == 0
    desk.copies.want(Merge("3", ref("b"), False))
    desk.copies.give_up(Unmerge("4", ref("b")))
    desk.handle()  # weighed, for nobody
    assert desk.copies.nbytes == 0
    assert not desk.copies


@pytest.mark.parametrize("fault", [Conflict("overflows"), RuntimeError("a bug")])
def test_what_cannot_be_built_is_told_and_leaves_nothing(desk: Desk, fault: Exception) -> None:
    desk.builder.faults["a-1"] = fault
    assert desk.merge("a").error is not None
    assert desk.copies.nbytes == 0
    del desk.builder.faults["a-1"]
    assert desk.merge("a").error is None


def test_what_cannot_be_fetched_is_told(desk: Desk) -> None:
    desk.missing.add("a-1")
    assert isinstance(desk.merge("a", messages=1).error, AdapterUnavailable)
    assert not desk.copies


def test_when_the_engine_ends_those_who_wait_are_told(desk: Desk) -> None:
    desk.copies.want(Merge("1", ref("a"), False))
    desk.copies.give_all_up(Conflict("ended"))
    assert [one.id for one in desk.answers] == ["1"]


def test_one_that_nobody_asked_for_is_not_on_the_bill_until_somebody_does(desk: Desk) -> None:
    time = iter(range(1, 1000))
    desk.copies._now = lambda: float(next(time))  # every look takes a second
    desk.copies.volunteer(ref("a"), "alone")
    desk.handle()
    desk.handle()
    assert desk.copies.automatic() == {ref("a"): True}
    desk.copies.count()
    assert not desk.copies.byte_seconds
    desk.copies.want(Merge("m", ref("a"), False))
    assert desk.answers.pop() == LaneChanged("m")
    assert desk.copies.automatic() == {}
    desk.copies.count()
    assert desk.copies.byte_seconds == SIZE
    assert desk.copies.changes == {("merge", "alone"): 1}


def test_one_that_nobody_asked_for_never_displaces_one_that_somebody_did(desk: Desk) -> None:
    desk.merge("a")
    desk.merge("b")
    desk.copies.volunteer(ref("c"), "alone")
    desk.handle()
    assert not desk.copies.has(ref("c"))
    assert desk.copies.has(ref("a"))
    assert desk.copies.has(ref("b"))


def test_one_that_nobody_asked_for_makes_way_when_its_requests_have_ended(desk: Desk) -> None:
    desk.merge("a", pinned=True)
    desk.copies.volunteer(ref("b"), "alone")
    desk.handle()
    desk.handle()
    held = desk.copies.acquire(ref("b"))
    assert held is not None
    refused = desk.merge("c", messages=1).error
    assert isinstance(refused, Conflict), "its room is still taken"
    assert "try again" in refused.message
    assert desk.copies.acquire(ref("b")) is None, "but it takes no more requests"
    desk.copies.release(held)
    assert desk.merge("c") == LaneChanged("m-c"), "nobody is told of a lane that was never asked for"
    assert desk.copies.nbytes == 2 * SIZE
    assert desk.copies.changes["unmerge", "made_way"] == 1


def test_a_version_does_not_make_way_for_its_successor(desk: Desk) -> None:
    """Which may turn out not to be finite: the old one stays."""
    desk.merge("a")
    desk.merge("b", pinned=True)
    desk.copies.want(Merge("m", ref("a", 2), False))
    desk.handle()
    assert isinstance(desk.answers.pop().error, Conflict)
    assert desk.copies.has(ref("a"))


def test_one_that_keeps_others_takes_nobodys_room(desk: Desk) -> None:
    desk.merge("a")
    desk.merge("b")
    desk.copies.want(Merge("m", ref("c"), False, True))
    desk.handle()
    assert isinstance(desk.answers.pop().error, Conflict)
    assert desk.copies.has(ref("a"))
    assert desk.copies.has(ref("b"))


def of(tenant: str, name: str, version: int = 1) -> AdapterRef:
    return AdapterRef(name, version, f"{name}-{version}", tenant=tenant)


@pytest.fixture
def wide() -> Iterator[Desk]:
    """Room for four copies; each tenant may have two."""
    made = Desk(4 * SIZE)
    yield made
    made.close()


def ask(
    desk: Desk, adapter: AdapterRef, *, pinned: bool = False, part: int | None = 2 * SIZE, **others: int | None
) -> Conflict | None:
    """Its answer; `others` are other tenants' parts."""
    desk.copies.want(Merge("m", adapter, pinned, parts={adapter.tenant: part} | others))
    for _ in range(2):
        if not desk.answers:
            desk.handle()
    fault = desk.answers.pop().error
    assert fault is None or isinstance(fault, Conflict)
    return fault


def test_one_tenants_pins_do_not_shut_the_others_out(wide: Desk) -> None:
    assert ask(wide, of("ann", "a"), pinned=True) is None
    assert ask(wide, of("ann", "b"), pinned=True) is None
    refused = ask(wide, of("ann", "c"), pinned=True)
    assert refused is not None
    assert refused.code == "quota_exceeded"
    assert f"{2 * SIZE} bytes" in refused.message
    assert f"takes {SIZE}" in refused.message
    assert ask(wide, of("bob", "a"), pinned=True) is None
    assert ask(wide, of("ann", "b", 2)) is None, "a new version takes over from the one before"


def test_what_is_still_in_use_counts_against_the_part(wide: Desk) -> None:
    ask(wide, of("ann", "a"))
    ask(wide, of("ann", "b"))
    held = wide.copies.acquire(of("ann", "a"))
    assert held is not None
    wide.copies.give_up(Unmerge("u", of("ann", "a")))
    wide.answers.clear()
    assert ask(wide, of("ann", "b"), pinned=True) is None
    refused = ask(wide, of("ann", "c"))
    assert refused is not None
    assert refused.code == "quota_exceeded"
    wide.copies.release(held)
    assert ask(wide, of("ann", "c")) is None


def test_ones_own_copies_go_first_then_those_over_their_part_then_others(wide: Desk) -> None:
    for tenant, name in (("bob", "b"), ("cyd", "c"), ("cyd", "d"), ("ann", "a")):
        assert ask(wide, of(tenant, name)) is None
    assert ask(wide, of("ann", "e")) is None
    assert not wide.copies.has(of("ann", "a")), "though it was used last"
    assert "the one of e" in wide.copies.notes["ann", "a"]
    assert ask(wide, of("ann", "e"), pinned=True) is None
    assert ask(wide, of("ann", "f"), cyd=SIZE) is None, "cyd's part was lowered, and cyd has asked for nothing since"
    assert wide.copies.has(of("bob", "b")), "the least recently used, but within its part"
    assert not wide.copies.has(of("cyd", "c"))
    assert "another tenant" in wide.copies.notes["cyd", "c"]
    assert ask(wide, of("dan", "g")) is None
    assert not wide.copies.has(of("bob", "b"))


def test_a_lost_lane_is_told_until_it_is_back_or_given_up(wide: Desk) -> None:
    wide.copies.most = SIZE
    ask(wide, of("ann", "a"))
    ask(wide, of("bob", "b"))
    assert set(wide.copies.notes) == {("ann", "a")}
    ask(wide, of("ann", "a"))
    assert set(wide.copies.notes) == {("bob", "b")}
    wide.copies.give_up(Unmerge("r", of("bob", "b"), replaced=True))
    assert set(wide.copies.notes) == {("bob", "b")}, "its next version is not in a lane either"
    wide.copies.give_up(Unmerge("u", of("bob", "b"), asked=True))
    assert wide.copies.notes == {}
    ask(wide, of("ann", "a"), pinned=True)
    wide.answers.clear()
    wide.copies.want(Merge("m", of("bob", "b"), False, keeps=True))
    wide.handle()
    assert "MERGED_BYTES" in wide.copies.notes["bob", "b"], "it had a lane before the restart"


def test_a_tenant_that_may_have_all_of_it_is_told_of_what_there_is(wide: Desk) -> None:
    most = wide.copies.most
    for at in range(most // SIZE):
        assert ask(wide, of("ann", f"a{at}"), pinned=True, part=most) is None
    refused = ask(wide, of("ann", "more"), part=most)
    assert refused is not None
    assert refused.code == "merged_full"
    assert f"MERGED_BYTES is {most}" in refused.message


def test_one_that_nobody_asked_for_counts_from_when_somebody_does(wide: Desk) -> None:
    wide.copies.volunteer(of("ann", "a"), "alone")
    wide.handle()
    wide.handle()
    assert ask(wide, of("ann", "b"), pinned=True, part=SIZE) is None
    refused = ask(wide, of("ann", "a"), part=SIZE)
    assert refused is not None
    assert refused.code == "quota_exceeded"
    assert wide.copies.automatic() == {of("ann", "a"): True}, "it stays what it was"
    assert ask(wide, of("ann", "a"), part=2 * SIZE) is None
    assert wide.copies.automatic() == {}
