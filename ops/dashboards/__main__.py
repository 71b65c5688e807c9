"""Writes the dashboards as Grafana reads them: `python -m ops.dashboards`."""

from __future__ import annotations

from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from ops.dashboards.adapters import adapters
from ops.dashboards.engine import engine
from ops.dashboards.fleet import fleet
from ops.dashboards.tenants import tenants

FOLDER = Path(__file__).parents[1] / "grafana" / "dashboards"
PAGES = (fleet, adapters, tenants, engine)


def built() -> dict[str, str]:
    """The text of every dashboard by the name of its file."""
    made = [make().build() for make in PAGES]
    return {f"{page.uid}.json": JSONEncoder(sort_keys=True, indent=2).encode(page) + "\n" for page in made}


def main() -> None:
    """Rewrites the files."""
    for name, text in built().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
