"""Tenants, keys, prices, usage, holdings and the outbox."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def _whole(name: str, **more: Any) -> sa.Column[Any]:
    return sa.Column(name, sa.BigInteger, **({"nullable": False} | more))


def upgrade() -> None:
    """Every table is new."""
    _tenants()
    _usage()
    op.create_table(
        "holdings",
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("adapter", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("day", sa.Integer, nullable=False),
        _whole("byte_seconds"),
        _whole("through_s"),
        sa.Column("price_version", sa.Integer, nullable=False),
        _whole("price"),
        _whole("cost"),
        sa.PrimaryKeyConstraint("tenant", "adapter", "kind", "day", name="pk_holdings"),
    )
    op.create_index("ix_holdings_tenant_day", "holdings", ["tenant", "day"])
    op.create_table(
        "outbox",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), autoincrement=True, nullable=False),
        sa.Column("event_id", sa.String(128), nullable=False),
        sa.Column("payload", sa.Text, nullable=False),
        _whole("created_ms"),
        sa.Column("attempts", sa.Integer, nullable=False),
        _whole("next_ms"),
        _whole("delivered_ms", nullable=True),
        _whole("parked_ms", nullable=True),
        sa.Column("fault", sa.String(256)),
        sa.PrimaryKeyConstraint("id", name="pk_outbox"),
        sa.UniqueConstraint("event_id", name="uq_outbox_event_id"),
    )
    op.create_index("ix_outbox_due", "outbox", ["delivered_ms", "next_ms"])


def _tenants() -> None:
    op.create_table(
        "tenants",
        sa.Column("id", sa.String(64), nullable=False),
        _whole("created_ms"),
        sa.Column("disabled", sa.Boolean, nullable=False),
        sa.Column("weight", sa.Float, nullable=False),
        sa.Column("limits", sa.JSON, nullable=False),
        sa.Column("prices", sa.JSON, nullable=False),
        sa.Column("salt", sa.LargeBinary(32), nullable=False),
        _whole("max_adapters", nullable=True),
        _whole("max_adapter_bytes", nullable=True),
        sa.Column("classes", sa.JSON, nullable=False),
        sa.Column("customer", sa.String(128)),
        sa.PrimaryKeyConstraint("id", name="pk_tenants"),
    )
    op.create_table(
        "keys",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("secret_sha256", sa.LargeBinary(32), nullable=False),
        sa.Column("scopes", sa.JSON, nullable=False),
        sa.Column("name", sa.String(256), nullable=False),
        _whole("created_ms"),
        _whole("expires_ms", nullable=True),
        _whole("revoked_ms", nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_keys"),
        sa.ForeignKeyConstraint(["tenant"], ["tenants.id"], name="fk_keys_tenant"),
    )
    op.create_index("ix_keys_tenant", "keys", ["tenant"])
    op.create_table(
        "prices",
        sa.Column("version", sa.Integer, nullable=False, autoincrement=False),
        _whole("created_ms"),
        sa.Column("book", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("version", name="pk_prices"),
    )


def _usage() -> None:
    op.create_table(
        "usage",
        sa.Column("request_id", sa.String(128), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("key_id", sa.String(64)),
        sa.Column("adapter", sa.String(64)),
        sa.Column("version", sa.Integer),
        sa.Column("digest", sa.String(128)),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.Column("lane", sa.String(16), nullable=False),
        sa.Column("price_version", sa.Integer, nullable=False),
        *(_whole(f"rate_{kind}") for kind in ("prompt", "cached", "completion")),
        _whole("created_ms"),
        _whole("closed_ms", nullable=True),
        sa.Column("status", sa.String(32), nullable=False),
        *(_whole(name) for name in ("prompt", "cached", "completion")),
        *(_whole(f"cost_{kind}") for kind in ("prompt", "cached", "completion")),
        sa.PrimaryKeyConstraint("request_id", name="pk_usage"),
    )
    op.create_index("ix_usage_tenant_created", "usage", ["tenant", "created_ms", "request_id"])
    still_open = sa.text("status = 'open'")
    op.create_index("ix_usage_open", "usage", ["request_id"], sqlite_where=still_open, postgresql_where=still_open)
