"""The WebSocket: commands in, events out. Nothing is generated or remembered here."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import parse_qsl

from channels.generic.websocket import AsyncWebsocketConsumer
from django.db import DatabaseError
from django.utils.translation import gettext

from . import limits, protocol, turns
from .conf import get_settings
from .database import in_database
from .exceptions import ChatError, InvalidInputError, RateLimitedError, SignedOutError
from .generation.runner import get_runner
from .hub import CLOSED, ConversationViewer, Sent, get_hub
from .protocol import Ack, Command, Cursor, Ping, Regenerate, Resume, Send, Stop
from .sessions import identity

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .snapshot import AnyUser

CLOSE_SIGNED_OUT: Final = 4401
CLOSE_NOT_FOUND: Final = 4404
CLOSE_TOO_SLOW: Final = 4008
CLOSE_TOO_MANY: Final = 4429
CLOSE_RESTART: Final = 4503
STRIKES: Final = 20
"""Commands refused for their rate before the socket is closed."""
RESUMES_PER_MINUTE: Final = 30
"""Each may be answered with a whole snapshot, which a client that does not read would pile up here."""
FREE_COMMANDS_FACTOR: Final = 10
"""Acknowledgements and pings have a limit of their own, so many times that of commands."""
RETURN_SECONDS: Final = 5.0
"""Over how long browsers spread their return after a restart."""

logger = logging.getLogger(__name__)


class ChatConsumer(AsyncWebsocketConsumer):
    """One socket that follows one conversation.

    Sends a ``snapshot``, or with ``?after=<cursor>`` what came since, and then every event; takes the commands of
    :mod:`streaming_chat.protocol`. A command that can't be carried out is answered with ``error`` and the socket stays
    open. It closes with 4401 (signed out), 4404 (no such conversation for this user), 4008 (takes nothing for minutes),
    4429 (too many sockets or commands) and 4503 (restart: come back). Daphne can't send the standard codes for these.
    """

    channel_layer_alias = "-"  # No layer per socket: the hub has one channel for the whole process.

    async def __call__(
        self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        """Serve the socket. Whatever ends it, the viewer is detached: some servers skip the disconnect message."""
        self._viewer: ConversationViewer | None = None
        self._held = ExitStack()
        self._gone = False
        try:
            await super().__call__(scope, receive, send)
        except asyncio.CancelledError:
            if get_runner().draining and not self._gone:  # Daphne cancels all sockets when it is asked to stop
                await self._dismiss()
            raise
        finally:
            self._release()

    async def dispatch(self, message: Any) -> None:
        """Hand a message to its method.

        The framework's own ``dispatch`` first visits the thread that all synchronous code shares, to close old
        connections; nothing here uses one.
        """
        await getattr(self, message["type"].replace(".", "_"))(message)

    async def connect(self) -> None:
        """Accept the socket and begin to send."""
        settings = get_settings()
        self._user: AnyUser = cast("AnyUser", self.scope["user"])
        self._conversation_id: uuid.UUID = self.scope["url_route"]["kwargs"]["conversation_id"]
        await self.accept()
        if get_runner().draining:
            return await self._dismiss()
        if not self._user.is_authenticated:
            return await self.close(CLOSE_SIGNED_OUT)
        try:
            self._held.enter_context(limits.sockets.hold(self._user.pk, settings.sockets_per_user))
        except RateLimitedError as error:
            await self._problem(error, None)
            return await self.close(CLOSE_TOO_MANY)
        get_runner().start()
        now = time.monotonic()
        self._commands = limits.Rate(settings.commands_per_minute, now=now)
        self._free_commands = limits.Rate(settings.commands_per_minute * FREE_COMMANDS_FACTOR, now=now)
        self._resumes = limits.Rate(RESUMES_PER_MINUTE, now=now)
        self._strikes = 0
        self._frame_limit_bytes = protocol.frame_limit_bytes(settings.message_max_chars)
        query = dict(parse_qsl(self.scope.get("query_string", b"").decode("latin-1")))
        after = Cursor.parse(query.get("after", ""))
        self._identity = identity(self._user, self.scope.get("session"))
        self._viewer = get_hub().watch(self._conversation_id, self._identity, after)
        self._viewer.needs_acks = True
        get_hub().pump(self._viewer, self._show)
        return None

    async def disconnect(self, code: int) -> None:
        """Detach the viewer; the turn goes on."""
        self._release()

    async def websocket_receive(self, message: Any) -> None:
        """Take a frame. Servers may leave out the key of the kind that it is not."""
        await self.receive(message.get("text"), message.get("bytes"))

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        """Carry out one command, or answer why not."""
        if self._viewer is None or self._gone:
            return
        ref: str | None = None
        rate = self._commands  # what makes no sense counts like a command
        try:
            try:
                if text_data is None:
                    raise InvalidInputError("binary_unsupported")
                document = protocol.load_json(text_data, limit_bytes=self._frame_limit_bytes)
                ref = protocol.ref_of(document)
                command = protocol.command_of(document)
                if isinstance(command, Ack | Ping):
                    rate = self._free_commands
            finally:
                rate.take()
            await self._carry_out(command)
        except RateLimitedError as error:
            await self._problem(error, ref)
            self._strikes += 1
            if self._strikes >= STRIKES:
                await self._end(CLOSE_TOO_MANY)
        except SignedOutError as error:
            await self._problem(error, ref)
            await self._end(CLOSE_SIGNED_OUT)
        except ChatError as error:
            await self._problem(error, ref)
        except DatabaseError as error:
            logger.error("a command failed: %s", type(error).__name__)
            await self._problem(ChatError(), ref)

    async def _carry_out(self, command: Command) -> None:
        viewer = self._viewer
        assert viewer is not None  # noqa: S101 - `receive` has checked
        match command:
            case Ack():
                viewer.acknowledge(str(command.turn_id), command.seq)
            case Ping():
                await self._send({"type": "pong", "ref": command.ref})
            case Resume():
                self._resumes.take()
                await self._check_session()
                viewer.resume(Cursor.parse(command.cursor or ""))
                await self._accepted(command)
            case Send():
                await self._check_session()
                started = await turns.start_turn(
                    self._user,
                    self._conversation_id,
                    text=command.text,
                    client_id=command.client_id,
                    parent_id=command.parent_id,
                )
                await self._accepted(command, started)
            case Regenerate():
                await self._check_session()
                started = await turns.regenerate_turn(
                    self._user,
                    self._conversation_id,
                    message_id=command.message_id,
                    client_id=command.client_id,
                )
                await self._accepted(command, started)
            case Stop():
                await self._check_session()
                await turns.stop_turn(self._user, self._conversation_id, command.turn_id)
                await self._accepted(command)

    async def _check_session(self) -> None:
        """Ask again who this is.

        Raises:
            SignedOutError: The session has ended, or belongs to somebody else now.
        """
        if not (await in_database(self._identity)).is_authenticated:
            raise SignedOutError

    async def _show(self, sent: Sent) -> None:
        if sent is CLOSED:
            # Dropped for taking nothing, or because the process ends; after a disconnect nobody is told.
            if self._gone:
                return
            if get_runner().draining:
                await self._dismiss()
            else:
                await self._end(CLOSE_TOO_SLOW)
        elif sent.json:
            await self.send(text_data=sent.json)
        if sent.kind == "deleted":
            await self._end(CLOSE_NOT_FOUND)
        elif sent.kind == "error":
            await self._end(CLOSE_SIGNED_OUT)

    async def _dismiss(self) -> None:
        """Ask the browser to come back; without a word, it would see a lost network."""
        await self._send({"type": "reconnect", "within_seconds": RETURN_SECONDS})
        await self._end(CLOSE_RESTART)

    async def _end(self, code: int) -> None:
        """Close the socket. What is still on its way, in either direction, is dropped."""
        self._detach()
        await self.close(code)

    async def _accepted(self, command: Command, started: turns.StartedTurn | None = None) -> None:
        await self._send(
            {
                "type": "accepted",
                "ref": command.ref,
                "turn": None if started is None else str(started.id),
                "message": None if started is None else str(started.prompt_id),
                "duplicate": started is not None and started.duplicate,
            }
        )

    async def _problem(self, error: ChatError, ref: str | None) -> None:
        await self._send(protocol.problem(error, ref, translate=gettext))

    async def _send(self, event: protocol.Event) -> None:
        await self.send(text_data=protocol.encode(event))

    def _detach(self) -> None:
        self._gone = True
        if self._viewer is not None:
            self._viewer.close()

    def _release(self) -> None:
        self._detach()
        self._held.close()
