"""Put, replace, roll back, delete, merge, unmerge, generate, cancel, evict and restart in any order, with fewer slots
than adapters and room for few merged copies, while the engine makes and gives up copies of its own accord.

The model is a dict from name to versions. Whatever happens, an answer is what the digest that it names gives, and
when all is quiet nothing is held.
"""

from __future__ import annotations

import itertools
import queue
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from server.api.lanes import restore
from server.api.state import State
from server.app import build
from server.core import AdapterRef
from server.engine import automerge
from server.engine.automerge import AutoMerge
from server.engine.messages import Delta, Done, Event, LaneChanged, Merge, Sampling, Submit, Unmerge
from server.errors import AdapterNotFound, Conflict
from server.registry.holds import Lease
from server.settings import Settings
from tests.families import ATTENTION, MLP, VOCABULARY, Oracle, prompts_of, save_adapter, save_model
from tests.harness import dear, fresh_base
from tests.serving import until

NAMES = ("mail", "sql", "tone")
CONTENTS = 6  # different adapters, of which `SLOTS` fit on the device
SLOTS = 2
TOKENS = 6
SLACK = 2e-3
ROOM = 500_000  # bytes: two or three merged copies


@dataclass
class Open:
    """A request under way: what it was promised, and what has come."""

    lease: Lease | None
    prompt: list[int]
    content: int | None
    cancelled: bool = False
    tokens: list[int] = field(default_factory=list)
    dones: list[Done] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)


class World:
    """The files of all runs: one base, `CONTENTS` adapters, and the oracle's answers."""

    def __init__(self, folder: Path):
        self.base = save_model("llama", folder / "base")
        targets = [ATTENTION, MLP, ATTENTION + MLP]
        self.adapters = [
            save_adapter(self.base, folder / f"content-{at}", seed=500 + at, r=at + 1, target_modules=targets[at % 3])
            for at in range(CONTENTS)
        ]
        self.prompts = prompts_of((3, 20, 37), VOCABULARY, seed=31)
        self.oracle = Oracle(self.base)
        self.root = folder
        self.runs = itertools.count()

    def check(self, one: Open) -> None:
        """Every token is the greedy choice of the adapter that was promised (but for near ties)."""
        if not one.tokens:
            return
        adapter = None if one.content is None else self.adapters[one.content]
        table = self.oracle.logprobs(one.prompt, one.tokens, adapter)
        for place, token in enumerate(one.tokens):
            assert table[place].max() - table[place, token] < SLACK, f"not what content {one.content} gives"


class Lanes:
    """The registry's lanes, without an event loop."""

    def __init__(self, engine: Any):
        self._engine, self._numbers = engine, itertools.count()
        self._waiting: dict[str, queue.SimpleQueue[LaneChanged]] = {}

    def enter(self, adapter: AdapterRef, pinned: bool, *, keeps: bool = False) -> None:
        self._change(lambda number: Merge(number, adapter, pinned, keeps))

    def leave(self, adapter: AdapterRef, *, asked: bool = False, replaced: bool = False) -> None:
        self._change(lambda number: Unmerge(number, adapter, asked, replaced))

    def inside(self, adapter: AdapterRef) -> bool | None:
        figures = self._engine.stats.copies.get(adapter)
        return None if figures is None or figures.automatic else figures.pinned

    def changed(self, event: LaneChanged) -> None:
        self._waiting.pop(event.id).put(event)

    def _change(self, message: Any) -> None:
        number, answer = f"lane-{next(self._numbers)}", queue.SimpleQueue[LaneChanged]()
        self._waiting[number] = answer
        self._engine.change_lane(message(number))
        error = answer.get(timeout=60).error
        if error is not None:
            raise error


