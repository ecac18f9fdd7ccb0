"""The JSON API, described by OpenAPI at ``api/openapi.json``.

Sign in with Django's session; unsafe methods need the CSRF token. Errors are
``{"error": {"code", "detail", "field"?, "retry_after_seconds"?}}``.
"""

from __future__ import annotations

import re
import uuid
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, cast

from asgiref.sync import sync_to_async
from django.core.exceptions import RequestDataTooBig
from django.db import DatabaseError
from django.db.models import DateTimeField, Q, Value
from django.db.models.functions import Cast
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase, JsonResponse
from django.utils.translation import gettext, gettext_noop
from ninja import Field, NinjaAPI, Query, Schema, Status
from ninja.errors import AuthenticationError, HttpError, ValidationError
from ninja.parser import Parser
from ninja.utils import check_csrf
from pydantic import ConfigDict

from . import protocol, snapshot, sse, turns
from .conf import get_settings
from .database import in_database
from .exceptions import (
    ChatError,
    DrainingError,
    ForbiddenError,
    InvalidInputError,
    NotFoundError,
    SignedOutError,
)
from .generation.runner import get_runner
from .models import Conversation, Turn
from .protocol import ConversationForm, MessageForm, TurnStatus

if TYPE_CHECKING:
    from .snapshot import AnyUser

MAX_PAGE: Final = 200
RETURN_SECONDS: Final = 1.0
"""When to ask for the events again while this process stops; another one may take them at once."""
PRIVATE: Final = "private, no-store"
UNSAFE: Final = frozenset({"POST", "PUT", "PATCH", "DELETE"})

# ------------------------------------------------------------------------------------------------ shapes


class _Body(Schema):
    model_config = ConfigDict(extra="forbid")


ClientId = Annotated[str, Field(min_length=1, max_length=protocol.MAX_CLIENT_ID_CHARS)]


class NewConversation(_Body):
    """Everything is optional."""

    title: Annotated[str, Field(max_length=200)] = ""
    system_prompt: str = ""
    model: Annotated[str, Field(max_length=100)] = ""
    options: dict[str, Any] = {}


class ConversationChange(_Body):
    """What is left out stays as it is."""

    title: Annotated[str, Field(max_length=200)] | None = None
    archived: bool | None = None


class NewMessage(_Body):
    """A prompt. ``client_id`` makes sending it again harmless."""

    client_id: ClientId
    text: str
    parent_id: uuid.UUID | Literal["root"] | None = None
    timeout_seconds: Annotated[float, Field(gt=0, le=86_400)] | None = None


class RegenerateBody(_Body):
    """Which reply to make once more."""

    message_id: uuid.UUID
    client_id: ClientId


class StopBody(_Body):
    """Which turn to stop; left out: whatever runs."""

    turn_id: uuid.UUID | None = None


class StopAnswer(Schema):
    """The turn's status now; null if nothing ran."""

    status: TurnStatus | None


class Accepted(Schema):
    """A turn that will answer."""

    turn_id: uuid.UUID
    prompt_id: uuid.UUID
    reply_id: uuid.UUID
    duplicate: bool


class ConversationPage(Schema):
    """Newest first; ``next`` is the ``before`` of the next page, null on the last one."""

    items: list[ConversationForm]
    next: str | None


class MessagePage(Schema):
    """Oldest first; there is more before the first one if ``has_earlier``."""

    items: list[MessageForm]
    has_earlier: bool


class Problem(Schema):
    """A stable code and a sentence for people."""

    code: str
    detail: str
    field: str | None = None
    retry_after_seconds: float | None = None


class ProblemAnswer(Schema):
    """Why it did not work. Nothing was changed."""

    error: Problem


PageSize = Annotated[int, Query(ge=1, le=MAX_PAGE)]

# ------------------------------------------------------------------------------------------------ doors


class UnsupportedMediaError(ChatError):
    """The body is not JSON by its own account."""

    code = "unsupported_media_type"
    http_status = 415
    sentence = gettext_noop("Send JSON, with the content type application/json.")


class NotAcceptableError(ChatError):
    """The client wants something else than an event stream."""

    code = "not_acceptable"
    http_status = 406
    sentence = gettext_noop("This address answers with an event stream only.")


