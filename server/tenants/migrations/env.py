"""What Alembic runs for an upgrade: the revisions, on the connection that `database.py` gives, in its transaction."""

from __future__ import annotations

from alembic import context


def upgrade() -> None:
    """Runs what is missing; only within Alembic's commands."""
    context.configure(connection=context.config.attributes["connection"])
    context.run_migrations()


if __name__ == "env_py":  # as Alembic calls it
    upgrade()
