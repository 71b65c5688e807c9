"""Text as it streams: the pieces are the decoded whole, characters arrive whole, stop strings never show."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.engine.text import TextStream
from tests.families import tokenizer

REPLACEMENT = "\ufffd"
SPECIAL = [0, 1, 2, 3]
TRICKY = [
    "😀",
    "👩‍👩‍👧‍👦",
    "🏳️‍🌈",
    "e\u0301",
    "ñ",
    "\u0915\u094d\u0937",
    "한국어",
    "\u202eabc",
    "\x00",
    "\r\n",
    "  ",
    "\ufeff",
    "𝕏",
    "\u0300",
]
UNICODE = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT), st.sampled_from("abc .\n")),
    max_size=30,
)
TEXTS = st.one_of(UNICODE, st.lists(st.one_of(UNICODE, st.sampled_from(TRICKY)), max_size=6).map("".join))


@cache
def bytes_as_tokens() -> Any:
    return tokenizer()


@cache
def token_of_byte() -> list[int]:
    """The test tokenizer's token of every byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [bytes_as_tokens().convert_tokens_to_ids(piece) for _, piece in sorted(bytes_to_unicode().items())]


def ids_of(text: str) -> list[int]:
    return [token_of_byte()[byte] for byte in text.encode()]


def stream(ids: list[int], stop: tuple[str, ...] = (), tok: Any = None) -> tuple[list[str], TextStream]:
    """The pieces that pushing `ids` gives, the flushed rest last; stops pushing where the stream has stopped."""
    text = TextStream(tok or bytes_as_tokens(), stop)
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.stopped:
            break
    return [*pieces, text.finish()], text


def whole(ids: list[int], tok: Any = None) -> str:
    return (tok or bytes_as_tokens()).decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_pieces_of_valid_text_are_the_whole_and_hold_whole_characters(text: str) -> None:
    ids = ids_of(text)
    pieces, _ = stream(ids)
    assert "".join(pieces) == whole(ids) == text
    assert pieces[-1] == "", "valid text leaves nothing to flush"
    assert not any(REPLACEMENT in piece for piece in pieces)
    for at in range(len(ids)):  # a character is out with its last byte
        known = bytes(text.encode()[: at + 1]).decode(errors="ignore")
        assert "".join(pieces[: at + 1]) == known


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(TEXTS.map(ids_of), st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=20)), max_size=6))
@example([[2] * 9, ids_of("😀")])
@example([ids_of("é")[:1], [2] * 12, ids_of("é")[1:], [1]])
@example([[0] * 30, ids_of("€a"), [2] * 8, ids_of("한")])
def test_special_tokens_leave_no_trace_and_break_no_character(parts: list[list[int]]) -> None:
    ids = [token for part in parts for token in part]
    pieces, _ = stream(ids)
    assert "".join(pieces) == whole(ids)
    assert not any(REPLACEMENT in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=6),
            TEXTS.map(str.encode),
            st.sampled_from(["😀", "€"]).flatmap(lambda c: st.integers(1, 4).map(lambda n: c.encode()[:n])),
            st.sampled_from([b"\xf0" * 8, b"\x80" * 9, b"\xff" * 20, b"\xe2\x82" * 5, b"\xc0\xaf", b"\xed\xa0\x80"]),
        ),
        max_size=8,
    ).map(b"".join)
)
@example(b"\xf0" * 7 + "😀a".encode())
@example(b"\xff" * 8 + "😀".encode())
@example(b"\xff" * 40 + "é".encode() + b"\xf0\x9f")
def test_pieces_of_invalid_bytes_are_the_whole(data: bytes) -> None:
    ids = [token_of_byte()[byte] for byte in data]
    pieces, _ = stream(ids)
    assert "".join(pieces) == whole(ids) == data.decode(errors="replace")


@pytest.mark.parametrize("length", [50, 1000])
def test_invalid_bytes_do_not_hold_the_stream_up_for_long(length: int) -> None:
    """A model that only emits rubbish still streams: never more than a few tokens are held."""
    pieces, _ = stream([token_of_byte()[0xFF]] * length)
    out = 0
    for at, piece in enumerate(pieces[:-1]):
        out += len(piece)
        assert at + 1 - out <= 12


def test_long_runs_of_special_tokens_are_not_decoded_again_and_again() -> None:
    """What is decoded per token stays bounded, or `ignore_eos` makes every further token dearer."""
    longest = 0

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(bytes_as_tokens(), name)

        def decode(self, ids: list[int], **options: Any) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return bytes_as_tokens().decode(ids, **options)

    pieces, _ = stream(ids_of("before") + [2] * 500 + ids_of("after"), tok=Counting())
    assert "".join(pieces) == "beforeafter"
    assert longest < 100


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """The rule: text ends before the stop string that is complete first; the longest of those complete together."""
    for end in range(1, len(text) + 1):
        found = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: min(found)], True
    return text, False


@settings(max_examples=300, deadline=None)
@given(st.text("ab😀é", max_size=24), st.lists(st.text("ab😀é", min_size=1, max_size=5), min_size=1, max_size=4))
@example("aab", ["ab", "aab"])
@example("xaabaab", ["aabaab", "ab"])
@example("ababac", ["ababab", "bac"])
def test_stop_strings_end_the_text_where_the_first_is_complete(text: str, stops: list[str]) -> None:
    pieces, state = stream(ids_of(text), tuple(stops))
    expected, stopped = cut(text, tuple(stops))
    assert ("".join(pieces), state.stopped) == (expected, stopped)


