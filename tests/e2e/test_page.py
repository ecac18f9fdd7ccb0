"""The chat's own pages in a real browser: everything a person does in them, and what must never happen."""

from __future__ import annotations

import re
import uuid
from typing import TYPE_CHECKING, Any, Literal

import pytest
from django.conf import settings
from django.contrib.auth import get_user_model
from django.test import AsyncClient
from playwright.async_api import expect

from streaming_chat.models import Conversation, Message, Participant, Turn
from tests import services

if TYPE_CHECKING:
    from django.contrib.auth.models import User
    from playwright.async_api import Browser, BrowserContext, Locator, Page, WebSocketRoute

HOSTILE = (
    "<img src=https://evil.example/a.png onerror=alert(1)> ![x](https://evil.example/b.png) [y](javascript:alert(1))"
)
ACTIVE = (
    "img, script:not([type='application/json']), iframe, svg a, form[action^='http'], [href^='javascript'], [onerror]"
)


@pytest.fixture
async def ada(transactional_db: None) -> User:
    return await get_user_model().objects.acreate_user("ada")


async def sign_in(context: BrowserContext, site: services.Site, user: User) -> None:
    client = AsyncClient()
    await client.aforce_login(user)
    cookie = client.cookies[settings.SESSION_COOKIE_NAME].value
    await context.add_cookies([{"name": settings.SESSION_COOKIE_NAME, "value": cookie, "url": site.url}])


async def open_chat(page: Page, site: services.Site, user: User) -> None:
    await sign_in(page.context, site, user)
    await page.goto(f"{site.url}/chat/")


