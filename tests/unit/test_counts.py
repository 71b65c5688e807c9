"""What the engine counts: every token's gap but the first, every step, the parts of the thread's time, LoRA's share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from server.engine import clock, runner
from server.engine.clock import PARTS, Clock
from server.engine.counting import Counting
from server.engine.counts import FIRST, GAP, LATENCY
from server.engine.messages import Merge, Residency, Sampling, Submit
from server.engine.sequence import Request, Sequence
from server.lora.segmented import Moments
from tests.families import ATTENTION, save_adapter, save_model
from tests.harness import Harness, Lanes, fresh_base, running
from tests.serving import until

VLLM_FIRST = {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
              640, 2560}  # fmt: skip
VLLM_GAP = {0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80}
VLLM_LATENCY = {0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680}


@pytest.fixture(scope="module")
def folder(models: Path) -> Path:
    path = models / "llama"
    return path if path.exists() else save_model("llama", path)


@pytest.fixture(scope="module")
def adapter(folder: Path, models: Path) -> Path:
    return save_adapter(folder, models / "counted", seed=11, r=4, target_modules=ATTENTION)


@pytest.fixture
def engine(folder: Path) -> Iterator[Harness]:
    with running(fresh_base(folder)) as harness:
        yield harness


def request_of(residency: Residency | None = None, **more: Any) -> Request:
    request = Request(Submit("r", (1, 2, 3), None, Sampling(max_tokens=8)), b"", 10.0, **more)
    request.sequences.append(Sequence(request, 0, 0, [1, 2, 3], SimpleNamespace()))  # type: ignore[arg-type]
    request.residency = residency or Residency()
    return request


def test_the_bounds_hold_all_of_vllms() -> None:
    for own, theirs in ((FIRST, VLLM_FIRST), (GAP, VLLM_GAP), (LATENCY, VLLM_LATENCY)):
        assert theirs <= set(own)
        assert list(own) == sorted(own)


def test_a_tokens_gap_is_counted_from_the_second_on() -> None:
    counts, request = Counting(), request_of()
    counts.first(request, 10.5)
    for now in (10.5, 10.75, 11.0):
        counts.token(request.sequences[0], now)
    lane = counts.lanes["base"]
    assert (lane.first.total, lane.first.sum) == (1, 0.5)
    assert (lane.gap.total, lane.gap.sum) == (2, 0.5)


@pytest.mark.parametrize(("outcome", "whole"), [("finished", 1), ("cancelled", 0), ("error", 0)])
def test_waits_are_of_all_and_whole_times_of_those_that_finished(outcome: str, whole: int) -> None:
    counts, request = Counting(), request_of(Residency(cold=True), given=10.5, scheduled=11.0, first=13.0)
    counts.ended(request, outcome, request.times(17.0))
    lane = counts.lanes["base"]
    assert [one.sum for one in (lane.load, lane.queue, lane.prefill)] == [0.5, 0.5, 2.0]
    assert [one.total for one in (lane.e2e, lane.decode, counts.prompt, counts.generation)] == [whole] * 4
    assert lane.e2e.sum == 7.0 * whole
    assert counts.reasons["abort"] == (outcome == "cancelled")


def test_only_cold_requests_count_as_loads() -> None:
    counts = Counting()
    warm = request_of(given=10.0)
    counts.ended(warm, "finished", warm.times(17.0))
    assert counts.lanes["base"].load.total == 0


def test_the_engine_counts_what_it_does_by_lane(engine: Harness, adapter: Path) -> None:
    engine.run({"prompt": [3] * 20, "max_tokens": 5}, {"prompt": [4] * 20, "adapter": adapter, "max_tokens": 4, "n": 2})
    lanes = Lanes(engine)
    assert lanes.change(Merge, adapter, False).error is None
    engine.run({"prompt": [5] * 20, "adapter": adapter, "max_tokens": 3})
    counts = engine.engine.stats.counts
    assert {lane: one.first.total for lane, one in counts.lanes.items()} == {"base": 1, "shared": 1, "merged": 1}
    assert {lane: one.gap.total for lane, one in counts.lanes.items()} == {"base": 4, "shared": 6, "merged": 2}
    assert counts.reasons == {"stop": 0, "length": 4, "budget": 0, "abort": 0, "error": 0}
    assert (counts.prompt.sum, counts.generation.sum) == (60.0, 16.0)
    assert counts.steps["shared"].total + counts.steps["merged"].total == engine.engine.stats.steps
    assert counts.steps["merged"].total == 3
    assert counts.tokens.total == engine.engine.stats.steps
    cached = engine.engine.stats.prefix_hits
    assert counts.tokens.sum == 20 * 4 - cached + 4 + 6 + 2, "prompts of four sequences, and what follows first tokens"
    assert engine.engine.stats.prefix_queries == 80
    assert (engine.engine.stats.slot_hits, engine.engine.stats.slot_misses) == (0, 1)
    assert engine.engine.stats.load_seconds.total == engine.engine.stats.slot_loads == 1
    lanes.unmerge(adapter)


def test_all_time_of_the_thread_is_some_parts(engine: Harness) -> None:
    clock = engine.runner.clock
    engine.run({"prompt": [3] * 20, "max_tokens": 5})
    assert set(clock.parts) == set(PARTS)
    assert all(clock.parts[part] > 0 for part in PARTS)


def test_what_is_idle_is_counted_while_it_lasts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a rate shows hours of it in the moment in which they end."""
    monkeypatch.setattr(clock, "IDLE_SECONDS", 0.01)
    with running(fresh_base(folder)) as engine:
        engine.run({"prompt": [3] * 20, "max_tokens": 5})
        parts, steps = engine.runner.clock.parts, engine.engine.stats.steps
        for _ in range(3):
            before = parts["idle"]
            until(lambda before=before: parts["idle"] > before)
        assert engine.engine.stats.steps == steps
        engine.run({"prompt": [3] * 20, "max_tokens": 5})


