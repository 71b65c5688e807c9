"""How a request is written and a stream is read: onebase's own API, OpenAI's completions, and llama.cpp's server."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import httpx

Api: TypeAlias = Literal["onebase", "openai", "llama"]


class UnknownServer(Exception):
    """The server answers like none of the three."""


class Piece(NamedTuple):
    """What one chunk of a stream says."""

    tokens: int  # new in this chunk
    total: int | None = None  # of the whole answer, where the chunk says it
    last: bool = False  # the answer has ended as it should
    cold: bool | None = None  # the adapter had to be loaded for it; None: not said


class Dialect(Protocol):
    """One API. `adapter` is the number of an adapter in the workload, None the base."""

    path: str

    def body(self, adapter: int | None, prompt: list[int], tokens: int) -> dict[str, Any]:
        """The JSON of a greedy request for exactly `tokens` tokens, streamed."""
        ...

    def read(self, chunk: dict[str, Any]) -> Piece:
        """Reads a chunk. Raises KeyError, TypeError or IndexError when it is not one of this API's."""
        ...


class Onebase:
    """`POST /v1/generate`."""

    path = "/v1/generate"

    def __init__(self, names: list[str]):
        self._names = names

    def body(self, adapter: int | None, prompt: list[int], tokens: int) -> dict[str, Any]:
        """The request; greedy is the default."""
        name = None if adapter is None else self._names[adapter]
        return {"adapter": name, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True}

    def read(self, chunk: dict[str, Any]) -> Piece:
        """Chunks have the new token ids; the last one has the usage."""
        choice, usage = chunk["choices"][0], chunk.get("usage")
        return Piece(
            len(choice["token_ids"]),
            usage["completion_tokens"] if usage else None,
            choice["finish_reason"] is not None,
            chunk["adapter"]["cold"],
        )


class OpenAI:
    """`POST /v1/completions` with the adapter's name as the model, as vLLM has it."""

    path = "/v1/completions"

    def __init__(self, names: list[str], base: str):
        self._names, self._base = names, base

    def body(self, adapter: int | None, prompt: list[int], tokens: int) -> dict[str, Any]:
        """The request. `ignore_eos` is an extension that inference servers share."""
        return {
            "model": self._base if adapter is None else self._names[adapter],
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def read(self, chunk: dict[str, Any]) -> Piece:
        """A chunk with a choice is taken as one token, unless the usage, which comes last, says otherwise."""
        usage = chunk.get("usage")
        total = usage["completion_tokens"] if usage else None
        if not chunk["choices"]:
            return Piece(0, total)
        choice = chunk["choices"][0]
        ended = choice.get("finish_reason") is not None
        return Piece(int(bool(choice["text"]) or not ended), total, ended)


class Llama:
    """llama.cpp's `POST /completion`; adapters are numbers that the server was started with."""

    path = "/completion"

    def __init__(self, ids: list[int]):
        self._ids = ids

    def body(self, adapter: int | None, prompt: list[int], tokens: int) -> dict[str, Any]:
        """The request; adapters that are not named have no effect."""
        lora = [] if adapter is None else [{"id": self._ids[adapter], "scale": 1.0}]
        return {
            "prompt": prompt,
            "n_predict": tokens,
            "temperature": 0,
            "top_k": 1,
            "ignore_eos": True,
            "cache_prompt": False,
            "lora": lora,
            "stream": True,
        }

    def read(self, chunk: dict[str, Any]) -> Piece:
        """Every chunk has text; the last one has counts and no text of its own."""
        if chunk["stop"]:
            return Piece(0, chunk["tokens_predicted"], True)
        return Piece(len(chunk.get("tokens") or ()) or int(bool(chunk["content"])))


def authorization(key: str | None) -> dict[str, str]:
    """What a server that wants a key is sent with every request; nothing without one."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def detect(url: str, key: str | None = None) -> Api:
    """Asks the server which API it speaks. Raises UnknownServer, also where it refuses the key, or httpx.HTTPError when
    nobody answers."""
    with httpx.Client(base_url=url, timeout=30, headers=authorization(key)) as http:
        if _json(http, "/adapters?limit=1").keys() >= {"data", "next"}:
            return "onebase"
        if "default_generation_settings" in _json(http, "/props"):
            return "llama"
        if isinstance(_json(http, "/v1/models").get("data"), list):
            return "openai"
    raise UnknownServer(f"{url} answers neither GET /adapters, nor /props, nor /v1/models: say --api")


def connect(url: str, api: Api, names: list[str], key: str | None = None) -> Dialect:
    """The dialect for a server, with the names or numbers that its adapters have there."""
    if api == "onebase":
        return Onebase(names)
    with httpx.Client(base_url=url, timeout=30, headers=authorization(key)) as http:
        if api == "openai":
            models = _json(http, "/v1/models").get("data") or [{"id": "default"}]
            bases = [model["id"] for model in models if not model.get("parent")]
            return OpenAI(names, (bases or [models[0]["id"]])[0])
        answer = http.get("/lora-adapters")
        loaded = answer.json() if answer.is_success else []
    stems = {str(one["path"]).rpartition("/")[2].removesuffix(".gguf"): int(one["id"]) for one in loaded}
    return Llama([stems.get(name, at) for at, name in enumerate(names)])


def _json(http: httpx.Client, path: str) -> dict[str, Any]:
    """The answer's object; empty where it is an error or something else."""
    response = http.get(path)
    if response.status_code == 401:
        raise UnknownServer(f"{http.base_url} wants a key that is valid: --key or ONEBASE_KEY")
    try:
        body = response.json() if response.is_success else {}
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}
