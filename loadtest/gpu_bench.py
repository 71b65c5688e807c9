"""The engine on a GPU: an 8B Llama's shape with random weights, adapters of rank 16 on all linear layers.

`python -m loadtest.gpu_bench` measures, in one process and without HTTP: a decode step of 32 rows on the base and on
32 adapters, by turns; both against what the memory's measured bandwidth allows; the base without CUDA graphs; and 1 to
1,000 registered adapters, Zipf-distributed. It writes `results/gpu-<shape>.json`. `--shape tiny --device cpu` runs the
same code interpreted (with TRITON_INTERPRET=1) and measures nothing of worth.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from loadtest.gpu_drive import Drive, Job, Result
from loadtest.gpu_model import SHAPES, Adapters, make_base, random_prompts, weight_bytes
from server.engine.graphs import CudaCapture
from server.model.loader import Base

RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the report, and prints it."""
    options = _options(argv)
    report = measure(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--registered", type=int, nargs="*", default=[1, 8, 64, 256, 1000])
    parser.add_argument("--requests", type=int, default=256, help="for each number of registered adapters")
    parser.add_argument("--zipf", type=float, default=1.0)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--profile", action="store_true", help="where the time goes, as OUT with the suffix .txt")
    parser.add_argument("--commit", help="of the code, where git cannot say")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    options.out = options.out or RESULTS / f"gpu-{options.shape}.json"
    options.command = "python -m loadtest.gpu_bench " + " ".join(sys.argv[1:] if argv is None else argv)
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, on one engine."""
    device = torch.device(options.device)
    base = make_base(options.shape, device, getattr(torch, options.dtype))
    weights, adapters = weight_bytes(base), Adapters(base, options.rank)
    cuda = device.type == "cuda"
    began = time.perf_counter()
    drive = Drive(
        base,
        adapters.fetch,
        rows=options.rows,
        longest=options.prompt + options.new,
        slots=options.slots,
        max_rank=options.rank,
        capture=CudaCapture() if cuda else None,
    )
    drive.runner.warm()
    warm_up = time.perf_counter() - began
    bandwidth = _bandwidth(device)
    drive.engine.start()
    try:
        report = {
            "when": time.strftime("%Y-%m-%d"),
            "command": options.command.strip(),
            "commit": options.commit or _commit(),
            "machine": _machine(device),
            "shape": options.shape,
            "dtype": options.dtype,
            "rows": options.rows,
            "prompt": options.prompt,
            "new": options.new,
            "warm_up_s": round(warm_up, 1),
            "copy_bandwidth_gb_s": round(bandwidth / 1e9, 1),
            "decode": _decode(drive, base, weights, adapters, bandwidth, options),
        }
        if options.profile:
            options.out.with_suffix(".txt").write_text(_profile(drive, base, options))
        report["registered"] = _registered(drive, base, options)
    finally:
        drive.engine.stop()
    return report


def _decode(
    drive: Drive, base: Base, weights: int, adapters: Adapters, bandwidth: float, options: argparse.Namespace
) -> dict[str, Any]:
    """Base and adapters by turns; medians over the rounds of each one's steps of all rows."""

    def once(seed: int, lora: bool) -> Result:
        prompts = random_prompts(options.rows, options.prompt, base.vocab_size, seed)
        jobs: list[Job] = [(prompt, str(row) if lora else None) for row, prompt in enumerate(prompts)]
        return drive.run(jobs, new=options.new, concurrency=options.rows)

    once(0, False)
    once(0, True)  # brings the adapters to the device
    rounds: dict[str, list[Result]] = {"base": [], "adapters": [], "base_without_graphs": []}
    for seed in range(1, options.rounds + 1):
        rounds["base"].append(once(seed, False))
        rounds["adapters"].append(once(seed, True))
        with drive.runner.without_graphs():
            rounds["base_without_graphs"].append(once(seed, False))
    found: dict[str, Any] = {name: _steps(results, options.rows) for name, results in rounds.items()}
    floors = _floors(base, weights, adapters, bandwidth, options)
    step = {name: found[name]["step_ms"] for name in rounds}
    return {
        **found,
        **floors,
        "adapters_over_base": _ratio(step["base"], step["adapters"]),
        "adapters_over_base_tokens": _ratio(found["adapters"]["tokens_per_s"], found["base"]["tokens_per_s"]),
        "base_share_of_floor": _ratio(floors["base_floor_ms"], step["base"]),
        "adapters_share_of_floor": _ratio(floors["adapters_floor_ms"], step["adapters"]),
    }


def _steps(results: list[Result], rows: int) -> dict[str, float]:
    """Medians over all rounds' steps of exactly `rows` decodes; `period_ms` is from one such step to the next, with
    what the engine does between them (scheduling, detokenising)."""
    pairs = [pair for result in results for pair in pairwise(result.steps) if pair[0].rows == pair[1].rows == rows]
    steps = [step for result in results for step in result.steps if step.rows == rows]
    device = [step.device_seconds for step in steps if step.device_seconds]
    return {
        "errors": sum(result.errors for result in results),
        "steps": len(steps),
        "step_ms": round(1e3 * statistics.median(step.seconds for step in steps), 4),
        "period_ms": round(1e3 * statistics.median(two.began - one.began for one, two in pairs), 4),
        "device_ms": round(1e3 * statistics.median(device), 4) if device else 0.0,
        "tokens_per_s": round(statistics.median(result.tokens / result.seconds for result in results), 1),
    }


def _floors(
    base: Base, weights: int, adapters: Adapters, bandwidth: float, options: argparse.Namespace
) -> dict[str, Any]:
    """What a step must read at least (weights but the embedding's table, keys and values at half way, adapters), and
    how long that takes at the bandwidth of a copy."""
    context = options.prompt + options.new / 2
    keys = options.rows * context * base.kv_bytes_per_token
    lora = options.rows * adapters.nbytes
    return {
        "weight_bytes": weights,
        "kv_bytes": round(keys),
        "adapter_bytes": lora,
        "base_floor_ms": round(1e3 * (weights + keys) / bandwidth, 4),
        "adapters_floor_ms": round(1e3 * (weights + keys + lora) / bandwidth, 4),
        "bytes_allow": _ratio(weights + keys, weights + keys + lora),
    }


def _registered(drive: Drive, base: Base, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Closed loop over N adapters, Zipf; N is all that changes."""
    found = []
    for number in options.registered:
        chooser = random.Random(number)
        weights = [(at + 1) ** -options.zipf for at in range(number)]
        drawn = chooser.choices([str(at) for at in range(number)], weights, k=options.requests)
        prompts = random_prompts(options.requests, options.prompt, base.vocab_size, 1000 + number)
        loads = drive.bank.loads
        result = drive.run(list(zip(prompts, drawn, strict=True)), new=options.new, concurrency=options.rows)
        found.append(
            {
                "registered": number,
                "asked_for": len(set(drawn)),
                "errors": result.errors,
                "tokens_per_s": round(result.tokens / result.seconds, 1),
                "loads": drive.bank.loads - loads,
                "gap_p50_ms": _quantile(result.gaps, 0.5),
                "gap_p99_ms": _quantile(result.gaps, 0.99),
                "first_p50_ms": _quantile(result.first, 0.5),
                "cold_first_p50_ms": _quantile(result.cold_first, 0.5),
                "cold_first_p99_ms": _quantile(result.cold_first, 0.99),
            }
        )
    return found


def _profile(drive: Drive, base: Base, options: argparse.Namespace) -> str:
    """The kernels of some decode steps with adapters, and of some on the base, by their share of the time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if base.device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
    tables = []
    for lora in (True, False):
        prompts = random_prompts(options.rows, 1, base.vocab_size, 9)
        jobs: list[Job] = [(prompt, str(row) if lora else None) for row, prompt in enumerate(prompts)]
        with torch.profiler.profile(activities=activities) as profiler:
            drive.run(jobs, new=min(8, options.new), concurrency=options.rows)
        order = "self_cuda_time_total" if base.device.type == "cuda" else "self_cpu_time_total"
        tables.append(f"adapters: {lora}\n" + profiler.key_averages().table(sort_by=order, row_limit=25))
    return "\n\n".join(tables)


def _quantile(values: Sequence[float], q: float) -> float:
    """In milliseconds; 0 of nothing."""
    return round(1e3 * sorted(values)[min(int(q * len(values)), len(values) - 1)], 3) if values else 0.0


def _ratio(one: float, other: float) -> float:
    return round(one / other, 4) if other else 0.0


def _bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy within the device's memory that no cache holds."""
    cuda = device.type == "cuda"
    source = torch.ones((1 << 32) if cuda else (1 << 24), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        if cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        if cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(times[2:])


def _machine(device: torch.device) -> str:
    """Device and versions, without names of machines."""
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, interpreted"
    return f"{what}, torch {torch.__version__}, Python {platform.python_version()}"


def _commit() -> str:
    here = Path(__file__).parent
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
