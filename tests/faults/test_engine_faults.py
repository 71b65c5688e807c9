"""However a request ends, it ends once, gives everything back, and its neighbours' answers stay what they are."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.engine import loading
from server.engine.scheduler import Work
from server.errors import AdapterUnavailable, OnebaseError
from server.lora.merge import MergedCopy
from server.lora.weights import AdapterWeights
from tests.exactness import assert_same
from tests.families import ATTENTION, MLP, VOCABULARY, Oracle, prompts_of, save_adapter, save_model
from tests.harness import Answer, Harness, fresh_base

VICTIM = b"victim"  # the salt by which a hook knows a request
PROMPTS = prompts_of((7, 20, 33, 5, 12, 18, 9, 25), VOCABULARY, seed=31)
LONG = prompts_of((300,), VOCABULARY, seed=32)[0]


@pytest.fixture(scope="module")
def folder(models: Path) -> Path:
    path = models / "llama"
    return path if path.exists() else save_model("llama", path)


@pytest.fixture(scope="module")
def adapters(folder: Path, models: Path) -> list[Path]:
    targets = [ATTENTION, MLP, ["q_proj", "down_proj"], ATTENTION + MLP, ["v_proj"], ["o_proj", "up_proj"]]
    return [
        save_adapter(folder, models / f"faults-{at}", seed=500 + at, r=2 + at, target_modules=names)
        for at, names in enumerate(targets)
    ]


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)


class Pause:
    """A place where the engine's thread waits, so that a test can act between two steps."""

    def __init__(self, holds: Callable[[], Any]):
        self._holds = holds
        self._reached, self._go = threading.Event(), threading.Event()

    def __call__(self, work: list[Work]) -> None:
        if self._holds():
            self._reached.set()
            assert self._go.wait(60)

    def __enter__(self) -> None:
        assert self._reached.wait(60)

    def __exit__(self, *_: object) -> None:
        self._go.set()


class Trap(Harness):
    """A harness whose loads can be held up or made to fail, and whose steps can be looked into."""

    def __init__(self, *args: Any, **options: Any):
        self.gates: dict[str, threading.Event] = {}
        self.faults: dict[str, BaseException] = {}
        self.before_step: Callable[[list[Work]], None] = lambda work: None
        super().__init__(*args, **options)
        real = self.runner.run

        def run(work: list[Work], copy: MergedCopy | None) -> Any:
            self.before_step(work)
            return real(work, copy)

        self.runner.run = run  # type: ignore[method-assign]

    def fetch(self, digest: str) -> AdapterWeights:
        if digest in self.gates:
            self.fetched.put(digest)
            assert self.gates[digest].wait(60)
        if digest in self.faults:
            raise self.faults[digest]
        return super().fetch(digest)

    def hold(self, folder: Path) -> threading.Event:
        """Holds up loads of this adapter until the event is set."""
        ref = self.ref(folder)
        assert ref is not None
        return self.gates.setdefault(ref.digest, threading.Event())

    def fail(self, folder: Path, fault: BaseException) -> None:
        ref = self.ref(folder)
        assert ref is not None
        self.faults[ref.digest] = fault

    def make_resident(self, *folders: Path) -> None:
        self.run(*({"prompt": [5, 6], "adapter": folder, "max_tokens": 1} for folder in folders))

    def pause_when(self, holds: Callable[[], Any]) -> Pause:
        """Holds the engine up before the first step at which `holds()` is true."""
        pause = Pause(holds)
        self.before_step = pause
        return pause

    def cancel(self, answer: Answer) -> None:
        self.engine.cancel(answer.id)  # type: ignore[attr-defined]


@contextlib.contextmanager
def trap(folder: Path, **options: Any) -> Iterator[Trap]:
    """A started engine. Afterwards every request has had exactly one Done, as its last event, and nothing is held."""
    harness = Trap(fresh_base(folder), **options)
    harness.engine.start()
    try:
        yield harness
        if harness.engine.alive:
            harness.run({"prompt": [9], "max_tokens": 1})  # a late second Done of another request would be before it
        for answer in harness.answers.values():
            assert answer.dones == 1
        harness.idle()
    finally:
        for gate in harness.gates.values():
            gate.set()
        harness.engine.stop()


