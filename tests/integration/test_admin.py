"""The admin: what it finds, what it shows to whom, and that its cost does not grow with the rows."""

from __future__ import annotations

import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.db.models.functions import Now
from django.test import Client
from django.urls import reverse
from django.utils import timezone
from pytest_django import DjangoAssertNumQueries, Settings

from streaming_chat import admin as chat_admin
from streaming_chat.blocks import Block, text_block
from streaming_chat.models import Conversation, JournalEntry, Message, Turn, UsageRecord

pytestmark = pytest.mark.django_db

CANARY = "canary-7391"
MODELS = ["conversation", "turn", "usagerecord"]
MAX_LIST_QUERIES = 7
"""Session, user, two of permissions, count, rows, and the models of the filter."""


@pytest.fixture(autouse=True)
def static_root(settings: Settings, tmp_path: Path) -> None:
    """A place for the static files, which the middleware that serves them wants to exist."""
    settings.STATIC_ROOT = tmp_path


@pytest.fixture
def owner() -> User:
    return User.objects.create_user("olga", "olga@example.org")


def staff(*permissions: str) -> Client:
    user = User.objects.create_user(f"staff-{uuid.uuid4()}", is_staff=True)
    wanted = Permission.objects.filter(content_type__app_label="streaming_chat", codename__in=permissions)
    assert wanted.count() == len(permissions)
    user.user_permissions.set(wanted)
    client = Client()
    client.force_login(user)
    return client


@pytest.fixture
def reader() -> Client:
    """Sees lists and metadata, but no text."""
    return staff("view_conversation", "view_turn", "view_usagerecord")


@pytest.fixture
def reviewer() -> Client:
    """Reads transcripts, too."""
    return staff("view_conversation", "view_turn", "view_usagerecord", "view_message")


def talk(owner: User, number: int = 1, *, blocks: list[Block] | None = None, **fields: Any) -> Conversation:
    """A conversation of so many turns, with the canary in every text."""
    conversation = Conversation.objects.create(
        owner=owner, title=f"Title {CANARY}", system_prompt=f"System {CANARY}", options={"stop_sequences": [CANARY]}
    )
    for index in range(number):
        text = f"{CANARY} prompt {index}"
        prompt = Message.objects.create(
            conversation=conversation,
            parent_id=conversation.leaf_id,
            role="user",
            author=owner,
            blocks=[text_block(text)],
            text=text,
            client_id=f"{CANARY}-{index}",
        )
        shown = blocks or [text_block(f"{CANARY} reply {index}")]
        reply = Message.objects.create(conversation=conversation, parent=prompt, role="assistant", blocks=shown)
        ending = {"status": "completed", "stop_reason": "end_turn", "finished_at": Now(), "end_seq": 1}
        turn = Turn.objects.create(
            conversation=conversation,
            prompt=prompt,
            reply=reply,
            requested_by=owner,
            **{"provider": "anthropic", "model": "model-a", **ending, **fields},
        )
        UsageRecord.objects.create(
            turn=turn,
            conversation=conversation,
            user=owner,
            provider="anthropic",
            model="model-a",
            quality="exact",
            finished_at=Now(),
            input_tokens=12,
            output_tokens=34,
        )
        conversation.leaf = reply
        conversation.save(update_fields=["leaf"])
    return conversation


def address(name: str, *arguments: Any) -> str:
    return reverse(f"admin:streaming_chat_{name}", args=arguments)


def listed(client: Client, model: str, /, **query: str) -> list[str]:
    """The ids in a list, in its order."""
    response = client.get(address(f"{model}_changelist"), query)
    assert response.status_code == 200
    return [str(row.pk) for row in response.context["cl"].result_list]


# ------------------------------------------------------------------------------------------------ lists


@pytest.mark.parametrize("model", MODELS)
def test_a_list_costs_the_same_for_3_and_for_30_rows(
    reader: Client, owner: User, model: str, django_assert_max_num_queries: DjangoAssertNumQueries
) -> None:
    def cost() -> int:
        with django_assert_max_num_queries(MAX_LIST_QUERIES) as captured:
            assert reader.get(address(f"{model}_changelist")).status_code == 200
        return len(captured)

    for _ in range(3):
        talk(User.objects.create_user(str(uuid.uuid4())))
    few = cost()
    for _ in range(27):
        talk(User.objects.create_user(str(uuid.uuid4())))
    assert cost() == few


@pytest.mark.parametrize("model", MODELS)
def test_a_list_reads_no_text(
    reader: Client, owner: User, model: str, django_assert_max_num_queries: DjangoAssertNumQueries
) -> None:
    talk(owner)
    with django_assert_max_num_queries(MAX_LIST_QUERIES) as captured:
        reader.get(address(f"{model}_changelist"))
    statements = " ".join(query["sql"] for query in captured.captured_queries)
    for column in ("title", "system_prompt", "options", "blocks", "text"):
        assert f'"{column}"' not in statements


