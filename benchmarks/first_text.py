"""How much the whole stack adds to the time to first text.

The provider is the fake one and answers at once, so all the time from sending a prompt to seeing the first words is
added by us: the browser, Daphne, the use case's transaction, the claim, the request, the journal's commit and the way
back. Printed for a WebSocket client in Python, and for the page in Chromium from the key press to the DOM.

    python -m benchmarks.first_text [ROUNDS]
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
import uuid
from typing import TYPE_CHECKING

import aiohttp
from playwright.async_api import async_playwright

from streaming_chat.testing import FakeAnthropic, Reply
from tests import services

if TYPE_CHECKING:
    from playwright.async_api import Page

USER, PASSWORD = "ada", "ada-demo"
ANSWER = "Streaming means that the first words are shown at once. " * 5
WATCH_PAGE = """() => {
    const chat = document.querySelector("streaming-chat");
    const words = () => (chat.shadowRoot.textContent.match(/Streaming means/g) ?? []).length;
    window.added = new Promise((done) => {
        let pressed;
        addEventListener("keydown", (event) => { if (event.key === "Enter") pressed = performance.now(); }, true);
        const before = words();
        const look = () => words() > before && done(performance.now() - pressed);
        new MutationObserver(look).observe(chat.shadowRoot, {childList: true, subtree: true, characterData: true});
    });
}"""


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    database = os.environ.get("DATABASE_URL", f"sqlite:///{services.run_directory() / 'benchmark.sqlite3'}")
    with FakeAnthropic() as fake:
        environment = {**fake.environ, "DEBUG": "1", "DATABASE_URL": database}
        for command in ("migrate", "seed_demo"):
            subprocess.run(
                [sys.executable, "manage.py", command, "--verbosity", "0"],
                check=True,
                env=os.environ | environment,
                stdout=subprocess.DEVNULL,
            )
        with services.serve(environment) as site:
            rows = asyncio.run(measure(site.url, fake, rounds))
    print(f"added time to first text, {rounds} rounds, ms")
    print(f"{'':<42} {'median':>8} {'p95':>8}")
    for name, values in rows.items():
        values.sort()
        p95 = values[int(len(values) * 0.95) - 1]
        print(f"{name:<42} {statistics.median(values):8.1f} {p95:8.1f}")


async def measure(url: str, fake: FakeAnthropic, rounds: int) -> dict[str, list[float]]:
    """Milliseconds by what was measured."""
    before: list[float] = []
    after: list[float] = []
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:
        csrf_token = await sign_in(session, url)
        headers = {"X-CSRFToken": csrf_token, "Referer": url}
        async with session.post(f"{url}/chat/api/conversations", json={}, headers=headers) as answer:
            conversation = (await answer.json())["id"]
        socket_url = f"{url}/chat/conversations/{conversation}/socket/"
        async with session.ws_connect(socket_url, origin=url) as socket:
            for _ in range(rounds):
                fake.enqueue(Reply.text(ANSWER, chunks=20))
                sent_at = time.monotonic()
                await socket.send_str(
                    json.dumps({"type": "send", "client_id": str(uuid.uuid4()), "text": "What is streaming?"})
                )
                shown_at = await first_text(socket)
                asked_at = fake.requests[-1].started
                before.append((asked_at - sent_at) * 1000)
                after.append((shown_at - asked_at) * 1000)
    whole = [a + b for a, b in zip(before, after, strict=True)]
    return {
        "WebSocket: prompt sent → provider asked": before,
        "WebSocket: provider asked → text received": after,
        "WebSocket: whole": whole,
        "Chromium: key pressed → text in the page": await measure_page(url, fake, rounds),
    }


async def first_text(socket: aiohttp.ClientWebSocketResponse) -> float:
    """When the first delta came; returns after the turn's end."""
    shown_at = 0.0
    while True:
        event = json.loads((await socket.receive()).data)
        if event["type"] == "delta" and not shown_at:
            shown_at = time.monotonic()
        elif event["type"] == "finished":
            return shown_at


async def measure_page(url: str, fake: FakeAnthropic, rounds: int) -> list[float]:
    chromium = services.chromium()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=chromium.path, args=chromium.arguments, env=dict(chromium.environment)
        )
        page = await browser.new_page()
        await page.goto(f"{url}/accounts/login/")
        await page.fill("input[name=username]", USER)
        await page.fill("input[name=password]", PASSWORD)
        await page.keyboard.press("Enter")
        await page.wait_for_url("**/chat/**")
        await page.locator("a[href*='/conversations/']").first.click()
        await page.wait_for_url("**/conversations/**")
        added = [await one_page_round(page, fake) for _ in range(rounds)]
        await browser.close()
    return added


async def one_page_round(page: Page, fake: FakeAnthropic) -> float:
    fake.enqueue(Reply.text(ANSWER, chunks=20))
    writing = page.locator("streaming-chat textarea").last
    await writing.fill("What is streaming?")
    await page.evaluate(WATCH_PAGE)
    await writing.press("Enter")
    added: float = await page.evaluate("window.added")
    await page.wait_for_timeout(300)  # the turn's end
    return added


async def sign_in(session: aiohttp.ClientSession, url: str) -> str:
    """Sign the sample user in; the CSRF token."""
    async with session.get(f"{url}/accounts/login/"):
        pass
    form = {"username": USER, "password": PASSWORD, "csrfmiddlewaretoken": token_of(session)}
    async with session.post(f"{url}/accounts/login/", data=form, headers={"Referer": url}) as answer:
        answer.raise_for_status()
    return token_of(session)


def token_of(session: aiohttp.ClientSession) -> str:
    return next(cookie.value for cookie in session.cookie_jar if cookie.key == "csrftoken")


if __name__ == "__main__":
    main()
