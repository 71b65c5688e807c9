"""Measures at the start what decode steps take, by their rows, in the shared lane and in a merged one."""

from __future__ import annotations

import statistics
from time import perf_counter
from typing import Protocol

from server.engine.blocks import BlockPool
from server.engine.costs import DecodeCosts
from server.engine.messages import Sampling, Submit
from server.engine.scheduler import Work
from server.engine.sequence import Request, Sequence
from server.engine.text import TextStream
from server.lora.merge import MergedCopy
from server.lora.weights import AdapterWeights
from server.model.loader import Base

_SHORT, _LONG, _MOST = 16, 512, 16  # tokens of context, and rows of the longer ones
_STEPS = 4  # of which the first does not count


class Runs(Protocol):
    """What is measured."""

    base: Base

    def run(self, work: list[Work], copy: MergedCopy | None = None) -> object: ...

    def merge(self, weights: AdapterWeights) -> MergedCopy: ...


def calibrate(runner: Runs, pool: BlockPool, most_rows: int) -> DecodeCosts:
    """Takes some 50 steps, on the thread that runs the steps, before the first request. What lies in the pool's free
    blocks is of no consequence: nobody reads it."""
    bare = runner.merge(AdapterWeights("", {}, 0, 0))  # an adapter without any effect: the lane and nothing else
    counts = [rows for rows in (1, 2, 4, 8, 16, 32, 64) if rows <= most_rows]
    short = {rows: _seconds(runner, pool, rows, _SHORT, None) for rows in counts}
    costs = DecodeCosts(_context(runner, pool, counts, short))
    for rows, seconds in short.items():
        if seconds is not None:
            costs.learn(merged=False, rows=rows, adapted=0, context=rows * _SHORT, seconds=seconds)
            merged = _seconds(runner, pool, rows, _SHORT, bare)
            if merged is not None:
                costs.learn(merged=True, rows=rows, adapted=0, context=rows * _SHORT, seconds=merged)
    return costs


def _context(runner: Runs, pool: BlockPool, counts: list[int], short: dict[int, float | None]) -> float:
    """Seconds that a token of context adds to a step, from the most rows whose contexts the pool can hold."""
    for rows in (one for one in reversed(counts) if one <= _MOST):
        brief, long = short[rows], _seconds(runner, pool, rows, _LONG, None)
        if brief is not None and long is not None:
            return max(0.0, (long - brief) / (rows * (_LONG - _SHORT)))
    return 0.0


def _seconds(runner: Runs, pool: BlockPool, rows: int, context: int, copy: MergedCopy | None) -> float | None:
    """The median of some steps; None where the pool has no room for them."""
    blocks = pool.allocate(rows * pool.needed(context))
    if blocks is None:
        return None
    try:
        each = pool.needed(context)
        work = [_decode(runner.base, blocks[at * each : (at + 1) * each], context) for at in range(rows)]
        return statistics.median([_step(runner, work, copy) for _ in range(_STEPS)][1:])
    finally:
        pool.release(blocks)


def _decode(base: Base, blocks: list[int], context: int) -> Work:
    prompt = [0] * (context - 1)
    request = Request(Submit("", tuple(prompt), None, Sampling(max_tokens=1)), b"", 0.0)
    sequence = Sequence(request, 0, 0, [*prompt, 0], TextStream(base.tokenizer, ()), computed=context - 1)
    sequence.blocks = blocks
    return Work(sequence, 1)


def _step(runner: Runs, work: list[Work], copy: MergedCopy | None) -> float:
    start = perf_counter()
    runner.run(work, copy)
    return perf_counter() - start
