"""Clients of the wire protocol, as small as can be, and what a viewer shows when it does what the protocol says."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import aiohttp
from asgiref.sync import sync_to_async
from channels.testing import WebsocketCommunicator
from django.test import AsyncClient, Client

from streaming_chat import lifecycle
from streaming_chat.blocks import BlockFold, text_of
from tests import services
from tests.conftest import database_url
from tests.settings import BACKEND

if TYPE_CHECKING:
    import uuid
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from streaming_chat.blocks import Block

Event = dict[str, Any]

CSRF_TOKEN: Final = "a" * 32
PATIENCE_SECONDS: Final = 20.0
"""How long a client waits for what must come; only a failing test waits so long."""


async def sign_in(user: Any) -> str:
    """The value of a session cookie of ``user``."""
    client = Client()
    await sync_to_async(client.force_login)(user)
    return client.cookies["sessionid"].value


def socket_path(conversation_id: object, query: str = "") -> str:
    """Where the WebSocket of a conversation is."""
    return f"/chat/conversations/{conversation_id}/socket/{query}"


def api_path(conversation_id: object = None, part: str = "") -> str:
    """Where the JSON API has a conversation, or all of them."""
    return "/chat/api/conversations" + (f"/{conversation_id}" if conversation_id else "") + part


@dataclass
class View:
    """What a viewer shows. It accepts only events that follow one another, so a gap or a double fails the test."""

    one_turn: bool = False
    """Whether it follows the answer to one prompt, as a POST that streams does, and not a conversation."""
    revision: int = 0
    turn: str = ""
    seq: int = 0
    status: str = ""
    reply_id: str = ""
    usage: dict[str, Any] | None = None
    folds: dict[str, BlockFold] = field(default_factory=dict)
    history: list[Event] = field(default_factory=list)

    def apply(self, event: Event) -> None:
        """Show ``event``."""
        self.history.append(event)
        match event["type"]:
            case "snapshot":
                self.revision = event["revision"]
                self.folds = {message["id"]: BlockFold(message["blocks"]) for message in event["messages"]}
                turn = event["turn"] or {"id": "", "seq": 0, "status": "", "reply_id": "", "usage": None}
                self._turn(turn)
                self.seq = turn["seq"]
            case "turn":
                self._follow(event)
                for message in event["messages"]:
                    self.folds[message["id"]] = BlockFold(message["blocks"])
                self._turn(event["turn"])
                self.seq = 0
            case "accepted" if self.one_turn:
                self.turn = event["turn"]
                self.folds[""] = BlockFold()
            case "delta":
                assert (event["turn"], event["first"]) == (self.turn, self.seq + 1), (event, self.turn, self.seq)
                for op in event["ops"]:
                    self.folds[self.reply_id].apply(op)
                self.seq = event["seq"]
            case "finished":
                if not self.one_turn:
                    self._follow(event)
                assert event["turn"]["seq"] == self.seq, event
                self._turn(event["turn"])
            case "conversation":
                self._follow(event)

    def _follow(self, event: Event) -> None:
        assert event["revision"] == self.revision + 1, (event, self.revision)
        self.revision = event["revision"]

    def _turn(self, turn: Event) -> None:
        self.turn, self.status, self.usage = turn["id"], turn["status"], turn["usage"]
        if "" in self.folds:
            self.folds[turn["reply_id"]] = self.folds.pop("")
        self.reply_id = turn["reply_id"]

    @property
    def cursor(self) -> str:
        """Where it stands, as the server has it."""
        return f"{self.revision}.{self.turn or '-'}.{self.seq}"

    def blocks(self) -> list[Block]:
        """The reply of the latest turn."""
        return self.folds[self.reply_id].blocks()

    def text(self) -> str:
        """Its words."""
        return text_of(self.blocks())


class Socket(abc.ABC):
    """One WebSocket; every event that comes is shown by ``view``."""

    def __init__(self, view: View | None = None) -> None:
        self.view = view or View()
        self.close_code: int | None = None

    async def send(self, frame: object) -> None:
        """Send a command, or text or bytes as they are."""
        if isinstance(frame, bytes):
            await self._send_bytes(frame)
        else:
            await self._send_text(frame if isinstance(frame, str) else json.dumps(frame))

    async def next(self) -> Event | None:
        """The next event; None if the socket was closed, and then there is a ``close_code``."""
        text = await asyncio.wait_for(self._receive(), PATIENCE_SECONDS)
        if text is None:
            return None
        event: Event = json.loads(text)
        self.view.apply(event)
        return event

    async def until(self, *kinds: str) -> Event:
        """The next event of one of these kinds; what comes before is shown, too."""
        while True:
            event = await self.next()
            assert event is not None, f"closed with {self.close_code} instead of {kinds}"
            if event["type"] in kinds:
                return event

    async def ask(self, frame: object) -> Event:
        """The answer to a command."""
        await self.send(frame)
        return await self.until("accepted", "error", "pong")

    async def alive(self) -> bool:
        """Whether the server still answers here."""
        return await self.ask({"type": "ping", "ref": "alive"}) == {"type": "pong", "ref": "alive"}

    async def closed(self) -> int | None:
        """Wait for the end; the code that the server closed with."""
        while await self.next() is not None:
            pass
        return self.close_code

    @abc.abstractmethod
    async def _send_text(self, text: str) -> None: ...

    @abc.abstractmethod
    async def _send_bytes(self, data: bytes) -> None: ...

    @abc.abstractmethod
    async def _receive(self) -> str | None: ...


class NetworkSocket(Socket):
    """A WebSocket over the network."""

    def __init__(self, connection: aiohttp.ClientWebSocketResponse, view: View | None = None) -> None:
        super().__init__(view)
        self._connection = connection

    async def _send_text(self, text: str) -> None:
        await self._connection.send_str(text)

    async def _send_bytes(self, data: bytes) -> None:
        await self._connection.send_bytes(data)

    async def _receive(self) -> str | None:
        message = await self._connection.receive()
        if message.type is aiohttp.WSMsgType.TEXT:
            return str(message.data)
        self.close_code = self._connection.close_code
        return None


class LocalSocket(Socket):
    """A WebSocket straight into the application, without a server."""

    def __init__(self, communicator: WebsocketCommunicator, view: View | None = None) -> None:
        super().__init__(view)
        self._communicator = communicator

    async def _send_text(self, text: str) -> None:
        await self._communicator.send_input({"type": "websocket.receive", "text": text})

    async def _send_bytes(self, data: bytes) -> None:
        await self._communicator.send_input({"type": "websocket.receive", "bytes": data})

    async def _receive(self) -> str | None:
        message = await self._communicator.receive_output(PATIENCE_SECONDS)
        if message["type"] == "websocket.send":
            return str(message["text"])
        self.close_code = message["code"]
        return None


class LocalSite:
    """The host site in this process and event loop, without a server."""

    def __init__(self) -> None:
        from chatproject.asgi import application

        self.application = application

    async def client(self, user: Any = None) -> AsyncClient:
        """An HTTP client, signed in as ``user``; requests that change something need :func:`csrf`."""
        client = AsyncClient(enforce_csrf_checks=True)
        client.cookies["csrftoken"] = CSRF_TOKEN
        if user is not None:
            client.cookies["sessionid"] = await sign_in(user)
        return client

    async def communicator(
        self,
        path: str,
        *,
        session_key: str | None = None,
        origins: Sequence[str] = ("http://testserver",),
        headers: Sequence[tuple[bytes, bytes]] = (),
        scope: Mapping[str, Any] | None = None,
    ) -> WebsocketCommunicator:
        """A WebSocket connection that has not begun yet."""
        every = [(b"host", b"testserver"), *headers, *((b"origin", origin.encode()) for origin in origins)]
        if session_key is not None:
            every.append((b"cookie", f"sessionid={session_key}".encode()))
        communicator = WebsocketCommunicator(self.application, path, every)
        communicator.scope.update(cast("Any", scope or {}))
        return communicator

    @asynccontextmanager
    async def socket(
        self, session_key: str | None, conversation_id: object, *, query: str = "", view: View | None = None
    ) -> AsyncIterator[LocalSocket]:
        """An accepted WebSocket."""
        communicator = await self.communicator(socket_path(conversation_id, query), session_key=session_key)
        accepted, _ = await communicator.connect(PATIENCE_SECONDS)
        assert accepted
        try:
            yield LocalSocket(communicator, view)
        finally:
            await communicator.disconnect(timeout=PATIENCE_SECONDS)


@asynccontextmanager
async def local_site() -> AsyncIterator[LocalSite]:
    """Everything runs in this event loop until the block ends; then it is drained as at a server's stop."""
    try:
        yield LocalSite()
    finally:
        await lifecycle.stop()


