"""A request's way through the tenants' side: admitted within its tenant's limits, counted while it runs, written down.

The engine counts and this layer charges: what a client reads or misses changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from server.core import DEFAULT_TENANT, AdapterRef
from server.errors import Forbidden, TenantNotFound
from server.tenants import prices, usage
from server.tenants.database import Database
from server.tenants.directory import Directory
from server.tenants.events import usage_events
from server.tenants.holdings import Holdings
from server.tenants.keys import Scope
from server.tenants.ledger import Ledger
from server.tenants.limits import Admission, Reservation, budget_window
from server.tenants.outbox import Deliverer
from server.tenants.prices import PriceBook, Rates
from server.tenants.record import Record
from server.tenants.sinks import make_sink
from server.tenants.tables import now_ms
from server.tenants.tenant import Principal, Tenant

log = logging.getLogger("onebase.tenants")
CHECKPOINT_SECONDS = 1.0  # what a crash may lose of a request that runs, beside the ledger's own delay
Counts = Callable[[], tuple[int, int]]  # cached prompt tokens and completion tokens so far


@dataclass(frozen=True, slots=True)
class Outlet:
    """Where usage events go, as what (see `make_sink`), with which bearer token, and from which CloudEvents source."""

    url: str
    kind: str = "cloudevents"
    token: str = field(default="", repr=False)
    source: str = "onebase"


class Entry:
    """One admitted request. `rates` are its prices; `most` is how many completion tokens its tenant's budget leaves it,
    None for no bound of that kind."""

    def __init__(self, accounts: Accounts, record: Record, reservation: Reservation):
        self._accounts, self._record, self._reservation = accounts, record, reservation
        self._counts: Counts | None = None
        self._told = (0, 0)
        self.cost = 0  # micro-dollars, once it has ended
        allowance = reservation.allowance
        self.most = None if allowance is None else self.rates.affordable(allowance, record.prompt, 0)

    @property
    def rates(self) -> Rates:
        return self._record.rates

    @property
    def record(self) -> Record:
        """It on the bill; once it is closed, with what it used."""
        return self._record

    @property
    def weights(self) -> tuple[float, float, float]:
        """What a token of prompt, cached prompt and completion counts for in the tenant's fair share: standard prices,
        as a discount is no larger share."""
        return self._accounts.book.rates(self._record.rank).weights()

    def runs(self, counts: Counts) -> None:
        """It was given to the engine; `counts` says how far it is."""
        self._counts = counts
        self._accounts.entered(self._record.request_id, self)
        self._accounts.ledger.open(self._record)

    def refuse(self) -> None:
        """The engine did not take it."""
        self._reservation.release()

    def checkpoint(self) -> None:
        """Has what it has used so far written down, if that is more than the last time."""
        counts = self._counts() if self._counts else self._told
        if counts != self._told:
            self._told = counts
            self._accounts.ledger.checkpoint(self._record.request_id, *counts)

    def close(
        self, status: str, lane: str, prompt: int, cached: int, completion: int, *, free: bool = False
    ) -> asyncio.Future[None]:
        """It has ended; the future is done when that is durable. `prompt` and `cached` are what was read of the prompt,
        which a client that has gone pays for as well: later prompts find it in the cache. Of what is `free`, for the
        server failed, nothing is charged."""
        if free:
            prompt = cached = completion = 0
        record = replace(self._record, status=status, lane=lane, prompt=prompt, cached=cached, completion=completion)
        self._record = record
        self._accounts.left(record.request_id)
        self.cost = record.charge.total
        self._reservation.settle(prompt + completion, self.cost)
        return self._accounts.ledger.close(record)


class Accounts:
    """Tenants, limits, prices and ledger of one server. Used from one event loop; made by `open`. `deliverer` brings
    events out, if there is somewhere for them to go."""

    def __init__(
        self,
        database: Database,
        directory: Directory,
        admission: Admission,
        ledger: Ledger,
        book: PriceBook,
        deliverer: Deliverer | None = None,
    ):
        self.database, self.directory, self.admission, self.ledger = database, directory, admission, ledger
        self.book, self.deliverer = book, deliverer
        self.holdings = Holdings(database, self.book_of)
        self._books: dict[str, tuple[Tenant, PriceBook, PriceBook]] = {}
        self._running: dict[str, Entry] = {}
        self._pricing = asyncio.Lock()
        self._checkpoints = asyncio.create_task(self._count(), name="checkpoints")

    @classmethod
    async def open(
        cls, database: Database, outlet: Outlet | None = None, *, ledger: type[Ledger] = Ledger
    ) -> tuple[Accounts, str | None]:
        """The accounts, and on the first start ever the token of an admin key, which is kept nowhere. Without an
        `outlet` no events are made. Raises ValueError for one that cannot be. `ledger` is what writes usage down."""
        directory, token = await Directory.open(database)
        book = await prices.current(database)
        deliverer = _deliverer(database, directory, outlet) if outlet else None
        kept = ledger(database, event=usage_events(outlet.source) if outlet else None)
        accounts = cls(database, directory, Admission(), kept, book, deliverer)
        try:
            if settled := await kept.start():
                log.warning("%d requests were open when the server last ended: settled as aborted", settled)
            for tenant in directory.tenants():
                await accounts._load(tenant)
        except BaseException:
            await accounts.close()
            raise
        if deliverer is not None:
            deliverer.start()
        return accounts, token

    async def close(self) -> None:
        """Finishes the changes that were begun and writes down what is queued. The database stays open."""
        self._checkpoints.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._checkpoints
        await self.directory.close()
        await self.ledger.stop()
        if self.deliverer is not None:
            await self.deliverer.stop()

    async def reload(self) -> None:
        """Reads again what another server may have changed: tenants, keys, prices, and what was spent."""
        await self.directory.reload()
        self.book = await prices.current(self.database)
        for tenant in self.directory.tenants():
            await self._load(tenant)

    def anybody(self) -> Principal:
        """Who every request comes from where AUTH is off."""
        return Principal(self.directory.show(DEFAULT_TENANT), "", frozenset(Scope))

    def book_of(self, tenant: str) -> PriceBook:
        """The tenant's prices now. Raises TenantNotFound."""
        now = self.directory.show(tenant)
        known = self._books.get(tenant)
        if known is None or known[0] is not now or known[1] is not self.book:
            known = self._books[tenant] = (now, self.book, self.book.override(now.prices))
        return known[2]

    async def update(self, tenant: str, changes: Callable[[Tenant], dict[str, Any]]) -> Tenant:
        """The tenant as `Directory.revise` makes it, in force from now on; what runs goes on as it was admitted. While
        the database fails, so does this, and nothing has changed."""
        return await self.directory.revise(tenant, changes, self._spent)

    async def reprice(self, book: PriceBook) -> PriceBook:
        """A new version of the price book, for what is admitted from now on."""
        async with self._pricing:
            self.book = await prices.publish(self.database, book)
            return self.book

    async def _load(self, tenant: Tenant) -> None:
        (await self._spent(tenant))()

    async def _spent(self, tenant: Tenant) -> Callable[[], None]:
        """Reads what the tenant has spent in its budget's window from the ledger; the call puts it in force. A request
        that ends meanwhile may count twice until the window ends, but none is left out."""
        if tenant.limits.max_budget is None and tenant.limits.soft_budget is None:
            return lambda: None
        before = self.admission.spent(self.directory.show(tenant.id))
        await self.ledger.flushed()
        since = budget_window(tenant.limits, now_ms()).start_ms
        found = await usage.spent(self.database, tenant.id, since)
        return lambda: self.admission.load(tenant, found + max(0, self.admission.spent(tenant) - before))

    def check(self, who: Principal, tokens: int, adapter: AdapterRef | None, *, batch: bool) -> None:
        """Raises as `admit` does for a request of `tokens` at least, prompt and completion; books nothing."""
        self._check(who.tenant, batch=batch)
        self.admission.check(who.tenant, tokens, adapter.name if adapter else None)

    def admit(
        self, who: Principal, request_id: str, prompt: int, most: int, adapter: AdapterRef | None, *, batch: bool
    ) -> Entry:
        """A place for a request of `prompt` tokens and at most `most` of completion, all its answers together.

        Raises LedgerUnavailable, Forbidden (an adapter or a class that the tenant may not use), RateLimited.
        """
        tenant = who.tenant
        self._check(tenant, batch=batch)
        book, rank = self.book_of(tenant.id), adapter.rank if adapter else 0
        rates = book.rates(rank)
        reservation = self.admission.reserve(
            tenant,
            prompt + most,
            rates.charge(prompt, 0, most).total,
            adapter.name if adapter else None,
            least_cost=rates.charge(prompt, 0, 1).total,
        )
        record = Record(
            request_id=request_id,
            tenant=tenant.id,
            key_id=who.key_id or None,
            adapter=adapter.name if adapter else None,
            version=adapter.version if adapter else None,
            digest=adapter.digest if adapter else None,
            rank=rank,
            lane="shared" if adapter else "base",
            price_version=book.version,
            rates=rates,
            created_ms=reservation.created_ms,
            prompt=prompt,
        )
        return Entry(self, record, reservation)

    def _check(self, tenant: Tenant, *, batch: bool) -> None:
        self.ledger.check()
        kind = "batch" if batch else "interactive"
        if kind not in tenant.classes:
            raise Forbidden(f"this tenant may not use the priority {kind}", param="priority", code="class_not_allowed")

    def entered(self, request_id: str, entry: Entry) -> None:
        """An entry runs."""
        self._running[request_id] = entry

    def left(self, request_id: str) -> None:
        """An entry has ended."""
        self._running.pop(request_id, None)

    async def _count(self) -> None:
        while True:
            await asyncio.sleep(CHECKPOINT_SECONDS)
            for entry in list(self._running.values()):
                entry.checkpoint()


def _deliverer(database: Database, directory: Directory, outlet: Outlet) -> Deliverer:
    def customer(tenant: str) -> str:
        try:
            return directory.show(tenant).customer or tenant
        except TenantNotFound:  # of another time of the database
            return tenant

    return Deliverer(database, make_sink(outlet.kind, outlet.url, outlet.token, customer))
