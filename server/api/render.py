"""Builds the answers of `/v1/generate` from the engine's events."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from server.engine.messages import Delta, Done, Residency, Submit, TokenLogprob
from server.model.loader import Base
from server.tenants.prices import Rates

LARGE = 2_000  # log-probabilities; about 10 ms of work


class Answer:
    """One request's answer as it grows: `add` every event, then take `whole`; or take a `chunk` per event."""

    def __init__(self, submit: Submit, base: Base, names: TokenNames, created: int, rates: Rates):
        self._submit, self._base, self._names, self._created = submit, base, names, created
        self._rates = rates
        self._deltas: list[Delta] = []
        self._done: Done | None = None

    def add(self, event: Delta | Done) -> None:
        """Takes the next event."""
        if isinstance(event, Done):
            self._done = event
        else:
            self._deltas.append(event)

    def raise_fault(self) -> None:
        """Raises the fault that the request ended with, if it did."""
        if self._done is not None and self._done.error is not None:
            raise self._done.error

    @property
    def large(self) -> bool:
        """Whether making the whole takes so long that it would hold up the other streams."""
        assert self._done is not None
        k = self._submit.sampling.logprobs
        return k is not None and self._done.completion_tokens * (k + 1) > LARGE

    def whole(self) -> dict[str, Any]:
        """The complete answer; needs the Done. May be made on any thread."""
        assert self._done is not None
        choices = [self._choice(index, self._of(index)) for index in range(self._submit.n)]
        for choice in choices:
            choice["finish_reason"] = choice["finish_reason"] or "cancelled"
        return self._envelope(choices, self._done.residency) | {"usage": self._usage(self._done)}

    def chunk(self, delta: Delta | None, done: Done | None = None) -> str:
        """One chunk of a stream as JSON: what is new in `delta`, and with `done` the usage."""
        if delta is None:
            assert done is not None
            # It ended without a last token: by cancellation.
            choices = [self._choice(index, []) | {"finish_reason": "cancelled"} for index in range(self._submit.n)]
            return self.dump(self._envelope(choices, done.residency) | {"usage": self._usage(done)})
        body = self._envelope([self._choice(delta.index, [delta])], delta.residency)
        return self.dump(body | {"usage": self._usage(done)} if done else body)

    @staticmethod
    def dump(body: dict[str, Any]) -> str:
        """Compact JSON; raises ValueError for a number that JSON has not."""
        return json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False)

    def _usage(self, done: Done) -> dict[str, int]:
        """The counts of a request that did not fail, and what it costs."""
        prompt, cached, made = done.prompt_tokens, done.cached_tokens, done.completion_tokens
        return {
            "prompt_tokens": prompt,
            "cached_tokens": cached,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "cost_microusd": self._rates.charge(prompt, cached, made).total,
        }

    def _of(self, index: int) -> list[Delta]:
        return [delta for delta in self._deltas if delta.index == index]

    def _envelope(self, choices: list[dict[str, Any]], residency: Residency) -> dict[str, Any]:
        ref = self._submit.adapter
        return {
            "id": self._submit.id,
            "created": self._created,
            "model": self._base.info.name,
            "adapter": {
                "name": ref.name if ref else None,
                "version": ref.version if ref else None,
                "digest": ref.digest if ref else self._base.info.digest,
                "lane": "base" if ref is None else "merged" if residency.merged else "shared",
                "cold": residency.cold,
                "load_ms": round(residency.load_ms, 3),
            },
            "choices": choices,
        }

    def _choice(self, index: int, deltas: list[Delta]) -> dict[str, Any]:
        logprobs = [one for delta in deltas for one in delta.logprobs]
        return {
            "index": index,
            "text": "".join(delta.text for delta in deltas),
            "token_ids": [token for delta in deltas for token in delta.token_ids],
            "finish_reason": deltas[-1].finish_reason if deltas else None,
            "logprobs": self._logprobs(logprobs) if self._submit.sampling.logprobs is not None else None,
        }

    def _logprobs(self, items: list[TokenLogprob]) -> dict[str, Any]:
        names = [self._names.of(item) for item in items]
        return {
            "tokens": [name[item.token_id] for name, item in zip(names, items, strict=True)],
            "token_logprobs": [item.logprob for item in items],
            "top_logprobs": [{name[i]: p for i, p in item.top} for name, item in zip(names, items, strict=True)],
        }


class TokenNames:
    """How log-probabilities write the tokens of one tokenizer. It is asked about each token once, for it is slow."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self._names: dict[int, str] = {number: token.content for number, token in added if token.special}
        # Such a tokenizer (SentencePiece's) may drop the first space of what it decodes, so that ` the` alone comes out
        # as `the`; but its pieces are text as they are.
        self._spaces_in_pieces = tokenizer.convert_tokens_to_string(["a", f"{_SPACE}a"]) == "a a"

    def of(self, item: TokenLogprob) -> dict[int, str]:
        """The names of a position's tokens, the chosen one and the likeliest; no two are alike."""
        names = {number: self._name(number) for number in (item.token_id, *(number for number, _ in item.top))}
        while shared := _shared(names):
            names = {number: f"{name}#{number}" if name in shared else name for number, name in names.items()}
        return names

    def _name(self, number: int) -> str:
        name = self._names.get(number)
        if name is None:
            name = self._names[number] = self._make(number)
        return name

    def _make(self, number: int) -> str:
        piece: str | None = self._tokenizer.convert_ids_to_tokens(number)
        if piece is None:
            return f"#{number}"  # the model has room for more tokens than the tokenizer knows
        if self._spaces_in_pieces:
            byte = _BYTE_PIECE.fullmatch(piece)
            return _bytes_name(bytes.fromhex(byte[1])) if byte else piece.replace(_SPACE, " ")
        text: str = self._tokenizer.decode([number], clean_up_tokenization_spaces=False)
        if "\ufffd" not in text:
            return text
        in_bytes = all(char in _BYTES for char in piece)
        return _bytes_name(bytes(_BYTES[char] for char in piece) if in_bytes else piece.encode())


def _shared(names: dict[int, str]) -> set[str]:
    """The names that more than one token has."""
    if len(set(names.values())) == len(names):  # nearly always
        return set()
    return {name for name, count in Counter(names.values()).items() if count > 1}


def _bytes_name(raw: bytes) -> str:
    """The name of a token that is not whole characters."""
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: a byte-level tokenizer's pieces are written in them."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    other = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + at): byte for at, byte in enumerate(other)}


_BYTES = _byte_alphabet()
_SPACE = "▁"  # SentencePiece's stand-in for a space
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
