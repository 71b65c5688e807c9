"""Where the milliseconds of a decode step go, and how its cost grows, measured in process: no HTTP, no queue.

`python -m loadtest.steps` runs kinds of batches by turns in one process: step after step of each, so that whatever
else the machine does meets all of them alike. Ratios are of medians.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loadtest.adapters import Adapter
from loadtest.compare import RESULTS
from loadtest.stamp import stamp
from server.core import AdapterRef
from server.engine import runner as running
from server.engine.blocks import BlockPool
from server.engine.messages import Sampling, Submit
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.engine.sequence import Request, Sequence
from server.engine.text import TextStream
from server.kernels.ops import Kernels
from server.lora import cores
from server.lora.weights import AdapterWeights, read_adapter
from server.machine import cores as count_cores
from server.model.bundled import DEFAULT_DATA_DIR, materialise
from server.model.loader import Base, load_base

BLOCK, BLOCKS = 16, 3000
CONTEXT, TURNS = 128, 50
PARTS = ("linear layers and head", "LoRA", "attention", "norms, sums and the MLP's product")
# What a step calls by itself, beside the layers; the head's product counts its own time.
ALONE = {"rms_norm": PARTS[3]}


@dataclass(frozen=True)
class Kind:
    """A batch of `rows` sequences with `context` tokens; row i has adapter i modulo their number, None is the base. Or
    all are on a copy of the base with one adapter `merged` in."""

    name: str
    rows: int
    adapters: tuple[Adapter | None, ...] = (None,)
    context: int = CONTEXT
    merged: Adapter | None = None


class Batch:
    """The running sequences of a kind, with a scheduler and block accounts of their own."""

    def __init__(self, kind: Kind, base: Base, runner: Runner, loaded: dict[str, AdapterWeights]):
        self.kind, self.base, self._runner = kind, base, runner
        self._copy = runner.merge(loaded[kind.merged.name]) if kind.merged else None
        self._scheduler = Scheduler(
            BlockPool(BLOCKS, BLOCK), max_batch_tokens=256, max_running=kind.rows, prefix_cache=False
        )
        dice = random.Random(kind.name)
        for number in range(kind.rows):
            adapter = kind.adapters[number % len(kind.adapters)]
            reference = AdapterRef(adapter.name, 1, adapter.name) if adapter else None
            prompt = [dice.randrange(100, 40_000) for _ in range(kind.context)]
            submit = Submit(f"{number}", tuple(prompt), reference, Sampling(max_tokens=4096, ignore_eos=True))
            request = Request(submit, b"", 0.0, weights=loaded[adapter.name] if adapter else None)
            self._scheduler.add(Sequence(request, 0, number, prompt, TextStream(base.tokenizer, ())))

    def fill(self) -> None:
        """Computes the prompts. Batches share the pool's memory: what another has computed since is overwritten,
        which changes tokens and not the work."""
        while self._scheduler.waiting or any(one.pending > 1 for one in self._scheduler.running):
            self.step()

    def step(self) -> float:
        """One step; its seconds."""
        start = time.perf_counter()
        work = self._scheduler.schedule()
        choices = self._runner.run(work, self._copy)
        self._scheduler.computed(work)
        for item, choice in choices:
            item.sequence.tokens.append(choice.token)
        return time.perf_counter() - start


def main() -> None:
    """Writes `results/steps-<dtype>.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory")
    arguments = parser.parse_args()
    for dtype in arguments.dtype or ("float32", "bfloat16"):
        report = measure(dtype, arguments.turns)
        (arguments.out / f"steps-{dtype}.json").write_text(json.dumps(report, indent=2) + "\n")
        print(json.dumps(report, indent=2))


def measure(dtype: str, turns: int) -> dict[str, Any]:
    """The anatomy of a step, and its cost by kind of batch, in milliseconds."""
    cores.take(count_cores())
    folder = materialise()
    base = load_base(str(folder), DEFAULT_DATA_DIR.expanduser(), dtype=dtype, device="cpu")
    runner = Runner(base, blocks=BLOCKS, block_size=BLOCK)
    loaded: dict[str, AdapterWeights] = {}

    def batch(kind: Kind) -> Batch:
        for adapter in (*kind.adapters, kind.merged):
            if adapter and adapter.name not in loaded:
                loaded[adapter.name] = read_adapter(
                    adapter.name, adapter.config(), bytearray(adapter.weights(folder)), base.info, base.dtype
                )
        return Batch(kind, base, runner, loaded)

    cost = by_turns([batch(kind) for kind in kinds()], turns)
    return {
        **stamp(f"python -m loadtest.steps --dtype {dtype} --turns {turns}"),
        "dtype": dtype,
        "context": CONTEXT,
        "anatomy": {kind.name: anatomy(batch(kind), turns) for kind in anatomies()},
        "step_ms": cost,
        "ratios": ratios(cost, base, loaded),
    }


def some(count: int, rank: int = 8, targets: str = "attention") -> tuple[Adapter, ...]:
    """Different adapters of one shape."""
    return tuple(Adapter(at, rank, targets) for at in range(count))


def anatomies() -> list[Kind]:
    """The batches whose steps are taken apart."""
    bases = [Kind(f"{rows} on the base", rows) for rows in (1, 4, 16, 64)]
    return [*bases, *(Kind(f"{rows} on {rows} adapters", rows, some(rows)) for rows in (1, 4, 16, 64))]


def kinds() -> list[Kind]:
    """The batches that are compared."""
    return [
        Kind("base", 16),
        Kind("attention, rank 8", 16, some(16)),
        Kind("all linear, rank 16", 16, some(16, 16, "linear")),
        Kind(
            "half of the rows on adapters",
            16,
            tuple(one for pair in zip([None] * 8, some(8), strict=True) for one in pair),
        ),
        Kind("half of the rows on one adapter", 16, (None, *some(1))),
        *(Kind(f"rank {rank}", 16, some(16, rank)) for rank in (16, 32, 64)),
        Kind("ranks 8 to 64", 16, tuple(Adapter(at, (8, 16, 32, 64)[at % 4], "attention") for at in range(16))),
        *(Kind(f"{count} adapters", 16, some(count)) for count in (1, 4)),
        *(Kind(f"context {context}", 16, context=context) for context in (512, 1024)),
        Kind("merged: all linear, rank 16", 16, merged=some(1, 16, "linear")[0]),
        Kind("one row on the base", 1),
        Kind("one row merged: all linear, rank 16", 1, merged=some(1, 16, "linear")[0]),
    ]


def by_turns(batches: list[Batch], turns: int) -> dict[str, float]:
    """Median milliseconds of a decode step of each."""
    for one in batches:
        one.fill()
        one.step()
    seconds: dict[str, list[float]] = {one.kind.name: [] for one in batches}
    for _ in range(turns):
        for one in batches:
            seconds[one.kind.name].append(one.step())
    return {name: statistics.median(values) * 1e3 for name, values in seconds.items()}


def anatomy(one: Batch, turns: int) -> dict[str, float]:
    """Mean milliseconds of a decode step and of its parts."""
    one.fill()
    one.step()
    assert one.base.kernels is not None, "this takes the kernels apart"
    with clocks(one.base.kernels) as spent:
        whole = sum(one.step() for _ in range(turns))
    parts = {part: seconds / turns * 1e3 for part, seconds in spent.items()}
    step = whole / turns * 1e3
    return {"step": step, **parts, "everything else": step - sum(parts.values())}


@contextmanager
def clocks(kernels: Kernels) -> Iterator[dict[str, float]]:
    """Adds up the seconds spent in each part meanwhile."""
    spent = dict.fromkeys((*PARTS, "choosing tokens"), 0.0)

    def timed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            found = function(*arguments)
            spent[part] += time.perf_counter() - start
            return found

        return call

    before, sample = list(kernels.spent), vars(running)["sample"]
    for name, part in ALONE.items():
        setattr(kernels, name, timed(getattr(kernels, name), part))
    vars(running)["sample"] = timed(sample, "choosing tokens")
    try:
        yield spent
    finally:
        for part, start, end in zip(PARTS, before, kernels.spent, strict=True):
            spent[part] += (end - start) / 1e9
        for name in ALONE:
            delattr(kernels, name)
        vars(running)["sample"] = sample


def ratios(cost: dict[str, float], base: Base, loaded: dict[str, AdapterWeights]) -> dict[str, float]:
    """Throughput of rows with adapters as a share of the base's, and the share that the bytes alone allow."""
    weights = sum(shape.in_features * shape.out_features for shape in base.info.linears.values())
    head = base.model.get_input_embeddings().weight.numel()
    keys = 16 * CONTEXT * base.kv_bytes_per_token
    read = (weights + head) * base.dtype.itemsize + keys
    found = {}
    for name, adapters in (("attention, rank 8", some(16)), ("all linear, rank 16", some(16, 16, "linear"))):
        found[f"{name} / base"] = cost["base"] / cost[name]
        found[f"{name}: what the bytes allow"] = read / (read + sum(loaded[one.name].nbytes for one in adapters))
    for name, count in (("adapters", 8), ("one adapter", 1)):
        found[f"base rows beside as many on {name} / base"] = cost["base"] / cost[f"half of the rows on {name}"]
        lora = sum(loaded[one.name].nbytes for one in some(count))
        found[f"base rows beside as many on {name}: what the bytes allow"] = read / (read + lora)
    found["merged / base"] = cost["base"] / cost["merged: all linear, rank 16"]
    found["one row merged / base"] = cost["one row on the base"] / cost["one row merged: all linear, rank 16"]
    return found


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
