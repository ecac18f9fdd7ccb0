"""The JSON API: what it does, and how it refuses."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth import get_user_model
from django.contrib.sessions.backends.db import SessionStore
from django.db import connection
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from streaming_chat import lifecycle, turns
from streaming_chat.models import Conversation, Message, Participant, Turn
from streaming_chat.protocol import frame_limit_bytes
from streaming_chat.testing import FakeAnthropic, Gate, Reply
from tests import services, wire
from tests.wire import LocalSite

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from django.contrib.auth.models import User
    from django.test import AsyncClient


pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.filterwarnings("ignore:No directory at"),  # static files are not collected for the tests
]

BODY_LIMIT_BYTES = frame_limit_bytes(32_000)
NOBODY = str(uuid.uuid4())


@pytest.fixture
def anthropic(settings: Any) -> Iterator[FakeAnthropic]:
    with FakeAnthropic() as server:
        settings.STREAMING_CHAT = {
            "PROVIDER": "anthropic",
            "ANTHROPIC_API_KEY": server.api_key,
            "ANTHROPIC_BASE_URL": server.base_url,
        }
        yield server


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
async def client(local: LocalSite, user: User) -> AsyncClient:
    return await local.client(user)


@pytest.fixture
async def conversation(user: User) -> Conversation:
    return await turns.create_conversation(user, title="A talk")


@pytest.fixture
def may_configure(anthropic: FakeAnthropic, settings: Any) -> None:
    settings.STREAMING_CHAT = {**settings.STREAMING_CHAT, "USERS_MAY_CONFIGURE": True}


async def call(
    client: AsyncClient,
    method: str,
    path: str,
    body: Any = None,
    *,
    content_type: str = "application/json",
    **headers: str,
) -> Any:
    """A request as a browser's script makes it; what is private is marked as that."""
    data = body if isinstance(body, str | bytes) else json.dumps(body)
    headers = {"x-csrftoken": wire.CSRF_TOKEN, **{name.replace("_", "-"): value for name, value in headers.items()}}
    if method == "get":
        response = await client.get(path, body, headers=headers)
    else:
        response = await client.generic(method.upper(), path, data, content_type, headers=headers)
    if response.status_code != 405 and response["Content-Type"].startswith("application/json"):
        assert response["Cache-Control"] == "private, no-store", path
    return response


def refusal(response: Any) -> tuple[int, str, str | None]:
    """Status, code and field of a refusal."""
    error = response.json()["error"]
    assert error["detail"]
    return response.status_code, error["code"], error.get("field")


@sync_to_async
def everything() -> list[Any]:
    """All rows that a request could change."""
    return [list(model.objects.order_by("pk").values()) for model in (Conversation, Message, Turn, Participant)]


# ------------------------------------------------------------------------------------------------ conversations


async def test_a_conversation_from_its_creation_to_its_end(client: AsyncClient, user: User) -> None:
    made = await call(client, "post", wire.api_path(), {"title": " A\u202e \n talk "})
    assert made.status_code == 201
    form = made.json()
    assert (form["title"], form["role"], form["archived"], form["running"]) == ("A talk", "owner", False, False)
    path = wire.api_path(form["id"])
    assert (await call(client, "get", path)).json() == form

    renamed = await call(client, "patch", path, {"title": "Another"})
    assert (renamed.status_code, renamed.json()["title"]) == (200, "Another")
    archived = await call(client, "patch", path, {"archived": True})
    assert (archived.json()["archived"], archived.json()["title"]) == (True, "Another")
    assert (await call(client, "get", wire.api_path())).json()["items"] == []
    listed = (await call(client, "get", wire.api_path(), {"archived": "true"})).json()["items"]
    assert [item["id"] for item in listed] == [form["id"]]
    assert (await call(client, "patch", path, {"archived": False})).json()["archived"] is False

    gone = await call(client, "delete", path)
    assert (gone.status_code, gone.content) == (204, b"")
    assert gone["Cache-Control"] == "private, no-store"
    assert refusal(await call(client, "get", path)) == (404, "not_found", None)
    assert await Conversation.objects.acount() == 0


