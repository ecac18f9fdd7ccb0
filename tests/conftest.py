"""Fixtures that every kind of test may use. What they run on: ``tests/services.py``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from django.db import connection
from playwright.async_api import async_playwright

from tests import services
from tests.settings import BACKEND

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from playwright.async_api import Browser, ConsoleMessage, Page


@pytest.fixture
def site_environment() -> dict[str, str]:
    """Variables for the process of the ``site`` fixture; override it to set some."""
    return {}


@pytest.fixture
def site(transactional_db: None, site_environment: dict[str, str]) -> Iterator[services.Site]:
    """The host site under Daphne, in a process of its own, on this test's database and channel layer."""
    environment = {
        "DJANGO_SETTINGS_MODULE": "chatproject.settings",
        "DATABASE_URL": database_url(),
        "REDIS_URL": "" if BACKEND == "sqlite" else services.redis_url(),
        "REDIS_LAYER": BACKEND,
        "ANTHROPIC_API_KEY": "",
        **site_environment,
    }
    with services.serve(environment) as served:
        yield served
    sys.stderr.write(served.log.read_text())  # shown if the test failed


def database_url() -> str:
    """The URL of this worker's test database, for another process."""
    name = connection.settings_dict["NAME"]
    if connection.vendor == "sqlite":
        return f"sqlite:///{name}"
    return f"{services.postgres_url().rpartition('/')[0]}/{name}"


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    """A fresh headless Chromium."""
    chromium = services.chromium()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=chromium.path, args=chromium.arguments, env=dict(chromium.environment)
        )
        yield browser
        await browser.close()


@pytest.fixture
async def page(browser: Browser) -> AsyncIterator[Page]:
    """A page in a session of its own; the test fails if a script does or breaks the content security policy."""
    context = await browser.new_context()
    page = await context.new_page()
    faults: list[str] = []

    def note(line: ConsoleMessage) -> None:
        if "Content Security Policy" in line.text:
            faults.append(line.text)

    page.on("console", note)
    page.on("pageerror", lambda error: faults.append(str(error)))
    yield page
    await context.close()
    assert faults == []
