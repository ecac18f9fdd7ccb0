"""What the database itself refuses, whatever the code does."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from django.contrib.auth.models import AnonymousUser, User
from django.core.exceptions import ValidationError
from django.db import IntegrityError, connection, transaction
from django.db.models import ProtectedError
from django.db.models.functions import Now

from streaming_chat.models import Conversation, JournalEntry, Message, Participant, Turn, UsageRecord
from tests.integration.test_lease import queued

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.backends]

postgresql = pytest.mark.skipif(connection.vendor != "postgresql", reason="SQLite has no full-text column")
TOKEN = uuid.UUID(int=7)


@pytest.fixture
def turn(ann: User) -> Turn:
    return queued(ann)


def refused(act: Any, *args: Any, **kwargs: Any) -> str:
    """The database's complaint."""
    with pytest.raises(IntegrityError) as error, transaction.atomic():
        act(*args, **kwargs)
    return str(error.value)


def rows(turn: Turn) -> Any:
    return Turn.objects.filter(pk=turn.pk)


def message(conversation: Conversation, **fields: Any) -> Message:
    return Message.objects.create(conversation=conversation, **{"role": "user", **fields})


# ------------------------------------------------------------------------------------------------ turns


@pytest.mark.parametrize("status", ["queued", "running"])
def test_a_conversation_has_one_active_turn(turn: Turn, status: str) -> None:
    if status == "running":
        rows(turn).update(status="running", lease_token=TOKEN, lease_expires_at=Now())
    reply = message(turn.conversation, role="assistant", parent=turn.prompt)
    refused(Turn.objects.create, conversation=turn.conversation, prompt=turn.prompt, reply=reply)
    assert Turn.objects.count() == 1
    rows(turn).update(status="completed", lease_token=None, lease_expires_at=None, end_seq=0, finished_at=Now())
    Turn.objects.create(conversation=turn.conversation, prompt=turn.prompt, reply=reply)
    assert Turn.objects.count() == 2


def test_a_reply_has_one_turn(turn: Turn) -> None:
    rows(turn).update(status="failed", end_seq=0, finished_at=Now())
    refused(Turn.objects.create, conversation=turn.conversation, prompt=turn.prompt, reply=turn.reply)


@pytest.mark.parametrize(
    "change",
    [
        {"status": "running"},
        {"status": "running", "lease_token": TOKEN},
        {"status": "running", "lease_expires_at": Now()},
        {"lease_token": TOKEN},
        {"lease_expires_at": Now()},
        {"status": "completed", "end_seq": 1, "finished_at": Now(), "lease_token": TOKEN, "lease_expires_at": Now()},
        {"status": "completed"},
        {"status": "completed", "end_seq": 1},
        {"status": "failed", "finished_at": Now()},
        {"end_seq": 1},
        {"finished_at": Now()},
        {"status": "running", "lease_token": TOKEN, "lease_expires_at": Now(), "end_seq": 1},
        {"status": "paused"},
        {"status": ""},
    ],
)
def test_a_turn_that_makes_no_sense_is_refused(turn: Turn, change: dict[str, Any]) -> None:
    refused(rows(turn).update, **change)
    assert rows(turn).get().status == "queued"


@pytest.mark.parametrize("status", [s for s in Turn.Status.values if s not in ("queued", "running")])
def test_a_turn_may_end_in_each_terminal_status(turn: Turn, status: str) -> None:
    assert rows(turn).update(status=status, end_seq=0, finished_at=Now()) == 1
    assert not rows(turn).get().active


# ------------------------------------------------------------------------------------------------ the journal


def test_an_entry_has_its_number_once(turn: Turn, ann: User) -> None:
    JournalEntry.objects.create(turn=turn, seq=1, ops="[1]")
    with pytest.raises((IntegrityError, ValidationError)), transaction.atomic():
        JournalEntry.objects.bulk_create([JournalEntry(turn=turn, seq=1, ops="[2]")])
    JournalEntry.objects.create(turn=queued(ann), seq=1, ops="[3]")
    assert list(JournalEntry.objects.filter(turn=turn).values_list("seq", "ops")) == [(1, "[1]")]


