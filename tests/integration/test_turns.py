"""The use cases, from the call to the database, the provider and the viewers."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.contrib.auth.models import AnonymousUser, User
from django.db import connection, connections, transaction
from django.db.models.functions import Now

from streaming_chat import turns
from streaming_chat.database import in_database
from streaming_chat.exceptions import (
    BusyError,
    ChatError,
    ConflictError,
    DrainingError,
    ForbiddenError,
    InvalidInputError,
    NotFoundError,
)
from streaming_chat.generation import lease
from streaming_chat.generation.runner import get_runner
from streaming_chat.models import Conversation, JournalEntry, Message, Turn
from streaming_chat.signals import turn_finished
from tests.integration.conftest import Chat
from tests.providers import ALIVE, BEGAN, Gate, answer, append, gated_answer, start
from tests.screen import eventually

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.backends]


@pytest.fixture
def finished() -> Iterator[list[tuple[uuid.UUID, str]]]:
    """Every ``turn_finished`` that was sent."""
    heard: list[tuple[uuid.UUID, str]] = []

    def listen(*, turn_id: uuid.UUID, status: str, **kwargs: Any) -> None:
        heard.append((turn_id, status))

    turn_finished.connect(listen)
    yield heard
    turn_finished.disconnect(listen)


# ------------------------------------------------------------------------------------------------ a turn


async def test_a_prompt_is_answered_and_both_are_stored(chat: Chat, finished: list[Any]) -> None:
    chat.script.replies = [answer("Hel", "lo ", "שלום \N{GRINNING FACE} e\u0301 a\u2028b")]
    conversation = await chat.conversation(system_prompt="Be short.", model="m-1", options={"max_tokens": 9})
    started = await chat.send(conversation, "  Good day\r\nto you\n")
    turn = await chat.ended(started.id)

    assert started.duplicate is False
    assert (turn.status, turn.stop_reason, turn.error_code) == ("completed", "end_turn", "")
    assert (turn.provider, turn.model, turn.attempt) == ("scripted", "scripted-1", 1)
    assert turn.reply.text == "Hello שלום \N{GRINNING FACE} e\u0301 a\u2028b"
    assert turn.reply.blocks == [{"type": "text", "text": turn.reply.text}]
    assert turn.end_seq == len(await chat.entries(turn.pk)) >= 1
    prompt = await in_database(Message.objects.get, pk=started.prompt_id)
    assert (prompt.text, prompt.role, prompt.author_id) == ("Good day\nto you", "user", chat.user.pk)
    assert (turn.reply.parent_id, turn.reply.role, turn.reply.author_id) == (prompt.pk, "assistant", None)
    conversation = await in_database(Conversation.objects.get, pk=conversation.pk)
    assert (conversation.leaf_id, conversation.title, conversation.revision) == (turn.reply_id, "Good day", 2)
    [request] = chat.script.requests
    assert (request.model, request.system, request.max_tokens) == ("m-1", "Be short.", 9)
    assert [(m.role, m.blocks) for m in request.messages] == [
        ("user", [{"type": "text", "text": "Good day\nto you"}]),
    ]
    await eventually(lambda: finished == [(turn.pk, "completed")])


async def test_the_next_turn_is_asked_with_the_whole_branch(chat: Chat) -> None:
    conversation = await chat.conversation()
    await chat.ended((await chat.send(conversation, "one")).id)
    await chat.ended((await chat.send(conversation, "two")).id)
    assert [(m.role, m.blocks[0]["text"]) for m in chat.script.requests[1].messages] == [
        ("user", "one"),
        ("assistant", "Hello"),
        ("user", "two"),
    ]


async def test_a_refused_turn_is_left_out_of_the_history_but_not_when_it_is_regenerated(chat: Chat) -> None:
    from streaming_chat.providers.base import Ended

    refusal = [BEGAN, start(), append("I can"), Ended(stop_reason="refusal", details={"category": "x"})]
    chat.script.replies = [refusal, answer("Sure")]
    conversation = await chat.conversation()
    refused = await chat.ended((await chat.send(conversation, "bad")).id)
    assert (refused.status, refused.stop_reason, refused.stop_details) == ("completed", "refusal", {"category": "x"})
    await chat.ended((await chat.send(conversation, "good")).id)
    assert [m.blocks[0]["text"] for m in chat.script.requests[1].messages] == ["good"]
    again = await turns.regenerate_turn(chat.user, conversation.pk, message_id=refused.reply_id, client_id="again")
    await chat.ended(again.id)
    assert [m.blocks[0]["text"] for m in chat.script.requests[2].messages] == ["bad"]


async def test_a_turn_nobody_announced_is_claimed_all_the_same(chat: Chat) -> None:
    conversation = await chat.conversation()
    ids = (uuid.uuid4(), uuid.uuid4(), uuid.uuid4())
    await in_database(turns._accept_prompt, chat.user, conversation.pk, ids, "Hi", "c1", None, None)
    get_runner().start()
    assert (await chat.ended(ids[0])).status == "completed"


# ------------------------------------------------------------------------------------------------ once and only once


async def test_ten_tabs_that_send_the_same_at_once_start_one_turn(chat: Chat) -> None:
    conversation = await chat.conversation()
    started = await asyncio.gather(*(chat.send(conversation, "Hi", client_id="c1") for _ in range(10)))
    assert len({(one.id, one.prompt_id, one.reply_id) for one in started}) == 1
    assert sorted(one.duplicate for one in started) == [False] + [True] * 9
    await chat.ended(started[0].id)
    counts = await chat.counts()
    assert (counts["Turn"], counts["Message"], counts["UsageRecord"]) == (1, 2, 1)
    assert len(chat.script.requests) == 1


async def test_ten_tabs_that_send_their_own_at_once_start_one_turn_and_nine_are_told_it_is_busy(chat: Chat) -> None:
    gate = Gate()
    chat.script.replies = [[BEGAN, start(), gate, *answer()[2:]]]
    conversation = await chat.conversation()
    results = await asyncio.gather(*(chat.send(conversation) for _ in range(10)), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["BusyError"] * 9 + ["StartedTurn"]
    counts = await chat.counts()
    assert (counts["Turn"], counts["Message"]) == (1, 2)
    gate.open()
    await chat.ended(next(result.id for result in results if isinstance(result, turns.StartedTurn)))
    assert len(chat.script.requests) == 1


async def test_the_same_id_is_answered_with_the_first_turn_even_after_its_end(chat: Chat) -> None:
    conversation = await chat.conversation()
    first = await chat.send(conversation, "Hi", client_id="c1")
    await chat.ended(first.id)
    before = await chat.counts()
    again = await chat.send(conversation, " Hi\n", client_id="c1")
    assert (again.id, again.prompt_id, again.reply_id, again.duplicate) == (
        first.id,
        first.prompt_id,
        first.reply_id,
        True,
    )
    assert await chat.counts() == before
    assert len(chat.script.requests) == 1


async def test_the_same_id_with_other_text_is_a_conflict(chat: Chat) -> None:
    conversation = await chat.conversation()
    await chat.ended((await chat.send(conversation, "Hi", client_id="c1")).id)
    before = await chat.counts()
    with pytest.raises(ConflictError):
        await chat.send(conversation, "Ho", client_id="c1")
    assert await chat.counts() == before


async def test_the_same_id_in_another_conversation_is_another_message(chat: Chat) -> None:
    first, second = await chat.conversation(), await chat.conversation()
    one = await chat.send(first, client_id="c1")
    two = await chat.send(second, client_id="c1")
    assert one.id != two.id
    assert not two.duplicate
    await chat.ended(one.id)
    await chat.ended(two.id)


async def test_a_second_prompt_while_one_is_answered_is_refused_and_changes_nothing(chat: Chat) -> None:
    steps, gates = gated_answer("Hello")
    chat.script.replies = [steps]
    conversation = await chat.conversation()
    started = await chat.send(conversation)
    await gates[0].reached()
    await chat.committed(started.id, 1)
    before = await chat.counts()
    with pytest.raises(BusyError):
        await chat.send(conversation, "again")
    with pytest.raises(BusyError):
        await turns.regenerate_turn(chat.user, conversation.pk, message_id=started.reply_id, client_id="c9")
    assert await chat.counts() == before
    for gate in gates:
        gate.open()
    assert (await chat.ended(started.id)).status == "completed"


# ------------------------------------------------------------------------------------------------ input


@pytest.mark.parametrize(
    ("text", "client_id", "code", "field"),
    [
        ("", "c", "bad_text", "text"),
        (" \n\t", "c", "bad_text", "text"),
        ("a\x00b", "c", "bad_text", "text"),
        ("a\ud800b", "c", "bad_text", "text"),
        ("a\x1b[0m", "c", "bad_text", "text"),
        ("x" * 32_001, "c", "too_large", "text"),
        ("Hi", "", "bad_field", "client_id"),
        ("Hi", "x" * 65, "bad_field", "client_id"),
        ("Hi", "a\nb", "bad_field", "client_id"),
        ("Hi", "a\x00b", "bad_field", "client_id"),
    ],
)
async def test_a_prompt_that_can_not_be_stored_is_refused(
    chat: Chat, text: str, client_id: str, code: str, field: str
) -> None:
    conversation = await chat.conversation()
    before = await chat.counts()
    with pytest.raises(InvalidInputError) as refused:
        await chat.send(conversation, text, client_id=client_id)
    assert (refused.value.code, refused.value.field) == (code, field)
    assert await chat.counts() == before


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"options": {"temperature": 1}}, "options.temperature"),
        ({"options": {"max_tokens": "many"}}, "options.max_tokens"),
        ({"options": {"max_tokens": 0}}, "options.max_tokens"),
        ({"system_prompt": "a\x00b"}, "system_prompt"),
        ({"model": "m" * 101}, "model"),
        ({"model": "a\x00b"}, "model"),
    ],
)
async def test_a_conversation_that_can_not_be_stored_is_refused(chat: Chat, fields: dict[str, Any], field: str) -> None:
    before = await chat.counts()
    with pytest.raises(InvalidInputError) as refused:
        await chat.conversation(**fields)
    assert refused.value.field == field
    assert await chat.counts() == before


async def test_a_title_is_made_storable_and_short(chat: Chat) -> None:
    assert (await chat.conversation(title="a\x00b\n\tc" + "d" * 300)).title == "ab c" + "d" * 196


# ------------------------------------------------------------------------------------------------ rights


ACTS: dict[str, Callable[[User | AnonymousUser, Turn], Any]] = {
    "send": lambda user, turn: turns.start_turn(user, turn.conversation_id, text="x", client_id="x"),
    "regenerate": lambda user, turn: turns.regenerate_turn(
        user, turn.conversation_id, message_id=turn.reply_id, client_id="x"
    ),
    "stop": lambda user, turn: turns.stop_turn(user, turn.conversation_id, turn.pk),
    "rename": lambda user, turn: turns.update_conversation(user, turn.conversation_id, title="x"),
    "archive": lambda user, turn: turns.update_conversation(user, turn.conversation_id, archived=True),
    "delete": lambda user, turn: turns.delete_conversation(user, turn.conversation_id),
}
REFUSED: dict[str, dict[str, type[ChatError] | None]] = {
    "owner": dict.fromkeys(ACTS),
    "owning participant": dict.fromkeys(ACTS),
    "editor": {**dict.fromkeys(ACTS), "delete": ForbiddenError},
    "viewer": dict.fromkeys(ACTS, ForbiddenError),
    "stranger": dict.fromkeys(ACTS, NotFoundError),
    "inactive owner": dict.fromkeys(ACTS, NotFoundError),
    "nobody": dict.fromkeys(ACTS, NotFoundError),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("who", REFUSED)
async def test_everybody_may_do_what_their_role_allows_and_nothing_else(
    chat: Chat, bob: User, who: str, act: str
) -> None:
    conversation = await chat.conversation()
    turn = await chat.ended((await chat.send(conversation)).id)
    user: User | AnonymousUser = bob
    if who in ("editor", "viewer"):
        await chat.join(conversation, bob, who)
    elif who == "owning participant":
        await chat.join(conversation, bob, "owner")
    elif who == "nobody":
        user = AnonymousUser()
    elif "owner" in who:
        user = chat.user
        user.is_active = who == "owner"
    before = await chat.counts()
    refusal = REFUSED[who][act]
    if refusal is None:
        result = await ACTS[act](user, turn)
        if isinstance(result, turns.StartedTurn):
            await chat.ended(result.id)
        if act != "stop":  # there is nothing left to stop
            assert await chat.counts() != before
    else:
        with pytest.raises(refusal):
            await ACTS[act](user, turn)
        assert await chat.counts() == before


async def test_nobody_can_not_create_a_conversation(chat: Chat) -> None:
    with pytest.raises(ForbiddenError):
        await turns.create_conversation(AnonymousUser())
    assert (await chat.counts())["Conversation"] == 0


async def test_what_is_in_another_conversation_is_not_found_from_this_one(chat: Chat) -> None:
    mine, other = await chat.conversation(), await chat.conversation()
    turn = await chat.ended((await chat.send(other)).id)
    before = await chat.counts()
    with pytest.raises(NotFoundError):
        await chat.send(mine, parent_id=turn.reply_id)
    with pytest.raises(NotFoundError):
        await turns.regenerate_turn(chat.user, mine.pk, message_id=turn.reply_id, client_id="c9")
    with pytest.raises(NotFoundError):
        await turns.stop_turn(chat.user, mine.pk, turn.pk)
    with pytest.raises(NotFoundError):
        await turns.stop_turn(chat.user, mine.pk, uuid.uuid4())
    assert await chat.counts() == before


# ------------------------------------------------------------------------------------------------ branches


async def test_editing_a_prompt_makes_a_branch_and_keeps_the_old_one(chat: Chat) -> None:
    conversation = await chat.conversation()
    first = await chat.ended((await chat.send(conversation, "one")).id)
    second = await chat.ended((await chat.send(conversation, "two")).id)
    edited = await chat.ended((await chat.send(conversation, "2", parent_id=first.reply_id)).id)
    restarted = await chat.ended((await chat.send(conversation, "1", parent_id="root")).id)

    async def path(turn: Turn) -> list[str]:
        return [message.text for message in await in_database(Message.objects.path, turn.reply_id)]

    assert await path(second) == ["one", "Hello", "two", "Hello"]
    assert await path(edited) == ["one", "Hello", "2", "Hello"]
    assert await path(restarted) == ["1", "Hello"]
    assert [m.blocks[0]["text"] for m in chat.script.requests[2].messages] == ["one", "Hello", "2"]
    assert (await chat.turn(restarted.pk)).conversation.leaf_id == restarted.reply_id


async def test_a_prompt_can_not_follow_a_prompt(chat: Chat) -> None:
    conversation = await chat.conversation()
    turn = await chat.ended((await chat.send(conversation)).id)
    before = await chat.counts()
    with pytest.raises(ForbiddenError) as refused:
        await chat.send(conversation, parent_id=turn.prompt_id)
    assert refused.value.field == "parent_id"
    assert await chat.counts() == before


async def test_regenerating_answers_the_same_prompt_beside_the_old_reply(chat: Chat) -> None:
    chat.script.replies = [answer("Hello"), answer("Hi there")]
    conversation = await chat.conversation()
    first = await chat.ended((await chat.send(conversation, "one")).id)
    again = await turns.regenerate_turn(chat.user, conversation.pk, message_id=first.reply_id, client_id="r1")
    second = await chat.ended(again.id)
    assert (second.prompt_id, second.reply.parent_id, second.reply.text) == (
        first.prompt_id,
        first.prompt_id,
        "Hi there",
    )
    assert (await chat.reply(first.pk)).text == "Hello"
    assert second.conversation.leaf_id == second.reply_id
    assert [m.blocks[0]["text"] for m in chat.script.requests[1].messages] == ["one"]


async def test_regenerating_twice_with_one_id_is_one_turn(chat: Chat) -> None:
    conversation = await chat.conversation()
    first = await chat.ended((await chat.send(conversation, "one", client_id="c1")).id)
    results = await asyncio.gather(
        *(
            turns.regenerate_turn(chat.user, conversation.pk, message_id=first.reply_id, client_id="r1")
            for _ in range(5)
        )
    )
    assert len({result.id for result in results}) == 1
    assert sorted(result.duplicate for result in results) == [False, True, True, True, True]
    await chat.ended(results[0].id)
    before = await chat.counts()
    for client_id in ("c1", "r1"):
        with pytest.raises(ConflictError):
            await chat.send(conversation, "other", client_id=client_id)
    with pytest.raises(ConflictError):
        await turns.regenerate_turn(chat.user, conversation.pk, message_id=first.reply_id, client_id="c1")
    assert await chat.counts() == before
    assert len(chat.script.requests) == 2


async def test_a_prompt_can_not_be_regenerated(chat: Chat) -> None:
    conversation = await chat.conversation()
    turn = await chat.ended((await chat.send(conversation)).id)
    before = await chat.counts()
    with pytest.raises(ForbiddenError):
        await turns.regenerate_turn(chat.user, conversation.pk, message_id=turn.prompt_id, client_id="r1")
    assert await chat.counts() == before


# ------------------------------------------------------------------------------------------------ stop


async def test_stopping_keeps_what_was_shown_and_closes_the_provider(chat: Chat, finished: list[Any]) -> None:
    steps, gates = gated_answer("Hello", " world")
    chat.script.replies = [steps]
    conversation = await chat.conversation()
    started = await chat.send(conversation)
    gates[0].open()
    await gates[1].reached()
    assert await turns.stop_turn(chat.user, conversation.pk, started.id) == "stopped"
    turn = await chat.turn(started.id)
    assert (turn.status, turn.error_code, turn.reply.text) == ("stopped", "", "Hello")
    assert chat.script.open_streams == 0
    [usage] = await chat.usage(turn.pk)
    assert (usage.quality, usage.output_tokens) == ("estimated", 2)
    await eventually(lambda: finished == [(turn.pk, "stopped")])


async def test_stopping_whatever_runs(chat: Chat) -> None:
    steps, gates = gated_answer("Hello")
    chat.script.replies = [steps]
    conversation = await chat.conversation()
    assert await turns.stop_turn(chat.user, conversation.pk) is None
    started = await chat.send(conversation)
    await gates[0].reached()
    assert await turns.stop_turn(chat.user, conversation.pk) == "stopped"
    turn = await chat.turn(started.id)
    assert (turn.status, turn.reply.blocks) == ("stopped", [{"type": "text", "text": ""}])


async def test_a_queued_turn_is_stopped_at_once_and_never_asks(
    chat: Chat, fast: Callable[..., None], finished: list[Any]
) -> None:
    fast(MAX_RUNNING_TURNS=1)
    steps, gates = gated_answer("Hello")
    chat.script.replies = [steps]
    running = await chat.send(await chat.conversation())
    await gates[0].reached()
    conversation = await chat.conversation()
    queued = await chat.send(conversation)
    assert (await chat.turn(queued.id)).status == "queued"
    _, screen = chat.view(conversation)
    await screen.until(lambda screen: screen.status == "queued")
    assert await turns.stop_turn(chat.user, conversation.pk, queued.id) == "stopped"
    await screen.until(lambda screen: screen.status == "stopped")
    turn = await chat.turn(queued.id)
    assert (turn.status, turn.end_seq, turn.reply.blocks, turn.attempt) == ("stopped", 0, [], 0)
    assert finished == [(queued.id, "stopped")]
    for gate in gates:
        gate.open()
    await chat.ended(running.id)
    assert len(chat.script.requests) == 1


@pytest.mark.parametrize("times", [1, 2])
async def test_stopping_what_is_over_changes_nothing(chat: Chat, times: int) -> None:
    conversation = await chat.conversation()
    turn = await chat.ended((await chat.send(conversation)).id)
    before = await chat.counts()
    for _ in range(times):
        assert await turns.stop_turn(chat.user, conversation.pk, turn.pk) == "completed"
    assert (await chat.turn(turn.pk)).stop_requested_at is None
    assert await chat.counts() == before


async def test_many_stops_at_once_are_one(chat: Chat, finished: list[Any]) -> None:
    steps, gates = gated_answer("Hello")
    chat.script.replies = [steps]
    conversation = await chat.conversation()
    started = await chat.send(conversation)
    await gates[0].reached()
    results = await asyncio.gather(*(turns.stop_turn(chat.user, conversation.pk) for _ in range(5)))
    assert set(results) <= {"stopped", None}
    assert "stopped" in results
    await eventually(lambda: finished == [(started.id, "stopped")])


async def test_after_a_stop_the_conversation_is_free(chat: Chat) -> None:
    steps, gates = gated_answer("Hello")
    chat.script.replies = [steps, answer("Fine")]
    conversation = await chat.conversation()
    await chat.send(conversation)
    await gates[0].reached()
    await turns.stop_turn(chat.user, conversation.pk)
    assert (await chat.ended((await chat.send(conversation, "next")).id)).reply.text == "Fine"


# ------------------------------------------------------------------------------------------------ replies in Python


async def test_stream_reply_hands_over_the_words_and_then_the_reply(chat: Chat) -> None:
    chat.script.replies = [answer("Hel", "lo", " \N{GRINNING FACE}")]
    words: list[str] = []
    complete: list[turns.Reply] = []

    async def on_text(text: str) -> None:
        assert complete == []
        words.append(text)

    async def on_complete(reply: turns.Reply) -> None:
        complete.append(reply)

    reply = await turns.stream_reply(chat.user, "Hi", on_text=on_text, on_complete=on_complete)
    assert complete == [reply]
    assert "".join(words) == reply.text == "Hello \N{GRINNING FACE}"
    assert "" not in words
    assert (reply.status, reply.stop_reason, reply.error) == ("completed", "end_turn", None)
    assert reply.usage is not None
    assert (reply.usage["exact"], reply.usage["input_tokens"], reply.usage["output_tokens"]) == (True, 11, 7)
    stored = await chat.reply(reply.turn_id)
    assert (stored.pk, stored.blocks, stored.text) == (reply.message_id, reply.blocks, reply.text)


async def test_the_timeout_of_a_call_ends_its_turn_and_returns_what_there_is(chat: Chat) -> None:
    gate = Gate()
    chat.script.replies = [[BEGAN, start(), append("Hello"), gate]]
    reply = await turns.stream_reply(chat.user, "Hi", timeout=0.3)
    assert (reply.status, reply.text) == ("timed_out", "Hello")
    assert reply.error is not None
    assert reply.error["code"] == "turn_timeout"
    turn = await chat.turn(reply.turn_id)
    assert (turn.status, turn.error_code, turn.reply.text) == ("timed_out", "turn_timeout", "Hello")
    assert chat.script.open_streams == 0


async def test_the_timeout_of_a_call_also_ends_a_turn_that_nobody_claims(
    chat: Chat, fast: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast(MAX_RUNNING_TURNS=1)
    monkeypatch.setattr(turns, "TIMEOUT_GRACE_SECONDS", 0.1)
    steps, gates = gated_answer("Hello")
    chat.script.replies = [steps]
    await chat.send(await chat.conversation())
    await gates[0].reached()
    reply = await turns.stream_reply(chat.user, "Hi", timeout=0.1)
    assert (reply.status, reply.text) == ("stopped", "")


@pytest.mark.parametrize("timeout_seconds", [0, -1, float("nan"), float("inf")])
async def test_a_timeout_that_is_none_is_refused(chat: Chat, timeout_seconds: float) -> None:
    conversation = await chat.conversation()
    with pytest.raises(InvalidInputError):
        await chat.send(conversation, timeout_seconds=timeout_seconds)
    assert (await chat.counts())["Turn"] == 0


async def test_open_reply_can_be_iterated(chat: Chat) -> None:
    chat.script.replies = [answer("Hel", "lo")]
    stream = await turns.open_reply(chat.user, "Hi")
    assert stream.reply.status == "queued"
    assert "".join([words async for words in stream]) == "Hello"
    assert (stream.reply.status, stream.reply.text) == ("completed", "Hello")


async def test_the_events_of_a_reply_are_those_of_the_wire(chat: Chat) -> None:
    stream = await turns.open_reply(chat.user, "Hi")
    events = [event async for event in stream.events()]
    kinds = [event["type"] for event in events if event["type"] != "progress"]
    assert kinds == ["delta"] * (len(kinds) - 1) + ["finished"]
    assert [event["first"] for event in events if event["type"] == "delta"] == list(range(1, len(kinds)))
    assert events[-1]["turn"]["status"] == "completed"


async def test_leaving_early_does_not_stop_the_turn(chat: Chat) -> None:
    steps, gates = gated_answer("Hel", "lo")
    chat.script.replies = [steps]
    gates[0].open()
    stream = await turns.open_reply(chat.user, "Hi")
    async with contextlib.aclosing(aiter(stream)) as words:  # type: ignore[type-var]
        assert await anext(words) == "Hel"
    for gate in gates:
        gate.open()
    assert (await chat.ended(stream.started.id)).reply.text == "Hello"


async def test_a_callback_that_raises_does_not_stop_the_turn(chat: Chat) -> None:
    async def on_text(text: str) -> None:
        raise KeyError(text)

    conversation = await chat.conversation()
    with pytest.raises(KeyError):
        await turns.stream_reply(chat.user, "Hi", conversation_id=conversation.pk, on_text=on_text)
    [turn_id] = await in_database(lambda: list(Turn.objects.values_list("pk", flat=True)))
    turn = await chat.ended(turn_id)
    assert (turn.status, turn.reply.text) == ("completed", "Hello")


async def test_a_caller_that_is_cancelled_does_not_stop_the_turn(chat: Chat) -> None:
    steps, gates = gated_answer("Hello")
    chat.script.replies = [steps]
    caller = asyncio.create_task(turns.stream_reply(chat.user, "Hi"))
    await gates[0].reached() if chat.script.requests else await eventually(lambda: chat.script.requests)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    for gate in gates:
        gate.open()
    [turn_id] = await in_database(lambda: list(Turn.objects.values_list("pk", flat=True)))
    assert (await chat.ended(turn_id)).reply.text == "Hello"


async def test_a_reply_whose_conversation_is_deleted_ends(chat: Chat) -> None:
    steps, gates = gated_answer("Hello", "!")
    chat.script.replies = [steps]
    gates[0].open()
    stream = await turns.open_reply(chat.user, "Hi")
    words = aiter(stream)
    assert await anext(words) == "Hello"
    await turns.delete_conversation(chat.user, stream.started.conversation_id)
    assert [word async for word in words] == []
    assert (stream.reply.status, stream.reply.text) == ("interrupted", "Hello")


# ------------------------------------------------------------------------------------------------ the conversation


async def test_renaming_and_archiving_are_seen_by_viewers(chat: Chat) -> None:
    conversation = await chat.conversation(title="old")
    _, screen = chat.view(conversation)
    await screen.until(lambda screen: screen.revision == 0)
    await turns.update_conversation(chat.user, conversation.pk, title=" new\nname ")
    archived = await turns.update_conversation(chat.user, conversation.pk, archived=True)
    await screen.until(lambda screen: screen.revision == 2)
    assert [(e["title"], e["archived"]) for e in screen.events if e["type"] == "conversation"] == [
        ("new name", False),
        ("new name", True),
    ]
    again = await turns.update_conversation(chat.user, conversation.pk, archived=True)
    assert again.archived_at == archived.archived_at
    assert (await turns.update_conversation(chat.user, conversation.pk, archived=False)).archived_at is None


async def test_deleting_mid_run_stops_the_provider_and_leaves_nothing_but_the_usage(chat: Chat) -> None:
    steps, gates = gated_answer("Hello", " world")
    chat.script.replies = [steps]
    conversation = await chat.conversation()
    started = await chat.send(conversation)
    gates[0].open()
    await gates[1].reached()
    await chat.committed(started.id, 1)
    await turns.delete_conversation(chat.user, conversation.pk)
    await eventually(lambda: chat.script.open_streams == 0)
    await eventually(lambda: get_runner().running == 0)
    counts = await chat.counts()
    assert counts == {
        "Conversation": 0,
        "Message": 0,
        "Turn": 0,
        "JournalEntry": 0,
        "UsageRecord": 1,
        "Participant": 0,
        "revisions": 0,
    }


@pytest.mark.skipif(connection.vendor != "postgresql", reason="SQLite has one writer, so nothing comes in between")
async def test_deleting_while_the_journal_commits_waits_for_it_and_leaves_nothing(chat: Chat) -> None:
    steps, gates = gated_answer("Hello")
    chat.script.replies = [steps]
    conversation = await chat.conversation()
    started = await chat.send(conversation)
    await gates[0].reached()
    await chat.committed(started.id, 1)
    updated, go_on = threading.Event(), threading.Event()

    def commit_slowly() -> None:
        try:
            with transaction.atomic():
                Turn.objects.filter(pk=started.id).update(lease_expires_at=Now())
                updated.set()
                go_on.wait(10)
                JournalEntry.objects.create(turn_id=started.id, seq=99, ops="[]")
        finally:
            connections["default"].close()

    def somebody_waits() -> bool:
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM pg_locks WHERE NOT granted")
            return bool(cursor.fetchone()[0])

    commit = asyncio.create_task(asyncio.to_thread(commit_slowly))
    await asyncio.to_thread(updated.wait, 10)
    delete = asyncio.create_task(turns.delete_conversation(chat.user, conversation.pk))
    await eventually(lambda: in_database(somebody_waits))
    go_on.set()
    await commit
    await delete
    counts = await chat.counts()
    assert (counts["Conversation"], counts["Turn"], counts["JournalEntry"]) == (0, 0, 0)


# ------------------------------------------------------------------------------------------------ draining


async def test_a_draining_process_refuses_new_turns_and_changes_nothing(chat: Chat) -> None:
    conversation = await chat.conversation()
    turn = await chat.ended((await chat.send(conversation)).id)
    await get_runner().drain()
    before = await chat.counts()
    with pytest.raises(DrainingError):
        await chat.send(conversation)
    with pytest.raises(DrainingError):
        await turns.regenerate_turn(chat.user, conversation.pk, message_id=turn.reply_id, client_id="r")
    assert await chat.counts() == before


async def test_draining_lets_a_turn_end_that_is_quick_enough(chat: Chat, fast: Callable[..., None]) -> None:
    fast(DRAIN_SECONDS=20.0)
    steps, gates = gated_answer("Hello")
    chat.script.replies = [steps]
    started = await chat.send(await chat.conversation())
    await gates[0].reached()
    drain = asyncio.create_task(get_runner().drain())
    await eventually(lambda: get_runner().draining)
    for gate in gates:
        gate.open()
    await drain
    turn = await chat.turn(started.id)
    assert (turn.status, turn.reply.text) == ("completed", "Hello")


async def test_draining_interrupts_the_others_and_keeps_their_text(chat: Chat) -> None:
    steps, gates = gated_answer("Hello", " world")
    chat.script.replies = [steps]
    started = await chat.send(await chat.conversation())
    gates[0].open()
    await gates[1].reached()
    await get_runner().drain()
    turn = await chat.turn(started.id)
    assert (turn.status, turn.error_code, turn.reply.text) == ("interrupted", "shutdown", "Hello")
    assert chat.script.open_streams == 0
    assert await in_database(lease.settle_expired) == ([], [])


async def test_a_silent_turn_is_not_ended_by_pings_alone(chat: Chat) -> None:
    chat.script.replies = [[BEGAN, ALIVE, start(), ALIVE, append("Hello"), ALIVE, *answer()[2:]]]
    turn = await chat.ended((await chat.send(await chat.conversation())).id)
    assert (turn.status, turn.reply.text) == ("completed", "Hello")