class CsrfError(ForbiddenError):
    """The CSRF token is missing or wrong."""

    code = "csrf_failed"
    sentence = gettext_noop("The security token is missing or out of date. Reload the page.")


class StrictParser(Parser):
    """Refuses what databases and browsers would read differently."""

    def parse_body(self, request: HttpRequest) -> Any:
        """The body's JSON object."""
        return protocol.load_json(request.body, limit_bytes=_limit_bytes())


def _limit_bytes() -> int:
    return protocol.frame_limit_bytes(get_settings().message_max_chars)


async def signed_in(request: HttpRequest) -> AnyUser:
    """The request's user, once its form is acceptable.

    Raises:
        ChatError: Signed out, no CSRF token, not JSON, or too large.
    """
    user = await request.auser()
    if not user.is_authenticated:
        raise SignedOutError
    if request.method in UNSAFE:
        # First, as the look for a token would parse a form of any size.
        if request.method != "DELETE" and request.content_type != "application/json":
            raise UnsupportedMediaError
        if await sync_to_async(check_csrf)(request) is not None:
            raise CsrfError
        try:
            too_large = len(request.body) > _limit_bytes()
        except RequestDataTooBig:
            too_large = True
        if too_large:
            raise InvalidInputError("too_large")
    return user


class _PrivateAPI(NinjaAPI):
    """Everything it answers is for one user's eyes."""

    def create_temporal_response(self, request: HttpRequest) -> HttpResponse:
        """The response that a view's result is written into."""
        response = super().create_temporal_response(request)
        response["Cache-Control"] = PRIVATE
        return response


api = _PrivateAPI(
    title="streaming_chat",
    version=str(protocol.PROTOCOL_VERSION),
    description="Conversations whose replies stream. See the documentation of the events for the rest.",
    urls_namespace="streaming_chat:api",
    docs_url=None,  # its page loads scripts from elsewhere
    auth=signed_in,
    parser=StrictParser(),
)


def _answer(request: HttpRequest, error: ChatError) -> HttpResponse:
    body = dict(protocol.problem(error, translate=gettext))
    del body["type"], body["ref"]
    response = JsonResponse({"error": body}, status=error.http_status)
    response["Cache-Control"] = PRIVATE
    if error.retry_after_seconds is not None:
        response["Retry-After"] = str(max(1, round(error.retry_after_seconds)))
    return response


@api.exception_handler(ChatError)
def _chat_error(request: HttpRequest, error: ChatError) -> HttpResponse:
    return _answer(request, error)


@api.exception_handler(AuthenticationError)
def _signed_out(request: HttpRequest, error: AuthenticationError) -> HttpResponse:
    return _answer(request, SignedOutError())


@api.exception_handler(Http404)
def _not_found(request: HttpRequest, error: Http404) -> HttpResponse:
    return _answer(request, NotFoundError())


@api.exception_handler(HttpError)
def _bad_json(request: HttpRequest, error: HttpError) -> HttpResponse:
    return _answer(request, InvalidInputError("bad_json"))


@api.exception_handler(ValidationError)
def _bad_field(request: HttpRequest, error: ValidationError) -> HttpResponse:
    # The first part says where it stands (body, query, path), the second is the name of the function's argument.
    place, *path = [str(part) for part in error.errors[0]["loc"]]
    if place == "path":
        return _answer(request, NotFoundError())
    # Shapes are flat; what follows the field's name is pydantic's own name for a kind of value.
    field = path[1:2] if place == "body" else path[:1]
    return _answer(request, InvalidInputError("bad_field", field=field[0] if field else None))


@api.exception_handler(DatabaseError)
def _database_away(request: HttpRequest, error: DatabaseError) -> HttpResponse:
    return _answer(request, StorageError())


class StorageError(ChatError):
    """The database did not answer; nothing was changed, or the client id tells."""

    code = "storage_unavailable"
    http_status = 503
    sentence = gettext_noop("This could not be saved. Try again in a moment.")


def _user(request: HttpRequest) -> AnyUser:
    return cast("AnyUser", request.auth)  # type: ignore[attr-defined]


