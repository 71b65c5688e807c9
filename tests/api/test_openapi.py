"""Fuzzing from the OpenAPI document: nothing but what it says comes back."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serving import ENVELOPE, refused

CHECKS = [content_type_conformance, response_schema_conformance, status_code_conformance]
OPERATIONS = [
    ("POST", "/v1/generate"),
    ("GET", "/adapters"),
    ("GET", "/adapters/{name}"),
    ("PUT", "/adapters/{name}"),
    ("PATCH", "/adapters/{name}"),
    ("DELETE", "/adapters/{name}"),
    ("GET", "/adapters/{name}/versions"),
    ("POST", "/adapters/{name}/rollback"),
    ("GET", "/v1/usage"),
    ("GET", "/v1/invoices/{month}"),
    ("POST", "/admin/tenants"),
    ("GET", "/admin/tenants"),
    ("GET", "/admin/tenants/{tenant}"),
    ("PATCH", "/admin/tenants/{tenant}"),
    ("POST", "/admin/tenants/{tenant}/disable"),
    ("GET", "/admin/tenants/{tenant}/adapters"),
    ("DELETE", "/admin/tenants/{tenant}/adapters/{name}"),
    ("POST", "/admin/tenants/{tenant}/keys"),
    ("GET", "/admin/tenants/{tenant}/keys"),
    ("DELETE", "/admin/tenants/{tenant}/keys/{key}"),
    ("GET", "/admin/prices"),
    ("PUT", "/admin/prices"),
    ("POST", "/admin/events/revive"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
]


@pytest.fixture(scope="module")
def options():
    return {"max_context": 48, "max_upload_bytes": 100_000}


@pytest.fixture(scope="module")
def document(server):
    return server.http.get("/openapi.json").json()


def answer_is_documented(server, case):
    response = case.call(base_url=server.url)
    assert response.status_code < 500 or response.status_code in (503, 507), response.text
    assert response.headers["x-request-id"]
    if response.status_code >= 400:
        assert set(response.json()["error"]) == ENVELOPE
        assert "Traceback" not in response.text
    case.validate_response(response, checks=CHECKS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_only_documented_answers_come_back(server, document, method, path):
    @given(case=schemathesis.openapi.from_dict(document)[path][method].as_strategy())
    @settings(
        max_examples=60 if method in ("POST", "PUT", "PATCH") else 15,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def fuzz(case):
        answer_is_documented(server, case)

    fuzz()


def test_every_operation_is_fuzzed(document):
    assert {(method.upper(), path) for path, ways in document["paths"].items() for method in ways} == set(OPERATIONS)


def test_the_document_shows_the_envelope_and_both_kinds_of_answer(document):
    paths = document["paths"]
    assert set(paths["/v1/generate"]["post"]["responses"]["200"]["content"]) == {
        "application/json",
        "text/event-stream",
    }
    assert {"200", "201", "4XX", "5XX"} <= set(paths["/adapters/{name}"]["put"]["responses"])
    for path in paths.values():
        for operation in path.values():
            assert "422" not in operation["responses"]
            assert "ErrorEnvelope" in str(operation["responses"]["4XX"])


def test_the_document_says_which_operations_need_a_key(document):
    assert document["components"]["securitySchemes"]["key"].items() >= {"type": "http", "scheme": "bearer"}.items()
    for path, ways in document["paths"].items():
        for operation in ways.values():
            expected = None if path in ("/healthz", "/readyz", "/metrics") else [{"key": []}]
            assert operation.get("security") == expected, path


def test_no_pages_with_scripts_from_elsewhere(server):
    for path in ("/docs", "/redoc"):
        refused(server.http.get(path), 404)


def test_nothing_is_held_after_all_that(server):
    server.idle()
