"""Viewers: who watches what in this process, and how each of them gets every frame once and in order.

One hub per event loop, one layer channel per hub, one group per watched conversation. A viewer joins the group first,
reads the database second, and then follows the numbers; whatever the layer loses or a slow viewer has no room for is
read again from the database.
"""

from __future__ import annotations

import abc
import asyncio
import contextvars
import logging
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from channels.layers import get_channel_layer
from django.db import DatabaseError

from . import journal, protocol, snapshot
from .conf import get_settings
from .database import in_database
from .exceptions import NotFoundError, SignedOutError
from .journal import get_journal, group_name
from .loops import PerLoop, end_tasks
from .models import Conversation, Turn
from .protocol import Cursor, Frame, Verdict

if TYPE_CHECKING:
    from .snapshot import AnyUser

LAYER_TIMEOUT_SECONDS: Final = 2.0
LAYER_PAUSE_SECONDS: Final = 1.0
REJOIN_SECONDS: Final = 30.0
"""How often groups are joined again: a restarted Redis has forgotten them, and a layer may let them expire."""
ABANDONED_SECONDS: Final = 120.0
"""A viewer that takes nothing for this long although there is something is dropped."""
READ_RETRY_SECONDS: Final = 0.5
ACCESS_SECONDS: Final = 60.0
"""How often a viewer's rights are looked at if nothing else makes it read."""
QUIET_SECONDS: Final = 1.0
"""Silence after which a viewer's position is compared with the database."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sent:
    """One event for the viewer's transport. ``token`` is the cursor after it, where it moves the cursor."""

    kind: str
    json: str
    token: str | None = None


HEARTBEAT: Final = Sent("heartbeat", "")
CLOSED: Final = Sent("closed", "")


@dataclass(frozen=True, slots=True)
class Position:
    """Where the database stands: revisions of conversations, last entries and ends of turns."""

    revisions: dict[uuid.UUID, int]
    seqs: dict[uuid.UUID, int]
    over: set[uuid.UUID]


