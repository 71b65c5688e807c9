"""The alerts: valid, each proved by promtool where it fires and where it does not, each with its paragraph."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest
import yaml

from tests.monitoring import expressions

OPS = expressions.ROOT / "ops"
PROVED = yaml.safe_load((OPS / "alerts_test.yml").read_text())
ALERTS = [rule for rule in expressions.rules() if "alert" in rule]


def promtool(*words: str) -> str:
    """What it says; without Prometheus the test is skipped, on CI it fails."""
    if shutil.which("promtool") is None and "CI" not in os.environ:
        pytest.skip("promtool is not installed (Debian: apt install prometheus)")
    ran = subprocess.run(["promtool", *words], cwd=OPS, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_the_rules_are_valid() -> None:
    assert f"{len(expressions.rules())} rules found" in promtool("check", "rules", "alerts.yml")


def test_prometheus_takes_its_configuration() -> None:
    assert "SUCCESS" in promtool("check", "config", "prometheus.yml")


def test_every_alert_fires_where_it_should_and_only_there() -> None:
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yml")


def test_every_alert_is_proved_to_fire_and_to_keep_quiet() -> None:
    samples = [case["exp_samples"] for one in PROVED["tests"] for case in one["promql_expr_test"]]
    fired = {re.findall(r'alertname="(\w+)"', sample["labels"])[0] for some in samples for sample in some}
    assert fired == {rule["alert"] for rule in ALERTS}
    assert sum(not some for some in samples) >= len({rule["alert"].removesuffix("Slow") for rule in ALERTS}) - 3


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_says_what_to_do(rule: dict[str, dict[str, str]]) -> None:
    page, anchor = rule["annotations"]["runbook"].split("#")
    text = (expressions.ROOT / page).read_text(encoding="utf-8")
    headings = [
        re.sub(r"[^\w -]", "", line.lstrip("#").strip().lower()) for line in text.splitlines() if line[:1] == "#"
    ]
    assert anchor in headings
    assert rule["labels"]["severity"] in ("page", "ticket")
