"""Rows as the protocol shows them, and the one consistent read that a viewer starts from."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import orjson
from django.db.models import prefetch_related_objects
from django.utils.translation import gettext

from . import journal, protocol
from .blocks import fold, ops_of
from .conf import get_settings
from .exceptions import TURN_ERRORS, NotFoundError
from .models import Conversation, JournalEntry, Message, Participant, Turn, UsageRecord
from .protocol import (
    ConversationForm,
    Cursor,
    ErrorForm,
    Frame,
    MessageForm,
    Snapshot,
    TurnForm,
    TurnStatus,
    UsageForm,
)

if TYPE_CHECKING:
    from django.contrib.auth.base_user import AbstractBaseUser
    from django.contrib.auth.models import AnonymousUser

    AnyUser: TypeAlias = AbstractBaseUser | AnonymousUser

Role = Literal["owner", "editor", "viewer"]


def role_in(conversation: Conversation, user: AnyUser) -> Role:
    """What ``user``, to whom the conversation is visible, may do in it."""
    if conversation.owner_id == user.pk:
        return "owner"
    role = (
        Participant.objects.filter(conversation=conversation, user=cast("Any", user))
        .values_list("role", flat=True)
        .first()
    )
    return cast("Role", role or "viewer")


def conversation_form(conversation: Conversation, role: Role, *, running: bool) -> ConversationForm:
    """A conversation as every transport shows it."""
    return {
        "id": str(conversation.pk),
        "title": conversation.title,
        "model": conversation.model,
        "role": role,
        "archived": conversation.archived_at is not None,
        "running": running,
        "created_at": conversation.created_at.isoformat(),
        "updated_at": conversation.updated_at.isoformat(),
    }


def message_form(message: Message, turn: Turn | None = None, *, seq: int | None = None) -> MessageForm:
    """A message as every transport shows it. Its author should be prefetched.

    Args:
        message: For the reply of an active turn, with the blocks that its journal holds so far.
        turn: The turn that made it; see :func:`turn_form`.
        seq: As in :func:`turn_form`.
    """
    return {
        "id": str(message.pk),
        "parent_id": None if message.parent_id is None else str(message.parent_id),
        "role": cast("Literal['user', 'assistant']", message.role),
        "author": None if message.author is None else message.author.get_username(),
        "client_id": message.client_id,
        "blocks": message.blocks,
        "turn": None if turn is None else turn_form(turn, seq=seq),
        "created_at": message.created_at.isoformat(),
    }


def turn_form(turn: Turn, *, seq: int | None = None) -> TurnForm:
    """A turn as every transport shows it. Query it with ``timed()``.

    Args:
        turn: The row.
        seq: The last journal entry that the receiver has been given; None means all of them.
    """
    return {
        "id": str(turn.pk),
        "prompt_id": str(turn.prompt_id),
        "reply_id": str(turn.reply_id),
        "status": cast("TurnStatus", turn.status),
        "stop_reason": turn.stop_reason,
        "error": error_form(turn.error_code),
        "provider": turn.provider,
        "model": turn.model,
        "seq": (turn.end_seq or 0) if seq is None else seq,
        "elapsed_seconds": _seconds(turn.queued_at, turn.finished_at or turn.now),
        "first_text_seconds": None if turn.first_text_at is None else _seconds(turn.queued_at, turn.first_text_at),
        "usage": usage_form(turn),
    }


def error_form(code: str) -> ErrorForm | None:
    """Why a turn did not complete; None for an empty code."""
    if not code:
        return None
    return {"code": code, "detail": gettext(TURN_ERRORS.get(code, TURN_ERRORS["internal_error"]))}


def usage_form(turn: Turn) -> UsageForm | None:
    """The turn's tokens so far; None before its first provider request has ended."""
    settled = [record for record in turn.usage_records.all() if record.quality != UsageRecord.Quality.OPEN]
    if not settled:
        return None
    return {
        "exact": all(record.quality == UsageRecord.Quality.EXACT for record in settled),
        "input_tokens": sum(record.input_tokens for record in settled),
        "output_tokens": sum(record.output_tokens for record in settled),
        "cache_creation_input_tokens": sum(record.cache_creation_input_tokens for record in settled),
        "cache_read_input_tokens": sum(record.cache_read_input_tokens for record in settled),
    }


