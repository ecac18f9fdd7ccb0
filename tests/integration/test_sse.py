"""Server-Sent Events: the conversation's stream, and the answer to a POST."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth import get_user_model
from django.db import connection

from streaming_chat import limits, protocol, turns
from streaming_chat.hub import get_hub
from streaming_chat.models import Conversation, Message, Turn
from streaming_chat.testing import FakeAnthropic, Gate, Reply
from tests import services, wire
from tests.settings import BACKEND, MIDDLEWARE
from tests.wire import EventStream, Sse, SseReader, View

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    import aiohttp
    from django.contrib.auth.models import User
    from django.test import AsyncClient

    from tests.wire import LocalSite

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.filterwarnings("ignore:No directory at"),  # static files are not collected for the tests
]

NASTY = "a\r\nb\rc\n\nevent: evil\ndata: {}\n\nid: 0\u2028event: x\u2029\x85retry: 1\n: comment"


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
async def conversation(user: User) -> Conversation:
    return await turns.create_conversation(user, title="A talk")


@pytest.fixture
async def client(local: LocalSite, user: User) -> AsyncClient:
    return await local.client(user)


@contextlib.asynccontextmanager
async def stream(
    client: AsyncClient, conversation: object, after: str | None = None, view: View | None = None, **headers: str
) -> AsyncIterator[EventStream]:
    """The conversation's events, in this process."""
    query = {} if after is None else {"after": after}
    response: Any = await client.get(wire.api_path(conversation, "/events"), query, headers=headers or None)
    assert response.status_code == 200, response.content
    assert response["Content-Type"] == "text/event-stream"
    async with contextlib.aclosing(response.streaming_content) as pieces:
        yield EventStream(aiter(pieces), view)


async def post(
    client: AsyncClient, conversation: object, body: dict[str, Any], accept: str = "text/event-stream"
) -> Any:
    return await client.post(
        wire.api_path(conversation, "/messages"),
        json.dumps(body),
        content_type="application/json",
        headers={"accept": accept, "x-csrftoken": wire.CSRF_TOKEN},
    )


async def ask(user: User, conversation: Conversation, text: str = "Hello") -> turns.Reply:
    """A whole turn."""
    return await turns.stream_reply(user, text, conversation_id=conversation.pk)


# ------------------------------------------------------------------------------------------------ a conversation


async def test_a_conversation_is_followed_from_its_snapshot(
    client: AsyncClient, user: User, conversation: Conversation, anthropic: FakeAnthropic
) -> None:
    anthropic.enqueue(Reply.text("Hello, world", chunks=4))
    async with stream(client, conversation.pk) as events:
        first = await events.until("snapshot")
        assert first.id == events.view.cursor
        await ask(user, conversation)
        finished = await events.until("finished")
        assert finished.id == events.view.cursor
        reply = await Message.objects.aget(pk=events.view.reply_id)
        assert events.view.blocks() == reply.blocks
        assert events.view.usage is not None
        await turns.update_conversation(user, conversation.pk, title="Another name")
        assert (await events.until("conversation")).data["title"] == "Another name"
        await turns.delete_conversation(user, conversation.pk)
        await events.until("deleted")
        assert await events.next() is None
    assert get_hub().viewers == 0
    assert limits.event_streams.held(user.pk) == 0


async def test_headers_keep_caches_and_proxies_from_collecting(client: AsyncClient, conversation: Conversation) -> None:
    response: Any = await client.get(wire.api_path(conversation.pk, "/events"))
    assert response["Cache-Control"] == "private, no-store, no-transform"
    assert response["X-Accel-Buffering"] == "no"
    assert response["Content-Encoding"] == "identity"
    await response.streaming_content.aclose()


async def test_after_a_cursor_only_what_is_missing_comes(
    client: AsyncClient, user: User, conversation: Conversation, anthropic: FakeAnthropic
) -> None:
    gate = Gate()
    anthropic.enqueue(Reply.text("one ", gate, "two"))
    async with stream(client, conversation.pk) as events:
        await events.until("snapshot")
        asking = asyncio.ensure_future(ask(user, conversation))
        while not events.view.seq:
            await events.next()
        left_at = events.reader.last_id
        view = events.view
    gate.open()
    await asking
    seen = len(view.history)
    async with stream(client, conversation.pk, after="garbage", view=view, **{"last-event-id": str(left_at)}) as events:
        await events.until("finished", "snapshot")
    assert view.text() == "one two"
    for event in view.history[seen:]:
        assert event["type"] in ("delta", "finished", "progress", "snapshot")


