"""What AUTO_MERGE gains and what it costs: `python -m loadtest.automerge`, over HTTP.

Servers with and without it by turns: 16 streams that ask for a hundred adapters by Zipf's law with an exponent of 1.5,
then 16 streams that all ask for one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import numpy as np

from loadtest import adapters
from loadtest.adapters import Adapter
from loadtest.compare import RESULTS
from loadtest.lanes import RANK, ROWS, Bench, Stream
from loadtest.peers.onebase import serve
from loadtest.popularity import Zipf
from loadtest.stamp import stamp
from server.model.bundled import materialise

COUNT, SLOTS, EXPONENT = 100, 32, 1.5
SETTLE = 2  # requests of each stream before they count
Changes: TypeAlias = dict[str, float]
Seen: TypeAlias = dict[str, tuple[float, Changes, Changes]]


def main() -> None:
    """Writes `results/automerge-<dtype>.json` and prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--requests", type=int, default=4, help="of each stream in a round")
    parser.add_argument("--rounds", type=int, default=5, help="of each part, with and without")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory")
    arguments = parser.parse_args()
    report = json.dumps(measure(arguments.dtype, arguments.requests, arguments.rounds), indent=2)
    (arguments.out / f"automerge-{arguments.dtype}.json").write_text(report + "\n")
    print(report)


def measure(dtype: str, requests: int, rounds: int) -> dict[str, Any]:
    """Both parts, with and without by turns; a new server for each, as one process may be luckier than another."""
    base, needed = materialise(), [Adapter(at, RANK, "attention") for at in range(COUNT)]
    command = f"python -m loadtest.automerge --dtype {dtype} --requests {requests} --rounds {rounds}"
    seen: list[dict[bool, Seen]] = []
    for number in range(rounds):
        order = (False, True) if number % 2 == 0 else (True, False)
        seen.append({auto: _run(dtype, base, needed, requests, number, auto) for auto in order})
    parts = {part: _summary([{auto: one[auto][part] for auto in one} for one in seen]) for part in ("zipf", "one")}
    return {**stamp(command), "dtype": dtype, "adapters": COUNT, "slots": SLOTS, "zipf_s": EXPONENT, **parts}


def _run(dtype: str, base: Path, needed: list[Adapter], requests: int, number: int, auto: bool) -> Seen:
    """Both parts on one server: tokens a second, and the lanes that changed."""
    names = [one.name for one in needed]
    with tempfile.TemporaryDirectory() as data:
        settings = {"device": "cpu", "adapter_slots": SLOTS, "auto_merge": auto}
        process, url = serve(Path(data) / "server", dtype=dtype, **settings)
        try:
            adapters.register(url, needed, base)
            found: Seen = {}
            bench = Bench(url, names)
            for part, streams in (("zipf", _zipf), ("one", _one)):
                bench.run(streams(SETTLE, -1))
                before = _changes(url)
                found[part] = (bench.rate(streams(requests, number)), before, _changes(url))
            return found
        finally:
            process.stop()


def _summary(rounds: list[dict[bool, tuple[float, Changes, Changes]]]) -> dict[str, Any]:
    ratios = [one[True][0] / one[False][0] for one in rounds]
    return {
        "off_tokens_per_s": statistics.median(one[False][0] for one in rounds),
        "on_tokens_per_s": statistics.median(one[True][0] for one in rounds),
        "on / off": statistics.median(ratios),
        "rounds": ratios,
        "changes before and after each round": [one[True][1:] for one in rounds],
    }


def _zipf(requests: int, number: int) -> list[Stream]:
    """The same draws for both servers of a round."""
    return [Stream(requests=requests, drawn=_draws(number, at)) for at in range(ROWS)]


def _one(requests: int, number: int) -> list[Stream]:
    return [Stream(0, requests=requests)] * ROWS


def _draws(number: int, stream: int) -> Iterator[int]:
    rng = np.random.default_rng((number + 1, stream))
    law = Zipf("zipf", EXPONENT)
    return (int(one) for _ in itertools.count() for one in law.draw(rng, COUNT, 64))


def _changes(url: str) -> Changes:
    """Copies made and given up so far, as the server counts them."""
    text = httpx.get(f"{url}/metrics", timeout=60).text
    found = re.findall(r'^onebase_lane_changes_total\{change="(\w+)",reason="(\w+)"\} (\S+)', text, re.M)
    return {f"{change}: {reason}": float(count) for change, reason, count in found}


if __name__ == "__main__":
    main()
