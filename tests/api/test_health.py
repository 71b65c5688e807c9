"""`/healthz`, `/readyz`, `/metrics`."""

from time import monotonic

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serving import Server, chat_base, refused, until

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"


def families(response):
    return {family.name: family for family in text_string_to_metric_families(response.text)}


def test_the_process_answers(server):
    assert server.http.get("/healthz").json() == {"status": "ok"}


def test_ready_while_the_engine_takes_requests(server, monkeypatch):
    assert server.http.get("/readyz").json() == {"status": "ready", "base": "tiny-llama"}
    monkeypatch.setattr(server.state.client, "draining", True)
    response = server.http.get("/readyz")
    assert refused(response, 503)["code"] == "draining"
    assert int(response.headers["retry-after"]) >= 1
    assert server.http.get("/healthz").status_code == 200


def test_not_ready_when_the_engine_has_died(server, monkeypatch):
    monkeypatch.setattr(server._uvicorn, "engine_failed", True)  # else it would stop, as it should
    monkeypatch.setattr(type(server.engine), "alive", False)
    assert refused(server.http.get("/readyz"), 503)["code"] == "not_ready"


def test_not_ready_while_a_step_hangs(server, monkeypatch):
    monkeypatch.setattr(server.engine.stats, "step_began", monotonic() - 119)
    assert server.http.get("/readyz").status_code == 200
    monkeypatch.setattr(server.engine.stats, "step_began", monotonic() - 121)
    assert refused(server.http.get("/readyz"), 503)["code"] == "not_ready"


def test_not_ready_when_every_step_fails_and_ready_again_after_one_that_does_not(server, monkeypatch):
    def broken(work, copy):
        raise RuntimeError("the device is gone")

    for failed in range(3):
        assert server.http.get("/readyz").status_code == 200, failed
        with monkeypatch.context() as patch:
            patch.setattr(server.runner, "run", broken)
            assert server.http.post("/v1/generate", json={"prompt": "x", "max_tokens": 2}).status_code == 500
    assert "3 steps failed" in refused(server.http.get("/readyz"), 503)["message"]
    server.generate()
    assert server.http.get("/readyz").status_code == 200


def test_a_server_whose_engine_failed_stops(tmp_path):
    """Its supervisor must see it go; an open request gets its error first."""

    def broken():
        raise RuntimeError("an account is broken")

    with Server(chat_base(tmp_path / "base"), tmp_path / "data") as server:
        server.engine._scheduler.schedule = broken
        response = server.http.post("/v1/generate", json={"prompt": "x", "max_tokens": 2})
        assert refused(response, 500)["message"] == "the engine failed"
        server._thread.join(10)
        assert not server._thread.is_alive()
        assert server._uvicorn.engine_failed


@pytest.mark.parametrize("accept", [None, OPENMETRICS, "application/json"])
def test_metrics_are_text_0_0_4_whatever_the_client_would_rather_have(server, accept):
    response = server.http.get("/metrics", headers={"accept": accept} if accept else {})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "# EOF" not in response.text
    found = families(response)
    assert all(name.startswith(("onebase_", "process_", "python_")) for name in found)
    assert all(family.documentation for family in found.values())
    assert {"onebase_num_requests_running", "onebase_num_requests_waiting", "onebase_kv_cache_usage_perc"} <= set(found)


def test_metrics_count_what_happens(server):
    def value(name, **labels):
        samples = families(server.http.get("/metrics"))[name].samples
        return sum(one.value for one in samples if labels.items() <= one.labels.items())

    before = value("onebase_generation_tokens"), value("onebase_requests", outcome="finished")
    server.generate(adapter="a", max_tokens=5, ignore_eos=True)
    until(lambda: value("onebase_generation_tokens") == before[0] + 5)
    assert value("onebase_requests", outcome="finished") == before[1] + 1
    assert value("onebase_adapters_registered") == 1
    assert value("onebase_adapter_slots_used") == 1
    assert value("onebase_adapter_bytes", tier="ram") > 0
    assert value("onebase_adapter_prefetches", outcome="used") == 1, "it began before the engine saw the request"
    assert value("onebase_adapter_prefetches", outcome="failed") == 0
    until(lambda: value("onebase_num_requests_running") == 0)


def test_the_bill_is_among_the_metrics_and_in_readiness(server, monkeypatch):
    server.generate()
    found = families(server.http.get("/metrics"))
    assert found["onebase_ledger_commits"].samples[0].value >= 1
    assert found["onebase_ledger_failures"].samples[0].value == 0
    assert "onebase_outbox_waiting" not in found, "no events go anywhere"
    monkeypatch.setattr(type(server.state.accounts.ledger), "healthy", False)
    assert refused(server.http.get("/readyz"), 503)["code"] == "not_ready"