@pytest.mark.parametrize("seq", [0, -1])
def test_entries_are_numbered_from_one(turn: Turn, seq: int) -> None:
    refused(JournalEntry.objects.bulk_create, [JournalEntry(turn=turn, seq=seq, ops="[]")])
    assert JournalEntry.objects.count() == 0


def test_an_entry_belongs_to_a_turn() -> None:
    refused(JournalEntry.objects.create, turn_id=uuid.uuid4(), seq=1, ops="[]")


# ------------------------------------------------------------------------------------------------ messages


def test_a_client_id_is_used_once_per_conversation(ann: User) -> None:
    first, second = (Conversation.objects.create(owner=ann) for _ in range(2))
    message(first, client_id="c1")
    refused(message, first, client_id="c1", role="assistant")
    message(second, client_id="c1")
    message(first)
    message(first)
    assert Message.objects.count() == 4


def test_a_message_is_not_its_own_parent(ann: User) -> None:
    own = message(Conversation.objects.create(owner=ann))
    refused(Message.objects.filter(pk=own.pk).update, parent=own.pk)


@pytest.mark.parametrize("role", ["system", "tool", ""])
def test_a_message_is_the_users_or_the_assistants(ann: User, role: str) -> None:
    refused(message, Conversation.objects.create(owner=ann), role=role)


def test_the_path_is_the_way_from_the_root(ann: User) -> None:
    conversation = Conversation.objects.create(owner=ann)
    root = message(conversation, text="root")
    left = message(conversation, parent=root, text="left", author=ann)
    right = message(conversation, parent=root, text="right")
    leaf = message(conversation, parent=right, text="leaf")

    def path(leaf_id: uuid.UUID | None, **limit: int) -> list[str]:
        return [step.text for step in conversation.messages.path(leaf_id, **limit)]

    assert path(leaf.pk) == ["root", "right", "leaf"]
    assert path(left.pk) == ["root", "left"]
    assert path(root.pk) == ["root"]
    assert path(None) == path(uuid.uuid4()) == []
    assert path(leaf.pk, limit=2) == ["right", "leaf"]
    assert path(leaf.pk, limit=1) == ["leaf"]
    assert path(leaf.pk, limit=9) == ["root", "right", "leaf"]


def test_a_path_of_thousands_is_found_in_its_order(ann: User) -> None:
    conversation = Conversation.objects.create(owner=ann)
    steps: list[Message] = []
    for number in range(1200):
        steps.append(
            Message(conversation=conversation, parent=steps[-1] if steps else None, role="user", text=str(number))
        )
    Message.objects.bulk_create(steps)
    assert [step.text for step in Message.objects.path(steps[-1].pk)] == [str(number) for number in range(1200)]
    assert [step.text for step in Message.objects.path(steps[-1].pk, limit=3)] == ["1197", "1198", "1199"]


def test_a_path_costs_one_query_and_holds_whole_messages(ann: User, django_assert_num_queries: Any) -> None:
    conversation = Conversation.objects.create(owner=ann)
    blocks = [{"type": "text", "text": "x", "citations": [{"a": None}]}]
    only = message(conversation, blocks=blocks, author=ann, client_id="c1")
    with django_assert_num_queries(1):
        [found] = Message.objects.path(only.pk)
        assert (found.blocks, found.author_id, found.client_id) == (blocks, ann.pk, "c1")
    assert found.created_at == Message.objects.get().created_at


# ------------------------------------------------------------------------------------------------ conversations


def test_a_conversation_is_visible_to_its_owner_and_participants_only(ann: User, bob: User, eve: User) -> None:
    conversation = Conversation.objects.create(owner=ann)
    Participant.objects.create(conversation=conversation, user=bob, role="viewer")
    bob_off = User.objects.get(pk=bob.pk)
    bob_off.is_active = False

    def visible(user: Any) -> list[Conversation]:
        return list(Conversation.objects.visible_to(user))

    assert visible(ann) == visible(bob) == [conversation]
    assert visible(eve) == visible(bob_off) == visible(AnonymousUser()) == []