def box_of(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Write a message")


def log(page: Page) -> Locator:
    return page.get_by_role("log")


def replies(page: Page) -> Locator:
    return page.locator("[part~=assistant-message]")


async def send(page: Page, text: str) -> None:
    await box_of(page).fill(text)
    await box_of(page).press("Enter")
    await expect(box_of(page)).to_have_value("")


async def finished(page: Page, seconds: float = 20.0) -> None:
    """Wait for the end of the reply that was just asked for."""
    await expect(page.get_by_role("button", name="Stop")).to_have_count(0, timeout=seconds * 1000)
    await expect(replies(page).locator(".foot .facts").last).to_be_attached(timeout=seconds * 1000)


async def replied(page: Page, text: str) -> None:
    before = await page.locator(".bubble").count()
    await send(page, text)
    await expect(page.locator(".bubble")).to_have_count(before + 1)
    await expect(replies(page)).to_have_count(before + 1)
    await finished(page)


async def shown(page: Page) -> str:
    """The words of the last reply on the screen, without spaces and marks."""
    return letters(await replies(page).locator(".prose").last.inner_text())


def letters(text: str) -> str:
    return re.sub(r"\W+", "", re.sub(r"```\w+", "", text))


async def stored(page: Page) -> Message:
    """The last reply in the database."""
    conversation = await Conversation.objects.select_related("leaf").aget(pk=page.url.rstrip("/").rpartition("/")[2])
    assert conversation.leaf is not None
    return conversation.leaf


async def violations(page: Page) -> list[tuple[str, Any]]:
    await page.evaluate(services.axe_source())
    report = await page.evaluate("axe.run()")
    return [(found["id"], [node["target"] for node in found["nodes"]]) for found in report["violations"]]


async def test_a_first_message_makes_a_conversation_whose_reply_streams(
    site: services.Site, page: Page, ada: User
) -> None:
    await open_chat(page, site, ada)
    await expect(page.get_by_text("Demo: answers are canned")).to_be_visible()
    await send(page, "Tell me a long story")
    await page.wait_for_url("**/chat/conversations/*/")
    await expect(page.get_by_role("heading", name="Tell me a long story")).to_be_visible()
    link = page.get_by_role("navigation", name="Conversations").get_by_role("link", name="Tell me a long story")
    assert await link.get_attribute("aria-current") == "page"
    await expect(page.get_by_role("button", name="Stop")).to_be_visible()
    await expect(replies(page).locator("h5")).to_have_text("Hello from the demo 👋")
    first = await shown(page)
    await page.get_by_role("button", name="Stop").click()
    await finished(page)
    await expect(log(page).get_by_text("This reply was stopped.")).to_be_visible()
    last = await shown(page)
    assert last.startswith(first)
    reply = await stored(page)
    assert letters(reply.text) == last
    await page.reload()
    await expect(log(page).get_by_text("This reply was stopped.")).to_be_visible()
    assert await shown(page) == last


async def test_two_tabs_show_the_same_stream_and_stop_together(site: services.Site, page: Page, ada: User) -> None:
    await open_chat(page, site, ada)
    await send(page, "A long one")
    await page.wait_for_url("**/chat/conversations/*/")
    other = await page.context.new_page()
    await other.goto(page.url)
    await expect(replies(other)).to_contain_text("What you can try")
    await box_of(other).press("Escape")
    for tab in (page, other):
        await finished(tab)
        await expect(log(tab).get_by_text("This reply was stopped.")).to_be_visible()
    assert await shown(page) == await shown(other) == letters((await stored(page)).text)
    await other.bring_to_front()
    await replied(other, "And a short one")
    await page.bring_to_front()
    await finished(page)
    assert await shown(page) == await shown(other)


async def test_a_reload_in_mid_stream_loses_and_doubles_nothing(site: services.Site, page: Page, ada: User) -> None:
    await open_chat(page, site, ada)
    await send(page, "Something short")
    await page.wait_for_url("**/chat/conversations/*/")
    for _ in range(5):
        before = await shown(page) if await replies(page).locator(".prose").count() else ""
        await page.reload()
        await expect(replies(page).locator(".prose")).to_have_count(1)
        assert (await shown(page)).startswith(before)
    await finished(page)
    reply = await stored(page)
    assert letters(reply.text) == await shown(page)
    assert await Message.objects.acount() == 2


async def test_a_killed_server_is_noticed_and_what_was_shown_is_kept(
    site: services.Site, page: Page, ada: User
) -> None:
    await open_chat(page, site, ada)
    await send(page, "A long one")
    await page.wait_for_url("**/chat/conversations/*/")
    await expect(replies(page)).to_contain_text("What you can try")
    site.kill()
    await expect(page.get_by_text("Reconnecting. Your text is safe.")).to_be_visible(timeout=10_000)
    before = await shown(page)
    await box_of(page).fill("typed meanwhile")
    site.start()
    await expect(page.get_by_text("Reconnecting. Your text is safe.")).to_have_count(0, timeout=25_000)
    await expect(log(page).get_by_text("The reply was interrupted. What you see is saved.")).to_be_visible(
        timeout=30_000
    )
    assert (await shown(page)).startswith(before)
    assert await shown(page) == letters((await stored(page)).text)
    await expect(box_of(page)).to_have_value("typed meanwhile")
    await page.get_by_role("button", name="Try again").click()
    await expect(page.get_by_role("button", name="Stop")).to_be_visible()
    await box_of(page).press("Escape")
    await finished(page)
    assert await replies(page).count() == 1


async def test_events_take_over_where_sockets_are_blocked(site: services.Site, page: Page, ada: User) -> None:
    async def refuse(socket: WebSocketRoute) -> None:
        await socket.close(code=1008)

    await page.route_web_socket(re.compile("/socket/"), refuse)
    await open_chat(page, site, ada)
    await send(page, "By another way")
    await page.wait_for_url("**/chat/conversations/*/")
    await expect(page.get_by_role("button", name="Stop")).to_be_visible(timeout=10_000)
    await finished(page)
    assert await shown(page) == letters((await stored(page)).text)
    await send(page, "A long one")
    await page.get_by_role("button", name="Stop").click()
    await expect(log(page).get_by_text("This reply was stopped.")).to_be_visible()


async def test_one_window_too_many_says_so_and_tries_again_when_told(
    site: services.Site, page: Page, ada: User
) -> None:
    crowded = True
    opened = 0

    async def refuse(socket: WebSocketRoute) -> None:
        nonlocal opened
        opened += 1
        if not crowded:
            socket.connect_to_server()
            return
        socket.send('{"type":"error","ref":null,"code":"rate_limited","detail":"Too many requests."}')
        await socket.close(code=4429)

    await open_chat(page, site, ada)
    await replied(page, "Mine")
    await page.route_web_socket(re.compile("/socket/"), refuse)
    await page.reload()
    sentence = page.locator(".strip", has_text="Too many windows are open. Close some; this one tries again by itself.")
    await expect(sentence).to_be_visible()
    await expect(page.locator(".strip", has_text="Too many requests.")).to_have_count(0)
    await expect(replies(page)).to_contain_text("Hello from the demo")
    assert await violations(page) == []
    crowded = False
    assert opened == 1
    await page.get_by_role("button", name="Reconnect now").click()
    await expect(sentence).to_have_count(0)
    await replied(page, "More")


async def test_a_message_that_is_not_confirmed_can_be_discarded(site: services.Site, page: Page, ada: User) -> None:
    def swallow(socket: WebSocketRoute) -> None:
        server = socket.connect_to_server()

        def forward(frame: str | bytes) -> None:
            if '"type":"send"' not in str(frame):
                server.send(frame)

        socket.on_message(forward)

    await page.clock.install()
    await open_chat(page, site, ada)
    await replied(page, "One")
    await page.route_web_socket(re.compile("/socket/"), swallow)
    await page.reload()
    await send(page, "Two")
    await page.clock.fast_forward(16_000)
    await expect(log(page).get_by_text("Not confirmed yet.")).to_be_visible()
    assert await violations(page) == []
    await page.get_by_role("button", name="Discard").click()
    await expect(page.locator(".bubble")).to_have_text(["One"])
    await expect(box_of(page)).to_be_focused()
    await page.reload()
    await expect(page.locator(".bubble")).to_have_text(["One"])
    assert await Message.objects.acount() == 2


@pytest.mark.parametrize(
    ("prompt", "sentence", "button"),
    [
        ("/error overloaded", "The assistant is overloaded. Try again in a moment.", "Try again"),
        ("/cut", "The reply was cut off. What you see is saved.", "Try again"),
        ("/max_tokens", "The reply reached its length limit.", None),
        ("/refuse", "The assistant declined to answer this.", None),
    ],
)
async def test_every_end_has_its_words(
    site: services.Site, page: Page, ada: User, prompt: str, sentence: str, button: str | None
) -> None:
    await open_chat(page, site, ada)
    await replied(page, prompt)
    ending = page.locator(".ending")
    await expect(ending).to_contain_text(sentence)
    await expect(ending.get_by_role("button")).to_have_count(0 if button is None else 1)
    await page.reload()
    await expect(ending).to_contain_text(sentence)
    assert await violations(page) == []


@pytest.mark.parametrize(
    ("stop_reason", "sentence"),
    [
        ("model_context_window_exceeded", "The conversation has become too long for the assistant."),
        ("pause_turn", "The assistant paused here. Ask it to go on."),
    ],
)
async def test_ends_that_only_a_real_provider_has_have_their_words(
    site: services.Site, page: Page, ada: User, stop_reason: str, sentence: str
) -> None:
    await open_chat(page, site, ada)
    await replied(page, "Something short")
    assert await Turn.objects.aupdate(stop_reason=stop_reason) == 1
    await page.reload()
    await expect(page.locator(".ending")).to_have_text(sentence)


async def test_a_silent_reply_shows_elapsed_seconds(site: services.Site, page: Page, ada: User) -> None:
    await open_chat(page, site, ada)
    await send(page, "/wait 7")
    await expect(page.locator(".progress")).to_contain_text(re.compile(r"Waiting for the assistant\s+[1-3] s"))
    await expect(page.locator(".progress")).to_contain_text(re.compile(r"Waiting for the assistant\s+[4-7] s"))
    await finished(page)
    await expect(page.locator(".progress")).to_have_count(0)


async def test_the_box_keeps_what_is_typed_and_sends_only_when_told(site: services.Site, page: Page, ada: User) -> None:
    await open_chat(page, site, ada)
    box = box_of(page)
    await box.press_sequentially("one")
    await box.press("Shift+Enter")
    await box.press_sequentially("two")
    await expect(box).to_have_value("one\ntwo")
    assert await box.evaluate("element => element.clientHeight") > 50
    for event in ({"isComposing": True}, {"keyCode": 229}):
        await box.dispatch_event("keydown", {"key": "Enter", "bubbles": True, "cancelable": True, **event})
    await page.reload()
    await expect(box).to_have_value("one\ntwo")
    assert await Conversation.objects.acount() == 0
    await box.press("Enter")
    await expect(box).to_have_value("")
    await expect(page.locator(".bubble")).to_have_text("one\ntwo")
    await finished(page)
    assert await Message.objects.filter(role="user").acount() == 1
    await page.reload()
    await expect(box).to_have_value("")


async def test_the_counter_counts_characters_as_the_server_does(site: services.Site, page: Page, ada: User) -> None:
    await open_chat(page, site, ada)
    button = page.get_by_role("button", name="Send")
    await box_of(page).fill("👋" * 31_990)
    await expect(page.locator(".counter")).to_have_text("10 characters left")
    await expect(button).to_have_attribute("aria-disabled", "false")
    await box_of(page).fill("👋" * 32_001)
    await expect(page.locator(".counter")).to_have_text("1 characters too many")
    await expect(button).to_have_attribute("aria-disabled", "true")


async def test_the_view_follows_only_a_reader_who_is_at_the_end(site: services.Site, page: Page, ada: User) -> None:
    await page.set_viewport_size({"width": 900, "height": 500})
    await open_chat(page, site, ada)
    await send(page, "A long one")
    scroller = page.get_by_role("log")
    await expect(replies(page)).to_contain_text("Part 1")
    left = "element => element.scrollHeight - element.clientHeight - element.scrollTop"
    assert await scroller.evaluate(left) < 60
    await scroller.hover()
    await page.mouse.wheel(0, -400)
    await expect(page.get_by_role("button", name="Jump to the latest")).to_be_visible()
    top = await scroller.evaluate("element => element.scrollTop")
    await expect(replies(page)).to_contain_text("Part 2")
    assert await scroller.evaluate("element => element.scrollTop") == top
    await page.get_by_role("button", name="Jump to the latest").click()
    await expect(page.get_by_role("button", name="Jump to the latest")).to_have_count(0)
    await box_of(page).press("Escape")
    await finished(page)
    assert await scroller.evaluate(left) < 2


async def test_finished_messages_are_never_drawn_again(site: services.Site, page: Page, ada: User) -> None:
    await open_chat(page, site, ada)
    await replied(page, "First")
    await page.evaluate("""() => {
        const first = document.querySelector("streaming-chat").shadowRoot.querySelector("article.assistant .prose");
        window.changes = 0;
        new MutationObserver((list) => { window.changes += list.length; })
            .observe(first, {subtree: true, childList: true, characterData: true, attributes: true});
    }""")
    await replied(page, "Second")
    assert await page.evaluate("window.changes") == 0


async def test_nothing_that_is_written_becomes_active_or_leaves_the_site(
    site: services.Site, page: Page, ada: User
) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("dialog", lambda dialog: asked.append(f"dialog {dialog.message}"))
    await open_chat(page, site, ada)
    await replied(page, HOSTILE)
    for _ in range(2):
        await expect(page.locator(".bubble")).to_have_text(HOSTILE)
        await expect(replies(page).locator("blockquote")).to_contain_text("onerror=alert(1)")
        host_icon = page.locator(".site-header img")
        assert await page.locator(ACTIVE).count() == await host_icon.count() + 1  # our own script
        await page.reload()
    assert [url for url in asked if not url.startswith(site.url)] == []


async def test_conversations_of_others_do_not_exist(
    site: services.Site, page: Page, browser: Browser, ada: User
) -> None:
    await open_chat(page, site, ada)
    await replied(page, "Mine")
    foreign = page.url
    eve = await get_user_model().objects.acreate_user("eve")
    context = await browser.new_context()
    await sign_in(context, site, eve)
    theirs = await context.new_page()
    bodies = []
    for url in (foreign, f"{site.url}/chat/conversations/{uuid.uuid4()}/"):
        response = await theirs.goto(url)
        assert response is not None
        assert response.status == 404
        bodies.append((await response.text()).replace(url.rstrip("/").rpartition("/")[2], "ID"))
    assert bodies[0] == bodies[1]
    await theirs.goto(f"{site.url}/chat/")
    await expect(theirs.get_by_role("listitem")).to_have_count(0)

    conversation = await Conversation.objects.aget()
    await Participant.objects.acreate(conversation=conversation, user=eve, role="viewer")
    await theirs.goto(foreign)
    await expect(theirs.get_by_text("You may read this conversation, but not write in it.")).to_be_visible()
    await expect(theirs.get_by_role("textbox")).to_have_count(0)
    await expect(theirs.get_by_role("button", name="Try again")).to_have_count(0)
    await context.close()


async def test_visitors_are_led_to_the_login(site: services.Site, page: Page) -> None:
    for path in ("/chat/", f"/chat/conversations/{uuid.uuid4()}/"):
        await page.goto(site.url + path)
        assert page.url == f"{site.url}/accounts/login/?next={path}"


async def test_a_browser_without_scripts_can_chat(site: services.Site, browser: Browser, ada: User) -> None:
    context = await browser.new_context(java_script_enabled=False)
    await sign_in(context, site, ada)
    page = await context.new_page()
    await page.goto(f"{site.url}/chat/")
    names = ("csrfmiddlewaretoken", "client_id")
    form = {name: await page.locator(f".streaming-chat-plain [name={name}]").input_value() for name in names}
    await page.get_by_label("Write a message").fill(HOSTILE)
    await page.get_by_role("button", name="Send").click()
    await page.wait_for_url("**/chat/conversations/*/")
    await expect(page.locator("article.user")).to_contain_text(HOSTILE)
    again = await context.request.post(f"{site.url}/chat/new/", form={**form, "text": HOSTILE})
    assert again.url == page.url
    assert await Conversation.objects.acount() == 1
    await page.get_by_label("Write a message").fill("again")
    await page.get_by_role("button", name="Send").click()
    await expect(page.get_by_role("alert")).to_contain_text("The assistant is still replying")
    await expect(page.get_by_label("Write a message")).to_have_value("again")
    for _ in range(100):
        await page.goto(page.url.replace("send/", ""))
        if await page.get_by_text("The assistant is replying.").count() == 0:
            break
        await page.wait_for_timeout(100)
    await expect(page.locator("article.assistant")).to_contain_text("Hello from the demo")
    assert await Message.objects.filter(role="user").acount() == 1
    await context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
async def test_pages_are_accessible_and_fit_the_screen(
    site: services.Site, page: Page, ada: User, scheme: Literal["light", "dark"], width: int
) -> None:
    await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    await page.set_viewport_size({"width": width, "height": 640})
    await open_chat(page, site, ada)
    assert await violations(page) == [], "empty"
    await send(page, "Think, please, and be long")
    await expect(replies(page)).to_contain_text("Part 1")
    assert await violations(page) == [], "streaming"
    await box_of(page).press("Escape")
    await finished(page)
    assert await violations(page) == [], "stopped"
    if width < 900:
        await page.get_by_role("button", name="Conversations").click()
        await expect(page.get_by_role("navigation", name="Conversations")).to_be_visible()
        assert await violations(page) == [], "list"
    assert await page.evaluate("document.documentElement.scrollWidth") <= width