async def test_the_list_is_paged_without_gap_or_double(client: AsyncClient, user: User) -> None:
    made = [str((await turns.create_conversation(user, title=str(number))).pk) for number in range(7)]
    found: list[str] = []
    before: dict[str, str] = {}
    while True:
        page = (await call(client, "get", wire.api_path(), {"limit": "3", **before})).json()
        assert len(page["items"]) <= 3
        found += [item["id"] for item in page["items"]]
        if page["next"] is None:
            break
        before = {"before": page["next"]}
    assert found == made[::-1]


async def test_messages_are_paged_back_to_the_first(
    client: AsyncClient, user: User, conversation: Conversation
) -> None:
    for number in range(4):
        await turns.stream_reply(user, f"prompt {number}", conversation_id=conversation.pk)
    path = wire.api_path(conversation.pk, "/messages")
    whole = (await call(client, "get", path)).json()
    assert [message["role"] for message in whole["items"]] == ["user", "assistant"] * 4
    assert whole["has_earlier"] is False
    found: list[Any] = []
    query: dict[str, str] = {"limit": "3"}
    while True:
        page = (await call(client, "get", path, query)).json()
        found = page["items"] + found
        if not page["has_earlier"]:
            break
        query["before"] = page["items"][0]["id"]
    assert [message["id"] for message in found] == [message["id"] for message in whole["items"]]


async def test_send_stop_and_regenerate(
    client: AsyncClient, conversation: Conversation, anthropic: FakeAnthropic
) -> None:
    gate = Gate()
    anthropic.enqueue(Reply.text("shown", gate, " not shown"), Reply.text("again"))
    accepted = await call(
        client, "post", wire.api_path(conversation.pk, "/messages"), {"text": "Hello", "client_id": "c1"}
    )
    assert accepted.status_code == 202
    ids = accepted.json()
    await gate.reached()
    async with asyncio.timeout(wire.PATIENCE_SECONDS):
        while (await Turn.objects.aget(pk=ids["turn_id"])).first_text_at is None:  # noqa: ASYNC110 - in another thread
            await asyncio.sleep(0.01)
    stopped = await call(client, "post", wire.api_path(conversation.pk, "/stop"), {"turn_id": ids["turn_id"]})
    assert (stopped.status_code, stopped.json()) == (200, {"status": "stopped"})
    assert (await Message.objects.aget(pk=ids["reply_id"])).text == "shown"
    before = await everything()
    again = await call(client, "post", wire.api_path(conversation.pk, "/stop"), {"turn_id": ids["turn_id"]})
    assert again.json() == {"status": "stopped"}
    assert (await call(client, "post", wire.api_path(conversation.pk, "/stop"), {})).json() == {"status": None}
    assert await everything() == before

    made = await call(
        client,
        "post",
        wire.api_path(conversation.pk, "/regenerate"),
        {"message_id": ids["reply_id"], "client_id": "r1"},
    )
    assert made.status_code == 202
    assert made.json()["prompt_id"] == ids["prompt_id"]
    assert made.json()["reply_id"] != ids["reply_id"]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("character", ["漢", "\N{GRINNING FACE}"])
async def test_the_longest_prompt_fits_in_any_script(
    character: str, ascii_only: bool, client: AsyncClient, conversation: Conversation
) -> None:
    text = character * 32_000
    body = json.dumps({"text": text, "client_id": "c1"}, ensure_ascii=ascii_only)
    sent = await call(client, "post", wire.api_path(conversation.pk, "/messages"), body)
    assert sent.status_code == 202
    assert (await Message.objects.aget(pk=sent.json()["prompt_id"])).text == text


