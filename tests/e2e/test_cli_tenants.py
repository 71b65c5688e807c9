"""`onebase tenants`, `onebase usage`, `onebase invoice`, against a running server with AUTH on."""

import json
import os
from types import SimpleNamespace

import httpx
import pytest
from typer.testing import CliRunner

from server.cli import app
from server.commands import prices
from server.commands.prices import leaps
from server.datadir import own
from tests.databases import in_environment
from tests.families import save_adapter
from tests.serving import Server, chat_base


def run(*words, env=None):
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200", "TERM": "dumb", **(env or {})})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return chat_base(tmp_path_factory.mktemp("bases") / "tiny-llama")


class Cli:
    """The command line as somebody with a key uses it."""

    def __init__(self, server: Server, token: str):
        self.server, self.token = server, token
        self.env = {"ONEBASE_URL": server.url, "ONEBASE_KEY": token}

    def __call__(self, *words, **env):
        result = run(*words, env=self.env | env)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout) if "--json" in words else result.stdout


@pytest.fixture(scope="module")
def admin(base, tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    env = in_environment(data)
    (first,) = run("tenants", "admin-key", "--data-dir", data, env=env).stdout.split()
    token = json.loads(run("tenants", "admin-key", "--data-dir", data, "--json", env=env).stdout)["token"]
    assert first != token, "both are valid"
    with Server(base, data, auth="on") as server:
        assert Cli(server, first)("tenants", "list", "--json")[0]["id"] == "default"
        yield Cli(server, token)


@pytest.fixture(scope="module")
def acme(admin):
    """A tenant's own key."""
    admin("tenants", "create", "acme", "--rpm-limit", 600, "--price-prompt", 10**6, "--json")
    scopes = [word for scope in ("generate", "adapters:write", "usage:read") for word in ("--scope", scope)]
    return Cli(admin.server, admin("tenants", "keys", "create", "acme", *scopes).strip())


def generate(cli: Cli, adapter=None):
    body = {"prompt": "hello", "max_tokens": 4, "adapter": adapter}
    headers = {"authorization": f"Bearer {cli.token}"}
    response = httpx.post(f"{cli.server.url}/v1/generate", json=body, headers=headers, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()["usage"]["cost_microusd"]


def test_tenants_are_made_changed_and_disabled(admin):
    made = admin("tenants", "create", "beta", "--max-budget", 500, "--budget-duration", "30d", "--json")
    assert (made["limits"]["max_budget"], made["budget_left"]) == (500, 500)
    changed = admin(
        *("tenants", "update", "beta", "--max-budget", "none", "--weight", "0.5", "--classes", "batch"),
        *("--price-rank-classes", "16:1000,64:1500", "--allowed-adapters", "a,b", "--customer", "cus_7", "--json"),
    )
    assert (changed["limits"]["max_budget"], changed["limits"]["budget_duration"]) == (None, "30d")
    assert (changed["weight"], changed["classes"], changed["customer"]) == (0.5, ["batch"], "cus_7")
    assert changed["prices"] == {"rank_classes": [[16, 1000], [64, 1500]]}
    assert changed["limits"]["allowed_adapters"] == ["a", "b"]
    assert admin("tenants", "show", "beta", "--json") == changed
    assert admin("tenants", "disable", "beta", "--json")["disabled"] is True
    assert admin("tenants", "update", "beta", "--enable", "--json")["disabled"] is False
    assert "beta" in admin("tenants", "list")
    assert "cus_7" in admin("tenants", "show", "beta")


def test_keys_are_made_listed_and_revoked(admin):
    admin("tenants", "create", "gamma", "--json")
    made = admin("tenants", "keys", "create", "gamma", "--name", "ci", "--expires", "2100-01-01", "--json")
    assert made["scopes"] == ["generate"]
    own = Cli(admin.server, made["token"])
    assert own("adapters", "list", "--json") == []
    (listed,) = admin("tenants", "keys", "list", "gamma", "--json")
    assert listed == {name: value for name, value in made.items() if name != "token"}
    table = admin("tenants", "keys", "list", "gamma")
    assert "ci" in table
    assert "2100-01-01 00:00:00Z" in table, "a time that people read"
    assert admin("tenants", "keys", "revoke", "gamma", made["id"], "--json") == {"revoked": made["id"]}
    assert "401" in run("adapters", "list", env=own.env).stderr
    for odd in (made["token"] + "\n", "ob_\u00fc"):
        said = run("adapters", "list", env=own.env | {"ONEBASE_KEY": odd}).stderr
        assert "no key has" in said
        assert odd.strip() not in said


def test_the_price_book_is_shown_and_changed(admin, acme):
    before = admin("prices", "show", "--json")
    shown = admin("prices", "show")
    assert "a million completion tokens" in shown
    assert str(before["completion"]) in shown
    assert "16:1000" in shown
    first = generate(admin)
    dear = ("--prompt", 10**9, "--completion", 2 * 10**9, "--rank-classes", "8:1000,64:2500")
    unsure = run("prices", "set", *dear, env=admin.env)
    assert (unsure.exit_code, unsure.stdout) == (2, "")
    assert f"prompt: {before['prompt']} to {10**9}" in unsure.stderr
    assert "--yes" in unsure.stderr
    assert admin("prices", "show", "--json") == before
    changed = admin("prices", "set", *dear, "--yes", "--json")
    named = {"prompt": 10**9, "completion": 2 * 10**9, "rank_classes": [[8, 1000], [64, 2500]]}
    assert changed == before | named | {"version": before["version"] + 1}
    assert admin("prices", "show", "--json") == changed
    assert generate(admin) > 100 * first
    back = ("--prompt", before["prompt"], "--completion", before["completion"])
    assert f"version {before['version'] + 2}" in admin("prices", "set", *back, "--rank-classes", "16:1000")
    for wrong, status, why in (
        ((), 2, "name what is to change"),
        (("--cached", before["prompt"] + 1, "--yes"), 1, "must not cost more"),
        (("--rank-classes", "16:1000,8:1"), 1, "ascending"),
        (("--rank-classes", "16"), 1, "rank_classes"),
        (("--rank-classes", "16:x"), 2, "whole number"),
        (("--prompt", -1), 2, "prompt"),
    ):
        result = run("prices", "set", *wrong, env=admin.env)
        assert (result.exit_code, result.stdout) == (status, ""), wrong
        assert why in result.stderr
    assert "403" in run("prices", "show", env=acme.env).stderr


def test_usage_and_invoice(admin, acme, base, tmp_path):
    folder = save_adapter(base, tmp_path / "a", seed=1, r=4, lora_alpha=8, target_modules=["q_proj"])
    acme("adapters", "push", "mine", folder)
    costs = [generate(acme), generate(acme, "mine"), generate(acme, "mine")]
    for cli, more in ((acme, ()), (admin, ("--tenant", "acme"))):
        rows = cli("usage", *more, "--json")
        assert [row["adapter"] for row in rows] == [None, "mine"]
        assert sum(row["cost_microusd"] for row in rows) == sum(costs)
        bill = cli("invoice", *more, "--json")
        used = [line["amount_microusd"] for line in bill["lines"] if line["unit"] == "tokens"]
        assert (bill["tenant"], sum(used)) == ("acme", sum(costs))
    assert len(acme("usage", "--group-by", "request", "--from", "2020-01-01", "--json")) == 3
    assert acme("usage", "--to", "2020-01-01", "--json") == []
    assert "(base)" in acme("usage")
    assert bill["month"] in acme("usage", "--group-by", "day")
    table = acme("invoice", bill["month"])
    assert bill["total"] in table
    assert "mine" in table
    assert acme("invoice", "--csv").startswith("tenant,month,adapter,kind")


def test_an_adapter_is_published_and_an_operator_removes_it(admin, acme, base, tmp_path):
    folder = save_adapter(base, tmp_path / "a", seed=2, r=4, lora_alpha=8, target_modules=["q_proj"])
    acme("adapters", "push", "shown", folder)
    assert "shown" not in admin("adapters", "list")
    assert acme("adapters", "publish", "shown", "--json")[0]["public"] is True
    assert [(one["name"], one["own"], one["public"]) for one in admin("adapters", "list", "--json")] == [
        ("shown", False, True)
    ]
    header = next(line for line in admin("adapters", "list").splitlines() if "digest" in line)
    assert ("own" in header, "public" in header) == (True, True)
    assert "False" in acme("adapters", "unpublish", "shown")
    assert "shown" not in admin("adapters", "list")
    admin("tenants", "disable", "acme", "--json")
    assert "shown" in [one["name"] for one in admin("adapters", "list", "--tenant", "acme", "--json")]
    assert admin("adapters", "rm", "shown", "--tenant", "acme", "--json") == {"deleted": "shown"}
    assert "shown" not in admin("adapters", "list", "--tenant", "acme")
    assert "404" in run("adapters", "rm", "shown", "--tenant", "acme", env=admin.env).stderr
    admin("tenants", "update", "acme", "--enable", "--json")
    assert "403" in run("adapters", "list", "--tenant", "default", env=acme.env).stderr


def test_what_is_refused_is_told_and_exits_1(admin, acme):
    for words, status in (
        (("tenants", "list"), "403"),
        (("usage", "--tenant", "default"), "403"),
        (("adapters", "show", "nobody"), "404"),
        (("invoice", "2026-13"), "422"),
    ):
        result = run(*words, env=acme.env)
        assert (result.exit_code, result.stdout) == (1, "")
        assert status in result.stderr
    assert "401" in run("usage", env={"ONEBASE_URL": admin.server.url}).stderr
    assert "404" in run("tenants", "show", "nobody", "--key", admin.token, "--url", admin.server.url).stderr
    assert "422" in run("tenants", "update", "acme", env=admin.env).stderr
    for flag in ("--rpm-limit", "--weight"):
        result = run("tenants", "update", "acme", flag, "many", env=admin.env)
        assert result.exit_code == 2
        assert "many" in result.stderr


def test_no_admin_key_while_a_server_owns_the_directory_or_without_one(tmp_path):
    (tmp_path / "data").mkdir()
    lock = own(tmp_path / "data")
    for folder, why in (("data", "each needs one of its own (ONEBASE_DATA_DIR)"), ("none", "no data directory")):
        result = run("tenants", "admin-key", "--data-dir", tmp_path / folder)
        assert (result.exit_code, result.stdout) == (1, "")
        assert why in result.stderr
    os.close(lock)
    result = run("tenants", "admin-key", "--data-dir", tmp_path / "data", "--database-url", "mysql://x/y")
    assert result.exit_code == 1
    assert "sqlite or postgresql" in result.stderr


def test_a_price_that_leaps_is_asked_about(monkeypatch):
    before = {"prompt": 10, "cached": 0, "rank_classes": [[16, 1000], [64, 1500]]}
    assert leaps(before, {"prompt": 100, "cached": 50, "rank_classes": [[16, 10_000], [64, 15_000]]}) == []
    assert leaps(before, {"prompt": 101}) == ["prompt: 10 to 101"]
    assert leaps(before, {"rank_classes": [[8, 1000], [256, 15_000]]}) == ["rank 16: 1000 to 15000 thousandths"]
    asked = []
    monkeypatch.setattr("typer.confirm", lambda text, **how: asked.append((text, how)))
    monkeypatch.setattr(prices, "sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    prices._confirm(["prompt: 10 to 101"])
    assert asked == [("more than tenfold: prompt: 10 to 101. Change it?", {"abort": True, "err": True})]
