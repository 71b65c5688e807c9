"""Admission: what a tenant may start now, by its rates, its parallel requests and its budget.

Everything here runs on the event loop's thread without an await, so that what is checked still holds when it is taken.

Rates are fixed windows of a minute that begin with a tenant's first request: across two of them up to twice the limit
may fall into one minute. A limit that is changed counts what was used in the minute that lasts. Tokens are reserved as
prompt + max_tokens and given back when the request ends, if its window still lasts; the request itself is given back
only if it never ran, and counted as well if it was read and could not be served.

A budget holds back each request's worst cost until it ends. If less than that is left, the request gets what is left
as its `allowance`, and the engine ends it when its cost reaches that, all of its answers at once. So a window's
spending does not exceed `max_budget`, but for a micro-dollar a request: a prompt that is partly cached is rounded in
two parts, which can come to one more than the whole. A request counts in the window in which it began, also when it
ends in a later one.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from limits import RateLimitItemPerMinute
from limits.strategies import FixedWindowRateLimiter

from server.errors import Forbidden, InvalidRequest, RateLimited
from server.tenants.tenant import Limits, Tenant, duration_ms
from server.tenants.windows import Windows

log = logging.getLogger("onebase.tenants")
NO_END_RETRY_SECONDS = 3600  # Retry-After of a budget without a window: only an admin can say when there is more


@dataclass(frozen=True, slots=True)
class Window:
    """A budget's window in milliseconds since 1970: from `start_ms` on, before `end_ms` (None: no end)."""

    start_ms: int
    end_ms: int | None


def budget_window(limits: Limits, now_ms: int) -> Window:
    """The window that `now_ms` lies in. The ledger adds up from its `start_ms` what a tenant has spent."""
    if limits.budget_duration is None:
        return Window(0, None)
    length = duration_ms(limits.budget_duration)
    start = now_ms - now_ms % length
    return Window(start, start + length)


class _Minute(RateLimitItemPerMinute):
    """A limit whose window is the same whatever its amount, so that a changed one goes on counting."""

    def key_for(self, *identifiers: bytes | str | float) -> str:
        """`identifiers` are a tenant and a kind."""
        return "/".join(str(one) for one in identifiers)


@dataclass(slots=True)
class _Account:
    """What one tenant does now: its parallel requests, and the money of its budget's window, whose length is that of
    `limits`: those of a request may be older."""

    limits: Limits
    window: Window
    turn: int = 0  # how often the money began anew
    running: int = 0
    spent: int = 0
    held: int = 0
    warned: int | None = None  # the highest soft budget that it was said to be over


class Reservation:
    """A place for one request; `settle` or `release` gives it back.

    `allowance` is the micro-dollars at which the engine must end it; None if its worst cost fits, or there is no
    budget. `created_ms` is the time that decides which budget window it counts in: the ledger's record carries it.
    """

    __slots__ = ("_admission", "_ends", "_turn", "allowance", "created_ms", "held", "settled", "tenant", "tokens")

    def __init__(self, admission: Admission, tenant: Tenant, tokens: int, held: int, worst_cost: int, created_ms: int):
        self._admission = admission
        self._ends: dict[str, float] = {}  # of the rate windows that were counted in
        self._turn = 0
        self.tenant = tenant
        self.tokens = tokens
        self.held = held
        self.allowance = held if tenant.limits.max_budget is not None and held < worst_cost else None
        self.created_ms = created_ms
        self.settled = False

    def settle(self, tokens: int, cost: int) -> None:
        """The request ended with `tokens` computed and `cost` micro-dollars. Raises `RuntimeError` the second time."""
        if self.settled:
            raise RuntimeError("a reservation is settled once")
        self.settled = True
        self._admission._settle(self, tokens, cost, requests=1)

    def release(self) -> None:
        """The request never ran: nothing was used. Does nothing once it is settled."""
        if not self.settled:
            self.settled = True
            self._admission._settle(self, 0, 0, requests=0)


