"""The PromQL of dashboards and alerts, as Prometheus is asked it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import promql_parser
import yaml

ROOT = Path(__file__).resolve().parents[2]
ALERTS = ROOT / "ops" / "alerts.yml"
PAGES = sorted((ROOT / "ops" / "grafana" / "dashboards").glob("*.json"))


class Expression(NamedTuple):
    """Where it stands, and what it says."""

    place: str
    text: str


def panels(page: Path) -> list[dict[str, Any]]:
    """The panels of a dashboard that show something."""
    return [panel for panel in json.loads(page.read_text())["panels"] if panel["type"] != "row"]


def of_dashboards(interval: str = "5m", variables: str = ".*") -> Iterator[Expression]:
    """Every query, with values where Grafana puts some."""
    for page in PAGES:
        for panel in panels(page):
            for target in panel["targets"]:
                text = target["expr"].replace("$__rate_interval", interval).replace("$__range", interval)
                yield Expression(f"{page.stem}: {panel['title']}", re.sub(r"\$(\w+)", variables, text))


def rules() -> list[dict[str, Any]]:
    """Alerts and the rules that record what they compare."""
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def of_alerts() -> Iterator[Expression]:
    """Both sides of every comparison: an alert itself is empty while all is well."""
    for rule in rules():
        name = rule.get("alert") or rule["record"]
        for side in _sides(promql_parser.parse(rule["expr"])):
            yield Expression(name, side)


def _sides(expression: Any) -> Iterator[str]:
    if isinstance(expression, promql_parser.ParenExpr):
        yield from _sides(expression.expr)
    elif isinstance(expression, promql_parser.BinaryExpr) and str(expression.op) in _SPLIT:
        yield from _sides(expression.lhs)
        yield from _sides(expression.rhs)
    elif not isinstance(expression, promql_parser.NumberLiteral):
        yield expression.prettify()


_SPLIT = {"and", "or", "unless", ">", "<", ">=", "<=", "==", "!="}


def metrics(text: str) -> set[str]:
    """The metrics that an expression reads."""
    found: set[str] = set()

    def walk(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.add(node.name)
        for part in ("expr", "lhs", "rhs", "vector_selector", "vs"):
            if hasattr(node, part):
                walk(getattr(node, part))
        for argument in getattr(node, "args", None) or ():
            walk(argument)

    walk(promql_parser.parse(text))
    return found
