"""`make bench`: 16 streams over 16 adapters, onebase over HTTP against PEFT's mixed batch, turn by turn in one run."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from loadtest.client import at_once
from loadtest.service import put, serving
from loadtest.workload import make_adapters, prompts
from server.model.bundled import DEFAULT_DATA_DIR, materialise

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Writes `results/compare-<dtype>.json` and `.md`, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    report = compare(arguments)
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"compare-{arguments.dtype}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    stem.with_suffix(".md").write_text(table(report))
    print(table(report))


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs both sides alternately; only one of them computes at a time."""
    base = materialise()
    folder = DEFAULT_DATA_DIR.expanduser() / "bench" / "adapters"
    adapters = make_adapters(base, folder, arguments.rows)
    sides: dict[str, list[dict[str, float]]] = {"peft": [], "onebase": [], "onebase base": []}
    with tempfile.TemporaryDirectory() as data:
        link_models(Path(data))
        with (
            serving(Path(data) / "log", data_dir=data, dtype=arguments.dtype, adapter_slots=arguments.rows) as server,
            _Peft(base, folder, arguments.dtype) as peft,
        ):
            for path in adapters:
                put(server.url, path.name, path)
            names = [path.name for path in adapters]
            _onebase(server.url, names, arguments, 0, 4)  # brings every adapter to the device
            peft.run(arguments, 0, 4)
            for round_ in range(1, arguments.rounds + 1):
                sides["peft"].append(peft.run(arguments, round_, arguments.new))
                sides["onebase"].append(_onebase(server.url, names, arguments, round_, arguments.new))
                sides["onebase base"].append(_onebase(server.url, [None], arguments, 100 + round_, arguments.new))
    medians = {side: statistics.median(one["tokens_per_s"] for one in rounds) for side, rounds in sides.items()}
    return {
        "when": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "command": f"python -m loadtest.compare --dtype {arguments.dtype} --rows {arguments.rows} "
        f"--prompt {arguments.prompt} --new {arguments.new} --rounds {arguments.rounds}",
        "machine": machine(),
        "dtype": arguments.dtype,
        "rows": arguments.rows,
        "prompt": arguments.prompt,
        "new": arguments.new,
        "tokens_per_s": medians,
        "ratio_to_peft": medians["onebase"] / medians["peft"],
        "adapters_over_base": medians["onebase"] / medians["onebase base"],
        "rounds": sides,
    }


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    rates = report["tokens_per_s"]
    rows, prompt, new = report["rows"], report["prompt"], report["new"]
    return (
        f"| {rows} requests at once, {report['dtype']}, {prompt} tokens in, {new} out | tokens/s, prefill included |\n"
        "|---|---:|\n"
        f"| PEFT, mixed batch of {rows} adapters (static, no server) | {rates['peft']:.0f} |\n"
        f"| onebase over HTTP, {rows} adapters | **{rates['onebase']:.0f}** ({report['ratio_to_peft']:.1f}x PEFT) |\n"
        f"| onebase over HTTP, the base only | {rates['onebase base']:.0f} |\n\n"
        f"Adapters: rank 8 on the attention's projections. Medians of {len(report['rounds']['peft'])} rounds, "
        f"the sides taking turns in one run.\nMachine: {report['machine']}.\nCommand: `{report['command']}` "
        f"(commit {report['commit']}, {report['when']}).\n"
    )


def machine() -> str:
    """Processor, cores and library versions, without names."""
    model = platform.processor() or platform.machine()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    return f"{os.cpu_count()} cores of {model}, torch {torch.__version__}, Python {platform.python_version()}"


class _Peft:
    """The peer in a process of its own, idle while the other side computes."""

    def __init__(self, base: Path, folder: Path, dtype: str):
        threads = str(os.cpu_count())
        command = [sys.executable, "-m", "loadtest.peft_peer", str(base), str(folder), dtype, threads]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> _Peft:
        assert self._process.stdout is not None
        while self._process.stdout.readline().strip() != "ready":
            if self._process.poll() is not None:
                raise RuntimeError("the PEFT side did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)

    def run(self, arguments: argparse.Namespace, seed: int, new: int) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{arguments.rows} {arguments.prompt} {new} {seed}\n")
        self._process.stdin.flush()
        result: dict[str, float] = json.loads(self._process.stdout.readline())
        return result


def _onebase(url: str, names: list[Any], arguments: argparse.Namespace, seed: int, new: int) -> dict[str, float]:
    bodies = [
        {"adapter": names[at % len(names)], "prompt": prompt, "max_tokens": new, "ignore_eos": True}
        for at, prompt in enumerate(prompts(arguments.rows, arguments.prompt, seed))
    ]
    result = asyncio.run(at_once(url, bodies))
    return {key: result[key] for key in ("seconds", "tokens_per_s", "ttft_p50", "gap_p99")}


def link_models(data: Path) -> None:
    """The converted base is shared; adapters of the measurement are not kept."""
    (data / "models").symlink_to(DEFAULT_DATA_DIR.expanduser() / "models")


def _commit() -> str:
    """The commit that was measured; `-dirty` when files differ from it (results of earlier runs aside)."""
    command = ["git", "describe", "--always", "--abbrev=7", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    changed = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!loadtest/results"]
    dirty = subprocess.run(changed, capture_output=True, text=True, check=False).stdout
    return (done.stdout.strip() or "unknown") + ("-dirty" if dirty else "")


if __name__ == "__main__":
    main()
