"""What adapters occupied over time: byte-seconds stored, and byte-seconds of merged copies, by adapter and UTC day."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from server.errors import TenantNotFound
from server.tenants.database import Database
from server.tenants.money import half_up
from server.tenants.prices import PriceBook
from server.tenants.tables import holdings

log = logging.getLogger("onebase.tenants")
Kind = Literal["storage", "merged"]
KINDS: tuple[Kind, ...] = ("storage", "merged")
GB = 10**9
DAY = 86_400
PART = 250  # adapters in one transaction: what the event loop and the ledger wait for is short
_SECONDS = {"storage": DAY, "merged": 3_600}  # of a GB-day, of a GB-hour


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes that an adapter of a tenant occupies: all its versions together."""

    tenant: str
    adapter: str
    kind: Kind
    bytes: int


_Key = tuple[str, str, Kind]  # tenant, adapter, kind
_Due = list[tuple[_Key, int]]  # what is to be written down, and its bytes from now on


@dataclass(frozen=True, slots=True)
class _Piece:
    """One holding over a part of one day, seconds UTC."""

    held: Held
    day: int
    begin: int
    end: int


def price_of(book: PriceBook, kind: Kind) -> int:
    """Micro-dollars per GB-day stored, or per GB-hour merged."""
    return book.adapter_gb_day if kind == "storage" else book.merged_gb_hour


def cost(kind: Kind, byte_seconds: int, price: int) -> int:
    """Micro-dollars of one line (an adapter, a kind, a day), rounded half up, once."""
    return half_up(byte_seconds * price, GB * _SECONDS[kind])


class Holdings:
    """Adds up what is held.

    What `sample` is told is held until it is told otherwise, so it is called on every change and, say, once a minute.
    Time when no server runs is on nobody's bill, and neither is what was held after the last sample before a crash.
    `book_of` is asked for a tenant's prices when a day's line begins; a later book holds from the next day on. Where it
    raises TenantNotFound, that line is left out and logged.
    """

    def __init__(self, database: Database, book_of: Callable[[str], PriceBook]):
        self._database = database
        self._book_of = book_of
        self._held: dict[_Key, tuple[int, int]] = {}  # bytes, and since when they are not written down
        self._one_at_a_time = asyncio.Lock()

    async def sample(self, now: int, held: Iterable[Held], *, only_changed: bool = False) -> None:
        """`now` in whole seconds UTC; a clock that was set back adds nothing. `only_changed` leaves what is held as
        before for a later sample.

        Written in parts. When the database fails, its error is raised and nothing is lost: what was held stays so until
        a later sample succeeds. Nothing is added twice, even where a commit that seemed to fail was done after all.
        """
        async with self._one_at_a_time:
            due = iter(await asyncio.to_thread(self._due, held, only_changed))
            while part := list(islice(due, PART)):
                pieces = [piece for key, _ in part for piece in self._pieces(key, now)]
                if pieces:
                    async with self._database.write() as connection:
                        await self._add(connection, pieces)
                self._written(part, now)

    def _due(self, held: Iterable[Held], only_changed: bool) -> _Due:
        after = _together(held)
        both = self._held.keys() | after.keys()
        return [
            (key, after.get(key, 0))
            for key in both
            if not only_changed or after.get(key, 0) != self._held.get(key, (0, 0))[0]
        ]

    def _pieces(self, key: _Key, now: int) -> Iterator[_Piece]:
        if key in self._held:
            size, since = self._held[key]
            yield from _by_day(Held(*key, size), since, now)

    def _written(self, part: _Due, now: int) -> None:
        for key, size in part:
            _, since = self._held.pop(key, (0, now))
            if size:
                self._held[key] = (size, max(now, since))

    async def _add(self, connection: AsyncConnection, pieces: list[_Piece]) -> None:
        there = await _lines(connection, pieces)
        rows = []
        for piece in pieces:
            held = piece.held
            try:
                rows.append(self._row(piece, there.get((held.tenant, held.adapter, held.kind, piece.day))))
            except TenantNotFound:  # gone from the database since; the others' bills go on
                log.warning(
                    "what tenant %s held as %s is on no bill: the database does not know it", held.tenant, held.adapter
                )
        if not rows:
            return
        new = self._database.insert(holdings)
        changed = {name: new.excluded[name] for name in ("byte_seconds", "through_s", "cost")}
        keys = list(holdings.primary_key)
        await connection.execute(new.on_conflict_do_update(index_elements=keys, set_=changed), rows)

    def _row(self, piece: _Piece, line: Any) -> dict[str, Any]:
        """The day's `line` (None: it begins) with the piece added. Raises TenantNotFound where it begins and the tenant
        has no prices."""
        held = piece.held
        if line is None:
            book = self._book_of(held.tenant)
            counted, begin, price, version = 0, piece.begin, price_of(book, held.kind), book.version
        else:
            counted, begin = line.byte_seconds, max(piece.begin, line.through_s)
            price, version = line.price, line.price_version
        counted += held.bytes * max(0, piece.end - begin)
        return {
            "tenant": held.tenant,
            "adapter": held.adapter,
            "kind": held.kind,
            "day": piece.day,
            "byte_seconds": counted,
            "through_s": max(begin, piece.end),
            "price_version": version,
            "price": price,
            "cost": cost(held.kind, counted, price),
        }


def _together(held: Iterable[Held]) -> dict[_Key, int]:
    """The bytes of each tenant, adapter and kind."""
    sums: dict[_Key, int] = {}
    for one in held:
        key = (one.tenant, one.adapter, one.kind)
        sums[key] = sums.get(key, 0) + one.bytes
    return {key: size for key, size in sums.items() if size}


def _by_day(held: Held, begin: int, end: int) -> Iterator[_Piece]:
    while begin < end:
        day = begin // DAY
        until = min(end, (day + 1) * DAY)
        yield _Piece(held, day, begin, until)
        begin = until


async def _lines(connection: AsyncConnection, pieces: list[_Piece]) -> Mapping[tuple[str, str, str, int], Any]:
    """The lines that the pieces belong to, and few others."""
    near = (
        holdings.c.tenant.in_({piece.held.tenant for piece in pieces})
        & holdings.c.adapter.in_({piece.held.adapter for piece in pieces})
        & holdings.c.day.in_({piece.day for piece in pieces})
    )
    found = (await connection.execute(select(holdings).where(near))).all()
    return {(row.tenant, row.adapter, row.kind, row.day): row for row in found}
