"""A report as a picture. Needs matplotlib, which the extra `bench` brings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.client import Trace


def figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """An empty figure with its axes, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(made)
    return made, made.subplots(rows, columns, squeeze=False)


def plot(report: dict[str, Any], traces: Sequence[Trace], path: Path) -> None:
    """Writes four panels: tokens a second over time, first tokens over time, and how both latencies are distributed."""
    made, ((rate, first), (ttft, gap)) = figure(2, 2, (11, 7))
    done = [trace for trace in traces if trace.error is None]
    arrivals = np.array([at for trace in traces for at in trace.times])
    if len(arrivals):
        bins = max(1, min(120, int(report["seconds"])))
        counts, edges = np.histogram(arrivals, bins=bins)
        rate.stairs(counts / np.diff(edges), edges)
    rate.set(title="chunks with tokens, a second", xlabel="seconds", ylim=(0, None))
    for name, some in (("warm", [one for one in done if not one.cold]), ("cold", [one for one in done if one.cold])):
        first.scatter([one.start for one in some], [one.ttft * 1e3 for one in some], s=8, label=f"{name} ({len(some)})")
    first.set(title="time to the first token", xlabel="due, seconds", ylabel="ms", ylim=(0, None))
    first.legend()
    _distribution(ttft, [one.ttft * 1e3 for one in done], "time to the first token", "ttft_ms", report)
    _distribution(gap, [g * 1e3 for one in done for g in one.gaps], "time between tokens", "gap_ms", report)
    made.suptitle(f"{report['workload'].get('about', '')}\n{report['machine']}", fontsize=9)
    made.savefig(path, dpi=110)


def _distribution(axes: Any, values: list[float], title: str, limit: str, report: dict[str, Any]) -> None:
    if values:
        axes.ecdf(values)
        axes.set_xscale("log")
    if report["goodput"]:
        axes.axvline(report["goodput"][limit], linestyle="--", linewidth=1, color="gray")
    axes.set(title=title, xlabel="ms", ylabel="share of them")
