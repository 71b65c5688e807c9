"""The tables of what was measured, from the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from docs.words import markdown
from loadtest import comparison
from loadtest.bars import bars_table, measured

RESULTS = Path(__file__).parent.parent / "loadtest" / "results"


def aims_table() -> str:
    """The committed results beside what was aimed at."""
    return bars_table(RESULTS)


def measured_table() -> str:
    """What the committed results of `make bench` and of `loadtest.thousand` say."""
    report = json.loads((RESULTS / "compare.json").read_text())
    return f"{comparison.measured(report)}\n{comparison.notes(report)}\n{_thousand()}"


def _thousand() -> str:
    run = json.loads((RESULTS / "thousand.json").read_text())
    resident, zipf, new = run["resident"], run["zipf"], run["new_adapter"]
    return (
        f"{run['adapters']:,} registered adapters, {run['slots']} slots, RAM for 200 of them, 16 streams over adapters "
        f"drawn by Zipf's law: {zipf['errors']} errors in {zipf['requests']} requests, {zipf['tokens_per_s']:.0f} "
        f"tokens/s where 16 resident adapters reach {resident['tokens_per_s']:.0f}. A new adapter gave its first token "
        f"{new['put_and_first_token_s']:.2f} s after its upload began; the longest pause of the 15 streams beside it "
        f"was {new['others_gap_max_ms']:.0f} ms, their median {new['others_gap_p50_ms']:.0f} ms. `{run['command']}`.\n"
    )


def anatomy_table() -> str:
    """Milliseconds of a decode step and its parts, by number of rows."""
    pages = []
    for dtype in ("float32", "bfloat16"):
        run = json.loads((RESULTS / f"steps-{dtype}.json").read_text())
        parts = list(next(iter(run["anatomy"].values())))
        rows = [(name, *(f"{took[part]:.1f}" for part in parts)) for name, took in run["anatomy"].items()]
        table = markdown((f"{dtype}, {run['context']} tokens of context, ms", *parts), rows)
        pages.append(f"{table}\n`{run['command']}`, commit {run['commit']}, {run['when']}.\n")
    return "\n".join(pages)


def growth_table() -> str:
    """Milliseconds of a decode step of 16 rows, by kind of batch, with the ratios that follow."""
    runs = [json.loads((RESULTS / f"steps-{dtype}.json").read_text()) for dtype in ("float32", "bfloat16")]
    head = ("a step of 16 rows, or of one", *(f"{run['dtype']}, ms" for run in runs))
    rows = [(name, *(f"{run['step_ms'][name]:.1f}" for run in runs)) for name in runs[0]["step_ms"]]
    shares = [(name, *(f"{run['ratios'][name]:.2f}" for run in runs)) for name in runs[0]["ratios"]]
    ratio = ("throughput as a share of the base's", *(run["dtype"] for run in runs))
    return f"{markdown(head, rows)}\n{markdown(ratio, shares)}"


def lanes_table() -> str:
    """What a merged lane gives and costs, and from how many of 16 rows on it is more throughput."""
    runs = [json.loads((RESULTS / f"lanes-{dtype}.json").read_text()) for dtype in measured(RESULTS, "lanes")]
    dtypes = tuple(run["dtype"] for run in runs)
    parts = [(part, name) for part in ("beside", "flood", "whole", "alone") for name in runs[0][part]]
    rows = [(LANES[part], name, *(f"{run[part][name]:.3g}" for run in runs)) for part, name in parts]
    tables = [markdown(("streams", "figure", *dtypes), rows)]
    counts = runs[0]["crossover"]
    rows = [
        (f"{count} of 16", *(f"{run['crossover'][count]['merged / shared']:.2f}" for run in runs)) for count in counts
    ]
    tables.append(markdown(("rows on one adapter", *(f"{dtype}, its lane / shared" for dtype in dtypes)), rows))
    return "\n".join((*tables, _stamps(runs))) + "\n"


LANES = {
    "beside": "one beside 15 on other adapters",
    "flood": "one under 15 streams of prompts of 1,024 tokens",
    "whole": "16 on one adapter",
    "alone": "one alone",
}


def automerge_table() -> str:
    """Throughput with AUTO_MERGE over without."""
    runs = [json.loads((RESULTS / f"automerge-{dtype}.json").read_text()) for dtype in measured(RESULTS, "automerge")]
    rows = []
    for run in runs:
        for part, name in (("zipf", f"{run['adapters']} adapters, Zipf {run['zipf_s']:g}"), ("one", "one adapter")):
            one = run[part]
            each = ", ".join(f"{ratio:.2f}" for ratio in one["rounds"])
            made = max(sum(after.values()) for _, after in one["changes before and after each round"])
            rates = (f"{one['off_tokens_per_s']:.0f}", f"{one['on_tokens_per_s']:.0f}")
            rows.append((f"{run['dtype']}: 16 streams on {name}", *rates, each, f"{made:g}"))
    head = ("streams", "off, tok/s", "on, tok/s", "on / off, by round", "lanes changed by the end of a round, most")
    return f"{markdown(head, rows)}\n{_stamps(runs)}\n"


def tenants_table() -> str:
    """What a flooding tenant does to another, and what keys and the ledger cost."""
    runs = [json.loads((RESULTS / f"tenants-{dtype}.json").read_text()) for dtype in measured(RESULTS, "tenants")]
    rows = []
    for run in runs:
        parts = {f"{count} streams, alone and beside a flood": found for count, found in run["fair"].items()}
        parts |= {"a tiny request": run["auth"], "16 streams and the ledger": run["metering"]}
        rows += [(run["dtype"], what, name, f"{found[name]:.3g}") for what, found in parts.items() for name in found]
    return f"{markdown(('', 'of', 'figure', 'measured'), rows)}\n{_stamps(runs)}\n" if runs else "Not measured yet.\n"


def counting_table() -> str:
    """What the counting for the metrics costs."""
    runs = [json.loads((RESULTS / f"metrics-{dtype}.json").read_text()) for dtype in measured(RESULTS, "metrics")]
    rows = [
        (run["dtype"], what, name, f"{value:.4g}")
        for run in runs
        for what in ("step", "streams", "scrape")
        for name, value in run[what].items()
    ]
    return f"{markdown(('', 'of', 'figure', 'measured'), rows)}\n{_stamps(runs)}\n" if runs else "Not measured yet.\n"


def _stamps(runs: list[dict[str, Any]]) -> str:
    """Where and by which command each of them was measured, and the parts that were measured again."""
    stamps = [stamp for run in runs for stamp in (run, *run.get("again", {}).values())]
    return "\n".join(f"`{one['command']}`, commit {one['commit']}, {one['when']}." for one in stamps)
