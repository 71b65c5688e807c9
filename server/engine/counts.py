"""What the engine's thread has counted of requests and steps, in plain Python; metrics are made of it when it is read.

The bounds hold all of vLLM's for the same thing, and finer ones below: a GPU's steps are shorter than its first.
"""

from __future__ import annotations

from server.engine.clock import Clock
from server.histogram import Histogram

LANES = ("base", "shared", "merged")
REASONS = ("stop", "length", "budget", "abort", "error")
FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
         160.0, 640.0, 2560.0)  # fmt: skip
GAP = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
       10.0, 20.0, 40.0, 80.0)  # fmt: skip
LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0,
           50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)  # fmt: skip
TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))  # vLLM's, whatever the context
STEP = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
STEP_TOKENS = (1.0, *(float(2**power) for power in range(3, 15)))
ROWS = tuple(float(2**power) for power in range(13))


class LaneCounts:
    """A lane's times, in seconds: to the first token, between two, and by a request's parts (messages.Times)."""

    __slots__ = ("decode", "e2e", "first", "gap", "load", "prefill", "queue")

    def __init__(self) -> None:
        self.first, self.gap = Histogram(FIRST), Histogram(GAP)
        self.e2e, self.queue, self.load = Histogram(LATENCY), Histogram(LATENCY), Histogram(LATENCY)
        self.prefill, self.decode = Histogram(LATENCY), Histogram(LATENCY)


class Counts:
    """One for an engine. `prompt` and `generation` are tokens a finished request, `reasons` why answers ended, `steps`
    seconds a step by the kind of its lane, `tokens` and `rows` (of one token: "decode", of more: "prefill") a step,
    `failed` steps, `last_step` when the latest one ended, in seconds since 1970."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.lanes = {lane: LaneCounts() for lane in LANES}
        self.prompt, self.generation = Histogram(TOKENS), Histogram(TOKENS)
        self.reasons = dict.fromkeys(REASONS, 0)
        self.steps = {"shared": Histogram(STEP), "merged": Histogram(STEP)}
        self.tokens = Histogram(STEP_TOKENS)
        self.rows = {"decode": Histogram(ROWS), "prefill": Histogram(ROWS)}
        self.failed = 0
        self.last_step = 0.0