async def test_a_site_of_atomic_requests_is_served(
    client: AsyncClient, user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(connection.settings_dict, "ATOMIC_REQUESTS", True)
    made = await call(client, "post", wire.api_path(), {"title": "A talk"})
    assert made.status_code == 201
    key = made.json()["id"]
    streamed = await call(
        client,
        "post",
        wire.api_path(key, "/messages"),
        {"text": "Hello", "client_id": "c1"},
        accept="text/event-stream",
    )
    assert streamed.status_code == 200
    *_, last = [piece async for piece in streamed.streaming_content]
    assert b"event: finished" in last
    reply = await Message.objects.aget(role="assistant")
    again = {"message_id": str(reply.pk), "client_id": "r1"}
    assert (await call(client, "post", wire.api_path(key, "/regenerate"), again)).status_code == 202
    assert (await call(client, "post", wire.api_path(key, "/stop"), {})).status_code == 200
    for path in (wire.api_path(), wire.api_path(key), wire.api_path(key, "/messages"), "/chat/api/openapi.json"):
        assert (await client.get(path)).status_code == 200, path
    events = await call(client, "get", wire.api_path(key, "/events"))
    pieces = events.streaming_content
    assert [await anext(pieces), (await anext(pieces)).splitlines()[1]] == [b"retry: 1000\n\n", b"event: snapshot"]
    await pieces.aclose()
    assert (await call(client, "patch", wire.api_path(key), {"title": "Another"})).status_code == 200

    forms = await LocalSite().client(user)
    for number, path in enumerate(("/chat/new/", f"/chat/conversations/{key}/send/")):
        form = {"text": "Hello", "client_id": str(uuid.UUID(int=number)), "csrfmiddlewaretoken": wire.CSRF_TOKEN}
        assert (await forms.post(path, form)).status_code == 302, path
    for path in ("/chat/", f"/chat/conversations/{key}/"):
        assert (await forms.get(path)).status_code == 200, path
    assert (await forms.get(wire.socket_path(key))).status_code == 426
    assert (await call(client, "delete", wire.api_path(key))).status_code == 204


async def test_a_process_that_stops_opens_no_more_streams(
    client: AsyncClient, user: User, conversation: Conversation
) -> None:
    assert (await client.get("/health/")).status_code == 200
    await lifecycle.stop()
    refused = await call(client, "get", wire.api_path(conversation.pk, "/events"))
    assert refusal(refused) == (503, "draining", None)
    assert refused["Retry-After"] == "1"
    assert (await client.get("/health/")).status_code == 503
    before = await everything()
    forms = await LocalSite().client(user)
    form = {"text": "Hello", "client_id": str(uuid.uuid4()), "csrfmiddlewaretoken": wire.CSRF_TOKEN}
    assert (await forms.post("/chat/new/", form)).status_code == 503
    assert await everything() == before


# ------------------------------------------------------------------------------------------------ refusals

BODIES: dict[str, tuple[str, str, Any, tuple[int, str, str | None]]] = {
    "not JSON": ("post", "/messages", "hello", (400, "bad_json", None)),
    "not UTF-8": ("post", "/messages", b'{"text": "\xff"}', (400, "bad_json", None)),
    "an array": ("post", "/messages", "[]", (400, "bad_json", None)),
    "null": ("post", "/messages", "null", (400, "bad_json", None)),
    "NaN": ("post", "/messages", '{"text": NaN}', (400, "bad_json", None)),
    "a key twice": ("post", "/messages", '{"text": "a", "text": "b"}', (400, "bad_json", None)),
    "too deep": ("post", "/messages", '{"text":' + "[" * 40 + "]" * 40 + "}", (400, "bad_json", None)),
    "a long integer": ("post", "/messages", '{"text": 12345678901234567}', (400, "bad_json", None)),
    "no text": ("post", "/messages", {"client_id": "c"}, (400, "bad_field", "text")),
    "text of a wrong type": ("post", "/messages", {"client_id": "c", "text": 1}, (400, "bad_field", "text")),
    "an extra field": ("post", "/messages", {"client_id": "c", "text": "a", "role": "x"}, (400, "bad_field", "role")),
    "a parent that is no id": (
        "post",
        "/messages",
        {"client_id": "c", "text": "a", "parent_id": "x"},
        (400, "bad_field", "parent_id"),
    ),
    "a timeout of nothing": (
        "post",
        "/messages",
        {"client_id": "c", "text": "a", "timeout_seconds": 0},
        (400, "bad_field", "timeout_seconds"),
    ),
    "an empty client id": ("post", "/messages", {"client_id": "", "text": "a"}, (400, "bad_field", "client_id")),
    "a strange client id": ("post", "/messages", {"client_id": "\n", "text": "a"}, (400, "bad_field", "client_id")),
    "half a character": ("post", "/messages", {"client_id": "c", "text": "\ud800"}, (400, "bad_text", "text")),
    "a NUL": ("post", "/messages", {"client_id": "c", "text": "a\x00"}, (400, "bad_text", "text")),
    "only white space": ("post", "/messages", {"client_id": "c", "text": "\n "}, (400, "bad_text", "text")),
    "a long text": ("post", "/messages", {"client_id": "c", "text": "x" * 32_001}, (413, "too_large", "text")),
    "a long body": ("post", "/messages", "x" * (BODY_LIMIT_BYTES + 1), (413, "too_large", None)),
    "a very long body": ("post", "/messages", "x" * (3 * 1024 * 1024), (413, "too_large", None)),
    "an unknown parent": (
        "post",
        "/messages",
        {"client_id": "c", "text": "a", "parent_id": NOBODY},
        (404, "not_found", None),
    ),
    "an unknown reply": ("post", "/regenerate", {"client_id": "c", "message_id": NOBODY}, (404, "not_found", None)),
    "a reply that is no id": (
        "post",
        "/regenerate",
        {"client_id": "c", "message_id": 1},
        (400, "bad_field", "message_id"),
    ),
    "an unknown turn": ("post", "/stop", {"turn_id": NOBODY}, (404, "not_found", None)),
    "a turn that is no id": ("post", "/stop", {"turn_id": "x"}, (400, "bad_field", "turn_id")),
    "a title of a wrong type": ("patch", "", {"title": 1}, (400, "bad_field", "title")),
    "a long title": ("patch", "", {"title": "x" * 201}, (400, "bad_field", "title")),
    "half a character in a title": ("patch", "", {"title": "\ud800"}, (400, "bad_field", "title")),
    "a field that is not for users": ("patch", "", {"owner": 1}, (400, "bad_field", "owner")),
}


@pytest.mark.parametrize("name", BODIES)
async def test_a_bad_body_is_refused_and_changes_nothing(
    name: str, client: AsyncClient, conversation: Conversation
) -> None:
    method, part, body, expected = BODIES[name]
    before = await everything()
    assert refusal(await call(client, method, wire.api_path(conversation.pk, part), body)) == expected
    assert await everything() == before


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"system_prompt": "a\ud800"}, "system_prompt"),
        ({"system_prompt": "a\x00"}, "system_prompt"),
        ({"model": "not-one-of-the-sites"}, "model"),
        ({"model": "a\x00b"}, "model"),
        ({"model": "x" * 101}, "model"),
        ({"options": {"temperature": 1}}, "options.temperature"),
        ({"options": {"max_tokens": "many"}}, "options.max_tokens"),
        ({"options": {"max_tokens": -1}}, "options.max_tokens"),
        ({"options": {"max_tokens": 8193}}, "options.max_tokens"),
        ({"options": {"stop_sequences": "abc"}}, "options.stop_sequences"),
        ({"options": {"effort": 3}}, "options.effort"),
        ({"options": {"thinking": ["\ud800"]}}, "options.thinking"),
        ({"options": {"stream": "perhaps"}}, "options.stream"),
        ({"options": []}, "options"),
        ({"id": NOBODY}, "id"),
    ],
)
async def test_a_conversation_that_could_not_work_is_not_made(
    body: dict[str, Any], field: str, client: AsyncClient, may_configure: None
) -> None:
    status, code, found = refusal(await call(client, "post", wire.api_path(), body))
    assert (status, found) == (400, field)
    assert code in ("bad_field", "bad_text")
    assert await Conversation.objects.acount() == 0


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"system_prompt": "You are anything I like."}, "system_prompt"),
        ({"options": {"effort": "max"}}, "options"),
        ({"options": {"max_tokens": 1}}, "options"),
        ({"title": "A talk", "options": {"thinking": {"type": "enabled", "budget_tokens": 10**9}}}, "options"),
    ],
)
async def test_users_may_not_configure_unless_the_site_says_so(
    body: dict[str, Any], field: str, client: AsyncClient
) -> None:
    assert refusal(await call(client, "post", wire.api_path(), body)) == (403, "forbidden", field)
    assert await Conversation.objects.acount() == 0


