"""Making, parsing and comparing API keys."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.tenants import keys

TOKEN = "ob_0123456789abcdef_" + "s" * 43


def test_a_new_key_is_parsed_and_matches() -> None:
    made = keys.make()
    assert re.fullmatch(r"ob_[0-9a-f]{16}_[A-Za-z0-9_-]{43}", made.token)
    parsed = keys.parse(f"Bearer {made.token}")
    assert parsed is not None
    assert parsed[0] == made.id
    assert keys.matches(parsed[1], made.digest)
    assert not keys.matches("x" + parsed[1][1:], made.digest) or parsed[1][0] == "x"
    assert not keys.matches(parsed[1], keys.make().digest)
    assert not keys.matches(parsed[1], None)


def test_keys_differ_and_do_not_show() -> None:
    made = [keys.make() for _ in range(100)]
    assert len({key.token for key in made}) == len({key.id for key in made}) == 100
    assert made[0].token not in repr(made[0])
    assert made[0].token.split("_", 2)[2].encode() not in made[0].digest


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer  "])
def test_the_scheme_is_read_as_http_says(scheme: str) -> None:
    assert keys.parse(f"{scheme} {TOKEN}") == ("0123456789abcdef", "s" * 43)


NO_KEYS = [
    *(None, "", "Bearer", TOKEN, f"Basic {TOKEN}", f" Bearer {TOKEN}", f"Bearer {TOKEN} {TOKEN}"),
    *(f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}\n", f"Bearer {TOKEN[:-1]}é"),
    *("Bearer ob__" + "s" * 43, "Bearer " * 99, f"Bearer{' ' * 300}{TOKEN}"),
]


@pytest.mark.parametrize("header", NO_KEYS)
def test_anything_else_is_no_key(header: str | None) -> None:
    assert keys.parse(header) is None


@given(st.text(max_size=400) | st.from_regex(r"[Bb]earer +ob_[0-9a-f]{14,18}_[\w-]{40,46}"))
def test_no_header_raises(header: str) -> None:
    parsed = keys.parse(header)
    if parsed:
        assert not keys.matches(parsed[1], keys.make().digest)
