"""How long a step takes, as a function of what is in it: measured, and kept up to date by every step. Plain Python."""

from __future__ import annotations

from bisect import bisect_left

_WEIGHT = 0.2  # of the newest step
_SLOWLY = 0.02  # its weight in what an adapter's row costs, which is a small difference of large figures
_MOST = 2.0  # one step counts for no more than so many times what was expected: it may have been disturbed
# The most that adapters may be thought to add to a step, as a share of it: more is the machine, disturbed. Rank 16 on
# all linears of 16 different adapters adds a third (docs/performance.md).
_DEAREST = 0.35
_LINEAR = 16  # tokens from which on steps cost by the token
SMALLEST = 8  # tokens of a prefill chunk, however slow the machine: what the kernels compute at once


class StepCosts:
    """Seconds of a step by its tokens, at powers of two and half-way between them; elsewhere on straight lines. One
    lane's or one kind's."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def __bool__(self) -> bool:
        return bool(self._seconds)

    def add(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        place = _place(tokens)
        known = self._seconds.get(place)
        if known is None:
            self._seconds[place] = seconds * (place / tokens) if tokens > _LINEAR else seconds
        else:
            self.scale(tokens, seconds / self.seconds(tokens))

    def knows(self, tokens: int) -> bool:
        """Whether steps of about so many tokens have been seen."""
        return _place(tokens) in self._seconds

    def scale(self, tokens: int, ratio: float) -> None:
        """A step of so many tokens took `ratio` times what was expected."""
        if self.knows(tokens):
            self._seconds[_place(tokens)] *= 1 + _WEIGHT * (min(_MOST, max(1 / _MOST, ratio)) - 1)

    def seconds(self, tokens: int) -> float:
        """What a step of so many tokens is expected to take; none for none. Needs one `add`."""
        if tokens == 0:
            return 0.0
        places = sorted(self._seconds)
        at = bisect_left(places, tokens)
        if at == len(places):  # beyond the largest: by the token, from a size where that holds
            return self._seconds[places[-1]] * max(1.0, tokens / max(places[-1], _LINEAR))
        if at == 0:
            return self._seconds[places[0]]
        low, high = places[at - 1], places[at]
        part = (tokens - low) / (high - low)
        return self._seconds[low] + part * (self._seconds[high] - self._seconds[low])

    def tokens_within(self, seconds: float, most: int) -> int:
        """The most tokens, up to `most`, whose step is expected to take no longer; at least a small chunk."""
        if not self._seconds:
            return min(SMALLEST, most)
        tokens = SMALLEST
        while tokens + SMALLEST <= most and self.seconds(tokens + SMALLEST) <= seconds:
            tokens += SMALLEST
        return min(tokens, most)


class DecodeCosts:
    """What steps of nothing but decodes take, by their rows: in the shared lane and in a merged one. Each token of
    context adds `context` seconds in both, each row on an adapter something more in the shared one: that is learnt.

    A machine that others use as well is faster today and slower tomorrow. What one lane's steps show of that is true of
    the other's too; else the lanes would be compared at different times."""

    def __init__(self, context: float = 0.0):
        self.shared, self.merged = StepCosts(), StepCosts()
        self._context, self._lora = context, 0.0

    def learn(self, *, merged: bool, rows: int, adapted: int, context: int, seconds: float) -> None:
        """A step took so long; `adapted` of its rows were on adapters, `context` tokens are of all rows together."""
        seconds -= self._context * context
        if seconds <= 0:
            return
        if merged or not adapted:
            own, other = (self.merged, self.shared) if merged else (self.shared, self.merged)
            if own.knows(rows):
                other.scale(rows, seconds / own.seconds(rows))
            own.add(rows, seconds)
        elif self.shared:
            base = self.shared.seconds(rows)
            extra = max(-_DEAREST * base, min(_DEAREST * base, seconds - base)) / adapted
            self._lora += _SLOWLY * (extra - self._lora)

    def shared_seconds(self, rows: int, adapted: int) -> float:
        """A step of the shared lane, without its context."""
        return self.shared.seconds(rows) + max(0.0, self._lora) * adapted

    def merged_seconds(self, rows: int) -> float:
        """A step of a merged lane, without its context."""
        return self.merged.seconds(rows)


def _place(tokens: int) -> int:
    power = 1 << (tokens - 1).bit_length()
    return power * 3 // 4 if tokens <= power * 3 // 4 and power >= 4 else power