def test_a_list_counts_no_further_than_it_goes(reader: Client, owner: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_admin, "LISTED_ROWS", 2)
    conversations = [talk(owner) for _ in range(3)]
    response = reader.get(address("conversation_changelist"))
    assert response.context["cl"].result_count == 2
    newest = [str(conversation.pk) for conversation in reversed(conversations)]
    assert listed(reader, "conversation") == newest
    assert listed(reader, "conversation", all="") == newest
    assert listed(reader, "conversation", q=newest[-1]) == newest[-1:]


def test_ids_and_users_are_found(reader: Client, owner: User) -> None:
    conversation = talk(owner)
    talk(User.objects.create_user("other", "other@example.org"))
    turn = Turn.objects.get(conversation=conversation)
    record = UsageRecord.objects.get(turn=turn)
    for term in (str(conversation.pk), conversation.pk.hex, str(turn.pk), "olg", "OLGA@example", f" {turn.pk} "):
        assert listed(reader, "conversation", q=term) == [str(conversation.pk)], term
    for term in (str(conversation.pk), str(turn.pk), str(turn.reply_id), str(turn.prompt_id), "olga"):
        assert listed(reader, "turn", q=term) == [str(turn.pk)], term
    for term in (str(conversation.pk), str(turn.pk), str(record.pk), "olga"):
        assert listed(reader, "usagerecord", q=term) == [str(record.pk)], term


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("term", [CANARY, "Title", "prompt", '"', "%", "*", "x" * 10_000, str(uuid.UUID(int=7))])
def test_text_is_not_found(reader: Client, owner: User, model: str, term: str) -> None:
    talk(owner)
    assert listed(reader, model, q=term) == []


@pytest.mark.parametrize(
    "lookup",
    [
        {"title__startswith": "Title"},
        {"system_prompt__contains": CANARY},
        {"owner__password__startswith": "a"},
        {"messages__text__contains": CANARY},
        {"leaf__turn__status": "completed"},
    ],
)
def test_no_lookup_can_guess_a_text(reader: Client, owner: User, lookup: dict[str, str]) -> None:
    talk(owner)
    hit = reader.get(address("conversation_changelist"), lookup)
    miss = reader.get(address("conversation_changelist"), dict.fromkeys(lookup, "nonsense"))
    assert (hit.status_code, miss.status_code) == (400, 400)


def test_states_and_models_are_filtered(reader: Client, owner: User) -> None:
    done, failed = talk(owner), talk(owner, status="failed", error_code="provider_error", model="model-b")
    assert listed(reader, "conversation", status="failed") == [str(failed.pk)]
    assert listed(reader, "conversation", status="completed") == [str(done.pk)]
    turn = Turn.objects.get(conversation=failed)
    assert listed(reader, "turn", status="failed") == [str(turn.pk)]
    assert listed(reader, "turn", model="model-b") == [str(turn.pk)]
    assert listed(reader, "turn", model="model-c") == []
    UsageRecord.objects.filter(turn=turn).update(quality="estimated")
    assert listed(reader, "usagerecord", quality="estimated") == [str(UsageRecord.objects.get(turn=turn).pk)]
    filters = reader.get(address("turn_changelist")).context["cl"].filter_specs
    assert [value for value, _ in filters[2].lookup_choices] == ["model-a", "model-b"]


@pytest.mark.parametrize("model", MODELS)
def test_the_period_is_filtered_by_the_age_of_the_id(reader: Client, owner: User, model: str) -> None:
    talk(owner)
    assert len(listed(reader, model, days="1")) == 1
    assert len(listed(reader, model, days="nonsense")) == 1
    old = timezone.now() - timedelta(days=10)
    key = uuid.UUID(int=chat_admin._first_id(old).int + 1)
    UsageRecord.objects.create(id=key, provider="anthropic", model="model-a")
    if model == "usagerecord":
        assert len(listed(reader, model, days="7")) == 1
        assert len(listed(reader, model, days="30")) == 2


@pytest.mark.parametrize("model", MODELS)
def test_nothing_can_be_added_or_changed(owner: User, model: str, admin_client: Client) -> None:
    talk(owner)
    key = listed(admin_client, model)[0]
    assert admin_client.get(address(f"{model}_add")).status_code == 403
    before = list(Turn.objects.values())
    assert admin_client.post(address(f"{model}_change", key), {"status": "failed"}).status_code == 403
    assert list(Turn.objects.values()) == before


