"""Usage and invoices over HTTP, with AUTH on: what the answers cost is what is on the bill."""

import asyncio
import csv
import io
import time
from concurrent.futures import ThreadPoolExecutor

from server.api.state import PAGES_AT_ONCE
from server.tenants.invoice import invoice as made
from tests.serving import refused, until
from tests.tenancy import invoice


def test_the_answers_costs_add_up_to_the_bill(admin, adapters, monkeypatch):
    monkeypatch.setattr("server.api.usage.GROUPS", 2)  # several parts make a page
    account, other = admin.tenant(), admin.tenant()
    for at, folder in enumerate(adapters):
        config = (folder / "adapter_config.json").read_bytes()
        weights = (folder / "adapter_model.safetensors").read_bytes()
        put = account.http.put(f"/adapters/a{at}", files={"config": config, "weights": weights})
        assert put.status_code == 201, put.text
    answers = [
        account.costs(adapter=adapter, prompt="hello " * (3 * at + 1), n=1 + at % 2)
        for at, adapter in enumerate([None, "a0", "a1", "a2", None, "a1"])
    ]
    other.costs()
    costs = {answer["id"]: answer["usage"]["cost_microusd"] for answer in answers}
    rows = account.http.get("/v1/usage").json()["data"]
    assert {row["request_id"]: row["cost_microusd"] for row in rows} == costs
    bill = invoice(account)
    assert (bill["tenant"], bill["requests"], bill["running"]) == (account.name, len(answers), 0)
    used = [line for line in bill["lines"] if line["unit"] == "tokens"]
    assert sum(line["amount_microusd"] for line in used) == sum(costs.values())
    assert bill["total_microusd"] == sum(line["amount_microusd"] for line in bill["lines"])
    assert {line["adapter"] for line in used} == {None, "a0", "a1", "a2"}
    for group in ("adapter", "day"):
        rows = account.http.get("/v1/usage", params={"group_by": group}).json()["data"]
        assert sum(row["cost_microusd"] for row in rows) == sum(costs.values())
        assert sum(row["requests"] for row in rows) == len(answers)
    by_admin = {"tenant": account.name}
    assert admin.http.get("/v1/usage", params=by_admin).json() == account.http.get("/v1/usage").json()
    assert invoice(admin, **by_admin)["requests"] == len(answers)
    refused(other.http.get("/v1/usage", params=by_admin), 403, "tenant")
    refused(other.http.get("/v1/usage", params={"tenant": "nobody"}), 403, "tenant")
    for at in range(len(adapters)):
        assert account.http.delete(f"/adapters/a{at}").status_code == 204


def test_usage_in_pages_and_within_times(admin, monkeypatch):
    monkeypatch.setattr("server.api.usage.PART", 2)  # several parts make a page
    account = admin.tenant()
    began = time.time() - 1
    made = [account.costs(max_tokens=1)["id"] for _ in range(7)]
    found, after = [], None
    while True:
        query = {"limit": 3} | ({} if after is None else {"after": after})
        page = account.http.get("/v1/usage", params=query).json()
        found, after = found + page["data"], page["next"]
        if after is None:
            break
        assert len(page["data"]) == 3
    assert [row["request_id"] for row in found] == made
    assert account.http.get("/v1/usage", params={"limit": 100_000}).json() == {"data": found, "next": None}
    for since in (began, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began))):
        assert len(account.http.get("/v1/usage", params={"from": since}).json()["data"]) == 7
        assert account.http.get("/v1/usage", params={"to": since}).json() == {"data": [], "next": None}


def test_csv_by_accept_or_by_format(admin):
    account = admin.tenant()
    answers = [account.costs(max_tokens=1) for _ in range(3)]
    asked = [
        account.http.get("/v1/usage", params={"format": "csv"}),
        account.http.get("/v1/usage", headers={"accept": "text/csv"}),
    ]
    for response in asked:
        assert response.headers["content-type"].startswith("text/csv")
        rows = list(csv.DictReader(io.StringIO(response.text)))
        assert [row["request_id"] for row in rows] == [answer["id"] for answer in answers]
        costs = sum(int(row["cost_microusd"]) for row in rows)
        assert costs == sum(answer["usage"]["cost_microusd"] for answer in answers)
        assert "x-next-after" not in response.headers
    first = account.http.get("/v1/usage", params={"format": "csv", "limit": 2})
    rest = {"format": "csv", "after": first.headers["x-next-after"]}
    assert answers[2]["id"] in account.http.get("/v1/usage", params=rest).text
    month = time.strftime("%Y-%m", time.gmtime())
    bill = account.http.get(f"/v1/invoices/{month}", headers={"accept": "text/csv"})
    rows = list(csv.DictReader(io.StringIO(bill.text)))
    assert sum(int(row["amount_microusd"]) for row in rows) == invoice(account)["total_microusd"]
    json_after_all = account.http.get(
        f"/v1/invoices/{month}", params={"format": "json"}, headers={"accept": "text/csv"}
    )
    assert json_after_all.json()["tenant"] == account.name


def test_a_tenants_invoices_take_turns(admin, monkeypatch):
    """And hold up no answer that is to be written down meanwhile."""
    account, other, under_way, most = admin.tenant(), admin.tenant(), [], []

    async def slowly(*parts):
        under_way.append(parts)
        most.append(len(under_way))
        async with admin.server.state.accounts.database.read():
            await asyncio.sleep(0.05)
        under_way.pop()
        return await made(*parts)

    monkeypatch.setattr("server.api.usage.invoice", slowly)
    with ThreadPoolExecutor(24) as pool:
        bills = [pool.submit(invoice, account) for _ in range(24)]
        other.costs(max_tokens=1)
        assert not all(one.done() for one in bills)
        assert {one.result()["tenant"] for one in bills} == {account.name}
    assert max(most) <= PAGES_AT_ONCE // 2


def test_not_ready_while_the_ledger_cannot_be_written(admin, monkeypatch):
    account = admin.tenant()
    with monkeypatch.context() as patch:
        patch.setattr(type(admin.server.state.accounts.ledger), "healthy", False)
        assert "ledger" in refused(admin.http.get("/readyz"), 503)["message"]
        assert refused(account.generate(), 503)["code"] == "ledger_unavailable"
    until(lambda: admin.http.get("/readyz").status_code == 200)
    text = admin.http.get("/metrics").text
    for name in ("onebase_ledger_lag_seconds", "onebase_ledger_queued", "onebase_ledger_commits_total"):
        assert f"\n{name} " in text
