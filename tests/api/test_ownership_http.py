"""Two tenants with keys over HTTP: whose adapters they see, use and change, and how many they may keep."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from server.tenants.keys import Scope
from tests.families import adapter_bytes
from tests.serving import Server, refused


@pytest.fixture(scope="module")
def served(base, tmp_path_factory) -> Iterator[tuple[Server, dict[str, dict[str, str]]]]:
    """A server with AUTH on, and the headers of its tenants."""
    with Server(base, tmp_path_factory.mktemp("data"), auth="on") as server:
        directory, loop = server.state.accounts.directory, server.state.client.loop

        async def key(tenant: str, **quotas: int) -> dict[str, str]:
            await directory.create(tenant, **quotas)
            _, token = await directory.create_key(tenant, [Scope.GENERATE, Scope.ADAPTERS_WRITE])
            return {"Authorization": f"Bearer {token}"}

        def made(tenant: str, **quotas: int) -> dict[str, str]:
            return asyncio.run_coroutine_threadsafe(key(tenant, **quotas), loop).result(20)

        yield server, {"ann": made("ann"), "bob": made("bob"), "cyd": made("cyd", max_adapters=1), "dan": made("dan")}


def put(server: Server, name: str, folder: Any, headers: dict[str, str]) -> Any:
    config, weights = adapter_bytes(folder)
    return server.http.put(f"/adapters/{name}", files={"config": config, "weights": weights}, headers=headers)


def names(server: Server, headers: dict[str, str]) -> dict[str, bool]:
    return {one["name"]: one["own"] for one in server.http.get("/adapters", headers=headers).json()["data"]}


def test_private_until_published(served, adapters):
    server, keys = served
    body = {"adapter": "tone", "prompt": "hello", "max_tokens": 4}
    digest = put(server, "tone", adapters[0], keys["ann"]).json()["digest"]
    assert put(server, "same", adapters[0], keys["bob"]).json()["digest"] == digest
    for name in ("tone", "nobodys"):
        calls = [
            server.http.get(f"/adapters/{name}", headers=keys["bob"]),
            server.http.get(f"/adapters/{name}/versions", headers=keys["bob"]),
            server.http.patch(f"/adapters/{name}", json={"public": True}, headers=keys["bob"]),
            server.http.delete(f"/adapters/{name}", headers=keys["bob"]),
            server.http.post("/v1/generate", json=body | {"adapter": name}, headers=keys["bob"]),
        ]
        told = [refused(answer, 404, "adapter") for answer in calls]
        assert {(one["message"], one["code"]) for one in told} == {(f"there is no adapter {name}", "adapter_not_found")}
    assert names(server, keys["bob"]) == {"same": True}
    first = server.http.post("/v1/generate", json=body, headers=keys["ann"]).json()["adapter"]
    assert (first["digest"], first["cold"]) == (digest, True)
    assert server.http.get("/adapters/same", headers=keys["bob"]).json()["residency"] == "disk"
    own = server.http.post("/v1/generate", json=body | {"adapter": "same"}, headers=keys["bob"]).json()["adapter"]
    assert (own["digest"], own["cold"]) == (digest, True), "that another has the same bytes there does not show"
    status = server.http.patch("/adapters/tone", json={"public": True}, headers=keys["ann"]).json()
    assert (status["public"], status["own"], status["requests"]) == (True, True, 1)
    assert names(server, keys["bob"]) == {"same": True, "tone": False}
    seen = server.http.get("/adapters/tone", headers=keys["bob"]).json()
    assert (seen["own"], seen["requests"], seen["in_flight"], seen["last_used"]) == (False, 0, 0, None)
    used = server.http.post("/v1/generate", json=body, headers=keys["bob"]).json()["adapter"]
    assert (used["name"], used["digest"], used["cold"]) == ("tone", digest, False)
    for forbidden in (
        server.http.delete("/adapters/tone", headers=keys["bob"]),
        server.http.patch("/adapters/tone", json={"public": False}, headers=keys["bob"]),
        server.http.post("/adapters/tone/rollback", json={"version": 1}, headers=keys["bob"]),
    ):
        assert refused(forbidden, 403, "adapter")["code"] == "forbidden"
    assert put(server, "tone", adapters[1], keys["bob"]).status_code == 201
    taken = server.http.patch("/adapters/tone", json={"public": True}, headers=keys["bob"])
    assert refused(taken, 409, "public")["code"] == "name_published"
    assert names(server, keys["bob"]) == {"same": True, "tone": True}
    server.http.patch("/adapters/tone", json={"public": False}, headers=keys["ann"])
    assert names(server, keys["cyd"]) == {}
    server.idle()


def test_a_quota_is_refused_before_the_body_is_read(served, adapters):
    server, keys = served
    assert put(server, "one", adapters[0], keys["cyd"]).status_code == 201
    assert put(server, "one", adapters[1], keys["cyd"]).status_code == 200
    unread = server.http.put("/adapters/two", content=b"not a form", headers=keys["cyd"])
    told = refused(unread, 409)
    assert (told["code"], told["message"]) == ("quota_exceeded", "this tenant may keep 1 adapters and has 1")
    assert server.http.delete("/adapters/one", headers=keys["cyd"]).status_code == 204
    assert put(server, "two", adapters[0], keys["cyd"]).status_code == 201


def test_a_tenants_merged_copies_have_their_part_and_who_loses_a_lane_is_told(served, adapters, monkeypatch):
    server, keys = served
    loop, directory = server.state.client.loop, server.state.accounts.directory

    def patch(who: str, name: str, **body: Any) -> Any:
        return server.http.patch(f"/adapters/{name}", json=body, headers=keys[who])

    def shown(who: str, name: str) -> dict[str, Any]:
        return server.http.get(f"/adapters/{name}", headers=keys[who]).json()

    def bound(tenant: str, most: int | None) -> None:
        changed = directory.update(tenant, max_merged_bytes=most)
        asyncio.run_coroutine_threadsafe(changed, loop).result(20)

    for who, name in (("ann", "quick"), ("ann", "fast"), ("bob", "slow")):
        put(server, name, adapters[0], keys[who])
    assert patch("ann", "quick", lane="merged", pinned=True).status_code == 200
    each = server.engine._merged.nbytes
    bound("ann", each)
    error = refused(patch("ann", "fast", lane="merged"), 409)
    assert error["code"] == "quota_exceeded"
    assert str(each) in error["message"]
    bound("ann", None)
    monkeypatch.setattr(server.settings, "merged_bytes", 2 * each)
    assert refused(patch("ann", "fast", lane="merged"), 409)["code"] == "quota_exceeded", "half is one tenant's"
    assert patch("bob", "slow", lane="merged").json()["lane_note"] is None
    patch("ann", "quick", pinned=False, public=True)
    assert patch("ann", "fast", lane="merged").status_code == 200, "its own makes way"
    lost = shown("ann", "quick")
    assert lost["lane"] == "shared"
    assert "fast" in lost["lane_note"]
    put(server, "quick", adapters[1], keys["ann"])
    assert shown("ann", "quick")["lane_note"] == lost["lane_note"], "its new version is in the shared lane as well"
    assert shown("bob", "quick")["lane_note"] is None, "only its owner is told"
    assert shown("bob", "slow")["lane"] == "merged"
    for who, name in (("ann", "quick"), ("ann", "fast"), ("bob", "slow")):
        assert server.http.delete(f"/adapters/{name}", headers=keys[who]).status_code == 204
    assert not server.engine.stats.lane_notes


def test_a_part_of_the_merged_copies_that_is_lowered_is_in_force_for_whoever_asks_next(served, adapters):
    """Though its tenant asks for nothing more: of the idle copies its own go first, not the one idle the longest."""
    server, keys = served
    copies, directory = server.engine._merged, server.state.accounts.directory

    def merge(tenant: str, name: str) -> Any:
        assert put(server, name, adapters[0], keys[tenant]).status_code in (200, 201)
        return server.http.patch(f"/adapters/{name}", json={"lane": "merged"}, headers=keys[tenant])

    def lane(tenant: str, name: str) -> str:
        return server.http.get(f"/adapters/{name}", headers=keys[tenant]).json()["lane"]

    def part(size: int | None) -> None:
        change = directory.update("bob", max_merged_bytes=size)
        asyncio.run_coroutine_threadsafe(change, server.state.client.loop).result(20)

    assert merge("ann", "oldest").json()["lane"] == "merged"
    size = copies.nbytes
    for name in ("over", "within"):
        assert merge("bob", name).json()["lane"] == "merged"
    most, copies.most = copies.most, 3 * size
    try:
        part(size)
        assert merge("dan", "newest").json()["lane"] == "merged"
        lanes = [lane("ann", "oldest"), lane("bob", "over"), lane("bob", "within"), lane("dan", "newest")]
        assert lanes == ["merged", "shared", "merged", "merged"]
    finally:
        copies.most = most
        part(None)
    for tenant, name in (("ann", "oldest"), ("bob", "over"), ("bob", "within"), ("dan", "newest")):
        assert server.http.delete(f"/adapters/{name}", headers=keys[tenant]).status_code == 204
    server.idle()
