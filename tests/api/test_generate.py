"""`POST /v1/generate`, answered whole: every field, the answer's shape, and every way to be refused."""

import asyncio
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from server.api import generate
from server.api.render import Answer, TokenNames
from server.core import DEFAULT_TENANT
from server.tenants.prices import DEFAULT_BOOK
from tests.serving import ids_of, refused

pytestmark = pytest.mark.usefixtures("idle")
_fresh = itertools.count()


def fresh() -> str:
    """A prompt that nobody has sent before."""
    return f"{next(_fresh):06d} and some more text to fill blocks"


def test_the_answer_has_the_contracts_shape(server):
    body = server.generate(prompt=[5, 6, 7])
    assert set(body) == {"id", "created", "model", "adapter", "choices", "usage"}
    assert body["id"].startswith("gen-")
    assert body["created"] > 1_600_000_000
    assert body["model"] == "tiny-llama"
    assert set(body["adapter"]) == {"name", "version", "digest", "lane", "cold", "load_ms"}
    (choice,) = body["choices"]
    assert set(choice) == {"index", "text", "token_ids", "finish_reason", "logprobs"}
    assert choice["index"] == 0
    assert choice["finish_reason"] in ("stop", "length")
    assert choice["logprobs"] is None
    completion = len(choice["token_ids"])
    assert body["usage"] == {
        "prompt_tokens": 3,
        "cached_tokens": 0,
        "completion_tokens": completion,
        "total_tokens": 3 + completion,
        "cost_microusd": DEFAULT_BOOK.rates(0).charge(3, 0, completion).total,
    }


def test_the_base_names_itself(server):
    for body in (server.generate(), server.generate(adapter=None)):
        used = body["adapter"]
        assert (used["name"], used["version"], used["lane"], used["cold"]) == (None, None, "base", False)
        assert used["digest"] == server.state.base.info.digest
        assert used["load_ms"] == 0


def test_an_adapter_names_the_digest_of_its_put(server, adapters):
    put = server.put("a", adapters[0]).json()
    body = server.generate(adapter="a", ignore_eos=True)
    assert {field: body["adapter"][field] for field in ("name", "version", "digest", "lane")} == {
        "name": "a",
        "version": put["version"],
        "digest": put["digest"],
        "lane": "shared",
    }
    assert body["choices"][0]["token_ids"] != server.generate(ignore_eos=True)["choices"][0]["token_ids"]


def test_the_first_request_of_an_adapter_is_cold_and_tells_the_loading_time(server, adapters):
    server.put("cold", adapters[1])
    first, second = server.generate(adapter="cold")["adapter"], server.generate(adapter="cold")["adapter"]
    assert first["cold"] is True
    assert first["load_ms"] > 0
    assert (second["cold"], second["load_ms"]) == (False, 0)
    assert first["digest"] == second["digest"]


def test_text_and_its_ids_are_the_same_prompt(server):
    text, ids = (
        server.generate(prompt="same words", stop=None, messages=None),
        server.generate(prompt=ids_of("same words")),
    )
    assert text["choices"] == ids["choices"]
    assert text["usage"]["prompt_tokens"] == ids["usage"]["prompt_tokens"] == 10


def test_messages_go_through_the_chat_template(server):
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    chat = server.generate(messages=turns, prompt=None)
    assert chat["choices"] == server.generate(prompt="system: be brief\nuser: hi\n>")["choices"]


def test_max_tokens_is_the_length(server):
    body = server.generate(max_tokens=5, ignore_eos=True)
    assert len(body["choices"][0]["token_ids"]) == body["usage"]["completion_tokens"] == 5
    assert body["choices"][0]["finish_reason"] == "length"


def test_n_answers_have_their_indices_and_share_one_prompt(server):
    body = server.generate(n=3, temperature=1.5, seed=3, max_tokens=12, ignore_eos=True)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert len({tuple(choice["token_ids"]) for choice in body["choices"]}) == 3
    assert body["usage"]["prompt_tokens"] == 5
    assert body["usage"]["completion_tokens"] == 36