@asynccontextmanager
async def network(session_key: str | None = None) -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client that is signed in."""
    cookies = {} if session_key is None else {"sessionid": session_key}
    jar = aiohttp.CookieJar(unsafe=True)  # cookies of an address
    timeout = aiohttp.ClientTimeout(total=None, sock_read=PATIENCE_SECONDS)
    async with aiohttp.ClientSession(cookies=cookies, cookie_jar=jar, timeout=timeout) as session:
        yield session


@asynccontextmanager
async def open_socket(
    session: aiohttp.ClientSession,
    url: str,
    conversation_id: uuid.UUID | str,
    *,
    after: str | None = None,
    view: View | None = None,
    headers: Mapping[str, str] | None = None,
) -> AsyncIterator[NetworkSocket]:
    """A WebSocket to the server at ``url``."""
    path = socket_path(conversation_id, "" if after is None else f"?after={after}")
    async with session.ws_connect(
        url + path, headers={"Origin": url, **(headers or {})}, max_msg_size=0, autoclose=True
    ) as connection:
        yield NetworkSocket(connection, view)


@dataclass(frozen=True)
class Sse:
    """One Server-Sent Event, or a comment (``kind`` is empty)."""

    kind: str
    data: Event
    id: str | None = None
    comment: str = ""


class SseReader:
    """Parses a stream as the HTML standard says: lines end with CR, LF or both, and with nothing else."""

    def __init__(self, view: View | None = None) -> None:
        self.view = view or View()
        self.last_id: str | None = None
        self._left = b""

    def feed(self, data: bytes) -> list[Sse]:
        """The events that ``data`` completes; each is shown by ``view``."""
        data = self._left + data
        *parts, self._left = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n\n")
        return [event for part in parts if (event := self._parse(part.decode())) is not None]

    def _parse(self, part: str) -> Sse | None:
        fields: dict[str, list[str]] = {}
        for line in part.split("\n"):
            name, _, value = line.partition(":")
            assert name in ("", "id", "event", "data", "retry"), f"a field that nobody meant: {line!r}"
            fields.setdefault(name, []).append(value.removeprefix(" "))
        if "data" not in fields:
            return Sse("", {}, comment=fields[""][0]) if "" in fields else None
        assert [len(fields[name]) for name in fields] == [1] * len(fields), part
        data = json.loads(fields["data"][0])
        assert fields["event"] == [data["type"]]
        if "id" in fields:
            self.last_id = fields["id"][0]
        self.view.apply(data)
        return Sse(data["type"], data, fields.get("id", [None])[0])


class EventStream:
    """A stream of Server-Sent Events, from the pieces of a response's body."""

    def __init__(self, pieces: AsyncIterator[bytes], view: View | None = None) -> None:
        self.reader = SseReader(view)
        self._pieces = pieces
        self._waiting: list[Sse] = []

    @property
    def view(self) -> View:
        """What a viewer shows now."""
        return self.reader.view

    async def next(self) -> Sse | None:
        """The next event or comment; None at the end."""
        while not self._waiting:
            try:
                async with asyncio.timeout(
                    PATIENCE_SECONDS
                ):  # in this task: the stream ends with the one that reads it
                    piece = await anext(self._pieces)
            except StopAsyncIteration:
                return None
            self._waiting = self.reader.feed(piece)
        return self._waiting.pop(0)

    async def until(self, *kinds: str) -> Sse:
        """The next event of one of these kinds."""
        while True:
            event = await self.next()
            assert event is not None, f"the stream ended instead of {kinds}"
            if event.kind in kinds:
                return event

    async def rest(self) -> list[Sse]:
        """Everything up to the end."""
        events = []
        while (event := await self.next()) is not None:
            events.append(event)
        return events


