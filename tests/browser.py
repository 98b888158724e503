"""A real browser for tests, if there is one; `ATOLL_BROWSER` says where, or that there must be."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import contextmanager

import pytest

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


def chromium() -> str:
    """The browser's path; skips where there is none, unless one was promised."""
    asked = os.environ.get("ATOLL_BROWSER", "")
    found = asked or next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), "")
    if not found:
        pytest.skip("there is no chromium here")
    return found


@contextmanager
def browser():
    """A browser that is closed again."""
    path = chromium()
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield started
        finally:
            started.close()


@contextmanager
def tab(started, url, **settings):
    """A page that has been opened; whatever it complains of fails the test."""
    settings = {"viewport": {"width": 1200, "height": 900}, **settings}
    context = started.new_context(**settings)
    complaints, asked = [], []
    page = context.new_page()
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    page.asked = asked
    try:
        yield page
        assert not complaints, complaints
    finally:
        context.close()


def until(page, expression, seconds=10.0):
    """Wait until an expression is true; asked from outside, for the page forbids `eval`."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"{expression} did not become true"
        time.sleep(0.02)
