"""The figures of `compare.py` as ratios, beside what the machine allows, as Markdown and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loadtest.markdown import number, table
from loadtest.peers import engine
from loadtest.peers.peer import RANK
from loadtest.plot import figure

MOVED = 0.10  # floors that differ more than this before and after: the machine was not the same
# SmolLM2-135M: weights of the blocks' matrices, and of the head, which is the embedding.
BLOCKS, HEAD = 106_168_320, 28_311_552
BYTES = {"float32": 4, "bfloat16": 2}
SIXTEEN_BIT = ("float16", "bfloat16")


def compare_floors(before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    """Both, and the ratio of those that moved by more than a tenth."""
    ratios = {name: after[name] / before[name] for name in before}
    return {
        "before": before,
        "after": after,
        "moved": {name: ratio for name, ratio in ratios.items() if abs(ratio - 1) > MOVED},
    }


def roofline(report: dict[str, Any], dtype: str) -> dict[str, dict[str, float]]:
    """What the machine allows on the base, from the slower of the two floors: every step reads all weights once, and
    the prefill's arithmetic is done at the matmul rate. Attention, norms and sampling are left out.
    """
    floors = report["floors"]["before"]
    read, rate = floors["read GB/s"] * 1e9, floors[f"matmul {dtype} 256 rows GFLOP/s"] * 1e9
    few = floors[f"matmul {dtype} 16 rows, head GFLOP/s"] * 1e9
    found = {}
    for case, rows in (("base", report["rows"]), ("one", 1)):
        step = max((BLOCKS + HEAD) * BYTES[dtype] / read, 2 * rows * (BLOCKS + HEAD) / few)
        prefill = 2 * rows * (report["prompt"] * BLOCKS + HEAD) / rate
        seconds = prefill + (report["new"] - 1) * step
        found[case] = {
            "tokens_per_s": rows * report["new"] / seconds,
            "decode_tokens_per_s": rows / step,
            "ttft_ms": prefill * 1e3,
        }
    return found


def ratios(report: dict[str, Any]) -> dict[str, float | None]:
    """onebase over the peers, as the bars are said."""
    found: dict[str, float | None] = {}
    for dtype in BYTES:
        found[f"adapters, {dtype}: onebase / PEFT"] = _over(
            _of(report, f"onebase {dtype}", "adapters"), _of(report, f"PEFT {dtype}", "adapters")
        )
        found[f"onebase {dtype}: adapters / base"] = _over(
            _of(report, f"onebase {dtype}", "adapters"), _of(report, f"onebase {dtype}", "base")
        )
        found[f"one request, decode, {dtype}: onebase / transformers"] = _over(
            _of(report, f"onebase {dtype}", "one"), _of(report, f"transformers {dtype}", "one")
        )
        found[f"prefill, {dtype}: arithmetic done / what the machine's matmul does"] = _over(
            _prefill_rate(report, f"onebase {dtype}"), report["floors"]["before"][f"matmul {dtype} 256 rows GFLOP/s"]
        )
        found[f"adapters, {dtype}: over HTTP / the bare engine"] = _over(
            _of(report, f"onebase {dtype}", "adapters"), _of(report, f"{engine.NAME} {dtype}", "adapters")
        )
    ours = [f"onebase {dtype}" for dtype in BYTES]
    servers = ["llama.cpp float16", "vLLM bfloat16"]
    narrow = [
        side
        for side in report["medians"]
        if side.endswith(SIXTEEN_BIT) and side not in ours and engine.NAME not in side
    ]
    found["adapters: onebase / better of llama.cpp and vLLM"] = _over(
        _best(report, ours, "adapters"), _best(report, servers, "adapters")
    )
    found["base: onebase / best peer of 16-bit weights"] = _over(
        _best(report, ours, "base"), _best(report, narrow, "base")
    )
    found["one request, decode: onebase / llama.cpp"] = _over(
        _best(report, ours, "one"), _of(report, "llama.cpp float16", "one")
    )
    return found


def measured(report: dict[str, Any]) -> str:
    """The table of sides, with what the machine allows below."""
    rows = report["rows"]
    head = (
        f"{report['prompt']} tokens in, {report['new']} out",
        f"{rows} at once on {rows} adapters, tok/s",
        f"{rows} at once on the base, tok/s",
        "one alone on the base, decode tok/s",
        f"first token, {rows} on adapters, ms",
        "first token, one alone, ms",
    )
    lines = []
    for side in report["medians"]:
        if side.startswith(engine.NAME):
            continue  # nobody can ask it anything
        values = (
            _of(report, side, "adapters"),
            _of(report, side, "base"),
            _of(report, side, "one"),
            report["medians"][side].get("adapters", {}).get("ttft_ms"),
            report["medians"][side].get("one", {}).get("ttft_ms"),
        )
        lines.append((f"**{side}**" if side.startswith("onebase") else side, *map(number, values)))
    for dtype in BYTES:
        allowed = roofline(report, dtype)
        one = allowed["one"]
        values = (None, allowed["base"]["tokens_per_s"], one["decode_tokens_per_s"], None, one["ttft_ms"])
        lines.append((f"*the machine's floor, {dtype}*", *map(number, values)))
    return table(head, lines)


def page(report: dict[str, Any]) -> str:
    """Everything, as Markdown."""
    parts = [measured(report)]
    parts.append(table(("ratio of medians", ""), [(name, number(one)) for name, one in ratios(report).items()]))
    floors = report["floors"]
    rows = [(name, number(floors["before"][name]), number(floors["after"][name])) for name in floors["before"]]
    parts.append(table(("the machine", "before", "after"), rows))
    parts.append(notes(report))
    return "\n".join(parts)


def notes(report: dict[str, Any]) -> str:
    """How it was measured, and what has to be known about it."""
    count = max((len(found) for side in report["rounds"].values() for found in side.values()), default=0)
    absent = "".join(f" {side}: {reason}." for side, reason in report["absent"].items())
    errors = [
        f" {side}, {case}: {one['error']}."
        for side, all_ in report["rounds"].items()
        for case, found in all_.items()
        for one in found
        if "error" in one
    ]
    made = "One round" if count == 1 else f"Medians of {count} rounds"
    moved = report["floors"]["moved"]
    warning = f" **The machine changed meanwhile, measure again: {', '.join(moved)}.**" if moved else ""
    return (
        f"SmolLM2-135M; adapters of rank {RANK} on the attention's projections; tok/s of {report['rows']} at once "
        f"include prefill. {made}, the sides taking turns in one run. transformers and PEFT compute "
        f"static batches, without a server; PEFT's is a mixed batch.{absent}{''.join(errors)}{warning} "
        f"{report['machine']}. `{report['command']}` at {report['commit']}, {report['when']}.\n"
    )


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars for each case; the machine's floors as lines."""
    made, (axes,) = figure(1, 3, (13, 4))
    titles = {"adapters": "at once on as many adapters", "base": "at once on the base", "one": "alone, decode"}
    for one, (case, title) in zip(axes, titles.items(), strict=True):
        sides = [side for side in report["medians"] if _of(report, side, case) and not side.startswith(engine.NAME)]
        colours = ["tab:orange" if side.startswith("onebase") else "tab:gray" for side in sides]
        one.barh(sides, [_of(report, side, case) for side in sides], color=colours)
        one.invert_yaxis()
        one.set(title=f"{1 if case == 'one' else report['rows']} {title}", xlabel="tokens/s")
    made.suptitle(f"{report['prompt']} tokens in, {report['new']} out. {report['machine']}", fontsize=9)
    made.savefig(path, dpi=110)


def _of(report: dict[str, Any], side: str, case: str) -> float | None:
    """Tokens a second: for one request alone of decoding, else prefill included."""
    figures = report["medians"].get(side, {}).get(case, {})
    value: float | None = figures.get("decode_tokens_per_s" if case == "one" else "tokens_per_s")
    return value


def _prefill_rate(report: dict[str, Any], side: str) -> float | None:
    """GFLOP/s of the weights' products; attention's own are left out, and the head works for the last token only."""
    seconds = report["medians"].get(side, {}).get("prefill", {}).get("seconds")
    return 2e-9 * report["rows"] * (report["prompt"] * BLOCKS + HEAD) / seconds if seconds else None


def _best(report: dict[str, Any], sides: list[str], case: str) -> float | None:
    return max((value for side in sides if (value := _of(report, side, case))), default=None)


def _over(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours and theirs else None
