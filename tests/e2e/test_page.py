"""The status page in a real browser, on a real server with a small base and a single slot on the device."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from server import demo
from server.errors import EngineFailure
from server.tenants.keys import Scope
from tests.families import ATTENTION, save_adapter
from tests.serving import Gate, Server, chat_base, ids_of, until

FEW = 4  # steps
ROOT = Path(__file__).resolve().parents[2]
DOCS, FILES = ROOT / "docs", ROOT / "server/page"
PHONE = {"viewport": {"width": 360, "height": 740}}
NO_KEY, TAKEN = "status of 401", "status of 412"
REFUSED = "Failed to load resource"
EVIL = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>'


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return chat_base(tmp_path_factory.mktemp("bases") / "tiny-llama")


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    made = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION}
    return [save_adapter(base, folder / f"a{seed}", seed=seed, **made) for seed in (3, 4)]


@pytest.fixture(scope="module")
def server(base, adapters, tmp_path_factory) -> Iterator[Server]:
    """One slot: an adapter that comes to the device sends the one that was there back to RAM. `plain` is there."""
    with Server(base, tmp_path_factory.mktemp("data"), adapter_slots=1) as server:
        assert server.put("plain", adapters[0]).status_code == 201
        yield server
        server.idle()


@pytest.fixture
def held(server, monkeypatch) -> Iterator[Gate]:
    """Stands, closed, before every step of the engine after the first few."""
    steps, gate = iter(range(10**6)), Gate(server.runner.run)
    run = gate._function
    monkeypatch.setattr(server.runner, "run", lambda *given: (run if next(steps) < FEW else gate)(*given))
    yield gate
    gate.open()


def row(page: Page, name: str) -> Locator:
    return page.locator("#adapters tr", has=page.get_by_role("rowheader", name=re.compile(rf"^{re.escape(name)}\b")))


def tier(page: Page, name: str) -> Locator:
    return row(page, name).locator(".tier")


def fact(answer: Locator, label: str) -> Locator:
    return answer.locator("dl > div", has=answer.page.get_by_text(label, exact=True)).locator("dd")


def generate(page: Page, adapter: str = "", prompt: str = "hello", **fields: Any) -> Locator:
    """Fills the form and sends it; the answers."""
    page.get_by_label("Adapter", exact=True).fill(adapter)
    page.get_by_label("Prompt").fill(prompt)
    for label, value in {"Most tokens": 8, **fields}.items():
        page.get_by_label(label).fill(str(value))
    page.get_by_role("button", name="Generate").click()
    return page.locator(".answer")


def upload(page: Page, name: str, folder: Path) -> Locator:
    """Fills and sends the form; what is said then."""
    form = page.locator("#upload")
    form.get_by_label("Name", exact=True).fill(name)
    form.get_by_label("Config").set_input_files(folder / "adapter_config.json")
    form.get_by_label("Weights").set_input_files(folder / "adapter_model.safetensors")
    form.get_by_role("button", name="Upload").click()
    return page.locator("#uploaded")


def told(server: Server, adapter: str | None, prompt: str = "hello", tokens: int = 8) -> str:
    """What the server answers a client that is no page."""
    messages = [{"role": "user", "content": prompt}]
    body = {"adapter": adapter, "messages": messages, "max_tokens": tokens}
    response = server.http.post("/v1/generate", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def script(server: Server, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Makes the model answer a given text, byte by byte, again and again."""
    run, ids = server.runner.run, ids_of(text)

    def scripted(work, copy):
        return [
            (item, replace(choice, token=ids[item.sequence.produced % len(ids)])) for item, choice in run(work, copy)
        ]

    monkeypatch.setattr(server.runner, "run", scripted)


