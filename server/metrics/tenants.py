"""Ledger, limits and outbox. No label names a tenant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from prometheus_client.core import Metric

from server.metrics.families import Family
from server.metrics.traffic import REFUSED


class LedgerFigures(Protocol):
    """What is read of the ledger."""

    @property
    def lag_seconds(self) -> float: ...
    @property
    def queued(self) -> int: ...

    commits: int
    failures: int


class AdmissionFigures(Protocol):
    """What is read of the tenants' limits: refusals by code, and windows that went over a soft budget."""

    @property
    def refused(self) -> Mapping[str, int]: ...

    soft_warnings: int


class OutboxFigures(Protocol):
    """What is read of the outbox."""

    @property
    def oldest_seconds(self) -> float: ...

    waiting: int
    delivered: int
    parked: int
    dropped: int
    failures: int


LAG = Family("gauge", "onebase_ledger_lag_seconds", "Age of the oldest uncommitted entry.", "seconds")
QUEUED = Family("gauge", "onebase_ledger_queued", "Entries that are not committed.", "entries")
COMMITS = Family("counter", "onebase_ledger_commits", "Commits, each of one or more entries.", "commits")
FAILURES = Family("counter", "onebase_ledger_failures", "Commits that the database refused.", "commits")
REFUSALS = Family("counter", "onebase_limit_refusals", "Requests over their tenant's limit.", "requests", ("code",))
SOFT = Family("counter", "onebase_soft_budget_warnings", "Budget windows over their soft budget.", "windows")
OLDEST = Family(
    "gauge", "onebase_outbox_oldest_seconds", "Age of the oldest undelivered event; only with EVENTS_URL.", "seconds"
)
UNDELIVERED = Family(
    "gauge", "onebase_outbox_waiting", "Events that are not delivered; only with EVENTS_URL.", "events"
)
OUTBOX_FAILURES = Family(
    "counter", "onebase_outbox_failures", "Calls that the sink did not take; only with EVENTS_URL.", "calls"
)
EVENTS = Family(
    "counter", "onebase_outbox_events", "Events that left the outbox; only with EVENTS_URL.", "events", ("outcome",)
)


def families(ledger: LedgerFigures, admission: AdmissionFigures, outbox: OutboxFigures | None) -> Iterator[Metric]:
    """All of this module; without an `outbox` events go nowhere."""
    yield LAG.of(ledger.lag_seconds)
    yield QUEUED.of(ledger.queued)
    yield COMMITS.of(ledger.commits)
    yield FAILURES.of(ledger.failures)
    yield REFUSALS.by({**dict.fromkeys(REFUSED, 0), **admission.refused})
    yield SOFT.of(admission.soft_warnings)
    if outbox is not None:
        yield OLDEST.of(outbox.oldest_seconds)
        yield UNDELIVERED.of(outbox.waiting)
        yield OUTBOX_FAILURES.of(outbox.failures)
        yield EVENTS.by({one: getattr(outbox, one) for one in ("delivered", "parked", "dropped")})
