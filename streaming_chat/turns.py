"""The use cases: the only door through which anything is changed.

WebSocket, SSE, JSON API, pages, terminal and a host's own code all call these functions. Each checks the rights of
``user``, changes the database in one transaction, and then tells viewers and the runner.

A turn goes on by itself once :func:`start_turn` has returned: whoever started it may leave.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import orjson
from django.db import transaction
from django.db.models.functions import Now
from pydantic import ValidationError
from uuid_utils.compat import uuid7

from . import protocol, snapshot
from .blocks import Block, BlockFold, TextReader, storable, text_block
from .conf import get_settings
from .database import in_database
from .exceptions import BusyError, ConflictError, DrainingError, ForbiddenError, InvalidInputError, NotFoundError
from .generation import lease
from .generation.context import Options
from .generation.engine import announce_end
from .generation.runner import get_runner
from .hub import TurnViewer, get_hub
from .journal import get_journal
from .models import Conversation, Message, Turn
from .protocol import ErrorForm, Frame, TurnForm, TurnStatus, UsageForm

if TYPE_CHECKING:
    from .snapshot import AnyUser

TITLE_CHARS: Final = 60
MODEL_CHARS: Final = 100
STOP_WAIT_SECONDS: Final = 2.0
STOP_POLL_SECONDS: Final = 0.02
TIMEOUT_GRACE_SECONDS: Final = 2.0
"""How long a caller waits for its turn to end by itself once the caller's timeout is over."""


@dataclass(frozen=True, slots=True)
class StartedTurn:
    """A turn that was accepted, now or before."""

    id: uuid.UUID
    conversation_id: uuid.UUID
    prompt_id: uuid.UUID
    reply_id: uuid.UUID
    duplicate: bool
    """The same client id had been sent before; nothing was changed."""


# ------------------------------------------------------------------------------------------------ conversations


async def create_conversation(
    user: AnyUser,
    *,
    title: str = "",
    system_prompt: str = "",
    model: str = "",
    options: dict[str, Any] | None = None,
) -> Conversation:
    """Create an empty conversation that ``user`` owns.

    Args:
        user: The owner.
        title: Empty: made from the first prompt.
        system_prompt: Empty: the site's own.
        model: Empty: the site's default.
        options: Overrides for this conversation; see ``Conversation.options``.

    Raises:
        ForbiddenError: Nobody is signed in.
        InvalidInputError: An unknown option, or text that can't be stored.
    """
    if not user.is_authenticated:
        raise ForbiddenError
    try:
        Options.model_validate(options or {})
    except ValidationError as error:
        raise InvalidInputError("bad_field", field=f"options.{error.errors()[0]['loc'][0]}") from None
    if system_prompt:
        system_prompt = protocol.clean_text(
            system_prompt, max_chars=get_settings().message_max_chars, field="system_prompt"
        )
    if len(model) > MODEL_CHARS or not model.isprintable():
        raise InvalidInputError("bad_field", field="model")
    conversation = Conversation(
        owner_id=user.pk,
        title=_clean_title(title),
        system_prompt=system_prompt,
        model=model,
        options=storable(options or {}),
    )
    await in_database(_insert, conversation)
    return conversation


async def update_conversation(
    user: AnyUser, conversation_id: uuid.UUID, *, title: str | None = None, archived: bool | None = None
) -> Conversation:
    """Rename, archive or bring back a conversation; None leaves a property as it is.

    Raises:
        NotFoundError: It is not visible to ``user``.
        ForbiddenError: ``user`` may only read it.
    """
    if title is not None:
        title = _clean_title(title)
    conversation = await in_database(_update, user, conversation_id, title, archived)
    await get_journal().publish(conversation_id, snapshot.conversation_frame(conversation))
    return conversation


async def delete_conversation(user: AnyUser, conversation_id: uuid.UUID) -> None:
    """Delete a conversation with all its messages. A running turn is stopped and its text goes, too.

    Raises:
        NotFoundError: It is not visible to ``user``.
        ForbiddenError: ``user`` does not own it.
    """
    await in_database(_delete, user, conversation_id)
    get_journal().wake()
    await get_journal().publish(conversation_id, Frame("deleted", protocol.encode({"type": "deleted"})))


