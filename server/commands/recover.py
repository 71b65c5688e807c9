"""A new admin key by way of the database, for whoever has lost the last one."""

from __future__ import annotations

import os
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from server.core import DEFAULT_TENANT
from server.datadir import own
from server.errors import OnebaseError
from server.tenants.claim import claimed
from server.tenants.database import Database, DatabaseUnusable, open_database
from server.tenants.directory import Directory
from server.tenants.keys import Scope


async def recover(data_dir: Path, database_url: str) -> str:
    """The token of a new key of the default tenant with every scope; the tenant is enabled.

    Raises OSError while a server owns the directory or the database, and where there is no directory or no way into
    the database.
    """
    if not data_dir.is_dir():
        raise OSError(f"there is no data directory {data_dir}")
    lock = own(data_dir)
    try:
        async with claimed(database_url):
            database = await open_database(database_url)
            try:
                return await _new_key(database)
            finally:
                await database.close()
    except (SQLAlchemyError, DatabaseUnusable, OnebaseError) as fault:
        raise OSError(f"the database cannot be used: {fault}") from fault
    finally:
        os.close(lock)


async def _new_key(database: Database) -> str:
    directory, first = await Directory.open(database)
    await directory.update(DEFAULT_TENANT, disabled=False)
    if first is not None:
        return first
    _, token = await directory.create_key(DEFAULT_TENANT, Scope, name="recovered admin key")
    return token
