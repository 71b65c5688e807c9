"""What things cost: a versioned price book, what differs for a tenant, and the rates that a request is charged at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from sqlalchemy import func, insert, select

from server.tenants.database import Database
from server.tenants.money import half_up
from server.tenants.tables import now_ms, prices

MAX_PRICE = 10**12  # a million dollars for a million tokens
MAX_MULTIPLIER = 10**6  # thousandths
MAX_TOKENS = 2**32  # of one request; with the two above, no charge of one is beyond 63 bits
BASE_MULTIPLIER = 1000
_PER_TOKENS = 10**9  # a price for a million tokens times thousandths
_TOKEN_PRICES = ("prompt", "cached", "completion")
_PRICES = (*_TOKEN_PRICES, "adapter_gb_day", "merged_gb_hour")


@dataclass(frozen=True, slots=True)
class Charge:
    """What one request costs, in micro-dollars. Each part is rounded by itself and the total is their sum."""

    prompt: int
    cached: int
    completion: int

    @property
    def total(self) -> int:
        """Their sum: what the answer's `cost_microusd` says."""
        return self.prompt + self.cached + self.completion


@dataclass(frozen=True, slots=True)
class Rates:
    """Micro-dollars per 10^9 tokens: a price for a million tokens times a multiplier in thousandths, exact."""

    prompt: int
    cached: int
    completion: int

    def charge(self, prompt: int, cached: int, completion: int) -> Charge:
        """`prompt` are all tokens of the prompt, `cached` those of them that were in the prefix cache.

        Each of the three parts is rounded half up to whole micro-dollars. Raises `ValueError` for impossible counts.
        """
        if not 0 <= cached <= prompt <= MAX_TOKENS or not 0 <= completion <= MAX_TOKENS:
            raise ValueError(f"impossible counts: prompt {prompt}, cached {cached}, completion {completion}")
        return Charge(
            prompt=half_up((prompt - cached) * self.prompt, _PER_TOKENS),
            cached=half_up(cached * self.cached, _PER_TOKENS),
            completion=half_up(completion * self.completion, _PER_TOKENS),
        )

    def affordable(self, microusd: int, prompt: int, cached: int) -> int:
        """How many completion tokens a request may make that must not cost more than `microusd`; -1 where the prompt
        alone costs more."""
        left = microusd - self.charge(prompt, cached, 0).total
        if left < 0:
            return -1
        if self.completion == 0:
            return MAX_TOKENS
        # The largest n with half_up(n * rate) <= left, that is n * rate < (left + 1/2) * 10^9.
        return min(MAX_TOKENS, ((2 * left + 1) * _PER_TOKENS - 1) // (2 * self.completion))

    def weights(self) -> tuple[float, float, float]:
        """Micro-dollars per token of prompt, cached prompt and completion: what the fair share counts with."""
        return self.prompt / _PER_TOKENS, self.cached / _PER_TOKENS, self.completion / _PER_TOKENS


@dataclass(frozen=True, slots=True)
class PriceBook:
    """One version of all prices. Token prices are micro-dollars per million tokens, `adapter_gb_day` micro-dollars per
    10^9 bytes stored for a day, `merged_gb_hour` per 10^9 bytes of a merged copy for an hour.

    `rank_classes` are pairs (largest rank, multiplier in thousandths), ascending; a rank beyond the last class has the
    last one's multiplier. The base (rank 0) is charged at the plain price.

    A cached token is never charged more than a fresh one, or what a request can cost at most would not be known when it
    is admitted. The API refuses such prices; where a tenant's own and a later book come to that, `rates` has the lower.
    """

    version: int
    prompt: int
    cached: int
    completion: int
    adapter_gb_day: int
    merged_gb_hour: int
    rank_classes: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for name in _PRICES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_PRICE:
                raise ValueError(f"{name} must be a whole number of micro-dollars from 0 to {MAX_PRICE}")
        ranks = [rank for rank, _ in self.rank_classes]
        if ranks != sorted(set(ranks)) or (ranks and ranks[0] < 1):
            raise ValueError("rank_classes must be in ascending order of rank")
        if not all(0 <= multiplier <= MAX_MULTIPLIER for _, multiplier in self.rank_classes):
            raise ValueError(f"a multiplier must be from 0 to {MAX_MULTIPLIER} thousandths")

    def multiplier(self, rank: int) -> int:
        """In thousandths."""
        if rank == 0 or not self.rank_classes:
            return BASE_MULTIPLIER
        return next((times for most, times in self.rank_classes if rank <= most), self.rank_classes[-1][1])

    def rates(self, rank: int) -> Rates:
        """What a token costs on an adapter of this rank; 0 is the base."""
        times = self.multiplier(rank)
        return Rates(self.prompt * times, min(self.cached, self.prompt) * times, self.completion * times)

    def override(self, differing: Mapping[str, Any]) -> PriceBook:
        """The same book with some prices of a tenant's own. Raises `ValueError` for names or prices that cannot be."""
        unknown = set(differing) - {*_PRICES, "rank_classes"}
        if unknown:
            raise ValueError(f"no such price: {', '.join(sorted(unknown))}")
        return replace(self, **_read(differing))

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it, and `read` reads it."""
        return asdict(self)


def read(book: Mapping[str, Any]) -> PriceBook:
    """A price book from JSON. Raises `ValueError` or `TypeError` for what is none."""
    return PriceBook(**_read(book))


def _read(values: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(values)
    if "rank_classes" in found:
        found["rank_classes"] = tuple((int(rank), int(times)) for rank, times in found["rank_classes"])
    return found


# An example, to be replaced by the operator's own: of the order that a model of some billion parameters is sold at.
# A completion token is twice a prompt's, near enough to what it takes of a step, which the fair share needs. The ranks'
# multipliers are how measured steps grow with the rank (docs/performance.md), beyond 64 drawn out.
DEFAULT_BOOK = PriceBook(
    version=1,
    prompt=100_000,
    cached=10_000,
    completion=200_000,
    adapter_gb_day=5_000,
    merged_gb_hour=50_000,
    rank_classes=((16, 1000), (32, 1100), (64, 1400), (128, 1900), (256, 3000)),
)


async def current(database: Database) -> PriceBook:
    """The newest price book; `DEFAULT_BOOK` is written down as the first one where there is none."""
    async with database.read() as connection:
        found = await connection.scalar(select(prices.c.book).order_by(prices.c.version.desc()).limit(1))
    return read(found) if found else await publish(database, DEFAULT_BOOK)


async def publish(database: Database, book: PriceBook) -> PriceBook:
    """Write a new version, numbered after the newest. Requests admitted from now on are charged by it."""
    async with database.write() as connection:
        newest = await connection.scalar(select(func.max(prices.c.version)))
        numbered = replace(book, version=(newest or 0) + 1)
        row = {"version": numbered.version, "created_ms": now_ms(), "book": numbered.as_dict()}
        await connection.execute(insert(prices).values(row))
    return numbered
