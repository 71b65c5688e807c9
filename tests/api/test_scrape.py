"""`/metrics` over HTTP: who sees what, and that it tells what happened."""

import io

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.metrics.families import FAMILIES
from tests.serving import Server, refused, until

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
ELSEWHERE = {  # families that another setting or machine has
    "onebase_device_memory_bytes",
    "onebase_outbox_oldest_seconds",
    "onebase_outbox_waiting",
    "onebase_outbox_failures",
    "onebase_outbox_events",
}


class Guarded:
    """A server with AUTH on, where tenant `acme` may generate."""

    def __init__(self, server: Server, admin: str):
        self.server, self.admin = server, admin
        assert self.call("POST", "/admin/tenants", json={"id": "acme", "limits": {"rpm_limit": 3}}).status_code == 201
        self.acme = self.key("acme", "generate", "adapters:write")

    def call(self, method: str, path: str, key: str | None = None, **more) -> httpx.Response:
        headers = {"authorization": f"Bearer {key or self.admin}"}
        return self.server.http.request(method, path, headers=headers, **more)

    def key(self, tenant: str, *scopes: str) -> str:
        made = self.call("POST", f"/admin/tenants/{tenant}/keys", json={"scopes": list(scopes)})
        assert made.status_code == 201, made.text
        return made.json()["token"]