def test_the_files_are_open_strict_and_no_part_of_the_api(server):
    paths = set(server.http.get("/openapi.json").json()["paths"])
    for file in FILES.iterdir():
        path = "/" if file.name == "index.html" else f"/page/{file.name}"
        response = server.http.get(path)
        assert response.status_code == 200
        assert response.content == file.read_bytes()
        headers = response.headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "set-cookie" not in headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert "unsafe" not in str(policy)
        assert server.http.head(path).headers["content-length"] == str(len(response.content))
        assert path not in paths
    for path in ("/page", "/page/", "/page/..%2fapp.py", "/page/nothing.js", "/index.html"):
        assert server.http.get(path).json()["error"]["code"] == "not_found"
    assert server.http.post("/").status_code == 405


def test_the_page_has_nothing_inline_and_names_nobody_else():
    page = (FILES / "index.html").read_text()
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?![^>]*\ssrc=)", page)
    for file in FILES.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "//" not in re.sub(r"(?m)^\s*//.*$|\s// .*$", "", text), file.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\(", text)


def test_an_adapter_is_uploaded_used_and_seen_to_move_between_the_tiers(server, visit, held, adapters):
    page = visit(server, expected=TAKEN)
    expect(upload(page, "tone", adapters[1])).to_contain_text("tone is new: version 1")
    expect(tier(page, "tone")).to_have_text("disk")

    other = visit(server)
    generate(other, "plain")
    until(lambda: held.entered)  # it has the one slot
    answer = generate(page, "tone")
    expect(tier(page, "tone")).to_have_text("ram")
    expect(tier(page, "plain")).to_have_text("device")
    expect(row(page, "tone").locator("[data-label='In flight']")).to_have_text("1")
    held.open()
    expect(tier(page, "tone")).to_have_text("device")
    expect(tier(page, "plain")).to_have_text("ram")
    expect(page.locator("#asked")).to_have_text("Done.")
    digest = server.http.get("/adapters/tone").json()["digest"]
    expect(fact(answer, "lane")).to_have_text("shared")
    expect(fact(answer, "cold")).to_contain_text("yes, loaded in")
    expect(fact(answer, "digest")).to_have_text(digest.removeprefix("sha256:")[:12])
    expect(fact(answer, "digest")).to_have_attribute("title", digest)
    expect(fact(answer, "tokens")).to_contain_text(" out")
    expect(fact(answer, "cost")).to_contain_text("$0.0")
    expect(fact(answer, "first token")).to_contain_text("s")
    expect(fact(answer, "speed")).to_contain_text("tok/s")
    assert answer.locator(".text").text_content() == told(server, "tone")

    said = upload(page, "tone", adapters[0])
    expect(said).to_contain_text("There is one of that name")
    page.get_by_label("Replace one of that name").check()
    expect(upload(page, "tone", adapters[0])).to_contain_text("version 2")
    expect(row(page, "tone").locator("[data-label='Version']")).to_have_text("2")
    row(page, "tone").get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Delete it").click()
    expect(row(page, "tone")).to_have_count(0)
    assert server.http.get("/adapters/tone").status_code == 404


def test_two_are_compared_side_by_side(server, visit):
    page = visit(server, viewport={"width": 1280, "height": 800})
    page.get_by_label("Compare two").check()
    page.get_by_label("Beside it").fill("plain")
    answers = generate(page, "", "what is it?")
    expect(answers).to_have_count(2)
    expect(page.locator("#asked")).to_have_text("Done.")
    expect(answers.nth(0).get_by_role("heading")).to_have_text("the base")
    expect(answers.nth(1).get_by_role("heading")).to_have_text("plain")
    texts = [answers.nth(at).locator(".text").text_content() for at in (0, 1)]
    assert texts == [told(server, None, "what is it?"), told(server, "plain", "what is it?")]
    assert texts[0] != texts[1]
    left, right = (answers.nth(at).bounding_box() for at in (0, 1))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] < right["x"]


