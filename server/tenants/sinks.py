"""Where usage events go: any CloudEvents receiver, Stripe meter events, Lago, OpenMeter.

Delivery is at least once, so every event carries the key by which its receiver knows a repetition: `id` with `source`
(CloudEvents, OpenMeter), `identifier` (Stripe, which remembers it for 24 hours at least), `transaction_id` (Lago). All
of them are the request's id. A receiver that refuses a repetition has the event: that counts as delivered.

The address comes from the operator's settings alone. Redirects are not followed, proxies and cookies of the environment
are not used, and the secret goes into a header and nowhere else.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Any, ClassVar
from urllib.parse import urlencode

import aiohttp
from yarl import URL

from server.tenants.events import Event

TIMEOUT_SECONDS = 10.0  # of one call, connecting and reading included
MAX_ANSWER = 64 * 1024  # bytes that are read of an answer
MAX_WAIT = 3600.0  # seconds: no longer is waited, whatever Retry-After says
_LATER = frozenset({401, 403, 408, 409, 425, 429})  # nothing is wrong with the events: the key is, or the moment


class Outcome(Enum):
    """What became of one call."""

    DELIVERED = "delivered"
    LATER = "later"  # all of them once more
    REFUSED = "refused"  # they are at fault, one of them at least


@dataclass(frozen=True, slots=True)
class Verdict:
    """`held` are ids that the receiver said it has already, of a call that it refused because of them. `retry_after` is
    in seconds. `reason` is fit for a log."""

    outcome: Outcome
    reason: str = ""
    retry_after: float = 0.0
    held: frozenset[str] = frozenset()


class Sink(ABC):
    """One receiver. `customer` turns a tenant's id into what the receiver calls it. `batch` is the most events of one
    call. Raises `ValueError` for an address that is not http(s), or that holds a password, which would be logged."""

    batch = 100
    content_type: ClassVar[str] = "application/json"

    def __init__(self, url: str, secret: str = "", *, customer: Callable[[str], str] = str):
        self._url = URL(url)
        if self._url.scheme not in ("http", "https") or not self._url.host:
            raise ValueError("the address of a sink is http:// or https://")
        if self._url.user is not None or self._url.password is not None:
            raise ValueError("the secret of a sink belongs into its own setting, not into the address")
        if not secret.isprintable() or not secret.isascii():
            raise ValueError("the secret of a sink is printable ASCII")
        self._secret = secret
        self._customer = customer
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._url.host})"

    @abstractmethod
    def body(self, events: Sequence[Event]) -> bytes:
        """The call's body; at most `batch` events."""

    def wants(self, event: Event) -> bool:
        """False for an event that the receiver has no use for."""
        return True

    def verdict(self, events: Sequence[Event], status: int, answer: bytes) -> Verdict:
        """What an answer says of the events."""
        if 200 <= status < 300:
            return Verdict(Outcome.DELIVERED)
        refused = 400 <= status < 500 and status not in _LATER
        return Verdict(Outcome.REFUSED if refused else Outcome.LATER, f"status {status}")

    async def send(self, events: Sequence[Event], *, seconds: float = TIMEOUT_SECONDS) -> Verdict:
        """One call. Raises nothing, whatever the network or the receiver does."""
        try:
            body = self.body(events)
        except (KeyError, TypeError, ValueError):  # must not hold up those behind it
            return Verdict(Outcome.REFUSED, "the event lacks what this sink sends")
        headers = {"Content-Type": self.content_type}
        if self._secret:
            headers["Authorization"] = f"Bearer {self._secret}"
        try:
            async with self._open().post(
                self._url,
                data=body,
                headers=headers,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=seconds),
            ) as response:
                answer = await _read(response)
                verdict = self.verdict(events, response.status, answer)
                wait = _retry_after(response.headers)
        except (aiohttp.ClientError, OSError, TimeoutError) as fault:
            return Verdict(Outcome.LATER, type(fault).__name__)  # its text may hold more than a log should
        return Verdict(verdict.outcome, verdict.reason, wait, verdict.held)

    async def close(self) -> None:
        """Closes its connections."""
        if self._session:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), trust_env=False)
        return self._session


class CloudEventsSink(Sink):
    """Any HTTP receiver: JSON batches of CloudEvents, or with `structured` one event a call."""

    content_type = "application/cloudevents-batch+json"

    def __init__(self, url: str, secret: str = "", *, structured: bool = False):
        super().__init__(url, secret)
        self._structured = structured
        if structured:
            self.batch = 1
            self.content_type = "application/cloudevents+json"  # type: ignore[misc]

    def body(self, events: Sequence[Event]) -> bytes:
        bodies = [event.body for event in events]
        return _json(bodies[0] if self._structured else bodies)


