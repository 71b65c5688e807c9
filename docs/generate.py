"""Writes the tables that follow from the code or from measurements: `python -m docs.generate`.

A table stands between `<!-- generated:NAME -->` and `<!-- generated:end -->`. tests/unit/test_docs.py compares.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from docs import interface, measured, workloads

DOCS = Path(__file__).parent
PAGES = (
    *(DOCS / name for name in ("operations.md", "api.md", "loadtest.md", "performance.md", "metrics.md")),
    DOCS.parent / "README.md",
)
_TABLE = re.compile(r"(<!-- generated:(?P<name>[a-z]+) -->\n).*?(<!-- generated:end -->)", re.DOTALL)

TABLES: dict[str, Callable[[], str]] = {
    "settings": interface.settings_table,
    "request": interface.request_table,
    "bodies": interface.bodies_table,
    "tenant": interface.tenant_table,
    "key": interface.key_table,
    "prices": interface.prices_table,
    "errors": interface.errors_table,
    "measured": measured.measured_table,
    "anatomy": measured.anatomy_table,
    "growth": measured.growth_table,
    "lanes": measured.lanes_table,
    "automerge": measured.automerge_table,
    "tenants": measured.tenants_table,
    "families": interface.families_table,
    "counting": measured.counting_table,
    "bars": measured.aims_table,
    "workload": workloads.workload_table,
    "laws": workloads.laws_table,
    "shipped": workloads.shipped_table,
}


def render(text: str) -> str:
    """`text` with every generated table as it should be now."""
    return _TABLE.sub(lambda found: f"{found[1]}\n{TABLES[found['name']]()}\n{found[3]}", text)


def main() -> None:
    """Rewrites the pages in place."""
    for path in PAGES:
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
