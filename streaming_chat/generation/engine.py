"""One turn, from claim to end."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
import uuid
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

import orjson
from django.db import DatabaseError, OperationalError
from uuid_utils.compat import uuid7

from .. import signals, snapshot
from ..blocks import BlockError, BlockFold, Op, storable
from ..conf import ChatSettings
from ..database import in_database
from ..exceptions import ProviderError
from ..journal import Journal, Lease, Writer, get_journal
from ..models import Turn
from ..providers.base import Alive, Began, Ended, Provider, ProviderRequest, UsageSeen
from . import context, lease
from .coalescer import Coalescer
from .lease import Claim, Outcome, Request

RETRY_SECONDS: Final = 0.5
"""First pause before asking a failed provider again; doubles. What the provider itself asks for goes first."""
MAX_RETRY_SECONDS: Final = 20.0
FINISH_SECONDS: Final = 120.0
"""How long the end of a turn is tried while the database is away; then it is left to recovery."""
FINISH_BACKOFF_SECONDS: Final = 1.0
MAX_PENDING_CHARS: Final = 1024 * 1024
"""Text of one turn that may wait for the database; a provider that sends faster is cut off."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Deadlines:
    """When a turn has taken too long, and why. Sans-I/O: times are seconds of one monotonic clock.

    ``began_at`` is None until the provider's first sign of life. ``streams`` is False for a provider that answers all
    at once, whose silence means nothing.
    """

    settings: ChatSettings
    turn_seconds: float
    started_at: float
    streams: bool = True
    requested_at: float | None = None
    began_at: float | None = None
    bytes_at: float = 0.0
    progress_at: float = 0.0

    def request(self, now: float) -> None:
        """The provider is asked."""
        self.requested_at, self.began_at = now, None

    def due(self) -> list[tuple[float, str]]:
        """Every deadline that applies now, with the error code of missing it."""
        times = [(self.started_at + self.turn_seconds, "turn_timeout")]
        if not self.streams or self.requested_at is None:
            return times
        if self.began_at is None:
            times.append((self.requested_at + self.settings.first_event_timeout_seconds, "first_event_timeout"))
            return times
        times.append((self.bytes_at + self.settings.no_bytes_timeout_seconds, "no_bytes_timeout"))
        times.append((self.progress_at + self.settings.no_progress_timeout_seconds, "no_progress_timeout"))
        return times

    def next(self) -> tuple[float, str]:
        """The deadline that comes first."""
        return min(self.due())


def prepare(lease_held: Lease, record_id: uuid.UUID, provider: str) -> ProviderRequest | None:
    """What to ask ``provider``, once it is recorded that it is asked; None if the lease is lost. Blocks."""
    request = context.build_request(lease_held.turn_id, provider)
    opened = lease.open_request(lease_held, record_id, provider=provider, model=request.model)
    return request if opened else None


async def announce_end(turn: Turn) -> None:
    """Tell viewers and the host that ``turn`` has just become terminal."""
    await get_journal().publish(turn.conversation_id, snapshot.finished_frame(turn))
    await signals.send(signals.turn_finished, turn_id=turn.pk, status=turn.status)