def message_forms(messages: Sequence[Message]) -> list[MessageForm]:
    """Messages as every transport shows them, with their turns; a running turn's reply as far as it is journaled."""
    turns = {
        turn.reply_id: turn
        for turn in Turn.objects.timed().filter(reply__in=[m for m in messages if m.role == Message.Role.ASSISTANT])
    }
    forms = []
    for message in messages:
        turn = turns.get(message.pk)
        seq = None
        if turn is not None and turn.active:
            seq, ops = journal.read_ops(turn.pk)
            message.blocks = fold(orjson.loads(ops))
        elif turn is not None and turn.end_seq and not message.blocks:
            message.refresh_from_db(fields=["blocks"])  # it ended between the two reads
        forms.append(message_form(message, turn, seq=seq))
    return forms


def read_page(conversation: Conversation, *, leaf_id: uuid.UUID | None, limit: int) -> tuple[list[MessageForm], bool]:
    """The last ``limit`` messages up to ``leaf_id``, oldest first, and whether there are earlier ones."""
    messages = Message.objects.path(leaf_id, limit=limit + 1)
    prefetch_related_objects(messages, "author")
    return message_forms(messages[-limit:]), len(messages) > limit


def read_snapshot(conversation: Conversation, user: AnyUser) -> Snapshot:
    """The conversation as a viewer shows it from nothing."""
    messages, has_earlier = read_page(
        conversation, leaf_id=conversation.leaf_id, limit=get_settings().snapshot_messages
    )
    turn = messages[-1]["turn"] if messages else None
    running = turn is not None and turn["status"] in Turn.ACTIVE
    return {
        "type": "snapshot",
        "protocol": protocol.PROTOCOL_VERSION,
        "revision": conversation.revision,
        "conversation": conversation_form(conversation, role_in(conversation, user), running=running),
        "messages": messages,
        "has_earlier": has_earlier,
        "turn": turn,
    }


def read_conversation(conversation_id: uuid.UUID, user: AnyUser) -> Conversation:
    """The conversation, if ``user`` may see it.

    Raises:
        NotFoundError: It does not exist, or not for this user.
    """
    conversation = Conversation.objects.visible_to(user).filter(pk=conversation_id).first()
    if conversation is None:
        raise NotFoundError
    return conversation


@dataclass(frozen=True, slots=True)
class CatchUp:
    """What a viewer lacks (None: nothing), where it stands afterwards, and how its turn is doing."""

    frame: Frame | None
    cursor: Cursor
    active: bool
    """Whether the turn is queued or running."""
    elapsed_seconds: float
    """The age of the turn."""


def catch_up(conversation_id: uuid.UUID, user: AnyUser, cursor: Cursor | None) -> CatchUp:
    """What a viewer at ``cursor`` lacks: the turn's missing entries, or else a snapshot.

    The rows are read before the entries. Entries outlive the turn's end, so a turn that ends in between is at worst
    still shown as running, and its end comes as an event.

    Raises:
        NotFoundError: The conversation does not exist, or not any more, or not for this user.
    """
    conversation = read_conversation(conversation_id, user)
    turn = Turn.objects.timed().filter(reply_id=conversation.leaf_id).first()
    turn_id = "" if turn is None else str(turn.pk)
    active = turn is not None and turn.active
    elapsed = 0.0 if turn is None else _seconds(turn.queued_at, turn.finished_at or turn.now)
    if cursor is not None and cursor.revision == conversation.revision and cursor.turn == turn_id:
        end_seq = 0 if turn is None else turn.end_seq
        seq, ops = journal.read_ops(turn_id, after=cursor.seq) if active else (cursor.seq, "[]")
        if seq == end_seq or seq > cursor.seq or (active and _is_entry(turn_id, seq)):
            here = Cursor(conversation.revision, turn_id, seq)
            return CatchUp(delta_frame(turn_id, cursor.seq, seq, ops), here, active, elapsed)
    snapshot = read_snapshot(conversation, user)
    shown = snapshot["turn"]
    here = Cursor(conversation.revision, shown["id"] if shown else "", shown["seq"] if shown else 0)
    frame = Frame("snapshot", protocol.encode(snapshot), here.turn, 0, here.seq, here.revision)
    return CatchUp(frame, here, active, elapsed)


