"""What the fake server was asked and what it answered: the other side's book, to compare one's own with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from .gate import WAIT_SECONDS, Wakeup
from .rules import blocks_of
from .tokens import carried, output_tokens, shown

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

Outcome: TypeAlias = Literal["completed", "error", "cut", "aborted"]
AuthStyle: TypeAlias = Literal["x-api-key", "bearer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One request as it stood at the moment of looking; it never changes, look again for news.

    Times are ``time.monotonic()`` seconds. Tokens are those billed so far: what the reply's usage events
    stated, and until they do, what was sent, counted as :mod:`streaming_chat.testing.tokens` says. Nothing is
    billed for an HTTP error.
    """

    request_id: str
    method: str
    path: str
    headers: Mapping[str, str]
    """Names in lower case; without the key."""
    auth: AuthStyle | None
    """How the key came; ``None`` if it did not."""
    body: Any
    """The JSON that was sent; ``None`` while it has not arrived, or if it was none."""
    connection: int
    """Number of the TCP connection; requests that share it came over one kept-alive connection."""
    started: float
    finished: float | None
    outcome: Outcome | None
    """``None``: running. ``completed``: all that the script held was sent, whether or not that was a whole
    message. ``error``: an HTTP error, or an ``error`` event. ``cut``: the server dropped the connection.
    ``aborted``: the client closed it first."""
    status: int | None
    """``None`` until the headers are sent."""
    bytes_sent: int
    """Of the body, without the framing of HTTP."""
    events_sent: int
    text_sent: str
    """The visible text among them."""
    usage: Mapping[str, Any]
    """The usage stated so far, later numbers over earlier ones."""
    input_tokens: int
    output_tokens: int

    @property
    def is_running(self) -> bool:
        """Whether the answer is still being given."""
        return self.outcome is None

    @property
    def is_stream(self) -> bool:
        """Whether a stream was asked for."""
        return isinstance(self.body, Mapping) and self.body.get("stream") is True

    @property
    def prompt(self) -> str:
        """The text of the last user message; empty if there is none."""
        messages = self.body.get("messages", []) if isinstance(self.body, Mapping) else []
        for message in reversed(messages):
            if message.get("role") == "user":
                return "".join(block.get("text", "") for block in blocks_of(message) if block.get("type") == "text")
        return ""


@dataclass(slots=True)
class Entry:
    """One request while the server works on it. Only the server writes here."""

    _wakeup: Wakeup
    request_id: str
    method: str
    path: str
    headers: Mapping[str, str]
    auth: AuthStyle | None
    connection: int
    body: Any = None
    started: float = field(default_factory=time.monotonic)
    finished: float | None = None
    outcome: Outcome | None = None
    status: int | None = None
    bytes_sent: int = 0
    events_sent: int = 0
    text_sent: list[str] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    characters: int = 0
    has_final_usage: bool = False

    def changing(self) -> AbstractContextManager[None]:
        """Let nobody see the ledger in between."""
        return self._wakeup.changing()

    def received(self, body: Any) -> None:
        with self._wakeup.changing():
            self.body = body

    def responded(self, status: int) -> None:
        with self._wakeup.changing():
            self.status = status

    def generated(self, event: Mapping[str, Any]) -> None:
        """Bill for an event."""
        with self._wakeup.changing():
            self.characters += len(carried(event))
            if event.get("type") == "message_start" and not self.usage:
                self.usage |= event["message"].get("usage", {})
            elif event.get("type") == "message_delta":
                self.usage |= {key: value for key, value in event.get("usage", {}).items() if value is not None}
                self.has_final_usage = "output_tokens" in event.get("usage", {})

    def sent(self, data: bytes, events: list[Mapping[str, Any]], text: str) -> None:
        """Note a write, and bill for the events that it completes."""
        with self._wakeup.changing():
            self.bytes_sent += len(data)
            self.events_sent += len(events)
            self.text_sent.append(text)
            for event in events:
                self.generated(event)
                self.text_sent.append(shown(event))

    def finish(self, outcome: Outcome) -> None:
        """Note how it ended; the first word counts."""
        with self._wakeup.changing():
            if self.outcome is None:
                self.outcome = outcome
                self.finished = time.monotonic()

    def record(self) -> RequestRecord:
        usage = {} if (self.status or 0) >= 400 else dict(self.usage)
        billed = self.usage.get("output_tokens", 0) if self.has_final_usage else output_tokens(self.characters)
        return RequestRecord(
            request_id=self.request_id,
            method=self.method,
            path=self.path,
            headers=self.headers,
            auth=self.auth,
            body=self.body,
            connection=self.connection,
            started=self.started,
            finished=self.finished,
            outcome=self.outcome,
            status=self.status,
            bytes_sent=self.bytes_sent,
            events_sent=self.events_sent,
            text_sent="".join(self.text_sent),
            usage=usage,
            input_tokens=usage.get("input_tokens", 0),
            output_tokens=billed if usage else 0,
        )


