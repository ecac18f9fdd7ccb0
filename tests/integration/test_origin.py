"""Which pages may open a socket: this site's own and those that it trusts, by scheme, host and port."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
from django.contrib.auth import get_user_model

from streaming_chat import turns
from streaming_chat.limits import sockets
from tests import wire

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from django.contrib.auth.models import User

    from streaming_chat.models import Conversation
    from tests.wire import LocalSite

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.filterwarnings("ignore:No directory at"),  # static files are not collected for the tests
]

FORWARDED = (b"x-forwarded-proto", b"https")


@pytest.fixture
async def local() -> AsyncIterator[LocalSite]:
    async with wire.local_site() as local:
        yield local


@pytest.fixture
async def user() -> User:
    return await get_user_model().objects.acreate(username="ada")


@pytest.fixture
async def conversation(user: User) -> Conversation:
    return await turns.create_conversation(user)


async def answer(
    local: LocalSite, conversation: Conversation, user: User, *origins: str, **options: Any
) -> tuple[bool, Any]:
    """Whether a socket from a page of these origins is accepted, and the close code if it is not."""
    communicator = await local.communicator(
        wire.socket_path(conversation.pk), session_key=await wire.sign_in(user), origins=origins, **options
    )
    accepted, code = await communicator.connect(wire.PATIENCE_SECONDS)
    if accepted:
        await communicator.disconnect(timeout=wire.PATIENCE_SECONDS)
    assert sockets.held(user.pk) == 0
    return accepted, code


@pytest.mark.parametrize(
    "origins",
    [
        (),
        ("",),
        ("null",),
        ("https://testserver",),
        ("ws://testserver",),
        ("http://testserver:8000",),
        ("http://testserver:80",),
        ("http://testserver.evil",),
        ("http://evil.testserver",),
        ("http://testserver@evil",),
        ("http://evil/http://testserver",),
        ("http://host.evil",),
        ("testserver",),
        ("http://testserver/",),
        ("http://[testserver",),
        ("http://testserver\x00",),
        ("http://testserver", "http://testserver"),
        ("http://testserver", "http://host.evil"),
        ("http://host.evil", "http://testserver"),
    ],
)
async def test_a_page_of_elsewhere_is_refused_with_one_line_in_the_log(
    origins: tuple[str, ...],
    local: LocalSite,
    conversation: Conversation,
    user: User,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert await answer(local, conversation, user, *origins) == (False, 4403)
    assert [record.name for record in caplog.records] == ["streaming_chat.routing"]


@pytest.mark.parametrize("origin", ["http://testserver", "HTTP://TestServer"])
async def test_the_sites_own_page_is_welcome(
    origin: str, local: LocalSite, conversation: Conversation, user: User
) -> None:
    assert (await answer(local, conversation, user, origin))[0]


@pytest.mark.parametrize(
    ("scheme", "origin", "accepted"),
    [
        ("ws", "http://testserver", True),
        ("wss", "https://testserver", True),
        ("ws", "https://testserver", False),
        ("wss", "http://testserver", False),
    ],
)
async def test_servers_that_tell_the_sockets_scheme_are_understood(
    scheme: str, origin: str, accepted: bool, local: LocalSite, conversation: Conversation, user: User
) -> None:
    assert (await answer(local, conversation, user, origin, scope={"scheme": scheme}))[0] is accepted


async def test_behind_a_proxy_that_speaks_https_the_pages_scheme_is_https(
    local: LocalSite, conversation: Conversation, user: User, settings: Any
) -> None:
    settings.SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
    assert (await answer(local, conversation, user, "https://testserver", headers=[FORWARDED]))[0]
    assert not (await answer(local, conversation, user, "http://testserver", headers=[FORWARDED]))[0]
    assert not (await answer(local, conversation, user, "https://testserver"))[0]


async def test_a_forwarded_scheme_counts_only_where_the_site_says_so(
    local: LocalSite, conversation: Conversation, user: User
) -> None:
    assert not (await answer(local, conversation, user, "https://testserver", headers=[FORWARDED]))[0]
    underscores = (b"x_forwarded_proto", b"https")
    assert not (await answer(local, conversation, user, "https://testserver", headers=[underscores]))[0]


async def test_trusted_origins_are_those_of_djangos_csrf_protection(
    local: LocalSite, conversation: Conversation, user: User, settings: Any
) -> None:
    settings.CSRF_TRUSTED_ORIGINS = ["https://chat.example", "https://*.example.org", "http://localhost:3000"]
    for origin, accepted in {
        "https://chat.example": True,
        "http://chat.example": False,
        "https://chat.example:8443": False,
        "https://chat.example.evil": False,
        "https://a.example.org": True,
        "https://a.b.example.org": True,
        "https://evilexample.org": False,
        "http://localhost:3000": True,
        "http://localhost:3001": False,
        "http://localhost": False,
    }.items():
        assert (await answer(local, conversation, user, origin))[0] is accepted, origin


async def test_a_host_that_the_site_does_not_serve_trusts_only_named_origins(
    local: LocalSite, conversation: Conversation, user: User, settings: Any
) -> None:
    settings.ALLOWED_HOSTS = ["chat.example"]
    assert not (await answer(local, conversation, user, "http://testserver"))[0]