class OpenMeterSink(Sink):
    """OpenMeter's `POST /api/v1/events`: batches of CloudEvents; it drops what has an `id` and `source` that it knows.
    Its meters read `$.cost_microusd`, `$.total_tokens` and so on, of event type `llm.usage.v1`; `subject` is the
    customer."""

    content_type = "application/cloudevents-batch+json"

    def body(self, events: Sequence[Event]) -> bytes:
        return _json([event.body | {"subject": self._customer(event.tenant)} for event in events])


class StripeSink(Sink):
    """Stripe's `POST /v1/billing/meter_events`: one event a call, form-encoded, with `identifier`.

    `value` is a whole number of what `unit` names: `cost_microusd`, for a price of 0.0001 cents a unit, or
    `total_tokens`. Events of value 0 are not sent. No `Idempotency-Key` header: Stripe would answer a later try with
    the failure of the first. It takes no event that is older than 35 days.
    """

    batch = 1
    content_type = "application/x-www-form-urlencoded"

    def __init__(
        self,
        url: str,
        secret: str,
        *,
        event_name: str,
        unit: str = "cost_microusd",
        customer: Callable[[str], str] = str,
    ):
        super().__init__(url, secret, customer=customer)
        self._event_name = event_name
        self._unit = unit

    def wants(self, event: Event) -> bool:
        return event.data[self._unit] > 0

    def body(self, events: Sequence[Event]) -> bytes:
        (event,) = events
        form = {
            "event_name": self._event_name,
            "identifier": event.id[:100],
            "timestamp": str(int(event.seconds)),
            "payload[stripe_customer_id]": self._customer(event.tenant),
            "payload[value]": str(event.data[self._unit]),
        }
        return urlencode(form).encode()

    def verdict(self, events: Sequence[Event], status: int, answer: bytes) -> Verdict:
        error = _object(_object(_parsed(answer)).get("error"))
        repeated = error.get("code") == "duplicate_meter_event" or (
            "already exists with identifier" in str(error.get("message"))
        )
        if status == 400 and repeated:
            return Verdict(Outcome.DELIVERED, "it had the event already")
        return super().verdict(events, status, answer)


class LagoSink(Sink):
    """Lago's `POST /api/v1/events/batch`: up to 100 events with `transaction_id`, unique within a subscription.

    `customer` gives the external id of the tenant's subscription, `code` is the billable metric. A batch is taken or
    refused whole; what Lago already has is named in its answer, and the rest is sent again.
    """

    def __init__(self, url: str, secret: str, *, code: str, customer: Callable[[str], str] = str):
        super().__init__(url, secret, customer=customer)
        self._code = code

    def body(self, events: Sequence[Event]) -> bytes:
        return _json({"events": [self._event(event) for event in events]})

    def _event(self, event: Event) -> dict[str, Any]:
        cents = Decimal(event.data["cost_microusd"]).scaleb(-4)
        return {
            "transaction_id": event.id,
            "external_subscription_id": self._customer(event.tenant),
            "code": self._code,
            "timestamp": f"{event.seconds:.3f}",
            "precise_total_amount_cents": f"{cents:f}",
            "properties": {name: value for name, value in event.data.items() if value is not None},
        }

    def verdict(self, events: Sequence[Event], status: int, answer: bytes) -> Verdict:
        if status != 422:
            return super().verdict(events, status, answer)
        details = _object(_object(_parsed(answer)).get("error_details"))
        held = frozenset(event.id for place, event in enumerate(events) if _only_repeated(details.get(str(place))))
        if len(held) == len(events):
            return Verdict(Outcome.DELIVERED, "it had the events already")
        return Verdict(Outcome.REFUSED, "status 422", held=held)


METER = "llm_usage"  # the event name of Stripe's meter, the code of Lago's metric


def make_sink(kind: str, url: str, secret: str, customer: Callable[[str], str]) -> Sink:
    """The sink of `kind`: cloudevents, stripe, lago or openmeter. Raises `ValueError` as `Sink` does."""
    match kind:
        case "stripe":
            return StripeSink(url, secret, event_name=METER, customer=customer)
        case "lago":
            return LagoSink(url, secret, code=METER, customer=customer)
        case "openmeter":
            return OpenMeterSink(url, secret, customer=customer)
        case "cloudevents":
            return CloudEventsSink(url, secret)
    raise ValueError(f"there is no sink of kind {kind}")


def _only_repeated(fault: Any) -> bool:
    return fault == {"transaction_id": ["value_already_exist"]}


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The first `MAX_ANSWER` bytes of the answer."""
    parts, size = [], 0
    async for part in response.content.iter_chunked(MAX_ANSWER):
        parts.append(part)
        size += len(part)
        if size >= MAX_ANSWER:
            break
    return b"".join(parts)[:MAX_ANSWER]


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that `Retry-After` asks for, as a number or as a date, at most `MAX_WAIT`; 0 without one."""
    text = headers.get("Retry-After", "")
    try:
        until = None if text.isdecimal() else parsedate_to_datetime(text)
        wait = float(text) if until is None else (until - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(wait, 0.0), MAX_WAIT)


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _parsed(answer: bytes) -> Any:
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):
        return None


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
