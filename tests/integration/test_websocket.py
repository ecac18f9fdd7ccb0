"""The WebSocket, command by command and fault by fault; each faulty one leaves everything as it was."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth import get_user_model
from django.contrib.sessions.backends.db import SessionStore
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from streaming_chat import limits, turns
from streaming_chat.consumers import STRIKES
from streaming_chat.hub import get_hub
from streaming_chat.models import Conversation, Message, Participant, Turn, UsageRecord
from streaming_chat.protocol import frame_limit_bytes
from streaming_chat.testing import FakeAnthropic, Gate, Reply
from tests import services, wire

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from django.contrib.auth.models import User

    from tests.wire import LocalSite, LocalSocket

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.filterwarnings("ignore:No directory at"),  # static files are not collected for the tests
]

FRAME_LIMIT_BYTES = frame_limit_bytes(32_000)
FUZZED_SOCKETS = 80
FRAMES_EACH = 40


@pytest.fixture
def anthropic(settings: Any) -> Iterator[FakeAnthropic]:
    with FakeAnthropic() as server:
        configure(settings, server)
        yield server


def configure(settings: Any, server: FakeAnthropic, **options: Any) -> None:
    settings.STREAMING_CHAT = {
        "PROVIDER": "anthropic",
        "ANTHROPIC_API_KEY": server.api_key,
        "ANTHROPIC_BASE_URL": server.base_url,
        **options,
    }


@pytest.fixture
async def local(anthropic: FakeAnthropic) -> AsyncIterator[LocalSite]:
    async with wire.local_site() as local:
        yield local


@pytest.fixture
async def user() -> User:
    return await get_user_model().objects.acreate(username="ada")


@pytest.fixture
async def stranger() -> User:
    return await get_user_model().objects.acreate(username="mallory")


@pytest.fixture
async def conversation(user: User) -> Conversation:
    return await turns.create_conversation(user, title="A talk")


@pytest.fixture
async def session(user: User) -> str:
    return await wire.sign_in(user)


@pytest.fixture
async def socket(local: LocalSite, session: str, conversation: Conversation) -> AsyncIterator[LocalSocket]:
    async with local.socket(session, conversation.pk) as socket:
        await socket.until("snapshot")
        yield socket


@sync_to_async
def everything() -> list[Any]:
    """All rows that a command could change."""
    return [
        list(model.objects.order_by("pk").values()) for model in (Conversation, Message, Turn, UsageRecord, Participant)
    ]


def send(text: Any = "Hello", client_id: str = "c1", **fields: Any) -> dict[str, Any]:
    return {"type": "send", "text": text, "client_id": client_id, "ref": f"ref-{client_id}"[:64], **fields}


async def finished_turn(socket: LocalSocket, text: str = "Hello", client_id: str = "c1") -> dict[str, Any]:
    """Send a prompt and wait for the end of its turn."""
    accepted = await socket.ask(send(text, client_id))
    assert accepted["type"] == "accepted", accepted
    if socket.view.turn != accepted["turn"] or socket.view.status in ("queued", "running"):
        while (await socket.until("finished"))["turn"]["id"] != accepted["turn"]:
            pass
    return accepted


# ------------------------------------------------------------------------------------------------ what is right


async def test_a_prompt_is_answered_word_by_word_and_stored(socket: LocalSocket, anthropic: FakeAnthropic) -> None:
    gate = Gate()
    anthropic.enqueue(Reply.text("Hel", gate, "lo"))
    accepted = await socket.ask(send())
    assert accepted == {
        "type": "accepted",
        "ref": "ref-c1",
        "turn": accepted["turn"],
        "message": accepted["message"],
        "duplicate": False,
    }
    while socket.view.seq == 0 or not socket.view.text():  # an entry may only begin a block
        await socket.next()
    assert socket.view.text() == "Hel"
    gate.open()
    finished = await socket.until("finished")
    assert finished["turn"]["status"] == "completed"
    assert finished["turn"]["usage"]["exact"] is True
    reply = await Message.objects.aget(pk=finished["turn"]["reply_id"])
    assert socket.view.blocks() == reply.blocks == [{"type": "text", "text": "Hello"}]


async def test_the_same_client_id_again_is_the_same_turn(socket: LocalSocket, anthropic: FakeAnthropic) -> None:
    first = await finished_turn(socket)
    before = await everything()
    again = await socket.ask(send())
    assert again == {**first, "duplicate": True}
    assert await everything() == before
    assert len(anthropic.requests) == 1


async def test_a_prompt_is_edited_by_sending_another_to_its_parent(socket: LocalSocket) -> None:
    await finished_turn(socket, "first", "c1")
    first_reply = socket.view.reply_id
    await finished_turn(socket, "second", "c2")
    edited = await socket.ask(send("second, better", "c3", parent_id=first_reply))
    prompt = await Message.objects.aget(pk=edited["message"])
    assert str(prompt.parent_id) == first_reply
    await socket.until("finished")
    root = await socket.ask(send("all anew", "c4", parent_id="root"))
    assert (await Message.objects.aget(pk=root["message"])).parent_id is None


async def test_a_reply_is_made_once_more(socket: LocalSocket) -> None:
    await finished_turn(socket)
    old = socket.view.reply_id
    again = {"type": "regenerate", "message_id": old, "client_id": "r1", "ref": "r"}
    accepted = await socket.ask(again)
    assert accepted["type"] == "accepted"
    await socket.until("finished")
    assert socket.view.reply_id != old
    before = await everything()
    assert await socket.ask(again) == {**accepted, "duplicate": True}
    assert await everything() == before


async def test_stop_keeps_what_was_shown_and_closes_the_providers_connection(
    socket: LocalSocket, anthropic: FakeAnthropic
) -> None:
    gate = Gate()
    anthropic.enqueue(Reply.text("What was ", "shown", gate, " and what was not"))
    accepted = await socket.ask(send())
    await gate.reached()
    while socket.view.seq == 0 or socket.view.text() != "What was shown":
        await socket.next()
    stopping = asyncio.ensure_future(socket.ask({"type": "stop", "turn_id": accepted["turn"], "ref": "s"}))
    await anthropic.wait_for(lambda ledger: ledger.aborted, timeout=1)
    assert (await stopping)["type"] == "accepted"
    if socket.view.status != "stopped":
        await socket.until("finished")
    reply = await Message.objects.aget(pk=socket.view.reply_id)
    assert reply.text == socket.view.text() == "What was shown"
    turn = await Turn.objects.aget(pk=accepted["turn"])
    assert turn.status == "stopped"
    record = await UsageRecord.objects.aget(turn=turn)
    assert record.quality == "estimated"
    assert record.input_tokens > 0
    assert record.output_tokens > 0


async def test_stopping_what_is_over_changes_nothing(socket: LocalSocket) -> None:
    accepted = await finished_turn(socket)
    before = await everything()
    for frame in ({"type": "stop", "turn_id": accepted["turn"]}, {"type": "stop"}):
        assert (await socket.ask(frame))["type"] == "accepted"
    assert await everything() == before


# ------------------------------------------------------------------------------------------------ what is wrong

NOBODY = str(uuid.uuid4())
DEEP = '{"type":' + "[" * 33 + "]" * 33 + "}"
BAD_FRAMES = {
    "not JSON": ("hello", "bad_json", None),
    "empty": ("", "bad_json", None),
    "blank": (" ", "bad_json", None),
    "an array": ('["send"]', "bad_json", None),
    "a number": ("1", "bad_json", None),
    "a string": ('"send"', "bad_json", None),
    "null": ("null", "bad_json", None),
    "NaN": ('{"type": "ping", "ref": NaN}', "bad_json", None),
    "infinity": ('{"type": "ping", "ref": -Infinity}', "bad_json", None),
    "a float beyond all": ('{"type": "ping", "ref": 1e999}', "bad_json", None),
    "too deep": (DEEP, "bad_json", None),
    "far too deep": ("[" * 30_000, "bad_json", None),
    "a long integer": ('{"type": "ack", "seq": 1234567890123456}', "bad_json", None),
    "a very long integer": ('{"type": "ack", "seq": ' + "9" * 5000 + "}", "bad_json", None),
    "a key twice": ('{"type": "ping", "type": "stop"}', "bad_json", None),
    "binary": (b'{"type": "ping"}', "binary_unsupported", None),
    "no type": ("{}", "bad_type", "type"),
    "an unknown type": ('{"type": "shutdown"}', "bad_type", "type"),
    "a type that is no text": ('{"type": ["send"]}', "bad_type", "type"),
    "an event's type": ('{"type": "snapshot"}', "bad_type", "type"),
    "a missing field": ({"type": "send", "client_id": "x"}, "bad_field", "text"),
    "an extra field": ({"type": "ping", "role": "system"}, "bad_field", "role"),
    "a forged role": (send(role="assistant"), "bad_field", "role"),
    "text that is a number": (send(text=1), "bad_field", "text"),
    "text that is null": (send(text=None), "bad_field", "text"),
    "text that is a list": (send(text=["a"]), "bad_field", "text"),
    "an empty client id": (send(client_id=""), "bad_field", "client_id"),
    "a long client id": (send(client_id="x" * 65), "bad_field", "client_id"),
    "a client id with a line break": (send(client_id="a\nb"), "bad_field", "client_id"),
    "a client id with half a character": (send(client_id="\ud800", ref=None), "bad_field", "client_id"),
    "a long ref": ({"type": "ping", "ref": "x" * 65}, "bad_field", "ref"),
    "half a character in the ref": ({"type": "ping", "ref": "\ud800"}, "bad_field", "ref"),
    "half a character as a key": ({"type": "ping", "\ud800": 1}, "bad_field", None),
    "a parent that is no id": (send(parent_id="1 OR 1=1"), "bad_field", "parent_id"),
    "a turn that is no id": ({"type": "stop", "turn_id": "x"}, "bad_field", "turn_id"),
    "a negative seq": ({"type": "ack", "turn_id": NOBODY, "seq": -1}, "bad_field", "seq"),
    "a seq that is text": ({"type": "ack", "turn_id": NOBODY, "seq": "1"}, "bad_field", "seq"),
    "a seq that is a truth": ({"type": "ack", "turn_id": NOBODY, "seq": True}, "bad_field", "seq"),
    "a long cursor": ({"type": "resume", "cursor": "1" * 129}, "bad_field", "cursor"),
    "a cursor that is a number": ({"type": "resume", "cursor": 1}, "bad_field", "cursor"),
    "half a character": (send(text="a\ud800"), "bad_text", "text"),
    "a NUL": (send(text="a\x00b"), "bad_text", "text"),
    "a control character": (send(text="a\x1b[31m"), "bad_text", "text"),
    "nothing": (send(text=""), "bad_text", "text"),
    "only white space": (send(text=" \n\t\u2003\u00a0"), "bad_text", "text"),
    "more than a frame": ("x" * (FRAME_LIMIT_BYTES + 1), "too_large", None),
    "more characters than allowed": (send(text="x" * 32_001), "too_large", "text"),
    "a parent that does not exist": (send(parent_id=NOBODY), "not_found", None),
    "a reply that does not exist": (
        {"type": "regenerate", "message_id": NOBODY, "client_id": "r"},
        "not_found",
        None,
    ),
    "a turn that does not exist": ({"type": "stop", "turn_id": NOBODY}, "not_found", None),
}


async def test_a_bad_frame_is_answered_and_changes_nothing(socket: LocalSocket) -> None:
    before = await everything()
    for name, (frame, code, field) in BAD_FRAMES.items():
        answer = await socket.ask(frame)
        assert (answer["type"], answer["code"]) == ("error", code), (name, answer)
        assert answer["detail"], name
        if field is not None:
            assert answer["field"] == field, (name, answer)
    assert await socket.alive()
    assert await everything() == before


async def test_a_refusal_names_the_command_that_it_answers(socket: LocalSocket) -> None:
    for frame in (
        {"type": "send", "ref": "mine", "client_id": "x"},
        {"type": "shutdown", "ref": "mine"},
        send(text="", ref="mine"),
    ):
        assert (await socket.ask(frame))["ref"] == "mine", frame


async def test_text_that_is_strange_but_right_comes_back_as_it_was(
    socket: LocalSocket, anthropic: FakeAnthropic
) -> None:
    text = "e\u0301 \u202eabc\u202c \u2028 \u2029 שלום 👩\u200d👩\u200d👧 \uffff </script>\nevent: x"
    anthropic.enqueue(Reply.text(text, chunks=9))
    accepted = await finished_turn(socket, text)
    assert (await Message.objects.aget(pk=accepted["message"])).text == text
    assert anthropic.requests[0].prompt == text
    assert socket.view.text() == text


async def test_others_and_deleted_things_are_all_the_same_not_found(
    socket: LocalSocket, local: LocalSite, stranger: User
) -> None:
    await finished_turn(socket)
    other = await turns.create_conversation(stranger)
    async with local.socket(await wire.sign_in(stranger), other.pk) as theirs:
        await theirs.until("snapshot")
        await finished_turn(theirs)
        before = await everything()
        answers = []
        for message, turn in ((socket.view.reply_id, socket.view.turn), (NOBODY, NOBODY)):
            for frame in (
                send("x", "c9", parent_id=message, ref="r"),
                {"type": "regenerate", "message_id": message, "client_id": "c9", "ref": "r"},
                {"type": "stop", "turn_id": turn, "ref": "r"},
            ):
                answers.append(json.dumps(await theirs.ask(frame)))  # noqa: PERF401 - in order
        assert set(answers) == {answers[0]}
        assert json.loads(answers[0])["code"] == "not_found"
        assert await everything() == before


async def test_one_conversation_has_one_running_turn(socket: LocalSocket, anthropic: FakeAnthropic) -> None:
    gate = Gate()
    anthropic.enqueue(Reply.text("a", gate, "b"))
    await socket.ask(send())
    await gate.reached()
    count = await Message.objects.acount()
    assert (await socket.ask(send("again", "c2")))["code"] == "busy"
    busy = await socket.ask({"type": "regenerate", "message_id": socket.view.reply_id, "client_id": "r"})
    assert busy["code"] == "busy"
    assert await Message.objects.acount() == count
    gate.open()
    await socket.until("finished")


async def test_what_may_not_be_done_is_forbidden(socket: LocalSocket) -> None:
    accepted = await finished_turn(socket)
    before = await everything()
    prompt = accepted["message"]
    assert (await socket.ask(send("x", "c2", parent_id=prompt)))["code"] == "forbidden"
    answer = await socket.ask({"type": "regenerate", "message_id": prompt, "client_id": "c2"})
    assert answer["code"] == "forbidden"
    assert await everything() == before


async def test_a_client_id_belongs_to_one_text(socket: LocalSocket) -> None:
    await finished_turn(socket)
    before = await everything()
    assert (await socket.ask(send("other text")))["code"] == "conflict"
    answer = await socket.ask({"type": "regenerate", "message_id": socket.view.reply_id, "client_id": "c1"})
    assert answer["code"] == "conflict"
    assert await everything() == before


async def test_a_viewer_may_watch_but_not_act(
    socket: LocalSocket, local: LocalSite, stranger: User, conversation: Conversation
) -> None:
    await Participant.objects.acreate(conversation=conversation, user=stranger, role="viewer")
    await finished_turn(socket)
    async with local.socket(await wire.sign_in(stranger), conversation.pk) as watching:
        snapshot = await watching.until("snapshot")
        assert snapshot["conversation"]["role"] == "viewer"
        before = await everything()
        for frame in (
            send("x", "c2"),
            {"type": "regenerate", "message_id": socket.view.reply_id, "client_id": "c2"},
            {"type": "stop"},
        ):
            assert (await watching.ask(frame))["code"] == "forbidden", frame
        assert await everything() == before


async def test_a_cursor_that_cannot_be_leads_to_a_snapshot(socket: LocalSocket, local: LocalSite, session: str) -> None:
    await finished_turn(socket)
    revision, turn, seq = socket.view.cursor.split(".")
    for cursor in (
        "",
        "garbage",
        "-1.-.-1",
        f"{revision}.{turn}.{int(seq) + 5}",
        f"{int(revision) + 7}.{turn}.{seq}",
        f"{revision}.{NOBODY}.{seq}",
        f"{revision}.-.{seq}",
        "999999999999999.-.999999999",
        "9" * 100,
        "1.\u0661.1",
    ):
        await socket.send({"type": "resume", "cursor": cursor})
        assert (await socket.until("accepted", "error"))["type"] == "accepted", cursor
        await socket.until("snapshot")
    assert socket.view.cursor == f"{revision}.{turn}.{seq}"


async def test_at_the_end_of_all_there_is_nothing_to_resume(socket: LocalSocket) -> None:
    await finished_turn(socket)
    seen = len(socket.view.history)
    await socket.ask({"type": "resume", "cursor": socket.view.cursor})
    await finished_turn(socket, "more", "c2")
    assert "snapshot" not in [event["type"] for event in socket.view.history[seen:]]


async def test_a_query_of_any_size_is_no_fault(local: LocalSite, session: str, conversation: Conversation) -> None:
    for query in ("?" + "a&" * 5000, "?after=%ff%00", "?after=1&after=2", "?" + "x" * 5000):
        async with local.socket(session, conversation.pk, query=query) as socket:
            assert await socket.until("snapshot"), query


# ------------------------------------------------------------------------------------------------ limits


async def test_too_many_commands_are_refused_and_then_the_socket(
    local: LocalSite, settings: Any, anthropic: FakeAnthropic, session: str, conversation: Conversation
) -> None:
    configure(settings, anthropic, COMMANDS_PER_MINUTE=5)
    async with local.socket(session, conversation.pk) as socket:
        await socket.until("snapshot")
        for _ in range(5):
            assert (await socket.ask({"type": "stop"}))["type"] == "accepted"
        before = await everything()
        for strike in range(STRIKES):
            answer = await socket.ask(send(client_id=f"c{strike}"))
            assert answer["code"] == "rate_limited"
            assert 0 < answer["retry_after_seconds"] <= 12
            assert answer["ref"] == f"ref-c{strike}"
        assert await socket.closed() == 4429
        assert await everything() == before


async def test_frames_that_make_no_sense_count_like_commands(
    local: LocalSite, settings: Any, anthropic: FakeAnthropic, session: str, conversation: Conversation
) -> None:
    configure(settings, anthropic, COMMANDS_PER_MINUTE=5)
    async with local.socket(session, conversation.pk) as socket:
        await socket.until("snapshot")
        codes = [(await socket.ask("nonsense"))["code"] for _ in range(5 + STRIKES)]
        assert codes == ["bad_json"] * 5 + ["rate_limited"] * STRIKES
        assert await socket.closed() == 4429


async def test_acknowledgements_do_not_use_up_the_commands(
    local: LocalSite, settings: Any, anthropic: FakeAnthropic, session: str, conversation: Conversation
) -> None:
    configure(settings, anthropic, COMMANDS_PER_MINUTE=5)
    async with local.socket(session, conversation.pk) as socket:
        await socket.until("snapshot")
        for _ in range(20):
            await socket.send({"type": "ack", "turn_id": NOBODY, "seq": 1})
        assert (await socket.ask({"type": "stop"}))["type"] == "accepted"


async def test_the_eleventh_socket_is_too_many_until_one_is_closed(
    local: LocalSite, session: str, conversation: Conversation, user: User
) -> None:
    async with AsyncExitStack() as first:
        async with AsyncExitStack() as nine:
            await first.enter_async_context(local.socket(session, conversation.pk))
            for _ in range(9):
                await nine.enter_async_context(local.socket(session, conversation.pk))
            async with local.socket(session, conversation.pk) as eleventh:
                assert (await eleventh.until("error"))["code"] == "rate_limited"
                assert await eleventh.closed() == 4429
            assert limits.sockets.held(user.pk) == 10
        assert limits.sockets.held(user.pk) == 1
        async with local.socket(session, conversation.pk) as another:
            await another.until("snapshot")
    assert limits.sockets.held(user.pk) == 0
    assert get_hub().viewers == 0


# ------------------------------------------------------------------------------------------------ who is there


async def test_without_a_session_the_socket_closes_with_4401(local: LocalSite, conversation: Conversation) -> None:
    for session_key in (None, "x" * 32):
        async with local.socket(session_key, conversation.pk) as socket:
            assert await socket.next() is None
            assert socket.close_code == 4401


@pytest.mark.parametrize("how", ["logout", "deactivated", "password"])
async def test_a_session_that_ended_is_noticed_at_the_next_command(
    how: str, socket: LocalSocket, session: str, user: User
) -> None:
    if how == "logout":
        await SessionStore(session).adelete()
    elif how == "deactivated":
        await get_user_model().objects.filter(pk=user.pk).aupdate(is_active=False)
    else:
        user.set_password("another one")
        await user.asave()
    before = await everything()
    assert (await socket.ask(send()))["code"] == "signed_out"
    assert await socket.closed() == 4401
    assert await everything() == before


async def test_after_it_was_closed_a_socket_does_nothing_more(socket: LocalSocket, session: str) -> None:
    await SessionStore(session).adelete()
    before = await everything()
    for number in range(3):
        await socket.send(send(client_id=f"c{number}"))
    assert await socket.closed() == 4401
    assert [event["type"] for event in socket.view.history].count("error") == 1
    assert await everything() == before
    assert get_hub().viewers == 0


async def test_unknown_others_and_deleted_conversations_close_alike(
    local: LocalSite, session: str, stranger: User, user: User
) -> None:
    theirs = await turns.create_conversation(stranger)
    gone = await turns.create_conversation(user)
    await turns.delete_conversation(user, gone.pk)
    for conversation_id in (NOBODY, theirs.pk, gone.pk):
        async with local.socket(session, conversation_id) as socket:
            assert (await socket.until("deleted")) == {"type": "deleted"}
            assert await socket.closed() == 4404


async def test_a_conversation_that_is_deleted_closes_its_sockets(
    socket: LocalSocket, user: User, conversation: Conversation
) -> None:
    await turns.delete_conversation(user, conversation.pk)
    await socket.until("deleted")
    assert await socket.closed() == 4404


# ------------------------------------------------------------------------------------------------ a real server

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20)
nested = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(max_size=8), scalars, max_size=3)
anything = nested | st.lists(nested, max_size=3) | st.dictionaries(st.text(max_size=8), nested, max_size=3)
kinds = st.sampled_from(["send", "regenerate", "stop", "resume", "ack", "ping"])
names = st.sampled_from(["ref", "text", "client_id", "parent_id", "message_id", "turn_id", "cursor", "seq"]) | st.text()
commands = st.builds(
    lambda kind, fields: json.dumps({"type": kind, **fields}),
    kinds | anything,
    st.dictionaries(names, anything | st.just(NOBODY) | st.just("root"), max_size=5),
)
frames = st.one_of(
    commands,
    commands.flatmap(lambda frame: st.integers(0, len(frame)).map(lambda end: frame[:end] + frame[end + 1 :])),
    st.text(max_size=60),
    st.binary(max_size=60),
)


@pytest.fixture
def site_environment() -> dict[str, str]:
    return wire.server_environment(COMMANDS_PER_MINUTE=10**9)


@pytest.fixture
def talk(transactional_db: None) -> Conversation:
    owner = get_user_model().objects.create(username="ada")
    return Conversation.objects.create(owner=owner)


@pytest.fixture
def key(talk: Conversation) -> str:
    return async_to_sync(wire.sign_in)(talk.owner)


@hypothesis_settings(
    max_examples=FUZZED_SOCKETS,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(some_frames=st.lists(frames, min_size=FRAMES_EACH, max_size=FRAMES_EACH))
def test_whatever_is_sent_is_answered(
    some_frames: list[str | bytes], site: services.Site, talk: Conversation, key: str
) -> None:
    async def converse() -> None:
        async with wire.network(key) as session, wire.open_socket(session, site.url, talk.pk) as socket:
            await socket.until("snapshot")
            for number, frame in enumerate(some_frames):
                await socket.send(frame)
                await socket.send({"type": "ping", "ref": f"after {number}"})
                answers = [await socket.next()]
                while answers[-1] is not None and answers[-1].get("ref") != f"after {number}":
                    answers.append(await socket.next())
                assert answers[-1] is not None, (frame, socket.close_code)

    asyncio.run(converse())
    wire.assert_clean(site)


async def test_a_frame_of_any_size_is_answered_up_to_daphnes_limit(
    site: services.Site, talk: Conversation, key: str
) -> None:
    async with wire.network(key) as session, wire.open_socket(session, site.url, talk.pk) as socket:
        await socket.until("snapshot")
        for size in (FRAME_LIMIT_BYTES + 1, 1024 * 1024 - 16):
            assert (await socket.ask("x" * size))["code"] == "too_large"
        assert (await socket.ask("x" * FRAME_LIMIT_BYTES))["code"] == "bad_json"
        assert (await socket.ask("é" * (FRAME_LIMIT_BYTES // 2 + 1)))["code"] == "too_large"
        assert (await socket.ask(b"\x00" * 10))["code"] == "binary_unsupported"
        assert (await socket.ask(""))["code"] == "bad_json"
        assert await socket.alive()
        with contextlib.suppress(aiohttp.ClientError, ConnectionError):  # Daphne drops it while we still write
            await socket.send("x" * (1024 * 1024 + 1))
        assert await socket.closed() in (1006, 1009)
    wire.assert_clean(site)


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("character", ["漢", "\N{GRINNING FACE}"])
async def test_the_longest_prompt_fits_in_any_script(
    character: str, ascii_only: bool, site: services.Site, talk: Conversation, key: str
) -> None:
    text = character * 32_000
    async with wire.network(key) as session, wire.open_socket(session, site.url, talk.pk) as socket:
        await socket.until("snapshot")
        accepted = await socket.ask(json.dumps(send(text), ensure_ascii=ascii_only))
        assert accepted["type"] == "accepted", accepted
    assert (await Message.objects.aget(pk=accepted["message"])).text == text
    wire.assert_clean(site)


async def test_every_close_code_reaches_the_browser(site: services.Site, talk: Conversation, key: str) -> None:
    async with wire.network() as nobody, wire.open_socket(nobody, site.url, talk.pk) as socket:
        assert await socket.closed() == 4401
    async with wire.network(key) as session:
        async with wire.open_socket(session, site.url, NOBODY) as socket:
            assert await socket.closed() == 4404
        async with AsyncExitStack() as stack:
            for _ in range(10):
                await (await stack.enter_async_context(wire.open_socket(session, site.url, talk.pk))).until("snapshot")
            async with wire.open_socket(session, site.url, talk.pk) as eleventh:
                assert await eleventh.closed() == 4429
        async with wire.open_socket(session, site.url, talk.pk) as socket:
            await socket.until("snapshot")
            await SessionStore(key).adelete()
            for number in range(5):  # those after the first meet a socket that is closing
                await socket.send(send(client_id=f"c{number}"))
            assert await socket.closed() == 4401
    assert await Message.objects.acount() == 0
    wire.assert_clean(site)


async def test_too_many_commands_close_the_socket_cleanly(talk: Conversation, key: str) -> None:
    with services.serve(wire.server_environment(COMMANDS_PER_MINUTE=3)) as site:
        async with wire.network(key) as session, wire.open_socket(session, site.url, talk.pk) as socket:
            for _ in range(3 * STRIKES):
                await socket.send("nonsense")
            assert await socket.closed() == 4429, site.log.read_text()
        wire.assert_clean(site)


async def test_a_handshake_that_makes_no_sense_gets_an_http_error(
    site: services.Site, talk: Conversation, key: str
) -> None:
    host, port = site.address.split(":")
    good = [
        f"GET {wire.socket_path(talk.pk)} HTTP/1.1",
        f"Host: {site.address}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13",
        f"Cookie: sessionid={key}",
        f"Origin: {site.url}",
    ]

    async def status(lines: list[str]) -> int:
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write("\r\n".join([*lines, "", ""]).encode("utf-8"))
            first = await asyncio.wait_for(reader.readline(), wire.PATIENCE_SECONDS)
            return int(first.split()[1])
        finally:
            writer.close()

    assert await status(good) == 101
    assert await status([*good[:-1], "Origin: https://host.evil"]) == 403
    assert await status(good[:-1]) == 403
    assert await status([*good, f"Origin: {site.url}"]) == 400
    assert await status([*good, "Sec-WebSocket-Protocol: chat, v1"]) == 101
    for path in ("/chat/conversations/x/socket/", "/nowhere/", f"/chat/conversations/{talk.pk}/socket/more/"):
        assert await status([f"GET {path} HTTP/1.1", *good[1:]]) == 403, path
    assert await status([f"GET {wire.socket_path(talk.pk)} HTTP/1.1", good[1]]) == 426
    assert await Turn.objects.acount() == 0
    wire.assert_clean(site)
    # Daphne itself stumbles over this header, before the application is asked. Nobody else notices.
    assert await status([*good, "Sec-WebSocket-Protocol: é"]) == 500
    assert await status(good) == 101
