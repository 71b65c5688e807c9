"""One line of the log for every request, whatever becomes of it, and what no line may hold."""

import io
import json
import re

import httpx
import pytest

from server import logs
from server.api import trail as trails
from server.errors import LedgerUnavailable
from tests.serving import Server, refused, until

TOKEN, WORDS = "sekret-events-token", "grandmother's blue teapot"


@pytest.fixture
def lines(tmp_path):
    """What has been logged so far, as objects; `of(id)` waits for a request's line."""
    file = (tmp_path / "log").open("w+")
    with logs.writing(file, "json", "info"):
        yield Lines(tmp_path / "log")
    file.close()


class Lines:
    def __init__(self, path):
        self.path = path

    def all(self) -> list[dict]:
        return [json.loads(line) for line in self.path.read_text().split("\n")[:-1]]

    def of(self, request_id: str) -> dict:
        def found():
            return [one for one in self.all() if one["event"] == "request" and one["request_id"] == request_id]

        (line,) = until(found)
        return line


def ask(server, request_id: str, **body) -> httpx.Response:
    body = {"prompt": "hello", "max_tokens": 4, "ignore_eos": True, **body}
    return server.http.post("/v1/generate", json=body, headers={"x-request-id": request_id})


def test_a_whole_answer(server, lines):
    told = ask(server, "whole", adapter="a").json()
    line = lines.of("whole")
    assert line["id"] == told["id"]
    assert {name: line[name] for name in ("adapter", "version", "digest", "lane", "cold", "load_ms")} == {
        "adapter": "a",
        **{name: told["adapter"][name] for name in ("version", "digest", "lane", "cold")},
        "load_ms": pytest.approx(told["adapter"]["load_ms"], abs=0.01),
    }
    usage = ("prompt_tokens", "cached_tokens", "completion_tokens", "cost_microusd")
    assert {name: line[name] for name in usage} == {name: told["usage"][name] for name in usage}
    assert line["finish_reasons"] == ["length"]
    assert (line["level"], line["status"], line["outcome"], line["stream"]) == ("info", 200, "finished", False)
    assert (line["method"], line["route"], line["tenant"]) == ("POST", "/v1/generate", "default")
    assert "code" not in line
    assert "key_id" not in line, "AUTH is off"
    parts = [line[f"{name}_ms"] for name in ("load", "queue", "prefill", "decode")]
    assert all(part >= 0 for part in parts)
    assert sum(parts) == pytest.approx(line["e2e_ms"], abs=0.01)
    assert line["ttft_ms"] == pytest.approx(sum(parts[:3]), abs=0.01)
    assert line["total_ms"] >= line["e2e_ms"]


def test_a_stream_with_several_answers(server, lines, script):
    script("ab.cdefgh")
    body = {"stream": True, "n": 2, "stop": ".", "temperature": 0.5, "priority": "batch"}
    assert ask(server, "stream", **body).status_code == 200
    line = lines.of("stream")
    assert (line["stream"], line["n"], line["temperature"], line["priority"]) == (True, 2, 0.5, "batch")
    assert line["finish_reasons"] == ["stop", "stop"]
    assert (line["lane"], line.get("adapter"), line.get("digest")) == ("base", None, None)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"adapter": "nobody"}, 404, "adapter_not_found"),
        ({"prompt": "x" * 100_000}, 422, "context_length_exceeded"),
        ({"max_tokens": -1}, 422, "invalid_request"),
        ({WORDS: 1}, 422, "invalid_request"),
    ],
)
def test_what_is_refused(server, lines, body, status, code):
    assert refused(ask(server, "refused", **body), status)["code"] == code
    line = lines.of("refused")
    assert (line["status"], line["code"], line["outcome"], line["level"]) == (status, code, "refused", "info")
    assert line.get("adapter") == body.get("adapter")
    assert "id" not in line
    assert WORDS not in json.dumps(line)


