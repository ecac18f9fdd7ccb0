"""The one line in the host's ``asgi.py``: what is the chat's, and what goes on as before."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import pytest
from asgiref.testing import ApplicationCommunicator
from channels.routing import ProtocolTypeRouter, URLRouter
from channels.testing import HttpCommunicator, WebsocketCommunicator
from django.contrib.auth import get_user_model
from django.core.asgi import get_asgi_application
from django.urls import path

from streaming_chat import turns
from streaming_chat.asgi import with_streaming_chat
from streaming_chat.generation.runner import get_runner
from streaming_chat.models import Turn
from streaming_chat.routing import socket_arguments
from tests import wire

if TYPE_CHECKING:
    from streaming_chat.asgi import Application

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.filterwarnings("ignore:No directory at"),  # static files are not collected for the tests
]

HEADERS = [(b"host", b"testserver"), (b"origin", b"http://testserver")]


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Another application's WebSocket."""
    await receive()
    await send({"type": "websocket.accept"})
    await send({"type": "websocket.send", "text": "hello from the host"})


@pytest.fixture
def plain() -> Application:
    return with_streaming_chat(get_asgi_application())


@pytest.fixture
def routed() -> Application:
    sockets = URLRouter([cast("Any", path("elsewhere/", cast("Any", echo)))])
    return with_streaming_chat(ProtocolTypeRouter({"http": get_asgi_application(), "websocket": sockets}))


async def test_http_goes_to_the_host(plain: Application) -> None:
    communicator = HttpCommunicator(plain, "GET", "/chat/api/conversations", headers=HEADERS)
    assert (await communicator.get_response(wire.PATIENCE_SECONDS))["status"] == 401
    await communicator.wait()


async def test_sockets_of_others_go_to_the_host(routed: Application) -> None:
    communicator = WebsocketCommunicator(routed, "/elsewhere/", HEADERS)
    assert (await communicator.connect())[0]
    assert await communicator.receive_from() == "hello from the host"


@pytest.mark.parametrize(
    "address", ["/elsewhere/", "/chat/", "/chat/conversations/x/socket/", "/chat/api/conversations"]
)
async def test_a_host_without_sockets_refuses_all_but_the_chats(address: str, plain: Application) -> None:
    assert await WebsocketCommunicator(plain, address, HEADERS).connect() == (False, 4404)


async def test_the_chats_socket_is_found_under_the_hosts_prefix() -> None:
    key = "0192f0c4-7a3c-7e21-9d5b-3f1f0f7a2b11"
    found = socket_arguments(wire.socket_path(key))
    assert found is not None
    assert str(found["conversation_id"]) == key
    for address in (f"/conversations/{key}/socket/", wire.socket_path(key)[:-1], wire.socket_path(key.upper())):
        assert socket_arguments(address) is None


async def test_lifespan_begins_and_drains(plain: Application) -> None:
    server: Any = ApplicationCommunicator(plain, {"type": "lifespan"})  # type: ignore[no-untyped-call]
    await server.send_input({"type": "lifespan.startup"})
    assert await server.receive_output(wire.PATIENCE_SECONDS) == {"type": "lifespan.startup.complete"}
    user = await get_user_model().objects.acreate(username="ada")
    conversation = await turns.create_conversation(user)
    started = await turns.start_turn(user, conversation.pk, text="/max_tokens", client_id="c1")
    await server.send_input({"type": "lifespan.shutdown"})
    assert await server.receive_output(wire.PATIENCE_SECONDS) == {"type": "lifespan.shutdown.complete"}
    await server.wait()
    turn = await Turn.objects.aget(pk=started.id)
    assert turn.status == "completed"
    assert get_runner().draining
    refused = WebsocketCommunicator(
        plain,
        wire.socket_path(conversation.pk),
        [*HEADERS, (b"cookie", b"sessionid=" + (await wire.sign_in(user)).encode())],
    )
    assert (await refused.connect(wire.PATIENCE_SECONDS))[0]
    assert json.loads(await refused.receive_from(wire.PATIENCE_SECONDS))["type"] == "reconnect"
    assert await refused.receive_output(wire.PATIENCE_SECONDS) == {"type": "websocket.close", "code": 4503}
