"""Debian's Chromium for tests, driven by Playwright, and what is expected of every page that it shows."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

PATIENCE = 20_000  # milliseconds that a page may take to show something
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium, once a module. CI must have it; elsewhere its tests are skipped without it."""
    program = shutil.which("chromium")
    if program is None:
        missing = "no chromium (Debian: apt-get install chromium)"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page of whatever has a `url`, in a context of its own. Console errors fail the test, but for those
    `expected` to hold a certain text, and so do cookies and requests to anybody else."""
    contexts, wrong = [], []

    def opened(server: Any, *, expected: str | None = None, prepare: Any = None, **settings: Any) -> Page:
        context = browser.new_context(**settings)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()

        def told(message: Any) -> None:
            if message.type in ("error", "warning") and not (expected and expected in message.text):
                wrong.append(f"{message.type}: {message.text} {message.location}")

        def asked(request: Any) -> None:
            if urlsplit(request.url)[:2] != urlsplit(server.url)[:2]:
                wrong.append(f"a request to {request.url}")

        page.on("console", told)
        page.on("pageerror", lambda fault: wrong.append(f"uncaught: {fault}"))
        page.on("request", asked)
        if prepare:
            prepare(page)
        page.goto(server.url)
        return page

    yield opened
    cookies = [cookie for context in contexts for cookie in context.cookies()]
    for context in contexts:
        context.close()
    assert not wrong
    assert not cookies
