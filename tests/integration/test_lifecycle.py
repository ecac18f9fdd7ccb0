"""Event loops that end before their turns do: a script's, a test's, a command's."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from streaming_chat import turns
from streaming_chat.database import close_threads
from streaming_chat.models import JournalEntry, UsageRecord
from streaming_chat.models import Turn as TurnRow
from tests import providers
from tests.providers import Script

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