# ------------------------------------------------------------------------------------------------ turns


async def start_turn(
    user: AnyUser,
    conversation_id: uuid.UUID,
    *,
    text: str,
    client_id: str,
    parent_id: uuid.UUID | Literal["root"] | None = None,
    timeout_seconds: float | None = None,
) -> StartedTurn:
    """Store a prompt and start the turn that answers it. Returns as soon as both are committed.

    Args:
        user: Who asks.
        conversation_id: Where.
        text: The prompt.
        client_id: Chosen by the caller, at most 64 characters. Repeating it with the same text returns the first turn.
        parent_id: The assistant message to follow; None the current last one; ``"root"`` the beginning. A new prompt
            for an old parent is how a prompt is edited: it makes a branch.
        timeout_seconds: Ends the turn as ``timed_out`` after so long, keeping its text. None: the site's limit.

    Raises:
        NotFoundError: The conversation or parent does not exist for ``user``.
        ForbiddenError: ``user`` may only read, or the parent is not an assistant's message.
        InvalidInputError: The text is empty, too long or can't be stored.
        ConflictError: The client id was used for other text.
        BusyError: A turn is running.
        DrainingError: This process is shutting down.
    """
    text = protocol.clean_text(text, max_chars=get_settings().message_max_chars)
    _check_client_id(client_id)
    if timeout_seconds is not None and not 0 < timeout_seconds < float("inf"):
        raise InvalidInputError("bad_field", field="timeout_seconds")
    ids = (uuid7(), uuid7(), uuid7())
    return await _accept(_accept_prompt, user, conversation_id, ids, text, client_id, parent_id, timeout_seconds)


async def regenerate_turn(
    user: AnyUser, conversation_id: uuid.UUID, *, message_id: uuid.UUID, client_id: str
) -> StartedTurn:
    """Answer a prompt once more, in a branch beside the reply ``message_id``.

    Raises:
        NotFoundError: There is no such message for ``user``.
        ForbiddenError: ``user`` may only read, or it is not an assistant's message.
        ConflictError, BusyError, DrainingError: As for :func:`start_turn`.
    """
    _check_client_id(client_id)
    ids = (uuid7(), uuid7())
    return await _accept(_accept_regenerate, user, conversation_id, ids, message_id, client_id)


async def stop_turn(user: AnyUser, conversation_id: uuid.UUID, turn_id: uuid.UUID | None = None) -> TurnStatus | None:
    """Stop a turn, keeping its text; its status afterwards.

    Waits a moment for the turn's owner, so normally no text comes after this has returned. Stopping a turn that is
    over changes nothing.

    Args:
        user: Who stops.
        conversation_id: Where.
        turn_id: None: whatever runs there; the result is None if nothing does.

    Raises:
        NotFoundError: The conversation or turn does not exist for ``user``.
        ForbiddenError: ``user`` may only read.
    """
    found = await in_database(_find_turn, user, conversation_id, turn_id)
    if found is None:
        return None
    ended = await in_database(lease.request_stop, found)
    if ended is not None:
        await announce_end(ended)
        return cast("TurnStatus", ended.status)
    get_journal().wake()
    give_up_at = time.monotonic() + STOP_WAIT_SECONDS
    while True:
        status = await in_database(_status_of, found)
        if status not in Turn.ACTIVE or time.monotonic() > give_up_at:
            return status
        await asyncio.sleep(STOP_POLL_SECONDS)


async def recover_turns() -> int:
    """Settle every turn whose owner is gone; how many. Each process does this by itself every few seconds."""
    return await get_runner().recover()


# ------------------------------------------------------------------------------------------------ replies in Python


@dataclass(kw_only=True, slots=True)
class Reply:
    """A reply, complete or as far as it came; ``status`` says which."""

    conversation_id: uuid.UUID
    turn_id: uuid.UUID
    message_id: uuid.UUID
    status: TurnStatus
    text: str = ""
    blocks: list[Block] = field(default_factory=list)
    stop_reason: str = ""
    error: ErrorForm | None = None
    usage: UsageForm | None = None


