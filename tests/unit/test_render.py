"""How log-probabilities write their tokens: no two of a position alike, none lost, each asked for once."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from server.api.render import LARGE, Answer, TokenNames
from server.engine.messages import Delta, Done, Residency, Sampling, Submit, TokenLogprob
from server.tenants.prices import DEFAULT_BOOK
from tests.families import tokenizer

PIECES = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
PIECES += ["▁", "▁▁", "the", "▁the", "t", "▁t", "th", "#", "A", "日", "\n", "a▁b"]
DECODERS = {
    "Llama-2": [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)],
    "Gemma": [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()],
    "Metaspace": [decoders.ByteFallback(), decoders.Metaspace()],
}


def sentencepiece(decoder: str, model: str = "bpe", special: tuple[str, ...] = ()) -> Any:
    """A tokenizer whose pieces have `▁` for a space and `<0xNN>` for a byte."""
    if model == "bpe":
        vocabulary = {piece: at for at, piece in enumerate(PIECES)}
        inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    else:
        inner = Tokenizer(models.Unigram([(piece, 0.0) for piece in PIECES], unk_id=0, byte_fallback=True))
    inner.decoder = decoders.Sequence(DECODERS[decoder])
    inner.add_special_tokens(["<unk>", "</s>", *special])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")


def logprobs_of(names: TokenNames, chosen: int, top: list[int]) -> tuple[str, dict[str, float]]:
    """The name of the chosen token, and the likeliest, of an answer of that one token."""
    item = TokenLogprob(chosen, -0.5, tuple((number, -float(at)) for at, number in enumerate(top)))
    submit = Submit("gen-1", (5,), None, Sampling(max_tokens=1, logprobs=len(top)))
    base: Any = SimpleNamespace(info=SimpleNamespace(name="small", digest="sha256:0"))
    answer = Answer(submit, base, names, created=0, rates=DEFAULT_BOOK.rates(0))
    answer.add(Delta("gen-1", 0, "", [chosen], [item], Residency(), "length"))
    answer.add(Done("gen-1", "finished", 1, 0, 1, Residency()))
    logprobs = answer.whole()["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [-0.5]
    return logprobs["tokens"][0], logprobs["top_logprobs"][0]


def names_of(tok: Any, ids: list[int]) -> list[str]:
    """The names of these tokens as the likeliest of one position, in order; none may be lost."""
    chosen, top = logprobs_of(TokenNames(tok), ids[0], ids)
    assert list(top.values()) == [-float(at) for at in range(len(ids))]
    assert chosen == next(iter(top))
    return list(top)


@pytest.mark.parametrize("model", ["bpe", "unigram"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_pieces_with_a_space_and_without_have_different_names(decoder: str, model: str) -> None:
    tok = sentencepiece(decoder, model)
    ids = tok.convert_tokens_to_ids(["▁the", "the", "▁", "▁▁", "日", "\n", "a▁b", "</s>"])
    assert names_of(tok, ids) == [" the", "the", " ", "  ", "日", "\n", "a b", "</s>"]
    if decoder != "Gemma":  # why decoding one alone will not do
        assert tok.decode([ids[0]]) == tok.decode([ids[1]])


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_byte_piece_is_named_by_its_byte(decoder: str) -> None:
    tok = sentencepiece(decoder)
    ids = tok.convert_tokens_to_ids(["<0xE2>", "<0x41>", "A", "<0x0A>", "\n"])
    assert names_of(tok, ids) == ["bytes:\\xe2", "bytes:\\x41", "A", "bytes:\\x0a", "\n"]


@pytest.mark.parametrize("decoder", DECODERS)
def test_no_two_tokens_of_a_whole_vocabulary_are_alike(decoder: str) -> None:
    tok = sentencepiece(decoder)
    assert len(names_of(tok, list(range(len(tok))))) == len(PIECES)


def test_what_would_be_written_alike_has_its_id_after_it() -> None:
    tok = sentencepiece("Gemma", special=(" the", f" the#{PIECES.index('▁the')}"))
    piece, alike, tricky = PIECES.index("▁the"), len(PIECES), len(PIECES) + 1
    assert names_of(tok, [piece, 1, alike]) == [f" the#{piece}", "</s>", f" the#{alike}"]
    assert names_of(tok, [piece, 1]) == [" the", "</s>"]
    assert names_of(tok, [tricky, alike]) == [f" the#{piece}", " the"]
    everything = names_of(tok, [piece, alike, tricky])  # one is called what another is called with its id
    assert everything == [f" the#{piece}#{piece}", f" the#{alike}", f" the#{piece}#{tricky}"]


def test_a_chosen_token_is_not_taken_for_one_of_the_likeliest() -> None:
    tok = sentencepiece("Gemma", special=(" the",))
    piece, alike = PIECES.index("▁the"), len(PIECES)
    assert logprobs_of(TokenNames(tok), alike, [piece, 1]) == (f" the#{alike}", {f" the#{piece}": 0.0, "</s>": -1.0})


@pytest.mark.parametrize("tok", [sentencepiece("Llama-2"), tokenizer()], ids=["pieces", "bytes"])
def test_ids_that_only_the_model_has_keep_apart(tok: Any) -> None:
    first, second = len(tok), len(tok) + 1
    assert names_of(tok, [first, second, 1]) == [f"#{first}", f"#{second}", "<s>" if len(tok) == 320 else "</s>"]


def test_a_byte_level_tokenizer_has_text_or_bytes() -> None:
    tok = tokenizer()
    ids = tok.convert_tokens_to_ids(["a", "Ġ", "â", "Ċ", "</s>"])
    assert names_of(tok, ids) == ["a", " ", "bytes:\\xe2", "\n", "</s>"]
    assert len(names_of(tok, list(range(len(tok))))) == 320


def test_the_tokenizer_is_asked_about_a_token_once() -> None:
    tok, asked = tokenizer(), Counter[int]()
    names, real = TokenNames(tok), tok.decode
    tok.decode = lambda ids, **more: asked.update(ids) or real(ids, **more)
    first = [logprobs_of(names, 70 + at, [70, 71, 72, 73]) for at in range(4)]
    assert [logprobs_of(names, 70 + at, [70, 71, 72, 73]) for at in range(4)] == first
    assert asked == {70: 1, 71: 1, 72: 1, 73: 1}


@pytest.mark.parametrize(("k", "tokens", "large"), [(None, 10**6, False), (0, LARGE, False), (1, LARGE, True)])
def test_an_answer_is_large_by_its_logprobs(k: int | None, tokens: int, large: bool) -> None:
    base: Any = None
    answer = Answer(
        Submit("gen-1", (5,), None, Sampling(1, logprobs=k)), base, TokenNames(tokenizer()), 0, DEFAULT_BOOK.rates(0)
    )
    answer.add(Done("gen-1", "finished", 1, 0, tokens, Residency()))
    assert answer.large is large
