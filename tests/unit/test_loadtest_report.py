"""The report's arithmetic, on traces made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loadtest import report, tiers
from loadtest.client import Trace
from loadtest.markdown import number, render, table
from loadtest.runner import Run
from loadtest.workload import Objective, Request, Workload, parse

WORKLOAD: dict[str, Any] = {
    "arrivals": {"kind": "closed", "streams": 2},
    "prompt_tokens": {"kind": "fixed", "tokens": 10},
    "output_tokens": {"kind": "fixed", "tokens": 3},
}


def workload(**more: Any) -> Workload:
    return parse({**WORKLOAD, **more})


def trace(times: list[float], *, adapter: int | None = 0, sent: float = 0.0, **more: Any) -> Trace:
    """Tokens at these seconds, one each; ended with the last."""
    end = times[-1] if times else sent + 1
    return Trace(
        Request(0, more.get("due"), adapter, 10, 3, 0), times=times, sent=sent, end=end, tokens=len(times), **more
    )


def test_quantiles_are_interpolated_and_in_milliseconds() -> None:
    found = report.spread([0.001 * value for value in range(1, 102)])
    assert found == pytest.approx({"p50": 51, "p90": 91, "p99": 100, "max": 101})
    assert report.spread([0.001, 0.002]) == pytest.approx({"p50": 1.5, "p90": 1.9, "p99": 1.99, "max": 2})
    assert report.spread([]) is None


def test_a_whole_summary() -> None:
    traces = [
        trace([0.1, 0.2, 0.4], sent=0.0, cold=True),
        trace([1.0, 1.1, 1.2], sent=0.5, cold=False, adapter=1),
        Trace(Request(2, None, 1, 10, 3, 0), sent=1.0, end=2.0, error="503 queue_full"),
    ]
    found = report.summary(Run(5, traces, 2.0), workload())
    assert found["requests"] == {
        "planned": 5,
        "sent": 3,
        "finished": 2,
        "failed": 1,
        "reasons": {"503 queue_full": 1},
    }
    assert found["output_tokens"] == 6
    assert found["prompt_tokens"] == 20
    assert found["tokens_per_s"] == 3
    assert found["requests_per_s"] == 1
    assert found["ttft_ms"]["p50"] == pytest.approx(300)  # of 100 and 500
    assert found["gap_ms"]["max"] == pytest.approx(200)
    assert found["e2e_ms"]["max"] == pytest.approx(700)
    assert found["cold"]["requests"] == 1
    assert found["cold"]["ttft_ms"]["p50"] == pytest.approx(100)
    assert found["cold"]["warm_ttft_ms"]["p50"] == pytest.approx(500)
    assert found["lag_ms"] is None
    assert found["goodput"] is None
    assert found["fairness"]["tenants"] is None


def test_latency_counts_from_when_a_request_was_due() -> None:
    """Sent 1.5 s late: the first token 0.1 s after sending is 1.6 s after it was due, and the lateness is told."""
    found = report.summary(Run(1, [trace([3.6, 3.7], sent=3.5, due=2.0)], 4.0), workload())
    assert found["ttft_ms"]["p50"] == pytest.approx(1600)
    assert found["e2e_ms"]["p50"] == pytest.approx(1700)
    assert found["lag_ms"]["max"] == pytest.approx(1500)
    assert found["lag_ms"]["late"] == 1


def test_what_was_sent_in_time_is_not_late() -> None:
    found = report.summary(Run(1, [trace([3.6, 3.7], sent=2.005, due=2.0)], 4.0), workload())
    assert found["lag_ms"]["late"] == 0


def test_goodput_needs_both_limits_and_counts_failures() -> None:
    slo = Objective(ttft_ms=200, gap_ms=100)
    good = trace([0.2, 0.3, 0.4])
    late = trace([0.21, 0.3, 0.4])
    slow = trace([0.1, 0.2, 0.41])  # 155 ms a token on average
    one_token = trace([0.1])
    failed = Trace(Request(0, None, None, 1, 1, 0), error="timeout")
    found = report.goodput([good, late, slow, one_token, failed], slo, 2.0)
    assert found == {"ttft_ms": 200, "gap_ms": 100, "share": pytest.approx(0.4), "requests_per_s": 1.0}
    assert report.goodput([good], None, 2.0) is None


def test_jain() -> None:
    assert report.jain([5, 5, 5]) == pytest.approx(1)
    assert report.jain([1, 0, 0, 0]) == pytest.approx(0.25)
    assert report.jain([1, 2, 3]) == pytest.approx(36 / (3 * 14))
    assert report.jain([]) is None
    assert report.jain([0, 0]) is None


def test_fairness_is_over_the_speed_that_adapters_got_not_over_how_often_they_were_asked() -> None:
    fast = [trace([0.5, 1.0]) for _ in range(9)]  # 2 tokens a second
    rare = trace([0.5, 1.0], adapter=1)
    assert report.summary(Run(10, [*fast, rare], 1.0), workload())["fairness"]["adapters"] == pytest.approx(1)
    starved = Trace(Request(0, None, 1, 10, 3, 0), end=1.0, error="timeout")
    assert report.summary(Run(10, [*fast, starved], 1.0), workload())["fairness"]["adapters"] == pytest.approx(0.5)
    on_base = [trace([0.5, 1.0], adapter=None)]
    assert report.summary(Run(1, on_base, 1.0), workload())["fairness"]["adapters"] is None


def test_a_run_in_which_nothing_came_back() -> None:
    found = report.summary(Run(3, [], 0.0, interrupted=True), workload(slo={"ttft_ms": 1, "gap_ms": 1}))
    assert found["tokens_per_s"] == 0
    assert found["ttft_ms"] is found["cold"] is None
    assert found["goodput"]["share"] == 0


def test_ratios_to_the_base() -> None:
    ours = report.summary(Run(1, [trace([0.2, 0.4])], 1.0), workload())
    base = report.summary(Run(1, [trace([0.1, 0.2], adapter=None)], 0.5), workload())
    found = report.ratios(ours, base)
    assert found["tokens_per_s"] == pytest.approx(0.5)
    assert found["ttft_ms.p50"] == pytest.approx(2)
    assert found["gap_ms.p99"] == pytest.approx(2)
    nothing = report.summary(Run(1, [], 1.0), workload())
    assert report.ratios(ours, nothing)["ttft_ms.p50"] is None


def test_tiers() -> None:
    before = {"ram_hits": 5.0, "ram_misses": 1.0, "device_loads": 6.0}
    after = {"ram_hits": 7.0, "ram_misses": 4.0, "device_loads": 11.0}
    assert tiers.shares(before, after, 10) == {"device": 0.5, "ram": 0.2, "disk": 0.3, "device_loads": 5.0}
    assert tiers.shares(None, after, 10) is None
    assert tiers.shares(before, after, 0) == {"device": None, "ram": None, "disk": None, "device_loads": 5.0}


def test_the_workload_in_the_report_names_no_directory(tmp_path: Path) -> None:
    fields = {"arrivals": WORKLOAD["arrivals"], "lengths_file": str(tmp_path / "lengths.jsonl")}
    assert report.described(parse(fields))["lengths_file"] == "lengths.jsonl"


def test_markdown_has_what_is_there() -> None:
    slo = {"ttft_ms": 200, "gap_ms": 100}
    run = Run(2, [trace([0.1, 0.2], due=0.0), Trace(Request(1, 0.5, 0, 1, 1, 0), error="a | b", due=0.5)], 1.0)
    summary = report.summary(run, workload(slo=slo))
    whole = {"machine": "M", "api": "onebase", "command": "c", "commit": "d", "when": "w", "workload": {"about": "A"}}
    shares = {"device": 1.0, "ram": 0.0, "disk": 0.0, "device_loads": 0.0}
    baseline = {"ratios": {"tokens_per_s": 0.912, "gap_ms.p50": None}}
    page = render({**whole, **summary, "tiers": shares, "baseline": baseline})
    assert page.startswith("# A\n")
    assert "| a \\| b | 1 |" in page
    assert "| tokens_per_s | 0.912 |" in page
    assert "| within the objective (first token in 200 ms, 100 ms a token) | 50.0% |" in page
    assert "| device 100.0%, ram 0.0%, disk 0.0% |" in page


def test_numbers_in_tables() -> None:
    assert [number(value) for value in (None, 0.0, 0.12345, 9.994, 99.96, 1234.5)] == [
        "-",
        "0",
        "0.123",
        "9.99",
        "100",
        "1,234",
    ]
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |\n"