async def test_a_cursor_that_cannot_be_leads_to_a_snapshot(
    client: AsyncClient, user: User, conversation: Conversation
) -> None:
    await ask(user, conversation)
    async with stream(client, conversation.pk) as events:
        await events.until("snapshot")
        revision, turn, seq = events.view.cursor.split(".")
    for cursor in (
        "garbage",
        "-1",
        "-1.-.-1",
        f"{int(revision) + 9}.{turn}.{seq}",
        f"{revision}.{turn}.{int(seq) + 9}",
        f"{revision}.{uuid.uuid4()}.{seq}",
        "9" * 4000,
        "999999999999999.-.999999999",
        "1\u00b2.-.0",
    ):
        for by in ({"after": cursor}, {"last-event-id": cursor}):
            async with stream(client, conversation.pk, **by) as events:  # type: ignore[arg-type]
                assert (await events.until("snapshot")).id == f"{revision}.{turn}.{seq}", cursor


async def test_a_cursor_of_another_conversation_is_not_found(
    client: AsyncClient, user: User, conversation: Conversation
) -> None:
    other = await turns.create_conversation(user)
    reply = await ask(user, other)
    response: Any = await client.get(
        wire.api_path(conversation.pk, "/events"), headers={"last-event-id": f"3.{reply.turn_id}.1"}
    )
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"
    assert limits.event_streams.held(user.pk) == 0


async def test_nothing_in_text_title_or_name_starts_a_field(
    client: AsyncClient, user: User, conversation: Conversation, anthropic: FakeAnthropic
) -> None:
    anthropic.enqueue(Reply.text(NASTY, chunks=len(NASTY)))
    await get_user_model().objects.filter(pk=user.pk).aupdate(username=NASTY)
    user.username = NASTY
    await Conversation.objects.filter(pk=conversation.pk).aupdate(title=NASTY)
    async with stream(client, conversation.pk) as events:  # the reader refuses any field that nobody meant
        snapshot = await events.until("snapshot")
        assert snapshot.data["conversation"]["title"] == NASTY
        reply = await ask(user, conversation, NASTY.replace("\x85", ""))
        await events.until("finished")
        assert events.view.text() == reply.text == NASTY
    async with stream(client, conversation.pk) as events:
        snapshot = await events.until("snapshot")
        assert [message["author"] for message in snapshot.data["messages"]] == [NASTY, None]


async def test_silence_is_filled_with_comments(
    client: AsyncClient, conversation: Conversation, settings: Any, anthropic: FakeAnthropic
) -> None:
    configure(settings, anthropic, HEARTBEAT_SECONDS=0.1, PROGRESS_SECONDS=0.05)
    async with stream(client, conversation.pk) as events:
        assert (await events.until("snapshot")).kind == "snapshot"
        for _ in range(2):
            assert await events.next() == Sse("", {}, comment="still here")


async def test_a_silent_turn_shows_progress(
    client: AsyncClient, user: User, conversation: Conversation, settings: Any, anthropic: FakeAnthropic
) -> None:
    configure(settings, anthropic, PROGRESS_SECONDS=0.05)
    gate = Gate()
    anthropic.enqueue(Reply.text(gate, "at last"))
    async with stream(client, conversation.pk) as events:
        await events.until("snapshot")
        asking = asyncio.ensure_future(ask(user, conversation))
        elapsed = [(await events.until("progress")).data["elapsed_seconds"] for _ in range(3)]
        assert elapsed == sorted(elapsed)
        gate.open()
        await events.until("finished")
        await asking


# ------------------------------------------------------------------------------------------------ refusals


async def test_what_the_stream_does_not_do_is_refused(client: AsyncClient, conversation: Conversation) -> None:
    path = wire.api_path(conversation.pk, "/events")
    response: Any
    for method in ("post", "put", "patch", "delete"):
        response = await getattr(client, method)(path, headers={"x-csrftoken": wire.CSRF_TOKEN})
        assert response.status_code == 405
    for accept in ("text/html", "application/json", "image/*"):
        response = await client.get(path, headers={"accept": accept})
        assert response.status_code == 406
        assert response.json()["error"]["code"] == "not_acceptable"
    for accept in ("text/event-stream", "*/*", "text/*", "text/html, */*;q=0.1"):
        response = await client.get(path, headers={"accept": accept})
        assert response.status_code == 200
        await response.streaming_content.aclose()


async def test_the_seventh_stream_is_too_many(client: AsyncClient, user: User, conversation: Conversation) -> None:
    leave = asyncio.Event()

    async def watch() -> None:  # in a task of its own, as servers do
        async with stream(client, conversation.pk) as events:
            await events.until("snapshot")
            watching.append(events)
            await leave.wait()

    watching: list[EventStream] = []
    async with asyncio.TaskGroup() as six:
        for _ in range(6):
            six.create_task(watch())
        await wire.until(lambda: len(watching) == 6)
        assert limits.event_streams.held(user.pk) == 6
        response: Any = await client.get(wire.api_path(conversation.pk, "/events"))
        assert response.status_code == 429
        assert response.json()["error"]["code"] == "rate_limited"
        before = await Message.objects.acount()
        response = await post(client, conversation.pk, {"text": "Hello", "client_id": "c1"})
        assert response.status_code == 429
        assert await Message.objects.acount() == before
        assert await Turn.objects.acount() == 0
        leave.set()
    await wire.until(lambda: limits.event_streams.held(user.pk) == 0)
    async with stream(client, conversation.pk) as events:
        await events.until("snapshot")