class Ledger:
    """All requests of one server, oldest first. May be read from any thread."""

    def __init__(self) -> None:
        self._wakeup = Wakeup()
        self._entries: list[Entry] = []
        self._connections: dict[object, int] = {}
        self._connections_seen = 0

    @property
    def requests(self) -> list[RequestRecord]:
        """Every request that has come, as it stands now."""
        with self._wakeup.reading():
            return [entry.record() for entry in self._entries]

    @property
    def messages(self) -> list[RequestRecord]:
        """Only those that asked for a message, not for a count or a list."""
        return [record for record in self.requests if record.path == "/v1/messages"]

    @property
    def running(self) -> list[RequestRecord]:
        """Those that are being answered now."""
        return [record for record in self.requests if record.is_running]

    @property
    def aborted(self) -> list[RequestRecord]:
        """Those whose client went away before the answer was over."""
        return [record for record in self.requests if record.outcome == "aborted"]

    @property
    def open_connections(self) -> int:
        """TCP connections that are open now, busy or idle."""
        with self._wakeup.reading():
            return len(self._connections)

    @property
    def input_tokens(self) -> int:
        """Billed so far over all requests, uncached input only."""
        return sum(record.input_tokens for record in self.requests)

    @property
    def output_tokens(self) -> int:
        """Billed so far over all requests."""
        return sum(record.output_tokens for record in self.requests)

    async def wait_for(
        self,
        check: Callable[[Ledger], object],
        *,
        timeout: float = WAIT_SECONDS,  # noqa: ASYNC109
    ) -> None:
        """Return once ``check(ledger)`` is true; it is asked again after every change.

        Raises:
            TimeoutError: It was not within ``timeout`` seconds. The message tells how every request stands.

        """
        try:
            await self._wakeup.wait(lambda: bool(check(self)), timeout)
        except TimeoutError as exc:
            raise TimeoutError(self._state(timeout)) from exc

    def wait_for_sync(self, check: Callable[[Ledger], object], *, timeout: float = WAIT_SECONDS) -> None:
        """:meth:`wait_for` for code that has no event loop."""
        try:
            self._wakeup.wait_sync(lambda: bool(check(self)), timeout)
        except TimeoutError as exc:
            raise TimeoutError(self._state(timeout)) from exc

    # -- the server's side --------------------------------------------------------------------------------

    def add(
        self,
        connection: object,
        *,
        request_id: str,
        method: str,
        path: str,
        headers: Mapping[str, str],
        auth: AuthStyle | None,
    ) -> Entry:
        """Open the entry of a request that has just come over ``connection``."""
        with self._wakeup.changing():
            number = self._connections.get(connection, 0)
            entry = Entry(self._wakeup, request_id, method, path, headers, auth, number)
            self._entries.append(entry)
            return entry

    def connected(self, connection: object) -> None:
        """Note that a connection was opened."""
        with self._wakeup.changing():
            self._connections_seen += 1
            self._connections[connection] = self._connections_seen

    def disconnected(self, connection: object) -> None:
        """Note that a connection is gone."""
        with self._wakeup.changing():
            self._connections.pop(connection, None)

    def stop_running(self) -> None:
        """Note that the server drops whatever it still answers."""
        with self._wakeup.changing():
            for entry in self._entries:
                entry.finish("cut")

    def _state(self, timeout: float) -> str:
        lines = [
            f"{record.method} {record.path}: {record.outcome or 'running'}, status {record.status},"
            f" {record.events_sent} events, {record.bytes_sent} bytes"
            for record in self.requests
        ]
        seen = "; ".join(lines) or "no request has come"
        return f"not within {timeout:g} s ({self.open_connections} open connections; {seen})"