def test_a_seed_and_a_plain_prompt_are_passed_on(server, visit):
    page = visit(server)
    page.get_by_label("As a chat message").uncheck()
    answer = generate(page, "plain", "hello", Temperature="1.5", Seed="7")
    expect(page.locator("#asked")).to_have_text("Done.")
    whole = server.generate(adapter="plain", prompt="hello", max_tokens=8, temperature=1.5, seed=7)
    assert answer.locator(".text").text_content() == whole["choices"][0]["text"]
    assert fact(answer, "cost").text_content() == f"${whole['usage']['cost_microusd'] / 1e6:.6f}"


def test_a_stream_can_be_stopped(server, visit, held, monkeypatch):
    script(server, monkeypatch, "on and on ")
    cancelled = server.engine.stats.outcomes.get("cancelled", 0)
    page = visit(server)
    answer = generate(page, **{"Most tokens": 300})
    expect(answer.locator(".text")).to_contain_text("on")
    expect(answer.locator(".text")).to_have_attribute("aria-busy", "true")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#asked")).to_have_text("Stopped.")
    expect(fact(answer, "ended")).to_have_text("stopped here")
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    expect(page.get_by_role("button", name="Generate")).to_be_focused()
    held.open()
    until(lambda: server.engine.stats.outcomes.get("cancelled", 0) == cancelled + 1)
    server.idle()


def test_a_fault_within_a_stream_is_shown_with_what_came_before(server, visit, monkeypatch):
    script(server, monkeypatch, "so far ")
    steps, run = iter(range(10**6)), server.runner.run

    def failing(work, copy):
        if next(steps) == FEW:
            raise EngineFailure("the step failed")
        return run(work, copy)

    monkeypatch.setattr(server.runner, "run", failing)
    page = visit(server)
    answer = generate(page)
    expect(answer.get_by_role("alert")).to_contain_text("failed")
    expect(answer.locator(".text")).to_contain_text("so")
    expect(page.locator("#asked")).to_have_text("It did not work.")


def test_a_refusal_says_why(server, visit):
    page = visit(server, expected=REFUSED)
    answer = generate(page, "nobody")
    expect(answer.get_by_role("alert")).to_have_text("there is no adapter nobody")
    answer = generate(page, "plain", **{"Most tokens": 99999})
    expect(answer.get_by_role("alert")).to_contain_text("max_tokens")


def test_a_lane_of_its_own_and_back(server, visit):
    page = visit(server)
    row(page, "plain").get_by_role("button", name="Merge").click()
    expect(page.locator("#adapters-said")).to_have_text("plain has a lane of its own.")
    expect(row(page, "plain").locator("[data-label='Lane']")).to_have_text("merged")
    answer = generate(page, "plain")
    expect(fact(answer, "lane")).to_have_text("merged")
    row(page, "plain").get_by_role("button", name="Unmerge").click()
    expect(page.locator("#adapters-said")).to_have_text("plain runs in the shared lane.")
    expect(row(page, "plain").locator("[data-label='Lane']")).to_have_text("shared")


def test_a_question_that_is_asked_again_at_once_is_answered(server, visit, adapters):
    """The event of the first one's end comes when the second is open."""
    server.put("twice", adapters[1])
    page = visit(server)
    remove = row(page, "twice").get_by_role("button", name="Delete")
    remove.click()
    remove.evaluate("button => { document.getElementById('confirm').close('no'); button.click() }")
    page.get_by_role("button", name="Delete it").click()
    expect(row(page, "twice")).to_have_count(0)