def catch_up_turn(turn_id: uuid.UUID, after: int) -> tuple[list[Frame], bool, float]:
    """What a viewer of one turn lacks after entry ``after``: its frames, whether it is active, its age in seconds.

    The last frame of a turn that is over is ``finished``.

    Raises:
        NotFoundError: The turn was deleted.
    """
    turn = Turn.objects.timed().select_related("reply", "conversation").filter(pk=turn_id).first()
    if turn is None:
        raise NotFoundError
    key = str(turn_id)
    seq, ops = journal.read_ops(turn_id, after=after)
    if not turn.active and seq < (turn.end_seq or 0) and after == 0:
        # The entries have been swept, so the reply itself is all there is.
        seq, ops = turn.end_seq or 0, orjson.dumps(ops_of(turn.reply.blocks)).decode()
    frame = delta_frame(key, after, seq, ops)
    frames = [] if frame is None else [frame]
    if not turn.active:
        frames.append(finished_frame(turn))
    return frames, turn.active, _seconds(turn.queued_at, turn.finished_at or turn.now)


def delta_frame(turn_id: str, after: int, seq: int, ops: str) -> Frame | None:
    """The entries ``after + 1`` to ``seq`` as one frame; None if there are none."""
    if seq <= after:
        return None
    return Frame("delta", protocol.encode_delta(turn_id, after + 1, seq, ops), turn_id, after + 1, seq)


def turn_frame(turn: Turn, messages: Sequence[Message]) -> Frame:
    """The event that a turn was accepted with these new messages. Query the turn with ``timed()``."""
    forms = [message_form(message, turn if message.pk == turn.reply_id else None) for message in messages]
    event: protocol.TurnEvent = {
        "type": "turn",
        "revision": turn.conversation.revision,
        "title": turn.conversation.title,
        "turn": turn_form(turn),
        "messages": forms,
    }
    return Frame("turn", protocol.encode(event), str(turn.pk), revision=turn.conversation.revision)


def finished_frame(turn: Turn) -> Frame:
    """The event that a turn is over. Query it with ``timed()``, just after the change."""
    revision, seq = turn.conversation.revision, turn.end_seq or 0
    event: protocol.Finished = {"type": "finished", "revision": revision, "turn": turn_form(turn)}
    return Frame("finished", protocol.encode(event), str(turn.pk), seq=seq, revision=revision)


def conversation_frame(conversation: Conversation) -> Frame:
    """The event that a conversation itself changed."""
    event: protocol.ConversationEvent = {
        "type": "conversation",
        "revision": conversation.revision,
        "title": conversation.title,
        "archived": conversation.archived_at is not None,
    }
    return Frame("conversation", protocol.encode(event), revision=conversation.revision)


def _is_entry(turn_id: str, seq: int) -> bool:
    """Whether ``seq`` can be where a viewer of the turn stands, so that a made-up future is not believed."""
    return seq == 0 or JournalEntry.objects.filter(turn_id=turn_id, seq=seq).exists()


def _seconds(start: datetime, end: datetime) -> float:
    return round(max(0.0, (end - start).total_seconds()), 3)