async def test_users_may_choose_a_title_and_one_of_the_sites_models(client: AsyncClient, settings: Any) -> None:
    settings.STREAMING_CHAT = {**settings.STREAMING_CHAT, "MODELS": ("claude-opus-4-8",)}
    for body in (
        {"title": "A talk", "model": "claude-opus-4-8"},
        {"model": "claude-sonnet-5-5", "system_prompt": "", "options": {}},
    ):
        made = await call(client, "post", wire.api_path(), body)
        assert (made.status_code, made.json()["model"]) == (201, body["model"])
    assert await Conversation.objects.filter(system_prompt="", options={}).acount() == 2


async def test_options_that_can_work_are_kept(client: AsyncClient, may_configure: None) -> None:
    options = {
        "max_tokens": 100,
        "thinking": {"type": "adaptive"},
        "effort": "low",
        "stop_sequences": ["END"],
        "send_user_id": True,
        "prompt_caching": False,
        "stream": False,
    }
    made = await call(client, "post", wire.api_path(), {"options": options, "system_prompt": "Be brief."})
    assert made.status_code == 201
    conversation = await Conversation.objects.aget()
    assert (conversation.options, conversation.system_prompt) == (options, "Be brief.")


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"limit": "0"}, "limit"),
        ({"limit": "-1"}, "limit"),
        ({"limit": str(10**9)}, "limit"),
        ({"limit": "9" * 5000}, "limit"),
        ({"limit": "many"}, "limit"),
        ({"archived": "perhaps"}, "archived"),
        ({"before": "forged"}, "before"),
        ({"before": "\x00"}, "before"),
        ({"before": "1." + "g" * 32}, "before"),
        ({"before": "999999999999999999." + "0" * 32}, "before"),
        ({"before": "-1." + "0" * 32}, "before"),
        ({"before": ""}, "before"),
    ],
)
async def test_a_page_that_cannot_be_is_refused(query: dict[str, str], field: str, client: AsyncClient) -> None:
    assert refusal(await call(client, "get", wire.api_path(), query)) == (400, "bad_field", field)


