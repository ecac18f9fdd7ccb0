"""The pages: your conversations, one conversation, and the plain forms for browsers without scripts."""

from __future__ import annotations

import uuid
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from asgiref.sync import sync_to_async
from django.contrib.auth.decorators import login_required
from django.core.paginator import Paginator
from django.db.models import Exists, OuterRef
from django.http import Http404
from django.shortcuts import get_object_or_404, redirect, render
from django.utils.translation import gettext
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_POST, require_safe

from . import protocol, turns
from .conf import get_settings
from .database import in_database
from .exceptions import ChatError, DrainingError, InvalidInputError, NotFoundError
from .generation.runner import get_runner
from .models import Conversation, Turn

if TYPE_CHECKING:
    from django.http import HttpRequest, HttpResponse

CONVERSATIONS_PER_PAGE: Final = 50
FORMS: Final = uuid.UUID("6f2c1f0e-5d0b-4c57-9a41-0d8e4b7a93c2")
"""Namespace of the ids of conversations that began with a form."""


@never_cache
@login_required
@require_safe
def index(request: HttpRequest) -> HttpResponse:
    """List the user's conversations, beside an empty chat that becomes a new one."""
    return _page(request)


@never_cache
@login_required
@require_safe
def conversation(request: HttpRequest, conversation_id: uuid.UUID) -> HttpResponse:
    """Show one conversation. Unknown or somebody else's: 404 alike."""
    return _page(request, conversation_id)


@login_required
@require_POST
async def new(request: HttpRequest) -> HttpResponse:
    """Begin a conversation with the form's message. Sending the same form again leads to the first one."""
    user = await request.auser()
    try:
        client_id = _client_id(request)
        text = protocol.clean_text(request.POST.get("text", ""), max_chars=get_settings().message_max_chars)
        if get_runner().draining:
            raise DrainingError  # before there is an empty conversation
        # Forms that are sent at the same time meet in one conversation, which then takes its first prompt once.
        conversation_id = uuid.uuid5(FORMS, f"{user.pk} {client_id}")
        await in_database(Conversation.objects.get_or_create, pk=conversation_id, defaults={"owner_id": user.pk})
        await turns.start_turn(user, conversation_id, text=text, client_id=client_id)
    except ChatError as error:
        return await _refuse(request, error)
    return redirect("streaming_chat:conversation", conversation_id)


@login_required
@require_POST
async def send_form(request: HttpRequest, conversation_id: uuid.UUID) -> HttpResponse:
    """Send the form's message. Sending the same form again changes nothing."""
    user = await request.auser()
    text = request.POST.get("text", "")
    try:
        await turns.start_turn(user, conversation_id, text=text, client_id=_client_id(request))
    except NotFoundError:
        raise Http404 from None
    except ChatError as error:
        return await _refuse(request, error, conversation_id)
    return redirect("streaming_chat:conversation", conversation_id)


def _client_id(request: HttpRequest) -> str:
    try:
        return str(uuid.UUID(request.POST.get("client_id", "")))
    except ValueError:
        raise InvalidInputError("bad_field", field="client_id") from None


def _page(
    request: HttpRequest, conversation_id: uuid.UUID | None = None, *, status: int = HTTPStatus.OK, **context: Any
) -> HttpResponse:
    visible = Conversation.objects.visible_to(request.user)
    running = Exists(Turn.objects.filter(conversation=OuterRef("pk"), status__in=Turn.ACTIVE))
    recent = visible.filter(archived_at=None).annotate(running=running).order_by("-updated_at", "-id")
    context["conversations"] = Paginator(recent, CONVERSATIONS_PER_PAGE).get_page(request.GET.get("page"))
    if conversation_id is None:
        return render(request, "streaming_chat/conversation_list.html", context, status=status)
    context["conversation"] = get_object_or_404(visible, pk=conversation_id)
    return render(request, "streaming_chat/conversation.html", context, status=status)


async def _refuse(request: HttpRequest, error: ChatError, conversation_id: uuid.UUID | None = None) -> HttpResponse:
    """The page again, with the reason, and the text still in its box."""
    return await sync_to_async(_page)(
        request,
        conversation_id,
        status=error.http_status,
        refused=protocol.problem(error, translate=gettext)["detail"],
        draft=request.POST.get("text", ""),
    )
