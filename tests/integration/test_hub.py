"""Viewers: whatever is lost, doubled or late, each shows a prefix of the stored answer and ends equal to it."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from channels.layers import get_channel_layer
from django.contrib.auth.models import AnonymousUser, User
from pytest_django import Settings

from streaming_chat import hub, snapshot, turns
from streaming_chat.database import in_database
from streaming_chat.generation.runner import get_runner
from streaming_chat.hub import ABANDONED_SECONDS, ACCESS_SECONDS, Sent, get_hub
from streaming_chat.journal import group_name
from streaming_chat.models import Conversation, Message, Participant, Turn
from streaming_chat.protocol import Cursor
from tests.integration.conftest import Chat
from tests.layers import FaultyChannelLayer
from tests.providers import BEGAN, Gate, answer, append, gated_answer, start
from tests.screen import Screen, eventually

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.backends]

AWKWARD = [
    "Grüße, ",
    "\N{WOMAN}\u200d",
    "\N{WOMAN}\u200d\N{GIRL}",
    " e",
    "\u0301",
    " שלום עולם",
    " a\u2028b\u2029c",
    "\r\n\t\\u0000 \"'{}",
    "</script>",
    "世界",
]


@pytest.fixture
def faulty(settings: Settings) -> None:
    """Channels' layer is the backend's, but loses, doubles and reorders what the test says."""
    layer = settings.CHANNEL_LAYERS["default"]
    settings.CHANNEL_LAYERS = {"default": {**layer, "BACKEND": "tests.layers.FaultyChannelLayer"}}


def faulty_layer() -> FaultyChannelLayer:
    layer: Any = get_channel_layer()
    assert isinstance(layer, FaultyChannelLayer)
    return layer


async def ends_as_stored(chat: Chat, turn_id: uuid.UUID, screens: list[Screen]) -> Turn:
    turn = await chat.ended(turn_id)
    for screen in screens:
        await screen.until(lambda screen: screen.status == turn.status)
        assert screen.blocks == turn.reply.blocks
        assert screen.seq == turn.end_seq
        assert screen.revision == turn.conversation.revision
    return turn


# ------------------------------------------------------------------------------------------------ join and resume


@pytest.mark.parametrize("apart", [False, True], ids=["own process", "other process"])
async def test_a_viewer_cut_off_anywhere_continues_without_gap_or_double(chat: Chat, *, apart: bool) -> None:
    steps, gates = gated_answer(*AWKWARD)
    chat.script.replies = [answer("before"), steps]
    conversation = await chat.conversation()
    if apart:
        await chat.apart(conversation)
    await chat.ended((await chat.send(conversation, "one")).id)
    _, first = chat.view(conversation)
    await first.until(lambda screen: screen.text == "before")
    started = await chat.send(conversation, "two")
    await gates[0].reached()
    await first.until(lambda screen: screen.turn and screen.turn["id"] == str(started.id) and screen.seq >= 1)
    cut_off, screens = [first.copy()], [first]
    for number, gate in enumerate(gates[:-1]):
        gate.open()
        await gates[number + 1].reached()
        shown = "".join(AWKWARD[: number + 1])
        await first.until_text(shown)
        for lost in cut_off:  # everybody who was ever cut off comes back now, with what they had then
            _, screen = chat.view(conversation, token=lost.token, screen=lost.copy())
            await screen.until_text(shown)
            screens.append(screen)
        _, fresh = chat.view(conversation)
        await fresh.until_text(shown)
        screens.append(fresh)
        cut_off.append(first.copy())
    gates[-1].open()
    turn = await ends_as_stored(chat, started.id, screens)
    assert turn.reply.text == "".join(AWKWARD)
    for lost in [*cut_off, first.copy()]:  # and now that it is over
        _, late = chat.view(conversation, token=lost.token, screen=lost.copy())
        await ends_as_stored(chat, started.id, [late])
    assert [screen.kinds.count("snapshot") for screen in screens] == [1] * len(screens)


async def test_a_viewer_that_lacks_nothing_is_sent_nothing(chat: Chat) -> None:
    conversation = await chat.conversation()
    await chat.ended((await chat.send(conversation)).id)
    _, screen = chat.view(conversation)
    await screen.until(lambda screen: screen.kinds)
    viewer, again = chat.view(conversation, token=screen.token, screen=screen.copy())
    await eventually(lambda: viewer._waiting)
    await turns.update_conversation(chat.user, conversation.pk, title="new")
    await again.until(lambda screen: "conversation" in screen.kinds)
    assert again.kinds == ["snapshot", "conversation"]
    viewer.close()


@pytest.mark.parametrize(
    "token",
    [
        "0.-.0",
        "999999999999999.-.0",
        "2.00000000-0000-0000-0000-000000000000.3",
        "{revision}.{turn}.999999999",
        "{revision}.{turn}.0",
        "{revision}.-.0",
        "0.{turn}.1",
    ],
)
async def test_a_cursor_that_fits_nothing_is_answered_with_a_snapshot(chat: Chat, token: str) -> None:
    conversation = await chat.conversation()
    turn = await chat.ended((await chat.send(conversation)).id)
    token = token.format(revision=turn.conversation.revision, turn=turn.pk)
    _, screen = chat.view(conversation, token=token)
    await screen.until(lambda screen: screen.text == "Hello")
    assert screen.kinds[0] == "snapshot"


async def test_a_future_cursor_of_a_running_turn_is_answered_with_a_snapshot(chat: Chat) -> None:
    steps, gates = gated_answer("Hello")
    chat.script.replies = [steps]
    conversation = await chat.conversation()
    started = await chat.send(conversation)
    await gates[0].reached()
    await chat.committed(started.id, 1)
    _, screen = chat.view(conversation, token=f"1.{started.id}.77")
    await screen.until(lambda screen: screen.kinds)
    assert screen.kinds[0] == "snapshot"
    for gate in gates:
        gate.open()
    await ends_as_stored(chat, started.id, [screen])


async def test_a_turn_that_ends_between_the_reads_of_a_snapshot_is_shown_whole(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, gates = gated_answer("Hello")
    chat.script.replies = [steps]
    conversation = await chat.conversation()
    started = await chat.send(conversation)
    await gates[0].reached()
    loop = asyncio.get_running_loop()
    forms = snapshot.message_forms

    def ended_meanwhile(messages: Any) -> Any:
        for gate in gates:
            loop.call_soon_threadsafe(gate.open)
        asyncio.run_coroutine_threadsafe(chat.ended(started.id), loop).result(10)
        return forms(messages)

    monkeypatch.setattr(snapshot, "message_forms", ended_meanwhile)
    _, screen = chat.view(conversation)
    turn = await ends_as_stored(chat, started.id, [screen])
    assert turn.reply.text == "Hello"


async def test_after_the_entries_were_swept_a_viewer_gets_a_snapshot(chat: Chat) -> None:
    from streaming_chat.models import JournalEntry

    steps, gates = gated_answer("Hel", "lo")
    chat.script.replies = [steps]
    conversation = await chat.conversation()
    started = await chat.send(conversation)
    gates[0].open()
    await gates[1].reached()
    _, screen = chat.view(conversation)
    await screen.until(lambda screen: screen.text == "Hel")
    lost = screen.copy()
    for gate in gates:
        gate.open()
    await ends_as_stored(chat, started.id, [screen])
    await in_database(JournalEntry.objects.all().delete)
    _, late = chat.view(conversation, token=lost.token, screen=lost)
    await ends_as_stored(chat, started.id, [late])
    follower = Screen()
    follower.messages = {str(started.reply_id): {"blocks": []}}
    follower.turn = {"id": str(started.id), "reply_id": str(started.reply_id)}
    follower.revision = 1
    get_hub().pump(get_hub().follow(conversation.pk, started.id), follower.show)
    await follower.until(lambda screen: "finished" in screen.kinds)
    assert follower.text == "Hello"


async def test_a_resume_during_a_reread_is_answered(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = await chat.conversation()
    await chat.ended((await chat.send(conversation)).id)
    viewer, screen = chat.view(conversation)
    await screen.until(lambda screen: screen.kinds == ["snapshot"])
    loop = asyncio.get_running_loop()
    catch_up = snapshot.catch_up

    def resumed_meanwhile(*args: Any) -> Any:
        found = catch_up(*args)
        monkeypatch.setattr(snapshot, "catch_up", catch_up)
        asyncio.run_coroutine_threadsafe(_call(lambda: viewer.resume(None)), loop).result(10)
        return found

    monkeypatch.setattr(snapshot, "catch_up", resumed_meanwhile)
    viewer.reread()
    await screen.until(lambda screen: screen.kinds == ["snapshot", "snapshot"])


async def _call(act: Callable[[], None]) -> None:
    act()


async def test_resume_goes_back_to_where_the_client_stands(chat: Chat) -> None:
    steps, gates = gated_answer("Hel", "lo")
    chat.script.replies = [steps]
    conversation = await chat.conversation()
    started = await chat.send(conversation)
    gates[0].open()
    await gates[1].reached()
    viewer, screen = chat.view(conversation)
    await screen.until(lambda screen: screen.text == "Hel")
    token = screen.token
    assert token is not None
    before = screen.copy()
    gates[1].open()
    await gates[2].reached()
    await screen.until(lambda screen: screen.text == "Hello")
    screen.__dict__ = before.__dict__  # the page was thrown back
    viewer.resume(Cursor.parse(token))
    await screen.until(lambda screen: screen.text == "Hello")
    gates[2].open()
    await ends_as_stored(chat, started.id, [screen])


# ------------------------------------------------------------------------------------------------ a faulty layer


@pytest.mark.usefixtures("faulty")
@pytest.mark.parametrize("seed", range(6))
async def test_lost_doubled_reordered_and_late_messages_change_nothing(chat: Chat, seed: int) -> None:
    chance = random.Random(seed)
    steps, gates = gated_answer(*AWKWARD, *AWKWARD)
    chat.script.replies = [steps]
    conversation = await chat.conversation()
    await chat.apart(conversation)
    faulty_layer().fault = lambda message: chance.choice(["send", "send", "lose", "double", "late"])
    screens = [chat.view(conversation)[1] for _ in range(3)]
    for screen in screens:
        await screen.until(lambda screen: screen.kinds)
    started = await chat.send(conversation)
    for number, gate in enumerate(gates[:-1]):
        gate.open()
        await gates[number + 1].reached()
        await chat.committed(started.id, number + 1)
        if chance.random() < 0.3:
            screens.append(chat.view(conversation)[1])
    gates[-1].open()
    turn = await ends_as_stored(chat, started.id, screens)
    assert turn.reply.text == "".join(AWKWARD) * 2
    assert {"lose", "double", "late"} <= set(faulty_layer().faults)


@pytest.mark.usefixtures("faulty")
@pytest.mark.parametrize("lost", ["everything", "finished", "the last entry"])
async def test_a_lost_last_message_is_healed_by_positioning(chat: Chat, lost: str) -> None:
    steps, gates = gated_answer("Hel", "lo")
    chat.script.replies = [steps]
    conversation = await chat.conversation()
    await chat.apart(conversation)
    _, screen = chat.view(conversation)
    await screen.until(lambda screen: screen.kinds)
    kinds = {"everything": {"turn", "delta", "finished"}, "finished": {"finished"}, "the last entry": {"delta"}}[lost]
    started = await chat.send(conversation)
    gates[0].open()
    await gates[1].reached()
    await screen.until(lambda screen: screen.text == "Hel")
    faulty_layer().fault = lambda message: "lose" if message["frame"][0] in kinds else "send"
    gates[1].open()
    await gates[2].reached()
    if lost == "everything":
        await screen.until(lambda screen: screen.text == "Hello")  # while the turn is silent
    gates[2].open()
    await ends_as_stored(chat, started.id, [screen])
    assert "lose" in faulty_layer().faults


@pytest.mark.usefixtures("faulty")
async def test_a_layer_that_is_away_delays_and_loses_nothing(chat: Chat) -> None:
    chat.script.replies = [answer(*AWKWARD)]
    conversation = await chat.conversation()
    await chat.apart(conversation)
    _, screen = chat.view(conversation)
    await screen.until(lambda screen: screen.kinds)
    faulty_layer().fault = lambda message: "raise"
    started = await chat.send(conversation)
    turn = await ends_as_stored(chat, started.id, [screen])
    assert turn.reply.text == "".join(AWKWARD)


@pytest.mark.usefixtures("faulty")
async def test_while_joining_a_group_hangs_viewers_hear_that_their_turn_lives_and_get_its_text(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, gates = gated_answer("Hel", "lo")
    chat.script.replies = [steps]
    conversation = await chat.conversation()
    await chat.apart(conversation)
    _, screen = chat.view(conversation)
    await screen.until(lambda screen: screen.kinds)
    started = await chat.send(conversation)
    gates[0].open()
    await gates[1].reached()
    await screen.until(lambda screen: screen.text == "Hel")
    layer = faulty_layer()
    layer.joins_return.clear()
    layer.fault = lambda message: "lose"
    monkeypatch.setattr(hub, "LAYER_TIMEOUT_SECONDS", 600.0)
    monkeypatch.setattr(hub, "REJOIN_SECONDS", 0.0)
    await eventually(lambda: layer.joining)
    before = screen.kinds.count("progress")
    await screen.until(lambda screen: screen.kinds.count("progress") >= before + 3)
    gates[1].open()
    await gates[2].reached()
    await screen.until(lambda screen: screen.text == "Hello")
    gates[2].open()
    await ends_as_stored(chat, started.id, [screen])
    assert len(layer.joining) == 1


@pytest.mark.usefixtures("faulty")
async def test_groups_are_joined_one_at_a_time_and_all_of_them_once_the_layer_answers(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversations = [await chat.conversation() for _ in range(4)]
    for conversation in conversations:
        _, screen = chat.view(conversation)
        await screen.until(lambda screen: screen.kinds)
    layer = faulty_layer()
    most: list[int] = []
    joined = {group_name(str(conversation.pk)) for conversation in conversations}
    assert set(layer.joined) == joined
    layer.joined.clear()
    layer.joins_return.clear()
    monkeypatch.setattr(hub, "LAYER_TIMEOUT_SECONDS", 0.25)  # longer than a beat
    monkeypatch.setattr(hub, "REJOIN_SECONDS", 0.0)
    tried: set[str] = set()

    def all_tried() -> bool:
        most.append(len(layer.joining))
        tried.update(layer.joining)
        return tried == joined

    await eventually(all_tried)
    assert max(most) == 1
    assert layer.joined == []
    monkeypatch.setattr(hub, "REJOIN_SECONDS", 600.0)
    layer.joins_return.set()
    await eventually(lambda: set(layer.joined) == joined)


async def test_without_a_layer_viewers_are_served_from_the_journal(chat: Chat, fast: Callable[..., None]) -> None:
    fast(CHANNEL_LAYER="there is none")
    chat.script.replies = [answer(*AWKWARD)]
    conversation = await chat.conversation()
    _, screen = chat.view(conversation)
    await screen.until(lambda screen: screen.kinds)
    await ends_as_stored(chat, (await chat.send(conversation)).id, [screen])


async def test_what_one_process_does_is_seen_in_another_over_the_layer(chat: Chat) -> None:
    steps, gates = gated_answer("Hel", "lo")
    chat.script.replies = [steps]
    conversation = await chat.conversation()
    await chat.apart(conversation)
    _, screen = chat.view(conversation)
    await screen.until(lambda screen: screen.kinds)
    started = await chat.send(conversation)
    gates[0].open()
    await screen.until(lambda screen: screen.text == "Hel")
    for gate in gates:
        gate.open()
    await ends_as_stored(chat, started.id, [screen])
    kinds = [kind for kind in screen.kinds if kind != "progress"]
    assert kinds[:2] == ["snapshot", "turn"]
    assert kinds[-1] == "finished"


# ------------------------------------------------------------------------------------------------ slow viewers


async def test_a_viewer_that_does_not_keep_up_is_bounded_and_catches_up(chat: Chat, fast: Callable[..., None]) -> None:
    fast(VIEWER_BUFFER_BYTES=2000)
    steps, gates = gated_answer(*["x" * 400] * 20)
    chat.script.replies = [steps]
    conversation = await chat.conversation()
    go_on, screen = asyncio.Event(), Screen()
    viewer = get_hub().watch(conversation.pk, lambda: chat.user)

    async def slowly(sent: Sent) -> None:
        await screen.show(sent)
        await go_on.wait()

    get_hub().pump(viewer, slowly)
    await screen.until(lambda screen: screen.kinds == ["snapshot"])
    _, quick = chat.view(conversation)
    started = await chat.send(conversation)
    for number, gate in enumerate(gates[:-1]):
        gate.open()
        await gates[number + 1].reached()
        await quick.until_text("x" * 400 * (number + 1))
        assert viewer._frames_bytes <= 2000
    assert screen.kinds == ["snapshot"]
    go_on.set()
    await screen.until(lambda screen: len(screen.text) == 8000)
    gates[-1].open()
    await ends_as_stored(chat, started.id, [screen, quick])


async def test_a_viewer_that_acknowledges_nothing_is_sent_only_so_much(chat: Chat, fast: Callable[..., None]) -> None:
    fast(VIEWER_BUFFER_BYTES=2000)
    steps, gates = gated_answer(*["x" * 400] * 20)
    chat.script.replies = [steps]
    conversation = await chat.conversation()
    viewer, screen = chat.view(conversation)
    viewer.needs_acks = True
    _, quick = chat.view(conversation)
    started = await chat.send(conversation)
    for number, gate in enumerate(gates[:-1]):
        gate.open()
        await gates[number + 1].reached()
        await quick.until_text("x" * 400 * (number + 1))
    sent = [event for event in screen.events if event["type"] == "delta"]
    assert 400 <= len(screen.text) <= 2400
    viewer.acknowledge(str(uuid.uuid4()), 999)  # of another turn
    viewer.acknowledge(str(started.id), 0)
    await quick.until(lambda screen: screen.kinds.count("progress") >= 2)
    assert [event for event in screen.events if event["type"] == "delta"] == sent
    viewer.acknowledge(str(started.id), screen.seq)
    await screen.until(lambda screen: len(screen.text) == 8000)
    viewer.acknowledge(str(started.id), screen.seq)
    gates[-1].open()
    await ends_as_stored(chat, started.id, [screen, quick])


async def test_a_viewer_that_takes_nothing_for_minutes_is_dropped(chat: Chat) -> None:
    conversation = await chat.conversation()
    never, screen = asyncio.Event(), Screen()
    viewer = get_hub().watch(conversation.pk, lambda: chat.user)

    async def stuck(sent: Sent) -> None:
        await screen.show(sent)
        await never.wait()

    get_hub().pump(viewer, stuck)
    await screen.until(lambda screen: screen.kinds)
    await turns.update_conversation(chat.user, conversation.pk, title="new")
    viewer.beat(time.monotonic() + ACCESS_SECONDS - 1)
    assert get_hub().viewers == 1
    viewer.beat(time.monotonic() + ABANDONED_SECONDS + 1)
    assert get_hub().viewers == 0


# ------------------------------------------------------------------------------------------------ who may look


async def test_a_stranger_sees_the_same_as_for_a_conversation_that_does_not_exist(chat: Chat, bob: User) -> None:
    conversation = await chat.conversation()
    for key in (conversation.pk, uuid.uuid4()):
        _, screen = chat.view(key, user=bob)
        await screen.until(lambda screen: screen.kinds)
        assert screen.events == [{"type": "deleted"}]
    await eventually(lambda: get_hub().viewers == 0)


@pytest.mark.parametrize("role", ["viewer", "editor", "owner"])
async def test_everybody_who_takes_part_may_look(chat: Chat, bob: User, role: str) -> None:
    conversation = await chat.conversation()
    await chat.join(conversation, bob, role)
    _, screen = chat.view(conversation, user=bob)
    await screen.until(lambda screen: screen.kinds)
    assert screen.events[0]["conversation"]["role"] == role


@pytest.mark.parametrize("apart", [False, True], ids=["own process", "other process"])
async def test_a_deleted_conversation_is_gone_from_every_screen(chat: Chat, *, apart: bool) -> None:
    steps, gates = gated_answer("Hello")
    chat.script.replies = [steps]
    conversation = await chat.conversation()
    if apart:
        await chat.apart(conversation)
    _, screen = chat.view(conversation)
    await screen.until(lambda screen: screen.kinds)
    await chat.send(conversation)
    await gates[0].reached()
    await turns.delete_conversation(chat.user, conversation.pk)
    await screen.until(lambda screen: "deleted" in screen.kinds)
    await eventually(lambda: get_hub().viewers == 0)
    assert screen.kinds[-1] == "closed"
    _, again = chat.view(conversation, token=screen.token)
    await again.until(lambda screen: screen.kinds[:1] == ["deleted"])


async def test_a_viewer_whose_access_was_revoked_is_told_within_the_minute(chat: Chat, bob: User) -> None:
    conversation = await chat.conversation()
    await chat.join(conversation, bob, "viewer")
    viewer, screen = chat.view(conversation, user=bob)
    await screen.until(lambda screen: screen.kinds)
    await in_database(Participant.objects.filter(user=bob).delete)
    viewer.beat(time.monotonic() + ACCESS_SECONDS + 1)
    await screen.until(lambda screen: "deleted" in screen.kinds)
    await eventually(lambda: get_hub().viewers == 0)


async def test_a_viewer_who_has_signed_out_is_told_within_the_minute(chat: Chat) -> None:
    conversation = await chat.conversation()
    who: list[User | AnonymousUser] = [chat.user]
    viewer = get_hub().watch(conversation.pk, lambda: who[0])
    screen = Screen()
    get_hub().pump(viewer, screen.show)
    await screen.until(lambda screen: screen.kinds)
    who[0] = AnonymousUser()
    viewer.beat(time.monotonic() + ACCESS_SECONDS + 1)
    await screen.until(lambda screen: "error" in screen.kinds)
    await eventually(lambda: get_hub().viewers == 0)


async def test_a_viewer_whose_access_was_revoked_gets_no_snapshot_on_resume(chat: Chat, bob: User) -> None:
    conversation = await chat.conversation()
    await chat.join(conversation, bob, "viewer")
    viewer, screen = chat.view(conversation, user=bob)
    await screen.until(lambda screen: screen.kinds)
    await in_database(Participant.objects.filter(user=bob).delete)
    viewer.resume(None)
    await screen.until(lambda screen: "deleted" in screen.kinds)
    assert screen.kinds.count("snapshot") == 1


# ------------------------------------------------------------------------------------------------ signs of life


async def test_a_silent_turn_shows_that_it_is_alive_and_what_it_does(chat: Chat) -> None:
    silent, thinking, writing = Gate(), Gate(), Gate()
    chat.script.replies = [
        [
            silent,
            BEGAN,
            {"op": "start", "index": 0, "block": {"type": "thinking", "thinking": ""}},
            append("hm", 0, "thinking"),
            thinking,
            start(1),
            append("Hello", 1),
            writing,
            *answer()[2:],
        ]
    ]
    conversation = await chat.conversation()
    _, screen = chat.view(conversation)
    await screen.until(lambda screen: screen.kinds)
    started = await chat.send(conversation)

    def progress(screen: Screen) -> list[str]:
        return [event["activity"] for event in screen.events if event["type"] == "progress"]

    await screen.until(lambda screen: progress(screen).count("waiting") >= 2)
    silent.open()
    await screen.until(lambda screen: progress(screen).count("thinking") >= 2)
    thinking.open()
    await screen.until(lambda screen: progress(screen).count("writing") >= 2)
    writing.open()
    await ends_as_stored(chat, started.id, [screen])
    order = list(dict.fromkeys(progress(screen)))
    assert order == ["waiting", "thinking", "writing"]
    told = [event for event in screen.events if event["type"] == "progress"]
    assert {event["turn"] for event in told} == {str(started.id)}
    elapsed = [event["elapsed_seconds"] for event in told]
    assert elapsed == sorted(elapsed)


async def test_after_the_end_there_is_no_progress_but_a_heartbeat(chat: Chat, fast: Callable[..., None]) -> None:
    fast(HEARTBEAT_SECONDS=0.2)
    conversation = await chat.conversation()
    _, screen = chat.view(conversation)
    started = await chat.send(conversation)
    await ends_as_stored(chat, started.id, [screen])
    seen = len(screen.kinds)
    await screen.until(lambda screen: screen.kinds[seen:].count("heartbeat") >= 2)
    assert set(screen.kinds[seen:]) == {"heartbeat"}


# ------------------------------------------------------------------------------------------------ leaving


async def test_closing_the_hub_ends_every_viewer(chat: Chat) -> None:
    conversation = await chat.conversation()
    screens = [chat.view(conversation)[1] for _ in range(3)]
    for screen in screens:
        await screen.until(lambda screen: screen.kinds)
    assert get_hub().viewers == 3
    await get_hub().close()
    assert get_hub().viewers == 0
    assert [task for task in asyncio.all_tasks() if "viewer of" in task.get_name()] == []


async def test_somebody_who_comes_while_the_last_one_leaves_hears_everything(chat: Chat) -> None:
    conversation = await chat.conversation()
    await chat.apart(conversation)
    for _ in range(5):
        viewer, screen = chat.view(conversation)
        await screen.until(lambda screen: screen.kinds)
        viewer.close()
    _, screen = chat.view(conversation)
    await screen.until(lambda screen: screen.kinds)
    await ends_as_stored(chat, (await chat.send(conversation)).id, [screen])


async def test_a_snapshot_is_the_last_page_and_says_that_there_is_more(chat: Chat, fast: Callable[..., None]) -> None:
    fast(SNAPSHOT_MESSAGES=3)
    conversation = await chat.conversation()
    for text in ("one", "two"):
        await chat.ended((await chat.send(conversation, text)).id)
    _, screen = chat.view(conversation)
    await screen.until(lambda screen: screen.kinds)
    event = screen.events[0]
    assert [message["blocks"][0]["text"] for message in event["messages"]] == ["Hello", "two", "Hello"]
    assert event["has_earlier"] is True
    assert event["messages"][1]["author"] == "ann"
    assert [message["role"] for message in event["messages"]] == ["assistant", "user", "assistant"]
    assert get_runner().running == 0
    assert await in_database(Message.objects.count) == 4
    assert await in_database(Conversation.objects.count) == 1
