"""Put, publish, unpublish, roll back, delete, generate, list and restart in any order, by tenants that use the same few
names and the same few bytes. No tenant ever sees or uses what is neither its own nor published, and nothing tells it
that another has the same bytes.

The model is a dict from (tenant, name) to versions. What is asked goes through the endpoints' functions; in the place
of the engine there is a set of what is on the device.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from fastapi import Response
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from server.api import adapters as api
from server.api.queries import AdapterQuery
from server.api.schemas import AdapterPatch, Rollback
from server.api.state import State
from server.engine.stats import Stats
from server.errors import AdapterNotFound, Conflict, Forbidden
from server.registry.cache import AdapterCache
from server.registry.holds import Lease
from server.registry.quotas import Quota
from server.registry.registry import Registry
from server.registry.store import Store
from server.settings import Settings
from server.tenants.keys import Scope
from server.tenants.tenant import Principal, Tenant
from tests.adapters import stage_adapter, tiny_base

BASE = tiny_base(1)
TENANTS = ("tenant-ann", "tenant-bob", "tenant-cyd")
NAMES = ("mail", "sql", "tone")
CONTENTS = 2
MOST = 2  # adapters of a tenant
tenants, names, contents = st.sampled_from(TENANTS), st.sampled_from(NAMES), st.integers(0, CONTENTS - 1)


@dataclass
class Owned:
    """An adapter: what each version holds, which is current, and whether it is published."""

    versions: dict[int, int]
    current: int
    public: bool = False

    @property
    def content(self) -> int:
        return self.versions[self.current]


@dataclass
class Use:
    """A request under way: what it was promised."""

    lease: Lease
    owner: str
    content: int
    named: bool = True  # its adapter has not been deleted since


@dataclass
class Device:
    """What the endpoints ask of the engine's client."""

    resident: set[str] = field(default_factory=set)

    @property
    def stats(self) -> Stats:
        return Stats(resident=frozenset(self.resident))

    def lane(self, adapter: object) -> None:
        return None


def principal(tenant: str) -> Principal:
    return Principal(Tenant(tenant, 0, b"salt"), "key", frozenset(Scope))


