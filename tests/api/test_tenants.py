"""Keys, scopes, limits and prices over HTTP, with AUTH on."""

import time

import pytest

from server.api.page import PATHS
from tests.serving import refused
from tests.tenancy import PROMPT

OPEN = {"/healthz", "/readyz", "/metrics", "/openapi.json", *PATHS}


def routes(router) -> list[tuple[str, str]]:
    """Every method and path, of the routers that were included too, but for what is open."""
    found = []
    for route in router.routes:
        if hasattr(route, "original_router"):
            found += routes(route.original_router)
        elif route.path not in OPEN:
            found += [(method, route.path) for method in route.methods]
    return found


def test_every_route_needs_a_key_before_it_reads_the_body(admin):
    found = routes(admin.server.app)
    assert {path for _, path in found} >= {"/v1/generate", "/adapters/{name}", "/v1/usage", "/admin/tenants"}
    paths = admin.server.http.get("/openapi.json").json()["paths"]
    documented = set(paths)
    assert {path for _, path in found} == documented - OPEN
    keyed = {(method.upper(), path) for path, ways in paths.items() for method in ways if "security" in ways[method]}
    assert keyed == set(found), "what needs a key says so, and nothing else does"
    assert OPEN - documented == {"/openapi.json", *PATHS}
    wrong = [None, "nonsense", "ob_0123456789abcdef_" + "x" * 43, admin.token[:-1] + "!", admin.token[:-2]]
    same = set()
    for token in wrong:
        http = admin.client(token)
        for method, path in found:
            for send in ({}, {"content": b"{not json", "headers": {"content-type": "application/json"}}):
                response = http.request(method, path.replace("{name}", "a").replace("{tenant}", "default"), **send)
                assert refused(response, 401, None)["code"] == "invalid_api_key", (method, path)
                assert response.headers["www-authenticate"].startswith("Bearer")
                same.add(response.content)
    assert len(same) == 1


def test_what_is_open_needs_no_key(admin):
    http = admin.client(None)
    for path in OPEN:
        assert http.get(path).status_code == 200, path


def test_each_scope_allows_its_own_calls_only(admin, adapters):
    name = admin.tenant().name
    put = {"files": {"config": (adapters[0] / "adapter_config.json").read_bytes()}}
    calls = {
        "generate": ("POST", "/v1/generate", {"json": PROMPT}),
        "adapters:write": ("DELETE", "/adapters/none", {}),
        "usage:read": ("GET", "/v1/usage", {}),
        "admin": ("GET", "/admin/tenants", {}),
    }
    for scope in calls:
        http = admin.client(admin.key(name, [scope])["token"])
        for needed, (method, path, more) in calls.items():
            response = http.request(method, path, **more)
            if needed == scope:
                assert response.status_code in (200, 404), response.text
            else:
                assert refused(response, 403)["code"] == "scope_missing"
        assert http.get("/adapters").status_code == 200, "any key lists its own adapters"
        if scope != "adapters:write":
            refused(http.put("/adapters/x", **put), 403)
        if scope != "admin":
            for path in (f"/admin/tenants/{name}/keys", "/admin/prices", "/admin/tenants/nobody"):
                refused(http.get(path), 403)


def test_a_key_is_rotated_with_both_valid_and_revoked(admin):
    account = admin.tenant()
    second = admin.key(account.name, ["generate"], name="second")
    other = admin.client(second["token"])
    assert account.generate().status_code == other.post("/v1/generate", json=PROMPT).status_code == 200
    assert admin.http.delete(f"/admin/tenants/{account.name}/keys/{account.key['id']}").status_code == 204
    refused(account.generate(), 401)
    assert other.post("/v1/generate", json=PROMPT).status_code == 200
    assert admin.http.delete(f"/admin/tenants/{account.name}/keys/{account.key['id']}").status_code == 204
    listed = {key["id"]: key for key in admin.http.get(f"/admin/tenants/{account.name}/keys").json()["data"]}
    assert set(listed) == {account.key["id"], second["id"]}
    assert listed[account.key["id"]]["revoked"] > 0
    assert listed[second["id"]] == {name: value for name, value in second.items() if name != "token"}
    wrong = admin.http.delete(f"/admin/tenants/default/keys/{second['id']}")
    assert refused(wrong, 404)["code"] == "key_not_found"


def test_a_key_expires(admin, monkeypatch):
    account = admin.tenant()
    key = admin.key(account.name, ["generate"], expires=time.time() + 3600)
    http = admin.client(key["token"])
    assert http.post("/v1/generate", json=PROMPT).status_code == 200
    monkeypatch.setattr(admin.server.state.accounts.directory, "_clock", lambda: time.time() + 3600)
    refused(http.post("/v1/generate", json=PROMPT), 401)
    assert account.generate().status_code == 200
    for expires in ("", "yesterday", "2001-01-01T00:00:00Z", 1, -1, True, 2**60):
        body = {"scopes": ["generate"], "expires": expires}
        refused(admin.http.post(f"/admin/tenants/{account.name}/keys", json=body), 422, "expires")
    iso = admin.key(account.name, ["generate"], expires="2100-01-01")
    assert iso["expires"] == 4102444800.0


