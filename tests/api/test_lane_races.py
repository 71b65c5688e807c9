"""Lanes asked for while the adapter is replaced, deleted, used, or while the server stops."""

from __future__ import annotations

import random
import threading
from typing import Any

import httpx
import pytest

from tests.serving import Gate, Server, until

# What each call may be answered while others change the same name.
ALLOWED = {
    "merge": {(200, None), (404, "adapter_not_found"), (409, "lane_left")},
    "unmerge": {(200, None), (404, "adapter_not_found")},
    "put": {(200, None), (201, None)},
    "delete": {(204, None), (404, "adapter_not_found")},
    "generate": {(200, None), (404, "adapter_not_found")},
}


def call(server: Any, kind: str, folder: Any) -> httpx.Response:
    if kind in ("merge", "unmerge"):
        return server.http.patch("/adapters/raced", json={"lane": "merged" if kind == "merge" else "shared"})
    if kind == "put":
        return server.put("raced", folder)
    if kind == "delete":
        return server.http.delete("/adapters/raced")
    return server.http.post("/v1/generate", json={"prompt": "hello", "max_tokens": 3, "adapter": "raced"})


@pytest.mark.parametrize("seed", range(3))
def test_calls_that_race_for_one_name_are_answered_each_and_leave_nothing(server, adapters, seed):
    wrong: list[Any] = []

    def some(number: int) -> None:
        dice = random.Random(seed * 100 + number)
        for _ in range(15):
            kind = dice.choices(list(ALLOWED), (4, 2, 3, 1, 6))[0]
            response = call(server, kind, dice.choice(adapters))
            code = response.json()["error"]["code"] if response.is_error else None
            if (response.status_code, code) not in ALLOWED[kind]:
                wrong.append((kind, response.status_code, response.text))

    threads = [threading.Thread(target=some, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong
    server.put("raced", adapters[0])
    assert call(server, "merge", None).json()["lane"] == "merged"
    assert call(server, "generate", None).json()["adapter"]["lane"] == "merged"
    assert call(server, "delete", None).status_code == 204
    server.idle()
    until(lambda: server.engine._merged.nbytes == 0)
    assert not server.engine._turns._lanes._merged._tenants


def test_a_lane_asked_for_when_the_server_stops_is_refused(base, adapters, tmp_path):
    answers: list[httpx.Response] = []
    with Server(base, tmp_path / "data", drain_seconds=5) as server:
        server.put("late", adapters[0])
        server.runner.merge = gate = Gate(server.runner.merge)
        asker = threading.Thread(target=lambda: answers.append(call_late(server.url)))
        asker.start()
        until(lambda: gate.entered)
        server.terminate()
        until(lambda: not server.engine.alive)
        gate.open()
        asker.join(20)
    assert not asker.is_alive()
    assert [one.status_code for one in answers] == [503]
    assert answers[0].json()["error"]["code"] == "shutting_down"
    with Server(base, tmp_path / "data") as server:
        assert server.http.get("/adapters/late").json()["lane"] == "shared", "nothing was promised"


def call_late(url: str) -> httpx.Response:
    return httpx.patch(f"{url}/adapters/late", json={"lane": "merged"}, timeout=30)
