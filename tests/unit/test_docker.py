"""Dockerfile and docker-compose.yml, as far as they can be checked without an engine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
KNOWN = {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK",
         "ENTRYPOINT", "CMD"}  # fmt: skip
VARIABLES = {f"ONEBASE_{name.upper()}" for name in Settings.model_fields}


@dataclass(frozen=True)
class Instruction:
    """One instruction: `flags` are its --name=value, `rest` is what follows them. `stage` counts from 0."""

    word: str
    flags: dict[str, str]
    rest: str
    stage: int


def parse(text: str) -> list[Instruction]:
    """A Dockerfile without here-documents."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    found: list[Instruction] = []
    for line in joined.splitlines():
        word, _, rest = line.strip().partition(" ")
        assert word in KNOWN, f"not an instruction: {line}"
        assert rest.strip(), f"{word} without an argument"
        flags = {}
        while match := re.match(r"\s*--([a-z-]+)=(\S+)\s+", rest):
            flags[match[1]] = match[2]
            rest = rest[match.end() :]
        stage = sum(one.word == "FROM" for one in found) - (word != "FROM")
        found.append(Instruction(word, flags, " ".join(rest.split()), stage))
    return found


DOCKERFILE = parse((ROOT / "Dockerfile").read_text())
LAST = max(one.stage for one in DOCKERFILE)
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICE: dict[str, Any] = COMPOSE["services"]["onebase"]
# As compose reads it where none of the variables is set.
SET = {name: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value) for name, value in SERVICE["environment"].items()}


def final(word: str) -> list[Instruction]:
    """The instructions of the image itself."""
    return [one for one in DOCKERFILE if one.word == word and one.stage == LAST]


def environment() -> dict[str, str]:
    """ENV of the image."""
    return dict(pair.split("=", 1) for one in final("ENV") for pair in one.rest.split())


def health_port(command: str) -> int:
    found = re.search(r"http://127\.0\.0\.1:(\d+)/readyz", command)
    assert found, f"{command} does not ask /readyz"
    return int(found[1])


def pip_commands(text: str) -> list[str]:
    """What is installed, in order, without options that do not choose packages."""
    found = re.findall(r"-m pip install ([^\n]+)", text.replace("\\\n", " "))
    words = [[w for w in line.replace("'", "").split() if w not in ("--quiet", "--disable-pip-version-check")]
             for line in found]  # fmt: skip
    return [" ".join(line) for line in words]


def test_the_parser_sees_the_stages() -> None:
    assert [one.rest.endswith("AS build") for one in DOCKERFILE if one.word == "FROM"] == [True, False]
    with pytest.raises(AssertionError):
        parse("FROM x\nRUNN y")


def test_base_image_has_a_python_that_the_project_takes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    default = next(one.rest for one in DOCKERFILE if one.rest.startswith("PYTHON_VERSION="))
    assert f">={default.partition('=')[2]}" == project["requires-python"]
    assert all("${PYTHON_VERSION}" in one.rest for one in DOCKERFILE if one.word == "FROM")


def test_every_copied_source_is_in_the_repository_and_in_the_context() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] not in "#!"]
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for one in DOCKERFILE:
        if one.word != "COPY" or "from" in one.flags:
            continue
        *sources, _ = one.rest.split()
        for source in sources:
            assert (ROOT / source).exists(), f"COPY {source}"
            assert source in kept, f".dockerignore leaves {source} out"
            inside = [path for path in [ROOT / source, *(ROOT / source).rglob("*")] if "__pycache__" not in path.parts]
            hidden = [p for p in inside for i in ignored if i != "*" and fnmatch(str(p.relative_to(ROOT)), i)]
            assert not hidden


def test_copies_from_a_stage_name_one_that_is_there() -> None:
    stages = [one.rest.rpartition(" AS ")[2] for one in DOCKERFILE if one.word == "FROM" and " AS " in one.rest]
    for one in DOCKERFILE:
        if "from" in one.flags:
            assert one.flags["from"] in stages
            assert one.stage > stages.index(one.flags["from"])


def test_what_the_build_needs_is_copied_before_it_is_installed() -> None:
    """pyproject.toml names these files, and setuptools reads them."""
    steps = [one for one in DOCKERFILE if one.stage == 0]
    install = next(at for at, one in enumerate(steps) if one.rest.endswith("pip install ."))
    copied = " ".join(one.rest for one in steps[:install] if one.word == "COPY").split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"pyproject.toml", project["readme"], *project["license-files"], "server", "adapters", "loadtest"} <= set(
        copied
    )