def test_somebody_takes_part_once_and_in_a_known_role(ann: User, bob: User) -> None:
    conversation = Conversation.objects.create(owner=ann)
    Participant.objects.create(conversation=conversation, user=bob, role="viewer")
    refused(Participant.objects.create, conversation=conversation, user=bob, role="editor")
    refused(Participant.objects.create, conversation=conversation, user=ann, role="admin")
    assert Participant.objects.count() == 1


def test_every_change_raises_the_revision_by_one(ann: User) -> None:
    conversation = Conversation.objects.create(owner=ann)
    before = Conversation.objects.get()
    for _ in range(3):
        assert Conversation.objects.filter(pk=conversation.pk).touch() == 1
    after = Conversation.objects.get()
    assert (before.revision, after.revision) == (0, 3)
    assert after.updated_at >= before.updated_at


# ------------------------------------------------------------------------------------------------ usage


def test_a_usage_record_outlives_everything_it_tells_of(turn: Turn, ann: User) -> None:
    fields = {"turn": turn, "conversation": turn.conversation, "user": ann, "provider": "p", "model": "m"}
    record = UsageRecord.objects.create(**fields)
    try:
        ann.delete()
    except ProtectedError:  # pragma: no cover
        pytest.fail("usage protects its user")
    record.refresh_from_db()
    assert (record.turn_id, record.conversation_id, record.user_id, record.model) == (None, None, None, "m")
    assert (Conversation.objects.count(), Turn.objects.count(), Message.objects.count()) == (0, 0, 0)


@pytest.mark.parametrize("change", [{"quality": "exact"}, {"quality": "guess"}, {"finished_at": Now()}])
def test_a_usage_record_is_open_or_finished(turn: Turn, change: dict[str, Any]) -> None:
    record = UsageRecord.objects.create(turn=turn, provider="p", model="m")
    refused(UsageRecord.objects.filter(pk=record.pk).update, **change)


# ------------------------------------------------------------------------------------------------ names


def test_no_row_says_its_text_where_it_is_printed(turn: Turn, ann: User) -> None:
    secret = "sesame"
    conversation = Conversation(owner=ann, title=secret, system_prompt=secret)
    told = [
        conversation,
        Message(conversation=conversation, role="user", text=secret, blocks=[{"text": secret}], client_id=secret),
        Turn(conversation=conversation, stop_reason=secret),
        JournalEntry(turn=turn, seq=3, ops=secret),
        UsageRecord(request_id=secret, raw={"x": secret}),
        Participant(conversation=conversation, user=ann, role="viewer"),
    ]
    for row in told:
        assert secret not in f"{row} {row!r}"
    assert str(told[3]) == f"journal entry {turn.pk}/3"


# ------------------------------------------------------------------------------------------------ full text


@postgresql
def test_the_search_column_is_generated_and_indexed(ann: User) -> None:
    found = message(Conversation.objects.create(owner=ann), text="Grüße aus Wien, der Stadt")
    message(found.conversation, text="nothing of it")
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT is_generated FROM information_schema.columns"
            " WHERE table_name = 'streaming_chat_message' AND column_name = 'search'"
        )
        assert cursor.fetchall() == [("ALWAYS",)]
        cursor.execute("SELECT indexdef FROM pg_indexes WHERE indexname = 'message_search'")
        [(definition,)] = cursor.fetchall()
        assert "USING gin (search)" in definition
        cursor.execute("SELECT id FROM streaming_chat_message WHERE search @@ plainto_tsquery('simple', 'wien')")
        assert cursor.fetchall() == [(found.pk,)]
        Message.objects.filter(pk=found.pk).update(text="Paris")
        cursor.execute("SELECT id FROM streaming_chat_message WHERE search @@ plainto_tsquery('simple', 'wien')")
        assert cursor.fetchall() == []


def test_a_message_of_a_million_different_words_can_be_stored(ann: User) -> None:
    text = " ".join(f"{number:x}" for number in range(1_000_000))
    own = message(Conversation.objects.create(owner=ann), text=text)
    assert Message.objects.get(pk=own.pk).text == text
