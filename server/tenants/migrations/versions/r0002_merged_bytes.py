"""What a tenant's merged copies may take."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Nobody has a bound of its own yet."""
    op.add_column("tenants", sa.Column("max_merged_bytes", sa.BigInteger))