class Admission:
    """The limits of all tenants. `clock` gives seconds since 1970; `spent` is as for `load`, at the start. `refused`
    counts refusals by code and `soft_warnings` how often a tenant went over its `soft_budget`. Memory: a small account
    a tenant."""

    def __init__(self, spent: Iterable[tuple[Tenant, int]] = (), *, clock: Callable[[], float] = time.time):
        self._clock = clock
        self._windows = Windows(clock)
        self._rates = FixedWindowRateLimiter(self._windows)
        self._accounts: dict[str, _Account] = {}
        self.refused: Counter[str] = Counter()
        self.soft_warnings = 0
        for tenant, microusd in spent:
            self.load(tenant, microusd)

    def reserve(
        self, tenant: Tenant, tokens: int, worst_cost: int, adapter: str | None = None, *, least_cost: int = 1
    ) -> Reservation:
        """A place for a request of `tokens` (prompt + max_tokens) that can cost up to `worst_cost` micro-dollars.

        `least_cost` is what it costs at the least, its prompt: with less than that left of the budget it is refused.
        Raises `Forbidden` for an adapter that is not among the allowed, `InvalidRequest` for more tokens than fit a
        whole minute, `RateLimited` for the rest. What is refused uses nothing up.
        """
        now = self._clock()
        account, now_ms = self._open(tenant, tokens, adapter, now), int(now * 1000)
        held = self._hold(tenant, account, worst_cost, least_cost, now_ms)
        reservation = Reservation(self, tenant, tokens, held, worst_cost, now_ms)
        reservation._turn = account.turn
        account.running += 1
        account.held += held
        for kind, item in self._items(tenant.limits).items():
            self._rates.hit(item, tenant.id, kind, cost=tokens if kind == "tokens" else 1)
            reservation._ends[kind] = self._windows.get_expiry(item.key_for(tenant.id, kind))
        return reservation

    def check(self, tenant: Tenant, tokens: int, adapter: str | None = None) -> None:
        """Raises as `reserve` does for a request of `tokens` at least; uses nothing up."""
        now = self._clock()
        self._hold(tenant, self._open(tenant, tokens, adapter, now), 1, 1, int(now * 1000))

    def count(self, tenant: Tenant) -> None:
        """A request that could not be served has cost work all the same: counts it in the minute, without tokens."""
        if (item := self._items(tenant.limits).get("requests")) is not None:
            self._rates.hit(item, tenant.id, "requests")

    def refused_by(self, fault: RateLimited, tenant: Tenant) -> None:
        """A limit of the tenant's that is kept elsewhere has refused it: counts that, and adds the headers."""
        self.refused[fault.code] += 1
        fault.headers |= self.headers(tenant)

    def headers(self, tenant: Tenant) -> dict[str, str]:
        """`x-ratelimit-{limit,remaining,reset}-{requests,tokens}` of the limits a minute that the tenant has."""
        now, headers = self._clock(), {}
        for kind, item in self._items(tenant.limits).items():
            stats = self._rates.get_window_stats(item, tenant.id, kind)
            headers[f"x-ratelimit-limit-{kind}"] = str(item.amount)
            headers[f"x-ratelimit-remaining-{kind}"] = str(stats.remaining)
            headers[f"x-ratelimit-reset-{kind}"] = f"{max(0, math.ceil(stats.reset_time - now))}s"
        return headers

    def running(self, tenant: str) -> int:
        """How many requests of the tenant run now."""
        account = self._accounts.get(tenant)
        return account.running if account else 0

    def spent(self, tenant: Tenant) -> int:
        """What requests that have ended cost in the present window, as far as `load` and this process know."""
        return self._account(tenant, int(self._clock() * 1000)).spent

    def budget_left(self, tenant: Tenant) -> int | None:
        """What neither was spent nor is held back of the budget, micro-dollars; None without a budget."""
        if tenant.limits.max_budget is None:
            return None
        account = self._account(tenant, int(self._clock() * 1000))
        return max(0, tenant.limits.max_budget - account.spent - account.held)

    def load(self, tenant: Tenant, spent: int) -> None:
        """Set what the tenant has spent in its present `budget_window`, micro-dollars: at the start, and after its
        `budget_duration` was changed. It is of requests that have ended; those that run are held back."""
        now_ms = int(self._clock() * 1000)
        account = self._account(tenant, now_ms)
        account.limits, account.window, account.spent = tenant.limits, budget_window(tenant.limits, now_ms), spent

    def _open(self, tenant: Tenant, tokens: int, adapter: str | None, now: float) -> _Account:
        """The tenant's account, if all its limits but the budget allow such a request."""
        limits = tenant.limits
        if limits.allowed_adapters is not None and adapter is not None and adapter not in limits.allowed_adapters:
            raise Forbidden(
                "this adapter is not among those that the tenant may use", param="adapter", code="adapter_not_allowed"
            )
        if limits.tpm_limit is not None and tokens > limits.tpm_limit:
            raise InvalidRequest(
                f"prompt and max_tokens are {tokens} tokens; the limit is {limits.tpm_limit} a minute",
                param="max_tokens",
                code="tokens_exceed_limit",
            )
        account = self._account(tenant, int(now * 1000))
        if limits.max_parallel_requests is not None and account.running >= limits.max_parallel_requests:
            message = f"{account.running} requests of this tenant run, and its limit is {limits.max_parallel_requests}"
            raise self._refusal(tenant, message, "parallel_limit", 1)
        used = {"requests": 1, "tokens": tokens}
        for kind, item in self._items(limits).items():
            if not self._rates.test(item, tenant.id, kind, cost=used[kind]):
                stats = self._rates.get_window_stats(item, tenant.id, kind)
                message = f"the limit of {item.amount} {kind} a minute is reached"
                if kind == "tokens":
                    message = f"the request needs {tokens} tokens; of {item.amount} a minute {stats.remaining} are left"
                raise self._refusal(tenant, message, f"{kind}_limit", math.ceil(stats.reset_time - now))
        return account

    def _account(self, tenant: Tenant, now_ms: int) -> _Account:
        account = self._accounts.get(tenant.id)
        if account is None:
            account = self._accounts[tenant.id] = _Account(tenant.limits, budget_window(tenant.limits, now_ms))
        elif account.window.end_ms is not None and now_ms >= account.window.end_ms:
            account.spent, account.held, account.warned = 0, 0, None
            account.turn += 1
            account.window = budget_window(account.limits, now_ms)
        return account

    def _hold(self, tenant: Tenant, account: _Account, worst: int, least: int, now_ms: int) -> int:
        budget = tenant.limits.max_budget
        if budget is None:
            return 0
        left = budget - account.spent - account.held
        if left >= max(1, least):
            return min(worst, left)
        if account.held and budget - account.spent >= max(1, least):
            message = "the rest of the budget is held back for requests that run"
            raise self._refusal(tenant, message, "budget_exhausted", 1)
        message = "the budget is used up"
        if budget > account.spent:
            left = budget - account.spent
            message = f"the prompt and a token cost up to {least} micro-dollars, and {left} of the budget are left"
        if (end := account.window.end_ms) is None:
            message, wait = f"{message}; a budget without a duration does not come back by itself", NO_END_RETRY_SECONDS
        else:
            wait = math.ceil((end - now_ms) / 1000)
        raise self._refusal(tenant, message, "budget_exhausted", wait)

    def _settle(self, reservation: Reservation, tokens: int, cost: int, *, requests: int) -> None:
        tenant = reservation.tenant
        unused = {"requests": 1 - requests, "tokens": reservation.tokens - tokens}
        for kind, item in self._items(tenant.limits).items():
            if unused[kind] > 0:
                self._windows.give_back(item.key_for(tenant.id, kind), reservation._ends[kind], unused[kind])
        account = self._accounts[tenant.id]
        account.running -= 1
        if account.turn != reservation._turn:
            return  # it counts in a window that is over
        account.held -= reservation.held
        account.spent += cost
        soft = tenant.limits.soft_budget
        if soft is not None and account.spent >= soft and (account.warned is None or account.warned < soft):
            account.warned = soft
            self.soft_warnings += 1
            log.warning("tenant %s has spent %d micro-dollars, its soft budget is %d", tenant.id, account.spent, soft)

    def _items(self, limits: Limits) -> dict[str, _Minute]:
        amounts = {"requests": limits.rpm_limit, "tokens": limits.tpm_limit}
        return {kind: _Minute(amount) for kind, amount in amounts.items() if amount is not None}

    def _refusal(self, tenant: Tenant, message: str, code: str, wait: int) -> RateLimited:
        self.refused[code] += 1
        return RateLimited(message, code=code, retry_after=max(1, wait), headers=self.headers(tenant))
