"""Families, the traffic of thousands of adapters, fairness, and answers by route."""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from server.engine.messages import Done, Prices, Residency, Times
from server.engine.stats import ShareFigures
from server.metrics import customers, page
from server.metrics.fairness import Fairness, jain
from server.metrics.families import FAMILIES, Family
from server.metrics.http import CountResponses, Responses, route, status
from server.metrics.traffic import REFUSED, Traffic

UNITS = {
    "1", "adapters", "answers", "blocks", "byte seconds", "bytes", "calls", "commits", "copies", "entries", "events",
    "lines", "loads", "lookups", "micro-dollars", "priced tokens", "ratio", "requests", "rows", "seconds", "sequences",
    "slots", "steps", "tokens", "windows",
}  # fmt: skip
NAME = re.compile(r"(onebase_|vllm:)[a-z0-9_]+")
KINDS = {"seconds": "_seconds", "bytes": "_bytes"}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_has_a_help_a_unit_and_a_name_that_says_it(family: Family) -> None:
    assert NAME.fullmatch(family.name)
    assert family.help.endswith(".")
    assert "\n" not in family.help
    assert family.unit in UNITS
    assert not family.name.endswith("_total") or family.name == "onebase_iteration_tokens_total"  # vLLM's, a histogram
    wanted = KINDS.get(family.unit)
    if wanted and family.name != "vllm:lora_requests_info":
        assert family.name.endswith(wanted)


def test_no_family_is_said_twice() -> None:
    assert max(Counter(family.name for family in FAMILIES).values()) == 1


def test_what_names_a_tenant_or_an_adapter_is_private() -> None:
    private = {family.name for family in FAMILIES if family.private}
    assert private == page._PRIVATE
    assert {"onebase_adapter_tokens", "onebase_tenant_running", "vllm:lora_requests_info"} <= private
    assert not any("tenant" in family.labels or "adapter" in family.labels for family in FAMILIES if not family.private)


