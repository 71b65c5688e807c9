"""PATCH: a lane of its own over HTTP, and what happens to it when the adapter is replaced, rolled back and deleted."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from server.cli import app
from tests.serving import Server, on_the_engine, refused, until


def patch(server: Any, name: str, **body: Any) -> Any:
    return server.http.patch(f"/adapters/{name}", json=body)


def lane_of(server: Any, name: str) -> str:
    used: str = server.generate(adapter=name, max_tokens=4)["adapter"]["lane"]
    return used


def test_merged_and_back(server, adapters):
    server.put("laned", adapters[0])
    shared = server.generate(adapter="laned", max_tokens=8)
    assert shared["adapter"]["lane"] == "shared"
    body = patch(server, "laned", lane="merged").json()
    assert (body["lane"], body["pinned"]) == ("merged", False)
    merged = server.generate(adapter="laned", max_tokens=8)
    assert merged["adapter"]["lane"] == "merged"
    assert merged["adapter"]["digest"] == shared["adapter"]["digest"]
    assert merged["choices"][0]["token_ids"] == shared["choices"][0]["token_ids"]
    assert 'onebase_merged_copies{by="request"} 1.0' in server.http.get("/metrics").text
    assert patch(server, "laned", pinned=True).json()["pinned"] is True
    assert server.http.get("/adapters/laned").json()["lane"] == "merged"
    body = patch(server, "laned", lane="shared").json()
    assert (body["lane"], body["pinned"]) == ("shared", False)
    assert lane_of(server, "laned") == "shared"
    assert "onebase_merged_bytes 0.0" in server.http.get("/metrics").text


def test_a_new_version_takes_over_in_the_lane(server, adapters):
    server.put("follow", adapters[0])
    patch(server, "follow", lane="merged", pinned=True)
    server.put("follow", adapters[1])
    shown = server.http.get("/adapters/follow").json()
    assert (shown["version"], shown["lane"], shown["pinned"]) == (2, "merged", True)
    assert lane_of(server, "follow") == "merged"
    server.http.post("/adapters/follow/rollback", json={"version": 1})
    assert server.generate(adapter="follow")["adapter"] | {"load_ms": 0} == {
        "name": "follow",
        "version": 1,
        "digest": server.http.get("/adapters/follow").json()["digest"],
        "lane": "merged",
        "cold": False,
        "load_ms": 0,
    }
    server.http.delete("/adapters/follow")
    assert 'onebase_merged_copies{by="request"} 0.0' in server.http.get("/metrics").text


def test_without_room_it_is_409_with_the_numbers(server, adapters, monkeypatch):
    server.put("first", adapters[0])
    server.put("second", adapters[1])
    patch(server, "first", lane="merged", pinned=True)
    copies = server.engine._merged
    monkeypatch.setattr(copies, "most", copies.nbytes)
    error = refused(patch(server, "second", lane="merged"), 409)
    assert error["code"] == "merged_full"
    assert str(copies.nbytes) in error["message"]
    assert lane_of(server, "second") == "shared"
    patch(server, "first", pinned=False)
    assert patch(server, "second", lane="merged").json()["lane"] == "merged"
    assert server.http.get("/adapters/first").json()["lane"] == "shared", "the idle copy has made way"
    # There is no room for two versions at once, and a pinned copy does not make way: the one that is there stays.
    patch(server, "second", pinned=True)
    error = refused(server.put("second", adapters[2]), 409)
    assert error["code"] == "merged_full"
    assert server.http.get("/adapters/second").json()["version"] == 1
    patch(server, "second", lane="shared")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 422),
        ({"lane": "own"}, 422),
        ({"lane": "merged", "extra": 1}, 422),
        ({"pinned": True}, 409),
        ({"lane": "shared", "pinned": True}, 409),
    ],
)
def test_what_cannot_be_is_refused(server, adapters, body, status):
    server.put("odd", adapters[0])
    refused(patch(server, "odd", **body), status)
    assert server.http.get("/adapters/odd").json()["lane"] == "shared"


def test_a_change_may_be_held_to_one_version(server, adapters):
    digest = server.put("held", adapters[0]).json()["digest"]
    stale = server.http.patch("/adapters/held", json={"lane": "merged"}, headers={"If-Match": '"sha256:00"'})
    refused(stale, 412)
    assert server.http.get("/adapters/held").json()["lane"] == "shared"
    current = server.http.patch("/adapters/held", json={"lane": "merged"}, headers={"If-Match": f'"{digest}"'})
    assert current.json()["lane"] == "merged"
    server.http.delete("/adapters/held")


def test_the_command_leaves_a_pin_as_it_is_unless_it_is_named(server, adapters):
    server.put("kept", adapters[0])
    patch(server, "kept", lane="merged", pinned=True)
    for flags, pinned in ((), True), (("--no-pinned",), False), (("--pinned",), True):
        done = CliRunner().invoke(app, ["adapters", "merge", "kept", "--url", server.url, "--json", *flags])
        assert done.exit_code == 0, done.output
        assert server.http.get("/adapters/kept").json()["pinned"] is pinned
    server.http.delete("/adapters/kept")


def test_nobody_is_404(server):
    assert refused(patch(server, "nobody", lane="merged"), 404)["code"] == "adapter_not_found"


def test_priority_is_one_of_two(server):
    assert server.generate(priority="batch", max_tokens=2)["choices"]
    refused(server.http.post("/v1/generate", json={"prompt": "a", "priority": "urgent"}), 422)


def test_lanes_are_kept_over_a_restart_the_pinned_ones_first(base, adapters, tmp_path):
    with Server(base, tmp_path / "data") as server:
        for name in ("a", "b", "c", "d"):
            server.put(name, adapters[0])
        for name in ("a", "b", "c"):
            assert patch(server, name, lane="merged", pinned=name == "c").status_code == 200
        patch(server, "a", lane="shared")
        each = server.engine._merged.nbytes // 2
    with Server(base, tmp_path / "data", merged_bytes=each) as server:  # there is room for one now
        until(lambda: server.http.get("/adapters/c").json()["lane"] == "merged")
        lanes = {one["name"]: one["lane"] for one in server.http.get("/adapters").json()["data"]}
        assert lanes == {"a": "shared", "b": "shared", "c": "merged", "d": "shared"}
        assert server.http.get("/adapters/c").json()["pinned"] is True
        server.http.delete("/adapters/c")
        assert 'onebase_merged_copies{by="request"} 0.0' in server.http.get("/metrics").text
    with Server(base, tmp_path / "data", merged_bytes=each) as server:
        until(lambda: server.http.get("/adapters/b").json()["lane"] == "merged")


def test_what_was_merged_without_being_asked_for_is_its_owners_to_change(server, adapters):
    """A new version starts in the shared lane and the old copy goes; pinning asks for a lane; `shared` ends it."""
    server.put("helped", adapters[0])
    copies, ref = server.engine._merged, registry_ref(server, "helped")
    before = server.http.get("/metrics").text
    assert 'onebase_lane_changes_total{change="merge",reason="latency"} 0.0' in before, "a rate sees the first one"
    on_the_engine(server, lambda: copies.volunteer(ref, "alone"))
    until(lambda: server.http.get("/adapters/helped").json()["lane"] == "merged")
    assert 'onebase_merged_copies{by="auto"} 1.0' in server.http.get("/metrics").text
    assert 'onebase_lane_changes_total{change="merge",reason="alone"} 1.0' in server.http.get("/metrics").text
    assert patch(server, "helped", pinned=False).json()["lane"] == "merged", "that asks for nothing"
    refused(patch(server, "helped", pinned=True), 409)
    server.put("helped", adapters[1])
    assert lane_of(server, "helped") == "shared"
    until(lambda: copies.nbytes == 0)
    ref = registry_ref(server, "helped")
    on_the_engine(server, lambda: copies.volunteer(ref, "alone"))
    until(lambda: server.http.get("/adapters/helped").json()["lane"] == "merged")
    assert patch(server, "helped", lane="merged").json()["lane"] == "merged"
    assert 'onebase_merged_copies{by="request"} 1.0' in server.http.get("/metrics").text
    assert patch(server, "helped", lane="shared").json()["lane"] == "shared"
    assert copies.nbytes == 0


def registry_ref(server: Any, name: str) -> Any:
    lease = server.state.registry.acquire(name)
    lease.release()
    return lease.ref
