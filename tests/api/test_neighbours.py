"""Tenants beside each other with AUTH on: the queue, the reading of prompts, and who pays for what was begun."""

import threading

import httpx
import pytest

from server.api import prompts
from server.tenants.limits import Admission
from tests.serving import Gate, refused, until
from tests.tenancy import Account, invoice


def flooding(account: Account, wanted: int, sent: int, **body) -> tuple[list[threading.Thread], list[httpx.Response]]:
    """Sends `sent` requests at once, of which `wanted` are taken; those that run, and the others' answers."""
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(account.generate(**body))) for _ in range(sent)]
    for thread in threads:
        thread.start()
    until(lambda: admission(account).running(account.name) == wanted and len(answers) == sent - wanted)
    return threads, list(answers)


def admission(account: Account) -> Admission:
    return account.server.state.accounts.admission


def test_a_flood_leaves_room_in_the_queue_for_others(admin, monkeypatch):
    first, second, third = admin.tenant(limits={"rpm_limit": 1000}), admin.tenant(), admin.tenant()
    monkeypatch.setattr(admin.server.state.client.bounds, "max_requests", 12)
    gate = Gate(admin.server.runner.run)
    monkeypatch.setattr(admin.server.runner, "run", gate)
    before = admission(first).refused["queue_share"]
    try:
        running, refusals = flooding(first, 6, 10)
        more, others = flooding(second, 3, 6)
        for response in [*refusals, *others]:
            assert refused(response, 429, None)["code"] == "queue_share"
            assert int(response.headers["retry-after"]) >= 1
        assert {response.headers["x-ratelimit-limit-requests"] for response in refusals} == {"1000"}
        assert admission(first).refused["queue_share"] == before + 7
        last, none = flooding(third, 1, 1)
        assert not none
    finally:
        gate.open()
    for thread in [*running, *more, *last]:
        thread.join(20)
    assert first.generate().status_code == second.generate().status_code == 200
    left = admission(first).headers(admin.server.state.accounts.directory.show(first.name))
    assert left["x-ratelimit-remaining-requests"] == str(1000 - 7), "what was refused used nothing up"
    page = admin.client(None).get("/metrics").text
    assert 'onebase_limit_refusals_total{code="queue_share"}' in page


def test_what_is_refused_anyhow_is_not_read(admin, monkeypatch):
    """By rates, money, rights or a full queue; and what is read afterwards is charged once."""
    rated, poor = admin.tenant(limits={"rpm_limit": 1}), admin.tenant(limits={"max_budget": 0})
    bound, classed = admin.tenant(limits={"tpm_limit": 3}), admin.tenant(classes=["batch"])
    assert rated.generate().headers["x-ratelimit-remaining-requests"] == "0"
    read = []
    encode = prompts.encode
    monkeypatch.setattr(prompts, "encode", lambda body, *more: (read.append(body), encode(body, *more))[1])
    for prompt in ("hello", "hello " * 700):  # read in place, and in its turn
        assert refused(rated.generate(prompt=prompt), 429)["code"] == "requests_limit"
        assert refused(poor.generate(prompt=prompt), 429)["code"] == "budget_exhausted"
        assert refused(bound.generate(prompt=prompt), 422)["code"] == "tokens_exceed_limit"
        assert refused(classed.generate(prompt=prompt), 403)["code"] == "class_not_allowed"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(admin.server.state.client.bounds, "max_requests", 0)
            assert refused(classed.generate(prompt=prompt, priority="batch"), 503)["code"] == "queue_full"
    assert not read
    again = admin.tenant(limits={"rpm_limit": 10, "tpm_limit": 10_000})
    answer = again.generate(max_tokens=4, ignore_eos=True)
    assert answer.headers["x-ratelimit-remaining-requests"] == "9"
    assert answer.headers["x-ratelimit-remaining-tokens"] == str(10_000 - 4 - answer.json()["usage"]["prompt_tokens"])
    assert len(read) == 1


def test_long_prompts_of_one_tenant_do_not_hold_up_anothers(admin, monkeypatch):
    first, second = admin.tenant(limits={"max_parallel_requests": 1}), admin.tenant()
    gate = Gate(prompts.encode)
    slow = {"prompt": "a" * (prompts.LONG + 1)}

    def read(body, *more):
        return gate(body, *more) if body.prompt[0] == "a" else prompts_encode(body, *more)

    prompts_encode = prompts.encode
    monkeypatch.setattr(prompts, "encode", read)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(first.generate(**slow))) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: admin.server.state.reads.bounds.requests == 3)
    try:
        assert second.generate().status_code == 200
        other = []
        threads.append(threading.Thread(target=lambda: other.append(second.generate(prompt="b" * (prompts.LONG + 1)))))
        threads[-1].start()
        until(lambda: admin.server.state.reads.bounds.requests == 4)
    finally:
        gate.open()
    for thread in threads:
        thread.join(20)
    assert [refused(answer, 422)["code"] for answer in [*answers, *other]] == ["context_length_exceeded"] * 4
    assert admin.server.state.reads.bounds.amount == 0


def test_who_goes_before_the_first_token_pays_for_what_was_read_of_its_prompt(admin, monkeypatch):
    """For it is in the prefix cache then; what fails costs nothing. The next request pays for the rest, once."""
    account, run = admin.tenant(), admin.server.runner.run
    engine, step, held = admin.server.engine, 32, threading.Event()
    monkeypatch.setattr(engine._scheduler, "max_batch_tokens", step)
    left = {"steps": 2}

    def held_up(work, copy):
        if not left["steps"]:
            assert held.wait(30)
            if left.get("fails"):
                raise RuntimeError("a step fails")
        left["steps"] -= bool(left["steps"])
        return run(work, copy)

    monkeypatch.setattr(admin.server.runner, "run", held_up)
    prompt = [5 + at % 90 for at in range(200)]
    with pytest.raises(httpx.ReadTimeout):
        account.http.post("/v1/generate", json={"prompt": prompt, "max_tokens": 4}, timeout=1)
    until(lambda: engine._inbox.qsize())  # the step under way is computed to its end
    held.set()
    [gone] = until(lambda: account.http.get("/v1/usage").json()["data"])
    assert (gone["status"], gone["prompt_tokens"], gone["cached_tokens"], gone["completion_tokens"]) == (
        "cancelled",
        3 * step,
        0,
        0,
    )
    assert gone["cost_microusd"] > 0
    used = account.costs(prompt=prompt)["usage"]
    assert used["cached_tokens"] == gone["prompt_tokens"]
    assert gone["prompt_tokens"] + used["prompt_tokens"] - used["cached_tokens"] == len(prompt), "each token once"
    left |= {"steps": 2, "fails": True}
    assert refused(account.generate(prompt=prompt[::-1]), 500)["code"] == "engine_failure"
    until(lambda: len(account.http.get("/v1/usage").json()["data"]) == 3)
    failed = next(row for row in account.http.get("/v1/usage").json()["data"] if row["status"] == "error")
    assert (failed["prompt_tokens"], failed["cost_microusd"]) == (0, 0)
    assert invoice(account)["total_microusd"] == gone["cost_microusd"] + used["cost_microusd"]
