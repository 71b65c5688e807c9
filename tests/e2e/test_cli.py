"""The `onebase` command, against a running server."""

import asyncio
import json
import socket
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.settings import Settings
from server.tenants.claim import claimed
from tests.families import save_adapter
from tests.serving import Server, chat_base

INFO = {"name", "version", "digest", "rank", "alpha", "targets", "parameters", "bytes", "kind", "base", "created"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return chat_base(tmp_path_factory.mktemp("bases") / "tiny-llama")


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [
        save_adapter(base, folder / f"a{seed}", seed=seed, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        for seed in (1, 2)
    ]


@pytest.fixture(scope="module")
def server(base, tmp_path_factory):
    with Server(base, tmp_path_factory.mktemp("data")) as server:
        yield server


def run(*words, env=None):
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200", "TERM": "dumb", **(env or {})})


@pytest.fixture
def call(server):
    """Runs `onebase adapters …` on the server; with `--json` in it, returns what was printed."""

    def adapters(*words):
        result = run("adapters", *words, "--url", server.url)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout) if "--json" in words else result.stdout

    return adapters


def test_push_list_show_rollback_rm_as_json(server, call, folders):
    (one,) = call("push", "cli", folders[0], "--json")
    (two,) = call("push", "cli", folders[1], "--json", "--if-match", one["digest"])
    assert set(one) == INFO
    assert (one["version"], two["version"]) == (1, 2)
    assert [row["name"] for row in call("list", "--json")] == ["cli"]
    assert call("show", "cli", "--json")["digest"] == two["digest"]
    assert [row["version"] for row in call("show", "cli", "--versions", "--json")] == [1, 2]
    (back,) = call("rollback", "cli", 1, "--json")
    assert back["digest"] == one["digest"]
    assert call("rm", "cli", "--json") == {"deleted": "cli"}
    assert call("list", "--json") == []
    assert server.http.get("/adapters/cli").status_code == 404


def test_tables_for_people(call, folders):
    assert "email" in call("push", "email", folders[0])
    for words in (("list",), ("show", "email"), ("show", "email", "--versions"), ("rollback", "email", 1)):
        assert "sha256:" in call(*words)
    assert call("rm", "email") == ""


def test_the_list_goes_over_all_pages(server, call, folders, monkeypatch):
    for at in range(5):
        assert server.put(f"page-{at}", folders[0]).status_code == 201
    monkeypatch.setattr("server.commands.client.PAGE", 2)
    assert [row["name"] for row in call("list", "--json")] == [f"page-{at}" for at in range(5)]


def test_a_refusal_is_told_and_exits_1(server, folders, tmp_path):
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / file).write_bytes((folders[0] / file).read_bytes())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x80\x04pickle")
    refusals = [
        (("show", "nobody"), "404"),
        (("rm", "nobody"), "404"),
        (("rollback", "nobody", "1"), "404"),
        (("push", "bad", tmp_path), "422"),
        (("push", "BAD", folders[0]), "422"),
        (("rm", "bad/versions"), "405"),
        (("show", "[red]"), "422"),
        (("push", "bad", folders[0], "--if-match", "sha256:x"), "412"),
    ]
    for words, status in refusals:
        result = run("adapters", *words, "--url", server.url)
        assert result.exit_code == 1
        assert status in result.stderr
        assert result.stdout == ""
        assert "Traceback" not in result.output


def test_push_without_the_files_exits_2(tmp_path):
    result = run("adapters", "push", "x", tmp_path)
    assert result.exit_code == 2
    assert "adapter_config.json" in result.stderr


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "not a url", "ftp://x", "http://[/x", "http://a b"])
def test_a_server_that_does_not_answer_exits_1(url, folders):
    for words in (("list",), ("show", "a"), ("push", "a", folders[0])):
        result = run("adapters", *words, "--url", url)
        assert result.exit_code == 1
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert url in result.stderr


def test_the_server_may_come_from_the_environment(server):
    assert run("adapters", "list", "--json", env={"ONEBASE_URL": server.url}).exit_code == 0


def test_an_answer_that_is_no_onebase_is_told(server):
    result = run("adapters", "list", "--url", f"{server.url}/nothing")
    assert (result.exit_code, "404" in result.stderr) == (1, True)
    result = run("adapters", "list", "--url", f"{server.url}/metrics?x=")
    assert result.exit_code == 1
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_print_config_shows_the_effective_values(tmp_path):
    env = {"ONEBASE_MAX_RANK": "16", "ONEBASE_PORT": "9001", "ONEBASE_ADAPTER_SOURCES": "hf://a/, s3://b/"}
    result = run("serve", "--print-config", "--port", 9002, "--data-dir", tmp_path, "--no-prefix-cache", env=env)
    assert result.exit_code == 0
    shown = json.loads(result.stdout)
    assert set(shown) == set(Settings.model_fields)
    assert (shown["max_rank"], shown["port"], shown["data_dir"]) == (16, 9002, str(tmp_path))
    assert shown["prefix_cache"] is False
    assert shown["adapter_sources"] == ["hf://a/", "s3://b/"]


def test_every_setting_has_a_flag():
    shown = run("serve", "--help").stdout
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in shown


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (("--dtype", "int8"), "dtype"),
        (("--max-rank", "0"), "max_rank"),
        (("--max-rank", "many"), "max-rank"),
        (("--port", "70000"), "port"),
        (("--drain-seconds", "nan"), "drain_seconds"),
        (("--host", "0.0.0.0"), "--insecure"),
        (("--auth", "maybe"), "auth"),
        (("--unknown", "1"), "--unknown"),
    ],
)
def test_a_bad_setting_exits_2_and_is_named(flags, names):
    result = run("serve", "--print-config", *flags)
    assert result.exit_code == 2
    assert names in result.output
    assert "Traceback" not in result.output


def test_a_bad_variable_exits_2_and_is_named():
    result = run("serve", "--print-config", env={"ONEBASE_MAX_RANK": "many"})
    assert result.exit_code == 2
    assert "max_rank" in result.output


def test_a_start_that_cannot_be_exits_1_and_says_why(base, tmp_path, caplog):
    file = tmp_path / "file"
    file.touch()
    for flags in (("--base", tmp_path / "nothing"), ("--base", base, "--data-dir", file / "below")):
        caplog.clear()
        result = run("serve", "--data-dir", tmp_path, "--port", 0, *flags)
        assert result.exit_code == 1
        assert isinstance(result.exception, SystemExit)
        assert str(flags[-1]) in caplog.text


def test_a_taken_port_is_told_before_anything_is_loaded(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run("serve", "--port", port, "--data-dir", tmp_path / "data")
    assert result.exit_code == 1
    assert not (tmp_path / "data").exists()


def test_a_database_of_another_server_is_told_before_anything_is_loaded(tmp_path):
    url = f"sqlite:///{tmp_path / 'shared.db'}"

    async def second():
        async with claimed(url):
            command = [sys.executable, "-m", "server.cli", "serve", "--database-url", url, "--base", "nothing"]
            command += ["--port", "0", "--data-dir", str(tmp_path / "data")]
            return await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=120)

    done = asyncio.run(second())
    assert done.returncode == 1
    assert f"another onebase server uses the database {url}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_list_that_is_piped_has_whole_names_and_digests(server, folders):
    name = "n" * 64
    server.put(name, folders[0])
    result = run("adapters", "list", "--url", server.url, env={"COLUMNS": "80"})
    digest = server.http.get(f"/adapters/{name}").json()["digest"]
    [line] = [line for line in result.stdout.splitlines() if name in line]
    assert digest in line
