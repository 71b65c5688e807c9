"""What is told of a request that ended: a CloudEvent 1.0 of type `llm.usage.v1`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

from server.tenants.record import Record

TYPE = "llm.usage.v1"
_JSON = JSONFormat()
_TOLD = ("adapter", "version", "digest", "rank", "lane", "status", "price_version")


def usage_events(source: str) -> Callable[[Record], dict[str, Any]]:
    """What makes the event of a closed `Record`, as JSON. `id` is the request's: with `source`, which must stay the
    same over restarts, it is what receivers know a repetition by. `subject` is the tenant."""

    def event(record: Record) -> dict[str, Any]:
        attributes = {
            "id": record.request_id,
            "source": source,
            "type": TYPE,
            "subject": record.tenant,
            "time": datetime.fromtimestamp(record.created_ms / 1000, UTC),
            "datacontenttype": "application/json",
        }
        data = {
            "tenant": record.tenant,
            **{name: getattr(record, name) for name in _TOLD},
            "prompt_tokens": record.prompt,
            "cached_tokens": record.cached,
            "completion_tokens": record.completion,
            "total_tokens": record.prompt + record.completion,
            "cost_microusd": record.charge.total,
        }
        return json.loads(_JSON.write(CloudEvent(attributes, data)))

    return event


@dataclass(frozen=True, slots=True)
class Event:
    """An event as it lies in the outbox: `body` is the CloudEvent as JSON."""

    id: str
    body: dict[str, Any]

    @property
    def tenant(self) -> str:
        """Whose usage it is."""
        return self.body["subject"]

    @property
    def seconds(self) -> float:
        """When the request was admitted, seconds since 1970."""
        return datetime.fromisoformat(self.body["time"]).timestamp()

    @property
    def data(self) -> dict[str, Any]:
        """The counts and what they cost."""
        return self.body["data"]
