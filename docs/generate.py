"""Writes the tables that follow from the code or from measurements: `python -m docs.generate`.

A table stands between `<!-- generated:NAME -->` and `<!-- generated:end -->`. tests/unit/test_docs.py compares.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from loadtest import arrivals, comparison, lengths, popularity, workload
from loadtest.bars import bars_table, measured
from server import errors
from server.api import tenancy
from server.api.schemas import AdapterPatch, GenerateRequest, Message, Rollback, Source
from server.settings import GIB, MIB, Settings

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "loadtest" / "results"
PAGES = (
    *(DOCS / name for name in ("operations.md", "api.md", "loadtest.md", "performance.md")),
    DOCS.parent / "README.md",
)
_TABLE = re.compile(r"(<!-- generated:(?P<name>[a-z]+) -->\n).*?(<!-- generated:end -->)", re.DOTALL)

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
    "priority": "`interactive` or `batch`: batch is computed after the other of its lane, and gives its place up first",
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
    "customer": "what the billing system calls it, where that is not `id`",
    "disabled": "whether its keys are refused; `PATCH` only",
    "limits.rpm_limit": "requests a minute",
    "limits.tpm_limit": "tokens a minute, prompt + max_tokens; what was not used is given back at the end",
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
    "scopes": "any of `generate`, `adapters:write`, `usage:read`, `admin`",
    "name": "what it is for",
    "expires": "seconds since 1970 or ISO 8601; null: never",
}


def tenant_table() -> str:
    """The body of `POST` and `PATCH /admin/tenants`."""
    whole = {**_props(tenancy.NewTenant), **_props(tenancy.TenantPatch)}
    parts = {"limits": tenancy.LimitsBody, "prices": tenancy.PricesBody}
    props = {name: prop for name, prop in whole.items() if name not in parts}
    props |= {f"{part}.{name}": prop for part, model in parts.items() for name, prop in _props(model).items()}
    return _markdown(("field", "type and bounds", "meaning"), _rows(props, TENANT))


def key_table() -> str:
    """The body of `POST /admin/tenants/{tenant}/keys`."""
    return _markdown(("field", "type and bounds", "meaning"), _rows(_props(tenancy.NewKeyBody), KEY))


def _props(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = model.model_json_schema()["properties"]
    return found


def _rows(props: dict[str, Any], meaning: dict[str, str]) -> list[tuple[str, ...]]:
    return [(f"`{name}`", _kind(prop), meaning[name]) for name, prop in props.items()]


def settings_table() -> str:
    """One row a setting."""
    rows = []
    for name, field in Settings.model_fields.items():
        prop = Settings.model_json_schema()["properties"][name]
        default = _settings_default(field.default)
        bounds = _bounds(prop) if prop.get("type") in ("integer", "number") else _choices(prop)
        rows.append((f"`ONEBASE_{name.upper()}`", default, bounds, field.description or ""))
    return _markdown(("variable", "default", "bounds", "meaning"), rows)


def request_table() -> str:
    """One row a field of `POST /v1/generate`, then those of a message."""
    rows = _fields(GenerateRequest) + _fields(Message, "messages[].")
    return _markdown(("field", "type and bounds", "default", "meaning"), rows)


def bodies_table() -> str:
    """The other JSON bodies."""
    rows = [(f"`{call}`", *row) for call, model in _BODIES for row in _fields(model)]
    return _markdown(("call", "field", "type and bounds", "default", "meaning"), rows)


def errors_table() -> str:
    """One row a kind of error, by status."""
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.OnebaseError)]
    rows = [
        (str(kind.status), f"`{kind.type}`", f"`{kind.code}`", _first_sentence(kind))
        for kind in sorted(kinds, key=lambda kind: (kind.status, kind.code))
        if kind is not errors.OnebaseError
    ]
    rows.append(("500", "`server_error`", "`internal_error`", "A fault of the server; its log has more"))
    return _markdown(("status", "type", "code", "when"), rows)


def workload_table() -> str:
    """One row a field of a workload's file, then those of its objective."""
    schema = TypeAdapter(workload.Workload).json_schema()
    rows = [_of_workload(name, prop, schema) for name, prop in schema["properties"].items()]
    objective = schema["$defs"]["Objective"]
    rows += [_of_workload(f"slo.{name}", prop, objective, name) for name, prop in objective["properties"].items()]
    return _markdown(("field", "type and bounds", "default", "meaning"), rows)


def laws_table() -> str:
    """One row a kind of arrivals, popularity and length."""
    kinds = (
        ("arrivals", (arrivals.Closed, arrivals.Gamma)),
        ("popularity", (popularity.Zipf, popularity.Power, popularity.Identical, popularity.Distinct,
                        popularity.Uniform, popularity.Geometric)),
        ("lengths", (lengths.Fixed, lengths.Between)),
    )  # fmt: skip
    rows = []
    for what, classes in kinds:
        for one in classes:
            fields = TypeAdapter(one).json_schema()["properties"]
            kind = fields.pop("kind")["const"]
            own = "; ".join(f"`{name}`: {prop['description']}, {_kind(prop)}" for name, prop in fields.items())
            rows.append((what, f"`{kind}`", own or "-", " ".join((one.__doc__ or "").split()).rstrip(".")))
    return _markdown(("of", "kind", "its fields", "what it is"), rows)


