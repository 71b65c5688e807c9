"""`make bench`: onebase beside every peer that is installed, the same requests, turn by turn in one run."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from loadtest import comparison
from loadtest.adapters import Adapter, write
from loadtest.peers import engine, llamacpp, onebase, static, vllm
from loadtest.peers.peer import RANK, TARGETS, Case, NotThere, Peer, Setting, cases
from loadtest.progress import Tick, bar
from loadtest.stamp import stamp
from server.model.bundled import DEFAULT_DATA_DIR, materialise

RESULTS = Path(__file__).parent / "results"
PEERS = Path(os.environ.get("PEERS_DIR", "~/.cache/onebase-peers")).expanduser()
SIDES = ("onebase", "engine", "transformers", "llama.cpp", "vllm")
DTYPES = ("float32", "bfloat16")
WARM_TOKENS = 4


def main() -> None:
    """Writes `compare.json`, `compare.md` and `compare.png`, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16, help="requests at once")
    parser.add_argument("--prompt", type=int, default=128, help="tokens in")
    parser.add_argument("--new", type=int, default=128, help="tokens out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=SIDES)
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory")
    arguments = parser.parse_args()
    report = compare(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "compare.json").write_text(json.dumps(report, indent=2) + "\n")
    (arguments.out / "compare.md").write_text(comparison.page(report))
    comparison.plot(report, arguments.out / "compare.png")
    print(comparison.page(report))


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Starts every side, lets them take turns, and stops them."""
    base = materialise()
    adapters = [Adapter(at, RANK, TARGETS) for at in range(arguments.rows)]
    paths = write(adapters, base, DEFAULT_DATA_DIR.expanduser() / "bench" / "adapters")
    command = f"python -m loadtest.compare --rows {arguments.rows} --prompt {arguments.prompt} --new {arguments.new}"
    sides = "" if set(arguments.sides) == set(SIDES) else f" --sides {' '.join(arguments.sides)}"
    stamped = stamp(f"{command} --rounds {arguments.rounds}{sides}")  # now: files may change meanwhile
    before = floors()
    with tempfile.TemporaryDirectory() as folder:
        threads = len(os.sched_getaffinity(0))
        context = arguments.prompt + arguments.new + 16
        setting = Setting(base, paths, Path(folder), threads, context)
        peers: list[Peer] = []
        try:
            absent = start(setting, arguments.sides, peers)
            rounds = take_turns(peers, arguments)
        finally:
            for peer in peers:
                peer.process.stop()
    return {
        **stamped,
        **{name: getattr(arguments, name) for name in ("rows", "prompt", "new")},
        "medians": {side: {case: medians(found) for case, found in all_.items()} for side, all_ in rounds.items()},
        "absent": absent,
        "floors": comparison.compare_floors(before, floors()),
        "rounds": rounds,
    }


def start(setting: Setting, sides: list[str], peers: list[Peer]) -> dict[str, str]:
    """Starts what is asked for, pauses it and adds it to `peers`; returns which are not there, and why."""
    starters: list[tuple[str, str, Callable[[], Sequence[Peer]]]] = []
    for dtype in DTYPES:
        starters.append(("onebase", f"onebase {dtype}", partial(onebase.start, setting, dtype)))
        starters.append(("engine", f"{engine.NAME} {dtype}", partial(engine.start, setting, dtype)))
        starters.append(("transformers", f"PEFT {dtype}", partial(static.start, setting, dtype)))
    starters.append(("llama.cpp", "llama.cpp float16", partial(llamacpp.start, setting, PEERS)))
    starters.append(("vllm", "vLLM bfloat16", partial(vllm.start, setting, PEERS)))
    absent: dict[str, str] = {}
    with bar("start", len(starters)) as tick:
        for side, name, begin in starters:
            try:
                for peer in begin() if side in sides else ():
                    peers.append(peer)
                    peer.process.pause()
            except NotThere as fault:
                absent[name] = str(fault)
            tick()
    return absent


def take_turns(peers: list[Peer], arguments: argparse.Namespace) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Figures by side and case, one set a round. One side computes at a time, and each round begins with another."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {f"{peer.name} {peer.dtype}": {} for peer in peers}
    turns = [(case, peer) for case in cases(arguments.rows) for peer in peers if peer.can(case)]
    with bar("turns", len(turns) * (arguments.rounds + 1)) as tick:
        for number in range(arguments.rounds + 1):
            for at, case in enumerate(cases(arguments.rows)):
                shifted = peers[number % len(peers) :] + peers[: number % len(peers)]
                for peer in (one for one in shifted if one.can(case)):
                    new = arguments.new if number else min(WARM_TOKENS, arguments.new)  # round 0 warms up
                    figures = turn(peer, case, arguments.prompt, new, 10 * number + at, tick)
                    if number:
                        found[f"{peer.name} {peer.dtype}"].setdefault(case.key, []).append(figures)
    return found


def turn(peer: Peer, case: Case, prompt: int, new: int, seed: int, tick: Tick) -> dict[str, Any]:
    """One side's figures for one case; its error where it fails."""
    peer.process.resume()
    try:
        return dict(peer.measure(case, case.requests(prompt, new, seed)))
    except RuntimeError as fault:
        return {"error": str(fault)}
    finally:
        peer.process.pause()
        tick()


def medians(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Of the rounds that went well; empty when none did."""
    good = [one for one in rounds if "error" not in one]
    return {name: statistics.median(one[name] for one in good) for name in (good[0] if good else ())}


def floors() -> dict[str, float]:
    """`floors.py` in a process of its own, which then is gone with its threads and memory."""
    done = subprocess.run([sys.executable, "-m", "loadtest.floors"], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