async def test_a_page_of_messages_that_cannot_be_is_refused(
    client: AsyncClient, conversation: Conversation, stranger: User
) -> None:
    theirs = await turns.stream_reply(stranger, "Hello")
    path = wire.api_path(conversation.pk, "/messages")
    for query, expected in (
        ({"limit": "0"}, (400, "bad_field", "limit")),
        ({"limit": "1000000000"}, (400, "bad_field", "limit")),
        ({"before": "x"}, (400, "bad_field", "before")),
        ({"before": NOBODY}, (404, "not_found", None)),
        ({"before": str(theirs.message_id)}, (404, "not_found", None)),
    ):
        assert refusal(await call(client, "get", path, query)) == expected, query


async def test_unknown_others_and_deleted_are_one_answer(
    client: AsyncClient, local: LocalSite, conversation: Conversation, stranger: User, user: User
) -> None:
    theirs = await turns.create_conversation(stranger)
    reply = await turns.stream_reply(stranger, "Hello", conversation_id=theirs.pk)
    gone = await turns.create_conversation(user)
    await turns.delete_conversation(user, gone.pk)
    before = await everything()
    requests: list[tuple[str, str, Any]] = [
        ("get", "", None),
        ("patch", "", {"title": "mine"}),
        ("delete", "", None),
        ("get", "/messages", None),
        ("post", "/messages", {"text": "a", "client_id": "c"}),
        ("post", "/regenerate", {"message_id": str(reply.message_id), "client_id": "c"}),
        ("post", "/stop", {"turn_id": str(reply.turn_id)}),
        ("post", "/stop", {}),
        ("get", "/events", None),
    ]
    for method, part, body in requests:
        bodies = {
            (response.status_code, response.content)
            for key in (NOBODY, theirs.pk, gone.pk)
            for response in [await call(client, method, wire.api_path(key, part), body)]
        }
        assert len(bodies) == 1, (method, part, bodies)
        assert next(iter(bodies))[0] == 404, (method, part)
    for part, body in (
        ("/stop", {"turn_id": str(reply.turn_id)}),
        ("/regenerate", {"message_id": str(reply.message_id), "client_id": "c"}),
        ("/messages", {"text": "a", "client_id": "c", "parent_id": str(reply.message_id)}),
    ):  # a child of another parent
        response = await call(client, "post", wire.api_path(conversation.pk, part), body)
        assert refusal(response) == (404, "not_found", None)
    assert await everything() == before


