"""All the state of one sequence, on one object."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from server.engine.blocks import chain
from server.engine.lanes import SHARED
from server.engine.messages import Residency, Submit, Times
from server.engine.text import TextStream


@dataclass(eq=False)
class Sequence:
    """One of a request's `n` answers while it waits and runs.

    `tokens` is prompt then output; the first `computed` of them are in the KV cache, in `blocks`. `order` is the
    order of arrival and stays through a preemption. `charged` prompt tokens are on its tenant's account; `preempted`
    counts how often it gave way to another tenant.
    """

    request: Request
    index: int
    order: int
    tokens: list[int]
    text: TextStream
    computed: int = 0
    cached: int | None = None
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    published: int = 0
    charged: int = 0
    preempted: int = 0
    last: float | None = None  # when its latest token came
    finish_reason: str | None = None

    @property
    def place(self) -> tuple[bool, int]:
        """Where it stands in every queue: batch work last, each kind by arrival."""
        return self.request.submit.batch, self.order

    @property
    def prompt_length(self) -> int:
        return len(self.request.submit.prompt)

    @property
    def produced(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are still to be computed: 1 when decoding."""
        return len(self.tokens) - self.computed

    def take(self, token: int, *, ended: bool) -> str:
        """Appends a token, one that `ended` the text or not; returns the text that is new. It is the sequence's last if
        there is a `finish_reason` then."""
        self.tokens.append(token)
        text = "" if ended else self.text.push(token)
        if ended or self.text.stopped:
            self.finish_reason = "stop"
        elif self.produced >= self.request.submit.sampling.max_tokens:
            self.finish_reason = "length"
        return text

    def rest(self) -> str:
        """What is left of its text, once it has ended."""
        text = self.text.finish()
        if self.text.stopped:
            self.finish_reason = "stop"
        return text

    def full_hashes(self, block_size: int) -> list[bytes]:
        """The chained hashes of the blocks that `tokens` fills completely."""
        for number in range(len(self.hashes), len(self.tokens) // block_size):
            parent = self.hashes[-1] if self.hashes else self.request.seed
            self.hashes.append(chain(parent, self.tokens[number * block_size : (number + 1) * block_size]))
        return self.hashes


@dataclass(eq=False)
class Request:
    """A submitted request and what it holds: at most one reference, to its adapter's slot or to its merged copy. What
    `messages.Times` calls its moments is set by who sees them."""

    submit: Submit
    seed: bytes
    arrived: float
    given: float | None = None  # when its adapter was at hand
    scheduled: float | None = None
    first: float | None = None
    sequences: list[Sequence] = field(default_factory=list)
    weights: Any = None  # the adapter on the device, while a slot reference is held
    held: Any = None  # the merged copy that it runs on (copyroom.Held)
    residency: Residency = field(default_factory=Residency)
    key: str | None = field(init=False)  # the adapter's
    kind: str = field(init=False)  # of its lane: base, shared or merged

    def __post_init__(self) -> None:
        self.key = self.submit.adapter.key if self.submit.adapter else None
        self.kind = "base" if self.key is None else "shared" if self.held is None else "merged"

    @property
    def cached(self) -> int:
        """Tokens of the prompt that were in the prefix cache."""
        return self.sequences[0].cached or 0 if self.sequences else 0

    @property
    def read(self) -> int:
        """Tokens of the prompt that were computed or found in the prefix cache, each once."""
        return max((sequence.charged for sequence in self.sequences), default=0)

    @property
    def produced(self) -> int:
        """Tokens generated so far, of all its sequences."""
        return sum(sequence.produced for sequence in self.sequences)

    @property
    def ready(self) -> bool:
        """Whether nothing but room in the batch is missing."""
        return self.submit.adapter is None or self.weights is not None or self.held is not None

    def times(self, ended: float) -> Times:
        """Its moments, as it ends."""
        return Times(self.arrived, self.given, self.scheduled, self.first, ended)

    @property
    def lane(self) -> str:
        """Where its steps are: a merged copy's lane, or the shared one."""
        return SHARED if self.held is None else self.held.lane