def until(holds: Callable[[], Any], seconds: float = 30) -> None:
    """Waits for it; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def assert_fine(oracle: Oracle, answer: Answer, prompt: list[int], adapter: Path | None, tokens: int) -> None:
    assert answer.done is not None
    assert answer.done.outcome == "finished"
    assert answer.finish_reason() == "length"
    assert len(answer.tokens()) == answer.done.completion_tokens == tokens
    assert_same(oracle, prompt, adapter, answer)


def outcome(answer: Answer) -> str:
    assert answer.done is not None
    return answer.done.outcome


PHASES: dict[str, tuple[Callable[[Any], bool], dict[str, Any]]] = {
    "queued": (lambda s: not s.blocks and s.request.ready, {"max_running": 3}),
    "loading": (lambda s: not s.request.ready, {}),
    "prefilling": (lambda s: s.computed > 0 and s.pending > 1, {"max_batch_tokens": 16}),
    "decoding": (lambda s: s.produced >= 3, {}),
    "sampling its first token": (lambda s: s.blocks and s.produced == 0, {"max_batch_tokens": 512}),
}


@pytest.mark.parametrize(("phase", "n"), [*((phase, 1) for phase in PHASES), ("queued", 3), ("decoding", 3)])
def test_a_client_that_goes_away_frees_everything(
    folder: Path, adapters: list[Path], oracle: Oracle, phase: str, n: int
) -> None:
    reached, options = PHASES[phase]
    with trap(folder, **options) as harness:
        seen: list[str] = []
        submitted = threading.Event()

        def cancel_in_phase(work: list[Work]) -> None:
            """On the engine's thread, so that the phase is what it is."""
            assert submitted.wait(30)
            for s in [*harness.scheduler.running, *harness.scheduler.waiting]:
                if s.request.submit.salt == VICTIM and reached(s) and not seen:
                    seen.append(phase)
                    harness.engine.cancel(s.request.submit.id)

        gate = harness.hold(adapters[3])
        if phase != "loading":
            gate.set()
            harness.make_resident(adapters[3])
        chosen = [None, adapters[0], adapters[1]]
        harness.make_resident(*adapters[:2])
        harness.before_step = cancel_in_phase
        neighbours = [
            harness.submit(PROMPTS[at], adapter, max_tokens=40, logprobs=0) for at, adapter in enumerate(chosen)
        ]
        victim = harness.submit(LONG, adapters[3], n=n, max_tokens=150, salt=VICTIM)
        submitted.set()
        harness.wait(victim)
        gate.set()
        assert seen == [phase]
        assert outcome(victim) == "cancelled"
        assert victim.done is not None
        assert victim.done.error is None
        read = victim.done.prompt_tokens
        if phase in ("queued", "loading"):
            assert read == 0
        elif phase == "prefilling":
            assert 0 < read < len(LONG)
        else:
            assert read == len(LONG)
        assert victim.done.completion_tokens == sum(len(d.token_ids) for d in victim.deltas)
        assert (victim.done.completion_tokens > 0) == (phase in ("decoding", "sampling its first token"))
        for at, answer in enumerate(neighbours):
            assert_fine(oracle, harness.wait(answer), PROMPTS[at], chosen[at], 40)
        [again] = harness.run({"prompt": LONG[:50], "adapter": adapters[3], "max_tokens": 4})
        assert_fine(oracle, again, LONG[:50], adapters[3], 4)


