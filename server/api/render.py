"""Builds the answers of `/v1/generate` from the engine's events."""

from __future__ import annotations

import json
from typing import Any

from server.engine.messages import Delta, Done, Residency, Submit, TokenLogprob
from server.model.loader import Base


class Answer:
    """One request's answer as it grows: `add` every event, then take `whole`; or take a `chunk` per event."""

    def __init__(self, submit: Submit, base: Base, created: int):
        self._submit, self._base, self._created = submit, base, created
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

    def whole(self) -> dict[str, Any]:
        """The complete answer; needs the Done."""
        assert self._done is not None
        choices = [self._choice(index, self._of(index)) for index in range(self._submit.n)]
        for choice in choices:
            choice["finish_reason"] = choice["finish_reason"] or "cancelled"
        return self._envelope(choices, self._done.residency) | {"usage": usage(self._done)}

    def chunk(self, delta: Delta | None, done: Done | None = None) -> str:
        """One chunk of a stream as JSON: what is new in `delta`, and with `done` the usage."""
        if delta is None:
            assert done is not None
            # It ended without a last token: by cancellation.
            choices = [self._choice(index, []) | {"finish_reason": "cancelled"} for index in range(self._submit.n)]
            return self.dump(self._envelope(choices, done.residency) | {"usage": usage(done)})
        body = self._envelope([self._choice(delta.index, [delta])], delta.residency)
        return self.dump(body | {"usage": usage(done)} if done else body)

    @staticmethod
    def dump(body: dict[str, Any]) -> str:
        """Compact JSON."""
        return json.dumps(body, ensure_ascii=False, separators=(",", ":"))

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
                "lane": "shared" if ref else "base",
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
        return {
            "tokens": [self._token(item.token_id) for item in items],
            "token_logprobs": [item.logprob for item in items],
            "top_logprobs": [{self._token(i): p for i, p in item.top} for item in items],
        }

    def _token(self, token_id: int) -> str:
        """The token as text; one that is not whole characters is named by its bytes, so that no two look alike."""
        text: str = self._base.tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        if "\ufffd" not in text:
            return text
        piece = self._base.tokenizer.convert_ids_to_tokens(token_id)
        raw = bytes(_BYTES[char] for char in piece) if all(char in _BYTES for char in piece) else piece.encode()
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def usage(done: Done) -> dict[str, int]:
    """The counts of a finished request."""
    return {
        "prompt_tokens": done.prompt_tokens,
        "cached_tokens": done.cached_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
        "cost_microusd": 0,
    }


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: a byte-level tokenizer's pieces are written in them."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    other = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + at): byte for at, byte in enumerate(other)}


_BYTES = _byte_alphabet()
