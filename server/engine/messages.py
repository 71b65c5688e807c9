"""What crosses the boundary between the engine's thread and the rest: plain values, so that it could be a process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from time import monotonic

from server.core import DEFAULT_TENANT, AdapterRef
from server.errors import OnebaseError, UnusableOutput


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a request's tokens are chosen. `logprobs`: None, or how many of the likeliest tokens to report."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Prices:
    """What a token of a request counts for in its tenant's fair share, its adapter's rank included. Only the ratios to
    other requests' prices matter. Raises ValueError for one that is negative or not finite."""

    prompt: float = 1.0
    cached: float = 0.1
    completion: float = 2.0

    def __post_init__(self) -> None:
        if not all(0 <= price < inf for price in (self.prompt, self.cached, self.completion)):
            raise ValueError(f"a price must be finite and not negative: {self}")


@dataclass(frozen=True, slots=True)
class Submit:
    """A request: `n` sequences of the same prompt. `salt` separates tenants in the prefix cache. `early` is set where
    its adapter is being fetched before the engine has seen the request. `batch`: it yields to requests that are not.
    `weight` is the tenant's part beside the others'; the latest request says it for all. `most` tokens of all its
    sequences are what the tenant's budget pays for. `arrived` is when it was made, in monotonic seconds. Raises
    ValueError when the weight is not above zero, for the engine's thread divides by it."""

    id: str
    prompt: tuple[int, ...]
    adapter: AdapterRef | None
    sampling: Sampling
    n: int = 1
    salt: bytes = b""
    early: bool = False
    batch: bool = False
    tenant: str = DEFAULT_TENANT
    weight: float = 1.0
    prices: Prices = Prices()
    most: int | None = None
    arrived: float = field(default_factory=monotonic, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.weight < inf:
            raise ValueError(f"a tenant's weight must be finite and above zero, not {self.weight}")

    @property
    def worst(self) -> int:
        """Tokens that it may come to, all its sequences together."""
        return (len(self.prompt) + self.sampling.max_tokens) * self.n


@dataclass(frozen=True, slots=True)
class Cancel:
    """The client has gone; what was made so far is counted."""

    id: str


@dataclass(frozen=True, slots=True)
class Merge:
    """Gives the adapter a lane of its own; a `pinned` copy never goes for another's sake, and one that `keeps` others
    takes nobody else's room. `parts` are by tenant the bytes that all copies may take that it asks for, None for no
    bound: of the adapter's tenant and of those that have copies, as they are now. Answered by a `LaneChanged` of the
    same id when it is there, or cannot be."""

    id: str
    adapter: AdapterRef
    pinned: bool
    keeps: bool = False
    parts: Mapping[str, int | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Unmerge:
    """Ends the adapter's own lane, if it has one or is about to; requests that have begun in it finish there. `asked`:
    by somebody who wants it in the shared lane, not because the version is no longer current; `replaced`: because
    another version of the name is, which wants what this one wanted. Answered by a `LaneChanged`."""

    id: str
    adapter: AdapterRef
    asked: bool = False
    replaced: bool = False


@dataclass(frozen=True, slots=True)
class Weighed:
    """The adapter of a copy has been fetched, and the copy would take `nbytes`; or `fault`. Sent by the builder."""

    lane: str
    weights: object | None
    nbytes: int
    fault: OnebaseError | None


@dataclass(frozen=True, slots=True)
class Built:
    """A copy has been made, or `fault` says why not. Sent by the builder to the engine."""

    lane: str
    copy: object | None
    fault: OnebaseError | None


@dataclass(frozen=True, slots=True)
class Stop:
    """Ends the engine; requests that are still open end with `fault`."""

    fault: OnebaseError


@dataclass(frozen=True, slots=True)
class Loaded:
    """An adapter has been brought to the device in so many `seconds` from RAM, or `fault` says why not. Sent by the
    loader to the engine."""

    key: str
    weights: object | None
    fault: OnebaseError | None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Fetched:
    """A prefetch has ended: the adapter is in RAM, or `weights` is None. Sent by the loader to the engine."""

    key: str
    weights: object | None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log-probability (natural, of the model's own distribution) of a chosen token, and the likeliest ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Residency:
    """What a request met: was its adapter on the device when it came, how long did bringing it take, and does it run in
    a merged lane?"""

    cold: bool = False
    load_ms: float = 0.0
    merged: bool = False


@dataclass(slots=True)
class Delta:
    """New text and tokens of one sequence; the last one carries `finish_reason`. `cached` tokens of the prompt were in
    the prefix cache."""

    id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    residency: Residency
    finish_reason: str | None = None
    cached: int = 0


@dataclass(frozen=True, slots=True)
class Times:
    """A request's moments in monotonic seconds, None where it never came so far: submitted, its adapter at hand (at
    once for the base, and for an adapter that was on the device), in a step for the first time, its first token, its
    end. What is between them is in seconds."""

    arrived: float = 0.0
    ready: float | None = None
    scheduled: float | None = None
    first: float | None = None
    ended: float = 0.0

    @property
    def load(self) -> float | None:
        """Waited for its adapter."""
        return _between(self.arrived, self.ready)

    @property
    def queue(self) -> float | None:
        """Waited for room in a step, its adapter at hand."""
        return _between(self.ready, self.scheduled)

    @property
    def prefill(self) -> float | None:
        """From its first step to its first token."""
        return _between(self.scheduled, self.first)

    @property
    def decode(self) -> float | None:
        """From its first token to its end."""
        return _between(self.first, self.ended)

    @property
    def ttft(self) -> float | None:
        """From its arrival to its first token."""
        return _between(self.arrived, self.first)

    @property
    def e2e(self) -> float:
        """From its arrival to its end."""
        return self.ended - self.arrived


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


@dataclass(frozen=True, slots=True)
class Done:
    """The one terminal event of a request. Token counts are the engine's own, however the request ended.
    `prompt_tokens` are what was read of the prompt, computed or found in the prefix cache, `cached_tokens` what was
    found."""

    id: str
    outcome: str  # finished | cancelled | error
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    residency: Residency
    error: OnebaseError | None = None
    times: Times = Times()

    @property
    def free(self) -> bool:
        """Whether a fault of the server's ended it, for which nobody pays. Output that cannot be used is charged: an
        adapter could break off a long stream just before its end, and its tenant would have had it for nothing."""
        return self.outcome == "error" and not isinstance(self.error, UnusableOutput)


@dataclass(frozen=True, slots=True)
class LaneChanged:
    """The answer to a `Merge` or `Unmerge`."""

    id: str
    error: OnebaseError | None = None


Event = Delta | Done | LaneChanged
