"""The import rules, the size of files and functions, and docs/structure.md against the tree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVER = ROOT / "server"
MAX_FILE, MAX_FUNCTION = 330, 50

# Layer -> the layers that it may import from, itself aside. "lora.spec" is one module of a layer.
BOTTOM = {"core", "errors"}
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "errors": set(),
    "settings": set(),
    "machine": set(),
    "histogram": set(),
    "kernels": set(),
    "lora": BOTTOM | {"kernels"},
    "model": BOTTOM | {"kernels"},
    "engine": BOTTOM | {"histogram", "kernels", "lora", "model"},
    "registry": BOTTOM | {"histogram", "lora.eviction", "lora.weights", "lora.spec"},
    "tenants": BOTTOM,
    "metrics": BOTTOM | {"histogram", "logs", "machine", "engine.messages", "engine.stats"},
    "logs": set(),
    "api": BOTTOM | {"logs", "settings", "metrics", "registry", "tenants", "engine", "model.loader"},
    "app": BOTTOM | {"settings", "machine", "metrics", "registry", "tenants", "engine", "lora", "model", "api"},
    "datadir": set(),
    "run": BOTTOM | {"settings", "logs", "app", "api.state", "datadir", "model", "tenants"},
    "commands": BOTTOM | {"settings", "datadir", "tenants"},
    "cli": {"settings", "run", "commands"},
    "demo": {"settings", "demoview"},
    "demoview": set(),
}
# What must load without these packages at all, imports of imports included.
WEB = {"fastapi", "starlette", "pydantic", "pydantic_settings", "uvicorn", "httpx", "typer"}
HEAVY = {"torch", "transformers", "peft"}
LIGHT_MODULES = [
    "server.core",
    "server.errors",
    "server.histogram",
    "server.machine",
    "server.settings",
    "server.engine.blocks",
    "server.engine.counters",
    "server.engine.messages",
    "server.engine.scheduler",
    "server.engine.sequence",
    "server.engine.shares",
    "server.lora.eviction",
    "server.lora.header",
    "server.lora.patterns",
    "server.lora.spec",
    "server.registry.store",
    "server.registry.sources",
]
NO_WEB_LAYERS = ("core", "errors", "histogram", "machine", "kernels", "engine", "lora", "model", "registry", "tenants")
FILES = sorted(SERVER.rglob("*.py"))


def _module(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every imported module with its line; `from server.lora import bank` counts as server.lora.bank."""
    modules = {_module(file) for file in FILES}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}:{node.lineno}: imports are absolute"
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name for name in inner if name in modules]
            yield from ((name, node.lineno) for name in found or [node.module])


def _layer(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def _may(layer: str, imported: str) -> bool:
    inner = imported.removeprefix("server.")
    allowed = ALLOWED[layer] | {layer}
    return any(inner == name or inner.startswith(f"{name}.") for name in allowed)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    layer = _layer(_module(path))
    if not layer:
        return
    assert layer in ALLOWED, f"{path}: say in ALLOWED what the new layer '{layer}' may import"
    own = [(name, line) for name, line in _imports(path) if name.split(".")[0] == "server"]
    wrong = [f"{name} (line {line})" for name, line in own if not _may(layer, name)]
    assert not wrong, f"{path.relative_to(ROOT)} must not import {', '.join(wrong)}"


def test_the_rule_would_notice() -> None:
    assert not _may("engine", "server.api.state")
    assert not _may("lora", "server.engine.batch")
    assert not _may("registry", "server.lora.bank")
    assert not _may("core", "server.errors")
    assert _may("registry", "server.lora.weights")
    assert "server.lora.bank" in [name for name, _ in _imports(SERVER / "app.py")]


def test_there_is_no_cycle_of_imports() -> None:
    edges = {_module(path): {name for name, _ in _imports(path) if name.startswith("server.")} for path in FILES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail, module])
        if module not in done:
            for imported in edges.get(module, ()):
                visit(imported, (*trail, module))
            done.add(module)

    for module in edges:
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lower_layers_know_no_web_framework(path: Path) -> None:
    if _layer(_module(path)) in NO_WEB_LAYERS:
        wrong = {name for name, _ in _imports(path) if name.split(".")[0] in WEB}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_light_modules_load_without_torch() -> None:
    """In a process of its own, so that imports of imports count. The whole of tenants/ belongs to them."""
    modules = LIGHT_MODULES + [_module(path) for path in FILES if "tenants" in path.parts]
    script = f"""
import importlib, sys
for name in {modules!r}:
    before = set(sys.modules)
    importlib.import_module(name)
    heavy = {HEAVY!r} & (set(sys.modules) - before)
    assert not heavy, f"import {{name}} loads {{sorted(heavy)}}"
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


def test_the_command_line_starts_without_torch() -> None:
    """`onebase --help` must not take seconds."""
    script = "import sys, server.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=120).returncode == 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_FILE, f"{path.name} is two things: split it"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{path.name}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    if source.strip():
        assert ast.get_docstring(ast.parse(source)), f"{path.relative_to(ROOT)} has no docstring"


def test_structure_page_has_a_line_for_every_module() -> None:
    """One line for each file that is not empty, and none for a file that is not there."""
    listed = re.findall(r"^\| `(server/[\w/]+\.py)` \| \S", (ROOT / "docs/structure.md").read_text(), re.MULTILINE)
    there = [str(path.relative_to(ROOT)) for path in FILES if path.read_text(encoding="utf-8").strip()]
    assert sorted(listed) == sorted(there)