def shipped_table() -> str:
    """One row a shipped workload."""
    rows = [(f"`{name}`", workload.load(name).about) for name in workload.shipped()]
    return _markdown(("name", "what it is"), rows)


def measured_table() -> str:
    """What the committed results of `make bench` and of `loadtest.thousand` say."""
    report = json.loads((RESULTS / "compare.json").read_text())
    return f"{comparison.measured(report)}\n{comparison.notes(report)}\n{_thousand()}"


def _thousand() -> str:
    run = json.loads((RESULTS / "thousand.json").read_text())
    resident, zipf, new = run["resident"], run["zipf"], run["new_adapter"]
    return (
        f"{run['adapters']:,} registered adapters, {run['slots']} slots, RAM for 200 of them, 16 streams over adapters "
        f"drawn by Zipf's law: {zipf['errors']} errors in {zipf['requests']} requests, {zipf['tokens_per_s']:.0f} "
        f"tokens/s where 16 resident adapters reach {resident['tokens_per_s']:.0f}. A new adapter gave its first token "
        f"{new['put_and_first_token_s']:.2f} s after its upload began; the longest pause of the 15 streams beside it "
        f"was {new['others_gap_max_ms']:.0f} ms, their median {new['others_gap_p50_ms']:.0f} ms. `{run['command']}`.\n"
    )


def anatomy_table() -> str:
    """Milliseconds of a decode step and its parts, by number of rows."""
    pages = []
    for dtype in ("float32", "bfloat16"):
        run = json.loads((RESULTS / f"steps-{dtype}.json").read_text())
        parts = list(next(iter(run["anatomy"].values())))
        rows = [(name, *(f"{took[part]:.1f}" for part in parts)) for name, took in run["anatomy"].items()]
        table = _markdown((f"{dtype}, {run['context']} tokens of context, ms", *parts), rows)
        pages.append(f"{table}\n`{run['command']}`, commit {run['commit']}, {run['when']}.\n")
    return "\n".join(pages)


def growth_table() -> str:
    """Milliseconds of a decode step of 16 rows, by kind of batch, with the ratios that follow."""
    runs = [json.loads((RESULTS / f"steps-{dtype}.json").read_text()) for dtype in ("float32", "bfloat16")]
    head = ("a step of 16 rows", *(f"{run['dtype']}, ms" for run in runs))
    rows = [(name, *(f"{run['step_ms'][name]:.1f}" for run in runs)) for name in runs[0]["step_ms"]]
    shares = [(name, *(f"{run['ratios'][name]:.2f}" for run in runs)) for name in runs[0]["ratios"]]
    ratio = ("throughput as a share of the base's", *(run["dtype"] for run in runs))
    return f"{_markdown(head, rows)}\n{_markdown(ratio, shares)}"


def lanes_table() -> str:
    """What a merged lane gives and costs, and from how many of 16 rows on it is more throughput."""
    runs = [json.loads((RESULTS / f"lanes-{dtype}.json").read_text()) for dtype in measured(RESULTS, "lanes")]
    dtypes = tuple(run["dtype"] for run in runs)
    parts = [(part, name) for part in ("beside", "flood", "whole", "alone") for name in runs[0][part]]
    rows = [(LANES[part], name, *(f"{run[part][name]:.3g}" for run in runs)) for part, name in parts]
    tables = [_markdown(("streams", "figure", *dtypes), rows)]
    counts = runs[0]["crossover"]
    rows = [
        (f"{count} of 16", *(f"{run['crossover'][count]['merged / shared']:.2f}" for run in runs)) for count in counts
    ]
    tables.append(_markdown(("rows on one adapter", *(f"{dtype}, its lane / shared" for dtype in dtypes)), rows))
    stamps = [stamp for run in runs for stamp in (run, *run.get("again", {}).values())]
    tables += [f"`{one['command']}`, commit {one['commit']}, {one['when']}." for one in stamps]
    return "\n".join(tables) + "\n"


LANES = {
    "beside": "one beside 15 on other adapters",
    "flood": "one under 15 streams of prompts of 1,024 tokens",
    "whole": "16 on one adapter",
    "alone": "one alone",
}