def test_a_seed_repeats_and_another_differs(server):
    def tokens(seed):
        return server.generate(temperature=1.5, seed=seed, max_tokens=16, ignore_eos=True)["choices"][0]["token_ids"]

    assert tokens(7) == tokens(7) != tokens(8)
    assert tokens(0) == tokens(0) != tokens(2**64 - 1)
    assert tokens(None) != tokens(None)


@pytest.mark.parametrize("stop", ["three", ["never", "three"]])
def test_a_stop_string_across_tokens_ends_the_text_before_it(server, script, stop):
    script("one two three four")
    body = server.generate(stop=stop, max_tokens=18)
    assert body["choices"][0]["text"] == "one two "
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == len("one two three")


def test_what_only_begins_like_a_stop_string_is_text(server, script):
    script("one thr")
    choice = server.generate(stop="three", max_tokens=7)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("one thr", "length")


def test_the_end_token_stops_unless_it_is_ignored(server, script):
    script([*ids_of("yes"), *server.state.base.eos_ids, *ids_of(" no")])
    stopped, whole = server.generate(max_tokens=7), server.generate(max_tokens=7, ignore_eos=True)
    assert (stopped["choices"][0]["text"], stopped["choices"][0]["finish_reason"]) == ("yes", "stop")
    assert stopped["usage"]["completion_tokens"] == 4
    assert (whole["choices"][0]["text"], whole["choices"][0]["finish_reason"]) == ("yes no", "length")


@pytest.mark.parametrize("k", [0, 5])
def test_logprobs_have_one_entry_a_token(server, k):
    choice = server.generate(logprobs=k, ignore_eos=True)["choices"][0]
    logprobs = choice["logprobs"]
    assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs"}
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == 8
    assert all(isinstance(token, str) for token in logprobs["tokens"])
    assert all(value <= 0 for value in logprobs["token_logprobs"])
    for token, value, top in zip(*logprobs.values(), strict=True):
        assert len(top) == k
        if k:  # greedy: the chosen token is the likeliest
            assert max(top.values()) == top[token] == value


def test_a_large_answer_is_made_beside_the_event_loop(server, monkeypatch):
    threads, real = [], Answer.whole

    def whole(answer):
        threads.append(threading.get_ident())
        return real(answer)

    monkeypatch.setattr(Answer, "whole", whole)
    small, large = (server.generate(logprobs=20, max_tokens=tokens, ignore_eos=True) for tokens in (4, 150))
    assert threads[0] == server._thread.ident != threads[1]
    assert small["choices"][0]["logprobs"]["tokens"] == large["choices"][0]["logprobs"]["tokens"][:4]
    assert len(large["choices"][0]["logprobs"]["top_logprobs"]) == 150


def test_requests_share_the_names_of_tokens(server, monkeypatch):
    first, made, real = server.generate(logprobs=20, ignore_eos=True), [], TokenNames._make
    monkeypatch.setattr(TokenNames, "_make", lambda self, number: made.append(number) or real(self, number))
    assert server.generate(logprobs=20, ignore_eos=True)["choices"] == first["choices"]
    assert made == []
    server.state.names._names.clear()
    assert server.generate(logprobs=20, ignore_eos=True)["choices"] == first["choices"]
    assert len(made) == len(set(made)) >= 20


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 0.7, "top_p": 0.5},
        {"temperature": 0.7, "min_p": 0.1},
        {"repetition_penalty": 5.0},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"temperature": 5.0, "top_k": 1_000_000, "top_p": 0.0001, "min_p": 1.0, "seed": 0},
    ],
)
def test_every_sampling_field_is_taken(server, field):
    assert len(server.generate(**field, ignore_eos=True)["choices"][0]["token_ids"]) == 8


def test_top_k_of_one_and_min_p_of_one_are_greedy(server):
    greedy = server.generate(ignore_eos=True)["choices"]
    for field in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-9}):
        assert server.generate(temperature=2.0, seed=5, ignore_eos=True, **field)["choices"] == greedy


def test_a_repeated_prompt_is_found_in_the_cache_and_gives_the_same(server):
    prompt = fresh()
    first, second = server.generate(prompt=prompt), server.generate(prompt=prompt)
    assert first["usage"]["cached_tokens"] == 0
    assert second["usage"]["cached_tokens"] == len(prompt) // 16 * 16
    assert first["choices"] == second["choices"]
    assert server.generate(prompt=prompt, adapter="a")["usage"]["cached_tokens"] == 0


