"""Tenants and keys: by example on both databases, and at random against dictionaries."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, precondition, rule
from sqlalchemy import Connection, select, text

from server.core import DEFAULT_TENANT
from server.errors import Conflict, InvalidRequest, TenantNotFound, Unauthorized
from server.tenants import tables
from server.tenants.database import Database, open_database
from server.tenants.directory import Directory
from server.tenants.keys import Scope
from server.tenants.tenant import Limits

START = 1_700_000_000.0
GENERATE = [Scope.GENERATE]


class Clock:
    """Seconds since 1970 that pass when they are told to."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


def accepted(directory: Directory, token: str) -> bool:
    try:
        directory.authenticate(f"Bearer {token}")
    except Unauthorized:
        return False
    return True


@pytest.mark.anyio
async def test_the_first_start_makes_one_admin_key(database: Database) -> None:
    directory, token = await Directory.open(database)
    assert token is not None
    who = directory.authenticate(f"Bearer {token}")
    assert who.tenant.id == DEFAULT_TENANT
    assert who.may(Scope.ADMIN)
    again, second = await Directory.open(database)
    assert second is None
    assert accepted(again, token)
    await again.revoke(DEFAULT_TENANT, who.key_id)
    _, third = await Directory.open(database)
    assert third is None  # revoking every key is no first start


@pytest.mark.anyio
async def test_two_first_starts_at_once_make_one_key(database: Database) -> None:
    opened = await asyncio.gather(*(Directory.open(database) for _ in range(4)))
    assert sum(token is not None for _, token in opened) == 1


@pytest.mark.anyio
async def test_everything_survives_a_restart(database: Database) -> None:
    directory, _ = await Directory.open(database)
    limits = Limits(rpm_limit=5, max_budget=10**12, budget_duration="30d", allowed_adapters=frozenset({"mail", "web"}))
    made = await directory.create("acme", limits=limits, weight=2.5, customer="cus_1", prices={"base": 2})
    made = await directory.update("acme", max_adapters=3, max_merged_bytes=7, classes=frozenset({"batch"}))
    key, _ = await directory.create_key("acme", [Scope.GENERATE, Scope.USAGE_READ], name="ci", expires_ms=2**41)
    again, _ = await Directory.open(database)
    assert again.show("acme") == made
    assert made.limits == limits
    assert len(made.salt) == 32
    assert await again.keys("acme") == [key]
    assert [item.id for item in again.tenants()] == ["acme", DEFAULT_TENANT]
    assert [item.id for item in again.tenants(limit=1, after="acme")] == [DEFAULT_TENANT]


@pytest.mark.anyio
async def test_a_key_ends(database: Database) -> None:
    clock = Clock()
    directory, _ = await Directory.open(database, clock=clock)
    await directory.create("acme")
    old, first = await directory.create_key("acme", GENERATE)
    _, second = await directory.create_key("acme", GENERATE, expires_ms=int((START + 60) * 1000))
    assert accepted(directory, first)  # both, while one is rotated
    assert accepted(directory, second)
    assert not accepted(directory, first[:-1] + ("a" if first[-1] != "a" else "b"))
    await directory.revoke("acme", old.id)
    assert not accepted(directory, first)
    clock.now += 60
    assert not accepted(directory, second)
    clock.now = START
    await directory.disable("acme")
    assert not accepted(directory, second)
    await directory.update("acme", disabled=False)
    assert accepted(directory, second)
    await directory.revoke("acme", old.id)
    assert [key.revoked_ms for key in await directory.keys("acme") if key.id == old.id] == [START * 1000]
    clock.now += 60
    new, _ = await directory.create_key("acme", GENERATE)
    held = {key.id for key, _ in directory._keys.values() if key.tenant == "acme"}
    assert held == {new.id}, "one that has ended is not kept in memory"


@pytest.mark.anyio
async def test_another_process_changes_something(database: Database) -> None:
    here, _ = await Directory.open(database)
    there, _ = await Directory.open(database)
    await there.create("acme")
    key, token = await there.create_key("acme", GENERATE)
    assert not accepted(here, token)
    await here.reload()
    assert accepted(here, token)
    await there.revoke("acme", key.id)
    await here.reload()
    assert not accepted(here, token)


@pytest.mark.anyio
async def test_what_cannot_be(database: Database) -> None:
    directory, _ = await Directory.open(database)
    await directory.create("acme")
    key, _ = await directory.create_key("acme", GENERATE)
    with pytest.raises(Conflict):
        await directory.create("acme")
    for wrong in ("", "Acme", "-a", "a" * 65, "a/b"):
        with pytest.raises(InvalidRequest):
            await directory.create(wrong)
    for changes in ({"salt": b""}, {"weight": 0.0}, {"max_adapters": -1}, {"customer": "a\nb"}, {"classes": {"x"}}):
        with pytest.raises(InvalidRequest):
            await directory.update("acme", **changes)
    for scopes, more in (([], {}), (GENERATE, {"expires_ms": 5}), (GENERATE, {"name": "x" * 200})):
        with pytest.raises(InvalidRequest):
            await directory.create_key("acme", scopes, **more)
    with pytest.raises(TenantNotFound):
        await directory.create_key("nobody", GENERATE)
    with pytest.raises(TenantNotFound):
        await directory.revoke(DEFAULT_TENANT, key.id)  # another tenant's
    assert directory.show("acme").weight == 1.0


