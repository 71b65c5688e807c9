"""A JSON schema in words, and tables in Markdown."""

from __future__ import annotations

from typing import Any


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table with a line for each of `rows`."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def kind_of(prop: dict[str, Any]) -> str:
    """A JSON schema in words, every bound included."""
    if "discriminator" in prop:
        return "table with `kind` " + ", ".join(f"`{one}`" for one in sorted(prop["discriminator"]["mapping"]))
    if branches := prop.get("anyOf") or prop.get("oneOf"):
        return " or ".join(kind_of(one) for one in branches)
    if "$ref" in prop:
        return prop["$ref"].rpartition("/")[2].lower()
    if "enum" in prop:
        return " or ".join(f"`{one}`" for one in prop["enum"])
    kind = prop["type"]
    if "prefixItems" in prop:
        return f"list of {len(prop['prefixItems'])}: {kind_of(prop['prefixItems'][0])}"
    if kind == "array":
        size = _between(prop.get("minItems"), prop.get("maxItems"))
        return f"list of {size}: {kind_of(prop['items'])}"
    if kind == "string" and "pattern" in prop:
        longest = f", {_between(prop.get('minLength'), prop['maxLength'])} characters" if "maxLength" in prop else ""
        return f"text `{prop['pattern'].strip('^$')}`{longest}"
    if kind == "string":
        return f"text of {_between(prop.get('minLength'), prop.get('maxLength'))} characters"
    return f"{kind} {bounds_of(prop)}".strip()


def bounds_of(prop: dict[str, Any]) -> str:
    """Of a number; empty without any."""
    words = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return ", ".join(f"{sign} {_number(prop[key])}" for key, sign in words.items() if key in prop)


def choices_of(prop: dict[str, Any]) -> str:
    """What a field of few values may be; empty for others."""
    if "enum" in prop or "const" in prop:
        return ", ".join(f"`{one}`" for one in prop.get("enum", [prop.get("const")]))
    return "`true`, `false`" if prop.get("type") == "boolean" else ""


def _between(low: int | None, high: int | None) -> str:
    return f"{_number(low or 0)} to {_number(high)}" if high is not None else f"at least {low or 0}"


def _number(value: float | None) -> str:
    if value == 2**64:
        return "2^64"
    return f"{value:,}" if isinstance(value, int) or (value is not None and value >= 1000) else f"{value:g}"