class ReplyStream:
    """A started turn, to be read once: its words by iterating, or all its events by :meth:`events`.

    ``reply`` is up to date at any moment and final when the iteration has ended. Leaving early does not stop the turn.
    """

    def __init__(self, started: StartedTurn, viewer: TurnViewer, timeout_seconds: float | None, user: AnyUser) -> None:
        self.started = started
        self.reply = Reply(
            conversation_id=started.conversation_id,
            turn_id=started.id,
            message_id=started.reply_id,
            status="queued",
        )
        self._viewer = viewer
        # The turn should end by its own deadline; this is for one that nobody has claimed.
        self._give_up_at = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        self._user = user
        self._fold = BlockFold()
        self._reader = TextReader()

    async def __aiter__(self) -> AsyncIterator[str]:
        """The reply's words, as they are committed."""
        async for _, words in self._events():
            if words:
                yield words

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The turn's events as the wire protocol has them: ``delta``, ``progress`` and, last, ``finished``."""
        async for event, _ in self._events():
            yield event

    async def _events(self) -> AsyncIterator[tuple[dict[str, Any], str]]:
        async with contextlib.aclosing(self._viewer.events()) as events:
            async for sent in events:
                # A silent turn has an event every second, so this is looked at in time.
                if self._give_up_at is not None and time.monotonic() > self._give_up_at:
                    self._give_up_at = None
                    await stop_turn(self._user, self.started.conversation_id, self.started.id)
                if sent.json:
                    event = orjson.loads(sent.json)
                    if event["type"] == "finished":
                        # The caller may end its event loop next, and with it whatever is still to be done.
                        await get_runner().settled(self.started.id)
                    yield event, self._note(event)

    def _note(self, event: dict[str, Any]) -> str:
        reply = self.reply
        words = ""
        if event["type"] == "delta":
            for op in event["ops"]:
                self._fold.apply(op)
                words += self._reader.feed(op)
            reply.status = "running"
            reply.text += words
        elif event["type"] == "finished":
            turn: TurnForm = event["turn"]
            reply.status, reply.stop_reason = turn["status"], turn["stop_reason"]
            reply.error, reply.usage = turn["error"], turn["usage"]
            reply.blocks = self._fold.blocks()
        elif event["type"] == "deleted":
            reply.status = "interrupted"
        return words


async def open_reply(
    user: AnyUser,
    text: str,
    *,
    conversation_id: uuid.UUID | None = None,
    client_id: str | None = None,
    timeout: float | None = None,  # noqa: ASYNC109 - it ends the turn, not only the wait
) -> ReplyStream:
    """Start a turn and return its stream, to be read with ``async for words in stream``.

    Args:
        user: Who asks.
        text: The prompt.
        conversation_id: None: a new conversation.
        client_id: As for :func:`start_turn`; None: a fresh one.
        timeout: In seconds, from now. Then the turn ends as ``timed_out`` and keeps its text. None: the site's limit.

    Raises:
        ChatError: As :func:`start_turn`.
    """
    if conversation_id is None:
        conversation_id = (await create_conversation(user)).pk
    started = await start_turn(
        user,
        conversation_id,
        text=text,
        client_id=client_id or str(uuid.uuid4()),
        timeout_seconds=timeout,
    )
    wait = None if timeout is None else timeout + TIMEOUT_GRACE_SECONDS
    return ReplyStream(started, get_hub().follow(conversation_id, started.id), wait, user)


async def stream_reply(
    user: AnyUser,
    text: str,
    *,
    conversation_id: uuid.UUID | None = None,
    client_id: str | None = None,
    on_text: Callable[[str], Awaitable[None]] | None = None,
    on_complete: Callable[[Reply], Awaitable[None]] | None = None,
    timeout: float | None = None,  # noqa: ASYNC109 - it ends the turn, not only the wait
) -> Reply:
    """Ask, await ``on_text`` with the words as they come, then ``on_complete`` with the reply; return the reply.

    Needs no socket and no server: any coroutine can call it. When ``timeout`` is up, the partial text is returned with
    the status ``timed_out``. If a callback raises, or the caller is cancelled, the turn goes on and is stored.

    Args: as for :func:`open_reply`.

    Raises:
        ChatError: The turn was not accepted. A turn that fails later is returned, not raised.
    """
    stream = await open_reply(user, text, conversation_id=conversation_id, client_id=client_id, timeout=timeout)
    async for words in stream:
        if on_text is not None:
            await on_text(words)
    if on_complete is not None:
        await on_complete(stream.reply)
    return stream.reply


