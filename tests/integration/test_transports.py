"""One turn, watched by every transport at once and cut off at every entry: all end with the stored message."""

from __future__ import annotations

import asyncio
import contextlib
import json
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from django.contrib.auth import get_user_model

from streaming_chat import turns
from streaming_chat.models import JournalEntry, Message, UsageRecord
from streaming_chat.testing import Block, FakeAnthropic, Gate, Reply
from tests import wire
from tests.wire import EventStream, View

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from django.contrib.auth.models import User
    from django.test import AsyncClient

    from streaming_chat.models import Conversation
    from tests.wire import LocalSite

pytestmark = [
    pytest.mark.backends,
    pytest.mark.django_db(transaction=True),
    pytest.mark.filterwarnings("ignore:No directory at"),  # static files are not collected for the tests
]

PIECES = [
    "Hé",
    "e\u0301",
    "👩\u200d👩",
    "\u200d👧 ",
    "שלום",
    "\u202e",
    "\u2028",
    "\n\nevent: x\n",
    "</script>",
    "\ud83d",
    "\ude00.",
]
"""Emoji in pieces, combining marks, right to left, line separators; the last two are one character."""


@pytest.fixture
def anthropic(settings: Any) -> Iterator[FakeAnthropic]:
    with FakeAnthropic() as server:
        settings.STREAMING_CHAT = {
            "PROVIDER": "anthropic",
            "ANTHROPIC_API_KEY": server.api_key,
            "ANTHROPIC_BASE_URL": server.base_url,
            "TICK_SECONDS": 0.001,
        }
        yield server


@pytest.fixture
async def local(anthropic: FakeAnthropic) -> AsyncIterator[LocalSite]:
    async with wire.local_site() as local:
        yield local


@pytest.fixture
async def user() -> User:
    return await get_user_model().objects.acreate(username="ada")


@pytest.fixture
async def conversation(user: User) -> Conversation:
    return await turns.create_conversation(user)


class Steps:
    """The answer's pieces, each behind a gate, and how far viewers have come."""

    def __init__(self) -> None:
        self.gates = [Gate() for _ in PIECES]
        steps: list[Any] = [part for pair in zip(self.gates, PIECES, strict=True) for part in pair]
        half = len(steps) // 2
        self.reply = Reply.of(Block.thinking(*steps[:half], signature="signed"), Block.text(*steps[half:]))


async def over_socket(
    local: LocalSite, key: str, conversation: Conversation, view: View, cut: Callable[[View], bool]
) -> None:
    """Watch to the end, and come back wherever ``cut`` says."""
    while view.status not in ("completed", "failed"):
        query = f"?after={view.cursor}" if view.history else ""
        async with local.socket(key, conversation.pk, query=query, view=view) as socket:
            while view.status not in ("completed", "failed"):
                event = await socket.next()
                assert event is not None
                if event["type"] != "progress" and cut(view):
                    break


async def over_sse(client: AsyncClient, conversation: Conversation, view: View, cut: Callable[[View], bool]) -> None:
    last_id: str | None = None
    while view.status not in ("completed", "failed"):
        headers = {} if last_id is None else {"last-event-id": last_id}
        response: Any = await client.get(wire.api_path(conversation.pk, "/events"), headers=headers)
        assert response.status_code == 200
        async with contextlib.aclosing(response.streaming_content) as pieces:
            events = EventStream(aiter(pieces), view)
            while view.status not in ("completed", "failed"):
                event = await events.next()
                assert event is not None
                last_id = event.id or last_id
                if event.id is not None:
                    assert event.id == view.cursor
                    if cut(view):
                        break


async def over_post(client: AsyncClient, conversation: Conversation, view: View, started: asyncio.Event) -> None:
    response: Any = await client.post(
        wire.api_path(conversation.pk, "/messages"),
        json.dumps({"text": "Hello", "client_id": "c1"}),
        content_type="application/json",
        headers={"accept": "text/event-stream", "x-csrftoken": wire.CSRF_TOKEN},
    )
    assert response.status_code == 200
    events = EventStream(aiter(response.streaming_content), view)
    await events.until("accepted")
    started.set()
    await events.rest()


