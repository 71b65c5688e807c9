"""The tables of what users meet: settings, bodies, prices, errors."""

from __future__ import annotations

import inspect
import re
from typing import Any

from docs.words import bounds_of, choices_of, kind_of, markdown
from server import errors
from server.api import tenancy
from server.api.schemas import AdapterPatch, GenerateRequest, Message, Rollback, Source
from server.commands.prices import OF
from server.metrics.page import FAMILIES
from server.settings import GIB, MIB, Settings
from server.tenants.money import dollars
from server.tenants.prices import DEFAULT_BOOK

# What a field of a request means; its type, default and bounds come from the schema.
MEANING = {
    "adapter": "name of an adapter; null is the base",
    "prompt": "text, or token ids of the base's vocabulary; exactly one of `prompt` and `messages`",
    "messages": "a chat; goes through the base's chat template",
    "max_tokens": "most tokens of each answer; prompt + max_tokens must fit the context",
    "temperature": "0 is greedy",
    "top_p": "draw from the likeliest tokens whose probabilities reach this sum; 1 is off",
    "top_k": "draw from this many of the likeliest tokens; 0 is off",
    "min_p": "drop tokens less likely than this share of the likeliest; 0 is off",
    "repetition_penalty": "over prompt and output; 1 is off",
    "presence_penalty": "over the output; 0 is off",
    "frequency_penalty": "over the output; 0 is off",
    "seed": "the same seed gives the same answer; null: the server draws one",
    "stop": "text, or a list of texts, that ends the answer and is not part of it",
    "ignore_eos": "go on past the end-of-text token",
    "logprobs": "null: none; k: log-probabilities of the chosen tokens and of the k likeliest",
    "n": "answers to the same prompt",
    "stream": "answer with Server-Sent Events",
    "priority": "`interactive` or `batch`: batch is computed after the other of its lane, yields to its tenant's in "
    "other lanes, and gives its place up first",
    "role": "who speaks",
    "content": "what is said",
    "version": "the version that becomes current",
    "lane": "`merged`: one of its own; `shared`: with all others; null: as it is",
    "pinned": "true: its merged copy never goes for another's sake; null: as it is",
    "public": "true: all tenants may use it; false: only its owner; null: as it is",
    "source": "`file://`, `hf://` or `s3://` address of a directory or repository",
}

_BODIES = (
    ("PATCH /adapters/<name>", AdapterPatch),
    ("POST /adapters/<name>/rollback", Rollback),
    ("PUT /adapters/<name>", Source),
)

TENANT = {
    "id": "its name; `POST` only",
    "weight": "its share of the engine beside the others'; 1 at first",
    "classes": "the `priority` that its requests may ask for; both at first",
    "max_adapters": "adapters that it may store",
    "max_adapter_bytes": "bytes that it may store",
    "max_merged_bytes": "bytes of merged copies that it may ask for; null: half of `MERGED_BYTES`",
    "customer": "what the billing system calls it, where that is not `id`",
    "disabled": "whether its keys are refused; `PATCH` only",
    "limits.rpm_limit": "requests a minute",
    "limits.tpm_limit": "tokens a minute, prompt + `n` times max_tokens; what was not used is given back at the end",
    "limits.max_parallel_requests": "requests that run at once",
    "limits.max_budget": "micro-dollars of a `budget_duration`; what requests cost, not storage",
    "limits.soft_budget": "micro-dollars after which the log warns",
    "limits.budget_duration": "windows are whole multiples of it since 1970, in UTC; null: a budget is for ever",
    "limits.allowed_adapters": "names; the base is always allowed",
    "prices.prompt": "of a million prompt tokens that are not cached, micro-dollars",
    "prices.cached": "of a million cached ones",
    "prices.completion": "of a million completion tokens",
    "prices.adapter_gb_day": "of 10^9 bytes stored for a day",
    "prices.merged_gb_hour": "of 10^9 bytes of merged copies for an hour",
    "prices.rank_classes": "pairs of largest rank and thousandths, ascending: what token prices are multiplied with",
}
KEY = {
    "scopes": "any of `generate`, `adapters:write`, `usage:read`, `metrics:read`, `admin`",
    "name": "what it is for",
    "expires": "seconds since 1970 or ISO 8601; null: never",
}


