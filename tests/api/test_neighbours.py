"""Tenants beside each other with AUTH on: the queue, the reading of prompts, and who pays for what was begun."""

import json
import threading
from dataclasses import replace

import httpx
import pytest

from server.api import prompts
from server.engine.text import TextStream
from server.tenants.limits import Admission
from tests.families import ATTENTION, MLP, adapter_bytes, save_adapter
from tests.serving import Gate, refused, until
from tests.tenancy import Account, Admin, invoice

LIMITS = {"tpm_limit": 10_000, "max_budget": 1_000_000}
A_DOLLAR_A_MILLION = {"prompt": 1_000_000, "cached": 1_000_000, "completion": 1_000_000, "rank_classes": [[1, 1000]]}


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


def test_one_request_does_not_take_the_whole_queue(admin, monkeypatch):
    first, second = admin.tenant(), admin.tenant()
    monkeypatch.setattr(admin.server.state.client.bounds, "max_amount", 2000)
    for body, param in (({"max_tokens": 251, "n": 4}, "n"), ({"max_tokens": 63, "n": 16}, "n")):
        error = refused(first.generate(prompt=[5], **body), 422, param)
        assert "takes 1000 at most" in error["message"]
    gate = Gate(admin.server.runner.run)
    monkeypatch.setattr(admin.server.runner, "run", gate)
    try:
        running, none = flooding(first, 1, 1, prompt=[5], max_tokens=249, n=4)
        more, others = flooding(second, 1, 1, prompt=[5], max_tokens=199, n=4)
        assert not none
        assert not others
    finally:
        gate.open()
    for thread in [*running, *more]:
        thread.join(20)


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


def test_a_chat_of_many_messages_is_read_beside_the_event_loop(admin, monkeypatch):
    """However short they are: the template makes thousands of tokens of a thousand empty ones."""
    account, threads, encode = admin.tenant(), [], prompts.encode
    monkeypatch.setattr(
        prompts, "encode", lambda body, *more: (threads.append(threading.get_ident()), encode(body, *more))[1]
    )
    empty = {"role": "user", "content": ""}
    assert account.generate(prompt=None, messages=[empty] * 2).status_code == 200
    answer = account.generate(prompt=None, messages=[empty] * 1024)
    assert refused(answer, 422, "messages")["code"] == "context_length_exceeded"
    assert threads[0] == admin.server._thread.ident != threads[1]


def test_a_prompt_that_is_read_in_vain_is_a_request_of_the_minute(admin):
    account = admin.tenant(limits={"rpm_limit": 5, "tpm_limit": 60})
    tenant = admin.server.state.accounts.directory.show(account.name)
    in_vain = (
        ({"prompt": [5] * 600}, "context_length_exceeded"),
        ({"prompt": "hello " * 700}, "context_length_exceeded"),  # read in its turn
        ({"prompt": [5] * 60, "max_tokens": 4}, "tokens_exceed_limit"),
    )
    for at, (body, code) in enumerate(in_vain, 1):
        unread = account.generate(prompt=None)
        assert refused(unread, 422)["code"] == "invalid_request"
        assert refused(account.generate(**body), 422)["code"] == code
        headers = admission(account).headers(tenant)
        assert headers["x-ratelimit-remaining-requests"] == str(5 - at)
        assert headers["x-ratelimit-remaining-tokens"] == "60"
    assert account.generate().headers["x-ratelimit-remaining-requests"] == "1"
    assert refused(account.generate(prompt=[5] * 600), 422)["code"] == "context_length_exceeded"
    assert refused(account.generate(), 429)["code"] == "requests_limit"


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
    """For it is in the prefix cache then; a failed step costs nothing. The next request pays for the rest, once."""
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


def is_charged(admin: Admin, account: Account, prompt: int, completion: int) -> None:
    """Its only request ended with an error, and is on the bill with these tokens, each a micro-dollar."""
    [row] = account.http.get("/v1/usage").json()["data"]
    assert (row["status"], row["prompt_tokens"], row["completion_tokens"]) == ("error", prompt, completion)
    assert row["cost_microusd"] == invoice(account)["total_microusd"] == prompt + completion
    tenant = admin.server.state.accounts.directory.show(account.name)
    assert admission(account).spent(tenant) == prompt + completion
    left = LIMITS["max_budget"] - prompt - completion
    assert admission(account).budget_left(tenant) == left, "nothing is held back any more"
    headers = admission(account).headers(tenant)
    assert headers["x-ratelimit-remaining-tokens"] == str(LIMITS["tpm_limit"] - prompt - completion)


@pytest.mark.parametrize(("broken", "code"), [("numbers", "not_finite"), ("text", "unusable_output")])
def test_a_stream_whose_output_breaks_is_charged_for_what_was_made(admin, monkeypatch, broken, code):
    """An adapter can overflow at a token of its owner's choice; the stream before it is not had for nothing."""
    account = admin.tenant(limits=LIMITS, prices=A_DOLLAR_A_MILLION)
    run, push = admin.server.runner.run, TextStream.push

    def overflowing(work, copy):
        return [(item, replace(choice, finite=item.sequence.produced < 3)) for item, choice in run(work, copy)]

    def unreadable(text, token):
        if len(text._ids) == 3:
            raise ValueError("no such token")
        return push(text, token)

    if broken == "numbers":
        monkeypatch.setattr(admin.server.runner, "run", overflowing)
    else:
        monkeypatch.setattr(TextStream, "push", unreadable)
    prompt = [5 + at % 90 for at in range(40)]
    response = account.generate(prompt=prompt, max_tokens=20, ignore_eos=True, stream=True)
    *chunks, last, end = response.text.split("\n\n")
    assert (response.status_code, end) == (200, "")
    event, data = last.split("\n")
    assert event == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == code
    sent = [json.loads(chunk.removeprefix("data: "))["choices"][0]["token_ids"] for chunk in chunks]
    assert sum(map(len, sent)) == 3
    is_charged(admin, account, 40, 3 if broken == "numbers" else 4)


def test_an_adapter_that_overflows_at_once_is_charged_for_its_prompt(admin, base, tmp_path):
    account = admin.tenant(limits=LIMITS, prices=A_DOLLAR_A_MILLION)
    wild = save_adapter(base, tmp_path / "wild", seed=300, r=4, target_modules=ATTENTION + MLP, std=1e18)
    config, weights = adapter_bytes(wild)
    files = {"config": config, "weights": weights}
    assert account.http.put("/adapters/wild", files=files).status_code == 201
    response = account.generate(adapter="wild", prompt=[5 + at % 90 for at in range(40)])
    assert refused(response, 500)["code"] == "not_finite"
    is_charged(admin, account, 40, 0)
    assert account.http.delete("/adapters/wild").status_code == 204