def test_a_disabled_tenants_running_request_finishes(admin, monkeypatch):
    account = admin.tenant()
    run = admin.server.runner.run
    monkeypatch.setattr(admin.server.runner, "run", lambda *parts: (time.sleep(0.05), run(*parts))[1])
    body = PROMPT | {"stream": True, "max_tokens": 10, "ignore_eos": True}
    with account.http.stream("POST", "/v1/generate", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        shown = admin.http.post(f"/admin/tenants/{account.name}/disable").json()
        assert (shown["disabled"], shown["running"]) == (True, 1)
        refused(account.generate(), 401)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    admin.change(account, disabled=False)
    assert account.generate().status_code == 200
    for refusal in (
        admin.http.post("/admin/tenants/default/disable"),
        admin.http.patch("/admin/tenants/default", json={"disabled": True}),
    ):
        assert refused(refusal, 409)["code"] == "own_tenant"


def test_a_changed_limit_is_in_force_for_the_next_request(admin):
    account = admin.tenant(limits={"rpm_limit": 1000})
    answer = account.generate()
    assert answer.headers["x-ratelimit-limit-requests"] == "1000"
    shown = admin.change(account, limits={"rpm_limit": 2, "tpm_limit": 500}, weight=2)
    assert (shown["limits"]["rpm_limit"], shown["limits"]["tpm_limit"], shown["weight"]) == (2, 500, 2.0)
    assert account.generate().status_code == 200
    response = account.generate()
    assert refused(response, 429)["code"] == "requests_limit"
    assert int(response.headers["retry-after"]) >= 1
    assert response.headers["x-ratelimit-remaining-requests"] == "0"
    shown = admin.change(account, limits={"rpm_limit": None})
    assert (shown["limits"]["rpm_limit"], shown["limits"]["tpm_limit"]) == (None, 500), "the other one stays"
    assert account.generate().status_code == 200
    page = admin.client(None).get("/metrics").text
    assert 'onebase_limit_refusals_total{code="requests_limit"}' in page
    assert account.name not in page


def test_a_new_budget_counts_what_was_spent_before(admin):
    account = admin.tenant()
    spent = account.costs(max_tokens=20, ignore_eos=True)["usage"]["cost_microusd"]
    assert spent > 0
    shown = admin.change(account, limits={"max_budget": spent, "budget_duration": "30d"})
    assert shown["budget_left"] == 0
    assert refused(account.generate(), 429)["code"] == "budget_exhausted"
    assert admin.change(account, limits={"max_budget": spent + 50})["budget_left"] == 50
    assert account.generate().status_code == 200
    assert admin.change(account, limits={"max_budget": None})["budget_left"] is None


def test_classes_and_prices_of_a_tenant(admin):
    account = admin.tenant(classes=["interactive"], prices={"completion": 10**9})
    assert refused(account.generate(priority="batch"), 403)["code"] == "class_not_allowed"
    used = account.costs()["usage"]
    assert used["cost_microusd"] >= used["completion_tokens"] * 1000
    shown = admin.change(
        account, prices={"completion": None, "prompt": 0, "cached": 0}, classes=["batch", "interactive"]
    )
    assert shown["prices"] == {"prompt": 0, "cached": 0}
    assert account.costs(priority="batch")["usage"]["cost_microusd"] < 1000


def test_a_new_price_book_holds_for_the_next_request(admin):
    account = admin.tenant()
    before = admin.http.get("/admin/prices").json()
    dear = {name: price for name, price in before.items() if name != "version"} | {"completion": 5 * 10**9}
    changed = admin.http.put("/admin/prices", json=dear)
    assert changed.status_code == 200, changed.text
    assert changed.json() == dear | {"version": before["version"] + 1}
    assert admin.http.get("/admin/prices").json() == changed.json()
    used = account.costs()["usage"]
    assert used["cost_microusd"] >= used["completion_tokens"] * 5000
    cheap = {name: price for name, price in before.items() if name != "version"}
    assert admin.http.put("/admin/prices", json=cheap).json()["version"] == before["version"] + 2
    for wrong in ({"prompt": -1}, {"rank_classes": [[8, 1], [8, 1]]}, {"rank_classes": [[8]]}, {"version": 9}):
        refused(admin.http.put("/admin/prices", json=cheap | wrong), 422)
    refused(admin.http.put("/admin/prices", json={"prompt": 1}), 422, "cached")


def test_a_cached_token_never_costs_more_than_a_fresh_one(admin):
    before = admin.http.get("/admin/prices").json()
    book = {name: price for name, price in before.items() if name != "version"}
    dear = {"prompt": 100_000_000, "cached": 100_000_000}
    refused(admin.http.put("/admin/prices", json=book | {"cached": book["prompt"] + 1}), 422, "cached")
    account = admin.tenant(prices=dear)
    for wrong in ({"prompt": 99_999_999}, {"cached": 100_000_001}, {"prompt": None}):
        refusal = admin.http.patch(f"/admin/tenants/{account.name}", json={"prices": wrong})
        refused(refusal, 422, "prices.cached")
    refusal = admin.http.post("/admin/tenants", json={"id": "wrong", "prices": {"prompt": book["cached"] - 1}})
    refused(refusal, 422, "prices.cached")
    assert admin.http.get(f"/admin/tenants/{account.name}").json()["prices"] == dear
    other = admin.tenant(prices={"cached": book["prompt"]})
    try:  # a later book may come below what a tenant pays for cached tokens: then that is no more than the others
        assert admin.http.put("/admin/prices", json=book | {"prompt": 0, "cached": 0, "completion": 0}).is_success
        for _ in range(2):
            used = other.costs(prompt=list(range(4, 44)), max_tokens=1)["usage"]
        assert used["cached_tokens"] == 32
        assert used["cost_microusd"] == 0
    finally:
        assert admin.http.put("/admin/prices", json=book).is_success


def test_tenants_are_listed_in_pages_without_their_salt(admin):
    for _ in range(3):
        admin.tenant(customer="cus_1")
    found, after = [], ""
    while after is not None:
        page = admin.http.get("/admin/tenants", params={"limit": 2, "after": after}).json()
        assert 1 <= len(page["data"]) <= 2
        found, after = found + page["data"], page["next"]
    names = [tenant["id"] for tenant in found]
    assert names == sorted(names)
    assert "default" in names
    shown = admin.http.get(f"/admin/tenants/{names[-1]}")
    assert shown.json() == found[-1]
    assert "salt" not in shown.text


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/admin/tenants", {"id": "default"}, 409),
        ("POST", "/admin/tenants", {"id": "No"}, 422),
        ("POST", "/admin/tenants", {"id": "n", "limits": {"rpm_limit": 0}}, 422),
        ("POST", "/admin/tenants", {"id": "n", "limits": {"budget_duration": "1y"}}, 422),
        ("POST", "/admin/tenants", {"id": "n", "limits": {"rps": 1}}, 422),
        ("POST", "/admin/tenants", {"id": "n", "limits": {"max_budget": 1.5}}, 422),
        ("POST", "/admin/tenants", {"id": "n", "disabled": True}, 422),
        ("POST", "/admin/tenants", {"id": "n", "customer": "\n"}, 422),
        ("POST", "/admin/tenants", {"id": "n", "prices": {"rank_classes": [[8, 1], [4, 1]]}}, 422),
        ("PATCH", "/admin/tenants/default", {}, 422),
        ("PATCH", "/admin/tenants/default", {"weight": 0}, 422),
        ("PATCH", "/admin/tenants/default", {"classes": ["best"]}, 422),
        ("PATCH", "/admin/tenants/default", {"classes": []}, 422),
        ("PATCH", "/admin/tenants/nobody", {"weight": 1}, 404),
        ("GET", "/admin/tenants/nobody", None, 404),
        ("POST", "/admin/tenants/nobody/disable", None, 404),
        ("GET", "/admin/tenants/nobody/keys", None, 404),
        ("POST", "/admin/tenants/nobody/keys", {"scopes": ["generate"]}, 404),
        ("POST", "/admin/tenants/default/keys", {"scopes": []}, 422),
        ("POST", "/admin/tenants/default/keys", {"scopes": ["all"]}, 422),
        ("DELETE", "/admin/tenants/default/keys/none", None, 404),
        ("GET", "/v1/usage?tenant=nobody", None, 404),
        ("GET", "/v1/usage?limit=100001", None, 422),
        ("GET", "/v1/usage?from=yesterday", None, 422),
        ("GET", "/v1/usage?to=-1", None, 422),
        ("GET", "/v1/usage?after=x", None, 422),
        ("GET", "/v1/usage?form=2026-11-01", None, 422),
        ("GET", "/v1/usage?since=2026-11-01", None, 422),
        ("GET", "/v1/invoices/2026-11?tennant=default", None, 422),
        ("GET", "/adapters?tenant=default", None, 422),
        ("GET", "/admin/tenants?offset=1", None, 422),
        ("GET", "/admin/tenants/default/keys?revoked=0", None, 422),
        ("GET", "/admin/tenants/default/adapters?name=a", None, 422),
        ("GET", "/v1/invoices/2026-13", None, 422),
    ],
)
def test_what_is_refused(admin, method, path, body, status):
    refused(admin.http.request(method, path, json=body), status)


def test_a_mistyped_parameter_is_named(admin):
    told = refused(admin.http.get("/v1/usage", params={"form": "2026-11-01"}), 422, "form")
    assert told["code"] == "invalid_request"
