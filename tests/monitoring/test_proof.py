"""Every query of every dashboard and both sides of every alert against a real Prometheus that scrapes a real server."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.monitoring import expressions
from tests.monitoring.expressions import Expression
from tests.monitoring.traffic import Fleet
from tests.serving import Server, until

SECONDS = 12.0  # of traffic, a scrape a second
INTERVAL = "15s"  # of rates: all of the traffic
# What is empty in this traffic, and why.
EMPTY: dict[str, str] = {}


class Prometheus:
    """Debian's, with the configuration that is shipped but for the address, the pace and the key."""

    def __init__(self, folder: Path, server: Server, key: str):
        config = yaml.safe_load((expressions.ROOT / "ops" / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(expressions.ALERTS)]
        (job,) = config["scrape_configs"]
        job["static_configs"][0]["targets"] = [server.url.removeprefix("http://")]
        (folder / "onebase.key").write_text(key)
        job["authorization"] = {"credentials_file": str(folder / "onebase.key")}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._folder = folder

    @contextlib.contextmanager
    def running(self, port: int) -> Iterator[Prometheus]:
        """From its first scrape."""
        words = ["--config.file", "prometheus.yml", "--storage.tsdb.path", "data"]
        words += ["--web.listen-address", f"127.0.0.1:{port}", "--query.lookback-delta", "30s", "--log.level", "warn"]
        with (
            subprocess.Popen(["prometheus", *words], cwd=self._folder, stderr=subprocess.DEVNULL) as process,
            httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=30) as self.http,
        ):
            try:
                until(lambda: self._ask('up{job="onebase"} == 1'), 30)
                yield self
            finally:
                process.terminate()
                process.wait(20)

    def _ask(self, query: str) -> list[Any]:
        with contextlib.suppress(httpx.TransportError):
            return self.ask(query)
        return []

    def ask(self, query: str, at: float | None = None) -> list[Any]:
        """The series that a query returns, now or at some time."""
        response = self.http.get("/query", params={"query": query} | ({"time": at} if at else {}))
        if response.status_code == 503:  # it is starting
            return []
        body = response.json()
        assert body["status"] == "success", (query, body)
        return list(body["data"]["result"])


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, float]]:
    """A Prometheus that has seen the traffic, and when that ended."""
    if shutil.which("prometheus") is None and "CI" not in os.environ:
        pytest.skip("prometheus is not installed (Debian: apt install prometheus)")
    folder = tmp_path_factory.mktemp("monitoring")
    fleet = Fleet(folder)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(fleet.serving())
        prometheus = stack.enter_context(Prometheus(folder, server, fleet.metrics_key).running(_free_port()))
        time.sleep(2)  # counters begin at what they are at the first scrape
        fleet.drive(SECONDS)
        time.sleep(2)  # the last scrape, and the rules after it
        yield prometheus, time.time()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def shown(prometheus: Prometheus, expression: Expression, at: float) -> bool:
    """Whether it returns a number; what is computed of nothing is none."""
    return any(series["value"][1] != "NaN" for series in prometheus.ask(expression.text, at))


QUERIES = list(expressions.of_dashboards(INTERVAL))
SIDES = list(expressions.of_alerts())


@pytest.mark.parametrize("expression", QUERIES, ids=lambda one: one.place)
def test_every_panel_shows_something(watched: tuple[Prometheus, float], expression: Expression) -> None:
    assert shown(watched[0], expression, watched[1]) != (expression.place in EMPTY), expression.text


@pytest.mark.parametrize("expression", SIDES, ids=lambda one: one.place)
def test_every_alert_compares_something(watched: tuple[Prometheus, float], expression: Expression) -> None:
    assert shown(watched[0], expression, watched[1]) != (expression.place in EMPTY), expression.text


def test_the_variables_have_values(watched: tuple[Prometheus, float]) -> None:
    """What Grafana's label_values asks for."""
    for label, metric in (("instance", "onebase_build_info"), ("tenant", "onebase_adapter_requests_total")):
        values = watched[0].http.get(f"/label/{label}/values", params={"match[]": metric}).json()["data"]
        assert values, label
    assert {"acme", "busy"} <= set(values)


def test_every_metric_that_is_read_is_one_that_the_server_has(watched: tuple[Prometheus, float]) -> None:
    known = set(watched[0].http.get("/label/__name__/values").json()["data"])
    read = {name for expression in (*QUERIES, *SIDES) for name in expressions.metrics(expression.text)}
    assert read <= known
