"""The docs against the code: tables, links, targets, commands, variables, endpoints and codes."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi import FastAPI

from docs import generate
from server.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "adapters/README.md"])
PROSE = {page: page.read_text(encoding="utf-8") for page in PAGES}
ALL = "\n".join(PROSE.values())
NOT_SETTINGS = {"ONEBASE_URL", "ONEBASE_KEY"}  # read by the commands that call a server
DECISION = ["Context", "Decision", "Consequences", "Rejected"]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _text(page: Path) -> str:
    """Without code blocks."""
    return _BLOCK.sub("", PROSE[page])


@pytest.mark.parametrize("page", generate.PAGES, ids=lambda page: page.name)
def test_generated_tables_are_up_to_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<!-- generated:" in text
    assert text == generate.render(text), "run: python -m docs.generate"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", _text(page)):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), f"{_name(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_named_files_exist(page: Path) -> None:
    named = re.findall(r"`((?:server|tests|docs|adapters|\.ci)/[\w./-]+\.\w+)`", _text(page))
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, f"{_name(page)} names {missing}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z]+)", ALL))
    for _, block in _BLOCK.findall(ALL):
        named |= set(re.findall(r"^make ([a-z]+)", block, re.MULTILINE))
    assert {"serve", "demo", "test", "lint"} <= named <= targets


def test_variables_exist() -> None:
    named = set(re.findall(r"\bONEBASE_[A-Z_]*[A-Z]\b", ALL))
    known = {f"ONEBASE_{name.upper()}" for name in Settings.model_fields}
    assert named - NOT_SETTINGS <= known
    assert known <= named, "operations.md has every setting"


def _commands() -> list[str]:
    found = [line for _, block in _BLOCK.findall(ALL) for line in re.findall(r"^(?:\S*/)?onebase .*", block, re.M)]
    return sorted({re.sub(r"\s+#.*", "", command) for command in found})


def test_commands_are_found() -> None:
    assert len(_commands()) > 5


@pytest.mark.parametrize("command", _commands())
def test_commands_and_their_flags_exist(command: str) -> None:
    words = shlex.split(command)[1:]
    groups = ("adapters", "tenants", "prices")
    named = words[: 3 if words[:2] == ["tenants", "keys"] else 2 if words[0] in groups else 1]
    run = [sys.executable, "-m", "server.cli", *named, "--help"]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=60, env={"COLUMNS": "300"})
    assert result.returncode == 0, result.stdout + result.stderr
    for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert flag in result.stdout, f"{command}: no {flag}"


def test_endpoints_are_those_of_the_app() -> None:
    """Every route has its line in api.md, and no line is without a route."""
    from server.api import adapters, admin, health, usage
    from server.api import generate as generating

    app = FastAPI()
    for router in (generating.router, adapters.router, usage.router, admin.router, health.router):
        app.include_router(router)
    routes = {f"{method.upper()} {path}" for path, methods in app.openapi()["paths"].items() for method in methods}
    listed = set(re.findall(r"^\| `([A-Z]+ /\S*)` \| ", PROSE[ROOT / "docs/api.md"], re.MULTILINE))
    listed = {line for line in listed if "<" not in line}
    assert listed == routes


def test_error_codes_are_listed() -> None:
    """Every `code="…"` of the server, and every class's own."""
    codes = set()
    for path in sorted((ROOT / "server").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "code" and isinstance(node.value, ast.Constant):
                codes.add(node.value.value)
    assert "queue_full" in codes
    page = PROSE[ROOT / "docs/api.md"]
    missing = [code for code in sorted(codes) if f"`{code}`" not in page]
    assert not missing


@pytest.mark.parametrize("page", sorted((ROOT / "docs/decisions").glob("*.md")), ids=lambda page: page.stem)
def test_decisions_have_their_parts(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {page.name[:4]} ")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == DECISION


def test_figures_in_the_text_are_those_of_the_code() -> None:
    import inspect

    from server import app
    from server.api import limits, state
    from server.engine import loading
    from server.lora import patterns, spec
    from server.registry.registry import Registry

    registry = inspect.signature(Registry.__init__).parameters
    operations, tiers, uploads = (
        " ".join((ROOT / "docs" / page).read_text(encoding="utf-8").split())
        for page in (
            "operations.md",
            "decisions/0002-slot-bank-and-three-tiers.md",
            "decisions/0005-reading-uploads.md",
        )
    )
    assert f"| a JSON body | {limits.MAX_JSON_BYTES // 2**20} MiB |" in operations
    assert f"| an upload's config | {spec.MAX_CONFIG_BYTES // 2**10} KiB |" in operations
    assert f"| uploads being checked at once | {state.CHECKS_AT_ONCE}, " in operations
    assert f"| versions kept of one adapter | {registry['max_versions'].default}, " in operations
    assert f"| adapters | {registry['max_adapters'].default:,} |" in operations
    assert f"Blocks have {app.BLOCK_SIZE} tokens" in operations
    assert (
        f"at most {app._CPU_KV_TOKENS:,} tokens; on CUDA {app._KV_SHARE['cuda']:.0%}".replace("%", " %") in operations
    )
    assert app._KV_SHARE["cpu"] == 0.25, "a quarter of the free memory on a CPU"
    assert f"never fewer than {app._KV_BOUNDS[0]:,}" in operations
    assert loading.PATIENCE == 2, "After two seconds"
    assert "After two seconds" in tiers
    assert patterns.MATCH_SECONDS == 0.25, "a quarter of a second"
    assert f"at most {patterns.MAX_COMPILED} patterns of at most {patterns.MAX_PATTERN:,} characters" in uploads
