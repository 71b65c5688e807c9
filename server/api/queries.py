"""What may stand behind the `?` of a call that reads. Anything else is refused: a mistyped `from` or `tenant` would
answer for another range, or for somebody else, than was meant."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field

from server.tenants.usage import MAX_LIMIT, GroupBy

PLAIN = r"^[\x21-\x7e]*$"  # what goes to the database: PostgreSQL takes no NUL in a text
_WHOSE = "another tenant, for keys with the scope admin"
_FORMAT = "beats the Accept header"


class _Known(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AdapterQuery(_Known):
    """A page of adapters: so many behind the name `after`."""

    limit: int = Field(100, ge=1, le=1000)
    after: str | None = Field(None, max_length=64)


class AdminQuery(_Known):
    """A page of what an admin lists: so many behind `after`."""

    limit: int = Field(100, ge=1, le=1000)
    after: str = Field("", max_length=64, pattern=PLAIN)


class InvoiceQuery(_Known):
    """Whose bill, and in which format."""

    tenant: str | None = Field(None, max_length=64, description=_WHOSE)
    as_format: Literal["json", "csv"] | None = Field(None, alias="format", description=_FORMAT)


class UsageQuery(InvoiceQuery):
    """Whose requests, from when until when, how they are summed up, and which page."""

    since: str = Field("0", alias="from", max_length=40)
    until: str | None = Field(None, alias="to", max_length=40)
    group_by: GroupBy = "request"
    limit: int = Field(100, ge=1, le=MAX_LIMIT)
    after: str | None = Field(None, max_length=200)


AdapterPage = Annotated[AdapterQuery, Query()]
AdminPage = Annotated[AdminQuery, Query()]
OfInvoice = Annotated[InvoiceQuery, Query()]
OfUsage = Annotated[UsageQuery, Query()]