@pytest.mark.parametrize("model", MODELS)
def test_the_page_of_a_row_shows_its_facts_but_no_text(admin_client: Client, owner: User, model: str) -> None:
    talk(owner)
    key = listed(admin_client, model)[0]
    for page in (address(f"{model}_changelist"), address(f"{model}_change", key), address(f"{model}_history", key)):
        response = admin_client.get(page)
        assert response.status_code == 200
        assert CANARY not in response.text
        assert key in response.text


@pytest.mark.parametrize("model", MODELS)
def test_without_the_permission_there_is_no_list(model: str) -> None:
    assert staff("view_message").get(address(f"{model}_changelist")).status_code == 403


# ------------------------------------------------------------------------------------------------ deleting


def test_a_conversation_is_deleted_with_everything_but_its_usage(owner: User) -> None:
    conversation, other = talk(owner, 2), talk(owner)
    turn = Turn.objects.filter(conversation=conversation).first()
    assert turn is not None
    JournalEntry.objects.create(turn=turn, seq=1, ops="[]")
    client = staff("view_conversation", "delete_conversation")
    page = client.get(address("conversation_delete", conversation.pk))
    assert page.status_code == 200
    assert CANARY not in page.text
    assert page.context["model_count"] == {"messages": 4, "turns": 2}.items()
    done = client.post(address("conversation_delete", conversation.pk), {"post": "yes"}, follow=True)
    assert done.status_code == 200
    assert CANARY not in done.text
    assert list(Conversation.objects.all()) == [other]
    assert (Message.objects.count(), Turn.objects.count(), JournalEntry.objects.count()) == (2, 1, 0)
    assert UsageRecord.objects.filter(turn=None, conversation=None, user=owner).count() == 2
    assert LogEntry.objects.get().object_repr == f"conversation {conversation.pk}"


@pytest.mark.parametrize("model", MODELS)
def test_deleting_needs_the_permission_and_is_for_conversations_only(
    reader: Client, admin_client: Client, owner: User, model: str
) -> None:
    talk(owner)
    key = listed(reader, model)[0]
    for client in (reader, admin_client):
        if (client, model) != (admin_client, "conversation"):
            assert client.post(address(f"{model}_delete", key), {"post": "yes"}).status_code == 403
    assert (Conversation.objects.count(), Turn.objects.count(), UsageRecord.objects.count()) == (1, 1, 1)


# ------------------------------------------------------------------------------------------------ the transcript


def transcript(conversation: Conversation) -> str:
    return address("conversation_transcript", conversation.pk)


def test_a_transcript_shows_who_said_what_when_and_at_what_cost(reviewer: Client, owner: User) -> None:
    conversation = talk(owner, 2)
    page = reviewer.get(transcript(conversation))
    assert page.status_code == 200
    entries = page.context["entries"]
    assert [(entry["message"].role, entry["author"], entry["parts"]) for entry in entries] == [
        ("user", "olga", [{"text": f"{CANARY} prompt 0"}]),
        ("assistant", None, [{"text": f"{CANARY} reply 0"}]),
        ("user", "olga", [{"text": f"{CANARY} prompt 1"}]),
        ("assistant", None, [{"text": f"{CANARY} reply 1"}]),
    ]
    for words in ("user: olga", f"Title {CANARY}", f"System {CANARY}", "completed", "end_turn", "model-a"):
        assert words in page.text
    assert "12 tokens in, 0 from the cache, 34 out" in page.text
    assert "no-store" in page["Cache-Control"]


def test_text_is_escaped_and_other_blocks_are_folded_json(reviewer: Client, owner: User) -> None:
    blocks: list[Block] = [
        {"type": "thinking", "thinking": "<b>hm</b> ő", "signature": "s"},
        text_block("<script>alert(1)</script>\n  two"),
        text_block(" cited"),
        {"type": "server_tool_use", "id": "1", "name": "web_search", "input": {"query": "</pre>"}},
        text_block("end"),
    ]
    page = reviewer.get(transcript(talk(owner, blocks=blocks)))
    parts = page.context["entries"][1]["parts"]
    assert [part.get("text") or part["kind"] for part in parts] == [
        "thinking",
        "<script>alert(1)</script>\n  two cited",
        "server_tool_use",
        "end",
    ]
    assert orjson.loads(parts[0]["json"]) == blocks[0]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\n  two cited" in page.text
    assert "<script>alert" not in page.text
    assert "&lt;b&gt;hm&lt;/b&gt; ő" in page.text
    assert "&lt;/pre&gt;" in page.text


