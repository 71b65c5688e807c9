"""`make demo` for real: a server process, HTTP, the shipped adapters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from server import demo
from tests.databases import in_environment

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.real


def _demo(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("ONEBASE_", "COLUMNS"))}
    env |= {"TMPDIR": str(tmp_path)} | in_environment(tmp_path) | variables
    command = [sys.executable, "-m", "server.demo"]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def test_every_answer_comes_and_the_adapters_answer_better(tmp_path: Path) -> None:
    result = _demo(tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= demo.WIDTH
    assert "\x1b" not in result.stdout, "no colours where there is no terminal"
    for question in demo.questions():
        assert question.adapter in result.stdout
    assert result.stdout.count("(base)") == len(demo.questions()) >= 4
    assert "Henrik wants to move the planning" in result.stdout  # email-summary
    assert '"number": "INV-20417"' in " ".join(result.stdout.split())  # invoice-json
    assert any("shipping" in line and "ticket-triage" in line for line in lines)
    for tenant in demo.TENANTS:
        assert f"{tenant}'s bill of " in result.stdout
        assert any(tenant in line and "ticket-triage" in line for line in lines) == (tenant == demo.TENANTS[1])
    assert not list(tmp_path.glob("onebase-*")), "nothing is left behind"


def test_a_bill_that_is_not_what_the_answers_cost_fails_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    line = {"adapter": None, "kind": "prompt", "quantity": 9, "unit": "tokens", "amount_microusd": 3}
    storage = line | {"kind": "storage", "unit": "byte_seconds"}
    monkeypatch.setattr(demo, "call", lambda *_: {"tenant": "acme", "lines": [line, storage]})
    with demo.client("http://127.0.0.1:1", "ob_x") as http:
        answer = {"usage": {"cost_microusd": 3}}
        assert demo.bills({"a": http}, {("a", None): answer})[0]["tenant"] == "acme"
        with pytest.raises(demo.DemoFailed, match="cost 6 micro-dollars, its bill says 3"):
            demo.bills({"a": http}, {("a", None): answer, ("a", "a"): answer})


def test_a_server_that_does_not_start_is_told_with_its_last_lines(tmp_path: Path) -> None:
    result = _demo(tmp_path, ONEBASE_DTYPE="float64")
    assert result.returncode == 1
    assert "the demo failed" in result.stderr
    assert "dtype" in result.stderr
    assert "Traceback" not in result.stderr
    assert not result.stdout


def test_a_missing_answer_fails_the_demo(tmp_path: Path) -> None:
    result = _demo(tmp_path, ONEBASE_MAX_CONTEXT="200")  # too short for one of the questions
    assert result.returncode == 1
    assert "context_length_exceeded" in result.stderr
    assert "Uvicorn running" in result.stderr, "the server's log is shown"
    assert not list(tmp_path.glob("onebase-*"))
