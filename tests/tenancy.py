"""Tenants of a server with AUTH on, and its admin, for tests over HTTP."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving import Server

PROMPT = {"prompt": "hello", "max_tokens": 4}
ALL = ("generate", "adapters:write", "usage:read")


class Account:
    """A tenant of the server's, with a key."""

    def __init__(self, admin: Admin, name: str, scopes: list[str]):
        self.name, self.server = name, admin.server
        self.key = admin.key(name, scopes)
        self.http = admin.client(self.key["token"])

    def generate(self, **body: Any) -> httpx.Response:
        return self.http.post("/v1/generate", json=PROMPT | body)

    def costs(self, **body: Any) -> dict[str, Any]:
        response = self.generate(**body)
        assert response.status_code == 200, response.text
        return response.json()


class Admin:
    """The admin of a server with AUTH on."""

    def __init__(self, server: Server, token: str):
        self.server, self.token = server, token
        self.clients: list[httpx.Client] = []
        self.http = self.client(token)
        self._names = 0

    def client(self, token: str | None) -> httpx.Client:
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        self.clients.append(httpx.Client(base_url=self.server.url, timeout=60, headers=headers))
        return self.clients[-1]

    def key(self, tenant: str, scopes: list[str], **more: Any) -> dict[str, Any]:
        response = self.http.post(f"/admin/tenants/{tenant}/keys", json={"scopes": scopes, **more})
        assert response.status_code == 201, response.text
        assert response.headers["cache-control"] == "no-store"
        return response.json()

    def tenant(self, scopes: Sequence[str] = ALL, **body: Any) -> Account:
        self._names += 1
        name = f"t{self._names}"
        response = self.http.post("/admin/tenants", json={"id": name, **body})
        assert response.status_code == 201, response.text
        return Account(self, name, list(scopes))

    def change(self, account: Account, **body: Any) -> dict[str, Any]:
        response = self.http.patch(f"/admin/tenants/{account.name}", json=body)
        assert response.status_code == 200, response.text
        return response.json()


@contextmanager
def administered(base: Path, data_dir: Path, **settings: Any) -> Iterator[Admin]:
    """A server with AUTH on, with the admin key of its first start."""
    with pytest.MonkeyPatch.context() as patch:
        said = io.StringIO()
        patch.setattr("sys.stderr", said)
        server = Server(base, data_dir, auth="on", **settings)
        server.__enter__()
    admin = Admin(server, said.getvalue().split("this once:\n")[1].split()[0])
    try:
        yield admin
        server.idle()
    finally:
        for client in admin.clients:
            client.close()
        server.__exit__()


def invoice(account: Account, **query: Any) -> dict[str, Any]:
    """The tenant's bill of this month."""
    month = time.strftime("%Y-%m", time.gmtime())
    bill: dict[str, Any] = account.http.get(f"/v1/invoices/{month}", params=query).json()
    return bill
