"""Strings that no client of good will sends, in paths and queries, on both databases: refused, and never a fault."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote_from_bytes

import httpx
import pytest

from tests.serving import ENVELOPE, Server

# As they are in a URL. The first are no text that a name could be; the others are, but are no name.
UNPRINTABLE = [b"\0", b"a\0b", b"\n", b"\x7f", "ä".encode(), b"\xff", b"\xed\xa0\x80", "\u202e\U0010ffff".encode()]
ODD = [b"'", b"%", b'";--', b"\\", b" 1", b"x" * 5_000, "2026-1٢".encode(), b"9" * 400]
PATHS = [
    ("GET", "/admin/tenants/{}"),
    ("PATCH", "/admin/tenants/{}"),
    ("POST", "/admin/tenants/{}/disable"),
    ("GET", "/admin/tenants/{}/adapters"),
    ("DELETE", "/admin/tenants/{}/adapters/none"),
    ("DELETE", "/admin/tenants/default/adapters/{}"),
    ("GET", "/admin/tenants/{}/keys"),
    ("POST", "/admin/tenants/{}/keys"),
    ("DELETE", "/admin/tenants/{}/keys/none"),
    ("DELETE", "/admin/tenants/default/keys/{}"),
    ("GET", "/v1/invoices/{}"),
    ("GET", "/v1/invoices/2026-11?tenant={}"),
    ("GET", "/v1/usage?tenant={}"),
    ("GET", "/v1/usage?after={}"),
    ("GET", "/v1/usage?group_by=adapter&after={}"),
    ("GET", "/v1/usage?group_by=adapter&after=adapter%3A{}"),
    ("GET", "/v1/usage?group_by=day&after={}"),
    ("GET", "/v1/usage?from={}"),
    ("GET", "/v1/usage?to={}"),
    ("GET", "/adapters/{}"),
]
PAGES = ["/admin/tenants?after={}", "/admin/tenants/default/keys?after={}", "/admin/tenants/default/adapters?after={}"]
JSON = {"content-type": "application/json"}
BODIES = {"PATCH": {"weight": 1}, "POST": {"scopes": ["generate"]}}


@pytest.fixture
def server(base: Path, database_url: str, tmp_path: Path) -> Iterator[Server]:
    with Server(base, tmp_path / "data", database_url=database_url) as server:
        yield server


def ask(server: Server, method: str, path: str, odd: bytes) -> httpx.Response:
    return server.http.request(method, path.format(quote_from_bytes(odd, safe="")), json=BODIES.get(method))


def test_what_cannot_be_a_name_is_refused(server: Server) -> None:
    for method, path in PATHS:
        for odd in (*UNPRINTABLE, *ODD):
            response = ask(server, method, path, odd)
            assert 400 <= response.status_code < 500, (method, path, odd[:20], response.text)
            assert set(response.json()["error"]) == ENVELOPE
    for path in PAGES:
        for odd in UNPRINTABLE:
            assert ask(server, "GET", path, odd).status_code == 422, (path, odd)
        for odd in ODD:  # an `after` need not be there any more
            assert ask(server, "GET", path, odd).status_code in (200, 422), (path, odd)
    for field, body in (("id", {}), ("customer", {"id": "new"})):
        for odd in ("\0", "a\0b", "\ud800", "ä", "\n"):
            response = server.http.post("/admin/tenants", content=json.dumps(body | {field: odd}), headers=JSON)
            assert response.status_code == 422, (field, odd, response.text)
    for field in ("name", "expires"):
        for odd in ("\0", "\ud800", "ä"):
            body = json.dumps({"scopes": ["generate"], field: odd})
            response = server.http.post("/admin/tenants/default/keys", content=body, headers=JSON)
            assert response.status_code == 422, (field, odd, response.text)
