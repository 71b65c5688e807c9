"""`python -m loadtest` and `onebase bench` against a real, small server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from loadtest import commands
from loadtest.__main__ import app
from server.cli import app as onebase
from tests.families import save_model
from tests.serving import Server, until

ROOT = Path(__file__).resolve().parents[2]
WORKLOAD: dict[str, Any] = {
    "about": "A test",
    "adapters": 4,
    "ranks": [4, 8],
    "popularity": {"kind": "distinct"},
    "arrivals": {"kind": "closed", "streams": 3},
    "prompt_tokens": {"kind": "uniform", "low": 4, "high": 12},
    "output_tokens": {"kind": "fixed", "tokens": 5},
    "token_ids": [4, 300],
    "requests": 12,
    "slo": {"ttft_ms": 60000, "gap_ms": 60000},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("loadtest") / "base")


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(base, tmp_path_factory.mktemp("data"), adapter_slots=2) as server:
        yield server


def workload(folder: Path, **more: Any) -> str:
    path = folder / "workload.json"
    path.write_text(json.dumps({**WORKLOAD, **more}))
    return str(path)


def command(program: Any, *words: object) -> Result:
    return CliRunner().invoke(program, [str(word) for word in words], env={"COLUMNS": "200", "TERM": "dumb"})


def test_a_server_that_wants_a_key(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Server(base, tmp_path / "data", auth="on") as server:
        key = capsys.readouterr().err.split()[-1]
        run = ("run", "--url", server.url, "--workload", workload(tmp_path, requests=4), "--prepare", "--base", base)
        for wrong in ((), ("--key", key[:-1]), ("--key", "ob_ä")):
            result = command(app, *run, *wrong)
            assert result.exit_code in (1, 2), result.output
            assert "key" in result.stderr
            assert "Traceback" not in result.stderr
        result = command(app, *run, "--json", "-", "--key", key)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["requests"]["finished"] == 4
        env = {**os.environ, "ONEBASE_KEY": key, "ONEBASE_URL": server.url}
        words = [sys.executable, "-m", "server.cli", "bench", *run[3:5], "--json", "-"]
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
        assert json.loads(done.stdout)["requests"]["finished"] == 4, done.stderr


@pytest.mark.parametrize("words", [["--key", "ob_secret"], ["--key=ob_secret"], ["--key", "ob_a\nsecret"]])
def test_a_report_does_not_show_the_key(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/onebase", "bench", *words, "--workload", "smoke"])
    assert "secret" not in commands._command()
    assert commands._command().startswith("onebase bench --key")
    assert commands._command().endswith("--workload smoke")


def test_a_whole_run_with_adapters_baseline_report_and_picture(server: Server, base: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("out.json", "out.md", "out.png")]
    options = (
        "--prepare",
        "--base",
        base,
        "--baseline",
        "--json",
        files[0],
        "--markdown",
        files[1],
        "--plot",
        files[2],
    )
    result = command(app, "run", "--url", server.url, "--workload", workload(tmp_path), *options)
    assert result.exit_code == 0, result.output
    report = json.loads(files[0].read_text())
    assert report["api"] == "onebase"
    assert report["requests"] == {"planned": 12, "sent": 12, "finished": 12, "failed": 0, "reasons": {}}
    assert report["output_tokens"] == 60
    assert report["ttft_ms"]["p50"] <= report["e2e_ms"]["p50"]
    assert report["goodput"]["share"] == 1
    assert report["cold"]["requests"] >= 4  # each of four adapters at least once, into two slots
    tiers = report["tiers"]
    assert tiers["device"] + tiers["ram"] + tiers["disk"] == pytest.approx(1)
    assert tiers["disk"] >= 4 / 12
    assert report["baseline"]["requests"]["finished"] == 12
    assert report["baseline"]["fairness"]["adapters"] is None
    assert report["baseline"]["ratios"]["tokens_per_s"] > 0
    assert files[1].read_text().startswith("# A test\n")
    assert files[1].read_text() in result.stdout
    assert files[2].read_bytes().startswith(b"\x89PNG")
    names = [row["name"] for row in server.http.get("/adapters").json()["data"]]
    assert names == [
        "lt-attention-r4-00000",
        "lt-attention-r4-00002",
        "lt-attention-r8-00001",
        "lt-attention-r8-00003",
    ]


def test_adapters_that_are_there_are_not_sent_again(server: Server, base: Path, tmp_path: Path) -> None:
    file = workload(tmp_path, ranks=[2], adapters=3)
    first = command(app, "prepare", "--url", server.url, "--workload", file, "--base", base)
    assert first.stdout == "3 adapters uploaded\n", first.output
    assert command(app, "prepare", "--url", server.url, "--workload", file, "--base", base).stdout.startswith("0 ")
    server.idle()


def test_onebase_bench_is_the_same_with_an_open_loop(server: Server, tmp_path: Path) -> None:
    file = workload(tmp_path, adapters=0, arrivals={"kind": "gamma", "rate": 100, "cv": 4})
    result = command(onebase, "bench", "--url", server.url, "--workload", file, "--json", "-", "--requests", 5)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["requests"]["finished"] == 5
    assert report["lag_ms"]["p50"] >= 0
    assert report["tiers"] == {"device": None, "ram": None, "disk": None, "device_loads": 0}


def test_unknown_adapters_are_counted_and_nothing_finished_is_a_failure(server: Server, tmp_path: Path) -> None:
    options = ("--names", "w,x,y,z", "--json", tmp_path / "out.json")
    result = command(app, "run", "--url", server.url, "--workload", workload(tmp_path), *options)
    assert result.exit_code == 1
    reasons = json.loads((tmp_path / "out.json").read_text())["requests"]["reasons"]
    assert reasons == {"404 adapter_not_found": 12}


@pytest.mark.parametrize(
    ("options", "status", "word"),
    [
        (("--workload", "no-such"), 2, "no workload 'no-such'"),
        (("--names", "a"), 2, "--names has 1 names, the workload 4 adapters"),
        (("--requests", "0"), 2, "requests"),
        (("--url", "http://127.0.0.1:9"), 1, "no answer from http://127.0.0.1:9"),
        (("--url", "not-a-url"), 2, "not the address of a server"),
        (("--url", "http://[::1"), 2, "--url"),
        (("--plot", "picture.xyz"), 2, "ends in .png"),
        (("--json", "."), 2, "it is a directory"),
        (("--api", "openai", "--prepare"), 2, "uploaded to onebase only"),
    ],
)
def test_what_a_user_gets_wrong_is_said(
    server: Server, tmp_path: Path, options: tuple[str, ...], status: int, word: str
) -> None:
    result = command(app, "run", "--url", server.url, "--workload", workload(tmp_path), *options)
    assert result.exit_code == status
    assert word in result.output
    assert "Traceback" not in result.output


def test_a_base_that_does_not_fit_is_said(server: Server, tmp_path: Path) -> None:
    file = workload(tmp_path, ranks=[3])
    result = command(app, "prepare", "--url", server.url, "--workload", file, "--base", ROOT / "docs")
    assert result.exit_code == 2
    assert "no safetensors file of docs has a q_proj" in result.output


def test_ctrl_c_writes_the_report_of_what_was_done(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    file = workload(tmp_path, adapters=0, requests=100_000, output_tokens={"kind": "fixed", "tokens": 100})
    words = ["run", "--url", server.url, "--workload", file, "--json", str(out)]
    before = server.engine.stats.steps
    process = subprocess.Popen(
        [sys.executable, "-m", "loadtest", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    until(lambda: server.engine.stats.steps > before + 150)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors == ""  # no progress bar: this is no terminal
    report = json.loads(out.read_text())
    assert report["interrupted"]
    assert report["requests"]["finished"] > 0
    assert report["requests"]["reasons"] == {"cut off": 3}
    server.idle()