class Lifecycle(RuleBasedStateMachine):
    """See the module's docstring."""

    world: ClassVar[World]
    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.folder = self.world.root / f"run-{next(self.world.runs)}"
        self.names: dict[str, dict[int, int]] = {}  # name -> version -> content
        self.current: dict[str, int] = {}
        self.digests: dict[int, str] = {}
        self.open: dict[str, Open] = {}
        self.ids = itertools.count()
        self.start()

    def start(self) -> None:
        options: dict[str, Any] = {
            "base": str(self.world.base),
            "data_dir": self.folder,
            "device": "cpu",
            "dtype": "float32",
            "adapter_slots": SLOTS,
            "ram_cache_bytes": 60_000,
            "kv_cache_tokens": 16 * 12,
            "max_batch_tokens": 24,
            "merged_bytes": ROOM,
        }
        self.state: State
        self.state, self.engine = build(Settings(**options), fresh_base(self.world.base))
        self.engine._emit = self.receive
        self.lanes = self.state.registry.moves.lanes = Lanes(self.engine)
        self.engine.start()
        self.engine._turns.auto = AutoMerge(dear(), self.engine._merged, 0.5)

    def receive(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, LaneChanged):
                self.lanes.changed(event)
                continue
            one = self.open[event.id]
            if isinstance(event, Delta):
                one.tokens += event.token_ids
            else:
                one.dones.append(event)
                if one.lease is not None:
                    one.lease.release()
                one.ended.set()

    def settle(self, request_id: str) -> None:
        one = self.open[request_id]
        assert one.ended.wait(60), "a request did not end"
        assert len(one.dones) == 1
        done = one.dones[0]
        assert done.error is None or one.cancelled, done.error
        assert one.cancelled or len(one.tokens) == TOKENS
        self.world.check(one)

    @staticmethod
    def full(fault: Conflict) -> None:
        """The one reason for which a lane may be refused here."""
        assert fault.code == "merged_full", fault

    @rule(name=st.sampled_from(NAMES), content=st.integers(0, CONTENTS - 1))
    def put(self, name: str, content: int) -> None:
        source = self.world.adapters[content]
        with self.state.store.stage() as staging:
            shutil.copy(source / "adapter_config.json", staging.config_path)
            shutil.copy(source / "adapter_model.safetensors", staging.weights_path)
            try:
                result = self.state.registry.put(name, staging)
            except Conflict as fault:  # it has a lane, and there is no room for the new version's copy beside the old
                self.full(fault)
                assert self.state.registry.get(name).version == self.current[name]
                return
        before = self.current.get(name)
        assert result.created == (before is None)
        same = before is not None and self.names[name][before] == content
        assert result.changed != same
        version = before if same else max(self.names.get(name, {0: 0})) + 1
        assert result.version.version == version
        assert self.digests.setdefault(content, result.version.digest) == result.version.digest
        self.names.setdefault(name, {})[version] = content
        self.current[name] = version

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.names)))
        version = data.draw(st.sampled_from(sorted(self.names[name])))
        try:
            assert self.state.registry.rollback(name, version).version == version
        except Conflict as fault:
            self.full(fault)
            version = self.current[name]
        self.current[name] = version

    @precondition(lambda self: self.names)
    @rule(data=st.data(), pinned=st.booleans())
    def merge(self, data: st.DataObject, pinned: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.names)))
        try:
            self.state.registry.change(name, merged=True, pinned=pinned)
        except Conflict as fault:
            self.full(fault)
            return
        lease = self.state.registry.acquire(name)
        assert self.lanes.inside(lease.ref) is pinned
        lease.release()

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def unmerge(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.names)))
        self.state.registry.change(name, merged=False)
        lease = self.state.registry.acquire(name)
        assert self.lanes.inside(lease.ref) is None
        lease.release()

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: str) -> None:
        if name in self.names:
            self.state.registry.delete(name)
            del self.names[name], self.current[name]
        else:
            with pytest.raises(AdapterNotFound):
                self.state.registry.delete(name)

    @rule(target=requests, name=st.sampled_from((None, *NAMES)), prompt=st.integers(0, 2), batch=st.booleans())
    def generate(self, name: str | None, prompt: int, batch: bool) -> str:
        request_id = f"r{next(self.ids)}"
        lease = None
        if name is not None and name not in self.names:
            with pytest.raises(AdapterNotFound):
                self.state.registry.acquire(name)
            name = None
        if name is not None:
            lease = self.state.registry.acquire(name)
        content = self.names[name][self.current[name]] if name else None
        assert lease is None or lease.ref.digest == self.digests[content]  # type: ignore[index]
        ids = self.world.prompts[prompt]
        self.open[request_id] = Open(lease, ids, content)
        sampling = Sampling(max_tokens=TOKENS, ignore_eos=True)
        self.engine.submit(Submit(request_id, tuple(ids), lease.ref if lease else None, sampling, batch=batch))
        return request_id

    @rule(request_id=consumes(requests))
    def cancel(self, request_id: str) -> None:
        self.open[request_id].cancelled = True
        self.engine.cancel(request_id)
        self.settle(request_id)

    @rule(request_id=consumes(requests))
    def wait(self, request_id: str) -> None:
        self.settle(request_id)

    @precondition(lambda self: self.digests)
    @rule(data=st.data())
    def evict_from_ram(self, data: st.DataObject) -> None:
        self.state.cache.drop(data.draw(st.sampled_from(sorted(self.digests.values()))))

    @rule()
    def restart(self) -> None:
        for one in self.open.values():
            one.cancelled = one.cancelled or not one.ended.is_set()
        self.engine.stop()
        for request_id in self.open:
            self.settle(request_id)
        self.state.registry.close()
        self.start()
        restore(self.state.registry)
        listed, _ = self.state.registry.list(limit=100)
        assert {one.version.name: one.version.version for one in listed} == self.current
        for name, versions in self.names.items():
            kept = {v.version: v.digest for v in self.state.registry.versions(name)}
            assert kept == {version: self.digests[content] for version, content in versions.items()}

    @invariant()
    def memory_stays_inside_its_bounds(self) -> None:
        assert self.state.cache.used_bytes <= self.state.cache.capacity_bytes
        assert len(self.engine.stats.resident) <= SLOTS
        assert self.engine.stats.merged_bytes <= ROOM

    def teardown(self) -> None:
        for request_id in list(self.open):
            self.settle(request_id)
        for name in self.names:
            self.state.registry.change(name, merged=False)
        until(lambda: self.engine.stats.merged_bytes == 0)  # one may be on its way still, and not wanted any more
        self.engine.stop()
        stats = self.engine.stats
        assert stats.merged_bytes == 0
        assert (stats.running, stats.waiting, stats.loading) == (0, 0, 0)
        assert (stats.blocks_used, stats.slot_references) == (0, 0)
        assert not self.state.registry.leases()
        named = {self.digests[content] for versions in self.names.values() for content in versions.values()}
        self.state.registry.close()
        assert set(self.state.store.digests()) == named
        shutil.rmtree(self.folder, ignore_errors=True)


def test_lifecycle(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    for name in ("TICK", "PATIENCE", "STAY"):
        monkeypatch.setattr(automerge, name, 0.0)
    Lifecycle.world = World(tmp_path_factory.mktemp("lifecycle"))
    run_state_machine_as_test(
        Lifecycle,
        settings=settings(
            max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
