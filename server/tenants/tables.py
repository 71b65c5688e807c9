"""The database's tables. Money is whole micro-dollars, times are milliseconds UTC, sizes are bytes.

A change here needs a revision in `migrations/versions`; a test holds the two against each other on both databases.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

OPEN = "open"  # the status of a usage row whose request still runs


def now_ms(clock: Callable[[], float] = time.time) -> int:
    """The time as the tables have it; `clock` gives seconds since 1970."""
    return int(clock() * 1000)


def _counted(name: str) -> Column[Any]:
    return Column(name, BigInteger, nullable=False, default=0)


tenants = Table(
    "tenants",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("created_ms", BigInteger, nullable=False),
    Column("disabled", Boolean, nullable=False, default=False),
    Column("weight", Float, nullable=False, default=1.0),
    Column("limits", JSON, nullable=False),
    Column("prices", JSON, nullable=False),  # what differs from the price book
    Column("salt", LargeBinary(32), nullable=False),  # of the prefix cache
    Column("max_adapters", BigInteger),
    Column("max_adapter_bytes", BigInteger),
    Column("max_merged_bytes", BigInteger),
    Column("classes", JSON, nullable=False),  # the priority classes that its requests may ask for
    Column("customer", String(128)),  # what the billing system calls it, where that is not its id
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(64), ForeignKey("tenants.id"), nullable=False, index=True),
    Column("secret_sha256", LargeBinary(32), nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("name", String(256), nullable=False, default=""),
    Column("created_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger),
    Column("revoked_ms", BigInteger),
)

prices = Table(
    "prices",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("book", JSON, nullable=False),
)

# One row a request. No foreign key to `tenants`: what was used is written down whatever became of its tenant.
usage = Table(
    "usage",
    metadata,
    Column("request_id", String(128), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("key_id", String(64)),
    Column("adapter", String(64)),
    Column("version", Integer),
    Column("digest", String(128)),
    Column("rank", Integer, nullable=False, default=0),
    Column("lane", String(16), nullable=False),
    Column("price_version", Integer, nullable=False),
    _counted("rate_prompt"),  # micro-dollars per 10^9 tokens, as the request was admitted
    _counted("rate_cached"),
    _counted("rate_completion"),
    Column("created_ms", BigInteger, nullable=False),
    Column("closed_ms", BigInteger),
    Column("status", String(32), nullable=False),
    _counted("prompt"),  # all of the prompt's tokens; `cached` of them were in the prefix cache
    _counted("cached"),
    _counted("completion"),
    _counted("cost_prompt"),
    _counted("cost_cached"),
    _counted("cost_completion"),
    Index("ix_usage_tenant_created", "tenant", "created_ms", "request_id"),
)
Index(
    "ix_usage_open",
    usage.c.request_id,
    sqlite_where=usage.c.status == OPEN,
    postgresql_where=usage.c.status == OPEN,
)

# What an adapter occupied on one UTC day, added up second by second.
holdings = Table(
    "holdings",
    metadata,
    Column("tenant", String(64), primary_key=True),
    Column("adapter", String(64), primary_key=True),
    Column("kind", String(16), primary_key=True),  # storage | merged
    Column("day", Integer, primary_key=True, autoincrement=False),  # days since 1970-01-01
    Column("byte_seconds", BigInteger, nullable=False),
    Column("through_s", BigInteger, nullable=False),  # seconds UTC: added up until then
    Column("price_version", Integer, nullable=False),
    Column("price", BigInteger, nullable=False),  # micro-dollars per GB-day or GB-hour, as the day began
    _counted("cost"),
    Index("ix_holdings_tenant_day", "tenant", "day"),
)

outbox = Table(
    "outbox",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("event_id", String(128), nullable=False, unique=True),
    Column("payload", Text, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("next_ms", BigInteger, nullable=False),
    Column("delivered_ms", BigInteger),
    Column("parked_ms", BigInteger),  # refused too often: no longer tried
    Column("fault", String(256)),  # of the last try
    Index("ix_outbox_due", "delivered_ms", "next_ms"),
)
