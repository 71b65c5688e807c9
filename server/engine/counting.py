"""Counts requests and steps as they go by. What is done for every token must cost next to nothing."""

from __future__ import annotations

import time
from collections.abc import Iterable

from server.engine.counts import Counts
from server.engine.messages import Times
from server.engine.scheduler import Work
from server.engine.sequence import Request, Sequence


class Counting(Counts):
    """For the engine's thread."""

    def first(self, request: Request, now: float) -> None:
        """The request's first token has come."""
        self.lanes[request.kind].first.add(now - request.arrived)

    def token(self, sequence: Sequence, now: float) -> None:
        """A sequence's token has come: the one thing that is counted for each."""
        if sequence.last is not None:
            self.lanes[sequence.request.kind].gap.add(now - sequence.last)
        sequence.last = now

    def step(self, kind: str, seconds: float, work: Iterable[Work]) -> None:
        """A step of a `shared` or `merged` lane has been computed."""
        tokens = decodes = prefills = 0
        for item in work:
            tokens += item.count
            if item.count == 1:
                decodes += 1
            else:
                prefills += 1
        self.steps[kind].add(seconds)
        self.tokens.add(tokens)
        if decodes:
            self.rows["decode"].add(decodes)
        if prefills:
            self.rows["prefill"].add(prefills)
        self.last_step = time.time()

    def ended(self, request: Request, outcome: str, times: Times) -> None:
        """A request has ended: its waits are counted as far as it came, the rest if it finished."""
        lane = self.lanes[request.kind]
        if times.load is not None and request.residency.cold:
            lane.load.add(times.load)
        if times.queue is not None:
            lane.queue.add(times.queue)
        if times.prefill is not None:
            lane.prefill.add(times.prefill)
        if outcome == "finished":
            lane.e2e.add(times.e2e)
            if times.decode is not None:
                lane.decode.add(times.decode)
            self.prompt.add(len(request.submit.prompt))
            self.generation.add(request.produced)
        for sequence in request.sequences:
            reason = sequence.finish_reason or ("abort" if outcome == "cancelled" else "error")
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