@pytest.mark.anyio
async def test_a_cancelled_revocation_still_happens(database: Database) -> None:
    directory, _ = await Directory.open(database)
    key, token = await directory.create_key(DEFAULT_TENANT, GENERATE)
    task = asyncio.create_task(directory.revoke(DEFAULT_TENANT, key.id))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await directory.update(DEFAULT_TENANT, weight=2.0)  # comes after it
    assert not accepted(directory, token)


@pytest.mark.anyio
async def test_no_secret_is_stored_or_logged(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        directory, first = await Directory.open(database)
        _, token = await directory.create_key(DEFAULT_TENANT, GENERATE)
        directory.authenticate(f"Bearer {token}")
        assert not accepted(directory, token[:-2] + "zz")

    def everything(connection: Connection) -> str:
        return "".join(str(connection.execute(select(table)).all()) for table in tables.metadata.sorted_tables)

    async with database.read() as connection:
        stored = await connection.run_sync(everything)
        assert await connection.scalar(text("SELECT count(*) FROM keys")) == 2
    for secret in (first, token):
        assert secret is not None
        assert secret.split("_", 2)[2] not in caplog.text + stored


@given(header=st.none() | st.text(max_size=300) | st.from_regex(r"[Bb]earer ob_[0-9a-f]{16}_[\w-]{43}"))
@settings(deadline=None)
def test_a_malformed_header_raises_only_unauthorized(header: str | None) -> None:
    with pytest.raises(Unauthorized) as caught:
        EMPTY.authenticate(header)
    assert (caught.value.status, caught.value.message) == (401, Unauthorized().message)
    assert caught.value.headers["WWW-Authenticate"].startswith("Bearer")


EMPTY = Directory(cast(Database, None), Clock())  # it never asks the database


class Directories(RuleBasedStateMachine):
    """Tenants and keys against dictionaries, over restarts, on SQLite."""

    tokens = Bundle("tokens")

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.loop = asyncio.Runner()
        self.clock = Clock()
        self.disabled: dict[str, bool] = {DEFAULT_TENANT: False}
        self.known: dict[str, dict[str, Any]] = {}  # token -> its key
        self.open()
        assert self.first is not None
        self.known[self.first] = {"tenant": DEFAULT_TENANT, "id": self.first.split("_")[1], "ends": None, "off": False}

    def open(self) -> None:
        url = f"sqlite:///{Path(self.folder.name) / 'x.db'}"
        self.database = self.loop.run(open_database(url))
        self.directory, self.first = self.loop.run(Directory.open(self.database, clock=self.clock))

    @rule(name=st.sampled_from("abc"))
    def create(self, name: str) -> None:
        if name in self.disabled:
            with pytest.raises(Conflict):
                self.loop.run(self.directory.create(name))
        else:
            self.loop.run(self.directory.create(name))
            self.disabled[name] = False

    @rule(data=st.data(), off=st.booleans())
    def switch(self, data: st.DataObject, off: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.disabled)))
        self.loop.run(self.directory.update(name, disabled=off))
        self.disabled[name] = off

    @rule(target=tokens, data=st.data(), lasts=st.none() | st.integers(1, 100))
    def create_key(self, data: st.DataObject, lasts: int | None) -> Any:
        name = data.draw(st.sampled_from([*sorted(self.disabled), "nobody"]))
        if name == "nobody":
            with pytest.raises(TenantNotFound):
                self.loop.run(self.directory.create_key(name, GENERATE))
            return multiple()
        ends = None if lasts is None else self.clock.now + lasts
        expires = None if ends is None else int(ends * 1000)
        key, token = self.loop.run(self.directory.create_key(name, GENERATE, expires_ms=expires))
        self.known[token] = {"tenant": name, "id": key.id, "ends": ends, "off": False}
        return token

    @rule(token=tokens, tenant=st.none() | st.sampled_from("abc"))
    def revoke(self, token: str, tenant: str | None) -> None:
        key = self.known[token]
        if tenant is None or tenant == key["tenant"]:
            self.loop.run(self.directory.revoke(key["tenant"], key["id"]))
            key["off"] = True
        else:
            with pytest.raises(TenantNotFound):
                self.loop.run(self.directory.revoke(tenant, key["id"]))

    @rule(seconds=st.integers(1, 60))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @precondition(lambda self: len(self.known) > 1)
    @rule()
    def restart(self) -> None:
        self.loop.run(self.database.close())
        self.open()
        assert self.first is None

    @invariant()
    def only_valid_keys_are_accepted(self) -> None:
        for token, key in self.known.items():
            ended = key["ends"] is not None and self.clock.now >= key["ends"]
            assert accepted(self.directory, token) == (
                not key["off"] and not ended and not self.disabled[key["tenant"]]
            )
        assert {item.id: item.disabled for item in self.directory.tenants()} == self.disabled

    def teardown(self) -> None:
        self.loop.run(self.database.close())
        self.loop.close()
        self.folder.cleanup()


Directories.TestCase.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
TestDirectories = Directories.TestCase
