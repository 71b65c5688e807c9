"""What a server process writes to stderr, from its start to its end."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.serving import chat_base, until

ROOT = Path(__file__).resolve().parents[2]
PASSWORD, TOKEN = "sesame-of-the-database", "sekret-events-token"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return chat_base(tmp_path_factory.mktemp("bases") / "tiny")


def started(base, folder, *flags) -> tuple[subprocess.Popen, Path]:
    command = [sys.executable, "-m", "server.cli", "serve", "--base", str(base), "--port", "0", "--device", "cpu"]
    command += ["--data-dir", str(folder / "data"), "--kv-cache-tokens", "2048", "--no-kernels", *flags]
    environment = os.environ | {"ONEBASE_EVENTS_TOKEN": TOKEN, "ONEBASE_EVENTS_URL": "http://127.0.0.1:1/"}
    log = folder / "stderr"
    with log.open("w") as out:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=out), log


def test_every_line_is_json(base, tmp_path):
    process, log = started(base, tmp_path)
    try:
        found = until(lambda: re.search(r"running on (http://\S+)", log.read_text()) or process.poll(), 120)
        assert process.poll() is None, log.read_text()
        answer = httpx.post(f"{found[1]}/v1/generate", json={"prompt": "hello", "max_tokens": 2}, timeout=60)
        assert answer.status_code == 200
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    said = log.read_text()
    key = re.search(r"\nThe admin key.*\n(ob_\S+)\n\n", said)
    assert key, "shown once, as no log line"
    lines = [json.loads(line) for line in said.replace(key[0], "").splitlines()]
    assert {"onebase.run", "uvicorn.error", "onebase.request"} <= {line["logger"] for line in lines}
    assert [line["id"] for line in lines if line["event"] == "request"] == [answer.json()["id"]]
    assert TOKEN not in said


def test_a_database_that_cannot_be_reached_is_said_without_its_password(base, tmp_path):
    url = f"postgresql://onebase:{PASSWORD}@127.0.0.1:1/onebase"
    process, log = started(base, tmp_path, "--database-url", url, "--log-level", "debug")
    assert process.wait(120) != 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line for line in lines if line["level"] == "error"]
    assert PASSWORD not in log.read_text()
    assert TOKEN not in log.read_text()