@pytest.fixture(scope="module")
def guarded(base, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        said = io.StringIO()
        patch.setattr("sys.stderr", said)
        server = Server(base, tmp_path_factory.mktemp("data"), auth="on", vllm_metrics=True, metrics_top=2)
        server.__enter__()
    yield Guarded(server, said.getvalue().split("this once:\n")[1].split()[0])
    server.idle()
    server.__exit__()


def samples(response: httpx.Response) -> dict[tuple, float]:
    """By name and label values, in the order of the labels' names."""
    assert response.status_code == 200, response.text
    found = [one for family in text_string_to_metric_families(response.text) for one in family.samples]
    values = {(one.name, *one.labels.values()): one.value for one in found}
    assert len(values) == len(found), "no series comes twice"
    return values


def test_without_a_key_no_label_names_a_tenant_or_an_adapter(guarded, adapters):
    config, weights = (
        (adapters[0] / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    put = guarded.call("PUT", "/adapters/secret", guarded.acme, files={"config": config, "weights": weights})
    assert put.status_code == 201, put.text
    body = {"prompt": "hello", "max_tokens": 3, "adapter": "secret", "ignore_eos": True}
    for wanted in (200, 200, 200, 429):
        assert guarded.call("POST", "/v1/generate", guarded.acme, json=body).status_code == wanted
    without = guarded.server.http.get("/metrics")
    assert "secret" not in without.text
    assert "acme" not in without.text
    assert "vllm:num_requests_waiting" in without.text
    everything = samples(guarded.call("GET", "/metrics", guarded.key("default", "metrics:read")))
    assert everything["onebase_adapter_requests_total", "secret", "finished", "acme"] == 3
    assert everything["onebase_adapter_tokens_total", "secret", "completion", "acme"] == 9
    assert everything["onebase_adapter_cold_starts_total", "secret", "acme"] == 1
    assert everything["onebase_tenant_limit_refusals_total", "requests_limit", "acme"] == 1
    assert everything["onebase_tenant_ttft_seconds_count", "acme"] == 3
    assert everything["onebase_http_responses_total", "generate", "429"] == 1
    assert everything["onebase_http_responses_total", "generate", "2xx"] == 3
    bill = guarded.call("GET", "/v1/usage?group_by=adapter&tenant=acme", guarded.key("default", "usage:read", "admin"))
    cost = sum(row["cost_microusd"] for row in bill.json()["data"])
    assert everything["onebase_adapter_cost_microusd_total", "secret", "acme"] == cost
    named = {key for key in everything if key[0] == "vllm:lora_requests_info"}
    assert named == {("vllm:lora_requests_info", "32", "secret", "")}


def test_a_wrong_key_is_refused_and_so_is_one_without_the_scope(guarded):
    assert refused(guarded.call("GET", "/metrics", "ob_0123456789abcdef_" + "x" * 43), 401)["code"] == "invalid_api_key"
    assert refused(guarded.call("GET", "/metrics", guarded.acme), 403)["code"] == "scope_missing"
    admin = samples(guarded.call("GET", "/metrics"))
    assert ("onebase_tenant_running", "other") in admin


def test_a_scrape_has_every_family_and_still_is_text_0_0_4(guarded):
    response = guarded.server.http.get(
        "/metrics", headers={"accept": OPENMETRICS, "authorization": f"Bearer {guarded.admin}"}
    )
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "# EOF" not in response.text
    found = {family.name: family for family in text_string_to_metric_families(response.text)}
    wanted = {family.name: family for family in FAMILIES if family.name not in ELSEWHERE}
    assert set(wanted) <= set(found)
    for name, family in wanted.items():
        assert found[name].type == family.kind, name
        assert found[name].documentation == family.help
        for sample in found[name].samples:
            assert set(sample.labels) - {"le"} == set(family.labels), name
    others = {name.partition("_")[0] for name in set(found) - set(wanted)}
    assert others <= {"process", "python"}


def test_tokens_by_adapter_add_up_to_the_engines(server):
    def totals() -> dict[str, float]:
        values = samples(server.http.get("/metrics"))
        by_adapter = {
            kind: sum(v for key, v in values.items() if key[0] == "onebase_adapter_tokens_total" and key[2] == kind)
            for kind in ("prompt", "cached", "completion")
        }
        engine = {
            "prompt": values["onebase_prompt_tokens_total",],
            "cached": values["onebase_cached_tokens_total",],
            "completion": values["onebase_generation_tokens_total",],
        }
        assert by_adapter == engine
        return engine

    before = totals()
    for adapter in (None, "a", None):
        server.generate(adapter=adapter, max_tokens=4, ignore_eos=True, prompt="a prompt that is longer than a block")
    server.idle()
    assert totals()["completion"] == before["completion"] + 12


def test_times_and_steps_are_counted(server):
    before = samples(server.http.get("/metrics"))
    server.generate(adapter="a", max_tokens=5, ignore_eos=True)
    server.idle()
    after = samples(server.http.get("/metrics"))

    def grown(*key) -> float:
        return after[key] - before[key]

    for name, count in (
        ("time_to_first_token_seconds", 1),
        ("inter_token_latency_seconds", 4),
        ("e2e_request_latency_seconds", 1),
        ("request_queue_time_seconds", 1),
        ("request_prefill_time_seconds", 1),
        ("request_decode_time_seconds", 1),
    ):
        assert grown(f"onebase_{name}_count", "shared") == count, name
        assert grown(f"onebase_{name}_count", "base") == 0, name
    assert grown("onebase_engine_step_seconds_count", "shared") == grown("onebase_engine_steps_total") == 5
    assert grown("onebase_request_success_total", "length") == 1
    assert grown("onebase_forward_sampled_seconds_total") > grown("onebase_lora_seconds_total") > 0
    assert after["onebase_engine_stepping",] == 1
    assert after["onebase_engine_last_step_timestamp_seconds",] > 1.7e9
    assert after["onebase_queue_requests",] == after["onebase_queue_tokens",] == 0
    assert after["process_resident_memory_bytes",] > 1e6
    assert "vllm:num_requests_running" not in {key[0] for key in after}, "nobody asked for them"


def test_a_full_queue_and_a_draining_server_are_told_apart(server, monkeypatch):
    def refusals() -> tuple[float, ...]:
        values = samples(server.http.get("/metrics"))
        return tuple(values["onebase_queue_refusals_total", why] for why in ("requests", "tokens", "draining"))

    before = refusals()
    client = server.state.client
    most = client.bounds.max_amount
    full = ((client.bounds, "max_requests", 0), (client.bounds, "amount", most), (client, "draining", True))
    for owner, name, value in full:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert server.http.post("/v1/generate", json={"prompt": "x", "max_tokens": 2}).status_code == 503
    assert tuple(now - then for now, then in zip(refusals(), before, strict=True)) == (1, 1, 1)


def test_an_engine_that_has_died_does_not_step(server, monkeypatch):
    monkeypatch.setattr(server._uvicorn, "engine_failed", True)  # else it would stop, as it should
    monkeypatch.setattr(type(server.engine), "alive", False)
    assert samples(server.http.get("/metrics"))["onebase_engine_stepping",] == 0


def test_scrapes_beside_requests_always_parse(server):
    with server.open_stream(max_tokens=64, ignore_eos=True) as response:
        lines = response.iter_lines()
        next(lines)
        for _ in range(5):
            samples(server.http.get("/metrics"))
        for _ in lines:
            pass
    until(lambda: server.engine.stats.running == 0)
