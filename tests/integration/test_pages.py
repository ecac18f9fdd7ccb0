"""The pages and the template tag, without a browser: who sees what, and what a form can and can't do."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from typing import TYPE_CHECKING

import pytest
from django.contrib.auth.models import AnonymousUser, User
from django.http import Http404
from django.template import Context, Template
from django.test import AsyncClient, Client, RequestFactory

from streaming_chat.models import Conversation, Message, Turn
from tests.wire import CSRF_TOKEN, LocalSite, local_site

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from django.http import HttpRequest

# Static files are not collected for the tests.
pytestmark = pytest.mark.filterwarnings("ignore:No directory at")

BREAKOUT = "</script><script>alert(1)</script> & \"quoted\" 'too'"


@pytest.fixture
def ada(db: None) -> User:
    return User.objects.create_user("ada")


@pytest.fixture
def conversation(ada: User) -> Conversation:
    """One prompt, whose text and title try to break out of the page."""
    conversation = Conversation.objects.create(owner=ada, title=BREAKOUT)
    blocks = [{"type": "text", "text": BREAKOUT}]
    conversation.leaf = Message.objects.create(conversation=conversation, role="user", blocks=blocks, text=BREAKOUT)
    conversation.save()
    return conversation


def render(user: User | AnonymousUser, arguments: str = "", **context: object) -> str:
    request: HttpRequest = RequestFactory().get("/host/page/")
    request.user = user
    template = Template("{% load streaming_chat %}{% streaming_chat " + arguments + " %}")
    return template.render(Context({"request": request, **context}))


def attributes(html: str) -> dict[str, str]:
    tag = re.search(r"<streaming-chat (.*?)>", html)
    assert tag is not None
    return dict(re.findall(r'([\w-]+)="(.*?)"', tag[1]))


def test_the_tag_begins_a_new_conversation(ada: User) -> None:
    html = render(ada)
    assert attributes(html) == {
        "endpoint": "/chat/",
        "conversation": "",
        "mode": "panel",
        "provider": "demo",
        "page-url": "",
        "sign-in-url": "/accounts/login/?next=/host/page/",
        "max-chars": "32000",
        "heading-level": "3",
    }
    assert 'action="/chat/new/"' in html
    assert 'data-name="snapshot"' not in html


@pytest.mark.parametrize("form", ["object", "id", "text"])
def test_the_tag_shows_a_conversation_escaped(ada: User, conversation: Conversation, form: str) -> None:
    shown = {"object": conversation, "id": conversation.pk, "text": str(conversation.pk)}[form]
    html = render(ada, "shown mode='page' theme='dark'", shown=shown)
    assert attributes(html)["conversation"] == str(conversation.pk)
    assert attributes(html)["page-url"] == "/chat/conversations/ID/"
    assert attributes(html)["theme"] == "dark"
    assert "<script>alert" not in html
    embedded = re.search(r'data-name="snapshot".*?<script type="application/json">(.*?)</script>', html)
    assert embedded is not None
    assert json.loads(embedded[1])["messages"][0]["blocks"] == [{"type": "text", "text": BREAKOUT}]
    assert "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;quoted&quot; &#x27;too&#x27;</div>" in html


def test_the_tag_shows_nobody_elses_conversation(conversation: Conversation) -> None:
    eve = User.objects.create_user("eve")
    for shown in (conversation, uuid.uuid4(), "nonsense"):
        with pytest.raises(Http404):
            render(eve, "shown", shown=shown)


def test_the_tag_leads_visitors_to_the_login(db: None) -> None:
    html = render(AnonymousUser())
    assert "<streaming-chat" not in html
    assert 'href="/accounts/login/?next=/host/page/"' in html


def test_pages_list_only_visible_conversations(conversation: Conversation, ada: User) -> None:
    Conversation.objects.create(owner=User.objects.create_user("eve"), title="secret")
    client = Client()
    client.force_login(ada)
    page = client.get("/chat/")
    assert page.context["conversations"].object_list == [conversation]
    assert "secret" not in page.text
    assert page.headers["Cache-Control"] == "max-age=0, no-cache, no-store, must-revalidate, private"


@pytest.mark.django_db(transaction=True)
async def test_forms_need_a_session_a_token_a_text_and_an_id() -> None:
    ada = await User.objects.acreate_user("ada")
    eve = await User.objects.acreate_user("eve")
    foreign = await Conversation.objects.acreate(owner=eve)
    own = await Conversation.objects.acreate(owner=ada)
    client = AsyncClient()
    form = {"text": "Hello", "client_id": str(uuid.uuid4())}
    for path in ("/chat/new/", f"/chat/conversations/{own.pk}/send/"):
        assert (await client.post(path, form)).headers["Location"] == f"/accounts/login/?next={path}"
    await client.aforce_login(ada)
    for path in ("/chat/new/", f"/chat/conversations/{own.pk}/send/"):
        assert (await client.get(path)).status_code == 405
        refused = await client.post(path, {"text": " \n", "client_id": str(uuid.uuid4())})
        assert refused.status_code == 400
        assert "The message is empty" in refused.content.decode()
        for bad_id in ({}, {"client_id": "one"}, {"client_id": "nul\0"}):
            kept = await client.post(path, {"text": "My long text", **bad_id})
            assert kept.status_code == 400
            assert "My long text</textarea>" in kept.content.decode()
    for unknown in (foreign.pk, uuid.uuid4()):
        assert (await client.post(f"/chat/conversations/{unknown}/send/", form)).status_code == 404
    strict = AsyncClient(enforce_csrf_checks=True)
    await strict.aforce_login(ada)
    assert (await strict.post("/chat/new/", form)).status_code == 403
    assert await Conversation.objects.acount() == 2
    assert await Message.objects.acount() == 0


@pytest.fixture
async def ann() -> AsyncIterator[AsyncClient]:
    """Ann's browser, and a chat that is drained afterwards."""
    async with local_site() as local:
        yield await local.client(await User.objects.acreate_user("ann"))


