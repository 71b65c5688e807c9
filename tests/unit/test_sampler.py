"""Choosing tokens: transformers' own processors say what may be drawn and how often; a row depends on itself only."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engine.messages import Sampling
from server.engine.sampler import _FIRST_LOOK, Choice, Row, sample, uniform

VOCABULARY = 24
PROMPT, OUTPUT = [3, 4, 4, 5, 23], [4, 7, 7, 7, 9]
DRAWS = 3000


def row(*, index: int = 0, prompt: list[int] | None = None, output: list[int] | None = None, **fields: Any) -> Row:
    prompt = PROMPT if prompt is None else prompt
    return Row(Sampling(max_tokens=1, **fields), index, prompt + (output or []), len(prompt))


def tokens_of(choices: list[Choice]) -> list[int]:
    assert all(choice.finite for choice in choices)
    return [choice.token for choice in choices]


def gaussian(rows: int, vocabulary: int = VOCABULARY, seed: int = 0, scale: float = 1.5) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def oracle(logits: torch.Tensor, tokens: list[int], s: Sampling) -> torch.Tensor:
    """The distribution that transformers draws from, in its order of processors; penalties on the output as stated."""
    scores = logits[None].clone().double()
    if s.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(s.repetition_penalty)(torch.tensor([tokens]), scores)
    for token in set(tokens[len(PROMPT) :]):
        count = tokens[len(PROMPT) :].count(token)
        scores[0, token] -= s.presence_penalty + s.frequency_penalty * count
    warpers: list[Any] = [TemperatureLogitsWarper(s.temperature)]
    if s.top_k:
        warpers.append(TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        warpers.append(TopPLogitsWarper(s.top_p))
    if s.min_p:
        warpers.append(MinPLogitsWarper(s.min_p))
    for warper in warpers:
        scores = warper(torch.tensor([tokens]), scores)
    return scores[0].softmax(-1)


def assert_drawn_from(expected: torch.Tensor, drawn: list[int]) -> None:
    """Nothing impossible was drawn, and the frequencies pass a chi-square test (seeds are fixed: no flakes)."""
    counts = np.bincount(drawn, minlength=len(expected)).astype(float)
    wanted = expected.numpy() * len(drawn)
    assert not counts[wanted == 0].any(), "a filtered token was drawn"
    common = wanted >= 5
    observed, hoped = list(counts[common]), list(wanted[common])
    if (rare := wanted[~common].sum()) > 1:
        observed.append(counts[~common].sum())
        hoped.append(rare)
    degrees = len(hoped) - 1
    statistic = sum((o - h) ** 2 / h for o, h in zip(observed, hoped, strict=True))
    # Mean and deviation of chi-square; four deviations and a bit for its longer right tail.
    assert statistic < degrees + 4 * math.sqrt(2 * degrees) + 8, (statistic, degrees)
    assert counts[wanted > 20].all(), "a likely token was never drawn"


FILTERS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.4},
    {"temperature": 2.5},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": VOCABULARY},
    {"temperature": 1.0, "top_k": 10 * VOCABULARY},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 0.7, "top_p": 0.95},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 12, "min_p": 0.2},
    {"temperature": 1.5, "top_k": 15, "top_p": 0.9, "min_p": 0.08},
    {"temperature": 1.0, "repetition_penalty": 1.4},
    {"temperature": 1.0, "repetition_penalty": 0.6},
    {"temperature": 1.0, "presence_penalty": 1.5},
    {"temperature": 1.0, "presence_penalty": -1.5},
    {"temperature": 1.0, "frequency_penalty": 0.8},
    {"temperature": 0.8, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.4, "top_p": 0.9},
]


@pytest.mark.parametrize("fields", FILTERS, ids=lambda fields: ",".join(f"{k}={v}" for k, v in fields.items()))
def test_draws_follow_the_distribution_of_transformers(fields: dict[str, Any]) -> None:
    logits = gaussian(1)
    rows = [row(output=OUTPUT, seed=seed, **fields) for seed in range(DRAWS)]
    expected = oracle(logits[0], PROMPT + OUTPUT, rows[0].sampling)
    assert_drawn_from(expected, tokens_of(sample(logits.expand(DRAWS, -1), rows)))


def test_neighbours_with_other_settings_change_no_distribution() -> None:
    """Every setting above in one batch: each row still draws from its own distribution."""
    logits = gaussian(len(FILTERS), seed=3)
    times = 500
    rows = [row(output=OUTPUT, seed=seed, **fields) for seed in range(times) for fields in FILTERS]
    drawn = np.array(tokens_of(sample(logits.repeat(times, 1), rows))).reshape(times, -1)
    for at, fields in enumerate(FILTERS):
        expected = oracle(logits[at], PROMPT + OUTPUT, Sampling(max_tokens=1, **fields))
        assert_drawn_from(expected, drawn[:, at].tolist())


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.floats(0.2, 3),
    st.integers(0, 30),
    st.floats(0.05, 1),
    st.sampled_from([0.0, 0.02, 0.3]),
    st.sampled_from([1.0, 0.7, 1.3]),
)
def test_only_what_transformers_keeps_is_ever_drawn(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, repetition: float
) -> None:
    fields: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition,
    }
    logits = gaussian(1, seed=seed)
    expected = oracle(logits[0], PROMPT + OUTPUT, Sampling(max_tokens=1, **fields))
    rows = [row(output=OUTPUT, seed=s, **fields) for s in range(200)]
    drawn = set(tokens_of(sample(logits.expand(200, -1), rows)))
    slack = oracle(logits[0], PROMPT + OUTPUT, Sampling(max_tokens=1, **{**fields, "top_p": min(top_p + 1e-6, 1)}))
    assert all(expected[token] > 0 or slack[token] > 0 for token in drawn)
    assert drawn >= {token for token in range(VOCABULARY) if expected[token] > 0.1}


def test_penalties_on_the_output_follow_the_formula_and_spare_the_prompt() -> None:
    """logit - presence - frequency x count, over the output only: a greedy choice changes exactly where it says so."""
    logits = torch.full((1, VOCABULARY), -9.0)
    logits[0, 3], logits[0, 7], logits[0, 9] = 1.0, 3.0, 1.1  # 3 is in the prompt, 7 three times and 9 once after it
    cases: list[tuple[dict[str, float], int]] = [
        ({}, 7),
        ({"presence_penalty": 1.89}, 7),
        ({"presence_penalty": 2.0}, 3),  # 7: 1.0, 9: -0.9, 3: 1.0, and the earliest of equals
        ({"frequency_penalty": 0.6}, 7),  # 7: 1.2, 9: 0.5
        ({"frequency_penalty": 0.7}, 3),  # 7: 0.9, 9: 0.4
        ({"frequency_penalty": 0.6, "presence_penalty": 0.25}, 3),
        ({"frequency_penalty": 1.0, "presence_penalty": -0.95}, 9),  # 7: 0.95, 9: 1.05, 3: 1.0
    ]
    for fields, token in cases:
        [choice] = sample(logits.clone(), [row(output=OUTPUT, **fields)])
        assert choice.token == token, fields


def test_the_models_logits_are_not_written_to() -> None:
    logits = gaussian(2)
    before = logits.clone()
    sample(logits, [row(output=OUTPUT, repetition_penalty=1.5, presence_penalty=1.0), row(temperature=1.0, top_p=0.5)])
    assert torch.equal(logits, before)


def test_temperature_zero_is_greedy() -> None:
    logits = gaussian(50, seed=1)
    rows = [row(seed=at, top_k=5, top_p=0.5, min_p=0.1) for at in range(50)]
    assert tokens_of(sample(logits, rows)) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-20, 1e-38, 1e-42, 1e-60, 5e-324])
@pytest.mark.parametrize("fields", [{}, {"top_p": 0.9}, {"top_k": 4}, {"min_p": 0.1}], ids=str)
def test_a_tiny_temperature_is_greedy_and_overflows_nothing(temperature: float, fields: dict[str, Any]) -> None:
    logits = gaussian(50, seed=2) * 1000
    rows = [row(temperature=temperature, seed=at, **fields) for at in range(50)]
    assert tokens_of(sample(logits, rows)) == logits.argmax(-1).tolist()


def test_huge_logits_draw_like_their_differences() -> None:
    logits = gaussian(1, seed=4)
    rows = [row(temperature=1.0, seed=seed) for seed in range(500)]
    near = tokens_of(sample(logits.double().expand(500, -1), rows))
    far = tokens_of(sample(logits.double().expand(500, -1) + 1e6, rows))
    assert near == far


def test_a_hidden_token_is_never_drawn() -> None:
    logits = torch.full((500, VOCABULARY), -torch.inf)
    logits[:, [5, 11]] = 0
    for fields in ({}, {"top_p": 0.9}, {"top_k": 9}, {"min_p": 0.5}):
        assert set(tokens_of(sample(logits, [row(temperature=5.0, seed=s, **fields) for s in range(500)]))) == {5, 11}


MIXED: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.9, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 3},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 2000, "top_p": 0.99},
    {"temperature": 1.2, "repetition_penalty": 1.3, "logprobs": 3},
    {"temperature": 1.0, "top_k": 300, "top_p": 0.9},
]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(MIXED) - 1), st.integers(0, 99)), min_size=1, max_size=12), st.randoms())
def test_permuting_the_rows_permutes_the_choices(picks: list[tuple[int, int]], random: Any) -> None:
    logits = gaussian(len(picks), seed=5)
    rows = [row(seed=seed, output=OUTPUT, **MIXED[kind]) for kind, seed in picks]
    order = list(range(len(rows)))
    random.shuffle(order)
    straight = sample(logits, rows)
    assert sample(logits[order], [rows[at] for at in order]) == [straight[at] for at in order]


@pytest.mark.parametrize("vocabulary", [VOCABULARY, 5000])
@pytest.mark.parametrize("coarse", [False, True], ids=["float32", "bfloat16 with many ties"])
def test_a_seed_gives_the_same_token_in_any_company(vocabulary: int, coarse: bool) -> None:
    logits = gaussian(len(MIXED), vocabulary, seed=6)
    if coarse:
        logits = logits.bfloat16().float()
    for seed in range(8):
        rows = [row(seed=seed, output=OUTPUT, **fields) for fields in MIXED]
        together = sample(logits, rows)
        for at in range(len(rows)):
            assert sample(logits[at : at + 1], rows[at : at + 1]) == [together[at]], MIXED[at]


def test_seed_index_and_position_each_change_the_number() -> None:
    grid = np.stack(np.meshgrid(np.arange(20), np.arange(20), np.arange(20)), -1).reshape(-1, 3)
    numbers = uniform(grid[:, 0], grid[:, 1], grid[:, 2])
    assert len(np.unique(numbers)) == len(numbers)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    histogram = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((histogram - 400) ** 2 / 400).sum() < 50  # 19 degrees of freedom
    for axis in range(3):  # neighbours in any one of the three are uncorrelated
        cube = numbers.reshape(20, 20, 20).swapaxes(0, axis)
        assert abs(np.corrcoef(cube[1:].ravel(), cube[:-1].ravel())[0, 1]) < 0.04


def test_the_largest_seed_is_taken() -> None:
    logits = gaussian(2)
    rows = [row(temperature=1.0, seed=2**64 - 1), row(temperature=1.0, seed=2**63)]
    assert sample(logits, rows) == sample(logits, rows)


BIG = 49152


@pytest.mark.parametrize("company", [False, True], ids=["alone", "beside rows that need less"])
def test_top_p_past_the_first_look(company: bool) -> None:
    """Nearly flat logits: top_p = 0.9 keeps tens of thousands of tokens, far more than are looked at first."""
    logits = gaussian(1, BIG, seed=7, scale=0.3)
    expected = oracle(logits[0], PROMPT, Sampling(max_tokens=1, temperature=1.0, top_p=0.9))
    assert (expected > 0).sum() > 10 * _FIRST_LOOK
    rows = [row(temperature=1.0, top_p=0.9, seed=seed) for seed in range(64)]
    if company:
        rows[::4] = [replace(r, sampling=replace(r.sampling, top_k=7)) for r in rows[::4]]
    drawn = tokens_of(sample(logits.expand(64, -1), rows))
    top = set(logits[0].topk(7).indices.tolist())
    if company:
        assert set(drawn[::4]) <= top
        del drawn[::4]
    assert all(expected[token] > 0 for token in drawn)
    assert sum(token not in set(logits[0].topk(_FIRST_LOOK).indices.tolist()) for token in drawn) > len(drawn) / 2
    # In four bands of equal probability, from the likeliest down.
    order = expected.argsort(descending=True)
    rank = torch.empty(BIG, dtype=torch.long).scatter_(0, order, torch.arange(BIG))
    before = (expected[order].cumsum(0) - expected[order])[rank[drawn]]
    bands = np.histogram(before.numpy(), bins=4, range=(0, 1))[0]
    assert ((bands - len(drawn) / 4) ** 2 / (len(drawn) / 4)).sum() < 16.3  # chi-square, 3 degrees, p = 0.001


def test_top_p_within_the_first_look() -> None:
    logits = gaussian(1, BIG, seed=8, scale=4.0)
    expected = oracle(logits[0], PROMPT, Sampling(max_tokens=1, temperature=1.0, top_p=0.5))
    assert 1 < (expected > 0).sum() < _FIRST_LOOK
    drawn = tokens_of(sample(logits.expand(64, -1), [row(temperature=1.0, top_p=0.5, seed=s) for s in range(64)]))
    assert all(expected[token] > 0 for token in drawn)
    assert len(set(drawn)) > 5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("fields", [*MIXED, {"temperature": 1.0, "top_p": 0.5, "logprobs": 5}], ids=str)
def test_a_row_that_is_not_finite_is_flagged_and_harms_no_neighbour(bad: float, fields: dict[str, Any]) -> None:
    logits = gaussian(5, seed=9)
    rows = [row(seed=at, output=OUTPUT, **fields) for at in range(5)]
    clean = sample(logits, rows)
    spoilt = logits.clone()
    spoilt[1, 6], spoilt[3] = bad, bad
    choices = sample(spoilt, rows)
    assert [choice.finite for choice in choices] == [True, False, True, False, True]
    assert [choices[at] for at in (0, 2, 4)] == [clean[at] for at in (0, 2, 4)]


def test_a_row_without_any_possible_token_is_flagged() -> None:
    logits = gaussian(2)
    logits[0] = -torch.inf
    assert [choice.finite for choice in sample(logits, [row(temperature=1.0), row()])] == [False, True]


def test_logprobs_are_the_models_own_and_sorted() -> None:
    """Before penalties, temperature and filters; each row gets as many as it asked for, and none if it did not ask."""
    logits = gaussian(4, seed=10)
    fields: list[dict[str, Any]] = [
        {"logprobs": 5, "temperature": 3.0, "top_k": 2, "repetition_penalty": 1.7, "presence_penalty": 1.0},
        {},
        {"logprobs": 0, "temperature": 1.0},
        {"logprobs": 2},
    ]
    choices = sample(logits, [row(output=OUTPUT, seed=1, **f) for f in fields])
    assert choices[1].logprob is None
    table = logits.log_softmax(-1)
    for at, wanted in ((0, 5), (2, 0), (3, 2)):
        found = choices[at].logprob
        assert found is not None
        assert found.token_id == choices[at].token
        assert found.logprob == pytest.approx(table[at, found.token_id].item(), abs=1e-6)
        values, ids = table[at].topk(wanted) if wanted else (torch.tensor([]), torch.tensor([]))
        assert [token for token, _ in found.top] == ids.tolist()
        assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-6)