@pytest.mark.parametrize(
    "key", ["%00", "x", "1", "../../x", "9" * 3000, "01A20B83-AF25-702A-B937-60DB88C675A6", "%F0%9F%98%80"]
)
async def test_an_id_that_is_none_is_not_found(key: str, client: AsyncClient) -> None:
    for part in ("", "/messages", "/events"):
        assert (await client.get(wire.api_path(key, part))).status_code == 404


async def test_methods_that_are_not_there(client: AsyncClient, conversation: Conversation) -> None:
    for part, allowed in {
        "": {"get", "patch", "delete"},
        "/messages": {"get", "post"},
        "/events": {"get"},
        "/stop": {"post"},
        "/regenerate": {"post"},
    }.items():
        for method in {"get", "post", "put", "patch", "delete"} - allowed:
            response = await call(client, method, wire.api_path(conversation.pk, part), None if method == "get" else {})
            assert response.status_code == 405, (method, part)
            assert {name.strip().lower() for name in response["Allow"].split(",")} == allowed
    assert (await call(client, "put", wire.api_path(), {})).status_code == 405


async def test_only_json_is_understood(client: AsyncClient, conversation: Conversation) -> None:
    before = await everything()
    path = wire.api_path(conversation.pk, "/messages")
    body = '{"text": "a", "client_id": "c"}'
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "x"):
        response = await call(client, "post", path, body, content_type=content_type)
        assert refusal(response) == (415, "unsupported_media_type", None), content_type
    big = await call(client, "post", path, "a=" + "x" * 4_000_000, content_type="application/x-www-form-urlencoded")
    assert refusal(big)[0] in (413, 415)
    assert await everything() == before
    charset = "application/json; charset=utf-8"
    assert (await call(client, "post", path, body, content_type=charset)).status_code == 202


async def test_without_the_token_nothing_is_changed(client: AsyncClient, conversation: Conversation) -> None:
    before = await everything()
    for method, part in (
        ("post", "/messages"),
        ("post", "/regenerate"),
        ("post", "/stop"),
        ("patch", ""),
        ("delete", ""),
    ):
        for token in ("", "b" * 32):
            response = await call(client, method, wire.api_path(conversation.pk, part), {}, x_csrftoken=token)
            assert refusal(response) == (403, "csrf_failed", None), (method, part)
    assert await everything() == before


