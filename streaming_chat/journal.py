"""The journal: what viewers may be shown, because it is stored.

Per tick and process, one transaction writes the new entries of all running turns, renews their leases and reads their
stop flags; only then are the same entries published to the conversations' groups. So whatever a viewer was shown
survives the process, and a message that the channel layer loses, doubles or delays changes nothing: viewers number
what they get, and re-read here what they lack.

Nobody else calls ``group_send`` with text.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Protocol

import orjson
from channels.layers import get_channel_layer
from django.db import transaction
from django.db.models import Max
from django.db.models.functions import Now

from . import protocol
from .blocks import Op
from .conf import get_settings
from .database import in_journal_thread
from .loops import PerLoop
from .models import JournalEntry, Turn
from .protocol import Frame

RENEW_SECONDS: Final = 0.5
"""How often a silent turn's lease is renewed and its stop flag read; a stop takes effect at least this fast."""
PUBLISH_TIMEOUT_SECONDS: Final = 1.0
PUBLISH_FAILURES: Final = 3
PUBLISH_PAUSE_SECONDS: Final = 5.0
"""After so many failures in a row the layer is left alone this long; viewers are positioned from the database."""
BACKOFF_SECONDS: Final = 0.5
ROUND_SECONDS: Final = 5.0
MESSAGE_TYPE: Final = "streaming_chat.frame"

logger = logging.getLogger(__name__)


class Source(Protocol):
    """Where a writer gets a turn's new operations from."""

    def __bool__(self) -> bool:
        """Whether there is anything to take."""

    def take(self) -> list[Op]:
        """The operations since the last call."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write one turn, as long as ``token`` is the one in its row."""

    turn_id: uuid.UUID
    conversation_id: uuid.UUID
    token: uuid.UUID


class Writer:
    """One running turn's way into the journal. Made by :meth:`Journal.open`, by the turn's owner only.

    Args:
        source: What is written at each tick.
        on_stop: Called once when the turn's stop flag is seen.
        on_fenced: Called once when the lease turns out to be lost; nothing more is written or published.
        on_stalled: Called once when the database has not taken the text for ``STORAGE_STALL_SECONDS``.
    """

    def __init__(
        self,
        journal: Journal,
        lease: Lease,
        source: Source,
        *,
        on_stop: Callable[[], None],
        on_fenced: Callable[[], None],
        on_stalled: Callable[[], None],
    ) -> None:
        self.lease = lease
        self.source = source
        self.seq = 0
        """The last entry handed to the database; all of them are committed after :meth:`flush`."""
        self.activity = "waiting"
        """What a viewer of a silent turn is told it is doing."""
        self.fenced = False
        self._journal = journal
        self._on_stop: Callable[[], None] | None = on_stop
        self._on_fenced = on_fenced
        self._on_stalled: Callable[[], None] | None = on_stalled
        self._has_text = False
        self._waiting_since: float | None = None
        self._entry: JournalEntry | None = None
        self._first_text = False
        self._entry_has_first_text = False
        self._ending = False
        self._renewed_at = 0.0
        self._apart_until: float | None = None

    def notify(self, *, text: bool) -> None:
        """Say that the source has something. The turn's first ``text`` is committed at once, the rest at the tick."""
        if self._waiting_since is None:
            self._waiting_since = time.monotonic()
        self._journal._mark_dirty(self, urgent=text and not self._has_text)
        if text and not self._has_text:
            self._has_text = self._first_text = True

    async def flush(self) -> bool:
        """Wait until everything so far is committed and published; False if the lease is lost.

        Waits as long as the database is away. Cancelling is safe: the journal goes on by itself.
        """
        if self._waiting_since is None and self._entry is None:
            return not self.fenced
        while (self._waiting_since is not None or self._entry is not None) and not self.fenced:
            await self._journal._flush_soon(self)
        return not self.fenced

    def end(self) -> None:
        """Say that the owner is about to end the turn: finding the lease gone is then no surprise."""
        self._ending = True

    def close(self) -> None:
        """Stop renewing the lease. Nothing may be written afterwards."""
        self._journal._close(self)

    # ---------------------------------------------------------------- called by the journal

    def _stage(self) -> JournalEntry | None:
        """The entry to commit: the one that failed before, or a new one from the source."""
        if self._entry is None:
            ops = self.source.take()
            if ops:
                self.seq += 1
                self._entry_has_first_text, self._first_text = self._first_text, False
                self._entry = JournalEntry(turn_id=self.lease.turn_id, seq=self.seq, ops=orjson.dumps(ops).decode())
            else:
                self._waiting_since = None
        return self._entry

    def _committed(self, *, stop: bool, now: float) -> Frame | None:
        """Note the commit; the frame to publish, if an entry was written."""
        self._renewed_at = now
        entry, self._entry = self._entry, None
        frame = None
        if entry is not None:
            turn = str(self.lease.turn_id)
            frame = Frame(
                kind="delta",
                json=protocol.encode_delta(turn, entry.seq, entry.seq, entry.ops),
                turn=turn,
                first=entry.seq,
                seq=entry.seq,
                activity=self.activity,
            )
            self._waiting_since = now if self.source else None
        if stop and self._on_stop is not None:
            on_stop, self._on_stop = self._on_stop, None
            on_stop()
        return frame

    def _lost(self) -> None:
        if not self.fenced:
            self.fenced = True
            self._entry = None
            if self._ending:
                return
            logger.warning("turn %s: fenced, another process has settled or taken it", self.lease.turn_id)
            self._on_fenced()

    def _check_stall(self, now: float) -> None:
        waited = 0.0 if self._waiting_since is None else now - self._waiting_since
        if waited > get_settings().storage_stall_seconds and self._on_stalled is not None:
            on_stalled, self._on_stalled = self._on_stalled, None
            on_stalled()


