"""The JSON that the endpoints take and give. Every number, string and list has a bound."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag, model_validator

MAX_PROMPT_CHARS = 2_000_000
MAX_PROMPT_TOKENS = 1_000_000
MAX_N = 16
MAX_STOPS = 16
ADAPTER_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
AdapterName = Annotated[str, StringConstraints(pattern=ADAPTER_NAME)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]


def _form(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<text>"


# Text or a list: the value's own kind decides which errors are told. The tags are no part of a field's name.
BY_FORM = Discriminator(_form)
Prompt = Annotated[
    Annotated[str, StringConstraints(min_length=1, max_length=MAX_PROMPT_CHARS), Tag("<text>")]
    | Annotated[list[int], Field(min_length=1, max_length=MAX_PROMPT_TOKENS, fail_fast=True), Tag("<list>")],
    BY_FORM,
]
Stops = Annotated[
    Annotated[Stop, Tag("<text>")] | Annotated[list[Stop], Field(max_length=MAX_STOPS), Tag("<list>")], BY_FORM
]


class Strict(BaseModel):
    """Refuses unknown fields, and values of another type than the field's."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Message(Strict):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS)]


class GenerateRequest(Strict):
    """`POST /v1/generate`. Exactly one of `prompt` and `messages`; `adapter` null is the base."""

    adapter: AdapterName | None = None
    prompt: Prompt | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=1024, fail_fast=True)] | None = None
    max_tokens: int = Field(64, ge=1, le=1_000_000)
    temperature: float = Field(0.0, ge=0, le=5)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=1_000_000)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=0, lt=2**64, description="null: the server draws one")
    stop: Stops | None = None
    ignore_eos: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)
    n: int = Field(1, ge=1, le=MAX_N)
    stream: bool = False
    priority: Literal["interactive", "batch"] = Field(
        "interactive",
        description="batch is computed after the other of its lane, yields to its tenant's in other lanes, and gives "
        "its place up first",
    )

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class Fault(BaseModel):
    """What went wrong, and the field at fault."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorEnvelope(BaseModel):
    """The body of every answer that is an error."""

    error: Fault


class AdapterUsed(BaseModel):
    """Which weights gave the answer. For the base: no name and version, and the base's own digest."""

    name: str | None
    version: int | None
    digest: str
    lane: Literal["shared", "merged", "base"]
    cold: bool
    load_ms: float


class Logprobs(BaseModel):
    """Natural log-probabilities under the model itself, before temperature, penalties and filters.

    A token that is not a whole character is written `bytes:\\xe2\\x80`.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]


class Choice(BaseModel):
    """One answer, or in a stream the part of it that is new."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length", "budget", "cancelled"] | None
    logprobs: Logprobs | None


class Usage(BaseModel):
    """What is counted: the prompt once, the output of all `n` answers."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    total_tokens: int
    cost_microusd: int


class GenerateResponse(BaseModel):
    """An answer, or one chunk of a streamed one; `usage` is in the last chunk only."""

    id: str
    created: int
    model: str
    adapter: AdapterUsed
    choices: list[Choice]
    usage: Usage | None = None


class AdapterInfo(BaseModel):
    """One version of an adapter, as `PUT` answers it."""

    name: str
    version: int
    digest: str
    rank: int
    alpha: float
    targets: list[str]
    parameters: int
    bytes: int
    kind: str
    base: str
    created: float


class AdapterStatus(AdapterInfo):
    """The current version and where it is. Of an adapter that another tenant has published, nothing tells what others
    do with it: `lane_note` is null, `pinned` is false, `in_flight` and `requests` are 0 and `last_used` is null."""

    own: bool
    public: bool
    residency: Literal["disk", "ram", "device"]
    lane: Literal["shared", "merged"]
    lane_note: str | None
    pinned: bool
    in_flight: int
    last_used: float | None
    requests: int


class AdapterList(BaseModel):
    """A page of one's own adapters and the published ones, by name; `next` is the `after` of the next page, or null."""

    data: list[AdapterStatus]
    next: str | None


class VersionInfo(AdapterInfo):
    """One entry of an adapter's history."""

    current: bool


class VersionList(BaseModel):
    """The history, oldest first."""

    data: list[VersionInfo]
    next: None = None


class Rollback(Strict):
    """Which version becomes current again."""

    version: int = Field(ge=1)


class AdapterPatch(Strict):
    """What is to change; what is left out stays."""

    lane: Literal["shared", "merged"] | None = None
    pinned: bool | None = Field(None, description="a pinned copy never goes for another's sake; needs the merged lane")
    public: bool | None = Field(None, description="all tenants may use a published adapter, and see that it is there")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.lane is None and self.pinned is None and self.public is None:
            raise ValueError("name what is to change: lane, pinned, public")
        return self


class Source(Strict):
    """Where the server fetches an adapter from, where its settings allow it."""

    source: Annotated[str, StringConstraints(min_length=1, max_length=2048)]