def filled(text: str) -> dict[str, str]:
    return {"text": text, "client_id": str(uuid.uuid4()), "csrfmiddlewaretoken": CSRF_TOKEN}


@pytest.mark.django_db(transaction=True)
async def test_a_form_that_is_sent_four_times_at_once_begins_one_conversation(ann: AsyncClient) -> None:
    form = filled("Hello")
    answers = await asyncio.gather(*(ann.post("/chat/new/", form) for _ in range(4)))
    conversation = await Conversation.objects.aget()
    where = f"/chat/conversations/{conversation.pk}/"
    assert [(answer.status_code, answer.get("Location")) for answer in answers] == [(302, where)] * 4
    assert (await Message.objects.aget(role="user")).text == "Hello"
    assert await Turn.objects.acount() == 1
    assert (await ann.post("/chat/new/", form))["Location"] == where
    assert await Turn.objects.acount() == 1


@pytest.mark.django_db(transaction=True)
async def test_a_form_that_was_changed_after_it_was_sent_loses_no_text(ann: AsyncClient) -> None:
    form = filled("Hello")
    assert (await ann.post("/chat/new/", form)).status_code == 302
    changed = await ann.post("/chat/new/", {**form, "text": "Hello again"})
    assert changed.status_code == 409
    assert "Hello again</textarea>" in changed.content.decode()
    assert form["client_id"] not in changed.content.decode()
    assert await Message.objects.filter(role="user").acount() == 1


@pytest.mark.django_db(transaction=True)
async def test_the_same_form_of_two_users_begins_two_conversations(ann: AsyncClient) -> None:
    form = filled("Hello")
    bob = await LocalSite().client(await User.objects.acreate_user("bob"))
    first, second = await asyncio.gather(ann.post("/chat/new/", form), bob.post("/chat/new/", form))
    assert (first.status_code, second.status_code) == (302, 302)
    owners = [
        owner async for owner in Conversation.objects.order_by("owner_id").values_list("owner__username", flat=True)
    ]
    assert owners == ["ann", "bob"]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("character", ["漢", "\N{GRINNING FACE}"])
async def test_the_longest_prompt_fits_a_form_in_any_script(character: str, ann: AsyncClient) -> None:
    assert (await ann.post("/chat/new/", filled(character * 32_001))).status_code == 413
    assert await Conversation.objects.acount() == 0
    assert (await ann.post("/chat/new/", filled(character * 32_000))).status_code == 302
    assert (await Message.objects.aget(role="user")).text == character * 32_000
