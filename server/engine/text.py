"""Turns tokens into text as they come: whole characters only, and nothing that may turn out to be a stop string."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

_REPLACEMENT = "\ufffd"
_PATIENCE = 8  # tokens an unfinished character may take; a UTF-8 character has at most four bytes


class TextStream:
    """Decodes one sequence step by step; the pieces put together are the decoded whole, cut at a stop string.

    A token may hold part of a character, and a tokenizer may join tokens differently at a string's start, so the
    text of new tokens is what they add to the text of the tokens just before them.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]):
        self._tokenizer, self._stop, self._special = tokenizer, stop, _special(tokenizer)
        self._ids: list[int] = []
        self._context = 0  # decoding starts here, so that joins come out right
        self._read = 0  # tokens before this are in the text
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """Adds a token and returns the text that is now certain. Sets `stopped` when a stop string is complete."""
        if token in self._special:
            return ""  # it is skipped, and so stands between no two bytes of a character
        self._ids.append(token)
        return self._filter(self._advance(final=False))

    def finish(self) -> str:
        """The rest of the text, once no more tokens come."""
        if self.stopped:
            return ""
        text = self._filter(self._advance(final=True))
        rest, self._held = ("" if self.stopped else self._held), ""
        return text + rest

    def _advance(self, final: bool) -> str:
        end = len(self._ids)
        now = self._decode(self._ids[self._context :])
        if now.endswith(_REPLACEMENT) and not final:
            if end - self._read < _PATIENCE:
                return ""
            end -= 3  # rubbish: what more than three tokens ago began is no character any more
            now = self._decode(self._ids[self._context : end])
        before = self._decode(self._ids[self._context : self._read])
        if len(now) <= len(before):
            return ""
        self._context, self._read = self._read, end
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _filter(self, new: str) -> str:
        if not self._stop or not new:
            return new
        text, self._held = self._held + new, ""
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        if keep:
            text, self._held = text[:-keep], text[-keep:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


_specials: WeakKeyDictionary[Any, frozenset[int]] = WeakKeyDictionary()


def _special(tokenizer: Any) -> frozenset[int]:
    """The tokens that decoding skips; asking a tokenizer is slow, so it is asked once."""
    if tokenizer not in _specials:
        _specials[tokenizer] = frozenset(
            number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        )
    return _specials[tokenizer]
