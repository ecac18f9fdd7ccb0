"""Server-Sent Events: the same events as over the WebSocket, for whoever can't or need not hold a socket."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final

from asgiref.sync import sync_to_async
from django.core.handlers.asgi import ASGIRequest
from django.db import connections
from django.http import HttpRequest, StreamingHttpResponse
from django.utils.translation import gettext, gettext_noop

from . import limits, protocol, snapshot
from .conf import get_settings
from .database import in_database
from .exceptions import ChatError, NotFoundError, RateLimitedError
from .generation.runner import get_runner
from .hub import HEARTBEAT, Viewer, get_hub
from .models import Turn
from .protocol import Cursor
from .sessions import identity
from .turns import StartedTurn

if TYPE_CHECKING:
    from .snapshot import AnyUser

RETRY_MS: Final = 1000
CONTENT_TYPE: Final = "text/event-stream"


class NeedsAsgiError(ChatError):
    """The site runs under WSGI, where an answer can't stream."""

    code = "needs_asgi"
    http_status = 501
    sentence = gettext_noop("Streaming needs an ASGI server, such as Daphne.")


async def conversation_events(
    request: HttpRequest, user: AnyUser, conversation_id: uuid.UUID, after: str | None
) -> StreamingHttpResponse:
    """Everything that happens in a conversation, until the client leaves.

    Begins with a ``snapshot``, or with what came since ``after`` (a cursor; a ``Last-Event-ID`` header goes first).

    Raises:
        NotFoundError: The conversation does not exist for ``user``, or the cursor is one of another conversation.
        RateLimitedError: The user has too many streams open.
    """
    cursor = Cursor.parse(request.headers.get("Last-Event-ID") or after or "")
    await in_database(_check, user, conversation_id, cursor)
    admit(request, user)
    return await _respond(
        user, get_hub().watch(conversation_id, identity(user, getattr(request, "session", None)), cursor)
    )


async def turn_events(user: AnyUser, started: StartedTurn) -> StreamingHttpResponse:
    """The answer to one prompt: ``accepted``, then its events; ``finished`` is the last.

    Call :func:`admit` before the turn is started, so that a refusal changes nothing.
    """
    accepted: protocol.Accepted = {
        "type": "accepted",
        "ref": None,
        "turn": str(started.id),
        "message": str(started.prompt_id),
        "duplicate": started.duplicate,
    }
    viewer = get_hub().follow(started.conversation_id, started.id)
    return await _respond(user, viewer, protocol.sse_frame("accepted", protocol.encode(accepted)))


def admit(request: HttpRequest, user: AnyUser) -> None:
    """Check that ``user`` may open a stream here and now.

    Raises:
        NeedsAsgiError: The site runs under WSGI.
        RateLimitedError: The user has too many streams open.
    """
    if not isinstance(request, ASGIRequest):
        raise NeedsAsgiError
    if limits.event_streams.held(user.pk) >= get_settings().event_streams_per_user:
        raise RateLimitedError


def wants_events(request: HttpRequest) -> bool:
    """Whether the client asked for an event stream by name."""
    return CONTENT_TYPE in request.headers.get("Accept", "")


async def _respond(user: AnyUser, viewer: Viewer, first: bytes = b"") -> StreamingHttpResponse:
    get_runner().start()
    await sync_to_async(_give_back_connections)()
    response = StreamingHttpResponse(_body(viewer, user, first), content_type=CONTENT_TYPE)
    # No cache and no proxy may keep, change or collect what passes; an encoding keeps GZipMiddleware's hands off.
    response["Cache-Control"] = "private, no-store, no-transform"
    response["X-Accel-Buffering"] = "no"
    response["Content-Encoding"] = "identity"
    return response


def _give_back_connections() -> None:
    """Close the request's own database connections, which would otherwise be held as long as the stream."""
    for connection in connections.all(initialized_only=True):
        if not connection.in_atomic_block:  # as in a host's test case
            connection.close()


async def _body(viewer: Viewer, user: AnyUser, first: bytes) -> AsyncIterator[bytes]:
    # While the client is slow this generator is not closed when it leaves, so the task that serves it is watched.
    task = asyncio.current_task()
    if task is not None:
        task.add_done_callback(lambda _: viewer.close())
    try:
        with limits.event_streams.hold(user.pk, get_settings().event_streams_per_user) as release:
            if task is not None:
                task.add_done_callback(lambda _: release())
            yield f"retry: {RETRY_MS}\n\n".encode() + first
            async for sent in viewer.events():
                if sent is HEARTBEAT:
                    yield protocol.SSE_HEARTBEAT
                else:
                    yield protocol.sse_frame(sent.kind, sent.json, event_id=sent.token)
    except RateLimitedError as error:  # taken by somebody between the answer's headers and here
        yield protocol.sse_frame("error", protocol.encode(protocol.problem(error, translate=gettext)))


def _check(user: AnyUser, conversation_id: uuid.UUID, cursor: Cursor | None) -> None:
    conversation = snapshot.read_conversation(conversation_id, user)
    if cursor is not None and cursor.turn:
        elsewhere = Turn.objects.filter(pk=cursor.turn).exclude(conversation=conversation)
        if elsewhere.exists():
            raise NotFoundError