def test_many_adapters_are_paged_and_found_by_the_begin_of_their_names(server, visit, adapters):
    many = [f"many-{at:02}" for at in range(45)]
    for name in many:
        assert server.put(name, adapters[0]).status_code == 201
    try:
        page = visit(server)
        names = page.locator("#adapters th")
        expect(names).to_have_count(20)
        page.get_by_label("Name begins with").fill("many-")
        expect(names).to_have_text([re.compile(name) for name in many[:20]])
        page.get_by_role("button", name="Next").click()
        expect(names).to_have_text([re.compile(name) for name in many[20:40]])
        page.get_by_role("button", name="Next").click()
        expect(names).to_have_text([re.compile(name) for name in many[40:]])
        expect(page.get_by_role("button", name="Next")).to_be_disabled()
        page.get_by_role("button", name="Back").click()
        expect(names).to_have_text([re.compile(name) for name in many[20:40]])
        page.get_by_label("Name begins with").fill("MANY-3")
        expect(names).to_have_text([re.compile(f"many-3{at}") for at in range(10)])
        page.get_by_label("Name begins with").fill("zz")
        expect(page.get_by_text("No adapters.")).to_be_visible()
        page.get_by_label("Adapter", exact=True).fill("many-4")
        expect(page.locator("#names option")).to_have_count(5)
    finally:
        for name in many:
            server.http.delete(f"/adapters/{name}")


def test_the_bill_is_the_servers(server, visit):
    server.generate(adapter="plain", max_tokens=20, ignore_eos=True)
    page = visit(server)
    month = page.get_by_label("Month").input_value()
    invoice = server.http.get(f"/v1/invoices/{month}").json()
    expect(page.locator("#total")).to_have_text(f"${invoice['total_microusd'] / 1e6:.6f}")
    expect(page.locator("#bill-of")).to_contain_text(f"for default, {invoice['requests']} requests")
    kinds = {line["kind"]: line for line in invoice["lines"] if line["adapter"] == "plain"}
    bill = page.locator("#lines tr", has=page.get_by_role("rowheader", name="plain"))
    expect(bill.locator("[data-label='Completion']")).to_have_text(f"{kinds['completion']['quantity']:,}")
    expect(page.get_by_role("img", name=re.compile("Cost by day: day"))).to_be_visible()
    generate(page, "plain")
    expect(page.locator("#bill-of")).to_contain_text(f"{invoice['requests'] + 1} requests")
    page.get_by_label("Month").fill("2001-01")
    expect(page.locator("#bill-of")).to_contain_text("0 requests")


METRICS = """
# HELP onebase_generation_tokens_total Tokens.
onebase_generation_tokens_total {tokens}
onebase_num_requests_running{{where="a \\"b\\", {{c}}"}} 2
onebase_num_requests_running{{where="d"}} 1.0 1795262484000
onebase_num_requests_waiting 4
onebase_engine_steps_total {tokens}
onebase_time_to_first_token_seconds_bucket{{le="0.1"}} {few}
onebase_time_to_first_token_seconds_bucket{{le="0.2"}} {many}
onebase_time_to_first_token_seconds_bucket{{le="+Inf"}} {many}
"""


def test_figures_and_their_history_are_those_of_metrics(server, visit):
    scrapes = iter(range(10**6))

    def answer(route):
        at = next(scrapes)
        route.fulfill(content_type="text/plain", body=METRICS.format(tokens=100 * at, few=5, many=5 + 10 * at))

    page = visit(server, prepare=lambda page: page.route("**/metrics", answer))
    tiles = page.locator(".tile")
    shown = tiles.filter(visible=True)
    expect(shown).to_have_count(3)
    expect(shown.nth(0)).to_contain_text(re.compile(r"Throughput\d+(\.\d)? tok/s"))
    expect(shown.nth(1)).to_have_text("Running34 waiting")
    expect(shown.nth(2)).to_have_text("First token150 ms95 % within 195 ms")
    expect(shown.nth(0).locator("path.stroke")).to_have_attribute("d", re.compile("^M.*L"))


def test_the_servers_own_figures_are_shown(server, visit):
    page = visit(server)
    expect(page.locator("#state-text")).to_have_text("ready, tiny-llama")
    generate(page, "plain")
    tiles = page.locator(".tile").filter(visible=True)
    expect(tiles.filter(has_text="Device slots")).to_contain_text("1of 1")
    expect(tiles.filter(has_text="Throughput")).to_contain_text("tok/s")
    expect(tiles.filter(has_text="KV cache")).to_contain_text("%")