def test_what_is_no_generation(server, lines):
    calls = [
        ("GET", "/adapters/a", "/adapters/{name}", 200, "finished"),
        ("GET", "/adapters/nobody", "/adapters/{name}", 404, "refused"),
        ("GET", "/adapters/Not%0aA%20Name", "/adapters/{name}", 422, "refused"),
        ("POST", "/v1/generate/elsewhere?key=ob_1_2", None, 404, "refused"),
        ("DELETE", "/v1/usage", "/v1/usage", 405, "refused"),
    ]
    for number, (method, path, route, status, outcome) in enumerate(calls):
        server.http.request(method, path, headers={"x-request-id": f"c{number}"})
        line = lines.of(f"c{number}")
        assert (line["method"], line.get("route"), line["status"], line["outcome"]) == (method, route, status, outcome)
    assert [lines.of(f"c{number}").get("adapter") for number in range(3)] == ["a", "nobody", None]
    assert "ob_1_2" not in lines.path.read_text()
    server.http.request("MADEUP", "/v1/usage", headers={"x-request-id": "c9"})
    assert (lines.of("c9")["method"], lines.of("c9")["status"]) == ("_OTHER", 405)
    assert "MADEUP" not in lines.path.read_text()


def test_probes_are_not_worth_a_line(server, lines):
    for path in ("/healthz", "/readyz", "/metrics"):
        assert server.http.get(path).status_code == 200
    assert server.http.get("/adapters", headers={"x-request-id": "last"}).status_code == 200
    lines.of("last")
    assert [one["route"] for one in lines.all() if one["event"] == "request"] == ["/adapters"]


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes(server, lines, gate, stream):
    body = {"prompt": "hello", "max_tokens": 50, "ignore_eos": True, "stream": stream, "n": 2}
    with httpx.Client(base_url=server.url, headers={"x-request-id": "gone"}) as client:
        if stream:
            gate.open()
            with client.stream("POST", "/v1/generate", json=body) as response:
                next(response.iter_raw())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/generate", json=body, timeout=0.5)
            gate.open()
    line = lines.of("gone")
    assert (line["outcome"], line["finish_reasons"]) == ("cancelled", ["cancelled", "cancelled"])
    assert line["completion_tokens"] < 100


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("stream", [True, False])
def test_a_step_that_fails(server, lines, monkeypatch, stream):
    def broken(work, copy):
        raise RuntimeError("out of something")

    monkeypatch.setattr(server.runner, "run", broken)
    ask(server, "broken", stream=stream)
    line = lines.of("broken")
    assert (line["outcome"], line["code"], line["status"], line["level"]) == ("error", "engine_failure", 500, "warning")
    assert line["finish_reasons"] == ["error"]
    assert line["cost_microusd"] == 0
    assert any("out of something" in one.get("exception", "") for one in lines.all())


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("stream", [True, False])
def test_an_end_that_cannot_be_written_down(server, lines, monkeypatch, stream):
    def full(record):
        raise LedgerUnavailable("not now")

    monkeypatch.setattr(server.state.accounts.ledger, "close", full)
    ask(server, "unwritten", stream=stream)
    line = lines.of("unwritten")
    assert (line["outcome"], line["code"]) == ("error", "ledger_unavailable")
    assert line["status"] == (200 if stream else 503)


def test_a_fault_of_our_own(server, lines, monkeypatch):
    def broken(*arguments, **more):
        raise RuntimeError("never thought of")

    monkeypatch.setattr(server.state.registry, "acquire", broken)
    assert ask(server, "ours", adapter="a").status_code == 500
    line = lines.of("ours")
    assert (line["outcome"], line["code"], line["status"]) == ("error", "internal_error", 500)
    (said,) = until(lambda: [one for one in lines.all() if one["event"] == "unexpected fault"])
    assert said["request_id"] == "ours", "its traceback can be found"


def test_what_is_told_of_a_request_changes_nothing_of_it(server, lines, monkeypatch):
    def broken(trail):
        raise RuntimeError("cannot be told")

    class Traces:
        record = staticmethod(broken)

    monkeypatch.setattr(server.state, "traces", Traces())
    assert ask(server, "untold").status_code == 200
    until(lambda: [one for one in lines.all() if one["event"] == "a request could not be told of"])


