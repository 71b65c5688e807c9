"""Rates, parallel requests and budgets: by example, and at random against a model."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from server.errors import Forbidden, InvalidRequest, RateLimited
from server.tenants.limits import NO_END_RETRY_SECONDS, Admission, Reservation, budget_window
from server.tenants.tenant import Limits, Tenant
from server.tenants.windows import Windows

DAY = 86_400


class Clock:
    """Seconds since 1970 that pass when they are told to."""

    def __init__(self, now: float = 20_000 * DAY):
        self.now = now

    def __call__(self) -> float:
        return self.now


def tenant(name: str = "a", **limits: Any) -> Tenant:
    return Tenant(id=name, created_ms=0, salt=b"", limits=Limits(**limits))


def refusal(admission: Admission, who: Tenant, tokens: int = 1, cost: int = 1, **more: Any) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        admission.reserve(who, tokens, cost, **more)
    return caught.value


def test_requests_a_minute() -> None:
    clock = Clock()
    admission, who = Admission(clock=clock), tenant(rpm_limit=2)
    admission.reserve(who, 1, 1).settle(1, 1)
    clock.now += 10.5
    admission.reserve(who, 1, 1)
    fault = refusal(admission, who)
    assert (fault.status, fault.code, fault.retry_after) == (429, "requests_limit", 50)
    assert fault.headers == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "50s",
    }
    assert admission.refused == {"requests_limit": 1}
    admission.reserve(tenant("b", rpm_limit=2), 1, 1)
    clock.now += 49.5
    admission.reserve(who, 1, 1)


def test_unused_tokens_are_given_back() -> None:
    clock = Clock()
    admission, who = Admission(clock=clock), tenant(tpm_limit=100)
    first = admission.reserve(who, 70, 1)
    assert refusal(admission, who, 31).code == "tokens_limit"
    first.settle(20, 1)
    assert admission.headers(who)["x-ratelimit-remaining-tokens"] == "80"
    second = admission.reserve(who, 80, 1)
    clock.now += 61
    admission.reserve(who, 40, 1)
    second.settle(0, 0)  # its window is over: there is nothing to give back
    assert admission.headers(who)["x-ratelimit-remaining-tokens"] == "60"


def test_more_tokens_than_a_minute_holds_never_fit() -> None:
    with pytest.raises(InvalidRequest) as caught:
        Admission().reserve(tenant(tpm_limit=100), 101, 1)
    assert (caught.value.code, caught.value.param) == ("tokens_exceed_limit", "max_tokens")


def test_what_is_refused_uses_nothing_up() -> None:
    admission, who = Admission(clock=Clock()), tenant(rpm_limit=5, tpm_limit=100, max_parallel_requests=1, max_budget=9)
    held = admission.reserve(who, 10, 1)
    for _ in range(20):
        assert refusal(admission, who, 10).code == "parallel_limit"
    held.release()
    assert admission.headers(who)["x-ratelimit-remaining-requests"] == "5"
    assert admission.headers(who)["x-ratelimit-remaining-tokens"] == "100"
    assert admission.budget_left(who) == 9


def test_a_request_that_never_ran_is_given_back_to_the_minute_in_which_it_came() -> None:
    clock = Clock()
    admission, who = Admission(clock=clock), tenant(rpm_limit=2)
    for _ in range(20):
        admission.reserve(who, 1, 1).release()
    late = admission.reserve(who, 1, 1)
    admission.reserve(who, 1, 1).settle(0, 0)  # it ran, and failed: that is a request
    assert refusal(admission, who).code == "requests_limit"
    clock.now += 60
    admission.reserve(who, 1, 1)
    late.release()
    assert admission.headers(who)["x-ratelimit-remaining-requests"] == "1"


def test_a_changed_limit_goes_on_counting() -> None:
    clock = Clock()
    admission, who = Admission(clock=clock), tenant(rpm_limit=3, tpm_limit=100)
    running = admission.reserve(who, 60, 1)
    admission.reserve(who, 1, 1).settle(1, 1)
    clock.now += 20
    more = tenant(rpm_limit=4, tpm_limit=110)
    assert admission.headers(more) == {
        "x-ratelimit-limit-requests": "4",
        "x-ratelimit-remaining-requests": "2",
        "x-ratelimit-reset-requests": "40s",
        "x-ratelimit-limit-tokens": "110",
        "x-ratelimit-remaining-tokens": "49",
        "x-ratelimit-reset-tokens": "40s",
    }
    running.settle(10, 1)
    assert admission.headers(more)["x-ratelimit-remaining-tokens"] == "99"
    less = tenant(rpm_limit=1, tpm_limit=110)
    assert admission.headers(less)["x-ratelimit-remaining-requests"] == "0"
    assert refusal(admission, less).retry_after == 40
    admission.reserve(tenant(), 1, 1)
    assert admission.headers(tenant()) == {}


def test_parallel_requests_come_back_on_every_path() -> None:
    admission, who = Admission(), tenant(max_parallel_requests=1)
    reservation = admission.reserve(who, 1, 1)
    assert refusal(admission, who).retry_after == 1
    reservation.release()
    reservation = admission.reserve(who, 1, 1)
    reservation.settle(1, 1)
    reservation.release()
    with pytest.raises(RuntimeError):
        reservation.settle(1, 1)
    assert admission.running("a") == 0


def test_adapters_that_are_not_allowed() -> None:
    admission, who = Admission(), tenant(allowed_adapters=frozenset({"mail"}))
    admission.reserve(who, 1, 1, "mail")
    admission.reserve(who, 1, 1, None)
    with pytest.raises(Forbidden) as caught:
        admission.reserve(who, 1, 1, "other")
    assert (caught.value.code, caught.value.param) == ("adapter_not_allowed", "adapter")


def test_what_is_refused_says_what_to_do() -> None:
    said = []
    for limits, tokens, more in (
        ({"rpm_limit": 1}, 1, {}),
        ({"tpm_limit": 100}, 60, {}),
        ({"max_parallel_requests": 1}, 1, {}),
        ({"max_budget": 30}, 1, {"least_cost": 12}),
        ({"max_budget": 30, "budget_duration": "1d"}, 1, {"least_cost": 12}),
        ({"max_budget": 20, "budget_duration": "1d"}, 1, {}),
    ):
        admission, who = Admission(clock=Clock()), tenant(**limits)
        first = admission.reserve(who, tokens, 20)
        if "max_parallel_requests" not in limits:
            first.settle(tokens, 20)
        said.append(refusal(admission, who, tokens, 20, **more).message)
    assert said == [
        "the limit of 1 requests a minute is reached",
        "the request needs 60 tokens; of 100 a minute 40 are left",
        "1 requests of this tenant run, and its limit is 1",
        "the prompt and a token cost up to 12 micro-dollars, and 10 of the budget are left; a budget without a "
        "duration does not come back by itself",
        "the prompt and a token cost up to 12 micro-dollars, and 10 of the budget are left",
        "the budget is used up",
    ]


def test_a_budget_grants_what_is_left() -> None:
    clock = Clock()
    admission, who = Admission(clock=clock), tenant(max_budget=100, budget_duration="1d")
    whole = admission.reserve(who, 1, 70)
    rest = admission.reserve(who, 1, 70)
    assert (whole.allowance, rest.allowance) == (None, 30)
    assert refusal(admission, who).retry_after == 1  # held back only
    whole.settle(1, 70)
    rest.settle(1, 30)
    fault = refusal(admission, who)
    assert (fault.code, fault.retry_after) == ("budget_exhausted", DAY)
    clock.now += DAY
    assert admission.budget_left(who) == 100


def test_a_prompt_that_the_rest_does_not_pay_for() -> None:
    admission, who = Admission(), tenant(max_budget=100)
    assert refusal(admission, who, cost=300, least_cost=101).code == "budget_exhausted"
    assert admission.reserve(who, 1, 300, least_cost=100).allowance == 100


def test_a_budget_without_an_end_says_that_it_does_not_come_back() -> None:
    fault = refusal(Admission(), tenant(max_budget=0))
    assert (fault.code, fault.retry_after) == ("budget_exhausted", NO_END_RETRY_SECONDS)
    assert "does not come back by itself" in fault.message


def test_a_request_counts_in_the_window_in_which_it_began() -> None:
    clock = Clock()
    admission, who = Admission(clock=clock), tenant(max_budget=100, budget_duration="1h")
    old = admission.reserve(who, 1, 90)
    clock.now += 3600
    admission.reserve(who, 1, 10).settle(1, 10)
    old.settle(1, 90)
    assert admission.budget_left(who) == 90
    assert budget_window(who.limits, old.created_ms) != budget_window(who.limits, int(clock.now * 1000))


def test_what_was_spent_before_the_start_counts() -> None:
    who = tenant(max_budget=100, budget_duration="1d")
    clock = Clock()
    admission = Admission([(who, 100)], clock=clock)
    assert refusal(admission, who).code == "budget_exhausted"
    clock.now += DAY
    admission.reserve(who, 1, 1)


def test_a_changed_duration_keeps_what_was_spent() -> None:
    clock = Clock()
    who = tenant(max_budget=100, budget_duration="1d")
    admission = Admission([(who, 60)], clock=clock)
    running = admission.reserve(who, 1, 30)
    hourly = replace(who, limits=replace(who.limits, budget_duration="1h"))
    assert admission.budget_left(hourly) == 10
    admission.load(hourly, 5)
    running.settle(1, 30)
    assert admission.budget_left(hourly) == 65


def test_a_request_that_waited_across_a_change_of_the_duration_leaves_what_was_spent() -> None:
    clock = Clock()
    hourly = tenant(max_budget=100, budget_duration="1h")
    daily = replace(hourly, limits=replace(hourly.limits, budget_duration="1d"))
    admission = Admission([(hourly, 0)], clock=clock)
    clock.now -= clock.now % 86400  # midnight
    admission.load(daily, 100)
    with pytest.raises(RateLimited):
        admission.check(hourly, 1)
    clock.now += 3600
    assert admission.budget_left(daily) == 0
    clock.now -= 7200  # the clock is set back over midnight, and forward again
    assert admission.budget_left(daily) == 0
    clock.now += 7200
    assert admission.budget_left(daily) == 0
    clock.now += 86400
    assert admission.budget_left(daily) == 100


def test_a_soft_budget_warns_once_a_window(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    admission, who = Admission(clock=clock), tenant(soft_budget=10, budget_duration="1d")
    with caplog.at_level(logging.WARNING, "onebase.tenants"):
        for _ in range(5):
            admission.reserve(who, 1, 9).settle(1, 9)
        clock.now += DAY
        for _ in range(5):
            admission.reserve(who, 1, 9).settle(1, 9)
    assert admission.soft_warnings == len(caplog.records) == 2


def test_a_soft_budget_that_is_raised_warns_again(caplog: pytest.LogCaptureFixture) -> None:
    admission = Admission()
    with caplog.at_level(logging.WARNING, "onebase.tenants"):
        for soft, spent in ((10, 10), (10, 12), (20, 15), (20, 20), (20, 25), (15, 30), (20, 35), (40, 41)):
            who = tenant(soft_budget=soft)
            cost = spent - admission.spent(who)
            admission.reserve(who, 1, cost).settle(1, cost)
    assert [record.args for record in caplog.records] == [("a", 10, 10), ("a", 20, 20), ("a", 41, 40)]


WRONG = [
    *({"rpm_limit": 0}, {"max_budget": -1}, {"tpm_limit": 10**13}, {"allowed_adapters": frozenset({"../x"})}),
    *({"budget_duration": text} for text in ("30", "0d", "1d\n", "9999999d", "")),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_limits_have_bounds(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        Limits(**wrong)


def test_counters_that_ended_are_swept() -> None:
    clock = Clock()
    windows = Windows(clock)
    for key in range(1000):
        windows.incr(str(key), 60)
    clock.now += 60
    windows.incr("last", 60)
    assert len(windows) == 1


class Admissions(RuleBasedStateMachine):
    """One tenant's reservations against plain arithmetic."""

    running = Bundle("running")
    LIMITS = Limits(
        rpm_limit=6, tpm_limit=200, max_parallel_requests=3, max_budget=500, soft_budget=400, budget_duration="2m"
    )

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.admission = Admission(clock=self.clock)
        self.who = Tenant(id="a", created_ms=0, salt=b"", limits=self.LIMITS)
        self.live: dict[Reservation, tuple[int, float]] = {}  # -> tokens, when its minute ends
        self.requests: list[int | None] = []  # of the present minute: the tokens that each used, None if it never ran
        self.minute_ends = 0.0
        self.spent: dict[int, int] = {}  # budget window -> micro-dollars

    def _window(self, at_ms: int) -> int:
        return at_ms // 120_000

    def _now(self) -> int:
        return self._window(int(self.clock.now * 1000))

    def _held(self) -> int:
        return sum(item.held for item in self.live if self._window(item.created_ms) == self._now())

    @rule(target=running, tokens=st.integers(1, 120), cost=st.integers(0, 300))
    def reserve(self, tokens: int, cost: int) -> Any:
        if self.clock.now >= self.minute_ends:
            self.requests = []
        left = 500 - self.spent.get(self._now(), 0) - self._held()
        used = [one for one in self.requests if one is not None]
        expected = len(self.live) < 3 and len(used) < 6 and sum(used) + tokens <= 200 and left >= 1
        if not expected:
            refusal(self.admission, self.who, tokens, cost)
            return None
        got = self.admission.reserve(self.who, tokens, cost)
        assert got.held == min(cost, left)
        assert got.allowance == (left if cost > left else None)
        if not self.requests:
            self.minute_ends = self.clock.now + 60
        self.requests.append(tokens)
        self.live[got] = (len(self.requests) - 1, self.minute_ends)
        return got

    @rule(item=consumes(running), part=st.floats(0, 1))
    def settle(self, item: Reservation | None, part: float) -> None:
        if item is None:
            return
        place, minute = self.live.pop(item)
        tokens, cost = int(item.tokens * part), int(item.held * part)
        item.settle(tokens, cost)
        if minute == self.minute_ends and self.clock.now < minute:
            self.requests[place] = tokens
        window = self._window(item.created_ms)
        self.spent[window] = self.spent.get(window, 0) + cost

    @rule(item=consumes(running))
    def release(self, item: Reservation | None) -> None:
        if item is not None:
            place, minute = self.live.pop(item)
            item.release()
            item.release()
            if minute == self.minute_ends and self.clock.now < minute:
                self.requests[place] = None

    @rule(seconds=st.sampled_from([0.25, 1.0, 20.0, 60.0, 150.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.admission.running("a") == len(self.live)
        assert self.admission.budget_left(self.who) == max(0, 500 - self.spent.get(self._now(), 0) - self._held())
        for window, spent in self.spent.items():
            assert spent <= 500, window


Admissions.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAdmissions = Admissions.TestCase
