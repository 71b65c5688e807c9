"""A request's moments, as the engine sees them: in order, and None where it never came so far."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest

from server.engine.messages import Times
from server.lora.weights import AdapterWeights
from tests.families import ATTENTION, save_adapter, save_model
from tests.harness import Harness, fresh_base, running


@pytest.fixture(scope="module")
def folder(models: Path) -> Path:
    path = models / "llama"
    return path if path.exists() else save_model("llama", path)


@pytest.fixture
def engine(folder: Path) -> Iterator[Harness]:
    with running(fresh_base(folder)) as harness:
        yield harness


def test_what_lies_between_the_moments_is_none_where_a_request_never_came_so_far() -> None:
    whole = Times(arrived=1.0, ready=1.5, scheduled=1.75, first=2.75, ended=4.75)
    assert (whole.load, whole.queue, whole.prefill, whole.decode) == (0.5, 0.25, 1.0, 2.0)
    assert (whole.ttft, whole.e2e) == (1.75, 3.75)
    short = Times(arrived=1.0, ended=1.25)
    assert (short.load, short.queue, short.prefill, short.decode, short.ttft) == (None,) * 5
    assert short.e2e == 0.25


def test_moments_come_in_order_and_the_base_waits_for_no_adapter(engine: Harness) -> None:
    before = monotonic()
    answer = engine.run({"prompt": [3, 4, 5], "max_tokens": 3})[0]
    assert answer.done is not None
    times = answer.done.times
    assert times.ready is not None
    assert times.scheduled is not None
    assert times.first is not None
    assert times.load == 0.0
    assert before <= times.arrived <= times.ready <= times.scheduled < times.first < times.ended <= monotonic()


def test_load_is_how_long_a_request_waited_for_its_adapter(engine: Harness, folder: Path, models: Path) -> None:
    adapter = save_adapter(folder, models / "times", seed=7, r=2, target_modules=ATTENTION)
    gate, fetch = threading.Event(), engine.engine._loader._fetch

    def slowly(key: str) -> AdapterWeights:
        assert gate.wait(60)
        return fetch(key)

    engine.engine._loader._fetch = slowly
    cold = engine.submit([3, 4, 5], adapter, max_tokens=2)
    engine.run({"prompt": [6, 7], "max_tokens": 2})
    opened = monotonic()
    gate.set()
    done = engine.wait(cold).done
    assert done is not None
    assert done.times.ready is not None
    assert done.times.load is not None
    assert done.times.ready > opened
    assert done.times.load == pytest.approx(done.residency.load_ms / 1e3)
    warm = engine.run({"prompt": [3, 4, 5], "adapter": adapter, "max_tokens": 2})[0].done
    assert warm is not None
    assert warm.times.load == 0.0


def test_one_cancelled_while_its_adapter_is_on_its_way_was_never_ready(
    engine: Harness, folder: Path, models: Path
) -> None:
    adapter = save_adapter(folder, models / "times", seed=7, r=2, target_modules=ATTENTION)
    gate, fetch = threading.Event(), engine.engine._loader._fetch
    engine.engine._loader._fetch = lambda key: fetch(key) if gate.wait(60) else None  # type: ignore[assignment,return-value]
    answer = engine.submit([3, 4, 5], adapter)
    engine.engine.cancel(answer.id)  # type: ignore[attr-defined]
    done = engine.wait(answer).done
    gate.set()
    assert done is not None
    assert done.outcome == "cancelled"
    assert (done.times.ready, done.times.scheduled, done.times.first) == (None, None, None)
    assert done.times.e2e >= 0