async def test_nothing_is_for_the_signed_out(local: LocalSite, conversation: Conversation, user: User) -> None:
    nobody, was_here = await local.client(), await local.client(user)
    await SessionStore(was_here.cookies["sessionid"].value).adelete()
    for client in (nobody, was_here):
        for method, part in (
            ("get", ""),
            ("get", "/messages"),
            ("get", "/events"),
            ("post", "/messages"),
            ("delete", ""),
        ):
            response = await call(client, method, wire.api_path(conversation.pk, part), None if method == "get" else {})
            assert refusal(response) == (401, "signed_out", None)
    assert await Conversation.objects.acount() == 1


async def test_who_may_do_what(
    local: LocalSite, client: AsyncClient, user: User, stranger: User, conversation: Conversation
) -> None:
    reply = await turns.stream_reply(user, "Hello", conversation_id=conversation.pk)
    guest = await local.client(stranger)
    for role in ("viewer", "editor"):
        await Participant.objects.aupdate_or_create(conversation=conversation, user=stranger, defaults={"role": role})
        before = await everything()
        path = wire.api_path(conversation.pk)
        assert (await call(guest, "get", path)).json()["role"] == role
        assert refusal(await call(guest, "delete", path)) == (403, "forbidden", None)
        if role == "viewer":
            for method, part, body in (
                ("patch", "", {"title": "mine"}),
                ("post", "/messages", {"text": "a", "client_id": "c"}),
                ("post", "/stop", {}),
                ("post", "/regenerate", {"message_id": str(reply.message_id), "client_id": "c"}),
            ):
                assert refusal(await call(guest, method, path + part, body))[:2] == (403, "forbidden"), part
        assert await everything() == before
    sent = await call(guest, "post", wire.api_path(conversation.pk, "/messages"), {"text": "a", "client_id": "c"})
    assert sent.status_code == 202


async def test_busy_and_conflict(client: AsyncClient, conversation: Conversation, anthropic: FakeAnthropic) -> None:
    gate = Gate()
    anthropic.enqueue(Reply.text("a", gate, "b"))
    path = wire.api_path(conversation.pk, "/messages")
    await call(client, "post", path, {"text": "Hello", "client_id": "c1"})
    count = await Message.objects.acount()
    assert refusal(await call(client, "post", path, {"text": "x", "client_id": "c2"})) == (409, "busy", None)
    assert refusal(await call(client, "post", path, {"text": "x", "client_id": "c1"})) == (409, "conflict", None)
    assert (await call(client, "get", wire.api_path(conversation.pk))).json()["running"] is True
    assert await Message.objects.acount() == count
    gate.open()


# ------------------------------------------------------------------------------------------------ OpenAPI


async def test_openapi_describes_every_address(client: AsyncClient) -> None:
    response = await client.get("/chat/api/openapi.json")
    assert response.status_code == 200
    document = response.json()
    assert document["openapi"].startswith("3.")
    schemas = document["components"]["schemas"]
    for name in re.findall(r'"#/components/schemas/([^"]+)"', response.content.decode()):
        assert name in schemas
    operations = [
        (method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    assert {(method, path.removeprefix("/chat/api/conversations")) for method, path, _ in operations} == {
        ("get", ""),
        ("post", ""),
        ("get", "/{conversation_id}"),
        ("patch", "/{conversation_id}"),
        ("delete", "/{conversation_id}"),
        ("get", "/{conversation_id}/messages"),
        ("post", "/{conversation_id}/messages"),
        ("post", "/{conversation_id}/regenerate"),
        ("post", "/{conversation_id}/stop"),
        ("get", "/{conversation_id}/events"),
    }
    names = [operation["operationId"] for _, _, operation in operations]
    assert len(set(names)) == len(names)
    for method, path, operation in operations:
        assert operation["summary"], path
        assert any(int(status) < 300 for status in operation["responses"]), (method, path)
        placeholders = set(re.findall(r"\{(\w+)\}", path))
        declared = {item["name"] for item in operation.get("parameters", []) if item["in"] == "path"}
        assert placeholders == declared


# ------------------------------------------------------------------------------------------------ a real server


@pytest.fixture
def site_environment() -> dict[str, str]:
    return wire.server_environment()


@pytest.fixture
def talk(transactional_db: None) -> Conversation:
    owner = get_user_model().objects.create(username="ada")
    return Conversation.objects.create(owner=owner)


@pytest.fixture
def key(talk: Conversation) -> str:
    return async_to_sync(wire.sign_in)(talk.owner)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20)
nested = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(max_size=8), scalars, max_size=3)
anything = nested | st.lists(nested, max_size=3) | st.dictionaries(st.text(max_size=8), nested, max_size=3)
names = st.sampled_from(
    [
        "title",
        "system_prompt",
        "model",
        "options",
        "archived",
        "client_id",
        "text",
        "parent_id",
        "timeout_seconds",
        "message_id",
        "turn_id",
        "max_tokens",
    ]
)
bodies = st.one_of(
    st.dictionaries(names | st.text(max_size=4), anything | st.just(NOBODY), max_size=4).map(json.dumps),
    anything.map(json.dumps),
    st.text(max_size=40),
)
targets = st.sampled_from(
    [
        ("POST", None, ""),
        ("PATCH", True, ""),
        ("POST", True, "/messages"),
        ("POST", True, "/regenerate"),
        ("POST", True, "/stop"),
    ]
)
requests = st.tuples(targets, bodies)