# ------------------------------------------------------------------------------------------------ transactions


async def _accept(work: Callable[..., tuple[Turn, list[Message], bool]], *args: Any) -> StartedTurn:
    """Run the transaction ``work``, then tell the runner and the viewers."""
    runner = get_runner()
    if runner.draining:
        raise DrainingError
    turn, messages, duplicate = await in_database(work, *args)
    if not duplicate:
        runner.nudge(turn.pk)
        await get_journal().publish(turn.conversation_id, snapshot.turn_frame(turn, messages))
    return StartedTurn(turn.pk, turn.conversation_id, turn.prompt_id, turn.reply_id, duplicate)


@transaction.atomic
def _accept_prompt(
    user: AnyUser,
    conversation_id: uuid.UUID,
    ids: tuple[uuid.UUID, uuid.UUID, uuid.UUID],
    text: str,
    client_id: str,
    parent_id: uuid.UUID | Literal["root"] | None,
    timeout_seconds: float | None,
) -> tuple[Turn, list[Message], bool]:
    conversation = _writable(user, conversation_id)
    before = Message.objects.filter(conversation=conversation, client_id=client_id).first()
    if before is not None:
        if before.role != Message.Role.USER or before.text != text:
            raise ConflictError
        turn = Turn.objects.timed().filter(prompt=before).order_by("queued_at", "id").first()
        if turn is None:
            raise ConflictError
        return turn, [], True
    _refuse_if_busy(conversation)
    turn_id, prompt_id, reply_id = ids
    prompt = Message(
        id=prompt_id,
        conversation=conversation,
        parent_id=_parent_of(conversation, parent_id),
        role=Message.Role.USER,
        author_id=user.pk,
        blocks=[text_block(text)],
        text=text,
        client_id=client_id,
    )
    reply = Message(id=reply_id, conversation=conversation, parent=prompt, role=Message.Role.ASSISTANT)
    Message.objects.bulk_create([prompt, reply])
    title = conversation.title or _clean_title(text.splitlines()[0])[:TITLE_CHARS]
    turn = _begin(conversation, prompt, reply, user, turn_id, title=title, timeout_seconds=timeout_seconds)
    return turn, [_with_author(prompt, user), reply], False


def _parent_of(conversation: Conversation, parent_id: uuid.UUID | Literal["root"] | None) -> uuid.UUID | None:
    if parent_id is None:
        return conversation.leaf_id
    if parent_id == "root":
        return None
    role = Message.objects.filter(conversation=conversation, pk=parent_id).values_list("role", flat=True).first()
    if role is None:
        raise NotFoundError
    if role != Message.Role.ASSISTANT:
        raise ForbiddenError(field="parent_id")
    return uuid.UUID(str(parent_id))


@transaction.atomic
def _accept_regenerate(
    user: AnyUser,
    conversation_id: uuid.UUID,
    ids: tuple[uuid.UUID, uuid.UUID],
    message_id: uuid.UUID,
    client_id: str,
) -> tuple[Turn, list[Message], bool]:
    conversation = _writable(user, conversation_id)
    old = Message.objects.select_related("parent").filter(conversation=conversation, pk=message_id).first()
    if old is None:
        raise NotFoundError
    if old.role != Message.Role.ASSISTANT or old.parent is None:
        raise ForbiddenError(field="message_id")
    before = Message.objects.filter(conversation=conversation, client_id=client_id).first()
    if before is not None:
        turn = Turn.objects.timed().filter(reply=before, prompt=old.parent).first()
        if turn is None:
            raise ConflictError
        return turn, [], True
    _refuse_if_busy(conversation)
    turn_id, reply_id = ids
    reply = Message.objects.create(
        id=reply_id,
        conversation=conversation,
        parent=old.parent,
        role=Message.Role.ASSISTANT,
        client_id=client_id,
    )
    return _begin(conversation, old.parent, reply, user, turn_id, title=conversation.title), [reply], False


