"""The dashboards as files: built from the code, complete, and written in PromQL."""

from __future__ import annotations

import json

import promql_parser
import pytest

from ops.dashboards.__main__ import FOLDER, built
from tests.monitoring import expressions


def test_the_files_are_what_the_code_builds() -> None:
    """`python -m ops.dashboards` writes them."""
    assert {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json")} == built()


@pytest.mark.parametrize("page", expressions.PAGES, ids=lambda path: path.stem)
def test_every_panel_says_what_it_shows(page: expressions.Path) -> None:
    found = expressions.panels(page)
    assert len(found) >= 10
    assert len({panel["title"] for panel in found}) == len(found)
    for panel in found:
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"], panel["title"]
        assert [target["expr"] for target in panel["targets"] if target["expr"]], panel["title"]


def test_what_is_gone_is_not_shown_in_green() -> None:
    found = {panel["title"]: panel for page in expressions.PAGES for panel in expressions.panels(page)}
    for title in ("Servers", "Stepping"):
        steps = found[title]["fieldConfig"]["defaults"]["thresholds"]["steps"]
        assert [(one["value"], one["color"]) for one in steps] == [(None, "red"), (1, "green")], title


@pytest.mark.parametrize("page", expressions.PAGES, ids=lambda path: path.stem)
def test_no_panel_lies_over_another(page: expressions.Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(page.read_text())["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("page", expressions.PAGES, ids=lambda path: path.stem)
def test_the_variables_that_queries_use_are_there(page: expressions.Path) -> None:
    loaded = json.loads(page.read_text())
    there = {one["name"] for one in loaded["templating"]["list"]}
    used = {
        name for panel in loaded["panels"] for target in panel.get("targets", ()) for name in _names(target["expr"])
    }
    assert used <= there | {"__rate_interval", "__range"}
    assert "instance" in used


def test_every_query_is_promql() -> None:
    for expression in expressions.of_dashboards():
        promql_parser.parse(expression.text)  # raises where it is not


def _names(text: str) -> set[str]:
    return set(expressions.re.findall(r"\$(\w+)", text))
