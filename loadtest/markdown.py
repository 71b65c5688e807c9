"""A report as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

QUANTILES = ("p50", "p90", "p99", "max")


def render(report: dict[str, Any]) -> str:
    """The whole page."""
    requests, workload = report["requests"], report["workload"]
    title = workload.get("about") or "Load test"
    parts = [f"# {title}\n", _facts(report), _times(report)]
    if requests["reasons"]:
        rows = [(reason, str(count)) for reason, count in requests["reasons"].items()]
        parts.append(table(("failed because", "requests"), rows))
    if report["baseline"]:
        rows = [(name, number(ratio)) for name, ratio in report["baseline"]["ratios"].items()]
        parts.append(table(("over the base alone", "ratio"), rows))
    parts.append(
        f"{report['machine']}. API: {report['api']}. Command: `{report['command']}` (commit {report['commit']}, "
        f"{report['when']}).\n"
    )
    return "\n".join(parts)


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table; every column but the first to the right."""
    rule = ("---", *("---:" for _ in head[1:]))
    return (
        "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in [head, rule, *rows])
        + "\n"
    )


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, at least the whole part; `-` for what is not known."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def _facts(report: dict[str, Any]) -> str:
    requests, tiers, good = report["requests"], report["tiers"], report["goodput"]
    rows = [
        ("requests finished / sent / planned", f"{requests['finished']} / {requests['sent']} / {requests['planned']}"),
        ("seconds", number(report["seconds"])),
        ("output tokens/s", number(report["tokens_per_s"])),
        ("requests/s", number(report["requests_per_s"])),
    ]
    if good:
        limits = f"first token in {number(good['ttft_ms'])} ms, {number(good['gap_ms'])} ms a token"
        rows += [
            (f"within the objective ({limits})", f"{good['share']:.1%}"),
            ("goodput, requests/s", number(good["requests_per_s"])),
        ]
    if tiers and tiers["device"] is not None:
        found = ", ".join(f"{tier} {tiers[tier]:.1%}" for tier in ("device", "ram", "disk"))
        rows.append(("adapters found on", found))
    if (fair := report["fairness"]["adapters"]) is not None:
        rows.append(("Jain's fairness over adapters", number(fair)))
    if (lag := report["lag_ms"]) is not None:
        rows.append((f"sent more than {number(lag['limit'])} ms late", str(lag["late"])))
    if report["interrupted"]:
        rows.append(("interrupted", "yes: what was open was cut off"))
    return table(("", ""), rows)


def _times(report: dict[str, Any]) -> str:
    cold = report["cold"] or {}
    kinds = (
        ("time to the first token", report["ttft_ms"]),
        ("the same, adapter loaded for it", cold.get("ttft_ms")),
        ("between tokens", report["gap_ms"]),
        ("whole answer", report["e2e_ms"]),
        ("sent after it was due", report["lag_ms"]),
    )
    rows = [(name, *(number(times[one]) for one in QUANTILES)) for name, times in kinds if times]
    return table(("milliseconds", *QUANTILES), rows)
