"""A tenant's bill of one month: a line for each adapter and kind of charge, which are sums of what was charged."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import func, select

from server.errors import InvalidRequest
from server.tenants.database import Database
from server.tenants.holdings import KINDS
from server.tenants.money import dollars
from server.tenants.tables import OPEN, holdings, usage
from server.tenants.usage import DAY_MS

TOKEN_KINDS = ("prompt", "cached", "completion")
_ORDER = {kind: place for place, kind in enumerate((*TOKEN_KINDS, *KINDS))}
_MONTH = re.compile(r"(19[7-9]\d|[2-9]\d{3})-(0[1-9]|1[0-2])", re.ASCII)


@dataclass(frozen=True, slots=True)
class Line:
    """One adapter (None: the base) and kind: `quantity` is tokens, or byte-seconds of what was stored or merged."""

    adapter: str | None
    kind: str
    quantity: int
    unit: str
    amount_microusd: int


@dataclass(frozen=True, slots=True)
class Invoice:
    """`requests` were admitted in that month (UTC) and have ended; `running` ones will be on it once they end."""

    tenant: str
    month: str
    requests: int
    running: int
    lines: tuple[Line, ...]

    @property
    def total_microusd(self) -> int:
        """Exactly the sum of the lines, and of all charges of the month."""
        return sum(line.amount_microusd for line in self.lines)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "tenant": self.tenant,
            "month": self.month,
            "currency": "USD",
            "requests": self.requests,
            "running": self.running,
            "lines": [asdict(line) for line in self.lines],
            "total_microusd": self.total_microusd,
            "total": dollars(self.total_microusd),
        }

    def as_csv(self) -> str:
        """One row a line, without a total, so that a column's sum is the bill; the base's adapter is empty."""
        text = io.StringIO()
        table = csv.writer(text)
        table.writerow(["tenant", "month", "adapter", "kind", "quantity", "unit", "amount_microusd", "amount_usd"])
        for line in self.lines:
            row = [self.tenant, self.month, line.adapter or "", line.kind, line.quantity, line.unit]
            table.writerow([*row, line.amount_microusd, dollars(line.amount_microusd)])
        return text.getvalue()


def bounds(month: str) -> tuple[int, int]:
    """First millisecond of a month `yyyy-mm` (UTC), and of the next. Raises `InvalidRequest` for what is no month."""
    found = _MONTH.fullmatch(month)
    if not found:
        raise InvalidRequest("a month is written yyyy-mm", param="month")
    year, number = int(found[1]), int(found[2])
    return _first_ms(year, number), _first_ms(year + number // 12, number % 12 + 1)


def _first_ms(year: int, month: int) -> int:
    if year > 9999:  # the end of the last month that a date can name
        return _first_ms(9999, 12) + 31 * DAY_MS
    return int(datetime(year, month, 1, tzinfo=UTC).timestamp()) * 1000


async def invoice(database: Database, tenant: str, month: str) -> Invoice:
    """The bill as it stands now. Raises `InvalidRequest` for what is no month."""
    begin, end = bounds(month)
    of_month = [usage.c.tenant == tenant, usage.c.created_ms >= begin, usage.c.created_ms < end]
    parts = [
        func.sum(usage.c.prompt - usage.c.cached).label("prompt"),
        *(func.sum(usage.c[name]).label(name) for name in ("cached", "completion")),
        *(func.sum(usage.c[f"cost_{kind}"]).label(f"cost_{kind}") for kind in TOKEN_KINDS),
    ]
    used = select(usage.c.adapter, func.count().label("requests"), *parts).group_by(usage.c.adapter)
    kept = (
        select(holdings.c.adapter, holdings.c.kind)
        .add_columns(func.sum(holdings.c.byte_seconds).label("byte_seconds"), func.sum(holdings.c.cost).label("cost"))
        .where(holdings.c.tenant == tenant, holdings.c.day >= begin // DAY_MS, holdings.c.day < end // DAY_MS)
        .group_by(holdings.c.adapter, holdings.c.kind)
    )
    running = select(func.count()).select_from(usage).where(*of_month, usage.c.status == OPEN)
    async with database.read() as connection:
        by_adapter = (await connection.execute(used.where(*of_month, usage.c.status != OPEN))).all()
        by_kind = (await connection.execute(kept)).all()
        still = int(await connection.scalar(running) or 0)
    lines = [line for row in by_adapter for line in _token_lines(row)]
    lines += [Line(row.adapter, row.kind, int(row.byte_seconds), "byte_seconds", int(row.cost)) for row in by_kind]
    lines.sort(key=lambda line: (line.adapter or "", _ORDER[line.kind]))
    return Invoice(tenant, month, sum(row.requests for row in by_adapter), still, tuple(lines))


def _token_lines(row: Any) -> Iterator[Line]:
    for kind in TOKEN_KINDS:
        quantity, amount = int(getattr(row, kind)), int(getattr(row, f"cost_{kind}"))
        if quantity:
            yield Line(row.adapter, kind, quantity, "tokens", amount)
