"""Prices and rounding: exact, by rank, and the same whichever way a bill is added up."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import floor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from server.tenants import prices, tables
from server.tenants.database import Database
from server.tenants.money import dollars, half_up
from server.tenants.prices import DEFAULT_BOOK, MAX_MULTIPLIER, MAX_PRICE, MAX_TOKENS, PriceBook, Rates, read

TOKENS = st.integers(0, 10**6)
PRICE = st.integers(0, 10**8)
RATES = st.builds(Rates, *(st.integers(0, 10**12) for _ in range(3)))
BOOK = PriceBook(1, 1_000_000, 100_000, 4_000_000, 5, 7, ((16, 1000), (64, 1500), (256, 2500)))


@given(st.integers(0, 10**30), st.integers(1, 10**18))
def test_rounding_is_to_the_nearest_and_a_half_goes_up(numerator: int, denominator: int) -> None:
    assert half_up(numerator, denominator) == floor(Fraction(numerator, denominator) + Fraction(1, 2))


@pytest.mark.parametrize(("numerator", "whole"), [(0, 0), (4, 0), (5, 1), (14, 1), (15, 2), (25, 3)])
def test_rounding_by_example(numerator: int, whole: int) -> None:
    assert half_up(numerator, 10) == whole


@pytest.mark.parametrize("wrong", [(-1, 10), (1, 0), (1, -1)])
def test_rounding_refuses_what_is_no_price(wrong: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="negative"):
        half_up(*wrong)


@pytest.mark.parametrize(("microusd", "text"), [(0, "0.000000"), (1_234_567, "1.234567"), (-5, "-0.000005")])
def test_dollars_have_every_digit(microusd: int, text: str) -> None:
    assert dollars(microusd) == text


@given(RATES, TOKENS, TOKENS, TOKENS)
def test_each_part_is_within_half_a_microdollar_and_the_total_is_their_sum(
    rates: Rates, fresh: int, cached: int, completion: int
) -> None:
    charge = rates.charge(fresh + cached, cached, completion)
    for part, tokens, rate in [
        (charge.prompt, fresh, rates.prompt),
        (charge.cached, cached, rates.cached),
        (charge.completion, completion, rates.completion),
    ]:
        assert abs(part - Fraction(tokens * rate, 10**9)) <= Fraction(1, 2)
    assert charge.total == charge.prompt + charge.cached + charge.completion


@given(RATES, TOKENS, TOKENS, TOKENS)
def test_more_tokens_never_cost_less(rates: Rates, prompt: int, completion: int, more: int) -> None:
    assert rates.charge(prompt, 0, completion).total <= rates.charge(prompt, 0, completion + more).total


@given(RATES, TOKENS, st.integers(0, 10**9))
def test_what_is_affordable_is_the_most_that_is(rates: Rates, prompt: int, left: int) -> None:
    most = rates.affordable(left, prompt, 0)
    if most < 0:
        assert rates.charge(prompt, 0, 0).total > left
        return
    assert rates.charge(prompt, 0, most).total <= left
    if most < MAX_TOKENS:
        assert rates.charge(prompt, 0, most + 1).total > left


@pytest.mark.parametrize(
    ("rank", "multiplier"), [(0, 1000), (1, 1000), (16, 1000), (17, 1500), (64, 1500), (256, 2500), (9999, 2500)]
)
def test_ranks_have_classes(rank: int, multiplier: int) -> None:
    assert BOOK.multiplier(rank) == multiplier
    charge = BOOK.rates(rank).charge(2000, 1000, 500)
    assert (charge.prompt, charge.cached, charge.completion) == (multiplier, multiplier // 10, 2 * multiplier)


def test_a_cached_token_never_costs_more_than_a_fresh_one() -> None:
    assert replace(BOOK, cached=BOOK.prompt + 1).rates(64).cached == BOOK.rates(64).prompt
    assert BOOK.rates(64).cached < BOOK.rates(64).prompt


def test_the_fair_share_counts_with_the_bills_prices() -> None:
    assert BOOK.rates(64).weights() == (1.5, 0.15, 6.0)


@given(PRICE, PRICE, PRICE, PRICE, PRICE)
def test_a_book_survives_json(prompt: int, cached: int, completion: int, stored: int, merged: int) -> None:
    book = replace(BOOK, prompt=prompt, cached=cached, completion=completion, adapter_gb_day=stored)
    book = replace(book, merged_gb_hour=merged)
    assert read(book.as_dict()) == book


def test_a_tenant_may_have_its_own_prices() -> None:
    own = BOOK.override({"completion": 1, "rank_classes": [[8, 2000]]})
    assert (own.version, own.prompt, own.completion, own.multiplier(64)) == (1, BOOK.prompt, 1, 2000)
    assert BOOK.override({}) == BOOK


@pytest.mark.parametrize(
    "wrong",
    [
        {"version": 7},
        {"nothing": 1},
        {"prompt": -1},
        {"prompt": 1.5},
        {"prompt": True},
        {"prompt": MAX_PRICE + 1},
        {"rank_classes": [[16, 1000], [8, 1]]},
        {"rank_classes": [[0, 1000]]},
        {"rank_classes": [[8, MAX_MULTIPLIER + 1]]},
    ],
)
def test_impossible_prices_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"price|must be"):
        BOOK.override(wrong)


def test_the_dearest_request_fits_the_database() -> None:
    dear = PriceBook(1, *[MAX_PRICE] * 5, rank_classes=((1, MAX_MULTIPLIER),))
    charge = dear.rates(1).charge(MAX_TOKENS, 0, MAX_TOKENS)
    assert max(charge.prompt, charge.completion, dear.rates(1).prompt) < 2**63


@pytest.mark.parametrize("wrong", [(1, 2, 0), (-1, -1, 0), (0, 0, -1), (MAX_TOKENS + 1, 0, 0)])
def test_impossible_counts_are_refused(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="impossible"):
        BOOK.rates(0).charge(*wrong)


@pytest.mark.anyio
async def test_books_are_numbered_and_kept(database: Database) -> None:
    assert await prices.current(database) == DEFAULT_BOOK
    second = await prices.publish(database, replace(BOOK, version=77))
    assert second == replace(BOOK, version=2)
    assert await prices.current(database) == second
    async with database.read() as connection:
        rows = (await connection.execute(select(tables.prices).order_by(tables.prices.c.version))).all()
    assert [(row.version, read(row.book)) for row in rows] == [(1, DEFAULT_BOOK), (2, second)]