def test_prompt_and_output_may_fill_the_context_to_the_last_token(server):
    body = server.generate(prompt=[5] * 500, max_tokens=12, ignore_eos=True)
    assert body["usage"]["total_tokens"] == 512


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"colour": 1}, "colour"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"]}, "prompt.0"),
        ({"prompt": [1, 2.5]}, "prompt.1"),
        ({"prompt": [True]}, "prompt.0"),
        ({"prompt": [[1]]}, "prompt.0"),
        ({"prompt": [320]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**70]}, "prompt"),
        ({"messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ({"prompt": None, "messages": []}, "messages"),
        ({"prompt": None, "messages": "hi"}, "messages"),
        ({"prompt": None, "messages": [{"role": "robot", "content": "a"}]}, "messages.0.role"),
        ({"prompt": None, "messages": [{"role": "user"}]}, "messages.0.content"),
        ({"prompt": None, "messages": [{"role": "user", "content": 1}]}, "messages.0.content"),
        ({"prompt": None, "messages": [{"role": "user", "content": "a", "x": 1}]}, "messages.0.x"),
        ({"adapter": 5}, "adapter"),
        ({"adapter": "UPPER"}, "adapter"),
        ({"adapter": "a/../b"}, "adapter"),
        ({"adapter": "a" * 65}, "adapter"),
        ({"adapter": "a\n"}, "adapter"),
        ({"adapter": ""}, "adapter"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1_000_001}, "max_tokens"),
        ({"max_tokens": 8.5}, "max_tokens"),
        ({"max_tokens": "8"}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 5.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1_000_001}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 10.1}, "repetition_penalty"),
        ({"presence_penalty": -2.1}, "presence_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": "a" * 257}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ["a", ""]}, "stop.1"),
        ({"stop": [5]}, "stop.0"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"stream": "true"}, "stream"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_out_of_bounds_is_refused_by_name(server, body, param):
    error = refused(server.http.post("/v1/generate", json={"prompt": "hello", **body}), 422, param)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [{"prompt": [5] * 505, "max_tokens": 8}, {"prompt": [5], "max_tokens": 512}])
def test_more_than_the_context_is_refused(server, body):
    error = refused(server.http.post("/v1/generate", json=body), 422)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] in ("prompt", "max_tokens")


def send(server, content, kind="application/json"):
    return server.http.post("/v1/generate", content=content, headers={"content-type": kind})


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(server, number):
    for field in ("temperature", "max_tokens", "seed"):
        refused(send(server, f'{{"prompt": "a", "{field}": {number}}}'), 422, field)


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (r'{"prompt": "\ud800"}', "prompt"),
        (r'{"messages": [{"role": "user", "content": "\udcff"}]}', "messages.0.content"),
        (r'{"prompt": "a", "\ud800": 1}', None),
        (r'{"prompt": "a", "adapter": "\ud800"}', "adapter"),
        (r'{"prompt": "a", "stop": "\ud800"}', "stop"),
    ],
)
def test_lone_surrogates_are_no_text(server, content, param):
    refused(send(server, content), 422, param)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b'{"prompt": "a"} more',
        b'{"prompt": "\xff"}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 100_000,
    ],
    ids=lambda content: content[:20].decode("latin-1"),
)
def test_what_is_no_json_object_is_refused(server, content):
    refused(send(server, content), 422)


def test_another_content_type_is_refused_with_a_hint(server):
    assert "application/json" in refused(send(server, b'{"prompt": "a"}', "text/plain"), 422)["message"]


def test_an_unknown_adapter_is_404(server):
    error = refused(server.http.post("/v1/generate", json={"prompt": "a", "adapter": "nobody"}), 404, "adapter")
    assert (error["code"], error["type"]) == ("adapter_not_found", "not_found_error")


def test_an_unknown_path_and_method_are_in_the_envelope(server):
    assert refused(server.http.get("/v1/nothing"), 404)["code"] == "not_found"
    assert refused(server.http.get("/v1/generate"), 405)["code"] == "method_not_allowed"
    assert refused(server.http.post("/healthz"), 405)["code"] == "method_not_allowed"