PROBLEMS: Final[dict[int, Any]] = {
    int(status): ProblemAnswer
    for status in (
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.FORBIDDEN,
        HTTPStatus.NOT_FOUND,
        HTTPStatus.CONFLICT,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.SERVICE_UNAVAILABLE,
    )
}

# ------------------------------------------------------------------------------------------------ conversations


@api.get("conversations", response={200: ConversationPage, **PROBLEMS}, url_name="conversations")
async def list_conversations(
    request: HttpRequest, before: str | None = None, limit: PageSize = 50, archived: bool = False
) -> Any:
    """Your conversations, the latest changed first."""
    return await in_database(_read_list, _user(request), _parse_place(before), limit, archived)


@api.post("conversations", response={201: ConversationForm, **PROBLEMS})
async def create_conversation(request: HttpRequest, body: NewConversation) -> Any:
    """Begin an empty conversation. The site decides what may be chosen besides its title."""
    site = get_settings()
    for field in ("system_prompt", "options"):
        if getattr(body, field) and not site.users_may_configure:
            raise ForbiddenError(field=field)
    if body.model and body.model not in (site.model, *site.models):
        raise InvalidInputError("bad_field", field="model")
    max_tokens = body.options.get("max_tokens", 0)
    if isinstance(max_tokens, int) and max_tokens > site.max_tokens:
        raise InvalidInputError("bad_field", field="options.max_tokens")
    conversation = await turns.create_conversation(_user(request), **body.dict())
    return Status(201, snapshot.conversation_form(conversation, "owner", running=False))


@api.get("conversations/{uuid:conversation_id}", response={200: ConversationForm, **PROBLEMS}, url_name="conversation")
async def read_conversation(request: HttpRequest, conversation_id: uuid.UUID) -> Any:
    """One conversation, without its messages."""
    return await in_database(_read_one, _user(request), conversation_id)


@api.patch("conversations/{uuid:conversation_id}", response={200: ConversationForm, **PROBLEMS})
async def change_conversation(request: HttpRequest, conversation_id: uuid.UUID, body: ConversationChange) -> Any:
    """Rename it, archive it, or bring it back."""
    await turns.update_conversation(_user(request), conversation_id, title=body.title, archived=body.archived)
    return await in_database(_read_one, _user(request), conversation_id)


@api.delete("conversations/{uuid:conversation_id}", response={204: None, **PROBLEMS})
async def delete_conversation(request: HttpRequest, conversation_id: uuid.UUID) -> Any:
    """Delete it with all its messages."""
    await turns.delete_conversation(_user(request), conversation_id)
    return Status(204, None)


# ------------------------------------------------------------------------------------------------ messages and turns


@api.get("conversations/{uuid:conversation_id}/messages", response={200: MessagePage, **PROBLEMS}, url_name="messages")
async def list_messages(
    request: HttpRequest, conversation_id: uuid.UUID, before: uuid.UUID | None = None, limit: PageSize = 50
) -> Any:
    """The current branch, or the part of a branch that leads to the message ``before``, without it."""
    return await in_database(_read_messages, _user(request), conversation_id, before, limit)


@api.post("conversations/{uuid:conversation_id}/messages", response={202: Accepted, **PROBLEMS})
async def send_message(request: HttpRequest, conversation_id: uuid.UUID, body: NewMessage) -> Any:
    """Send a prompt. With ``Accept: text/event-stream`` the answer streams and ends with ``finished``."""
    _admit(request)
    started = await turns.start_turn(_user(request), conversation_id, **body.dict())
    return await _accepted(request, started)


@api.post(
    "conversations/{uuid:conversation_id}/regenerate",
    response={202: Accepted, **PROBLEMS},
    url_name="regenerate",
)
async def regenerate(request: HttpRequest, conversation_id: uuid.UUID, body: RegenerateBody) -> Any:
    """Answer a prompt once more. Streams like a new message."""
    _admit(request)
    started = await turns.regenerate_turn(_user(request), conversation_id, **body.dict())
    return await _accepted(request, started)


@api.post("conversations/{uuid:conversation_id}/stop", response={200: StopAnswer, **PROBLEMS}, url_name="stop")
async def stop(request: HttpRequest, conversation_id: uuid.UUID, body: StopBody) -> Any:
    """Stop a turn, keeping its text. Stopping one that is over changes nothing."""
    return {"status": await turns.stop_turn(_user(request), conversation_id, body.turn_id)}