async def test_a_regeneration_that_is_one_stream_too_many_changes_nothing(
    client: AsyncClient, user: User, conversation: Conversation, settings: Any, anthropic: FakeAnthropic
) -> None:
    reply = await ask(user, conversation)
    configure(settings, anthropic, EVENT_STREAMS_PER_USER=1)
    async with stream(client, conversation.pk) as events:
        await events.until("snapshot")
        response = await client.post(
            wire.api_path(conversation.pk, "/regenerate"),
            {"message_id": str(reply.message_id), "client_id": "r1"},
            content_type="application/json",
            headers={"accept": "text/event-stream", "x-csrftoken": wire.CSRF_TOKEN},
        )
        assert response.status_code == 429
        assert await Turn.objects.acount() == 1


async def test_a_client_that_leaves_before_the_first_byte_holds_no_place(
    client: AsyncClient, user: User, conversation: Conversation
) -> None:
    for _ in range(10):
        response: Any = await client.get(wire.api_path(conversation.pk, "/events"))
        assert response.status_code == 200
        await response.streaming_content.aclose()
    assert limits.event_streams.held(user.pk) == 0
    assert get_hub().viewers == 0


# ------------------------------------------------------------------------------------------------ the answer to a POST


async def test_a_post_streams_its_own_answer_and_ends_with_status_and_usage(
    client: AsyncClient, conversation: Conversation, anthropic: FakeAnthropic
) -> None:
    anthropic.enqueue(Reply.text("Hello, world", chunks=4))
    response = await post(client, conversation.pk, {"text": "Hello", "client_id": "c1"})
    assert response.status_code == 200
    assert response["Content-Type"] == "text/event-stream"
    assert response["Cache-Control"] == "private, no-store, no-transform"
    events = EventStream(aiter(response.streaming_content), View(one_turn=True))
    seen = [event.kind for event in await events.rest()]
    assert seen[0] == "accepted"
    assert seen[-1] == "finished"
    assert set(seen[1:-1]) <= {"delta", "progress"}
    assert events.view.status == "completed"
    assert events.view.usage is not None
    assert events.view.usage["exact"] is True
    reply = await Message.objects.aget(pk=events.view.reply_id)
    assert events.view.blocks() == reply.blocks == [{"type": "text", "text": "Hello, world"}]

    again = await post(client, conversation.pk, {"text": "Hello", "client_id": "c1"})
    repeated = EventStream(aiter(again.streaming_content), View(one_turn=True))
    first = await repeated.until("accepted")
    assert first.data["duplicate"] is True
    await repeated.rest()
    assert repeated.view.blocks() == reply.blocks
    assert len(anthropic.requests) == 1


async def test_a_post_that_asks_for_json_gets_202_and_ids(client: AsyncClient, conversation: Conversation) -> None:
    for accept in ("application/json", "*/*", ""):
        response = await post(client, conversation.pk, {"text": "Hello", "client_id": "c1"}, accept)
        assert response.status_code == 202
        assert response["Cache-Control"] == "private, no-store"
        turn = await Turn.objects.aget()
        assert response.json() == {
            "turn_id": str(turn.pk),
            "prompt_id": str(turn.prompt_id),
            "reply_id": str(turn.reply_id),
            "duplicate": accept != "application/json",
        }


async def test_a_failed_turn_ends_its_stream_with_the_reason(
    client: AsyncClient, conversation: Conversation, anthropic: FakeAnthropic
) -> None:
    anthropic.enqueue(Reply.error(401))
    response = await post(client, conversation.pk, {"text": "Hello", "client_id": "c1"})
    events = EventStream(aiter(response.streaming_content), View(one_turn=True))
    last = (await events.rest())[-1]
    assert last.data["turn"]["status"] == "failed"
    assert last.data["turn"]["error"]["code"] == "provider_auth"


# ------------------------------------------------------------------------------------------------ a real server


@pytest.fixture
def site_environment() -> dict[str, str]:
    middleware = ["django.middleware.gzip.GZipMiddleware", *MIDDLEWARE]
    return wire.server_environment(HEARTBEAT_SECONDS=0.3, PROGRESS_SECONDS=0.1, EVENT_STREAMS_PER_USER=40) | {
        "TEST_SETTINGS": json.dumps({"MIDDLEWARE": middleware})
    }


