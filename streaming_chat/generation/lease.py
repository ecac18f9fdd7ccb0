"""The transitions of a turn, each one conditional UPDATE with what belongs to it in one transaction.

    queued ──claim──▶ running ──finish──▶ completed | stopped | timed_out | failed | interrupted
       ▲                 │
       └────requeue──────┴──settle (the owner is gone)──▶ interrupted | stopped

Any number of processes may try; the database decides. All functions block: run them in a database thread.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

import orjson
from django.db import DatabaseError, transaction
from django.db.models import F, Q
from django.db.models.functions import Now

from .. import journal
from ..blocks import Block, fold, text_of
from ..journal import Lease
from ..models import Conversation, JournalEntry, Message, Turn, UsageRecord
from ..providers.base import Usage

MAX_ATTEMPTS: Final = 2
"""How often a turn is claimed before it is given up, if its owners die before asking the provider."""
CHARS_PER_TOKEN: Final = 4
"""For estimates; Anthropic's documentation gives about 3.5 to 4 characters of English text per token."""
SWEEP_BATCH: Final = 200

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Claim:
    """A turn that this process now owns."""

    lease: Lease
    prompt_id: uuid.UUID
    timeout_seconds: float | None
    """What is left of the caller's own limit; None if there is none."""


@dataclass(kw_only=True, slots=True)
class Request:
    """What is known of one provider request; becomes its usage record."""

    record_id: uuid.UUID
    usage: Usage = field(default_factory=Usage)
    final: bool = False
    began: bool = False
    """Whether the provider began to answer; an error instead of an answer is not billed."""
    request_id: str = ""
    model: str = ""
    error_code: str = ""
    sent_chars: int = 0
    received_chars: int = 0
    first_text_ms: int | None = None
    duration_ms: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a turn ended."""

    status: Turn.Status
    error_code: str = ""
    stop_reason: str = ""
    stop_details: dict[str, Any] = field(default_factory=dict)


def claim(turn_id: uuid.UUID, token: uuid.UUID, lease_seconds: float) -> Claim | None:
    """Make this process the owner of a queued turn; None if somebody else was faster or it was stopped.

    ``token`` is the caller's, so that repeating a claim whose outcome is unknown finds the same claim again.
    """
    Turn.objects.filter(pk=turn_id, status=Turn.Status.QUEUED).update(
        status=Turn.Status.RUNNING,
        lease_token=token,
        lease_expires_at=Now() + timedelta(seconds=lease_seconds),
        started_at=Now(),
        attempt=F("attempt") + 1,
    )
    turn = Turn.objects.filter(pk=turn_id, lease_token=token).first()
    if turn is None:
        return None
    timeout_seconds = turn.timeout_seconds
    if timeout_seconds is not None and turn.started_at is not None:
        timeout_seconds -= (turn.started_at - turn.queued_at).total_seconds()
    return Claim(Lease(turn.pk, turn.conversation_id, token), turn.prompt_id, timeout_seconds)


def waiting_turns(limit: int, *, age_seconds: float) -> list[uuid.UUID]:
    """The longest waiting turns that nobody has claimed for ``age_seconds``."""
    waiting = Turn.objects.filter(status=Turn.Status.QUEUED, queued_at__lte=Now() - timedelta(seconds=age_seconds))
    return list(waiting.order_by("queued_at", "id").values_list("id", flat=True)[:limit])


def open_request(lease: Lease, record_id: uuid.UUID, *, provider: str, model: str) -> bool:
    """Record that the provider is about to be asked; False if the lease is lost, and then it must not be asked.

    After a crash this record says that the request may have been sent, so the turn is not simply run again.
    """
    with transaction.atomic():
        owned = Turn.objects.select_for_update().filter(lease_token=lease.token, status=Turn.Status.RUNNING)
        user_id = owned.values_list("requested_by_id", flat=True)
        if not owned.update(provider=provider, model=model):
            return False
        UsageRecord.objects.get_or_create(
            pk=record_id,
            defaults={
                "turn_id": lease.turn_id,
                "conversation_id": lease.conversation_id,
                "user_id": user_id.first(),
                "provider": provider,
                "model": model,
            },
        )
    return True


def finish(
    lease: Lease, outcome: Outcome, *, blocks: Sequence[Block], end_seq: int, requests: Sequence[Request]
) -> Turn | None:
    """End a turn: status, message and usage in one transaction. None if the lease is lost; only usage is stored then.

    Repeating it after an unknown outcome changes nothing more and returns None.
    """
    with transaction.atomic():
        # The turn first, as recovery does it: two that lock in different orders could wait for each other.
        mine = Turn.objects.filter(lease_token=lease.token, status=Turn.Status.RUNNING)
        ended = _end(mine, lease.turn_id, outcome, blocks=list(blocks), end_seq=end_seq)
        for request in requests:
            settle_request(request)
        if not ended:
            return None
        answered_by = [request.model for request in requests if request.model]
        if answered_by:
            Turn.objects.filter(pk=lease.turn_id).update(model=answered_by[-1][:100])
        return _ended_turn(lease.turn_id)


def settle_request(request: Request) -> None:
    """Close a request's usage record: exact with the provider's final figures, else an estimate."""
    usage = request.usage
    estimate = (request.received_chars + CHARS_PER_TOKEN - 1) // CHARS_PER_TOKEN
    output_tokens = usage.output_tokens or 0
    input_tokens = usage.input_tokens
    if not request.final:
        output_tokens = max(output_tokens, estimate)
    if input_tokens is None:
        # Refused before it began (an error answer) costs nothing; without any answer the input may have been read.
        input_tokens = 0 if request.final else request.sent_chars // CHARS_PER_TOKEN
    quality = UsageRecord.Quality.EXACT if request.final else UsageRecord.Quality.ESTIMATED
    fields: dict[str, Any] = {"model": request.model[:100]} if request.model else {}
    UsageRecord.objects.filter(pk=request.record_id, quality=UsageRecord.Quality.OPEN).update(
        quality=quality,
        request_id=request.request_id[:100],
        error_code=request.error_code,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cache_creation_input_tokens=usage.cache_creation_input_tokens or 0,
        cache_read_input_tokens=usage.cache_read_input_tokens or 0,
        thinking_tokens=usage.thinking_tokens or 0,
        raw=usage.raw,
        finished_at=Now(),
        first_text_ms=request.first_text_ms,
        duration_ms=request.duration_ms,
        **fields,
    )


def settle_expired() -> tuple[list[Turn], list[uuid.UUID]]:
    """Settle every turn whose owner is gone or that waited too long; the ended ones, and those that are queued again.

    What viewers saw is in the journal and becomes the reply. A turn whose provider was never asked is queued again,
    as nobody saw or paid anything; one whose provider was asked is not, because asking again would be billed again.
    """
    ended, requeued = [], []
    expired = Turn.objects.filter(status=Turn.Status.RUNNING, lease_expires_at__lt=Now())
    for turn_id, token, conversation_id in expired.values_list("id", "lease_token", "conversation_id")[:SWEEP_BATCH]:
        try:
            with transaction.atomic():
                _lock(conversation_id)
                # The lock keeps the owner's last commit out, or waits for it and then finds the lease renewed.
                turn = expired.select_for_update().filter(pk=turn_id, lease_token=token).first()
                if turn is None:
                    continue
                if _may_run_again(turn):
                    _mine(turn).update(
                        status=Turn.Status.QUEUED, lease_token=None, lease_expires_at=None, started_at=None
                    )
                    requeued.append(turn.pk)
                elif _settle(turn):
                    ended.append(_ended_turn(turn.pk))
        except (DatabaseError, ValueError) as error:
            # One that can't be settled must not keep the others waiting.
            logger.error("turn %s: could not be settled: %s", turn_id, type(error).__name__)
    return ended, requeued


def settle_overdue(queue_seconds: float) -> list[Turn]:
    """Fail the turns that waited in the queue for ``queue_seconds``; the ended ones."""
    overdue = Turn.objects.filter(status=Turn.Status.QUEUED, queued_at__lt=Now() - timedelta(seconds=queue_seconds))
    return [turn for turn_id in overdue.values_list("id", flat=True)[:SWEEP_BATCH] if (turn := _fail_queued(turn_id))]


def request_stop(turn_id: uuid.UUID) -> Turn | None:
    """Stop a queued turn at once, or flag a running one for its owner; the turn if this ended it."""
    for _ in range(2):  # recovery may queue it again in between, but not twice
        with transaction.atomic():
            queued = Turn.objects.filter(pk=turn_id, status=Turn.Status.QUEUED)
            if _end(queued, turn_id, Outcome(status=Turn.Status.STOPPED), blocks=[], end_seq=0):
                return _ended_turn(turn_id)
        running = Turn.objects.filter(pk=turn_id, status=Turn.Status.RUNNING)
        if running.filter(stop_requested_at=None).update(stop_requested_at=Now()) or running.exists():
            return None
    return None


def settle_requests(age_seconds: float) -> int:
    """Estimate requests of ``age_seconds`` ago that nobody can account for any more; how many, 0 if none is left.

    That is, those whose turn is over or was deleted together with its conversation before its owner could report.
    ``age_seconds`` must be more than a turn and its end can take.
    """
    nobodys = UsageRecord.objects.filter(
        Q(turn=None) | Q(turn__finished_at__isnull=False),
        quality=UsageRecord.Quality.OPEN,
        requested_at__lt=Now() - timedelta(seconds=age_seconds),
    ).select_related("turn__prompt")[:SWEEP_BATCH]
    requests = [
        Request(
            record_id=record.pk,
            request_id=record.request_id,
            error_code="owner_lost",
            sent_chars=len(record.turn.prompt.text) if record.turn is not None else 0,
        )
        for record in nobodys
    ]
    for request in requests:
        settle_request(request)
    return len(requests)


def sweep_entries(keep_seconds: float) -> int:
    """Delete the entries of some turns that ended ``keep_seconds`` ago; of how many, 0 if none is left.

    The replies hold the text.
    """
    # Entries are ordered by turn, and turns by age: the oldest are enough to look at.
    oldest = JournalEntry.objects.order_by("turn_id").values_list("turn_id", flat=True).distinct()[:SWEEP_BATCH]
    over = Turn.objects.filter(pk__in=list(oldest), finished_at__lt=Now() - timedelta(seconds=keep_seconds))
    with transaction.atomic():
        # What another process is deleting is left to it.
        turn_ids = list(over.select_for_update(no_key=True, skip_locked=True).values_list("id", flat=True))
        JournalEntry.objects.filter(turn_id__in=turn_ids).delete()
    return len(turn_ids)


def _lock(conversation_id: uuid.UUID) -> None:
    """Lock the conversation before its turn, the order in which a new turn is made: so the two never deadlock."""
    list(Conversation.objects.select_for_update(no_key=True).filter(pk=conversation_id).values_list("pk"))


def _may_run_again(turn: Turn) -> bool:
    asked = turn.usage_records.exists()
    return not asked and turn.stop_requested_at is None and turn.attempt < MAX_ATTEMPTS


def _mine(turn: Turn) -> Any:
    return Turn.objects.filter(pk=turn.pk, lease_token=turn.lease_token, status=Turn.Status.RUNNING)


def _settle(turn: Turn) -> bool:
    stopped = turn.stop_requested_at is not None
    outcome = (
        Outcome(status=Turn.Status.STOPPED)
        if stopped
        else Outcome(status=Turn.Status.INTERRUPTED, error_code="owner_lost")
    )
    end_seq, ops = journal.read_ops(turn.pk)
    blocks = fold(orjson.loads(ops))
    for record in turn.usage_records.filter(quality=UsageRecord.Quality.OPEN):
        sent = sum(len(text) for text in Message.objects.filter(pk=turn.prompt_id).values_list("text", flat=True))
        settle_request(
            Request(
                record_id=record.pk,
                request_id=record.request_id,
                error_code="owner_lost",
                sent_chars=sent,
                received_chars=sum(len(str(block.get("text", block))) for block in blocks),
            )
        )
    return _end(_mine(turn), turn.pk, outcome, blocks=blocks, end_seq=end_seq)


def _fail_queued(turn_id: uuid.UUID) -> Turn | None:
    with transaction.atomic():
        queued = Turn.objects.filter(pk=turn_id, status=Turn.Status.QUEUED)
        outcome = Outcome(status=Turn.Status.FAILED, error_code="queue_timeout")
        return _ended_turn(turn_id) if _end(queued, turn_id, outcome, blocks=[], end_seq=0) else None


def _end(condition: Any, turn_id: uuid.UUID, outcome: Outcome, *, blocks: list[Block], end_seq: int) -> bool:
    """Make the turn terminal, with everything that goes with it; False if ``condition`` does not find it any more."""
    turn = Turn.objects.only("reply_id", "conversation_id").filter(pk=turn_id).first()
    if turn is None:
        return False
    _lock(turn.conversation_id)
    changed = condition.update(
        status=outcome.status,
        error_code=outcome.error_code,
        stop_reason=outcome.stop_reason[:50],
        stop_details=outcome.stop_details,
        end_seq=end_seq,
        lease_token=None,
        lease_expires_at=None,
        finished_at=Now(),
    )
    if changed:
        Message.objects.filter(pk=turn.reply_id).update(blocks=blocks, text=text_of(blocks))
        Conversation.objects.filter(pk=turn.conversation_id).touch()
    return bool(changed)


def _ended_turn(turn_id: uuid.UUID) -> Turn:
    return Turn.objects.timed().select_related("conversation").get(pk=turn_id)