def chunked(size):
    yield b'{"prompt": "'
    for _ in range(size // 65536):
        yield b"a" * 65536
    yield b'"}'


def test_a_body_over_the_cap_is_413_with_and_without_a_length(server):
    nine = 9 * 1024 * 1024
    for content in (b"".join(chunked(nine)), chunked(nine)):
        assert refused(send(server, content), 413)["code"] == "too_large"


def test_a_long_prompt_within_the_cap_is_tokenised_and_then_refused(server):
    error = refused(server.http.post("/v1/generate", json={"prompt": "a" * 100_000}), 422, "prompt")
    assert error["code"] == "context_length_exceeded"


def test_every_answer_has_a_request_id(server, monkeypatch):
    answers = [
        server.http.get("/healthz"),
        server.http.get("/nothing"),
        server.http.post("/v1/generate", json={}),
        server.http.post("/v1/generate", json={"prompt": "a", "adapter": "nobody"}),
        send(server, chunked(9 * 1024 * 1024)),
        server.http.post("/v1/generate", json={"prompt": "a", "max_tokens": 1}),
    ]
    monkeypatch.setattr("server.api.prompts.encode", lambda *_: 1 // 0)
    answers.append(server.http.post("/v1/generate", json={"prompt": "a"}))
    assert [answer.status_code for answer in answers] == [200, 404, 422, 404, 413, 200, 500]
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)
    assert answers[-1].headers["connection"] == "close"
    for answer in answers[1:5] + answers[6:]:
        refused(answer, answer.status_code)
        assert "ZeroDivision" not in answer.text
        assert ".py" not in answer.text


def test_a_clients_own_request_id_comes_back_if_it_is_a_plain_token(server):
    def echoed(given):
        return server.http.get("/healthz", headers={"x-request-id": given}).headers["x-request-id"]

    assert echoed("my-id.7") == "my-id.7"
    assert echoed("a b<script>") != "a b<script>"
    assert echoed("x" * 200) != "x" * 200


def test_an_adapter_in_use_is_counted(server, adapters):
    server.put("counted", adapters[2])
    assert server.http.get("/adapters/counted").json()["residency"] == "disk"
    before = server.http.get("/adapters/counted").json()
    assert (before["requests"], before["in_flight"], before["last_used"]) == (0, 0, None)
    server.generate(adapter="counted")
    after = server.http.get("/adapters/counted").json()
    assert (after["requests"], after["residency"]) == (1, "device")
    assert after["last_used"] > 0


def test_a_text_that_no_context_can_hold_is_refused_unread(server, monkeypatch):
    """Two million characters took a gigabyte to tokenise, to be refused in the end."""
    most = server.state.max_context * server.state.base.longest_token

    def read(*arguments, **more):
        raise AssertionError("it was tokenised")

    monkeypatch.setattr("server.api.prompts._ids", read)
    for body in ({"prompt": "x" * (most + 1)}, {"messages": [{"role": "user", "content": "x" * (most + 1)}]}):
        response = server.http.post("/v1/generate", json=body)
        assert refused(response, 422, next(iter(body)))["code"] == "context_length_exceeded"


def test_long_texts_are_read_one_at_a_time(server, monkeypatch):
    text, most, inside = "x " * 50, [], []

    def read(*arguments, **more):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return [5] * 4

    monkeypatch.setattr("server.api.prompts._ids", read)
    monkeypatch.setattr("server.api.prompts.LONG", 10)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: server.generate(prompt=text, max_tokens=2), range(4)))
    assert len(answers) == 4
    assert most == [1, 1, 1, 1]


def test_nothing_is_kept_for_a_name_that_goes_while_its_request_is_read(server, adapters, monkeypatch):
    server.put("going", adapters[0])
    read = generate._read

    async def slowly(body, caller, state, lease):
        prompt = await read(body, caller, state, lease)
        await asyncio.to_thread(state.registry.delete, "going")
        return prompt

    monkeypatch.setattr(generate, "_read", slowly)
    assert server.generate(adapter="going")["adapter"]["version"] == 1
    server.idle()
    assert (DEFAULT_TENANT, "going") not in server.state.activity
