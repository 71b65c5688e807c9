"""Replays request streams through the real RAM tier and slots, for each eviction policy; nothing is computed.

`python -m loadtest.eviction` first measures what loads of four ranks take, and then counts loads at that cost: no
request waits for anything. Every stream names 1000 adapters; which of them is popular is drawn at random.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from loadtest.adapters import Adapter
from loadtest.compare import RESULTS
from loadtest.stamp import stamp
from server.lora import cores
from server.lora.bank import Bank
from server.lora.eviction import Policy, order
from server.lora.weights import AdapterWeights
from server.model.bundled import DEFAULT_DATA_DIR, materialise
from server.model.loader import load_base
from server.registry.cache import AdapterCache
from server.registry.registry import Registry
from server.registry.store import Store

ADAPTERS = 1000
SLOTS, RUNNING = 32, 16
RAM_SHARE = 0.2  # of all adapters' bytes
RANKS = (8, 16, 32, 64)
Stream = Callable[[random.Random, int], list[int]]


@dataclass(frozen=True)
class Load:
    """What an adapter of a rank takes: bytes in RAM, seconds from disk."""

    nbytes: int
    seconds: float


def main() -> None:
    """Writes `results/eviction.json` and prints reload seconds under each policy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000, help="of each stream")
    parser.add_argument("--json", type=Path, default=RESULTS / "eviction.json")
    arguments = parser.parse_args()
    loads = measure_loads()
    runs = replays(loads, arguments.requests)
    report = {
        **stamp(f"python -m loadtest.eviction --requests {arguments.requests}"),
        "adapters": ADAPTERS,
        "slots": SLOTS,
        "running": RUNNING,
        "ram_share": RAM_SHARE,
        "loads": {f"rank {rank}": {"nbytes": load.nbytes, "seconds": load.seconds} for rank, load in loads.items()},
        "load_fixed_bytes": round(fixed_bytes(list(loads.values()))),
        "runs": runs,
    }
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    for run in runs:
        print(run["ranks"], run["stream"], {name: one["reload_seconds"] for name, one in run["policies"].items()})


def measure_loads() -> dict[int, Load]:
    """Disk (from the page cache) to tensors, hashed; the least of 25, on one core as the server's loaders have it."""
    cores.take(1)
    folder = materialise()
    base = load_base(str(folder), DEFAULT_DATA_DIR.expanduser(), dtype="float32", device="cpu")
    loads = {}
    with tempfile.TemporaryDirectory() as data:
        store = Store(Path(data))
        registry = Registry(store, base.info, max_rank=max(RANKS), dtype=base.dtype)
        for rank in RANKS:
            adapter = Adapter(0, rank, "attention")
            with store.stage() as staging:
                staging.config_path.write_bytes(adapter.config())
                staging.weights_path.write_bytes(adapter.weights(folder))
                digest = registry.put(f"rank-{rank}", staging).version.digest
            seconds = []
            for _ in range(25):
                start = time.perf_counter()
                weights = registry.load(digest)
                seconds.append(time.perf_counter() - start)
            loads[rank] = Load(weights.nbytes, round(min(seconds), 5))
    return loads


def fixed_bytes(loads: list[Load]) -> float:
    """The part of a load that does not depend on its size, as bytes that take as long (least squares)."""
    slope, intercept = statistics.linear_regression([load.nbytes for load in loads], [load.seconds for load in loads])
    return intercept / slope


def replays(loads: dict[int, Load], requests: int) -> list[dict[str, Any]]:
    """Every mix of ranks with every stream under every policy."""
    runs = []
    for ranks in ((RANKS[0],), RANKS):
        rng = random.Random(1)
        sizes = [loads[rng.choice(ranks)] for _ in range(ADAPTERS)]
        for name, make in STREAMS.items():
            stream = make(random.Random(2), requests)
            policies = {policy: Replay(sizes, policy).run(stream) for policy in get_args(Policy)}
            runs.append({"ranks": list(ranks), "stream": name, "policies": policies})
    return runs


@dataclass
class Replay:
    """One stream through both tiers: RUNNING requests at a time, each with a reference on its slot."""

    loads: list[Load]
    policy: Policy
    reload_seconds: float = 0.0
    running: list[str] = field(default_factory=list)

    def run(self, stream: list[int]) -> dict[str, float]:
        """Shares of the requests, and of their bytes, that found their adapter on the device or in RAM."""
        capacity = int(RAM_SHARE * sum(load.nbytes for load in self.loads))
        bank, cache = Bank(SLOTS, order(self.policy)), AdapterCache(self._load, capacity, order(self.policy))
        on_device = asked = found = 0
        for index in stream:
            digest, nbytes = str(index), self.loads[index].nbytes
            if len(self.running) == RUNNING:
                bank.release(self.running.pop(0))
            asked += nbytes
            if bank.holds(digest):
                on_device += 1
                found += nbytes
            else:
                before = cache.hits
                if not bank.reserve(digest):
                    raise RuntimeError("there are fewer slots than running requests")
                bank.fill(digest, cache.get(digest))
                found += nbytes * (cache.hits - before)
            bank.acquire(digest)
            self.running.append(digest)
        return {
            "device_hit_rate": round(on_device / len(stream), 4),
            "hit_rate": round((on_device + cache.hits) / len(stream), 4),
            "byte_hit_rate": round(found / asked, 4),
            "reload_seconds": round(self.reload_seconds, 2),
        }

    def _load(self, digest: str) -> AdapterWeights:
        load = self.loads[int(digest)]
        self.reload_seconds += load.seconds
        return AdapterWeights(digest, {}, 1, load.nbytes)


def zipf(s: float) -> Stream:
    """The k-th most popular adapter is asked for in proportion to k^-s."""
    weights = list(itertools.accumulate((at + 1) ** -s for at in range(ADAPTERS)))
    return lambda rng, count: _named(rng, rng.choices(range(ADAPTERS), cum_weights=weights, k=count))


def power_law(a: float) -> Stream:
    """S-LoRA's: index = floor(X * adapters), X of the power distribution with exponent a."""
    return lambda rng, count: _named(
        rng, [min(ADAPTERS - 1, int(rng.random() ** (1 / a) * ADAPTERS)) for _ in range(count)]
    )


def shifting(every: int) -> Stream:
    """Zipf 1, with all popularities drawn anew after every `every` requests."""
    return lambda rng, count: [index for at in range(0, count, every) for index in zipf(1)(rng, min(every, count - at))]


def scanned(rng: random.Random, count: int) -> list[int]:
    """Zipf 1; after every 1000 requests somebody goes through the next 250 adapters, once each."""
    popular, everybody = iter(zipf(1)(rng, count)), itertools.cycle(range(ADAPTERS))
    turns = itertools.cycle([popular] * 1000 + [everybody] * 250)
    return [next(turn) for turn in itertools.islice(turns, count)]


def _named(rng: random.Random, places: list[int]) -> list[int]:
    names = rng.sample(range(ADAPTERS), ADAPTERS)
    return [names[place] for place in places]


STREAMS: dict[str, Stream] = {
    "zipf 0": zipf(0),
    "zipf 1": zipf(1),
    "zipf 1.5": zipf(1.5),
    "power law 0.1": power_law(0.1),
    "power law 0.5": power_law(0.5),
    "zipf 1, anew every 2000": shifting(2000),
    "zipf 1, anew every 5000": shifting(5000),
    "zipf 1 and scans": scanned,
}

if __name__ == "__main__":
    main()
