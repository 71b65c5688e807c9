"""Every curl and onebase command of the README, to the letter, against a real server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import demo
from tests.databases import in_environment

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TENANTS = README[README.index("## Tenants and the bill") : README.index("## Other bases")]  # on a server with AUTH on
REST = README.replace(TENANTS, "")
ONEBASE = ".venv/bin/onebase"
pytestmark = pytest.mark.real


def commands(page: str) -> list[str]:
    """The blocks' commands in their order, each with its continuation lines; `make` has a test of its own."""
    found: list[str] = []
    blocks = re.findall(r"^```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    for line in "".join(blocks).splitlines():
        if found and _open(found[-1]):
            found[-1] += "\n" + line
        elif line.strip():
            found.append(line)
    return [command for command in found if not command.startswith("make ")]


def _open(command: str) -> bool:
    """Whether the command goes on in the next line."""
    return command.endswith("\\") or command.count("'") % 2 == 1


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in in_environment(tmp_path_factory.mktemp("data")).items():
            patch.setenv(name, value)
        yield from _served()


def _served() -> Iterator[str]:
    with demo.server("--preload", str(demo.ADAPTERS)) as running:
        running.wait_ready()
        yield running.url


@pytest.fixture(scope="module")
def env(url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The README's port is the server's: curl is told in its own configuration, the command line by its variable."""
    home = tmp_path_factory.mktemp("home")
    port = url.rpartition(":")[2]
    (home / ".curlrc").write_text(f'connect-to = "127.0.0.1:8000:127.0.0.1:{port}"\nfail-with-body\n')
    return os.environ | {"CURL_HOME": str(home), "ONEBASE_URL": url, "COLUMNS": "200"}


def run(command: str, env: dict[str, str]) -> str:
    if not (ROOT / ONEBASE).exists():  # the tests run in another environment than `make` makes
        command = command.replace(ONEBASE, f"{sys.executable} -m server.cli")
    result = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


def test_every_command_works_in_the_readmes_order(env: dict[str, str]) -> None:
    outputs = {command: run(command, env) for command in commands(REST)}
    assert len([command for command in outputs if command.startswith("curl")]) >= 3
    assert len([command for command in outputs if command.startswith(ONEBASE)]) >= 5
    assert all(command.startswith(("curl", ONEBASE)) for command in outputs), "say here how to test that command"
    chat, stream, upload = (output for command, output in outputs.items() if command.startswith("curl"))
    answer = json.loads(chat)
    assert answer["adapter"]["name"] == "plain-english"
    assert answer["choices"][0]["text"].startswith("Please")
    events = [line.removeprefix("data: ") for line in stream.splitlines() if line]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == "billing"
    assert json.loads(upload)["name"] == "my-adapter"
    listed = next(output for command, output in outputs.items() if command.endswith("adapters list"))
    assert all(question.adapter in listed for question in demo.questions())


def test_the_tenants_commands_work_on_a_server_with_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in in_environment(tmp_path).items():
        monkeypatch.setenv(name, value)  # a database has one server
    with demo.server("--auth", "on") as running:
        running.wait_ready()
        with demo.admin_of(running) as admin:
            env = os.environ | {"ONEBASE_URL": running.url, "COLUMNS": "200"}
            env["ONEBASE_KEY"] = admin.headers["authorization"].removeprefix("Bearer ")
            _, made, usage, invoice = (run(command, env) for command in commands(TENANTS))
        with demo.client(running.url, made.strip()) as acme:
            assert demo.call(acme, "GET", "/v1/usage") == {"data": [], "next": None}
        assert "cost_microusd" in usage
        assert "acme, 20" in invoice
