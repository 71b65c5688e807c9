"""A tenant that is disabled: what it had published and merged, and an operator who removes it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from server.core import AdapterRef
from server.errors import Conflict
from tests.families import adapter_bytes
from tests.serving import refused, until
from tests.tenancy import PROMPT, Account, Admin


def put(account: Account, name: str, folder: Any) -> Any:
    config, weights = adapter_bytes(folder)
    return account.http.put(f"/adapters/{name}", files={"config": config, "weights": weights})


def names(account: Account) -> list[str]:
    return [one["name"] for one in account.http.get("/adapters").json()["data"]]


def publisher(admin: Admin, name: str, folder: Any) -> Account:
    """A tenant that has published an adapter of that name, with a pinned copy of its own."""
    account = admin.tenant()
    assert put(account, name, folder).status_code == 201
    body = {"public": True, "lane": "merged", "pinned": True}
    assert account.http.patch(f"/adapters/{name}", json=body).status_code == 200
    return account


def test_what_a_disabled_tenant_published_is_nobodys_until_it_is_enabled(admin, adapters):
    ann, bob = publisher(admin, "tone", adapters[0]), admin.tenant()
    assert bob.costs(adapter="tone")["adapter"]["lane"] == "merged"
    paths = (f"/admin/tenants/{ann.name}/disable", {}), (f"/admin/tenants/{ann.name}", {"disabled": True})
    for method, (path, body) in zip(("POST", "PATCH"), paths, strict=True):
        assert admin.http.request(method, path, json=body or None).status_code == 200
        assert admin.server.engine._merged.nbytes == 0, "its room is for others"
        told = []
        for name in ("tone", "nobodys"):
            for refusal in (bob.generate(adapter=name), bob.http.get(f"/adapters/{name}")):
                told.append(refused(refusal, 404, "adapter") | {"message": name})
        assert {(one["code"], one["type"]) for one in told} == {("adapter_not_found", "not_found_error")}
        assert bob.generate(adapter="tone").json()["error"]["message"] == "there is no adapter tone"
        assert names(bob) == []
        assert (ann.name, "tone") in admin.server.state.registry.snapshot(), "what it stores stays on its bill"
        admin.change(ann, disabled=False)
        assert names(bob) == ["tone"]
        until(lambda: ann.http.get("/adapters/tone").json()["lane"] == "merged")
        assert ann.http.get("/adapters/tone").json()["pinned"] is True
        assert bob.costs(adapter="tone")["adapter"]["lane"] == "merged"
    ann.http.delete("/adapters/tone")


def test_a_request_that_runs_on_it_is_finished(admin, adapters, monkeypatch):
    ann, bob = publisher(admin, "going", adapters[0]), admin.tenant()
    run = admin.server.runner.run
    body = PROMPT | {"adapter": "going", "stream": True, "max_tokens": 40, "ignore_eos": True}
    monkeypatch.setattr(admin.server.runner, "run", lambda *parts: (time.sleep(0.02), run(*parts))[1])
    with bob.http.stream("POST", "/v1/generate", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        assert admin.http.post(f"/admin/tenants/{ann.name}/disable").status_code == 200
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert admin.http.delete(f"/admin/tenants/{ann.name}/adapters/going").status_code == 204
    admin.server.idle()


def test_a_disabled_tenant_gets_no_lane(admin, adapters):
    ann = admin.tenant()
    digest = put(ann, "late", adapters[0]).json()["digest"]
    admin.http.post(f"/admin/tenants/{ann.name}/disable")
    lanes = admin.server.state.registry.moves.lanes
    with pytest.raises(Conflict) as refusal:
        lanes.enter(AdapterRef("late", 1, digest, 4, ann.name), False)
    assert refusal.value.code == "tenant_disabled"
    admin.http.delete(f"/admin/tenants/{ann.name}/adapters/late")


def test_an_operator_looks_at_a_departed_tenants_adapters_and_removes_them(admin, adapters):
    ann, bob = publisher(admin, "b", adapters[0]), admin.tenant()
    for name in ("a", "c"):
        put(ann, name, adapters[1])
    put(bob, "bobs", adapters[0])
    bob.http.patch("/adapters/bobs", json={"public": True})
    admin.http.post(f"/admin/tenants/{ann.name}/disable")
    path = f"/admin/tenants/{ann.name}/adapters"
    first = admin.http.get(path, params={"limit": 2}).json()
    assert [(one["name"], one["own"], one["public"]) for one in first["data"]] == [
        ("a", True, False),
        ("b", True, True),
    ]
    assert first["next"] == "b"
    second = admin.http.get(path, params={"limit": 2, "after": "b"}).json()
    assert ([one["name"] for one in second["data"]], second["next"]) == (["c"], None), "not what others published"
    put(bob, "b", adapters[0])
    taken = bob.http.patch("/adapters/b", json={"public": True})
    assert refused(taken, 409, "public")["code"] == "name_published", "it may come back"
    wrong = admin.http.delete(f"{path}/b", headers={"If-Match": '"sha256:0"'})
    refused(wrong, 412, "if-match")
    for name in ("a", "b", "c"):
        assert admin.http.delete(f"{path}/{name}").status_code == 204
    assert admin.http.get(path).json() == {"data": [], "next": None}
    refused(admin.http.delete(f"{path}/b"), 404, "adapter")
    refused(admin.http.delete(f"{path}/No"), 422, "name")
    for call in ("GET", "/admin/tenants/nobody/adapters"), ("DELETE", "/admin/tenants/nobody/adapters/b"):
        assert refused(admin.http.request(*call), 404, None)["code"] == "tenant_not_found"
    assert bob.http.patch("/adapters/b", json={"public": True}).status_code == 200, "the name is free"
    for name in ("b", "bobs"):
        bob.http.delete(f"/adapters/{name}")
