"""The tables of the load tests' workloads."""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter

from docs.words import kind_of, markdown
from loadtest import arrivals, lengths, popularity, workload


def workload_table() -> str:
    """One row a field of a workload's file, then those of its objective."""
    schema = TypeAdapter(workload.Workload).json_schema()
    rows = [_of_workload(name, prop, schema) for name, prop in schema["properties"].items()]
    objective = schema["$defs"]["Objective"]
    rows += [_of_workload(f"slo.{name}", prop, objective, name) for name, prop in objective["properties"].items()]
    return markdown(("field", "type and bounds", "default", "meaning"), rows)


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
            own = "; ".join(f"`{name}`: {prop['description']}, {kind_of(prop)}" for name, prop in fields.items())
            rows.append((what, f"`{kind}`", own or "-", " ".join((one.__doc__ or "").split()).rstrip(".")))
    return markdown(("of", "kind", "its fields", "what it is"), rows)


def shipped_table() -> str:
    """One row a shipped workload."""
    rows = [(f"`{name}`", workload.load(name).about) for name in workload.shipped()]
    return markdown(("name", "what it is"), rows)


def _of_workload(shown: str, prop: dict[str, Any], schema: dict[str, Any], name: str = "") -> tuple[str, ...]:
    required = (name or shown) in schema["required"]
    value = prop.get("default")
    default = "none" if value is None or value == "" else f"`{json.dumps(value)}`"
    return (f"`{shown}`", kind_of(prop), "required" if required else default, prop["description"])