def _begin(
    conversation: Conversation,
    prompt: Message,
    reply: Message,
    user: AnyUser,
    turn_id: uuid.UUID,
    *,
    title: str,
    timeout_seconds: float | None = None,
) -> Turn:
    """Create the turn that makes ``reply``, and let the current branch end there."""
    Turn.objects.create(
        id=turn_id,
        conversation=conversation,
        prompt=prompt,
        reply=reply,
        requested_by_id=user.pk,
        timeout_seconds=timeout_seconds,
    )
    Conversation.objects.filter(pk=conversation.pk).touch(leaf=reply, title=title)
    return Turn.objects.timed().select_related("conversation").get(pk=turn_id)


@transaction.atomic
def _insert(conversation: Conversation) -> None:
    if not Conversation.objects.filter(pk=conversation.pk).exists():
        conversation.save(force_insert=True)
    conversation.refresh_from_db()


@transaction.atomic
def _update(user: AnyUser, conversation_id: uuid.UUID, title: str | None, archived: bool | None) -> Conversation:
    _writable(user, conversation_id)
    rows = Conversation.objects.filter(pk=conversation_id)
    if archived is True:
        rows.filter(archived_at=None).update(archived_at=Now())
    elif archived is False:
        rows.update(archived_at=None)
    rows.touch(**({} if title is None else {"title": title}))
    return rows.get()


@transaction.atomic
def _delete(user: AnyUser, conversation_id: uuid.UUID) -> None:
    conversation = _locked(user, conversation_id)
    if snapshot.role_in(conversation, user) != "owner":
        raise ForbiddenError
    # The journal waits for these rows, or else it would add entries to a turn that is half deleted.
    list(Turn.objects.select_for_update().filter(conversation=conversation).values_list("pk"))
    conversation.delete()


def _find_turn(user: AnyUser, conversation_id: uuid.UUID, turn_id: uuid.UUID | None) -> uuid.UUID | None:
    conversation = snapshot.read_conversation(conversation_id, user)
    if snapshot.role_in(conversation, user) == "viewer":
        raise ForbiddenError
    if turn_id is None:
        running = Turn.objects.filter(conversation=conversation, status__in=Turn.ACTIVE)
        return running.values_list("pk", flat=True).first()
    if not Turn.objects.filter(conversation=conversation, pk=turn_id).exists():
        raise NotFoundError
    return turn_id


def _status_of(turn_id: uuid.UUID) -> TurnStatus:
    status = Turn.objects.filter(pk=turn_id).values_list("status", flat=True).first()
    if status is None:
        raise NotFoundError
    return cast("TurnStatus", status)


def _locked(user: AnyUser, conversation_id: uuid.UUID) -> Conversation:
    visible = Conversation.objects.visible_to(user).select_for_update(no_key=True)
    conversation = visible.filter(pk=conversation_id).first()
    if conversation is None:
        raise NotFoundError
    return conversation


def _writable(user: AnyUser, conversation_id: uuid.UUID) -> Conversation:
    conversation = _locked(user, conversation_id)
    if snapshot.role_in(conversation, user) == "viewer":
        raise ForbiddenError
    return conversation


def _refuse_if_busy(conversation: Conversation) -> None:
    if Turn.objects.filter(conversation=conversation, status__in=Turn.ACTIVE).exists():
        raise BusyError


def _with_author(message: Message, user: AnyUser) -> Message:
    message.author = cast("Any", user)
    return message


def _check_client_id(client_id: str) -> None:
    if not 1 <= len(client_id) <= protocol.MAX_CLIENT_ID_CHARS or not client_id.isprintable():
        raise InvalidInputError("bad_field", field="client_id")


def _clean_title(title: str) -> str:
    title = " ".join("".join(char for char in title if char.isprintable() or char.isspace()).split())
    return title[: Conversation._meta.get_field("title").max_length]