class Viewer(abc.ABC):
    """One place that shows a conversation, or one turn of it. Bounded: what does not fit is read again later.

    Iterate :meth:`events` in one task; call the other methods from the event loop.
    """

    def __init__(self, hub: Hub, conversation_id: uuid.UUID) -> None:
        self.conversation_id = conversation_id
        self.cursor = Cursor()
        self._hub = hub
        self._frames: deque[Frame] = deque()
        self._frames_bytes = 0
        self._arrived = asyncio.Event()
        self._stale = True
        self._closed = False
        self._active = False
        self._activity = "waiting"
        self._turn_began_at = 0.0
        self._quiet_since = self._fed_at = self._checked_at = time.monotonic()
        self._waiting = False
        self._progress_due = False
        self._heartbeat_due = False
        self._unacked: deque[tuple[str, int, int]] = deque()
        self._unacked_bytes = 0
        self.needs_acks = False

    async def events(self) -> AsyncGenerator[Sent, None]:
        """Everything the viewer has to show, from now until it is closed or the conversation is gone.

        Cancelling or closing the generator detaches the viewer.
        """
        self._hub._attach(self)
        try:
            await self._hub._joined(self.conversation_id)
            while not self._closed:
                for sent in await self._next():
                    yield self._note(sent)
        finally:
            self.close()

    def close(self) -> None:
        """Detach. The generator ends as soon as it is asked for more."""
        self._closed = True
        self._arrived.set()
        self._hub._detach(self)

    def reread(self) -> None:
        """Read from the database what is missing."""
        self._mark_stale()

    def acknowledge(self, turn: str, seq: int) -> None:
        """Note that the viewer has shown everything up to entry ``seq`` of ``turn``."""
        shown = [place for place, sent in enumerate(self._unacked) if sent[0] == turn and sent[1] <= seq]
        for _ in range(shown[-1] + 1 if shown else 0):  # and whatever was sent before it
            self._unacked_bytes -= self._unacked.popleft()[2]
        if self._has_credit():
            self._arrived.set()

    # ---------------------------------------------------------------- for the hub

    def deliver(self, frame: Frame) -> None:
        """Take a frame, or note that it must be read again if there is no room."""
        if self._stale:
            return
        self._frames.append(frame)
        self._frames_bytes += len(frame.json)
        if self._frames_bytes > get_settings().viewer_buffer_bytes:
            self._mark_stale()
        self._arrived.set()

    def beat(self, now: float) -> None:
        """Note once a second that a silent turn or connection is alive, or that nobody takes anything any more."""
        if now - self._checked_at >= ACCESS_SECONDS:
            self._checked_at = now
            self.reread()
        stuck = not self._waiting and (self._frames or self._stale) and self._has_credit()
        if stuck and now - self._quiet_since > ABANDONED_SECONDS:
            logger.warning("viewer of conversation %s takes nothing, dropped", self.conversation_id)
            self.close()
        elif self._active and now - self._quiet_since >= get_settings().progress_seconds * 0.9:
            self._progress_due = True
            self._arrived.set()
        elif now - self._quiet_since >= get_settings().heartbeat_seconds:
            self._heartbeat_due = True
            self._arrived.set()

    def behind(self, position: Position) -> bool:
        """Whether the database is ahead of a viewer that has had nothing to take for a while."""
        if self._frames or self._stale or time.monotonic() - self._fed_at < QUIET_SECONDS:
            return False
        return self._is_behind(position)

    # ---------------------------------------------------------------- inside

    async def _next(self) -> list[Sent]:
        """What to show next; empty after a wait, to be asked again."""
        if self._stale and self._has_credit():
            self._stale = False
            try:
                return await self._reread()
            except DatabaseError as error:
                logger.warning("viewer can't be brought up to date: %s", type(error).__name__)
                self._mark_stale()
                await asyncio.sleep(READ_RETRY_SECONDS)
        elif (frame := self._next_frame()) is not None:
            verdict = self._verdict(frame)
            self._stale = verdict is Verdict.GAP
            return [self._shown(frame)] if verdict is Verdict.APPLY else []
        elif not (self._progress_due or self._heartbeat_due):
            await self._wait()
        if self._progress_due:
            self._progress_due = False
            return [self._progress()]
        if self._heartbeat_due:
            self._heartbeat_due = False
            return [HEARTBEAT]
        return []

    def _mark_stale(self) -> None:
        self._stale = True
        self._frames.clear()
        self._frames_bytes = 0
        self._arrived.set()

    def _next_frame(self) -> Frame | None:
        if not self._frames or not self._has_credit():
            return None
        frame = self._frames.popleft()
        self._frames_bytes -= len(frame.json)
        return frame

    def _has_credit(self) -> bool:
        return not self.needs_acks or self._unacked_bytes <= get_settings().viewer_buffer_bytes

    async def _wait(self) -> None:
        self._arrived.clear()
        self._waiting = True
        await self._arrived.wait()
        self._waiting = False

    @abc.abstractmethod
    def _verdict(self, frame: Frame) -> Verdict:
        """What to do with a frame of the conversation; moves the cursor if it applies."""

    @abc.abstractmethod
    def _is_behind(self, position: Position) -> bool:
        """Whether ``position`` is ahead of the cursor."""

    @abc.abstractmethod
    async def _reread(self) -> list[Sent]:
        """Read what the viewer lacks, and move the cursor there."""

    def _shown(self, frame: Frame) -> Sent:
        if frame.kind == "turn":
            self._began(0.0)
        elif frame.kind == "finished":
            self._active = False
        elif frame.activity:
            self._activity = frame.activity
        return Sent(frame.kind, frame.json, self.cursor.token())

    def _began(self, elapsed_seconds: float) -> None:
        self._active = True
        self._activity = "waiting"
        self._turn_began_at = time.monotonic() - elapsed_seconds
        self._progress_due = True

    def _note(self, sent: Sent) -> Sent:
        self._quiet_since = time.monotonic()
        if sent.kind not in ("progress", "heartbeat"):
            self._fed_at = self._quiet_since
        if sent.kind == "delta":
            self._progress_due = False
        if self.needs_acks and sent.kind == "delta":
            self._unacked.append((self.cursor.turn, self.cursor.seq, len(sent.json)))
            self._unacked_bytes += len(sent.json)
        return sent

    def _progress(self) -> Sent:
        event: protocol.Progress = {
            "type": "progress",
            "turn": self.cursor.turn,
            "elapsed_seconds": round(time.monotonic() - self._turn_began_at, 1),
            "activity": self._activity,  # type: ignore[typeddict-item]
        }
        return Sent("progress", protocol.encode(event))


