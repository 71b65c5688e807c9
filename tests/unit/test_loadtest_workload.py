"""Workloads: the laws that requests follow, against theory, and what is said about a wrong file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtest import workload
from loadtest.arrivals import Closed, Gamma
from loadtest.lengths import Between, Fixed, read_pairs
from loadtest.popularity import Distinct, Geometric, Identical, Power, Uniform, Zipf
from loadtest.workload import BadWorkload, change, load, parse, plan

COUNT = 200_000
SMALL: dict[str, Any] = {
    "adapters": 8,
    "popularity": {"kind": "zipf", "s": 1.0},
    "arrivals": {"kind": "gamma", "rate": 10, "cv": 4},
    "prompt_tokens": {"kind": "uniform", "low": 8, "high": 512},
    "output_tokens": {"kind": "fixed", "tokens": 5},
    "requests": 50,
    "seed": 3,
}


def shares(law: Any, adapters: int) -> np.ndarray:
    drawn = law.draw(np.random.default_rng(1), adapters, COUNT)
    assert drawn.min() >= 0
    return np.bincount(drawn, minlength=adapters) / COUNT


@pytest.mark.parametrize("s", [0.0, 1.0, 1.5])
def test_zipf_has_its_frequencies(s: float) -> None:
    """Every frequency within four standard errors of 1 / (i + 1)^s over the finite sum."""
    weights = np.arange(1, 101) ** -s
    expected = weights / weights.sum()
    error = np.sqrt(expected * (1 - expected) / COUNT)
    assert (np.abs(shares(Zipf("zipf", s), 100) - expected) < 4 * error).all()


@pytest.mark.parametrize("a", [0.1, 0.5, 1.0])
def test_power_law_is_the_floor_of_numpy_power(a: float) -> None:
    """P(index < k) = (k / N)^a, for x with the density a x^(a - 1) is below t with the probability t^a."""
    cumulative = np.cumsum(shares(Power("power", a), 50))
    expected = (np.arange(1, 51) / 50) ** a
    assert np.abs(cumulative - expected).max() < 0.005
    assert shares(Power("power", 0.1), 1000)[0] > 0.45  # the most skewed: 1000^-0.1 is a half


def test_the_four_of_punica() -> None:
    rng = np.random.default_rng(1)
    assert set(Identical("identical").draw(rng, 16, 100)) == {0}
    distinct = Distinct("distinct").draw(rng, 16, 64)
    assert all(len(set(distinct[at : at + 16])) == 16 for at in range(0, 49))
    assert np.abs(shares(Uniform("uniform"), 16) - 1 / 16).max() < 0.003
    geometric = shares(Geometric("geometric", 1.5), 16)
    assert geometric[:5] / geometric[1:6] == pytest.approx(1.5, rel=0.05)


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_gamma_arrivals_have_their_rate_and_variation(cv: float) -> None:
    due = np.array(Gamma("gamma", 20.0, cv).due(np.random.default_rng(2), COUNT))
    gaps = np.diff(due, prepend=0)
    assert (gaps >= 0).all()
    assert 1 / gaps.mean() == pytest.approx(20, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_a_closed_loop_has_no_times() -> None:
    assert Closed("closed", 4).due(np.random.default_rng(0), 3) == [None] * 3


def test_lengths() -> None:
    rng = np.random.default_rng(0)
    assert Fixed("fixed", 7).draw(rng, 3) == [7, 7, 7]
    drawn = Between("uniform", 8, 12).draw(rng, 1000)
    assert set(drawn) == {8, 9, 10, 11, 12}


def test_the_same_file_gives_the_same_requests_and_more_of_them_begin_with_them() -> None:
    one, other = plan(parse(SMALL)), plan(parse(SMALL))
    assert one == other
    assert [request.prompt() for request in one] == [request.prompt() for request in other]
    assert plan(parse({**SMALL, "requests": 80}))[:50] == one
    assert plan(parse({**SMALL, "seed": 4})) != one
    assert len({tuple(request.prompt()[:8]) for request in one}) == 50


def test_prompts_have_their_lengths_and_ids() -> None:
    for request in plan(parse({**SMALL, "token_ids": [4, 20]})):
        prompt = request.prompt()
        assert len(prompt) == request.prompt_tokens
        assert min(prompt) >= 4
        assert max(prompt) < 20


def test_without_adapters_everything_is_for_the_base() -> None:
    assert {request.adapter for request in plan(parse({**SMALL, "adapters": 0}))} == {None}


def test_warm_up_reaches_each_of_the_likeliest_once() -> None:
    chosen = parse({**SMALL, "warmup": 3})
    assert [request.adapter for request in workload.warm(chosen)] == [0, 1, 2]


def test_lengths_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "lengths.jsonl").write_text(
        '{"prompt_tokens": 3, "output_tokens": 4}\n{"prompt_tokens": 5, "output_tokens": 6}\n'
    )
    fields = {key: value for key, value in SMALL.items() if key not in ("prompt_tokens", "output_tokens")}
    (tmp_path / "one.json").write_text(json.dumps({**fields, "lengths_file": "lengths.jsonl", "requests": 3}))
    requests = plan(load(str(tmp_path / "one.json")))
    assert [(one.prompt_tokens, one.output_tokens) for one in requests] == [(3, 4), (5, 6), (3, 4)]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "empty"),
        ('{"prompt_tokens": 3}', "line 1"),
        ('{"prompt_tokens": 3, "output_tokens": 4}\nx', "line 2"),
        ('{"prompt_tokens": true, "output_tokens": 4}', "whole numbers"),
        ('{"prompt_tokens": 0, "output_tokens": 4}', "whole numbers"),
    ],
)
def test_a_wrong_file_of_lengths_is_refused_with_its_line(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "lengths.jsonl").write_text(text)
    with pytest.raises(ValueError, match=word):
        read_pairs(tmp_path / "lengths.jsonl")


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"adaptors": 3}, "adaptors: Unexpected"),
        ({"adapters": "3"}, "adapters: Input should be a valid integer"),
        ({"adapters": -1}, "adapters: "),
        ({"ranks": []}, "ranks: "),
        ({"popularity": {"kind": "zipf"}}, "popularity.zipf.s: Field required"),
        ({"popularity": {"kind": "fame"}}, "popularity: "),
        ({"arrivals": {"kind": "gamma", "rate": 0}}, "arrivals.gamma.rate: "),
        ({"arrivals": None}, "arrivals: "),
        ({"prompt_tokens": {"kind": "uniform", "low": 9, "high": 8}}, "low is more than high"),
        ({"prompt_tokens": None}, "give prompt_tokens and output_tokens"),
        ({"lengths_file": "x"}, "give prompt_tokens and output_tokens"),
        ({"token_ids": [5, 5]}, "token_ids: the first"),
        ({"slo": {"ttft_ms": 5}}, "slo.gap_ms: Field required"),
    ],
)
def test_a_wrong_workload_is_refused_with_its_field(wrong: dict[str, Any], word: str) -> None:
    with pytest.raises(BadWorkload) as fault:
        parse({**SMALL, **wrong}, "mine.toml")
    assert str(fault.value).startswith("mine.toml: ")
    assert word in str(fault.value)


def test_what_cannot_be_found_or_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadWorkload, match="there are"):
        load("no-such")
    with pytest.raises(BadWorkload, match=r"absent\.toml"):
        load(str(tmp_path / "absent.toml"))
    (tmp_path / "broken.toml").write_text("adapters = ")
    with pytest.raises(BadWorkload, match=r"broken\.toml"):
        load(str(tmp_path / "broken.toml"))
    with pytest.raises(BadWorkload, match="requests: "):
        change(parse(SMALL), requests=0)


@pytest.mark.parametrize("name", workload.shipped())
def test_shipped_workloads_can_be_planned(name: str) -> None:
    chosen = load(name)
    requests = plan(chosen)
    assert len(requests) == chosen.requests
    assert chosen.about
    assert max((one.adapter or 0) for one in requests) < max(1, chosen.adapters)


def test_the_shipped_ones_cover_what_the_literature_uses() -> None:
    all_ = [load(name) for name in workload.shipped()]
    assert {one.adapters for one in all_} >= {0, 1, 8, 64, 256, 1000}
    assert {one.ranks for one in all_} >= {(8,), (8, 16, 32, 64)}
    laws = Counter(type(one.popularity).__name__ for one in all_ if one.adapters)
    assert set(laws) == {"Zipf", "Power", "Identical", "Distinct", "Uniform", "Geometric"}
    assert {one.popularity.s for one in all_ if isinstance(one.popularity, Zipf)} == {0.0, 1.0, 1.5}
    assert {one.arrivals.cv for one in all_ if isinstance(one.arrivals, Gamma)} == {1.0, 4.0}
    assert any(isinstance(one.arrivals, Closed) for one in all_)
    assert any(one.lengths_file for one in all_)
    assert any(one.prompt_tokens == Between("uniform", 8, 512) == one.output_tokens for one in all_)