def test_no_prompt_but_where_it_is_asked_for(server, lines, monkeypatch):
    chat = [{"role": "user", "content": WORDS}, {"role": "assistant", "content": "\n"}]
    ask(server, "p0", prompt=WORDS, stop=[WORDS])
    ask(server, "p1", prompt=None, messages=chat)
    ask(server, "p2", prompt=WORDS, adapter="nobody")
    for number in range(3):
        lines.of(f"p{number}")
    assert WORDS not in lines.path.read_text()
    monkeypatch.setattr(server.state.settings, "log_prompts", True)
    ask(server, "p3", prompt=WORDS)
    ask(server, "p4", prompt=None, messages=chat)
    ask(server, "p5", prompt=WORDS * 1000, adapter="nobody")
    ask(server, "p6", prompt=[1, 2, 3])
    found = [lines.of(f"p{number}")["prompt"] for number in range(3, 7)]
    assert found == [WORDS, f"user: {WORDS}\nassistant: \n", (WORDS * 1000)[: trails.PROMPT_CHARACTERS], "[1, 2, 3]"]


def test_a_name_cannot_forge_a_line(server, lines):
    forged = '\n{"event":"request","request_id":"forged"}\n'
    server.http.get(f"/adapters/{httpx.QueryParams({'x': forged})}", headers={"x-request-id": "f0"})
    ask(server, "f1", adapter=forged)
    with httpx.Client(base_url=server.url) as client:
        client.get("/adapters", headers={"x-request-id": "f2 \x1b[2J", "authorization": f"Bearer {forged.strip()}"})
    lines.of("f0")
    lines.of("f1")
    until(lambda: [one for one in lines.all() if one.get("route") == "/adapters"])
    assert not [one for one in lines.all() if one.get("request_id") in ("forged", "f2 \x1b[2J")]


def test_no_secret_is_in_any_line(base, adapters, tmp_path, lines, monkeypatch):
    """Every kind of request, by two tenants and by nobody, to a server that has secrets and a sink that is down."""
    said = io.StringIO()
    monkeypatch.setattr("sys.stderr", said)
    options = {"events_url": "http://127.0.0.1:1/events", "events_token": TOKEN, "auth": "on"}
    with Server(base, tmp_path / "data", **options) as server:
        admin = said.getvalue().split("this once:\n")[1].split()[0]
        tokens = [admin]
        salts = []
        for name in ("one", "two"):
            as_admin = {"authorization": f"Bearer {admin}"}
            server.http.post("/admin/tenants", json={"id": name}, headers=as_admin)
            scopes = {"scopes": ["generate", "adapters:write", "usage:read"]}
            key = server.http.post(f"/admin/tenants/{name}/keys", json=scopes, headers=as_admin).json()
            tokens.append(key["token"])
            salts.append(server.state.accounts.directory.show(name).salt)
            headers = {"authorization": f"Bearer {key['token']}", "x-request-id": f"by-{name}"}
            assert server.put("own", adapters[0], headers=headers | {"x-request-id": "put"}).status_code == 201
            body = {"prompt": WORDS, "max_tokens": 4, "adapter": "own", "ignore_eos": True}
            assert server.http.post("/v1/generate", json=body, headers=headers).status_code == 200
            line = lines.of(f"by-{name}")
            assert (line["tenant"], line["key_id"]) == (name, key["id"])
            for bad in ({"adapter": "nobody"}, {"max_tokens": 0}, {"prompt": WORDS * 1000}, {"stop": [WORDS] * 99}):
                headers["x-request-id"] = "bad"
                assert server.http.post("/v1/generate", json=body | bad, headers=headers).status_code >= 400
            server.http.get(f"/v1/usage?key={key['token']}", headers=headers)
        for header in ("Bearer ob_00000000_wrong", f"Basic {tokens[1]}", f"Bearer {tokens[1]}x"):
            refused(server.http.get("/adapters", headers={"authorization": header, "x-request-id": "who"}), 401)
        assert lines.of("by-two")["tenant"] == "two"
        until(lambda: [one for one in lines.all() if one["logger"] == "onebase.outbox"])
    text = lines.path.read_text()
    assert '"code": "invalid_api_key"' in text
    secrets = [TOKEN, WORDS, WORDS.split()[-1], *(token.rpartition("_")[2] for token in tokens)]
    secrets += [form for salt in salts for form in (salt.hex(), repr(salt)[2:-1])]
    assert not [secret for secret in secrets if secret in text]
    assert not re.search(r"ob_[0-9a-z]+_", text)