class ConversationViewer(Viewer):
    """Follows a conversation: its messages, its turns, its name.

    Args:
        hub: The running loop's.
        conversation_id: May be one that does not exist; that is then the first event.
        identity: Says whose rights count now; asked at every read, in a database thread.
        cursor: Where an earlier viewer stood; None for a snapshot.
    """

    def __init__(
        self, hub: Hub, conversation_id: uuid.UUID, identity: Callable[[], AnyUser], cursor: Cursor | None = None
    ) -> None:
        super().__init__(hub, conversation_id)
        self._identity = identity
        self._fresh = cursor is None
        self.cursor = cursor or Cursor()

    def resume(self, cursor: Cursor | None) -> None:
        """Go back to ``cursor``; None for a snapshot. What was sent and not acknowledged no longer counts."""
        self._fresh = cursor is None
        self.cursor = cursor or Cursor()
        self._unacked.clear()
        self._unacked_bytes = 0
        self.reread()

    def _is_behind(self, position: Position) -> bool:
        revision = position.revisions.get(self.conversation_id)
        if revision is None or revision > self.cursor.revision:
            return True
        return bool(self.cursor.turn) and position.seqs.get(uuid.UUID(self.cursor.turn), 0) > self.cursor.seq

    def _verdict(self, frame: Frame) -> Verdict:
        if frame.kind == "deleted":
            return Verdict.GAP
        return self.cursor.accept(frame)

    async def _reread(self) -> list[Sent]:
        before = self.cursor
        try:
            found = await in_database(self._catch_up, None if self._fresh else before)
        except NotFoundError:
            self._closed = True
            return [Sent("deleted", protocol.encode({"type": "deleted"}))]
        except SignedOutError as error:
            self._closed = True
            return [Sent("error", protocol.encode(protocol.problem(error)))]
        if self.cursor is not before:  # `resume` came in between, and is read next
            return []
        self._fresh = False
        here = found.cursor
        self.cursor.jump(revision=here.revision, turn=here.turn, seq=here.seq)
        self._active = False
        if found.active:
            activity = self._activity if here.seq else "waiting"
            self._began(found.elapsed_seconds)
            self._activity = activity
        return [] if found.frame is None else [Sent(found.frame.kind, found.frame.json, self.cursor.token())]

    def _catch_up(self, cursor: Cursor | None) -> snapshot.CatchUp:
        user = self._identity()
        if not user.is_authenticated:
            raise SignedOutError
        return snapshot.catch_up(self.conversation_id, user, cursor)


class TurnViewer(Viewer):
    """Follows one turn from its first entry to its end, which is the last event."""

    def __init__(self, hub: Hub, conversation_id: uuid.UUID, turn_id: uuid.UUID) -> None:
        super().__init__(hub, conversation_id)
        self._turn_id = turn_id
        self.cursor.turn = str(turn_id)

    def _is_behind(self, position: Position) -> bool:
        gone = self.conversation_id not in position.revisions
        return gone or self._turn_id in position.over or position.seqs.get(self._turn_id, 0) > self.cursor.seq

    def _verdict(self, frame: Frame) -> Verdict:
        if frame.kind == "deleted":
            return Verdict.GAP
        if frame.turn != self.cursor.turn or frame.kind not in ("delta", "finished"):
            return Verdict.DROP
        if frame.kind == "delta":
            return self.cursor.accept(frame)
        return Verdict.APPLY if frame.seq == self.cursor.seq else Verdict.GAP

    def _shown(self, frame: Frame) -> Sent:
        if frame.kind == "finished":
            self._closed = True
        return super()._shown(frame)

    async def _reread(self) -> list[Sent]:
        try:
            frames, active, elapsed = await in_database(snapshot.catch_up_turn, self._turn_id, self.cursor.seq)
        except NotFoundError:
            self._closed = True
            return [Sent("deleted", protocol.encode({"type": "deleted"}))]
        if active:
            self._began(elapsed)
        sent = []
        for frame in frames:
            if frame.kind == "delta":
                self.cursor.seq = frame.seq
            sent.append(self._shown(frame))
        return sent


