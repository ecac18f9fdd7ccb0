"""``{% load streaming_chat %}{% streaming_chat %}``: the chat, anywhere in a host's page."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any, Final

from django import template
from django.conf import settings as django_settings
from django.http import Http404
from django.shortcuts import resolve_url
from django.urls import reverse
from django.utils.translation import gettext

from .. import snapshot
from ..blocks import text_of
from ..conf import get_settings
from ..exceptions import STOP_REASONS, NotFoundError
from ..models import Conversation
from .element_strings import STRINGS

if TYPE_CHECKING:
    from django.http import HttpRequest
    from django.template.context import RequestContext

    from ..protocol import MessageForm, Snapshot

PLAIN_MESSAGES: Final = 20
"""Messages shown where no script runs."""

register = template.Library()


@register.inclusion_tag("streaming_chat/element.html", takes_context=True)
def streaming_chat(
    context: RequestContext,
    conversation: Conversation | uuid.UUID | str | None = None,
    *,
    mode: str = "panel",
    theme: str = "",
    heading_level: int = 3,
) -> dict[str, Any]:
    """Render ``<streaming-chat>`` for the request's user, with everything it needs.

    Reads the database, so an async view must render in a thread. Needs ``request`` in the context.

    Args:
        context: The template's.
        conversation: What to show, or its id; None: a new one begins with the first message.
        mode: ``"panel"`` or ``"page"``.
        theme: ``"light"`` or ``"dark"``; empty: as the page around it.
        heading_level: Level of the messages' headings, for screen readers.

    Raises:
        Http404: The conversation does not exist, or not for this user.
    """
    request: HttpRequest = context["request"]
    shown = None if conversation is None else _read(request, conversation)
    conversation_id = "" if shown is None else shown["conversation"]["id"]
    settings = get_settings()
    return {
        "signed_in": request.user.is_authenticated,
        "sign_in_url": resolve_url(django_settings.LOGIN_URL) + f"?next={request.path}",
        "endpoint": reverse("streaming_chat:index"),
        "page_url": conversation_page_url() if mode == "page" else "",
        "mode": mode,
        "theme": theme,
        "heading_level": heading_level,
        "heading": f"h{heading_level}",
        "provider": settings.resolved_provider(),
        "max_chars": settings.message_max_chars,
        "conversation_id": conversation_id,
        "snapshot": shown,
        "strings": {key: gettext(text) for key, text in STRINGS.items()},
        "messages": [] if shown is None else [_plain(form) for form in shown["messages"][-PLAIN_MESSAGES:]],
        "running": shown is not None and shown["conversation"]["running"],
        "read_only": shown is not None and shown["conversation"]["role"] == "viewer",
        "action": reverse("streaming_chat:send_form", args=[conversation_id])
        if conversation_id
        else reverse("streaming_chat:new"),
        "client_id": uuid.uuid4(),
        "refused": context.get("refused"),
        "draft": context.get("draft", ""),
        "nonce": context.get("csp_nonce") or getattr(request, "csp_nonce", ""),
    }


def conversation_page_url() -> str:
    """The address of a conversation's page, with ``ID`` where its id goes."""
    nil = uuid.UUID(int=0)
    return reverse("streaming_chat:conversation", args=[nil]).replace(str(nil), "ID")


def _read(request: HttpRequest, conversation: Conversation | uuid.UUID | str) -> Snapshot:
    try:
        key = conversation.pk if isinstance(conversation, Conversation) else uuid.UUID(str(conversation))
        return snapshot.read_snapshot(snapshot.read_conversation(key, request.user), request.user)
    except (NotFoundError, ValueError):
        raise Http404 from None


def _plain(form: MessageForm) -> dict[str, Any]:
    turn = form["turn"]
    return {
        "role": form["role"],
        "text": text_of(form["blocks"]),
        "running": turn is not None and turn["status"] in ("queued", "running"),
        "ending": "" if turn is None else _ending(turn["status"], turn["stop_reason"], turn["error"]),
    }


def _ending(status: str, stop_reason: str, error: Any) -> str:
    """How the turn ended, where that needs words: as the element says it."""
    if status in ("interrupted", "timed_out", "failed"):
        return str(error["detail"]) if error else gettext(STRINGS[status])
    if status == "stopped":
        return gettext(STRINGS[status])
    return gettext(STOP_REASONS[stop_reason]) if stop_reason in STOP_REASONS else ""