def test_nothing_is_asked_for_while_nobody_looks(server, visit):
    asked: list[str] = []
    page = visit(server, prepare=lambda page: page.clock.install())
    expect(row(page, "plain")).to_have_count(1)

    def hidden(value: bool) -> None:
        page.evaluate(
            "value => { Object.defineProperty(document, 'hidden', {value, configurable: true});"
            "document.dispatchEvent(new Event('visibilitychange')) }",
            value,
        )

    hidden(True)
    page.wait_for_load_state("networkidle")
    page.on("request", lambda request: asked.append(request.url))
    page.clock.run_for(60_000)
    page.evaluate("0")
    assert not asked
    with page.expect_request("**/metrics"), page.expect_request("**/adapters?*"), page.expect_request("**/readyz"):
        hidden(False)


def test_strangers_text_stays_text(server, visit, monkeypatch):
    entry = server.http.get("/adapters/plain").json()
    evil = entry | {"name": EVIL, "digest": EVIL, "lane": EVIL, "residency": EVIL}
    fault = {"error": {"message": EVIL, "type": "x", "param": None, "code": EVIL}}
    invoice = {"tenant": EVIL, "requests": 1, "running": 0, "total_microusd": 1}
    line = {"adapter": EVIL, "kind": "prompt", "quantity": 1, "unit": "tokens", "amount_microusd": 1}

    def prepare(page: Page) -> None:
        page.route("**/adapters?*", lambda route: route.fulfill(json={"data": [evil], "next": None}))
        page.route("**/v1/invoices/*", lambda route: route.fulfill(json=invoice | {"lines": [line]}))
        page.route("**/adapters/*", lambda route: route.fulfill(status=409, json=fault))
        page.route("**/readyz", lambda route: route.fulfill(json={"base": EVIL}))

    page = visit(server, expected=REFUSED, prepare=prepare)
    script(server, monkeypatch, EVIL)
    answer = generate(page, **{"Most tokens": len(EVIL)})
    expect(page.locator("#asked")).to_have_text("Done.")
    assert answer.locator(".text").text_content() == EVIL
    expect(page.locator("#adapters th")).to_contain_text(EVIL)
    expect(page.locator("#lines th")).to_have_text(EVIL)
    expect(page.locator("#state-text")).to_contain_text(EVIL)
    page.locator("#adapters").get_by_role("button", name="Merge").click()
    expect(page.locator("#adapters-said")).to_contain_text(EVIL)
    page.locator("#adapters").get_by_role("button", name="Delete").click()
    expect(page.locator("#confirm-title")).to_contain_text(EVIL)
    assert page.locator("img, body script").count() == 0
    assert page.evaluate("window.hit === undefined")


def test_markup_could_not_be_made_of_text_at_all(server, visit):
    page = visit(server, expected="TrustedHTML")
    assert "TrustedHTML" in page.evaluate(
        "() => { try { document.body.innerHTML = '<b>x</b>'; return '' } catch (fault) { return fault.message } }"
    )


@pytest.fixture(scope="module")
def guarded(base, adapters, tmp_path_factory) -> Iterator[Server]:
    """With AUTH on."""
    with Server(base, tmp_path_factory.mktemp("guarded"), auth="on") as server:
        yield server
        server.idle()


@pytest.fixture(scope="module")
def keys(guarded, adapters) -> dict[str, str]:
    """Two keys of one tenant, which has an adapter: `full` may do all but administer, `narrow` may only generate."""

    async def made() -> dict[str, str]:
        directory = guarded.state.accounts.directory
        await directory.create("acme")
        scopes = {"full": [Scope.GENERATE, Scope.ADAPTERS_WRITE, Scope.USAGE_READ], "narrow": [Scope.GENERATE]}
        return {name: (await directory.create_key("acme", some))[1] for name, some in scopes.items()}

    tokens = asyncio.run_coroutine_threadsafe(made(), guarded.state.client.loop).result(20)
    headers = {"Authorization": f"Bearer {tokens['full']}"}
    assert guarded.put("acmes", adapters[0], headers=headers).status_code == 201
    return tokens