@hypothesis_settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(some=st.lists(requests, min_size=25, max_size=25))
def test_whatever_is_posted_is_answered(
    some: list[tuple[tuple[str, bool | None, str], str]], site: services.Site, talk: Conversation, key: str
) -> None:
    async def post_all() -> None:
        headers = {
            "X-CSRFToken": wire.CSRF_TOKEN,
            "Cookie": wire.csrf_cookie(key),
            "Content-Type": "application/json",
        }
        async with wire.network(key) as session:
            for (method, has_id, part), body in some:
                path = wire.api_path(talk.pk if has_id else None, part)
                data = body.encode("utf-8", "surrogatepass")
                async with session.request(method, site.url + path, data=data, headers=headers) as response:
                    answer = await response.read()
                    assert response.status < 500, (path, body, answer)

    asyncio.run(post_all())
    wire.assert_clean(site)


async def test_what_the_server_itself_must_refuse(site: services.Site, talk: Conversation, key: str) -> None:
    host, port = site.address.split(":")

    async def raw(head: list[str], body: bytes = b"") -> tuple[int, bytes]:
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write("\r\n".join([*head, "", ""]).encode() + body)
            async with asyncio.timeout(wire.PATIENCE_SECONDS):
                status = int((await reader.readline()).split()[1])
                return status, await reader.read(2000)
        finally:
            writer.close()

    common = [
        f"Host: {site.address}",
        f"Cookie: {wire.csrf_cookie(key)}",
        f"X-CSRFToken: {wire.CSRF_TOKEN}",
        "Content-Type: application/json",
    ]
    post = [f"POST {wire.api_path(talk.pk, '/messages')} HTTP/1.1", *common]
    body = b'{"text": "Hello", "client_id": "c1"}'
    big = b"x" * (BODY_LIMIT_BYTES + 1)
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(big), big)
    assert (await raw([*post, "Transfer-Encoding: chunked"], chunked))[0] == 413
    assert (await raw([*post, f"Content-Length: {len(big)}"], big))[0] == 413
    assert (await raw(post, body))[0] == 400  # without a length there is no body
    assert (await raw([*post, "Content-Length: 5"], body))[0] == 400  # cut short
    twins = [f"GET {wire.api_path()} HTTP/1.1", f"Host: {site.address}", "X_Forwarded_For: 1.2.3.4"]
    assert (await raw(twins))[0] == 401
    many = [f"GET {wire.api_path()} HTTP/1.1", f"Host: {site.address}", *["A: b"] * 10_000]
    async with asyncio.timeout(5):
        assert 400 <= (await raw(many))[0] < 500
    assert await Message.objects.acount() == 0
    wire.assert_clean(site)