async def in_python(user: User, conversation: Conversation) -> turns.Reply:
    words: list[str] = []

    async def on_text(text: str) -> None:
        words.append(text)

    reply = await turns.stream_reply(user, "Hello", conversation_id=conversation.pk, client_id="c1", on_text=on_text)
    assert "".join(words) == reply.text
    return reply


async def test_every_viewer_ends_with_the_stored_message_wherever_it_was_cut_off(
    local: LocalSite, user: User, conversation: Conversation, anthropic: FakeAnthropic, settings: Any
) -> None:
    settings.STREAMING_CHAT = {**settings.STREAMING_CHAT, "EVENT_STREAMS_PER_USER": 100}
    key = await wire.sign_in(user)
    client = await local.client(user)
    steps = Steps()
    anthropic.enqueue(steps.reply)

    never: Callable[[View], bool] = lambda view: False  # noqa: E731
    always: Callable[[View], bool] = lambda view: True  # noqa: E731

    def every(step: int) -> Callable[[View], bool]:
        return lambda view: view.seq % step == 0

    cuts = [never, always, every(2), every(3), every(5)]
    sockets, streams = [View() for _ in cuts], [View() for _ in cuts]
    first_post, late_post = View(one_turn=True), View(one_turn=True)
    started, late = asyncio.Event(), asyncio.Event()
    async with asyncio.timeout(3 * wire.PATIENCE_SECONDS), asyncio.TaskGroup() as group:
        for view, cut in zip(sockets, cuts, strict=True):
            group.create_task(over_socket(local, key, conversation, view, cut))
        for view, cut in zip(streams, cuts, strict=True):
            group.create_task(over_sse(client, conversation, view, cut))
        await wire.until(lambda: all(view.history for view in [*sockets, *streams]))
        group.create_task(over_post(client, conversation, first_post, started))
        await started.wait()
        python = group.create_task(in_python(user, conversation))
        shown = ""
        for number, gate in enumerate(steps.gates):
            await gate.reached()
            if number == len(PIECES) // 2:
                group.create_task(over_post(client, conversation, late_post, late))
                await late.wait()
            gate.open()
            # All have shown this piece (half a character waits for its other half) before the next one comes.
            shown = fold_text(PIECES[: number + 1])
            await wire.until(partial(all_show, shown, [sockets[0], streams[0], first_post]))

    reply = await Message.objects.aget(role="assistant")
    for view in [*sockets, *streams, first_post, late_post]:
        assert view.blocks() == reply.blocks, view.history
        assert view.status == "completed"
    assert (await python).blocks == reply.blocks
    assert (await python).text == reply.text == sockets[0].text()
    assert words(sockets[0]) == fold_text(PIECES)
    assert await JournalEntry.objects.acount() >= len(PIECES) - 1
    assert len(anthropic.requests) == 1
    record = await UsageRecord.objects.aget()
    assert record.quality == "exact"
    expected = {"output_tokens": record.output_tokens, "input_tokens": record.input_tokens, "exact": True}
    for view in [*sockets, *streams, first_post, late_post]:
        assert view.usage is not None
        assert view.usage.items() >= expected.items()


def all_show(text: str, views: list[View]) -> bool:
    """Whether every viewer shows exactly ``text``."""
    return all(words(view) == text for view in views)


def words(view: View) -> str:
    """Everything that a viewer shows of the reply, thinking included."""
    if view.reply_id not in view.folds:
        return ""
    return "".join(str(block.get("thinking", block.get("text", ""))) for block in view.blocks())


def fold_text(pieces: list[str]) -> str:
    """The pieces as one text; half a character at the end is not shown yet."""
    text = "".join(pieces)
    if text and "\ud800" <= text[-1] <= "\udbff":
        text = text[:-1]
    return text.encode("utf-16", "surrogatepass").decode("utf-16")