def test_failed_steps_are_counted(engine: Harness) -> None:
    real, engine.runner.run = engine.runner.run, None
    assert engine.run({"prompt": [3] * 20, "max_tokens": 5})[0].done.outcome == "error"  # type: ignore[union-attr]
    engine.runner.run = real
    engine.run({"prompt": [3] * 20, "max_tokens": 5})
    assert engine.engine.stats.counts.failed == 1
    assert engine.engine.stats.failed_steps == 0


@pytest.mark.parametrize("kernels", [True, False])
def test_loras_share_is_less_than_the_whole_and_nothing_for_the_base(
    folder: Path, adapter: Path, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "EVERY", 2)
    with running(fresh_base(folder, kernels=kernels)) as engine:
        clock: Clock = engine.runner.clock
        engine.run({"prompt": [3] * 20, "max_tokens": 6})
        assert clock.lora == 0
        before = clock.sampled
        assert before > 0
        engine.run({"prompt": [3] * 20, "adapter": adapter, "max_tokens": 6})
        assert 0 < clock.lora < clock.sampled - before
        assert clock.sampled < clock.parts["forward"] + 1e-9
        if not kernels:
            assert clock.sampled < 0.9 * clock.parts["forward"], "every other step"


def test_moments_on_the_device_are_added_up() -> None:
    times = iter((1.0, 3.0, 10.0, 11.0))

    class Told(Moments):
        def mark(self) -> Any:
            at = next(times)
            return SimpleNamespace(at=at, elapsed_time=lambda end: end.at - at)

    moments = Told()
    for _ in range(2):
        moments.between(moments.mark())
    assert moments.seconds() == pytest.approx(0.003), "events are in milliseconds"


def test_moments_need_a_device() -> None:
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):
            Moments().mark()
