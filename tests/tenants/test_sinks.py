"""What each sink sends, and what it makes of the answers."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable
from urllib.parse import parse_qs

import pytest
from cloudevents.core.formats.json import JSONFormat

from server.tenants.events import Event, usage_events
from server.tenants.prices import Rates
from server.tenants.record import Record
from server.tenants.sinks import CloudEventsSink, LagoSink, OpenMeterSink, Outcome, Sink, StripeSink
from tests.tenants.receivers import Receiver, receiving

pytestmark = pytest.mark.anyio
SECRET = "sk_test_notforlogs"
Make = Callable[[str], Sink]


def event(name: str, *, cost: int = 12_345, tenant: str = "acme", adapter: str | None = "mail") -> Event:
    """A request of 10 + 5 tokens, 4 of them cached, that cost so many micro-dollars."""
    record = Record(
        request_id=name,
        tenant=tenant,
        key_id="k",
        adapter=adapter,
        version=3,
        digest="sha256:ab",
        rank=8,
        lane="shared",
        price_version=1,
        rates=Rates(0, 0, cost * 10**9 // 5),
        created_ms=1_700_000_000_123,
        status="stop",
        prompt=10,
        cached=4,
        completion=5,
    )
    return Event(name, usage_events("onebase-test")(record))


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as there:
        yield there


def cloudevents(url: str) -> Sink:
    return CloudEventsSink(f"{url}/events", SECRET)


def stripe(url: str) -> Sink:
    return StripeSink(f"{url}/stripe", SECRET, event_name="llm", customer={"acme": "cus_1"}.__getitem__)


def lago(url: str) -> Sink:
    return LagoSink(f"{url}/lago", SECRET, code="llm", customer={"acme": "sub_1"}.__getitem__)


def openmeter(url: str) -> Sink:
    return OpenMeterSink(f"{url}/openmeter", SECRET, customer={"acme": "cust-1"}.__getitem__)


ALL = [cloudevents, stripe, lago, openmeter]


def test_an_event_is_a_cloudevent() -> None:
    read = JSONFormat().read(None, json.dumps(event("gen-1").body))
    assert (read.get_id(), read.get_source(), read.get_type()) == ("gen-1", "onebase-test", "llm.usage.v1")
    assert (read.get_subject(), read.get_specversion()) == ("acme", "1.0")
    time = read.get_time()
    assert time is not None
    assert time.timestamp() == event("gen-1").seconds == 1_700_000_000.123
    data = read.get_data()
    assert isinstance(data, dict)
    assert (data["prompt_tokens"], data["cached_tokens"], data["completion_tokens"]) == (10, 4, 5)
    assert (data["cost_microusd"], data["total_tokens"], data["adapter"]) == (12_345, 15, "mail")


async def sent(receiver: Receiver, sink: Sink, *events: Event) -> tuple[dict[str, str], str]:
    assert (await sink.send(events)).outcome is Outcome.DELIVERED
    await sink.close()
    headers, text = receiver.calls[-1]
    assert headers["Authorization"] == f"Bearer {SECRET}"
    return headers, text


async def test_cloudevents_in_batches_and_alone(receiver: Receiver) -> None:
    headers, text = await sent(receiver, cloudevents(receiver.url), event("a"), event("b"))
    assert headers["Content-Type"] == "application/cloudevents-batch+json"
    assert json.loads(text) == [event("a").body, event("b").body]
    headers, text = await sent(receiver, CloudEventsSink(receiver.url, SECRET, structured=True), event("c"))
    assert headers["Content-Type"] == "application/cloudevents+json"
    assert json.loads(text) == event("c").body


async def test_stripe_meter_event(receiver: Receiver) -> None:
    sink = stripe(receiver.url)
    headers, text = await sent(receiver, sink, event("gen-1"))
    assert headers["Content-Type"] == "application/x-www-form-urlencoded"
    assert "Idempotency-Key" not in headers
    assert parse_qs(text) == {
        "event_name": ["llm"],
        "identifier": ["gen-1"],
        "timestamp": ["1700000000"],
        "payload[stripe_customer_id]": ["cus_1"],
        "payload[value]": ["12345"],
    }
    assert sink.batch == 1
    assert not sink.wants(event("free", cost=0))


async def test_lago_events(receiver: Receiver) -> None:
    _, text = await sent(receiver, lago(receiver.url), event("gen-1"), event("gen-2", cost=7, adapter=None))
    first, second = json.loads(text)["events"]
    assert (first["transaction_id"], first["external_subscription_id"], first["code"]) == ("gen-1", "sub_1", "llm")
    assert (first["precise_total_amount_cents"], second["precise_total_amount_cents"]) == ("1.2345", "0.0007")
    assert first["timestamp"] == "1700000000.123"
    assert first["properties"]["total_tokens"] == 15
    assert "adapter" not in second["properties"]


async def test_openmeter_events(receiver: Receiver) -> None:
    headers, text = await sent(receiver, openmeter(receiver.url), event("gen-1"))
    assert headers["Content-Type"] == "application/cloudevents-batch+json"
    (body,) = json.loads(text)
    assert (body["id"], body["source"], body["subject"]) == ("gen-1", "onebase-test", "cust-1")


@pytest.mark.parametrize("make", ALL)
async def test_a_repetition_is_delivered(receiver: Receiver, make: Make) -> None:
    sink = make(receiver.url)
    for _ in range(2):
        assert (await sink.send([event("a")])).outcome is Outcome.DELIVERED
    await sink.close()


async def test_lago_names_what_it_has(receiver: Receiver) -> None:
    sink = lago(receiver.url)
    await sink.send([event("a")])
    verdict = await sink.send([event("a"), event("b")])
    assert (verdict.outcome, verdict.held) == (Outcome.REFUSED, {"a"})
    await sink.close()


ANSWERS = [
    (200, Outcome.DELIVERED),
    *((status, Outcome.LATER) for status in (302, 401, 403, 408, 429, 500, 503)),
    *((status, Outcome.REFUSED) for status in (400, 404, 413, 422)),
]


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize(("status", "outcome"), ANSWERS)
async def test_answers(receiver: Receiver, make: Make, status: int, outcome: Outcome) -> None:
    sink = make(receiver.url)
    receiver.faults = [(status, {"Location": f"{receiver.url}/elsewhere", "Retry-After": "7"})]
    verdict = await sink.send([event("a")])
    assert verdict.outcome is outcome
    assert verdict.retry_after == 7
    assert len(receiver.calls) == 1  # a redirect is not followed
    await sink.close()


async def test_what_the_network_does(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    sink = cloudevents(receiver.url)
    receiver.faults = ["hang", "lost"]
    assert (await sink.send([event("a")], seconds=0.2)).outcome is Outcome.LATER
    assert (await sink.send([event("a")])).outcome is Outcome.LATER
    await sink.close()
    nobody = cloudevents("http://127.0.0.1:1")
    verdict = await nobody.send([event("a")])
    assert verdict.outcome is Outcome.LATER
    await nobody.close()
    assert SECRET not in caplog.text + repr(sink) + verdict.reason


@pytest.mark.parametrize(
    "text", ["soon", "-5", "²", "Thu, 01 Jan 1970 00:00:00 GMT", "Thu, 01 Jan 1970 00:00:00 -0000"]
)
async def test_a_strange_retry_after(receiver: Receiver, text: str) -> None:
    sink = cloudevents(receiver.url)
    receiver.faults = [(503, {"Retry-After": text}), (503, {"Retry-After": "9" * 400})]
    assert (await sink.send([event("a")])).retry_after == 0
    assert (await sink.send([event("a")])).retry_after == 3600
    await sink.close()


@pytest.mark.parametrize("answer", [b"", b"[]", b'{"error": 5}', b'{"error_details": [1]}', b"\xff", b"[" * 60_000])
async def test_strange_answers(answer: bytes) -> None:
    for make in ALL:
        for status in (400, 422):
            assert make("http://x").verdict([event("a")], status, answer).outcome is Outcome.REFUSED


async def test_an_event_that_a_sink_cannot_tell(receiver: Receiver) -> None:
    assert (await stripe(receiver.url).send([event("a", tenant="nobody")])).outcome is Outcome.REFUSED
    assert receiver.calls == []


@pytest.mark.parametrize(
    "url", ["ftp://x", "file:///etc/passwd", "/x", "http://", "http://user:pw@host/", "https://u@h"]
)
async def test_addresses_that_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="sink"):
        CloudEventsSink(url)
    with pytest.raises(ValueError, match="ASCII"):
        CloudEventsSink("https://host", "a\r\nb")