class Generation:
    """One turn that this process has claimed.

    ``run`` streams it; ``finish`` ends it and must be called exactly once, whatever ``run`` did. In between,
    ``interrupt`` ends the streaming from outside.
    """

    def __init__(self, claim: Claim, journal: Journal, provider: Provider, settings: ChatSettings) -> None:
        self.claim = claim
        self.lease = claim.lease
        self._journal = journal
        self._provider = provider
        self._settings = settings
        self._coalescer = Coalescer()
        self._fold = BlockFold()
        self._writer: Writer = journal.open(
            claim.lease,
            self._coalescer,
            on_stop=lambda: self.interrupt(Outcome(status=Turn.Status.STOPPED)),
            on_fenced=lambda: self.interrupt(Outcome(status=Turn.Status.INTERRUPTED, error_code="owner_lost")),
            on_stalled=lambda: self.interrupt(Outcome(status=Turn.Status.INTERRUPTED, error_code="storage_stalled")),
        )
        self._outcome: Outcome | None = None
        self._scope: asyncio.Timeout | None = None
        self._requests: list[Request] = []
        limit = settings.turn_timeout_seconds
        if claim.timeout_seconds is not None:
            limit = min(limit, claim.timeout_seconds)
        self._deadlines = Deadlines(settings, limit, started_at=time.monotonic())
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def turn_id(self) -> uuid.UUID:
        """The turn."""
        return self.lease.turn_id

    def interrupt(self, outcome: Outcome) -> None:
        """End the streaming with ``outcome``, unless it has already ended otherwise. Returns at once."""
        if self._outcome is None:
            self._outcome = outcome
            if self._scope is not None:
                self._scope.reschedule(asyncio.get_running_loop().time())

    async def run(self) -> None:
        """Ask the provider and stream its answer into the journal.

        Every fault becomes the outcome that :meth:`finish` stores; none is raised. Cancelling closes the provider's
        connection; what came before is kept and becomes ``interrupted``.
        """
        try:
            async with asyncio.timeout(None) as scope:
                self._scope = scope
                if self._outcome is None:
                    self._watch()
                    await self._stream()
        except asyncio.CancelledError:
            self._decide(Outcome(status=Turn.Status.INTERRUPTED, error_code="shutdown"))
            raise
        except ProviderError as error:
            self._decide(Outcome(status=Turn.Status.FAILED, error_code=error.code))
        except Exception as error:  # noqa: BLE001 - whatever it is, the turn must end
            if self._outcome is None:  # else it is the scope that `interrupt` has closed
                # Its kind and place, but not its text, which may hold the prompt.
                logger.error("turn %s: %s at %s", self.turn_id, type(error).__name__, _place(error))
                self._decide(Outcome(status=Turn.Status.FAILED, error_code="internal_error"))
        finally:
            self._scope = None
            if self._alarm is not None:
                self._alarm.cancel()

    async def finish(self) -> None:
        """Commit what is left, end the turn, and publish the end.

        Run it as a task of its own, so that it outlives any number of cancels. If the database stays away, recovery
        ends the turn later; viewers lose nothing, because nothing unsaved was shown.
        """
        try:
            async with asyncio.timeout(FINISH_SECONDS):
                owned = await self._writer.flush()
                self._writer.end()
                turn = await self._store_end()
        except (DatabaseError, TimeoutError) as error:
            logger.error("turn %s: could not be ended (%s); recovery will", self.turn_id, type(error).__name__)
            return
        finally:
            self._writer.close()
        if turn is not None and owned:
            await announce_end(turn)

    # ---------------------------------------------------------------- inside

    async def _store_end(self) -> Turn | None:
        outcome = self._outcome or Outcome(status=Turn.Status.INTERRUPTED, error_code="stream_cut")
        blocks, end_seq = self._fold.blocks(), self._writer.seq
        while True:
            try:
                return await in_database(
                    lease.finish, self.lease, outcome, blocks=blocks, end_seq=end_seq, requests=self._requests
                )
            except OperationalError as error:
                logger.warning("turn %s: its end can't be stored yet (%s)", self.turn_id, type(error).__name__)
                await asyncio.sleep(FINISH_BACKOFF_SECONDS)

    async def _stream(self) -> None:
        record_id = uuid7()
        request = await in_database(prepare, self.lease, record_id, self._provider.name)
        pause_seconds = RETRY_SECONDS
        for retries_left in range(self._settings.provider_retries, -1, -1):
            if request is None:
                self._decide(Outcome(status=Turn.Status.INTERRUPTED, error_code="owner_lost"))
                return
            try:
                await self._ask(request, record_id)
                return
            except ProviderError as error:
                if not (error.retryable and retries_left) or len(self._fold):
                    raise
                pause = pause_seconds if error.retry_after_seconds is None else error.retry_after_seconds
                if pause > MAX_RETRY_SECONDS:
                    raise
                logger.info("turn %s: %s, asking again in %.1f s", self.turn_id, error.code, pause)
            await asyncio.sleep(pause)
            pause_seconds *= 2
            record_id = uuid7()
            request = await in_database(prepare, self.lease, record_id, self._provider.name)

    async def _ask(self, request: ProviderRequest, record_id: uuid.UUID) -> None:
        self._deadlines.streams = request.stream
        asked = Request(record_id=record_id, sent_chars=_size(request))
        self._requests.append(asked)
        started = time.monotonic()
        self._deadlines.request(started)
        self._watch()
        try:
            async with aclosing(self._provider.stream(request)) as events:
                async for event in events:
                    self._accept(event, asked, started)
                    if self._outcome is not None:
                        return
        except ProviderError as error:
            asked.error_code = error.code
            asked.request_id = asked.request_id or error.request_id or ""
            asked.final = asked.final or not (asked.began or error.may_be_billed)
            raise
        finally:
            asked.duration_ms = int((time.monotonic() - started) * 1000)
            self._deadlines.requested_at = None
        self._decide(Outcome(status=Turn.Status.INTERRUPTED, error_code="stream_cut"))

    def _accept(self, event: object, asked: Request, started: float) -> None:
        now = time.monotonic()
        deadlines = self._deadlines
        deadlines.bytes_at = now
        if deadlines.began_at is None:
            deadlines.began_at = deadlines.progress_at = now
            self._watch()
        if isinstance(event, dict):
            deadlines.progress_at = now
            self._write(event, asked, now - started)  # type: ignore[arg-type]
        elif isinstance(event, Alive):
            return
        elif isinstance(event, Began):
            asked.began, asked.request_id, asked.model = True, event.request_id, event.model
        elif isinstance(event, UsageSeen):
            asked.usage, asked.final = event.usage, event.final
        elif isinstance(event, Ended):
            asked.model = str(event.details.get("model") or asked.model)
            self._decide(_outcome_of(event))

    def _write(self, op: Op, asked: Request, seconds: float) -> None:
        try:
            op = storable(op)
            orjson.dumps(op)  # what can't be written must not get as far as the journal
            self._fold.apply(op)
        except (BlockError, TypeError, RecursionError):
            raise ProviderError("provider_error") from None
        self._coalescer.push(op)
        shows_text = False
        if op["op"] == "append":
            asked.received_chars += len(op["text"])
            shows_text = op["field"] in ("text", "thinking")
        elif op["op"] == "start":
            self._writer.activity = _activity(str(op["block"].get("type")))
            shows_text = bool(op["block"].get("text"))
            asked.received_chars += len(str(op["block"])) if shows_text else 0
        if shows_text and asked.first_text_ms is None:
            asked.first_text_ms = int(seconds * 1000)
        self._writer.notify(text=shows_text)
        if self._coalescer.size_chars > MAX_PENDING_CHARS:
            self._decide(Outcome(status=Turn.Status.INTERRUPTED, error_code="storage_stalled"))

    def _decide(self, outcome: Outcome) -> None:
        if self._outcome is None:
            self._outcome = outcome

    def _watch(self) -> None:
        """Arm one timer for the next deadline. It re-arms itself, so an event only has to note its time."""
        if self._alarm is not None:
            self._alarm.cancel()
        at, code = self._deadlines.next()
        now = time.monotonic()
        if at <= now:
            self.interrupt(Outcome(status=Turn.Status.TIMED_OUT, error_code=code))
            return
        self._alarm = asyncio.get_running_loop().call_later(at - now, self._watch)


def _outcome_of(ended: Ended) -> Outcome:
    if ended.stop_reason == "tool_use":
        return Outcome(
            status=Turn.Status.FAILED,
            error_code="unknown_tool",
            stop_reason=ended.stop_reason,
            stop_details=ended.details,
        )
    return Outcome(status=Turn.Status.COMPLETED, stop_reason=ended.stop_reason, stop_details=ended.details)


def _activity(block_type: str) -> str:
    if "thinking" in block_type:
        return "thinking"
    return "writing" if block_type == "text" else "tool"


def _size(request: ProviderRequest) -> int:
    words = sum(len(str(block.get("text", block))) for message in request.messages for block in message.blocks)
    return len(request.system) + words


def _place(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown"