def test_only_the_current_branch_is_shown(reviewer: Client, owner: User) -> None:
    conversation = talk(owner)
    Message.objects.create(
        conversation=conversation, role="user", author=owner, blocks=[text_block("elsewhere")], text="elsewhere"
    )
    page = reviewer.get(transcript(conversation))
    assert "elsewhere" not in page.text
    assert len(page.context["entries"]) == 2


def test_a_running_turn_shows_its_text_so_far(reviewer: Client, owner: User) -> None:
    conversation = talk(owner)
    turn = Turn.objects.get()
    Message.objects.filter(pk=turn.reply_id).update(blocks=[])
    Turn.objects.filter(pk=turn.pk).update(
        status="running", finished_at=None, end_seq=None, lease_token=uuid.uuid4(), lease_expires_at=Now()
    )
    ops = [
        [{"op": "start", "index": 0, "block": {"type": "text", "text": ""}}],
        [{"op": "append", "index": 0, "field": "text", "text": "so far"}],
    ]
    for seq, entry in enumerate(ops, 1):
        JournalEntry.objects.create(turn=turn, seq=seq, ops=orjson.dumps(entry).decode())
    page = reviewer.get(transcript(conversation))
    assert page.context["entries"][1]["parts"] == [{"text": "so far"}]
    assert "running" in page.text


def test_a_failed_turn_says_why(reviewer: Client, owner: User) -> None:
    page = reviewer.get(transcript(talk(owner, status="failed", error_code="stream_cut", stop_reason="")))
    assert "The reply was cut off. What you see is saved. (stream_cut)" in page.text


def test_pages_hold_50_messages_and_lose_none(reviewer: Client, owner: User) -> None:
    conversation = talk(owner, 60)
    seen: list[str] = []
    page = reviewer.get(transcript(conversation))
    sizes = []
    while True:
        entries = page.context["entries"]
        sizes.append(len(entries))
        seen = [str(entry["message"].pk) for entry in entries] + seen
        before = page.context["before"]
        if before is None:
            break
        assert f'href="?before={before}"' in page.text
        page = reviewer.get(transcript(conversation), {"before": before})
        assert 'href="?"' in page.text
    assert sizes == [50, 50, 20]
    assert seen == [str(message.pk) for message in Message.objects.path(conversation.leaf_id)]


def test_before_must_be_a_message_of_the_conversation(reviewer: Client, owner: User) -> None:
    conversation, other = talk(owner), talk(owner)
    for before in ("nonsense", str(other.leaf_id), str(uuid.UUID(int=1))):
        assert reviewer.get(transcript(conversation), {"before": before}).status_code == 404


def test_a_transcript_costs_the_same_for_3_and_for_60_messages(
    reviewer: Client, owner: User, django_assert_max_num_queries: DjangoAssertNumQueries
) -> None:
    def cost(conversation: Conversation) -> int:
        with django_assert_max_num_queries(9) as captured:
            assert reviewer.get(transcript(conversation)).status_code == 200
        return len(captured)

    short = talk(owner)
    long = talk(owner, 30)
    for message in Message.objects.filter(conversation=long, role="user"):
        message.author = User.objects.create_user(str(message.pk))
        message.save()
    assert cost(long) == cost(short)


def test_an_empty_conversation_has_an_empty_transcript(reviewer: Client, owner: User) -> None:
    page = reviewer.get(transcript(Conversation.objects.create(owner=owner)))
    assert "There are no messages." in page.text


@pytest.mark.parametrize(
    "permissions", [(), ("view_conversation",), ("view_message",), ("view_turn", "view_message", "change_conversation")]
)
def test_a_transcript_needs_both_permissions(owner: User, permissions: tuple[str, ...]) -> None:
    page = staff(*permissions).get(transcript(talk(owner)))
    assert page.status_code == 403
    assert CANARY not in page.text


def test_a_transcript_is_not_for_people_who_are_no_staff(client: Client, owner: User) -> None:
    owner.user_permissions.set(Permission.objects.filter(content_type__app_label="streaming_chat"))
    client.force_login(owner)
    page = client.get(transcript(talk(owner)))
    assert page.status_code == 302
    assert page["Location"].startswith("/admin/login/")


def test_only_those_who_may_read_are_led_to_the_transcript(reader: Client, reviewer: Client, owner: User) -> None:
    conversation = talk(owner)
    page = address("conversation_change", conversation.pk)
    assert transcript(conversation) not in reader.get(page).text
    assert transcript(conversation) in reviewer.get(page).text


def test_admin_pages_fit_the_content_security_policy(reviewer: Client, owner: User) -> None:
    page = reviewer.get(transcript(talk(owner)))
    assert "<style" not in page.text
    assert "style=" not in page.text
    assert "onclick" not in page.text
