"""The load test of the metrics: its figures, the parts that are measured again, and their table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from docs import measured
from loadtest import bars, metrics
from loadtest.pairs import Pair
from loadtest.stamp import again

STREAMS = {"counted_tokens_per_s": 400.0, "uncounted_tokens_per_s": 401.0, "counted / uncounted": 0.995}


def test_a_step_is_counted_in_microseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "STEPS", 10)
    assert 0 < metrics.step("bfloat16", metrics.Effort(1, 1))["us"] < 1e5


def test_pairs_are_compared_turn_by_turn() -> None:
    pair = Pair({"counted": [90.0, 100.0, 300.0], "uncounted": [100.0, 100.0, 200.0]})
    assert pair.rates() == {"counted": 100.0, "uncounted": 100.0}
    assert pair.ratios() == [0.9, 1.0, 1.5]


def test_a_part_that_is_measured_again_has_its_own_stamp() -> None:
    before = {"when": "1", "commit": "a", "command": "all", "step": {"us": 1.0}, "streams": STREAMS}
    report = {"when": "2", "commit": "b", "command": "step", "step": {"us": 2.0}}
    after = again(before, report, ["step"])
    assert after["step"] == {"us": 2.0}
    assert after["commit"] == "a"
    assert after["again"] == {"step": {"when": "2", "commit": "b", "command": "step"}}
    assert bars._commit(after, "step") == "b"
    assert bars._commit(after, "streams") == "a"


def test_the_table_shows_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = {"when": "2026-01-01", "commit": "abc1234", "command": "it", "dtype": "bfloat16"}
    run |= {"step": {"us": 40.0}, "streams": STREAMS, "scrape": {"ms": 20.0}}
    (tmp_path / "metrics-bfloat16.json").write_text(json.dumps(run))
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    table = measured.counting_table()
    assert "| bfloat16 | step | us | 40 |" in table
    assert "commit abc1234" in table
