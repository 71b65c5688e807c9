"""What this project has set itself on a machine of two cores, beside what the committed results reach."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest import comparison, pairs
from loadtest.markdown import number, table
from loadtest.peers import engine

BESIDE = {"one adapter": "one adapter", "adapters": "8 adapters"}


@dataclass(frozen=True)
class Bar:
    """`at_least` or `at_most` is what was aimed at; `reached` what was measured, in the same unit, at `commit`."""

    what: str
    reached: float | None
    commit: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """None where nothing was measured."""
        if self.reached is None:
            return None
        enough = self.at_least is None or self.reached >= self.at_least
        return enough and (self.at_most is None or self.reached <= self.at_most)


def bars(results: Path) -> Iterator[Bar]:
    """All of them, from the JSON files in `results`."""
    yield from _compared(_read(results, "compare"))
    yield from _own(_read(results, "own/compare"))
    for dtype in comparison.BYTES:
        yield from _steps(_read(results, f"steps-{dtype}"))
    run = _read(results, "thousand")
    few, many, at = run["resident"], run["zipf"], run["commit"]
    share = many["tokens_per_s"] / few["tokens_per_s"]
    yield Bar("1,000 adapters, Zipf 1, 32 slots / 16 resident: tokens/s", share, at, 0.9)
    yield Bar("the same: p99 between tokens", many["gap_p99_ms"] / few["gap_p99_ms"], at, at_most=1.5)
    run = _read(results, "cold")
    for part in ("idle", "beside_15_streams"):
        what = f"first use of 2 MB on disk, {part.replace('_', ' ')}: ms added to the first token"
        yield Bar(what, run[part]["added_p50_ms"], run["commit"], at_most=50)
    for dtype in measured(results, "lanes"):
        yield from _lanes(_read(results, f"lanes-{dtype}"))
    for dtype in measured(results, "automerge"):
        run = _read(results, f"automerge-{dtype}")
        yield Bar(f"{dtype}: AUTO_MERGE on / off, Zipf 1.5", run["zipf"]["on / off"], run["commit"], 0.98)
    for dtype in measured(results, "tenants"):
        yield from _tenants(_read(results, f"tenants-{dtype}"))
    for dtype in measured(results, "metrics"):
        run = _read(results, f"metrics-{dtype}")
        streams, at = run["streams"], _commit(run, "streams")
        yield Bar(f"{dtype}: 16 streams with the metrics / without", streams["counted / uncounted"], at, 0.99)
        share = run["step"]["us"] / 1e6 * streams["counted_tokens_per_s"] / pairs.ROWS
        yield Bar(f"{dtype}: counting a step of 16 rows / its time", share, _commit(run, "step"), at_most=0.01)


def bars_table(results: Path) -> str:
    """As Markdown."""
    rows = []
    for bar in bars(results):
        aim = f">= {number(bar.at_least)}" if bar.at_least is not None else f"<= {number(bar.at_most)}"
        met = {True: "yes", False: "**no**", None: "-"}[bar.met]
        rows.append((bar.what, number(bar.reached), aim, met, bar.commit))
    return table(("what", "reached", "aim", "met", "at"), rows)


def measured(results: Path, kind: str) -> list[str]:
    """The number formats for which there are results of this kind."""
    return [dtype for dtype in comparison.BYTES if (results / f"{kind}-{dtype}.json").exists()]


def _compared(run: dict[str, Any]) -> Iterator[Bar]:
    ratios, at = comparison.ratios(run), run["commit"]
    for dtype in comparison.BYTES:
        peft = ratios[f"adapters, {dtype}: onebase / PEFT"]
        yield Bar(f"{dtype}: 16 at once over 16 adapters / PEFT", peft, at, 3.5)
        alone = ratios[f"one request, decode, {dtype}: onebase / transformers"]
        yield Bar(f"{dtype}: one alone on the base, decode / transformers", alone, at, 2.5)
        prefill = ratios[f"prefill, {dtype}: arithmetic done / what the machine's matmul does"]
        yield Bar(f"{dtype}: prefill of 16 x 128, arithmetic / the machine's matmul", prefill, at, 0.6)
    better = ratios["adapters: onebase / better of llama.cpp and vLLM"]
    yield Bar("16 at once over 16 adapters / the better of llama.cpp and vLLM", better, at, 3.0)
    best = ratios["base: onebase / best peer of 16-bit weights"]
    yield Bar("16 at once on the base / the best peer of 16-bit weights", best, at, 1.7)
    yield Bar("one alone, decode / llama.cpp", ratios["one request, decode: onebase / llama.cpp"], at, 0.6)


def _own(run: dict[str, Any]) -> Iterator[Bar]:
    """Of onebase and its bare engine alone: the median of the rounds' own ratios, for rounds differ."""
    at = run["commit"]
    for dtype in comparison.BYTES:
        ours, bare = run["rounds"][f"onebase {dtype}"], run["rounds"][f"{engine.NAME} {dtype}"]
        yield Bar(f"{dtype}: over HTTP / the bare engine", _paired(ours["adapters"], bare["adapters"]), at, 0.95)
        yield Bar(f"{dtype}: 16 adapters / base, over HTTP", _paired(ours["adapters"], ours["base"]), at, 0.92)