def automerge_table() -> str:
    """Throughput with AUTO_MERGE over without."""
    runs = [json.loads((RESULTS / f"automerge-{dtype}.json").read_text()) for dtype in measured(RESULTS, "automerge")]
    rows = []
    for run in runs:
        for part, name in (("zipf", f"{run['adapters']} adapters, Zipf {run['zipf_s']:g}"), ("one", "one adapter")):
            one = run[part]
            each = ", ".join(f"{ratio:.2f}" for ratio in one["rounds"])
            made = max(sum(after.values()) for _, after in one["changes before and after each round"])
            rates = (f"{one['off_tokens_per_s']:.0f}", f"{one['on_tokens_per_s']:.0f}")
            rows.append((f"{run['dtype']}: 16 streams on {name}", *rates, each, f"{made:g}"))
    head = ("streams", "off, tok/s", "on, tok/s", "on / off, by round", "lanes changed by the end of a round, most")
    stamps = "\n".join(f"`{run['command']}`, commit {run['commit']}, {run['when']}." for run in runs)
    return f"{_markdown(head, rows)}\n{stamps}\n"


def tenants_table() -> str:
    """What a flooding tenant does to another, and what keys and the ledger cost."""
    runs = [json.loads((RESULTS / f"tenants-{dtype}.json").read_text()) for dtype in measured(RESULTS, "tenants")]
    rows = []
    for run in runs:
        parts = {f"{count} streams, alone and beside a flood": found for count, found in run["fair"].items()}
        parts |= {"a tiny request": run["auth"], "16 streams and the ledger": run["metering"]}
        rows += [(run["dtype"], what, name, f"{found[name]:.3g}") for what, found in parts.items() for name in found]
    stamps = "\n".join(f"`{run['command']}`, commit {run['commit']}, {run['when']}." for run in runs)
    return f"{_markdown(('', 'of', 'figure', 'measured'), rows)}\n{stamps}\n" if runs else "Not measured yet.\n"


TABLES: dict[str, Callable[[], str]] = {
    "settings": settings_table,
    "request": request_table,
    "bodies": bodies_table,
    "tenant": tenant_table,
    "key": key_table,
    "errors": errors_table,
    "measured": measured_table,
    "anatomy": anatomy_table,
    "growth": growth_table,
    "lanes": lanes_table,
    "automerge": automerge_table,
    "tenants": tenants_table,
    "bars": lambda: bars_table(RESULTS),
    "workload": workload_table,
    "laws": laws_table,
    "shipped": shipped_table,
}


def render(text: str) -> str:
    """`text` with every generated table as it should be now."""
    return _TABLE.sub(lambda found: f"{found[1]}\n{TABLES[found['name']]()}\n{found[3]}", text)


def main() -> None:
    """Rewrites the pages in place."""
    for path in PAGES:
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")


def _fields(model: Any, prefix: str = "") -> list[tuple[str, ...]]:
    schema = model.model_json_schema()
    required = schema.get("required", [])
    return [
        (f"`{prefix}{name}`", _kind(prop), "required" if name in required else _default(prop), MEANING[name])
        for name, prop in schema["properties"].items()
    ]


def _of_workload(shown: str, prop: dict[str, Any], schema: dict[str, Any], name: str = "") -> tuple[str, ...]:
    required = (name or shown) in schema["required"]
    value = prop.get("default")
    default = "none" if value is None or value == "" else f"`{json.dumps(value)}`"
    return (f"`{shown}`", _kind(prop), "required" if required else default, prop["description"])


def _kind(prop: dict[str, Any]) -> str:
    """A JSON schema in words, every bound included."""
    if "discriminator" in prop:
        return "table with `kind` " + ", ".join(f"`{one}`" for one in sorted(prop["discriminator"]["mapping"]))
    if branches := prop.get("anyOf") or prop.get("oneOf"):
        return " or ".join(_kind(one) for one in branches)
    if "$ref" in prop:
        return prop["$ref"].rpartition("/")[2].lower()
    if "enum" in prop:
        return " or ".join(f"`{one}`" for one in prop["enum"])
    kind = prop["type"]
    if "prefixItems" in prop:
        return f"list of {len(prop['prefixItems'])}: {_kind(prop['prefixItems'][0])}"
    if kind == "array":
        size = _between(prop.get("minItems"), prop.get("maxItems"))
        return f"list of {size}: {_kind(prop['items'])}"
    if kind == "string" and "pattern" in prop:
        return f"text `{prop['pattern'].strip('^$')}`"
    if kind == "string":
        return f"text of {_between(prop.get('minLength'), prop.get('maxLength'))} characters"
    return f"{kind} {_bounds(prop)}".strip()


def _bounds(prop: dict[str, Any]) -> str:
    words = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return ", ".join(f"{sign} {_number(prop[key])}" for key, sign in words.items() if key in prop)


def _choices(prop: dict[str, Any]) -> str:
    if "enum" in prop or "const" in prop:
        return ", ".join(f"`{one}`" for one in prop.get("enum", [prop.get("const")]))
    return "`true`, `false`" if prop.get("type") == "boolean" else ""


def _between(low: int | None, high: int | None) -> str:
    return f"{_number(low or 0)} to {_number(high)}" if high is not None else f"at least {low or 0}"


def _number(value: float | None) -> str:
    if value == 2**64:
        return "2^64"
    return f"{value:,}" if isinstance(value, int) or (value is not None and value >= 1000) else f"{value:g}"


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


def _markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