def done(prompt: int, made: int, *, outcome: str = "finished", cold: bool = False) -> Done:
    times = Times(1.0, 1.5, 1.75, 2.0, 4.0)
    return Done("gen", outcome, prompt, prompt // 2, made, Residency(cold=cold), None, times)


class Shown(Collector):
    def __init__(self, traffic: Traffic, shares: dict[str, ShareFigures] | None = None):
        self.metrics = list(customers.families(traffic.shown(), shares or {}))

    def collect(self) -> Any:
        return self.metrics

    def samples(self) -> list[Any]:
        text = generate_latest(self).decode()
        return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def test_five_thousand_adapters_make_a_bounded_number_of_series_with_exact_sums() -> None:
    traffic, dice, most = Traffic(50), random.Random(1), 50
    wanted: Counter[str] = Counter()
    largest, before = 0, Counter[tuple[str, Any]]()
    for at in range(30_000):
        number = at % 5_000 if at < 5_000 else int(dice.paretovariate(0.6)) % 5_000
        prompt, made = dice.randrange(2, 200), dice.randrange(1, 50)
        outcome = dice.choice(("finished", "finished", "cancelled", "error"))
        traffic.ended(f"t{number % 300}", f"a{number}", done(prompt, made, outcome=outcome), made, Prices())
        wanted.update(prompt=prompt, cached=prompt // 2, completion=made, cost=made, **{outcome: 1})
        if at % 5_000 == 4_999:
            samples = Shown(traffic).samples()
            largest = max(largest, len(samples))
            sums: Counter[tuple[str, Any]] = Counter()
            for one in samples:
                sums[one.name, one.labels.get("kind") or one.labels.get("outcome") or one.labels.get("le")] += one.value
            assert all(value >= before[key] for key, value in sums.items()), "no sum falls"
            before = sums
    # Series: outcomes, kinds, the rest; outcomes, kinds, cost, parts; buckets, sum and count, …, refusals
    per_adapter, per_tenant = 3 + 3 + 8, 3 + 3 + 1 + 4 + 10 + 2 + 1 + 2 + len(REFUSED)
    assert largest <= (most + 1) * (per_adapter + per_tenant)
    assert {kind: sums["onebase_adapter_tokens_total", kind] for kind in ("prompt", "cached", "completion")} == {
        kind: wanted[kind] for kind in ("prompt", "cached", "completion")
    }
    for outcome in ("finished", "cancelled", "error"):
        assert sums["onebase_adapter_requests_total", outcome] == wanted[outcome]
    assert sums["onebase_adapter_cost_microusd_total", None] == wanted["cost"]
    for kind in ("prompt", "cached", "completion"):
        assert sums["onebase_tenant_tokens_total", kind] == wanted[kind]
    for outcome in ("finished", "cancelled", "error"):
        assert sums["onebase_tenant_requests_total", outcome] == wanted[outcome]
    assert sums["onebase_tenant_cost_microusd_total", None] == wanted["cost"]
    assert sums["onebase_tenant_ttft_seconds_count", None] == 30_000
    assert sums["onebase_adapter_ttft_requests_total", None] == 30_000
    served = 0.5 * wanted["prompt"] * 1.1 + 2 * wanted["completion"]
    assert sums["onebase_tenant_served_tokens_total", None] == pytest.approx(served, rel=0.01)


def test_a_tenant_of_more_adapters_than_are_named_is_still_seen_whole() -> None:
    traffic = Traffic(10)
    for number in range(1_000):
        traffic.ended("acme", f"a{number}", done(10, 5), 7, Prices())
    traffic.ended("b", None, done(10, 5), 7, Prices())
    found = {(one.name, *one.labels.values()): one.value for one in Shown(traffic).samples()}
    assert found["onebase_adapter_cost_microusd_total", "other", "other"] > 0.9 * 7_000
    assert found["onebase_tenant_cost_microusd_total", "acme"] == 7_000
    assert found["onebase_tenant_tokens_total", "completion", "acme"] == 5_000
    assert found["onebase_tenant_requests_total", "finished", "acme"] == 1_000
    assert found["onebase_tenant_cost_microusd_total", "b"] == 7


def test_a_tenant_called_other_is_counted_with_the_rest() -> None:
    traffic = Traffic(1)
    traffic.ended("acme", "other", done(100, 50), 7, Prices())
    traffic.ended("other", "other", done(10, 5), 3, Prices())
    traffic.refused("other", "requests_limit")
    samples = Shown(traffic, {"other": ShareFigures(1.0, 2, 3)}).samples()
    assert max(Counter((one.name, *sorted(one.labels.items())) for one in samples).values()) == 1, "no series twice"
    found = {(one.name, one.labels.get("tenant")): one.value for one in samples if one.value}
    assert found["onebase_tenant_cost_microusd_total", "other"] == 3
    assert found["onebase_adapter_cost_microusd_total", "other"] == 3
    assert found["onebase_tenant_limit_refusals_total", "other"] == 1
    assert found["onebase_tenant_running", "other"] == 3


def test_tenants_without_a_name_run_and_wait_as_other() -> None:
    traffic = Traffic(1)
    traffic.ended("acme", None, done(10, 5), 7, Prices())
    shares = {"acme": ShareFigures(1.0, 2, 3), "b": ShareFigures(1.0, 4, 5), "c": ShareFigures(1.0, 1, 1)}
    found = {(one.name, one.labels.get("tenant")): one.value for one in Shown(traffic, shares).samples()}
    assert found["onebase_tenant_running", "acme"] == 3
    assert found["onebase_tenant_running", "other"] == 6
    assert found["onebase_tenant_waiting", "other"] == 5
    requests = [one for one in Shown(traffic).samples() if one.name == "onebase_adapter_requests_total"]
    assert {(one.labels["adapter"], one.labels["outcome"]): one.value for one in requests if one.value} == {
        ("(base)", "finished"): 1
    }


def test_cold_starts_and_refusals_are_counted_by_whose_they_are() -> None:
    traffic = Traffic(5)
    traffic.ended("acme", "a", done(10, 5, cold=True), 7, Prices())
    traffic.ended("acme", "a", done(10, 5), 7, Prices())
    traffic.refused("acme", "requests_limit")
    found = {(one.name, one.labels.get("tenant")): one.value for one in Shown(traffic).samples() if one.value}
    assert found["onebase_adapter_cold_starts_total", "acme"] == 1
    assert found["onebase_adapter_load_wait_seconds_total", "acme"] == 0.5
    assert found["onebase_adapter_queue_wait_seconds_total", "acme"] == 0.5
    assert found["onebase_adapter_prefill_seconds_total", "acme"] == 0.5
    assert found["onebase_adapter_decode_seconds_total", "acme"] == 4.0
    assert found["onebase_adapter_ttft_seconds_total", "acme"] == 2.0
    assert found["onebase_tenant_limit_refusals_total", "acme"] == 1
    parts = {
        one.labels["part"]: one.value
        for one in Shown(traffic).samples()
        if one.name == "onebase_tenant_request_part_seconds_total" and one.labels["tenant"] == "acme"
    }
    assert parts == {"load": 0.5, "queue": 0.5, "prefill": 0.5, "decode": 4.0}


def test_refusals_are_shown_before_the_first_for_rates_to_see_it() -> None:
    traffic = Traffic(2)
    traffic.ended("acme", None, done(10, 5), 7, Prices())
    traffic.refused("acme", "a_new_one")
    samples = [one for one in Shown(traffic).samples() if one.name == "onebase_tenant_limit_refusals_total"]
    assert {one.labels["code"]: one.value for one in samples if one.labels["tenant"] == "acme"} == {
        **dict.fromkeys(REFUSED, 0),
        "a_new_one": 1,
    }


def test_jains_index() -> None:
    assert jain([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain([5.0]) == jain([]) == jain([0.0, 0.0]) == 1.0


def test_fairness_is_of_the_last_minute_and_by_weight() -> None:
    def shares(**served: float) -> dict[str, ShareFigures]:
        return {name: ShareFigures(value, 0, 0, 2.0 if name == "double" else 1.0) for name, value in served.items()}

    fairness = Fairness()
    assert fairness.index(shares(one=1_000.0, double=0.0), 0.0) == 1.0
    assert fairness.index(shares(one=1_100.0, double=200.0), 30.0) == pytest.approx(1.0), (
        "twice the weight, twice as much"
    )
    assert fairness.index(shares(one=1_200.0, double=200.0), 61.0) == pytest.approx(0.9), "200 and 200 / 2"
    # From here on the first look is too old: what counts is what came after the second.
    assert fairness.index(shares(one=1_200.0, double=400.0), 91.0) == pytest.approx(1.0)
    assert fairness.index(shares(one=1_200.0, double=400.0), 1_000.0) == 1.0, "nobody had work"
    assert len(fairness._seen) <= 3


def test_one_that_waits_and_gets_nothing_is_unfairly_served() -> None:
    fairness = Fairness()
    fairness.index({"a": ShareFigures(0.0, 0, 1), "b": ShareFigures(0.0, 1, 0)}, 0.0)
    assert fairness.index({"a": ShareFigures(50.0, 0, 1), "b": ShareFigures(0.0, 1, 0)}, 10.0) == pytest.approx(0.5)


def test_routes_and_statuses_are_few_whatever_is_called() -> None:
    assert [route(path) for path in ("/v1/generate", "/v1/chat/completions", "/adapters/x", "/metrics", "/../etc")] == [
        "generate", "openai", "adapters", "health", "other",
    ]  # fmt: skip
    assert [status(code) for code in (200, 204, 304, 404, 429, 499, 500, 503)] == [
        "2xx", "2xx", "3xx", "4xx", "429", "4xx", "5xx", "503",
    ]  # fmt: skip


def test_a_fault_that_is_answered_outside_of_the_middleware_is_a_5xx() -> None:
    responses: Responses = Counter()

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError

    async def fine(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    async def call(app: Any) -> None:
        async def ignore(message: Any) -> None: ...

        await CountResponses(app, responses)({"type": "http", "path": "/v1/generate"}, ignore, ignore)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(call(broken))
    asyncio.run(call(fine))
    assert responses == {("generate", "5xx"): 1, ("generate", "2xx"): 1}