def test_pip_installs_what_the_makefile_does_in_its_order() -> None:
    image = [re.sub(r'--index-url "\$\{TORCH_INDEX\}" ', "", one) for one in
             pip_commands("\n".join(one.rest for one in DOCKERFILE if one.word == "RUN"))]  # fmt: skip
    make = pip_commands((ROOT / "Makefile").read_text())
    assert image == [{"-e .[dev]": "."}.get(one, one) for one in make]
    assert image[0].startswith("torch==")


def test_torch_comes_from_an_index_that_an_argument_chooses() -> None:
    assert any(one.word == "ARG" and one.rest.startswith("TORCH_INDEX=https://") for one in DOCKERFILE)
    torch = next(one for one in DOCKERFILE if one.word == "RUN" and " torch==" in one.rest)
    assert '--index-url "${TORCH_INDEX}"' in torch.rest


def test_the_image_runs_as_somebody_without_rights() -> None:
    (user,) = final("USER")
    uid, _, gid = user.rest.partition(":")
    assert int(uid) >= 1000
    assert int(gid) >= 1000
    assert any(f"--uid {uid}" in one.rest for one in final("RUN"))
    words = [one.word for one in DOCKERFILE if one.stage == LAST]
    assert not {"RUN", "COPY"} & set(words[words.index("USER") :]), "what comes after USER is not root's"


def test_the_data_directory_is_a_volume_of_that_user() -> None:
    data = environment()["ONEBASE_DATA_DIR"]
    (volume,) = final("VOLUME")
    assert json.loads(volume.rest) == [data]
    assert any(f"install -d -m 700 -o onebase -g onebase {data}" in one.rest for one in final("RUN"))


def test_preloaded_adapters_are_in_the_image() -> None:
    target = environment()["ONEBASE_PRELOAD"]
    assert any(one.rest == f"adapters {target}" for one in final("COPY"))


def test_port_and_health_check_agree() -> None:
    port = int(environment()["ONEBASE_PORT"])
    (expose,) = final("EXPOSE")
    (health,) = final("HEALTHCHECK")
    assert int(expose.rest) == port == health_port(health.rest)
    assert {"interval", "timeout", "start-period", "retries"} <= set(health.flags)
    command = json.loads(health.rest.removeprefix("CMD "))
    compile(command[-1], "healthcheck", "exec")
    assert command[:2] == ["python", "-c"]


def test_environment_names_are_settings() -> None:
    assert {name for name in environment() if name.startswith("ONEBASE_")} <= VARIABLES


def _config(extra: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What the image's command says to --print-config in the image's environment."""
    entry = json.loads(final("ENTRYPOINT")[0].rest) + json.loads(final("CMD")[0].rest)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts[entry[0]] == "server.cli:app"
    ours = {name: value for name, value in environment().items() if name.startswith("ONEBASE_")}
    command = [sys.executable, "-m", "server.cli", *entry[1:], "--print-config"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("ONEBASE_")} | ours | extra
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


def test_the_image_alone_refuses_to_be_open() -> None:
    assert "ONEBASE_INSECURE" not in environment()
    result = _config({})
    assert result.returncode == 2
    assert "AUTH=off" in result.stderr


def test_with_compose_it_starts() -> None:
    result = _config(SET)
    assert result.returncode == 0, result.stderr
    config = json.loads(result.stdout)
    assert (config["host"], config["port"], config["data_dir"]) == ("0.0.0.0", 8000, "/var/lib/onebase")
    assert config["drain_seconds"] < float(SERVICE["stop_grace_period"].removesuffix("s"))


def test_compose_names_what_is_there() -> None:
    assert set(SERVICE["environment"]) <= VARIABLES
    assert all(isinstance(value, str) for value in SERVICE["environment"].values()), "YAML would make true of it"
    arguments = {one.rest.partition("=")[0] for one in DOCKERFILE if one.word == "ARG"}
    assert set(SERVICE["build"]["args"]) <= arguments
    assert (ROOT / SERVICE["build"]["context"] / "Dockerfile").exists()
    (volume,) = SERVICE["volumes"]
    name, _, target = volume.partition(":")
    assert name in COMPOSE["volumes"]
    assert target == environment()["ONEBASE_DATA_DIR"]
    assert health_port(" ".join(SERVICE["healthcheck"]["test"])) == 8000


def test_an_open_server_is_published_on_loopback_only() -> None:
    assert SERVICE["environment"]["ONEBASE_INSECURE"] == "true"
    assert SERVICE["ports"] == [f"127.0.0.1:8000:{environment()['ONEBASE_PORT']}"]
    assert "network_mode" not in SERVICE
    comment = (ROOT / "docker-compose.yml").read_text().partition("services:")[0]
    assert "ONEBASE_INSECURE" in comment
    assert "loopback" in comment
