"""Money: whole micro-dollars, so that sums are exact, and the one way in which they are rounded."""

from __future__ import annotations

MICRO = 1_000_000


def half_up(numerator: int, denominator: int) -> int:
    """`numerator / denominator` to the nearest whole number, a half upwards. Exact, for what is not negative."""
    if numerator < 0 or denominator <= 0:
        raise ValueError("only what is not negative is rounded")
    return (2 * numerator + denominator) // (2 * denominator)


def dollars(microusd: int) -> str:
    """`1234567` as `1.234567`: every digit, nothing rounded."""
    sign = "-" if microusd < 0 else ""
    return f"{sign}{abs(microusd) // MICRO}.{abs(microusd) % MICRO:06d}"