def tenant_table() -> str:
    """The body of `POST` and `PATCH /admin/tenants`."""
    whole = {**_props(tenancy.NewTenant), **_props(tenancy.TenantPatch)}
    parts = {"limits": tenancy.LimitsBody, "prices": tenancy.PricesBody}
    props = {name: prop for name, prop in whole.items() if name not in parts}
    props |= {f"{part}.{name}": prop for part, model in parts.items() for name, prop in _props(model).items()}
    return markdown(("field", "type and bounds", "meaning"), _rows(props, TENANT))


def key_table() -> str:
    """The body of `POST /admin/tenants/{tenant}/keys`."""
    return markdown(("field", "type and bounds", "meaning"), _rows(_props(tenancy.NewKeyBody), KEY))


def prices_table() -> str:
    """The price book that a new database begins with."""
    book = DEFAULT_BOOK.as_dict()
    classes = ", ".join(f"{rank}:{times}" for rank, times in book.pop("rank_classes"))
    rows = [(f"`{name}`", f"{book[name]:,}", f"{dollars(book[name])}", OF[name]) for name in OF if name in book]
    rows.append(("`rank_classes`", classes, "", OF["rank_classes"]))
    return markdown(("price", "micro-dollars", "dollars", "of"), rows)


def settings_table() -> str:
    """One row a setting."""
    rows = []
    for name, field in Settings.model_fields.items():
        prop = Settings.model_json_schema()["properties"][name]
        default = _settings_default(field.default)
        bounds = bounds_of(prop) if prop.get("type") in ("integer", "number") else choices_of(prop)
        rows.append((f"`ONEBASE_{name.upper()}`", default, bounds, field.description or ""))
    return markdown(("variable", "default", "bounds", "meaning"), rows)


def request_table() -> str:
    """One row a field of `POST /v1/generate`, then those of a message."""
    rows = _fields(GenerateRequest) + _fields(Message, "messages[].")
    return markdown(("field", "type and bounds", "default", "meaning"), rows)


def bodies_table() -> str:
    """The other JSON bodies."""
    rows = [(f"`{call}`", *row) for call, model in _BODIES for row in _fields(model)]
    return markdown(("call", "field", "type and bounds", "default", "meaning"), rows)


def errors_table() -> str:
    """One row a kind of error, by status."""
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.OnebaseError)]
    rows = [
        (str(kind.status), f"`{kind.type}`", f"`{kind.code}`", _first_sentence(kind))
        for kind in sorted(kinds, key=lambda kind: (kind.status, kind.code))
        if kind is not errors.OnebaseError
    ]
    rows.append(("500", "`server_error`", "`internal_error`", "A fault of the server; its log has more"))
    return markdown(("status", "type", "code", "when"), rows)


def _fields(model: Any, prefix: str = "") -> list[tuple[str, ...]]:
    schema = model.model_json_schema()
    required = schema.get("required", [])
    return [
        (f"`{prefix}{name}`", kind_of(prop), "required" if name in required else _default(prop), MEANING[name])
        for name, prop in schema["properties"].items()
    ]


def _default(prop: dict[str, Any]) -> str:
    value = prop.get("default", [])
    return "`[]`" if value == [] else f"`{'null' if value is None else str(value).lower()}`"


def _settings_default(value: Any) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, int) and not isinstance(value, bool) and value >= MIB and value % MIB == 0:
        return f"`{value}` ({value // GIB} GiB)" if value % GIB == 0 else f"`{value}` ({value // MIB} MiB)"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _first_sentence(kind: type) -> str:
    text = " ".join((kind.__doc__ or "").split())
    return re.sub(r" \(\d{3}[^)]*\)\.?$", "", text).rstrip(".")


def _props(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = model.model_json_schema()["properties"]
    return found


def _rows(props: dict[str, Any], meaning: dict[str, str]) -> list[tuple[str, ...]]:
    return [(f"`{name}`", kind_of(prop), meaning[name]) for name, prop in props.items()]


def families_table() -> str:
    """One row a metric family."""
    rows = [
        (f"`{one.shown}`", one.kind, one.unit, " ".join(f"`{label}`" for label in one.labels) or "-", one.help)
        for one in sorted(FAMILIES, key=lambda one: one.name)
    ]
    return markdown(("metric", "kind", "unit", "labels", "what it is"), rows)