class Journal:
    """One per event loop. The runner owns the task that runs it."""

    def __init__(self) -> None:
        self._writers: dict[uuid.UUID, Writer] = {}
        self._dirty: dict[uuid.UUID, Writer] = {}
        self._work = asyncio.Event()
        self._urgent = asyncio.Event()
        self._round: asyncio.Future[None] | None = None
        self._stopped = False
        self._listeners: list[Callable[[str, Frame], None]] = []
        self._publish_failures = 0
        self._publish_after = 0.0

    def open(
        self,
        lease: Lease,
        source: Source,
        *,
        on_stop: Callable[[], None],
        on_fenced: Callable[[], None],
        on_stalled: Callable[[], None],
    ) -> Writer:
        """A writer for a turn that this process has just claimed."""
        writer = Writer(self, lease, source, on_stop=on_stop, on_fenced=on_fenced, on_stalled=on_stalled)
        writer._renewed_at = time.monotonic()
        self._writers[lease.token] = writer
        self._work.set()
        return writer

    def subscribe(self, listener: Callable[[str, Frame], None]) -> None:
        """Call ``listener(conversation_id, frame)`` with everything published here, before the layer gets it."""
        self._listeners.append(listener)

    def wake(self) -> None:
        """Read the stop flags now instead of within :data:`RENEW_SECONDS`."""
        for writer in self._writers.values():
            writer._renewed_at = 0.0
        self._urgent.set()
        self._work.set()

    async def _flush_soon(self, writer: Writer) -> None:
        """Commit what ``writer`` has in the next round, or here if no more rounds will come."""
        if self._stopped:
            await self._commit([writer])
            return
        self._mark_dirty(writer, urgent=True)
        if self._round is None:
            self._round = asyncio.get_running_loop().create_future()
        await asyncio.wait([self._round], timeout=ROUND_SECONDS)

    async def publish(self, conversation_id: uuid.UUID, frame: Frame) -> None:
        """Show a committed change to everybody who watches the conversation. A failure is only logged."""
        key = str(conversation_id)
        for listener in self._listeners:
            listener(key, frame)
        layer = get_channel_layer(get_settings().channel_layer)
        now = time.monotonic()
        if layer is None or now < self._publish_after:
            return
        try:
            async with asyncio.timeout(PUBLISH_TIMEOUT_SECONDS):
                await layer.group_send(group_name(key), layer_message(key, frame))
            self._publish_failures = 0
        except Exception as error:  # noqa: BLE001 - the layer's client can raise anything, and nothing depends on it
            self._publish_failures += 1
            if self._publish_failures >= PUBLISH_FAILURES:
                self._publish_after = now + PUBLISH_PAUSE_SECONDS
            logger.warning("publishing to the channel layer failed: %s", type(error).__name__)

    async def run(self) -> None:
        """Commit and publish until cancelled. Nothing that was shown is lost, and who flushes later commits alone."""
        try:
            await self._run()
        finally:
            self._stopped = True

    async def _run(self) -> None:
        tick_at = 0.0
        while True:
            if not self._writers:
                await self._work.wait()
            await _wait(self._work, RENEW_SECONDS)
            await _wait(self._urgent, tick_at - time.monotonic())
            self._work.clear()
            self._urgent.clear()
            tick_at = time.monotonic() + get_settings().tick_seconds
            try:
                await self._flush()
            finally:
                if self._round is not None:
                    self._round.set_result(None)
                    self._round = None

    async def _flush(self) -> None:
        now = time.monotonic()
        dirty, self._dirty = self._dirty, {}
        due = [w for w in self._writers.values() if w.lease.token not in dirty and now - w._renewed_at >= RENEW_SECONDS]
        writers = [writer for writer in dirty.values() if not writer.fenced] + due
        batch = [writer for writer in writers if writer._apart_until is None]
        apart = [writer for writer in writers if writer._apart_until is not None]
        try:
            await self._commit(batch)
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing may be lost of it
            logger.warning("journal commit failed: %s", type(error).__name__)
            apart = writers
        # One locked row or one bad entry must not hold up everybody else's text: who failed is tried alone, and last.
        for writer in apart:
            await self._commit_apart(writer)

    async def _commit_apart(self, writer: Writer) -> None:
        if writer._apart_until is None or time.monotonic() >= writer._apart_until:
            try:
                await self._commit([writer])
                writer._apart_until = None
                return
            except Exception as error:  # noqa: BLE001 - as above
                logger.warning("turn %s: journal commit failed: %s", writer.lease.turn_id, type(error).__name__)
                writer._apart_until = time.monotonic() + BACKOFF_SECONDS
                writer._check_stall(time.monotonic())
        if writer._waiting_since is not None:
            self._dirty[writer.lease.token] = writer
            self._work.set()

    async def _commit(self, writers: list[Writer]) -> None:
        entries = [entry for writer in writers if (entry := writer._stage()) is not None]
        if not writers:
            return
        first_texts = [w.lease.turn_id for w in writers if w._entry is not None and w._entry_has_first_text]
        tokens = [writer.lease.token for writer in writers]
        alive = await in_journal_thread(commit, tokens, entries, first_texts, get_settings().lease_seconds)
        now = time.monotonic()
        frames: list[tuple[uuid.UUID, Frame]] = []
        for writer in writers:
            if writer.lease.token not in alive:
                writer._lost()
                continue
            frame = writer._committed(stop=alive[writer.lease.token], now=now)
            if frame is not None:
                frames.append((writer.lease.conversation_id, frame))
        for conversation_id, frame in frames:
            await self.publish(conversation_id, frame)

    def _mark_dirty(self, writer: Writer, *, urgent: bool) -> None:
        if not writer.fenced:
            self._dirty[writer.lease.token] = writer
            self._work.set()
            if urgent and writer._apart_until is None:  # else whoever flushes would spin until it is tried again
                self._urgent.set()

    def _close(self, writer: Writer) -> None:
        self._writers.pop(writer.lease.token, None)
        self._dirty.pop(writer.lease.token, None)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    if seconds <= 0 or event.is_set():
        return
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass


get_journal: Final = PerLoop(Journal)
"""The running event loop's journal."""


# ------------------------------------------------------------------------------------------------ the database


def commit(
    tokens: list[uuid.UUID],
    entries: list[JournalEntry],
    first_texts: list[uuid.UUID],
    lease_seconds: float,
) -> dict[uuid.UUID, bool]:
    """Write ``entries``, renew the leases ``tokens``; the ones still held, each with whether a stop was asked for.

    The UPDATE's row locks are the fence: whoever settles one of these turns waits for this transaction, or this one
    finds the token gone and leaves the turn's entry out. Repeating the call is safe, also after a commit whose outcome
    is unknown.
    """
    with transaction.atomic():
        held = Turn.objects.filter(lease_token__in=tokens, status=Turn.Status.RUNNING)
        held.update(lease_expires_at=Now() + timedelta(seconds=lease_seconds))
        rows = list(held.values_list("id", "lease_token", "stop_requested_at"))
        alive = {turn_id for turn_id, _, _ in rows}
        JournalEntry.objects.bulk_create([entry for entry in entries if entry.turn_id in alive], ignore_conflicts=True)
        if first_texts:
            Turn.objects.filter(id__in=first_texts, first_text_at=None, status=Turn.Status.RUNNING).update(
                first_text_at=Now()
            )
    return {token: stop is not None for _, token, stop in rows if token is not None}


def read_ops(turn_id: uuid.UUID | str, *, after: int = 0) -> tuple[int, str]:
    """The last committed ``seq`` and, as a JSON list, the operations of all entries beyond ``after``.

    ``seq`` is ``after`` if there are none.
    """
    rows = list(JournalEntry.objects.filter(turn_id=turn_id, seq__gt=after).order_by("seq").values_list("seq", "ops"))
    inner = ",".join(ops[1:-1] for _, ops in rows)
    return (rows[-1][0] if rows else after), f"[{inner}]"


def last_seqs(turn_ids: Iterable[uuid.UUID | str]) -> dict[uuid.UUID, int]:
    """The last committed ``seq`` of each turn that has entries."""
    rows = JournalEntry.objects.filter(turn_id__in=list(turn_ids)).values("turn_id").annotate(last=Max("seq"))
    return dict(rows.values_list("turn_id", "last"))


# ------------------------------------------------------------------------------------------------ the channel layer


def group_name(conversation_id: str) -> str:
    """The group of everybody who watches a conversation. Its name gives no rights."""
    return f"streaming_chat.{conversation_id}"


def layer_message(conversation_id: str, frame: Frame) -> dict[str, Any]:
    """A frame as the channel layer carries it."""
    return {
        "type": MESSAGE_TYPE,
        "conversation": conversation_id,
        "frame": [frame.kind, frame.json, frame.turn, frame.first, frame.seq, frame.revision, frame.activity],
    }


def frame_of(message: dict[str, Any]) -> tuple[str, Frame]:
    """The conversation and frame that :func:`layer_message` packed."""
    kind, json, turn, first, seq, revision, activity = message["frame"]
    return message["conversation"], Frame(kind, json, turn, first, seq, revision, activity)
