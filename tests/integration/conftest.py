"""One chat per test: the real database, layer, journal, runner and hub, with a scripted provider."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeVar

import pytest
from channels.layers import channel_layers
from django.contrib.auth.models import User
from pytest_django import Settings

from streaming_chat import lifecycle, turns
from streaming_chat.database import close_threads, in_database
from streaming_chat.generation.runner import get_runner
from streaming_chat.hub import ConversationViewer, get_hub
from streaming_chat.journal import get_journal
from streaming_chat.models import Conversation, JournalEntry, Message, Participant, Turn, UsageRecord
from streaming_chat.protocol import Cursor
from tests import providers
from tests.providers import Script
from tests.screen import Screen, eventually

T = TypeVar("T")

FAST = {
    "PROVIDER": "tests.providers.ScriptedProvider",
    "TICK_SECONDS": 0.005,
    "POSITIONING_SECONDS": 0.05,
    "PROGRESS_SECONDS": 0.1,
    "DRAIN_SECONDS": 0.01,
}


@pytest.fixture
def ann(transactional_db: None) -> User:
    return User.objects.create_user("ann")


@pytest.fixture
def bob(transactional_db: None) -> User:
    return User.objects.create_user("bob")


@pytest.fixture
def eve(transactional_db: None) -> User:
    return User.objects.create_user("eve")


@pytest.fixture
def script() -> Iterator[Script]:
    """What the provider does in this test."""
    script = Script()
    providers.current.append(script)
    yield script
    providers.current.pop()


@pytest.fixture
def fast(settings: Settings) -> Callable[..., None]:
    """Settings for tests; call it to change some."""

    def change(**changes: Any) -> None:
        settings.STREAMING_CHAT = {**FAST, **changes}

    change()
    return change


class Chat:
    """The use cases of one user, and a look into the database."""

    def __init__(self, user: User, script: Script) -> None:
        self.user = user
        self.script = script

    async def conversation(self, **fields: Any) -> Conversation:
        return await turns.create_conversation(self.user, **fields)

    async def join(self, conversation: Conversation, user: User, role: str) -> None:
        await in_database(Participant.objects.create, conversation=conversation, user=user, role=role)

    async def send(
        self, conversation: Conversation, text: str = "Hi", user: User | None = None, **options: Any
    ) -> turns.StartedTurn:
        options.setdefault("client_id", str(uuid.uuid4()))
        return await turns.start_turn(user or self.user, conversation.pk, text=text, **options)

    async def turn(self, turn_id: uuid.UUID) -> Turn:
        return await in_database(Turn.objects.select_related("reply", "conversation").get, pk=turn_id)

    async def reply(self, turn_id: uuid.UUID) -> Message:
        return (await self.turn(turn_id)).reply

    async def ended(self, turn_id: uuid.UUID) -> Turn:
        """The turn, once it is over."""

        async def is_over() -> bool:
            return not (await self.turn(turn_id)).active

        await eventually(is_over)
        return await self.turn(turn_id)

    async def entries(self, turn_id: uuid.UUID) -> list[tuple[int, str]]:
        return await in_database(
            lambda: list(JournalEntry.objects.filter(turn_id=turn_id).order_by("seq").values_list("seq", "ops"))
        )

    async def usage(self, turn_id: uuid.UUID) -> list[UsageRecord]:
        return await in_database(
            lambda: list(UsageRecord.objects.filter(turn_id=turn_id).order_by("requested_at", "id"))
        )

    async def committed(self, turn_id: uuid.UUID, seq: int) -> None:
        """Wait until entry ``seq`` is in the database."""

        async def is_there() -> bool:
            return len(await self.entries(turn_id)) >= seq

        await eventually(is_there)

    async def counts(self) -> dict[str, int]:
        """How many rows there are, to see that a refusal changed nothing."""
        tables = (Conversation, Message, Turn, JournalEntry, UsageRecord, Participant)
        found = await in_database(lambda: {table.__name__: table._default_manager.count() for table in tables})
        revisions = await in_database(lambda: sum(Conversation.objects.values_list("revision", flat=True)))
        return {**found, "revisions": revisions}

    def view(
        self,
        conversation: Conversation | uuid.UUID,
        *,
        user: User | None = None,
        token: str | None = None,
        screen: Screen | None = None,
    ) -> tuple[ConversationViewer, Screen]:
        """A viewer in a task of the hub's, and what it shows."""
        key = conversation if isinstance(conversation, uuid.UUID) else conversation.pk
        viewer = get_hub().watch(key, lambda: user or self.user, None if token is None else Cursor.parse(token))
        screen = screen or Screen()
        get_hub().pump(viewer, screen.show)
        return viewer, screen

    async def apart(self, conversation: Conversation) -> None:
        """From now on the hub hears of everything only from the channel layer, like one of another process."""
        viewer, screen = self.view(conversation)
        await screen.until(lambda screen: "snapshot" in screen.kinds)
        viewer.close()
        get_journal.forget()


@pytest.fixture
async def chat(ann: User, script: Script, fast: Callable[..., None]) -> AsyncIterator[Chat]:
    """A chat of Ann's. Afterwards nothing of it is left: no task, no connection, no instance of this loop."""
    yield Chat(ann, script)
    await lifecycle.stop()
    for per_loop in (get_runner, get_hub, get_journal):
        per_loop.forget()
    for layer in channel_layers.backends.values():
        with contextlib.suppress(AttributeError):
            await layer.close_connections() if hasattr(layer, "close_connections") else await layer.flush()
    channel_layers.backends.clear()
    close_threads()
