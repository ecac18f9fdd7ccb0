"""Event loops that end before their turns do: a script's, a test's, a command's."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from uuid_utils.compat import uuid7

from streaming_chat import lifecycle, signals, turns
from streaming_chat.database import close_threads, in_database
from streaming_chat.generation import runner
from streaming_chat.generation.runner import get_runner
from streaming_chat.models import JournalEntry, UsageRecord
from streaming_chat.models import Turn as TurnRow
from streaming_chat.signals import turn_finished
from tests import providers
from tests.integration.conftest import Chat
from tests.providers import Script
from tests.screen import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.contrib.auth.models import User

pytestmark = [pytest.mark.backends, pytest.mark.django_db(transaction=True)]


def test_a_loop_that_ends_early_keeps_the_text_at_once(ann: User, script: Script, fast: Callable[..., None]) -> None:
    async def main() -> turns.StartedTurn:
        steps, (first, second, _) = providers.gated_answer("Hello ", "world")
        script.replies = [steps]
        conversation = await turns.create_conversation(ann)
        started = await turns.start_turn(ann, conversation.pk, text="Hi", client_id="1")
        await first.reached()
        first.open()
        await second.reached()
        return started

    started = asyncio.run(main())
    close_threads()

    turn = TurnRow.objects.select_related("reply").get(pk=started.id)
    assert (turn.status, turn.error_code) == ("interrupted", "shutdown")
    assert turn.reply.text == "Hello "
    assert turn.end_seq == JournalEntry.objects.filter(turn=turn).count()
    assert list(UsageRecord.objects.filter(turn=turn).values_list("quality", flat=True)) == ["estimated"]


def test_a_reply_is_returned_when_nothing_is_left_to_do(ann: User, script: Script, fast: Callable[..., None]) -> None:
    heard: list[str] = []

    async def listen(*, status: str, **_: object) -> None:
        await asyncio.sleep(0.05)
        heard.append(status)

    turn_finished.connect(listen)
    try:
        reply = asyncio.run(turns.stream_reply(ann, "Hi"))
    finally:
        turn_finished.disconnect(listen)
        close_threads()
    assert (reply.status, reply.text) == ("completed", "Hello")
    assert heard == ["completed"]


async def test_a_receiver_that_never_returns_holds_nothing_up(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(**_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(signals, "RECEIVER_SECONDS", 0.05)
    turn_finished.connect(hang)
    try:
        started = await chat.send(await chat.conversation())
        assert (await chat.ended(started.id)).status == "completed"
        await eventually(lambda: get_runner().running == 0)
    finally:
        turn_finished.disconnect(hang)


async def test_what_waits_in_the_queue_is_taken_at_the_start(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "CLAIM_SECONDS", 3600.0)
    conversation = await chat.conversation()
    ids = (uuid7(), uuid7(), uuid7())  # as a process leaves it that dies right after the commit
    turn, _, _ = await in_database(turns._accept_prompt, chat.user, conversation.pk, ids, "Hi", "c", None, None)
    await lifecycle.start()
    assert (await chat.ended(turn.pk)).reply.text == "Hello"