class Hub:
    """One per event loop; starts with its first viewer."""

    def __init__(self) -> None:
        self._viewers: dict[uuid.UUID, set[Viewer]] = {}
        self._joining: dict[uuid.UUID, asyncio.Task[None]] = {}
        self._channel: str | None = None
        self._naming = asyncio.Lock()
        self._unjoined: dict[uuid.UUID, None] = {}
        self._layer_failed = False
        self._positioned_at = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._started = False

    @property
    def viewers(self) -> int:
        """How many viewers this process has."""
        return sum(len(viewers) for viewers in self._viewers.values())

    def watch(
        self, conversation_id: uuid.UUID, identity: Callable[[], AnyUser], cursor: Cursor | None = None
    ) -> ConversationViewer:
        """A viewer of a conversation; it attaches when its events are first asked for."""
        return ConversationViewer(self, conversation_id, identity, cursor)

    def follow(self, conversation_id: uuid.UUID, turn_id: uuid.UUID) -> TurnViewer:
        """A viewer of one turn, from its beginning. The caller has checked the rights."""
        return TurnViewer(self, conversation_id, turn_id)

    def pump(self, viewer: Viewer, send: Callable[[Sent], Awaitable[None]]) -> asyncio.Task[None]:
        """Send all the viewer's events in a task of the hub's, and :data:`CLOSED` when there will be no more."""

        async def run() -> None:
            try:
                async for sent in viewer.events():
                    await send(sent)
                await send(CLOSED)
            except Exception as error:  # noqa: BLE001 - servers raise their own kinds when a socket is gone
                logger.info("a viewer's connection failed: %s", type(error).__name__)
            finally:
                viewer.close()

        return self._own(run(), name=f"viewer of {viewer.conversation_id}")

    def dismiss(self) -> None:
        """Send everybody who follows a conversation elsewhere. Who waits for the end of one turn stays."""
        for viewer in [viewer for viewers in self._viewers.values() for viewer in viewers]:
            if isinstance(viewer, ConversationViewer):
                viewer.close()

    async def close(self) -> None:
        """Detach everybody and end the tasks."""
        for viewer in [viewer for viewers in self._viewers.values() for viewer in viewers]:
            viewer.close()
        await end_tasks(self._tasks)

    # ---------------------------------------------------------------- inside

    def _own(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _attach(self, viewer: Viewer) -> None:
        if not self._started:
            self._started = True
            get_journal().subscribe(self._deliver)
            self._own(self._receive(), name="hub: receive")
            self._own(self._beat(), name="hub: beat")
        self._viewers.setdefault(viewer.conversation_id, set()).add(viewer)

    def _detach(self, viewer: Viewer) -> None:
        viewers = self._viewers.get(viewer.conversation_id)
        if viewers is None or viewer not in viewers:
            return
        viewers.discard(viewer)
        if not viewers:
            del self._viewers[viewer.conversation_id]
            if self._joining.pop(viewer.conversation_id, None) is not None:
                self._own(self._leave(viewer.conversation_id), name="hub: leave")

    def _deliver(self, conversation_id: str, frame: Frame) -> None:
        for viewer in self._viewers.get(uuid.UUID(conversation_id), ()):
            viewer.deliver(frame)

    async def _joined(self, conversation_id: uuid.UUID) -> None:
        """Wait until this process is in the conversation's group, or it is clear that the layer is away."""
        if conversation_id not in self._joining:
            self._joining[conversation_id] = self._own(self._join(conversation_id), name="hub: join")
        await asyncio.wait([self._joining[conversation_id]])

    async def _join(self, conversation_id: uuid.UUID) -> None:
        layer = get_channel_layer(get_settings().channel_layer)
        if layer is None:
            return
        try:
            async with asyncio.timeout(LAYER_TIMEOUT_SECONDS):
                await layer.group_add(group_name(str(conversation_id)), await self._own_channel(layer))
        except Exception as error:  # noqa: BLE001 - the layer's client can raise anything; polling replaces it
            self._unjoined[conversation_id] = None
            logger.warning("joining a group failed, polling instead: %s", type(error).__name__)

    async def _rejoin(self) -> None:
        """Join what is to be joined again, up to the first failure: where one join hangs, all would, one by one."""
        for conversation_id in list(self._unjoined):
            del self._unjoined[conversation_id]
            if conversation_id in self._viewers:
                await self._join(conversation_id)
            if conversation_id in self._unjoined:
                break
        self._positioned_at = 0.0  # what was sent while this process was in no group is read at the next beat

    async def _leave(self, conversation_id: uuid.UUID) -> None:
        layer = get_channel_layer(get_settings().channel_layer)
        if layer is None or self._channel is None or conversation_id in self._viewers:
            return
        try:
            async with asyncio.timeout(LAYER_TIMEOUT_SECONDS):
                await layer.group_discard(group_name(str(conversation_id)), self._channel)
        except Exception as error:  # noqa: BLE001 - a group left behind only costs its messages
            logger.warning("leaving a group failed: %s", type(error).__name__)
        if conversation_id in self._viewers:  # somebody came while we left
            await self._join(conversation_id)

    async def _own_channel(self, layer: Any) -> str:
        async with self._naming:
            if self._channel is None:
                async with asyncio.timeout(LAYER_TIMEOUT_SECONDS):
                    self._channel = await layer.new_channel("streaming_chat_hub")
            return self._channel

    async def _receive(self) -> None:
        layer = get_channel_layer(get_settings().channel_layer)
        if layer is None:
            return
        while True:
            asked_at = time.monotonic()
            try:
                message = await layer.receive(await self._own_channel(layer))
                if message.get("type") == journal.MESSAGE_TYPE:
                    self._deliver(*journal.frame_of(message))
            except Exception as error:  # noqa: BLE001 - as in `_join`
                if type(error).__name__ == "TimeoutError" and time.monotonic() - asked_at > LAYER_PAUSE_SECONDS:
                    continue  # the client of the core layer gives up waiting after some seconds: nothing came
                self._layer_failed = True
                logger.warning("receiving from the channel layer failed: %s", type(error).__name__)
                await asyncio.sleep(LAYER_PAUSE_SECONDS)

    async def _beat(self) -> None:
        self._positioned_at = joined_at = time.monotonic()
        rejoining: asyncio.Task[None] | None = None
        while True:
            await asyncio.sleep(get_settings().progress_seconds)
            now = time.monotonic()
            for viewer in [viewer for viewers in self._viewers.values() for viewer in viewers]:
                viewer.beat(now)
            if now - joined_at > REJOIN_SECONDS or self._layer_failed:
                joined_at, self._layer_failed = now, False
                self._unjoined.update(dict.fromkeys(self._viewers))
            if self._unjoined and (rejoining is None or rejoining.done()):
                # A task of its own: progress, heartbeats and positions never wait for the layer.
                rejoining = self._own(self._rejoin(), name="hub: rejoin")
            if self._viewers and now - self._positioned_at >= get_settings().positioning_seconds:
                self._positioned_at = now
                await self._position()

    async def _position(self) -> None:
        turns = {uuid.UUID(v.cursor.turn) for viewers in self._viewers.values() for v in viewers if v.cursor.turn}
        try:
            position = await in_database(read_position, list(self._viewers), list(turns))
        except DatabaseError as error:
            logger.warning("positioning failed: %s", type(error).__name__)
            return
        for viewer in [viewer for viewers in self._viewers.values() for viewer in viewers]:
            if viewer.behind(position):
                viewer.reread()


def read_position(conversation_ids: list[uuid.UUID], turn_ids: list[uuid.UUID]) -> Position:
    """Where the database stands with these conversations and turns; those that are gone are missing."""
    over = Turn.objects.filter(pk__in=turn_ids).exclude(status__in=Turn.ACTIVE)
    return Position(
        dict(Conversation.objects.filter(pk__in=conversation_ids).values_list("pk", "revision")),
        journal.last_seqs(turn_ids),
        set(over.values_list("pk", flat=True)),
    )


get_hub: Final = PerLoop(Hub)
"""The running event loop's hub."""
