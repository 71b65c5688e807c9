"""What this project has set itself on a machine of two cores, beside what the committed results reach."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest import comparison
from loadtest.markdown import number, table


@dataclass(frozen=True)
class Bar:
    """`at_least` or `at_most` is what was aimed at; `reached` what was measured, in the same unit."""

    what: str
    reached: float | None
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
    compare, thousand, cold = (_read(results, name) for name in ("compare", "thousand", "cold"))
    steps = {dtype: _read(results, f"steps-{dtype}")["ratios"] for dtype in ("float32", "bfloat16")}
    yield from _compared(comparison.ratios(compare))
    for dtype, ratios in steps.items():
        # Which of the two it is closer to: what the issue of comparing asks for, or what reading the adapters leaves.
        yield Bar(f"decode steps, {dtype}: 16 adapters / base, attention, rank 8", ratios["attention, rank 8 / base"], 0.92)
        allowed = ratios["all linear, rank 16: what the bytes allow"]
        reached = ratios["all linear, rank 16 / base"] / allowed
        yield Bar(f"decode steps, {dtype}: all linear, rank 16, of what the bytes allow", reached, 0.95)
        for name in ("one adapter", "adapters"):
            key = f"base rows beside as many on {name}"
            count = "one adapter" if name == "one adapter" else "8 adapters"
            limit = ratios[f"{key}: what the bytes allow"]
            what = f"decode steps, {dtype}: 8 base rows beside 8 on {count} / base alone (bytes allow {limit:.3f})"
            yield Bar(what, ratios[f"{key} / base"], 0.97)
    few, many = thousand["resident"], thousand["zipf"]
    share = many["tokens_per_s"] / few["tokens_per_s"]
    yield Bar("1,000 adapters, Zipf 1, 32 slots / 16 resident: tokens/s", share, 0.9)
    yield Bar("the same: p99 between tokens", many["gap_p99_ms"] / few["gap_p99_ms"], at_most=1.5)
    for part, name in (("idle", "idle"), ("beside_15_streams", "beside 15 streams")):
        yield Bar(f"first use of 2 MB on disk, {name}: ms added to the first token", cold[part]["added_p50_ms"], at_most=50)


def bars_table(results: Path) -> str:
    """As Markdown."""
    rows = []
    for bar in bars(results):
        aim = f">= {number(bar.at_least)}" if bar.at_least is not None else f"<= {number(bar.at_most)}"
        rows.append((bar.what, number(bar.reached), aim, {True: "yes", False: "**no**", None: "-"}[bar.met]))
    return table(("what", "reached", "aim", "met"), rows)


def _compared(ratios: dict[str, float | None]) -> Iterator[Bar]:
    for dtype in comparison.BYTES:
        yield Bar(f"over HTTP, {dtype}: 16 at once over 16 adapters / PEFT", ratios[f"adapters, {dtype}: onebase / PEFT"], 3.5)
    better = ratios["adapters: onebase / better of llama.cpp and vLLM"]
    yield Bar("over HTTP: the same / the better of llama.cpp and vLLM", better, 3.0)
    best = ratios["base: onebase / best peer of 16-bit weights"]
    yield Bar("over HTTP: 16 at once on the base / the best peer of 16-bit weights", best, 1.7)
    alone = ratios["one request, decode: onebase / llama.cpp"]
    yield Bar("over HTTP: one alone on the base, decode / llama.cpp", alone, 0.6)
    for dtype in comparison.BYTES:
        alone = ratios[f"one request, decode, {dtype}: onebase / transformers"]
        yield Bar(f"over HTTP, {dtype}: one alone on the base, decode / transformers", alone, 2.5)
        prefill = ratios[f"prefill, {dtype}: arithmetic done / what the machine's matmul does"]
        yield Bar(f"over HTTP, {dtype}: prefill of 16 x 128, arithmetic / the machine's matmul", prefill, 0.6)
        yield Bar(f"over HTTP, {dtype}: 16 adapters / base", ratios[f"onebase {dtype}: adapters / base"], 0.92)
        yield Bar(f"16 adapters, {dtype}: over HTTP / the bare engine", ratios[f"adapters, {dtype}: over HTTP / the bare engine"], 0.95)


def _read(results: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((results / f"{name}.json").read_text())
    return found
