"""From the request's prompt or messages to token ids, with every bound checked."""

from __future__ import annotations

from typing import Any

from jinja2.exceptions import TemplateError

from server.api.schemas import GenerateRequest
from server.errors import InvalidRequest
from server.model.loader import Base

# Past this many characters tokenising takes long enough to be done beside the event loop.
LONG = 4096
PER_MESSAGE = 32  # characters that take as long as what the template does, and writes, for a message without any


def size(body: GenerateRequest) -> int:
    """How much there is to be read: characters (or ids), and of a chat what the template adds to each message."""
    return _given(body) + PER_MESSAGE * len(body.messages or ())


def check(body: GenerateRequest, base: Base, max_context: int) -> None:
    """What can be said before the prompt is read. Raises InvalidRequest naming the field at fault."""
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give exactly one of 'prompt' and 'messages'", param="prompt")
    if not isinstance(body.prompt, list) and _given(body) > max_context * base.longest_token:
        raise InvalidRequest(  # tokenising it would cost gigabytes and end in the same answer
            f"{_given(body)} characters are more than a context of {max_context} tokens can hold",
            param=_param(body),
            code="context_length_exceeded",
        )


def encode(body: GenerateRequest, base: Base, max_context: int) -> tuple[int, ...]:
    """The token ids of a prompt that `check` has passed. Raises InvalidRequest naming the field at fault."""
    param = _param(body)
    if isinstance(body.prompt, list):
        bad = next((i for i in body.prompt if not 0 <= i < base.vocab_size), None)
        if bad is not None:
            raise InvalidRequest(f"token id {bad} is outside the vocabulary (0..{base.vocab_size - 1})", param=param)
        ids = body.prompt
    elif body.messages is not None:
        ids = _ids(base.tokenizer, _render(body, base.tokenizer), param, special=False)
    else:
        ids = _ids(base.tokenizer, body.prompt or "", param, special=True)
    if not ids:
        raise InvalidRequest("the prompt has no tokens", param=param)
    if len(ids) + body.max_tokens > max_context:
        raise InvalidRequest(
            f"prompt ({len(ids)} tokens) + max_tokens ({body.max_tokens}) exceed the context of {max_context} tokens",
            param="max_tokens" if len(ids) < max_context else param,
            code="context_length_exceeded",
        )
    return tuple(ids)


def _given(body: GenerateRequest) -> int:
    if body.messages is not None:
        return sum(len(message.content) for message in body.messages)
    return len(body.prompt or ())


def _param(body: GenerateRequest) -> str:
    return "messages" if body.messages is not None else "prompt"


def _ids(tokenizer: Any, text: str, param: str, *, special: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as fault:
        raise InvalidRequest(f"{param}: lone surrogates are not text", param=param) from fault
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    return ids


def _render(body: GenerateRequest, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidRequest("this base has no chat template; send 'prompt'", param="messages")
    turns = [message.model_dump() for message in body.messages or ()]
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as fault:
        raise InvalidRequest(f"the base's chat template refuses these messages: {fault}", param="messages") from fault
    return text