@settings(max_examples=100, deadline=None)
@given(st.text("ab😀", max_size=20), st.lists(st.text("ab😀", min_size=1, max_size=5), min_size=1, max_size=3))
def test_no_piece_ever_shows_the_beginning_of_a_stop_string_that_follows(text: str, stops: list[str]) -> None:
    """At every moment what has been shown is a beginning of the final text: nothing must be taken back."""
    final, _ = cut(text, tuple(stops))
    shown = ""
    for piece in stream(ids_of(text), tuple(stops))[0]:
        shown += piece
        assert final.startswith(shown)


def grouped(text: str, sizes: list[int]) -> tuple[Any, list[int]]:
    """A stand-in tokenizer whose tokens are the pieces of `text` of these sizes."""
    pieces, at = [], 0
    for size in sizes:
        pieces.append(text[at : at + size])
        at += size
    pieces.append(text[at:])

    class Pieces:
        all_special_ids: ClassVar[list[int]] = []
        added_tokens_decoder: ClassVar[dict[int, Any]] = {}

        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(pieces[number] for number in ids)

    return Pieces(), list(range(len(pieces)))


@settings(max_examples=200, deadline=None)
@given(
    st.text("xy ", max_size=8),
    st.sampled_from(["END", "\n\n", "</answer>", "aabaa", "aaaa"]),
    st.text("xyab\nE<", max_size=8),
    st.lists(st.integers(1, 6), max_size=12),
)
def test_a_stop_string_is_found_at_every_place_across_any_token_boundaries(
    before: str, stop: str, after: str, sizes: list[int]
) -> None:
    tok, ids = grouped(before + stop + after, sizes)
    pieces, state = stream(ids, (stop,), tok)
    assert state.stopped
    assert "".join(pieces) == before


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", ("three", "two"), "one "),
        ("one two three", ("two", "one"), ""),
        ("abcabd", ("abd",), "abc"),
        ("aaab", ("aab",), "a"),
        ("xabcdey", ("abcde", "cd"), "xab"),
        ("xabcdey", ("bcd", "abcd"), "x"),  # complete together: the one that begins first
        ("ab", ("abc",), "ab"),
        ("a😀", ("😀b",), "a😀"),
        ("", ("a",), ""),
    ],
)
def test_which_stop_string_wins(text: str, stops: tuple[str, ...], expected: str) -> None:
    pieces, state = stream(ids_of(text), stops)
    assert "".join(pieces) == expected
    assert state.stopped == (expected != text)


def test_of_two_in_one_token_the_earlier_wins() -> None:
    tok, ids = grouped("say STOP and HALT", [100])
    assert "".join(stream(ids, ("HALT", "STOP"), tok)[0]) == "say "


def test_held_text_is_flushed_at_the_end_and_once() -> None:
    text = TextStream(bytes_as_tokens(), ("<end>",))
    assert "".join(text.push(token) for token in ids_of("a <en")) == "a "
    assert text.finish() == "<en"
    assert text.finish() == ""
    assert not text.stopped


def test_an_unfinished_character_is_flushed_as_a_replacement() -> None:
    pieces, _ = stream(ids_of("a😀")[:-1])
    assert (pieces[0], "".join(pieces[1:-1]), pieces[-1]) == ("a", "", REPLACEMENT)


def test_a_stop_string_that_the_flush_completes_is_found() -> None:
    pieces, state = stream(ids_of("ab€")[:-1], ("b" + REPLACEMENT,))
    assert state.stopped
    assert "".join(pieces) == "a"


def test_nothing_comes_after_a_stop() -> None:
    pieces, state = stream(ids_of("a stop"), ("stop",))
    assert state.stopped
    assert ("".join(pieces), state.finish()) == ("a ", "")


@pytest.fixture(scope="module")
def real(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


SENTENCES = [
    "Hello, world! It's 3:45 — naïve café, “quotes” and\ttabs\n\n  indented.",
    "".join(TRICKY),
    "日本語のテキスト и русский, العربية 😀😃👩‍👩‍👧‍👦 e\u0301",
    '{"key": [1, 2.50, "\\u00e9"]}\n```python\nprint("x")\n```',
]


@pytest.mark.real
def test_the_real_tokenizer_gives_the_whole(real: Any) -> None:
    @settings(max_examples=100, deadline=None)
    @given(st.one_of(TEXTS, st.sampled_from(SENTENCES)))
    def check(text: str) -> None:
        ids = real.encode(text, add_special_tokens=False)
        pieces, _ = stream(ids, tok=real)
        assert "".join(pieces) == whole(ids, real)
        if REPLACEMENT not in whole(ids, real):  # this vocabulary does not have every byte
            assert not any(REPLACEMENT in piece for piece in pieces)

    check()


@pytest.mark.real
def test_the_real_tokenizers_tokens_in_any_order_give_the_whole(real: Any) -> None:
    """Random tokens, as a hot temperature would draw them: broken characters and special tokens included."""

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.one_of(st.integers(0, 49151), st.integers(0, 300)), max_size=40))
    def check(ids: list[int]) -> None:
        assert "".join(stream(ids, tok=real)[0]) == whole(ids, real)

    check()


@pytest.mark.real
@pytest.mark.parametrize("sentence", SENTENCES)
def test_every_stop_string_of_a_real_sentence_is_found(real: Any, sentence: str) -> None:
    ids = real.encode(sentence, add_special_tokens=False)
    text = whole(ids, real)
    for start in range(0, len(text), 3):
        for length in (1, 2, 7):
            stop = text[start : start + length]
            pieces, state = stream(ids, (stop,), real)
            assert state.stopped
            assert "".join(pieces) == text[: text.index(stop)], repr(stop)