class Ownership(RuleBasedStateMachine):
    """See the module's docstring."""

    root: ClassVar[Path]
    runs: ClassVar[Any] = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.folder = self.root / f"run-{next(self.runs)}"
        self.adapters: dict[tuple[str, str], Owned] = {}
        self.digests: dict[int, str] = {}
        self.ram: set[tuple[str, int]] = set()  # (owner, content)
        self.open: list[Use] = []
        self.loop = asyncio.new_event_loop()
        self.start()

    def start(self) -> None:
        store = Store(self.folder)
        registry = Registry(store, BASE, max_rank=16, dtype=torch.float32)
        self.device, self.ram = Device(), set()
        cache = AdapterCache(registry.load, 1 << 30)
        none: Any = None
        device: Any = self.device
        settings = Settings(data_dir=self.folder)
        self.state = State(settings, none, store, registry, cache, device, 0)

    def means(self, tenant: str, name: str) -> tuple[str, Owned] | None:
        """What the name is to the tenant, by the model, and whose it is."""
        if (tenant, name) in self.adapters:
            return tenant, self.adapters[tenant, name]
        found = ((owner, one) for (owner, other), one in self.adapters.items() if other == name and one.public)
        return next(found, None)

    def call(self, function: Any, *arguments: Any, **more: Any) -> Any:
        return self.loop.run_until_complete(function(*arguments, **more))

    def asked(self, there: bool, name: str, function: Any, *arguments: Any, **more: Any) -> Any:
        """The answer to a call that works where the adapter is `there`, and else says what any unknown name gets."""
        if there:
            return self.call(function, *arguments, **more)
        with pytest.raises(AdapterNotFound) as refused:
            self.call(function, *arguments, **more)
        assert refused.value.envelope() == AdapterNotFound(f"there is no adapter {name}", param="adapter").envelope()
        return None

    def changed(self, tenant: str, name: str, function: Any, *arguments: Any) -> Any:
        """The answer to a change, which only the owner may make: of what it may see, others are told so."""
        found = self.means(tenant, name)
        if found is None or found[0] == tenant:
            return self.asked(found is not None, name, function, *arguments)
        with pytest.raises(Forbidden) as refused:
            self.call(function, *arguments)
        assert not any(other in json.dumps(refused.value.envelope()) for other in TENANTS)
        return None

    def uses_of(self, owner: str, name: str) -> list[Use]:
        return [use for use in self.open if (use.owner, use.lease.ref.name) == (owner, name)]

    def check(self, tenant: str, status: dict[str, Any]) -> None:
        """A status says what the tenant may know."""
        found = self.means(tenant, status["name"])
        assert found is not None
        owner, one = found
        uses = [use for use in self.uses_of(owner, status["name"]) if use.named]
        assert (status["own"], status["public"]) == (owner == tenant, one.public)
        assert (status["version"], status["digest"]) == (one.current, self.digests[one.content])
        where = "ram" if (owner, one.content) in self.ram else "disk"
        running = any((use.owner, use.content) == (owner, one.content) for use in self.open)
        assert status["residency"] == ("device" if running else where), "nor does anybody else's copy show"
        assert owner == tenant or (status["pinned"], status["requests"], status["last_used"]) == (False, 0, None)
        assert status["in_flight"] == (len(uses) if owner == tenant else 0)
        assert not any(other in json.dumps(status) for other in TENANTS)

    @rule(tenant=tenants, name=names, content=contents)
    def put(self, tenant: str, name: str, content: int) -> None:
        one = self.adapters.get((tenant, name))
        full = one is None and sum(owner == tenant for owner, _ in self.adapters) >= MOST
        with stage_adapter(self.state.store, BASE, seed=content) as staging:
            if full:
                with pytest.raises(Conflict) as refused:
                    self.state.registry.put(name, staging, tenant=tenant, quota=Quota(MOST))
                assert refused.value.code == "quota_exceeded"
                return
            result = self.state.registry.put(name, staging, tenant=tenant, quota=Quota(MOST))
        assert self.digests.setdefault(content, result.version.digest) == result.version.digest
        assert result.created == (one is None)
        if one is None:
            self.adapters[tenant, name] = Owned({1: content}, 1)
        elif one.content != content:
            one.current = max(one.versions) + 1
            one.versions[one.current] = content
        assert result.version.version == self.adapters[tenant, name].current

    @rule(tenant=tenants, name=names, public=st.booleans())
    def publish(self, tenant: str, name: str, public: bool) -> None:
        one = self.adapters.get((tenant, name))
        patch = (name, AdapterPatch(public=public), principal(tenant), self.state)
        taken = any(other == name and its.public and its is not one for (_, other), its in self.adapters.items())
        if one is not None and public and taken:
            with pytest.raises(Conflict) as refused:
                self.call(api.patch_adapter, *patch)
            assert refused.value.code == "name_published"
            return
        status = self.changed(tenant, name, api.patch_adapter, *patch)
        if one is not None:
            one.public = public
            self.check(tenant, status)

    @rule(tenant=tenants, name=names, version=st.integers(1, 3))
    def roll_back(self, tenant: str, name: str, version: int) -> None:
        one = self.adapters.get((tenant, name))
        if one is None or version in one.versions:
            call = (name, Rollback(version=version), principal(tenant), self.state)
            self.changed(tenant, name, api.roll_back, *call)
            if one is not None:
                one.current = version

    @rule(tenant=tenants, name=names)
    def delete(self, tenant: str, name: str) -> None:
        self.changed(tenant, name, api.delete_adapter, name, principal(tenant), self.state)
        one = self.adapters.pop((tenant, name), None)
        if one is not None:
            self.ram.discard((tenant, one.content))
            for use in self.uses_of(tenant, name):
                use.named = False

    @rule(tenant=tenants, name=names)
    def generate(self, tenant: str, name: str) -> None:
        found = self.means(tenant, name)

        async def acquire() -> Lease:
            return self.state.registry.acquire(name, tenant)

        lease = self.asked(found is not None, name, acquire)
        if found is None:
            return
        owner, one = found
        assert (lease.ref.tenant, lease.ref.version, lease.ref.digest) == (
            owner,
            one.current,
            self.digests[one.content],
        )
        assert self.state.cache.peek(lease.ref.key) == ((owner, one.content) in self.ram), "or its load would be quick"
        assert self.state.cache.get(lease.ref.key).key == lease.ref.key
        self.ram.add((owner, one.content))
        self.device.resident.add(lease.ref.key)
        self.state.began(lease.ref)
        self.open.append(Use(lease, owner, one.content))

    @rule(at=st.integers(0, 5))
    def finish(self, at: int) -> None:
        """What was begun ends on the bytes that it began with, whatever became of the name."""
        if at < len(self.open):
            self.end(self.open.pop(at))

    def end(self, use: Use) -> None:
        ref = use.lease.ref
        assert ref.digest == self.digests[use.content]
        assert self.state.registry.load(ref.key).rank
        if use.named:
            self.state.activity[use.owner, ref.name].in_flight -= 1
        if not any(other.lease.ref.key == ref.key for other in self.open):
            self.device.resident.discard(ref.key)
        use.lease.release()

    @rule(tenant=tenants, limit=st.integers(1, 4))
    def list_all(self, tenant: str, limit: int) -> None:
        seen: list[str] = []
        after: str | None = None
        while True:
            page = self.call(api.list_adapters, principal(tenant), self.state, AdapterQuery(limit=limit, after=after))
            for status in page["data"]:
                self.check(tenant, status)
            seen += [status["name"] for status in page["data"]]
            after = page["next"]
            if after is None:
                break
        assert seen == [name for name in NAMES if self.means(tenant, name)]

    @rule(tenant=tenants, name=names)
    def show(self, tenant: str, name: str) -> None:
        found, asks = self.means(tenant, name), principal(tenant)
        status = self.asked(found is not None, name, api.show_adapter, name, Response(), asks, self.state)
        history = self.asked(found is not None, name, api.list_versions, name, asks, self.state)
        if found is not None:
            self.check(tenant, status)
            versions = {one["version"]: one["digest"] for one in history["data"]}
            assert versions == {at: self.digests[content] for at, content in found[1].versions.items()}

    @rule()
    def restart(self) -> None:
        while self.open:
            self.end(self.open.pop())
        self.state.registry.close()
        self.start()

    @invariant()
    def a_published_name_is_one_adapter(self) -> None:
        published = [name for (_, name), one in self.adapters.items() if one.public]
        assert len(published) == len(set(published))

    def teardown(self) -> None:
        while self.open:
            self.end(self.open.pop())
        for tenant in TENANTS:
            self.list_all(tenant, 4)
        assert not self.state.registry.leases()
        kept = {self.digests[content] for one in self.adapters.values() for content in one.versions.values()}
        self.state.registry.close()
        assert set(self.state.store.digests()) == kept
        self.loop.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def test_ownership(tmp_path: Path) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    Ownership.root = tmp_path
    run_state_machine_as_test(
        Ownership,
        settings=settings(
            max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