async def until(check: Callable[[], object]) -> None:
    """Wait until ``check()`` is true."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not check():  # noqa: ASYNC110 - of other tasks and processes
            await asyncio.sleep(0.01)


def server_environment(**chat: Any) -> dict[str, str]:
    """Variables for a server on this test's database, with these keys of ``STREAMING_CHAT``."""
    return {
        "DJANGO_SETTINGS_MODULE": "tests.hostsettings",
        "TEST_STREAMING_CHAT": json.dumps(chat),
        "DATABASE_URL": database_url(),
        "REDIS_URL": "" if BACKEND == "sqlite" else services.redis_url(),
        "REDIS_LAYER": BACKEND,
        "ANTHROPIC_API_KEY": "",
    }


def assert_clean(site: services.Site) -> None:
    """The server has met nothing that it did not expect."""
    log = site.log.read_text()
    for trace in ("Traceback", "Exception", "Unhandled", "Internal Server Error", " ERROR "):
        assert trace not in log, log


def csrf_cookie(session_key: str) -> str:
    """Both cookies that a POST of a browser carries."""
    return f"sessionid={session_key}; csrftoken={CSRF_TOKEN}"


def open_files(pid: int, path: str) -> int:
    """How often process ``pid`` has opened the file at ``path``."""
    found = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found += entry.readlink() == Path(path)
    return found