@api.get(
    "conversations/{uuid:conversation_id}/events",
    url_name="events",
    openapi_extra={"responses": {200: {"content": {sse.CONTENT_TYPE: {}}, "description": "Server-Sent Events"}}},
)
async def events(request: HttpRequest, conversation_id: uuid.UUID, after: str | None = None) -> HttpResponseBase:
    """Everything that happens in the conversation, as it happens."""
    accept = request.headers.get("Accept", "*/*")
    if sse.CONTENT_TYPE not in accept and "*/*" not in accept and "text/*" not in accept:
        raise NotAcceptableError
    if get_runner().draining:
        raise DrainingError(retry_after_seconds=RETURN_SECONDS)
    return await sse.conversation_events(request, _user(request), conversation_id, after)


def _admit(request: HttpRequest) -> None:
    if sse.wants_events(request):
        sse.admit(request, _user(request))


async def _accepted(request: HttpRequest, started: turns.StartedTurn) -> Any:
    if sse.wants_events(request):
        return await sse.turn_events(_user(request), started)
    ids = {"turn_id": started.id, "prompt_id": started.prompt_id, "reply_id": started.reply_id}
    return Status(202, {**ids, "duplicate": started.duplicate})


# ------------------------------------------------------------------------------------------------ reads

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_PLACE = re.compile(r"([0-9]{1,18})\.([0-9a-f]{32})", re.ASCII)


def _read_list(user: AnyUser, before: tuple[datetime, uuid.UUID] | None, limit: int, archived: bool) -> dict[str, Any]:
    rows = Conversation.objects.visible_to(user).filter(archived_at__isnull=not archived)
    if before is not None:
        moment, pk = before
        # SQLite compares texts; the cast gives the parameter as many digits as the database's own clock writes.
        at = Cast(Value(moment, DateTimeField()), DateTimeField())
        # The first condition is implied by the second, but only it lets the index begin at the right place.
        rows = rows.filter(updated_at__lte=at).filter(Q(updated_at__lt=at) | Q(updated_at=at, pk__lt=pk))
    found = list(rows.order_by("-updated_at", "-id")[: limit + 1])
    page = found[:limit]
    active = Turn.objects.filter(conversation__in=page, status__in=Turn.ACTIVE)
    running = set(active.values_list("conversation_id", flat=True))
    return {
        "items": [snapshot.conversation_form(c, snapshot.role_in(c, user), running=c.pk in running) for c in page],
        "next": _place_of(page[-1]) if len(found) > limit else None,
    }


def _place_of(conversation: Conversation) -> str:
    microseconds = (conversation.updated_at - _EPOCH) // timedelta(microseconds=1)
    return f"{microseconds}.{conversation.pk.hex}"


def _parse_place(place: str | None) -> tuple[datetime, uuid.UUID] | None:
    if place is None:
        return None
    match = _PLACE.fullmatch(place)
    try:
        if match is None:
            raise ValueError
        return _EPOCH + timedelta(microseconds=int(match[1])), uuid.UUID(match[2])
    except (ValueError, OverflowError):
        raise InvalidInputError("bad_field", field="before") from None


def _read_one(user: AnyUser, conversation_id: uuid.UUID) -> ConversationForm:
    conversation = snapshot.read_conversation(conversation_id, user)
    running = Turn.objects.filter(conversation=conversation, status__in=Turn.ACTIVE).exists()
    return snapshot.conversation_form(conversation, snapshot.role_in(conversation, user), running=running)


def _read_messages(user: AnyUser, conversation_id: uuid.UUID, before: uuid.UUID | None, limit: int) -> dict[str, Any]:
    conversation = snapshot.read_conversation(conversation_id, user)
    leaf_id = conversation.leaf_id
    if before is not None:
        found = conversation.messages.filter(pk=before).values_list("parent_id", flat=True)
        if not found:
            raise NotFoundError
        leaf_id = found[0]
    items, has_earlier = snapshot.read_page(conversation, leaf_id=leaf_id, limit=limit)
    return {"items": items, "has_earlier": has_earlier}