@pytest.fixture
def talk(transactional_db: None) -> Conversation:
    owner = get_user_model().objects.create(username="ada")
    return Conversation.objects.create(owner=owner)


@pytest.fixture
def key(talk: Conversation) -> str:
    return async_to_sync(wire.sign_in)(talk.owner)


@contextlib.asynccontextmanager
async def connect(
    session: aiohttp.ClientSession, site: services.Site, conversation_id: object, view: View | None = None
) -> AsyncIterator[EventStream]:
    async with session.get(
        site.url + wire.api_path(conversation_id, "/events"), headers={"Accept-Encoding": "gzip"}
    ) as response:
        assert response.status == 200, await response.text()
        yield EventStream(response.content.iter_any(), view)


async def test_over_the_network_nothing_is_held_back(site: services.Site, talk: Conversation, key: str) -> None:
    """With GZipMiddleware, which would collect; every word is its own piece, and silence is filled."""
    async with wire.network(key) as session, connect(session, site, talk.pk) as events:
        await events.until("snapshot")
        for _ in range(2):
            assert (await events.until("")).comment == "still here"
        async with session.post(
            site.url + wire.api_path(talk.pk, "/messages"),
            json={"text": "/wait 1", "client_id": "c1"},
            headers={"X-CSRFToken": wire.CSRF_TOKEN, "Accept": "text/event-stream", "Cookie": wire.csrf_cookie(key)},
        ) as response:
            assert response.status == 200, await response.text()
            answer = EventStream(response.content.iter_any(), View(one_turn=True))
            await events.until("progress")
            assert (await answer.rest())[-1].kind == "finished"
        await events.until("finished")
        assert events.view.blocks() == answer.view.blocks()
        kinds = [event["type"] for event in events.view.history]
        assert kinds.count("delta") > 2, kinds
    wire.assert_clean(site)


async def test_readers_that_stop_reading_and_leave_free_their_places(talk: Conversation, key: str) -> None:
    with services.serve(wire.server_environment(EVENT_STREAMS_PER_USER=2)) as site:
        async with wire.network(key) as session:
            head = (
                f"GET {wire.api_path(talk.pk, '/events')} HTTP/1.1\r\nHost: {site.address}\r\n"
                f"Cookie: sessionid={key}\r\n\r\n"
            )
            host, port = site.address.split(":")
            for _ in range(3):
                readers = [await asyncio.open_connection(host, int(port), limit=1) for _ in range(2)]
                for reader, writer in readers:
                    writer.write(head.encode())
                    assert (await reader.readexactly(12)).endswith(b"200")
                async with session.get(site.url + wire.api_path(talk.pk, "/events")) as refused:
                    assert refused.status == 429
                for _, writer in readers:
                    writer.transport.abort()
                await eventually_free(session, site, talk)
        wire.assert_clean(site)


async def eventually_free(session: aiohttp.ClientSession, site: services.Site, talk: Conversation) -> None:
    """Wait until both places are free again."""
    async with asyncio.timeout(wire.PATIENCE_SECONDS):
        while True:
            async with AsyncExitStack() as stack:
                statuses = []
                for _ in range(2):
                    get = session.get(site.url + wire.api_path(talk.pk, "/events"))
                    statuses.append((await stack.enter_async_context(get)).status)
            if statuses == [200, 200]:
                break
            await asyncio.sleep(0.05)
    async with asyncio.timeout(wire.PATIENCE_SECONDS):
        while True:  # those two have left as well
            async with session.get(site.url + wire.api_path(talk.pk, "/events")) as response:
                if response.status == 200:
                    break
            await asyncio.sleep(0.05)


async def test_a_stream_holds_no_database_connection(site: services.Site, talk: Conversation, key: str) -> None:
    """More streams than the pool has connections, and the site still answers."""
    streams = 30
    async with wire.network(key) as session, AsyncExitStack() as stack:
        for _ in range(streams):
            await (await stack.enter_async_context(connect(session, site, talk.pk))).until("snapshot")
        async with session.get(site.url + wire.api_path()) as response:
            assert response.status == 200
        assert await open_connections(site) <= 10
    wire.assert_clean(site)


@sync_to_async
def open_connections(site: services.Site) -> int:
    """Connections to the database that the server's process holds."""
    if BACKEND == "sqlite":
        return wire.open_files(site.pid, str(connection.settings_dict["NAME"]))
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        return int(cursor.fetchone()[0])


def test_the_reader_of_these_tests_would_notice_a_forged_field() -> None:
    reader = SseReader()
    with pytest.raises(AssertionError, match="nobody meant"):
        reader.feed(b"event: delta\ndata: a\nevil: x\n\n")
    forged = protocol.sse_frame("conversation", '{"type":"conversation"}\nevent: evil')
    with pytest.raises(AssertionError):
        reader.feed(forged)