def use_key(page: Page, key: str) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Use the key").click()


def test_with_keys_the_page_asks_for_one_and_forgets_it_when_told(guarded, visit, keys):
    page = visit(guarded, expected=NO_KEY)
    expect(page.get_by_role("heading", name="This server asks for a key")).to_be_visible()
    use_key(page, "ob_0123456789abcdef_" + "x" * 43)
    expect(page.locator("#key-fault")).to_contain_text("does not take this key")
    use_key(page, "not a key")
    expect(page.locator("#key-fault")).to_contain_text("without spaces")
    use_key(page, keys["full"])
    expect(page.locator("#key-form")).to_be_hidden()
    expect(row(page, "acmes")).to_have_count(1)
    expect(page.locator("#bill-of")).to_contain_text("for acme")
    answer = generate(page, "acmes")
    expect(page.locator("#asked")).to_have_text("Done.")
    expect(answer.locator(".text")).not_to_be_empty()

    page.reload()
    expect(row(page, "acmes")).to_have_count(1)
    kept = page.evaluate("[JSON.stringify(sessionStorage), JSON.stringify(localStorage), document.cookie]")
    assert (json.loads(kept[0]), *kept[1:]) == ({"onebase.key": keys["full"]}, "{}", "")
    assert keys["full"] not in page.content()
    generate(page, "acmes")
    page.get_by_role("button", name="Forget the key").click()
    expect(page.get_by_label("API key")).to_be_focused()
    expect(page.locator("#adapters tr, .answer")).to_have_count(0)
    expect(page.locator("#bill")).to_be_hidden()
    assert page.evaluate("sessionStorage.length") == 0
    assert "acme" not in page.content()


def test_what_a_key_may_not_do_is_said(guarded, visit, keys, adapters):
    page = visit(guarded, expected=REFUSED)
    use_key(page, keys["narrow"])
    expect(page.locator("#bill-fault")).to_contain_text("No bill: This key may not do that")
    expect(page.locator("#bill-fault")).to_contain_text("usage:read")
    expect(upload(page, "more", adapters[1])).to_contain_text("no scope adapters:write")
    expect(page.locator("#key-form")).to_be_hidden()
    generate(page, "acmes")
    expect(page.locator("#asked")).to_have_text("Done.")


def test_without_keys_none_is_asked_for(server, visit):
    page = visit(server)
    expect(row(page, "plain")).to_have_count(1)
    expect(page.locator("#key-form, #key-used").filter(visible=True)).to_have_count(0)


def tab_to(page: Page, target: Locator) -> None:
    """Presses Tab until the target has the focus, which must show wherever it comes by."""
    for _ in range(60):
        page.keyboard.press("Tab")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", page.evaluate("document.activeElement.outerHTML")
        if target.evaluate("element => element === document.activeElement"):
            return
    raise AssertionError(f"Tab does not come to {target}")


def test_everything_goes_by_keyboard(server, visit, adapters):
    server.put("typed", adapters[1])
    page = visit(server)
    expect(row(page, "typed")).to_have_count(1)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the playground")).to_be_in_viewport()
    page.keyboard.press("Enter")
    tab_to(page, page.get_by_label("Adapter", exact=True))
    page.keyboard.type("typed")
    tab_to(page, page.get_by_label("Prompt"))
    page.keyboard.type("hello")
    tab_to(page, page.get_by_label("Most tokens"))
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("8")
    tab_to(page, page.get_by_role("button", name="Generate"))
    page.keyboard.press("Enter")
    expect(page.locator("#asked")).to_have_text("Done.")
    expect(page.get_by_role("button", name="Generate")).to_be_focused()
    assert page.locator(".answer .text").text_content() == told(server, "typed")
    tab_to(page, page.locator(".answer .text"))

    remove = row(page, "typed").get_by_role("button", name="Delete")
    tab_to(page, remove)
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Keep it")).to_be_focused()
    page.keyboard.press("Escape")
    expect(remove).to_be_focused()
    page.keyboard.press("Enter")
    tab_to(page, page.get_by_role("button", name="Delete it"))
    page.keyboard.press("Enter")
    expect(row(page, "typed")).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, {"viewport": {"width": 1280, "height": 900}}], ids=["phone", "desk"])