def _steps(run: dict[str, Any]) -> Iterator[Bar]:
    ratios, dtype, at = run["ratios"], run["dtype"], run["commit"]
    yield Bar(f"{dtype}: 16 adapters / base, decode steps", ratios["attention, rank 8 / base"], at, 0.92)
    share = ratios["all linear, rank 16 / base"] / ratios["all linear, rank 16: what the bytes allow"]
    yield Bar(f"{dtype}: all linear, rank 16, of what the bytes allow, decode steps", share, at, 0.95)
    for name, shown in BESIDE.items():
        reached = ratios[f"base rows beside as many on {name} / base"]
        yield Bar(f"{dtype}: 8 base rows beside 8 on {shown} / base alone, decode steps", reached, at, 0.97)
    yield Bar(f"{dtype}: 16 of 16 rows merged / base, decode steps", ratios["merged / base"], at, 0.98)
    yield Bar(f"{dtype}: one row merged / base, decode steps", ratios["one row merged / base"], at, 0.98)


def _lanes(run: dict[str, Any]) -> Iterator[Bar]:
    dtype, beside, flood, at = run["dtype"], run["beside"], run["flood"], _commit(run, "beside")
    gap, others = beside["merged / shared gap_p50"], beside["the others' tokens_per_s, merged / shared"]
    yield Bar(f"{dtype}: one merged row beside 15, time between tokens / in the shared lane", gap, at, at_most=0.75)
    yield Bar(f"{dtype}: the 15 others' tokens/s / without the merged lane", others, at, 0.5)
    tail, at = flood["gap_p99 / gap_p50"], _commit(run, "flood")
    yield Bar(f"{dtype}: merged under a flood of prompts, p99 / median between tokens", tail, at, at_most=2)
    # Under the flood the usual time between tokens is that of a merged step and of one chunk.
    chunk, later = flood["gap_p50_ms"] - flood["alone_gap_p50_ms"], flood["ttft_p50_ms"] - flood["alone_ttft_p50_ms"]
    yield Bar(f"{dtype}: its first token under the flood, later than alone / one chunk", later / chunk, at, at_most=1)
    at = _commit(run, "whole")
    yield Bar(f"{dtype}: 16 of 16 rows merged / base", run["whole"]["merged / base"], at, 0.98)
    alone, at = run["alone"]["gap, merged / base"], _commit(run, "alone")
    yield Bar(f"{dtype}: alone and merged, time between tokens / base", alone, at, at_most=1.02)


def _tenants(run: dict[str, Any]) -> Iterator[Bar]:
    dtype, at = run["dtype"], _commit(run, "fair")
    for count, found in run["fair"].items():
        what = f"{dtype}: {count} streams of a tenant beside another's flood / alone"
        yield Bar(f"{what}, tokens/s", found["tokens_per_s, beside / alone"], at, 0.45)
        yield Bar(f"{what}, p99 to the first token", found["ttft_p99, beside / alone"], at, at_most=2)
    added, at = run["auth"]["on - off, ms"], _commit(run, "auth")
    yield Bar(f"{dtype}: AUTH on, ms added to a request", added, at, at_most=1)
    share, at = run["metering"]["metered / unmetered"], _commit(run, "metering")
    yield Bar(f"{dtype}: 16 streams with the ledger / without", share, at, 0.98)


def _commit(run: dict[str, Any], part: str) -> str:
    """Where a part was measured, which may be again."""
    commit: str = run.get("again", {}).get(part, run)["commit"]
    return commit


def _paired(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return statistics.median(one["tokens_per_s"] / other["tokens_per_s"] for one, other in pairs)


def _read(results: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((results / f"{name}.json").read_text())
    return found
