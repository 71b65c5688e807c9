"""One request on the bill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from server.tenants.prices import MAX_MULTIPLIER, MAX_PRICE, Charge, Rates
from server.tenants.tables import OPEN

ABORTED = "aborted"
_LENGTHS = {"request_id": 128, "tenant": 64, "key_id": 64, "adapter": 64, "digest": 128, "lane": 16, "status": 32}


@dataclass(frozen=True, slots=True)
class Record:
    """What a request used and what it costs.

    `rates` are those in force when it was admitted: a later price book changes nothing, and an auditor needs no other
    row to follow the sum. `prompt` counts all tokens of the prompt, `cached` those of them that were in the prefix
    cache. `status` is `open` while it runs, then why it ended.

    Refuses (`ValueError`) what a database might refuse: one bad row would hold up all others of its commit.
    """

    request_id: str
    tenant: str
    key_id: str | None
    adapter: str | None
    version: int | None
    digest: str | None
    rank: int
    lane: str
    price_version: int
    rates: Rates
    created_ms: int
    status: str = OPEN
    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def __post_init__(self) -> None:
        for name, most in _LENGTHS.items():
            value = getattr(self, name)
            if value is not None and not (0 < len(value) <= most and value.isprintable()):
                raise ValueError(f"{name} must be 1 to {most} printable characters")
        numbers = {"rank": self.rank, "version": self.version or 0, "price_version": self.price_version}
        for name, number in numbers.items():
            if not 0 <= number < 2**31:
                raise ValueError(f"{name} must be a number of 31 bits")
        rates = (self.rates.prompt, self.rates.cached, self.rates.completion)
        if not all(0 <= rate <= MAX_PRICE * MAX_MULTIPLIER for rate in rates):
            raise ValueError("rates must be of a price book")
        self.rates.charge(self.prompt, self.cached, self.completion)

    @property
    def charge(self) -> Charge:
        """What it costs: of the counts, at the rates."""
        return self.rates.charge(self.prompt, self.cached, self.completion)


def row_of(record: Record, closed_ms: int | None) -> dict[str, Any]:
    """A record as its row; an open one costs nothing yet."""
    charge = Charge(0, 0, 0) if closed_ms is None else record.charge
    return {
        "request_id": record.request_id,
        "tenant": record.tenant,
        "key_id": record.key_id,
        "adapter": record.adapter,
        "version": record.version,
        "digest": record.digest,
        "rank": record.rank,
        "lane": record.lane,
        "price_version": record.price_version,
        "rate_prompt": record.rates.prompt,
        "rate_cached": record.rates.cached,
        "rate_completion": record.rates.completion,
        "created_ms": record.created_ms,
        "closed_ms": closed_ms,
        "status": record.status,
        "prompt": record.prompt,
        "cached": record.cached,
        "completion": record.completion,
        "cost_prompt": charge.prompt,
        "cost_cached": charge.cached,
        "cost_completion": charge.completion,
    }


def record_of(row: Any) -> Record:
    """A row as its record."""
    return Record(
        request_id=row.request_id,
        tenant=row.tenant,
        key_id=row.key_id,
        adapter=row.adapter,
        version=row.version,
        digest=row.digest,
        rank=row.rank,
        lane=row.lane,
        price_version=row.price_version,
        rates=Rates(row.rate_prompt, row.rate_cached, row.rate_completion),
        created_ms=row.created_ms,
        status=row.status,
        prompt=row.prompt,
        cached=row.cached,
        completion=row.completion,
    )