def test_it_reads_well_on_any_screen(server, visit, adapters, scheme, size):
    """Nothing hangs out at the side, and axe-core finds nothing against WCAG 2.2 AA, contrast included."""
    longest = "x" * 64
    server.put(longest, adapters[1])
    page = visit(server, color_scheme=scheme, **size)
    page.get_by_label("Compare two").check()
    page.get_by_label("Beside it").fill("plain")
    generate(page, longest, "w" * 200)
    expect(page.locator("#asked")).to_have_text("Done.")
    expect(row(page, longest)).to_have_count(1)
    expect(page.locator("#bill")).to_be_visible()
    width, shown = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert width <= shown == size["viewport"]["width"]
    ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) > 384) == (scheme == "light")
    rules = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    for part in ("main", "dialog"):
        if part == "dialog":
            row(page, longest).get_by_role("button", name="Delete").click()
        found = Axe().run(page, options={"runOnly": {"type": "tag", "values": rules}})
        assert not found.response["violations"], found.generate_report()
    page.get_by_role("button", name="Delete it").click()
    expect(row(page, longest)).to_have_count(0)


@pytest.fixture(scope="module")
def real() -> Iterator[demo.Server]:
    """`onebase serve` on the real base with the shipped adapters, of which two have room on the device."""
    with demo.server("--preload", str(demo.ADAPTERS), "--adapter-slots", "2", "--eviction", "lru") as running:
        running.wait_ready()
        yield running


@pytest.mark.real
def test_the_shipped_adapters_on_the_real_base(real, visit):
    """What a user sees first. With PICTURES set, the pictures of the docs are taken of it."""
    asked = {question.adapter: question.body for question in demo.questions()}
    page = visit(real, viewport={"width": 1180, "height": 900}, color_scheme="light")
    for adapter in ("email-summary", "ticket-triage"):  # one of them goes back to RAM
        generate(page, adapter, asked[adapter]["messages"][0]["content"])
        expect(page.locator("#asked")).to_have_text("Done.")
    page.get_by_label("Compare two").check()
    page.get_by_label("Beside it").fill("plain-english")
    question = asked["plain-english"]
    answers = generate(page, "", question["messages"][0]["content"], **{"Most tokens": question["max_tokens"]})
    expect(page.locator("#asked")).to_have_text("Done.", timeout=120_000)
    tiers = {"plain-english": "device", "ticket-triage": "device", "email-summary": "ram", "invoice-json": "disk"}
    for adapter, residency in tiers.items():
        expect(tier(page, adapter)).to_have_text(residency)
    assert answers.nth(1).locator(".text").text_content()
    expect(page.locator("#bill-of")).to_contain_text("4 requests")
    if "PICTURES" in os.environ:
        pictures(page, DOCS / "images")


def pictures(page: Page, folder: Path) -> None:
    """The page light and dark, and on a phone, once there is some history to see."""
    folder.mkdir(exist_ok=True)
    for _ in range(6):
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#asked")).to_have_text("Done.", timeout=120_000)

    def take(name: str, **options: Any) -> None:
        shot = Image.open(io.BytesIO(page.screenshot(**options))).convert("RGB")
        shot.quantize(128, dither=Image.Dither.NONE).save(folder / name, optimize=True)

    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        take(f"page-{scheme}.png", full_page=True)
    page.set_viewport_size(PHONE["viewport"])
    page.locator("#adapters-title").evaluate("element => element.scrollIntoView()")
    take("page-phone.png")
