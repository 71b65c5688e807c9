"""What waits for a slot is brought to RAM meanwhile: in order, within its bytes, and at no risk to the request."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from time import monotonic
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.core import AdapterRef
from server.engine import loading
from server.engine.loading import AdapterLoader
from server.engine.messages import Fetched, Loaded, Sampling, Submit
from server.engine.sequence import Request
from server.errors import AdapterUnavailable
from server.lora.bank import Bank
from server.lora.weights import AdapterWeights

SIZE = 10


class Jobs:
    """Instead of the loading threads: what is submitted runs when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []
        self.refuses: str | None = None  # "at once", or "queued": a thread that is free later takes it

    def submit(self, function: Callable[..., None], *arguments: Any) -> None:
        if self.refuses != "at once":
            self.waiting.append(lambda: function(*arguments))
        if self.refuses:
            raise RuntimeError("can't start new thread")

    def run(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()


class Loading:
    """A loader by itself. `fetched` is every fetch so far; adapters in `broken` cannot be read."""

    def __init__(self, slots: int, prefetch_bytes: int = 1000, device: str = "cpu"):
        self.fetched: list[str] = []
        self.broken: set[str] = set()
        self.inbox: list[Loaded | Fetched] = []
        self.failed: list[Request] = []
        self.bank, self.jobs = Bank(slots), Jobs()
        self.loader = AdapterLoader(self.bank, self.fetch, self.inbox.append, torch.device(device), prefetch_bytes)
        self.loader.close()
        self.loader._threads = self.jobs  # type: ignore[assignment]
        self._ids = itertools.count()

    def fetch(self, digest: str) -> AdapterWeights:
        self.fetched.append(digest)
        if digest in self.broken:
            raise AdapterUnavailable(f"{digest} is damaged") from OSError(5, "Input/output error")
        return AdapterWeights(digest, {}, 1, SIZE)

    def request(self, digest: str) -> Request:
        """Submitted as the engine does it, but for the part after the queue."""
        early = digest not in self.bank.resident() and self.loader.may_begin(digest)
        submit = Submit(f"r{next(self._ids)}", (1,), AdapterRef(digest, 1, digest), Sampling(1), early=early)
        if early:
            self.loader.begin(digest)
        request = Request(submit, b"", monotonic())
        self.loader.want(request)
        return request

    def settle(self) -> None:
        """Lets everything come to rest."""
        self.loader.serve()
        while self.jobs.waiting or self.inbox:
            self.jobs.run()
            self.deliver()
            self.loader.serve()

    def deliver(self) -> None:
        while self.inbox:
            message = self.inbox.pop(0)
            if isinstance(message, Fetched):
                self.loader.fetched(message)
                continue
            for request in self.loader.arrived(message):
                self.failed.append(request)
                self.loader.give_up(request)

    @property
    def ahead(self) -> list[str]:
        return list(self.loader._ahead)


def holding(*digests: str, prefetch_bytes: int = 1000) -> tuple[Loading, list[Request]]:
    """All slots taken by requests that run."""
    one = Loading(len(digests), prefetch_bytes)
    requests = [one.request(digest) for digest in digests]
    one.settle()
    assert all(request.ready for request in requests)
    one.fetched.clear()
    one.loader.prefetches.clear()
    return one, requests


def test_a_request_that_waits_for_a_slot_has_its_adapter_in_ram_when_one_falls_free() -> None:
    one, [running] = holding("a")
    waiting = one.request("b")
    one.settle()
    assert not waiting.ready
    assert one.ahead == one.fetched == ["b"]
    one.loader.give_up(running)
    one.loader.serve()
    assert waiting.ready, "in the same pass: nothing is left to load"
    assert waiting.residency.cold
    assert one.fetched == ["b"]
    assert one.ahead == []
    assert one.loader.prefetches == {"used": 1}


def test_prefetches_keep_the_order_of_arrival_and_go_a_couple_at_a_time() -> None:
    one, _ = holding("a")
    for digest in "bcdbe":
        one.request(digest)
    one.loader.serve()
    assert len(one.jobs.waiting) == 2
    one.loader.serve()
    assert len(one.jobs.waiting) == 2, "a second pass starts nothing twice"
    one.settle()
    assert one.fetched == one.ahead == ["b", "c", "d", "e"]


def test_no_more_is_prefetched_than_the_bytes_allow_and_the_next_follows_when_one_is_used() -> None:
    one, [running] = holding("a", prefetch_bytes=2 * SIZE)
    waiting = [one.request(digest) for digest in "bcde"]
    one.settle()
    assert one.ahead == one.fetched == ["b", "c"]
    one.loader.give_up(running)
    one.settle()
    assert waiting[0].ready
    assert one.ahead == ["c", "d"]
    one.loader.give_up(waiting[1])  # its client has gone
    one.settle()
    assert one.ahead == ["d", "e"]
    assert one.fetched == ["b", "c", "d", "e"], "nothing was read twice"


def test_without_a_budget_nothing_is_prefetched_for_those_who_wait() -> None:
    one, [running] = holding("a", prefetch_bytes=0)
    one.request("b")
    one.settle()
    assert one.fetched == ["b"], "it began before it was known that there is no slot"
    assert one.ahead == []
    one.request("c")
    one.settle()
    assert one.fetched == ["b"]
    one.loader.give_up(running)
    one.settle()
    assert one.fetched == ["b", "b"]


def test_a_prefetch_that_fails_is_not_the_requests_failure() -> None:
    one, [running] = holding("a")
    one.broken.add("b")
    waiting = one.request("b")
    one.settle()
    one.settle()
    assert one.fetched == ["b"], "it is not tried again at every step"
    assert one.failed == []
    one.broken.clear()
    one.loader.give_up(running)
    one.settle()
    assert waiting.ready
    assert one.fetched == ["b", "b"]
    assert one.loader.prefetches == {"failed": 1}


def test_the_load_itself_fails_the_request() -> None:
    one, [running] = holding("a")
    one.broken.add("b")
    waiting = [one.request("b"), one.request("b")]
    one.settle()
    one.loader.give_up(running)
    one.settle()
    assert one.failed == waiting
    assert not one.bank.holds("b")


def test_what_nobody_waits_for_any_more_is_let_go() -> None:
    one, _ = holding("a")
    early, late = one.request("b"), one.request("b")
    one.settle()
    one.loader.give_up(early)
    assert one.ahead == ["b"], "another one wants it"
    one.loader.give_up(late)
    assert one.ahead == []
    gone = one.request("c")
    one.loader.serve()
    one.loader.give_up(gone)
    one.settle()
    assert one.ahead == []
    assert one.loader.prefetches == {"unused": 2}


def test_an_adapter_is_fetched_before_the_engine_sees_its_request() -> None:
    one = Loading(2)
    request = one.request("a")
    one.jobs.run()
    assert one.fetched == ["a"]
    one.deliver()
    one.loader.serve()
    assert request.ready
    assert request.residency.cold
    assert one.fetched == ["a"]


def test_few_fetches_begin_early_and_none_while_somebody_waits_for_a_slot() -> None:
    one = Loading(4)
    assert [one.request(digest).submit.early for digest in "aabc"] == [True, False, True, False]
    one.settle()
    assert one.fetched == ["a", "b", "c"]
    full, _ = holding("a")
    assert full.request("b").submit.early, "nobody waits yet"
    full.settle()
    assert not full.request("c").submit.early


def test_early_fetches_that_find_no_slot_stay_within_the_bytes() -> None:
    one, [running] = holding("a", prefetch_bytes=SIZE)
    waiting = [one.request("b"), one.request("c")]
    assert all(request.submit.early for request in waiting)
    one.settle()
    assert one.ahead == ["b"]
    for request in (running, *waiting):
        one.loader.give_up(request)
        one.settle()
    assert one.ahead == []


def test_on_another_device_only_the_second_move_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    monkeypatch.setattr(loading, "Uploader", lambda _: lambda weights: moved.append(weights.key) or weights)
    one = Loading(1, device="cuda")
    running = one.request("a")
    one.settle()
    waiting = [one.request("b"), one.request("b")]
    one.settle()
    assert (one.fetched, moved) == (["a", "b"], ["a"])
    one.loader.give_up(running)
    one.loader.serve()
    one.loader.serve()
    assert len(one.jobs.waiting) == 1
    one.settle()
    assert all(request.ready for request in waiting)
    assert (one.fetched, moved) == (["a", "b"], ["a", "b"])


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(0, 4),
    st.lists(st.tuples(st.sampled_from(["ask", "end", "work", "serve", "break", "mend"]), st.integers(0, 6))),
)
def test_any_history_keeps_the_promises(slots: int, room: int, history: list[tuple[str, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "PATIENCE", 0.0)
        one = Loading(slots, room * SIZE)
        open_: list[Request] = []
        for operation, number in history:
            if operation == "ask":
                open_.append(one.request(f"d{number}"))
            elif operation == "end" and open_:
                one.loader.give_up(open_.pop(number % len(open_)))
            elif operation == "work" and one.jobs.waiting:
                one.jobs.waiting.pop(number % len(one.jobs.waiting))()
                one.deliver()
            elif operation == "serve":
                one.loader.serve()
                assert len(one.ahead) <= room
            elif operation == "break":
                one.broken.add(f"d{number}")
            elif operation == "mend":
                one.broken.clear()
            open_ = [request for request in open_ if request not in one.failed]
            wanted = {request.key for request in open_ if not request.ready}
            assert set(one.ahead) <= wanted
            assert one.bank.references == sum(request.ready for request in open_)
        one.broken.clear()
        while open_:
            one.settle()
            open_ = [request for request in open_ if request not in one.failed]
            if open_:
                running = next(request for request in open_ if request.ready)
                one.loader.give_up(running)
                open_.remove(running)
        one.settle()
        assert one.bank.references == len(one.loader) == len(one.ahead) == 0
        assert len(one.bank) == len(one.bank.resident()), "no slot is left waiting for what does not come"
        assert not one.loader._loading
        assert not one.loader._fetching
        assert one.loader._permits.qsize() == 2


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("when", ["before it comes", "after it has come"])
def test_a_slot_is_not_lost_with_the_request_that_it_was_reserved_for(broken: bool, when: str) -> None:
    """A client that goes away while its adapter is being fetched early, before the load itself has begun."""
    one = Loading(slots=1)
    if broken:
        one.broken.add("a")
    gone = one.request("a")
    one.loader.serve()
    assert one.bank.awaits("a")
    if when == "after it has come":  # both messages are read before the next pass
        one.jobs.run()
        one.deliver()
    one.loader.give_up(gone)
    one.settle()
    other = one.request("b")
    one.settle()
    assert other.ready
    assert one.bank.references == 1


@pytest.mark.parametrize("refuses", ["at once", "queued"])
@pytest.mark.parametrize("slots", [1, 2])
def test_a_fetch_that_no_thread_takes_holds_up_no_request_and_keeps_no_permit(refuses: str, slots: int) -> None:
    """Early, and for a request that waits for a slot."""
    one = Loading(slots)
    running = one.request("a")
    one.settle()
    one.jobs.refuses = refuses
    waiting = [one.request("b"), one.request("c")]
    assert [request.submit.early for request in waiting] == [True, True]
    one.loader.want(again := Request(Submit("again", (1,), AdapterRef("d", 1, "d"), Sampling(1)), b"", monotonic()))
    if slots == 1:
        one.loader.serve()
    one.jobs.refuses = None
    one.settle()
    assert one.loader._permits.qsize() == 2
    assert not one.loader._begun
    for request in (running, *waiting, again):
        assert request.ready
        one.loader.give_up(request)
        one.settle()
    assert one.bank.references == 0
    assert one.loader._permits.qsize() == 2


def test_a_fetch_that_has_begun_is_not_begun_for_another_that_waits() -> None:
    """The request that it was begun for is still on its way to the engine's thread."""
    one, [running] = holding("a")
    waiting = one.request("b")
    one.loader.give_up(waiting)
    one.settle()
    one.loader.want(waiting := Request(waiting.submit, b"", monotonic()))
    one.loader.fetched(Fetched("b", None))
    one.loader._spoilt.clear()
    assert one.loader.may_begin("b")
    one.loader.begin("b")
    one.fetched.clear()
    one.settle()
    assert one.fetched == ["b"]
    assert one.loader._permits.qsize() == 2
    one.loader.give_up(running)
    one.settle()
    assert waiting.ready


def test_the_log_says_why_an_adapter_could_not_be_loaded(caplog: pytest.LogCaptureFixture) -> None:
    one = Loading(1)
    one.broken.add("a")
    request = one.request("a")
    one.settle()
    assert one.failed == [request]
    (line,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert line.getMessage() == "a is damaged"
    assert line.exc_info
    assert isinstance(line.exc_info[1], OSError)
