"""A tenant's own limits, over HTTP: what is refused, what an answer says of them, and a budget that ends a stream."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from server.api.schemas import GenerateResponse
from server.errors import Overloaded
from server.tenants import usage
from server.tenants.keys import Scope
from server.tenants.tenant import Limits
from tests.serving import Gate, Server, refused, until

A_DOLLAR_A_MILLION = {"prompt": 1_000_000, "cached": 1_000_000, "completion": 1_000_000, "rank_classes": [[1, 1000]]}
PROMPT = [20, 30, 40, 50, 60, 70, 80, 90, 100, 110]


@pytest.fixture(scope="module")
def guarded(base, tmp_path_factory) -> Iterator[Server]:
    with Server(base, tmp_path_factory.mktemp("guarded"), auth="on") as server:
        yield server


def on_loop(server: Server, work: Any) -> Any:
    """What a coroutine gives that must run where the server does."""
    return asyncio.run_coroutine_threadsafe(work, server.state.client.loop).result(20)


@pytest.fixture
def tenant(guarded, request):
    """Makes a tenant with these limits: how to send a request as it, and its id."""

    def make(**limits: Any):
        directory, name = (
            guarded.state.accounts.directory,
            re.sub("[^a-z0-9]+", "-", request.node.name.lower()).strip("-"),
        )
        on_loop(guarded, directory.create(name, limits=Limits(**limits), prices=A_DOLLAR_A_MILLION))
        _, token = on_loop(guarded, directory.create_key(name, [Scope.GENERATE]))
        headers = {"Authorization": f"Bearer {token}"}

        def send(**body: Any) -> httpx.Response:
            body = {"prompt": PROMPT, "max_tokens": 20, "ignore_eos": True, **body}
            return guarded.http.post("/v1/generate", json=body, headers=headers)

        send.headers, send.name = headers, name
        return send

    return make


def limited(response: httpx.Response, code: str) -> None:
    error = refused(response, 429)
    assert (error["code"], error["type"]) == (code, "rate_limit_error")
    assert int(response.headers["retry-after"]) >= 1


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


@pytest.mark.parametrize("header", [None, "Bearer ob_nobody_nothing", "Basic x"])
def test_without_a_key_nothing_is_generated(guarded, header):
    headers = {"Authorization": header} if header else {}
    response = guarded.http.post("/v1/generate", json={"prompt": "a"}, headers=headers)
    assert refused(response, 401)["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"].startswith("Bearer")


def test_more_requests_a_minute(tenant):
    send = tenant(rpm_limit=2)
    first = send()
    assert first.status_code == 200
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert 0 < int(first.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
    assert "x-ratelimit-limit-tokens" not in first.headers
    assert send(stream=True).headers["x-ratelimit-remaining-requests"] == "0"
    third = send()
    limited(third, "requests_limit")
    assert int(third.headers["retry-after"]) <= 60
    assert third.headers["x-ratelimit-remaining-requests"] == "0"


def test_more_tokens_a_minute(tenant):
    send = tenant(tpm_limit=40)
    assert refused(send(max_tokens=31), 422, "max_tokens")["code"] == "tokens_exceed_limit"
    first = send(max_tokens=20, stop=[])
    assert first.headers["x-ratelimit-limit-tokens"] == "40"
    assert first.headers["x-ratelimit-remaining-tokens"] == "10"
    second = send()
    limited(second, "tokens_limit")
    assert second.headers["x-ratelimit-remaining-tokens"] == "10"
    assert send(max_tokens=1, prompt=PROMPT[:9]).status_code == 200


def test_more_requests_at_once(guarded, tenant, monkeypatch):
    send, admission = tenant(max_parallel_requests=1), guarded.state.accounts.admission
    gate = Gate(guarded.runner.run)
    monkeypatch.setattr(guarded.runner, "run", gate)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(send)
        until(lambda: gate.entered)
        limited(send(), "parallel_limit")
        gate.open()
        assert first.result(20).status_code == 200
    until(lambda: not admission.running(send.name))
    assert send().status_code == 200
    guarded.idle()


@pytest.mark.parametrize("stream", [True, False])
def test_a_budget_that_runs_out_ends_the_answer(guarded, tenant, stream):
    send = tenant(max_budget=30, budget_duration="1d")
    response = send(max_tokens=400, stream=stream)
    answers = chunks_of(response) if stream else [response.json()]
    last, made = answers[-1], sum(len(one["choices"][0]["token_ids"]) for one in answers)
    assert last["choices"][0]["finish_reason"] == "budget"
    for one in answers:  # as the description of the interface has it
        GenerateResponse.model_validate(one)
    assert made == last["usage"]["completion_tokens"] == 20
    assert last["usage"]["cost_microusd"] == 30
    assert on_loop(guarded, usage.spent(guarded.state.accounts.database, send.name, 0)) == 30
    limited(send(max_tokens=1), "budget_exhausted")
    limited(send(max_tokens=1, stream=True), "budget_exhausted")
    guarded.idle()


def test_a_budget_without_an_end_says_that_it_does_not_come_back(tenant):
    response = tenant(max_budget=5)()
    limited(response, "budget_exhausted")
    assert "does not come back by itself" in response.json()["error"]["message"]


def test_answers_that_share_a_budget_end_together(guarded, tenant):
    send = tenant(max_budget=40, budget_duration="1d")
    body = send(max_tokens=100, n=3, temperature=1.0, seed=3).json()
    made = [len(choice["token_ids"]) for choice in body["choices"]]
    assert {choice["finish_reason"] for choice in body["choices"]} == {"budget"}
    assert sum(made) == body["usage"]["completion_tokens"]
    assert body["usage"]["cost_microusd"] == 40
    limited(send(max_tokens=1), "budget_exhausted")
    guarded.idle()


@pytest.mark.parametrize(("budget", "each"), [(21, [3, 3, 3, 2]), (11, [1, 0, 0, 0])])
def test_a_budget_of_several_answers_is_exact(guarded, tenant, budget, each):
    chunks = chunks_of(tenant(max_budget=budget)(max_tokens=100, n=4, temperature=1.0, seed=3, stream=True))
    made, reasons = [0] * 4, [None] * 4
    for choice in (chunk["choices"][0] for chunk in chunks):
        made[choice["index"]] += len(choice["token_ids"])
        reasons[choice["index"]] = choice["finish_reason"]
    assert (made, reasons) == (each, ["budget"] * 4)
    assert chunks[-1]["usage"]["cost_microusd"] == budget
    guarded.idle()


def test_a_request_that_the_engine_refuses_is_not_counted(guarded, tenant, monkeypatch):
    send = tenant(rpm_limit=2)

    def full(*_: object) -> None:
        raise Overloaded("the queue is full", code="queue_full")

    with monkeypatch.context() as patch:
        patch.setattr(guarded.state.client, "submit", full)
        for _ in range(5):
            assert refused(send(), 503)["code"] == "queue_full"
    assert send().headers["x-ratelimit-remaining-requests"] == "1"


def test_a_changed_rate_counts_what_was_used_before(guarded, tenant):
    send = tenant(rpm_limit=1)
    assert send().status_code == 200
    limited(send(), "requests_limit")
    on_loop(guarded, guarded.state.accounts.update(send.name, lambda _: {"limits": Limits(rpm_limit=2)}))
    assert send().headers["x-ratelimit-remaining-requests"] == "0"
    limited(send(), "requests_limit")
