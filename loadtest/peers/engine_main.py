"""The process behind `engine.py`. Arguments: base, dtype, threads, adapter directories.

Schedules, computes and chooses tokens as the server's engine does, on one thread and with nobody to tell. Says `ready`,
then answers one JSON object for each JSON list of requests on standard input.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from loadtest.workload import Request as Asked
from server.core import AdapterRef
from server.engine.blocks import BlockPool
from server.engine.messages import Sampling, Submit
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.engine.sequence import Request, Sequence
from server.engine.text import TextStream
from server.lora import cores
from server.lora.weights import AdapterWeights, read_adapter
from server.model.bundled import DEFAULT_DATA_DIR
from server.model.loader import Base, load_base

BLOCK, BLOCKS, BATCH_TOKENS = 16, 2048, 256


class Bare:
    """A runner, its scheduler, and adapters that are resident from the start."""

    def __init__(self, base: Base, adapters: list[AdapterWeights]):
        self._base, self._adapters, self._numbers = base, adapters, itertools.count()
        self._runner = Runner(base, blocks=BLOCKS, block_size=BLOCK)

    def run(self, asked: list[Asked]) -> dict[str, float]:
        """All at once, until the last is done."""
        scheduler = Scheduler(BlockPool(BLOCKS, BLOCK), max_batch_tokens=BATCH_TOKENS, max_running=len(asked))
        sequences = [self._sequence(one) for one in asked]
        new, firsts = asked[0].output_tokens, []
        start = time.perf_counter()
        for sequence in sequences:
            scheduler.add(sequence)
        while scheduler.running or scheduler.waiting:
            work = scheduler.schedule()
            choices = self._runner.run(work)
            scheduler.computed(work)
            for item, choice in choices:
                item.sequence.tokens.append(choice.token)
                if item.sequence.produced == 1:
                    firsts.append(time.perf_counter())
                if item.sequence.produced == new:
                    scheduler.remove(item.sequence)
        end = time.perf_counter()
        figures = {
            "seconds": end - start,
            "tokens_per_s": len(asked) * new / (end - start),
            "ttft_ms": (statistics.median(firsts) - start) * 1e3,
        }
        if len(asked) == 1 and new > 1:
            figures["decode_tokens_per_s"] = (new - 1) / (end - firsts[0])
        return figures

    def _sequence(self, asked: Asked) -> Sequence:
        weights = None if asked.adapter is None else self._adapters[asked.adapter]
        reference = None if weights is None else AdapterRef(weights.key, 1, weights.key)
        number, prompt = next(self._numbers), asked.prompt()
        sampling = Sampling(max_tokens=asked.output_tokens, ignore_eos=True)
        request = Request(Submit(f"{number}", tuple(prompt), reference, sampling), b"", 0.0, weights=weights)
        return Sequence(request, 0, number, prompt, TextStream(self._base.tokenizer, ()))


def main() -> None:
    """Answers until its input ends."""
    folder, dtype, threads, *adapters = sys.argv[1:]
    cores.take(int(threads))
    base = load_base(folder, DEFAULT_DATA_DIR.expanduser(), dtype=dtype, device="cpu")
    torch.set_grad_enabled(False)
    bare = Bare(base, [_read(Path(path), base) for path in adapters])
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(bare.run([Asked(**one) for one in json.loads(line)])), flush=True)


def _read(path: Path, base: Base) -> AdapterWeights:
    config, weights = (path / "adapter_config.json").read_bytes(), (path / "adapter_model.safetensors").read_bytes()
    return read_adapter(path.name, config, bytearray(weights), base.info, base.dtype)


if __name__ == "__main__":
    main()
