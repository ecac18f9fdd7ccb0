"""The server's process is killed at random moments, and asked to end in the middle of a turn.

``CHAT_TEST_SEED`` replays a run (it is printed when a test fails), ``CHAT_TEST_KILLS`` sets how often is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth import get_user_model

from streaming_chat.models import Conversation, JournalEntry, Message, Turn, UsageRecord
from streaming_chat.testing import FakeAnthropic, Gate, Reply
from tests import services, wire
from tests.wire import View

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django.contrib.auth.models import User

    from streaming_chat.testing import RequestRecord

pytestmark = pytest.mark.django_db(transaction=True)

SEED = int(os.environ.get("CHAT_TEST_SEED") or random.SystemRandom().randrange(10**6))
KILLS = int(os.environ.get("CHAT_TEST_KILLS") or 20)
CONVERSATIONS = 3
STREAM_SECONDS = 1.0
PIECES = 25
SETTLED_SECONDS = 30.0
LONGEST_ROUND_SECONDS = 20.0

WORDS = ["shown ", "is ", "stored, ", "e\u0301 ", "👩\u200d👩\u200d👧 ", "שלום ", "\u2028", "\n\n", "```", "x" * 40]


@pytest.fixture
def anthropic() -> Iterator[FakeAnthropic]:
    with FakeAnthropic() as server:
        yield server


@pytest.fixture
def user(transactional_db: None) -> User:
    return get_user_model().objects.create(username="ada")


@pytest.fixture
def key(user: User) -> str:
    return async_to_sync(wire.sign_in)(user)


def environment(anthropic: FakeAnthropic, **chat: Any) -> dict[str, str]:
    return wire.server_environment(
        PROVIDER="anthropic", LEASE_SECONDS=1.0, SWEEP_SECONDS=0.3, SOCKETS_PER_USER=1000, **chat
    ) | dict(anthropic.environ)


def slow_answer(request: RequestRecord) -> Reply:
    """An answer that belongs to its prompt, over about a second."""
    chance = random.Random(request.prompt)
    words = [chance.choice(WORDS) for _ in range(PIECES)]
    return Reply.text(*words, pause_seconds=STREAM_SECONDS / PIECES)


@dataclass
class Asked:
    """One prompt, who watched its answer, and what they were shown."""

    conversation: Conversation
    prompt: str
    client_id: str
    views: list[View] = field(default_factory=lambda: [View(), View()])
    turn_id: str | None = None
    killed_at: datetime | None = None

    def command(self) -> dict[str, str]:
        return {"type": "send", "text": self.prompt, "client_id": self.client_id, "ref": self.client_id}

    def shown(self) -> list[str]:
        """What each viewer saw of this answer."""
        return [view.text() if view.reply_id else "" for view in self.views]


async def watch(session: aiohttp.ClientSession, url: str, asked: Asked, ready: list[asyncio.Event]) -> None:
    """Ask in one tab and watch in two, until the server is gone."""

    async def follow(view: View, *, asks: bool) -> None:
        after = view.cursor if view.history else None
        with contextlib.suppress(aiohttp.ClientError, ConnectionError, AssertionError):
            async with wire.open_socket(session, url, asked.conversation.pk, after=after, view=view) as socket:
                await socket.until("snapshot")
                ready[0 if asks else 1].set()
                if asks:
                    await ready[1].wait()
                    await socket.send(asked.command())
                while (event := await socket.next()) is not None:
                    if event["type"] == "accepted" and asks:
                        asked.turn_id = event["turn"]

    async with asyncio.TaskGroup() as tabs:
        tabs.create_task(follow(asked.views[0], asks=True))
        tabs.create_task(follow(asked.views[1], asks=False))


@pytest.mark.timeout(240)
async def test_killed_at_any_moment_nothing_shown_is_lost_and_nothing_is_asked_twice(
    user: User, key: str, anthropic: FakeAnthropic
) -> None:
    print(f"CHAT_TEST_SEED={SEED}")  # noqa: T201 - pytest shows it when the test fails
    chance = random.Random(SEED)
    anthropic.respond = slow_answer
    every: list[Asked] = []
    with services.serve(environment(anthropic)) as site:
        async with wire.network(key) as session:
            for round_number in range(KILLS):
                asked = [await prepare(user, f"prompt {round_number}.{n} " + "x" * 40) for n in range(CONVERSATIONS)]
                ready = [[asyncio.Event(), asyncio.Event()] for _ in asked]
                async with asyncio.timeout(LONGEST_ROUND_SECONDS), asyncio.TaskGroup() as tabs:
                    for item, events in zip(asked, ready, strict=True):
                        tabs.create_task(watch(session, site.url, item, events))
                    for events in ready:
                        await asyncio.gather(*(event.wait() for event in events))
                    await asyncio.sleep(chance.uniform(0.0, STREAM_SECONDS * 1.3))
                    site.kill()
                    killed_at = datetime.now(UTC)
                for item in asked:
                    item.killed_at = killed_at
                every += asked
                site.start()
            await settle_and_check(session, site, every, anthropic)
        assert site.terminate() == 0
        wire.assert_clean(site)


async def prepare(user: User, prompt: str) -> Asked:
    return Asked(await Conversation.objects.acreate(owner=user), prompt, str(uuid.uuid4()))


async def settle_and_check(
    session: aiohttp.ClientSession, site: services.Site, every: list[Asked], anthropic: FakeAnthropic
) -> None:
    for item in every:  # a browser that got no answer sends again; one that did not hear of it, too
        before = item.shown()
        item.views[0].history.clear()
        async with wire.open_socket(
            session, site.url, item.conversation.pk, after=item.views[0].cursor, view=item.views[0]
        ) as socket:
            answer = await socket.ask(item.command())
            assert answer["type"] == "accepted", answer
            assert item.turn_id in (None, answer["turn"])
            item.turn_id = answer["turn"]
            turn = await over(item)
            while socket.view.status in ("", "queued", "running") or socket.view.turn != item.turn_id:
                await socket.next()
            reply = await Message.objects.aget(pk=turn.reply_id)
            assert socket.view.blocks() == reply.blocks
        for text in before:
            assert reply.text.startswith(text), (item.prompt, text, reply.text)
        assert await Turn.objects.filter(conversation=item.conversation).acount() == 1
        requests = [request for request in anthropic.requests if request.prompt == item.prompt]
        assert len(requests) <= 1, item.prompt
        records = [record async for record in UsageRecord.objects.filter(turn=turn)]
        assert len(records) >= len(requests)
        assert len(records) <= 1
        for record in records:
            if turn.status == "completed":
                assert record.quality == "exact"
            else:
                assert record.quality == "estimated", turn.status
                assert record.input_tokens > 0
                assert record.output_tokens > 0 or not reply.text
        if turn.status == "failed":  # no process lived long enough to take it from the queue
            assert (turn.error_code, requests, reply.blocks) == ("queue_timeout", [], [])
        elif turn.status != "completed":
            assert (turn.status, turn.error_code) == ("interrupted", "owner_lost")
        elif requests:
            assert reply.text == requests[0].text_sent
    assert not await UsageRecord.objects.filter(quality="open").aexists()
    statuses = {item.turn_id: item for item in every}
    assert len(statuses) == len(every)
    cut = [turn async for turn in Turn.objects.filter(status="interrupted")]
    assert cut, "no kill hit a running turn, so this run has shown nothing"


async def over(item: Asked) -> Turn:
    """The turn, once it is terminal; soon enough after the kill."""
    assert item.turn_id is not None
    async with asyncio.timeout(SETTLED_SECONDS):
        while (turn := await Turn.objects.aget(pk=item.turn_id)).active:  # noqa: ASYNC110 - in another process
            await asyncio.sleep(0.02)
    assert turn.finished_at is not None
    assert item.killed_at is not None
    if turn.status == "interrupted":
        assert (turn.finished_at - item.killed_at).total_seconds() <= SETTLED_SECONDS
    return turn


@pytest.mark.parametrize("in_time", [True, False])
async def test_asked_to_end_it_lets_turns_finish_or_keeps_their_text(
    in_time: bool, user: User, key: str, anthropic: FakeAnthropic
) -> None:
    gate = Gate()
    anthropic.enqueue(Reply.text("what was shown", gate, " and the rest"))
    item = await prepare(user, "a prompt of some length")
    drain_seconds = services.START_SECONDS if in_time else 0.5
    with services.serve(environment(anthropic, DRAIN_SECONDS=drain_seconds)) as site:
        async with wire.network(key) as session:
            async with wire.open_socket(session, site.url, item.conversation.pk) as socket:
                assert (await socket.ask(item.command()))["type"] == "accepted"
                while not (shown := socket.view.text() if socket.view.seq else ""):  # an entry may only begin a block
                    await socket.next()
                ending = asyncio.ensure_future(asyncio.to_thread(site.terminate))
                assert (await socket.until("reconnect"))["within_seconds"] > 0
                assert await socket.closed() == 4503
            if in_time:
                with contextlib.suppress(aiohttp.ClientError):
                    async with wire.open_socket(session, site.url, item.conversation.pk) as too_late:
                        assert await too_late.closed() == 4503
                gate.open()
            started = time.monotonic()
            assert await ending == 0
            assert time.monotonic() - started < services.START_SECONDS / 2
        wire.assert_clean(site)
    turn = await Turn.objects.select_related("reply").aget()
    record = await UsageRecord.objects.aget()
    assert shown == "what was shown"
    if in_time:
        assert (turn.status, turn.reply.text) == ("completed", "what was shown and the rest")
        assert record.quality == "exact"
    else:
        assert (turn.status, turn.error_code, turn.reply.text) == ("interrupted", "shutdown", "what was shown")
        assert record.quality == "estimated"
        assert record.input_tokens > 0
        assert record.output_tokens > 0
        assert anthropic.requests[0].outcome == "aborted"
    assert await JournalEntry.objects.filter(turn=turn).acount() == turn.end_seq