def test_cancelling_twice_late_or_without_reason_has_no_effect(folder: Path, oracle: Oracle) -> None:
    with trap(folder) as harness:
        victim = harness.submit(LONG, max_tokens=150)
        neighbour = harness.submit(PROMPTS[0], max_tokens=10)
        for _ in range(3):
            harness.cancel(victim)
        harness.wait(victim)
        harness.cancel(victim)
        harness.engine.cancel("nobody")
        assert_fine(oracle, harness.wait(neighbour), PROMPTS[0], None, 10)
        harness.cancel(neighbour)
        [after] = harness.run({"prompt": PROMPTS[1], "max_tokens": 3})
        assert_fine(oracle, after, PROMPTS[1], None, 3)
        assert (outcome(victim), outcome(neighbour)) == ("cancelled", "finished")
        assert harness.engine.stats.outcomes == {"cancelled": 1, "finished": 2}


FAULTS: list[Exception] = [
    AdapterUnavailable("its bytes do not match its digest"),
    OSError(5, "/secret/path: input/output error"),
    MemoryError(),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_failed_load_ends_those_who_wait_for_it_and_nobody_else(
    folder: Path, adapters: list[Path], oracle: Oracle, fault: Exception
) -> None:
    with trap(folder, slots=2) as harness:
        gate = harness.hold(adapters[0])
        harness.fail(adapters[0], fault)
        broken = [harness.submit(PROMPTS[at], adapters[0], n=at + 1) for at in range(3)]
        fine = harness.submit(PROMPTS[3], adapters[1], max_tokens=12)
        base = harness.submit(PROMPTS[4], max_tokens=12)
        assert_fine(oracle, harness.wait(base), PROMPTS[4], None, 12)
        assert_fine(oracle, harness.wait(fine), PROMPTS[3], adapters[1], 12)
        assert not any(answer.ended.is_set() for answer in broken)
        gate.set()
        for answer in broken:
            harness.wait(answer)
            assert outcome(answer) == "error"
            assert answer.done is not None
            assert isinstance(answer.done.error, OnebaseError)
            assert "secret" not in answer.done.error.message
            if isinstance(fault, OnebaseError):
                assert answer.done.error is fault
            assert answer.deltas == []
        harness.faults.clear()
        [healed] = harness.run({"prompt": PROMPTS[5], "adapter": adapters[0], "max_tokens": 6})
        assert_fine(oracle, healed, PROMPTS[5], adapters[0], 6)


@pytest.mark.parametrize("late", [False, True], ids=["before the forward pass", "after it"])
def test_a_failed_step_costs_the_rows_in_it_and_nobody_else(
    folder: Path, adapters: list[Path], oracle: Oracle, late: bool
) -> None:
    with trap(folder) as harness:
        harness.make_resident(*adapters[:2])
        gate, real, failed = harness.hold(adapters[2]), harness.runner.run, []

        def run(work: list[Work], copy: MergedCopy | None) -> Any:
            done = real(work, copy) if late else None
            if len(work) == 3 and all(item.sequence.produced > 2 for item in work) and not failed:
                failed.append([item.sequence.request.submit.id for item in work])
                raise RuntimeError("the device gave up")
            return done if late else real(work, copy)

        harness.runner.run = run  # type: ignore[method-assign]
        doomed = [harness.submit(PROMPTS[at], [None, *adapters][at], max_tokens=200) for at in range(3)]
        spared = harness.submit(PROMPTS[3], adapters[2], max_tokens=10)
        for answer in doomed:
            harness.wait(answer)
            assert outcome(answer) == "error"
            assert answer.done is not None
            assert answer.done.error is not None
            assert answer.done.error.code == "engine_failure"
            assert answer.done.completion_tokens == len(answer.tokens()) > 2
        assert not spared.ended.is_set()
        gate.set()
        assert_fine(oracle, harness.wait(spared), PROMPTS[3], adapters[2], 10)
        requests = [{"prompt": PROMPTS[at], "adapter": [None, *adapters][at], "max_tokens": 10} for at in range(5)]
        for request, answer in zip(requests, harness.run(*requests), strict=True):
            assert_fine(oracle, answer, request["prompt"], request["adapter"], 10)
        assert sorted(failed[0]) == sorted(a.id for a in doomed)  # type: ignore[attr-defined]


@pytest.mark.parametrize("place", ["schedule", "computed"])
def test_a_fault_outside_the_forward_pass_still_ends_every_request(
    folder: Path, adapters: list[Path], place: str
) -> None:
    """Whatever goes wrong on the engine's thread, nobody waits for ever."""
    harness = Trap(fresh_base(folder))

    def broken(*_: Any) -> Any:
        raise RuntimeError("a bug")

    gate = harness.hold(adapters[0])
    setattr(harness.scheduler, place, broken)
    answers = [harness.submit(PROMPTS[0]), harness.submit(PROMPTS[1], adapters[0])]
    harness.engine.start()
    gate.set()
    try:
        for answer in answers:
            harness.wait(answer, 5)
            assert outcome(answer) == "error"
    finally:
        harness.engine.stop()


def test_others_decode_while_a_cold_adapter_loads(folder: Path, adapters: list[Path], oracle: Oracle) -> None:
    with trap(folder, slots=3) as harness:
        gate = harness.hold(adapters[2])
        chosen = [None, adapters[0], adapters[1]]
        rows = [harness.submit(PROMPTS[at], adapter, max_tokens=200) for at, adapter in enumerate(chosen)]
        until(lambda: all(len(row.tokens()) > 3 for row in rows))
        cold = harness.submit(PROMPTS[3], adapters[2], max_tokens=8)
        assert harness.fetched.get(timeout=30)
        until(lambda: harness.engine.stats.loading == 1)
        before = [len(row.tokens()) for row in rows]
        until(lambda: all(len(row.tokens()) >= min(b + 20, 200) for row, b in zip(rows, before, strict=True)))
        assert cold.deltas == []
        gate.set()
        for at, row in enumerate(rows):
            assert_fine(oracle, harness.wait(row), PROMPTS[at], chosen[at], 200)
        assert_fine(oracle, harness.wait(cold), PROMPTS[3], adapters[2], 8)
        assert cold.done is not None
        assert cold.done.residency.cold


def test_a_cold_adapter_waits_for_a_slot_while_all_are_busy(folder: Path, adapters: list[Path], oracle: Oracle) -> None:
    with trap(folder, slots=2) as harness:
        pause = harness.pause_when(lambda: len(harness.scheduler.running) == 2)
        rows = [harness.submit(PROMPTS[at], adapters[at], max_tokens=60 + 60 * at) for at in range(2)]
        with pause:
            cold = harness.submit(PROMPTS[2], adapters[2], max_tokens=6)
            more = harness.submit(PROMPTS[3], adapters[1], max_tokens=6)  # resident: it passes the one that waits
        for at, row in enumerate(rows):
            assert_fine(oracle, harness.wait(row), PROMPTS[at], adapters[at], 60 + 60 * at)
        assert_fine(oracle, harness.wait(cold), PROMPTS[2], adapters[2], 6)
        assert_fine(oracle, harness.wait(more), PROMPTS[3], adapters[1], 6)
        order = [request for request, _ in harness.event_log]
        ids = [answer.id for answer in (*rows, cold, more)]  # type: ignore[attr-defined]
        last_of_first = max(at for at, request in enumerate(order) if request == ids[0])
        first_of_cold = order.index(ids[2])
        assert first_of_cold > last_of_first, "no slot was free before"
        assert order.index(ids[3]) < first_of_cold
        assert harness.bank.evictions == 1


def test_a_starved_request_is_served_under_a_load_that_never_ends(
    folder: Path, adapters: list[Path], oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two slots, two adapters that always have requests, and a third that would never get in."""
    monkeypatch.setattr(loading, "PATIENCE", 0.02)
    with trap(folder, slots=2) as harness:
        drained = []
        real = harness.bank.drain_one
        monkeypatch.setattr(harness.bank, "drain_one", lambda: (drained.append(1), real()))
        open_: list[tuple[int, Answer]] = []

        def top_up() -> None:
            for popular in (0, 1):
                alive = [a for p, a in open_ if p == popular and not a.ended.is_set()]
                for at in range(4 - len(alive)):
                    open_.append((popular, harness.submit(PROMPTS[at], adapters[popular], max_tokens=20 + 9 * at)))

        top_up()
        until(lambda: all(answer.tokens() for _, answer in open_))
        starved = harness.submit(PROMPTS[6], adapters[2], max_tokens=5)

        def served() -> bool:
            top_up()
            return starved.ended.is_set()

        until(served)
        assert drained
        assert_fine(oracle, starved, PROMPTS[6], adapters[2], 5)
        for _, answer in open_:
            assert outcome(harness.wait(answer)) == "finished"


def test_a_request_that_waits_for_a_slot_has_its_adapter_in_ram_before_one_is_free(
    folder: Path, adapters: list[Path], oracle: Oracle
) -> None:
    with trap(folder, slots=1) as harness:
        pause = harness.pause_when(lambda: len(harness.scheduler.running) == 1)
        row = harness.submit(PROMPTS[0], adapters[0], max_tokens=100)
        with pause:
            cold = harness.submit(PROMPTS[1], adapters[1], max_tokens=6)
            harness.fail(adapters[2], AdapterUnavailable("its bytes do not match its digest"))
            damaged = harness.submit(PROMPTS[2], adapters[2], max_tokens=6)
            harness.fail(adapters[2], AdapterUnavailable("its bytes do not match its digest"))
        until(lambda: harness.engine.stats.prefetches.get("failed"))
        until(lambda: cold.ended.is_set() or harness.engine._loader._ahead)
        assert not row.ended.is_set()
        harness.faults.clear()
        harness.fail(adapters[1], AdapterUnavailable("it was read a second time"))
        assert_fine(oracle, harness.wait(row), PROMPTS[0], adapters[0], 100)
        assert_fine(oracle, harness.wait(cold), PROMPTS[1], adapters[1], 6)
        assert_fine(oracle, harness.wait(damaged), PROMPTS[2], adapters[2], 6)
        assert harness.engine.stats.prefetches["failed"] == 1


def test_one_slot_serves_six_adapters_in_turn(folder: Path, adapters: list[Path], oracle: Oracle) -> None:
    with trap(folder, slots=1) as harness:
        requests = [
            {"prompt": PROMPTS[at % 8], "adapter": adapters[at % 6], "max_tokens": 5, "logprobs": 0} for at in range(18)
        ]
        for request, answer in zip(requests, harness.run(*requests), strict=True):
            assert_fine(oracle, answer, request["prompt"], request["adapter"], 5)
        assert harness.bank.evictions >= 5


def test_nobody_hangs_when_a_starved_request_and_the_last_holder_go_together(
    folder: Path, adapters: list[Path], oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only slot is being drained for one that starves; both it and the holder are cancelled between two steps.
    A third request, for the adapter in the slot, has nothing left to wait for."""
    monkeypatch.setattr(loading, "PATIENCE", 0.0)
    with trap(folder, slots=1) as harness:
        holder = harness.submit(PROMPTS[0], adapters[0], max_tokens=400)
        pause = harness.pause_when(lambda: harness.engine.stats.loading == 2)
        until(holder.tokens)
        starved = harness.submit(PROMPTS[1], adapters[1], max_tokens=4)
        until(lambda: harness.engine.stats.loading == 1)
        third = harness.submit(PROMPTS[2], adapters[0], max_tokens=4)
        with pause:
            harness.cancel(starved)
            harness.cancel(holder)
        try:
            assert_fine(oracle, harness.wait(third, 5), PROMPTS[2], adapters[0], 4)
        finally:
            harness.cancel(third)  # wakes the engine, had it been asleep
        assert (outcome(starved), outcome(holder)) == ("cancelled", "cancelled")


def test_stopping_ends_open_requests_with_an_error(folder: Path, adapters: list[Path]) -> None:
    with trap(folder, max_running=2) as harness:
        gate = harness.hold(adapters[1])
        running = [
            harness.submit(PROMPTS[at], adapter, max_tokens=400) for at, adapter in enumerate([None, adapters[0]])
        ]
        until(lambda: all(row.tokens() for row in running))
        queued = harness.submit(PROMPTS[2], max_tokens=5)
        waiting = harness.submit(PROMPTS[3], adapters[1], n=2)
        assert [harness.fetched.get(timeout=30) for _ in range(2)]
        stopper = threading.Thread(target=harness.engine.stop)
        stopper.start()
        gate.set()
        for answer in (*running, queued, waiting):
            harness.wait(answer)
            assert answer.done is not None
            assert answer.done.outcome == "error"
            assert answer.done.error is not None
            assert (answer.done.error.code, answer.done.error.status) == ("shutting_down", 503)
            assert answer.done.completion_tokens == len(answer.tokens())
        stopper.join(30)
        assert not harness.engine.alive


def test_a_request_behind_the_stop_ends_too(folder: Path) -> None:
    harness = Trap(fresh_base(folder))
    pause = harness.pause_when(lambda: True)
    harness.engine.start()
    first = harness.submit(PROMPTS[0])
    stopper = threading.Thread(target=harness.engine.stop)
    with pause:
        stopper.start()
        late = harness.submit(PROMPTS[1])
    stopper.join(30)
    assert not harness.engine.alive
    for answer in (first, late):
        assert outcome(harness.wait(answer, 5)) in ("error", "finished")
        assert answer.dones == 1
    harness.engine.stop()  # a second time is harmless


def test_a_dead_engine_takes_nothing_more_while_a_load_is_under_way(folder: Path, adapters: list[Path]) -> None:
    """It fails while an adapter is being read. Whoever comes then must not be put into an inbox that nobody reads."""
    harness = Trap(fresh_base(folder))
    gate = harness.hold(adapters[0])
    harness.engine.start()
    waiting = harness.submit(PROMPTS[0], adapters[0])
    assert harness.fetched.get(timeout=30)

    def broken(*arguments: Any) -> Any:
        raise KeyError("an account is broken")

    harness.bank.release = broken  # type: ignore[method-assign]
    harness.scheduler.schedule = broken  # type: ignore[method-assign]
    doomed = harness.submit(PROMPTS[1])
    for answer in (waiting, doomed):
        assert outcome(harness.wait(answer, 10)) == "error"
    assert harness.engine._thread.is_alive()  # it waits for the load
    assert not harness.engine.alive
    gate.set()
    harness.engine._thread.join(30)
    assert (waiting.dones, doomed.dones) == (1, 1)


def test_steps_that_fail_are_counted_until_one_does_not(folder: Path) -> None:
    with trap(folder) as harness:
        run = harness.runner.run

        def failing(work: Any, copy: Any) -> Any:
            assert harness.engine.stats.step_began is not None
            raise RuntimeError("the device is gone")

        harness.runner.run = failing  # type: ignore[method-assign]
        for count in (1, 2, 3):
            assert outcome(harness.run({"prompt": PROMPTS[0]})[0]) == "error"
            assert harness.engine.stats.failed_steps == count
        harness.runner.run = run  # type: ignore[method-assign]
        assert outcome(harness.run({"prompt": PROMPTS[0]})[0]) == "finished"
        until(lambda: harness.engine.stats.step_began is None)
        assert harness.engine.stats.failed_steps == 0


def test_several_answers_differ_and_come_again(folder: Path, adapters: list[Path]) -> None:
    """n = 4: four different answers, one Done; the same seed gives the same four in any company."""
    sampling = {"prompt": PROMPTS[1], "adapter": adapters[0], "temperature": 1.5, "seed": 7, "max_tokens": 12}
    with trap(folder) as harness:
        [alone] = harness.run({**sampling, "n": 4})
        answers = [alone.tokens(index) for index in range(4)]
        assert all(len(tokens) == 12 for tokens in answers)
        assert len({tuple(tokens) for tokens in answers}) == 4
        assert [alone.finish_reason(index) for index in range(4)] == ["length"] * 4
        assert alone.done is not None
        assert (alone.done.prompt_tokens, alone.done.completion_tokens) == (len(PROMPTS[1]), 48)
        crowd = [{"prompt": p, "adapter": a, "temperature": 1.0} for p in PROMPTS[2:5] for a in (None, *adapters[:3])]
        again, single, *_ = harness.run({**sampling, "n": 4}, sampling, *crowd)
        assert [again.tokens(index) for index in range(4)] == answers
        assert single.tokens() == answers[0]
        [other] = harness.run({**sampling, "n": 4, "seed": 8})
        assert not {tuple(other.tokens(index)) for index in range(4)} & {tuple(tokens) for tokens in answers}


def test_answers_of_one_request_that_end_at_different_lengths(folder: Path) -> None:
    """Each sequence gives its blocks back when it ends; the Done waits for the last."""
    with trap(folder) as harness:
        stops = tuple("abcdefghijklmnopqrstuvwxyz")
        [answer] = harness.run(
            {"prompt": PROMPTS[0], "n": 8, "temperature": 3.0, "seed": 1, "stop": stops, "max_tokens": 30}
        )
        lengths = [len(answer.tokens(index)) for index in range(8)]
        assert len(set(lengths)) > 2
        assert answer.done is not None
        assert answer.done.completion_tokens == sum(lengths)
        for index in range(8):
            reasons = [d.finish_reason for d in answer.deltas if d.index == index]
            assert reasons[:-1] == [None] * (len(reasons) - 1)
            assert reasons[-1] == ("length" if lengths[index] == 30 and reasons[-1] == "length" else "stop")
            assert not set(answer.text(index)) & set(stops)


@pytest.mark.parametrize("options", [{"slots": 2, "blocks": 24, "max_batch_tokens": 24}, {"slots": 6}], ids=str)
def test_two_hundred_random_submits_and_cancels(
    folder: Path, adapters: list[Path], oracle: Oracle, options: dict[str, Any]
) -> None:
    dice = random.Random(41)
    with trap(folder, **options) as harness:
        harness.fail(adapters[5], AdapterUnavailable("gone"))
        kept: list[tuple[Answer, list[int], Path | None, int]] = []
        for _ in range(200):
            prompt, adapter = dice.choice(PROMPTS), dice.choice([None, *adapters])
            tokens = dice.randint(1, 10)
            answer = harness.submit(prompt, adapter, max_tokens=tokens, n=dice.choice([1, 1, 1, 2]))
            kept.append((answer, prompt, adapter, tokens))
            for _ in range(dice.choice([0, 0, 1, 2])):
                harness.cancel(dice.choice(kept)[0])
            if dice.random() < 0.1:
                harness.wait(dice.choice(kept)[0])
        for answer, _, adapter, _ in kept:
            expected = ("error", "cancelled") if adapter == adapters[5] else ("finished", "cancelled")
            assert outcome(harness.wait(answer)) in expected
        finished = [one for one in kept if outcome(one[0]) == "finished"]
        assert len(finished) > 20
        for answer, prompt, adapter, tokens in finished[::5]:
            assert_fine(oracle, answer, prompt, adapter, tokens) if len({d.index for d in answer.deltas}) == 1 else None


def test_events_of_a_request_come_in_order_and_end_with_its_done(folder: Path) -> None:
    """No Delta after the Done."""
    events: list[tuple[str, bool]] = []
    with trap(folder) as harness:
        real = harness._emit

        def note(batch: list[Any]) -> None:
            events.extend((event.id, hasattr(event, "outcome")) for event in batch)
            real(batch)

        harness.engine._emit = note
        harness.run(*({"prompt": prompt, "max_tokens": 5, "n": 2} for prompt in PROMPTS[:4]))
    for request in {request for request, _ in events}:
        kinds = [done for other, done in events if other == request]
        assert kinds == [False] * (len(kinds) - 1) + [True]
