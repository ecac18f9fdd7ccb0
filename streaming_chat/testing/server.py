"""The HTTP server of the fake Anthropic API."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import secrets
import threading
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from aiohttp import web

from .errors import ApiError
from .exchange import Exchange, for_ever
from .gate import WAIT_SECONDS
from .ledger import AuthStyle, Ledger, RequestRecord
from .rules import check_count_request, check_message_request
from .script import Reply
from .tokens import input_tokens

if TYPE_CHECKING:
    from types import TracebackType


logger = logging.getLogger(__name__)

Responder: TypeAlias = Callable[[RequestRecord], Reply | Awaitable[Reply]]

MESSAGES_PATH = "/v1/messages"
COUNT_TOKENS_PATH = "/v1/messages/count_tokens"
MODELS_PATH = "/v1/models"
MAX_BODY_BYTES = 32 * 1024 * 1024
START_SECONDS = 10.0
DEFAULT_REPLY = Reply.text("Hello from the fake model.", chunks=4)


class FakeAnthropic:
    """A real HTTP server on loopback that speaks the Anthropic Messages API and says what it was told to.

    ``async with FakeAnthropic() as server`` runs it in the current event loop; a plain ``with`` runs it in a
    thread of its own, for synchronous tests and for clients in other processes. There, :meth:`stop` and
    :meth:`start` make an outage: the port and the ledger stay the same.

    Args:
        port: 0 takes a free one.
        strict: Answer 400 to a request that the API would refuse; see :mod:`streaming_chat.testing.rules`.
        models: Ids that ``GET /v1/models`` lists. Messages are accepted for any model.

    """

    api_key = "fake-anthropic-key"
    """A key to give to clients. The server takes any."""

    respond: Responder | None = None
    """Answers the requests for which no reply is enqueued; may be ``async``. ``None``: a short greeting."""

    def __init__(
        self,
        *,
        port: int = 0,
        strict: bool = True,
        models: Iterable[str] = ("claude-sonnet-5-5",),
        host: str = "127.0.0.1",
    ) -> None:
        self.host = host
        self.port = port
        self.strict = strict
        self.models = tuple(models)
        self.ledger = Ledger()
        self._replies: defaultdict[str, deque[Reply]] = defaultdict(deque)
        self._server: _Server | None = None
        self._runner: web.ServerRunner | None = None
        self._thread: threading.Thread | None = None
        self._stop_thread: Callable[[], object] = lambda: None

    # -- what a test uses ---------------------------------------------------------------------------------

    @property
    def base_url(self) -> str:
        """What a client takes as ``base_url``."""
        return f"http://{self.host}:{self.port}"

    @property
    def environ(self) -> dict[str, str]:
        """The environment variables that point another process, or the SDK's defaults, here."""
        return {"ANTHROPIC_API_KEY": self.api_key, "ANTHROPIC_BASE_URL": self.base_url}

    @property
    def requests(self) -> list[RequestRecord]:
        """Every request that has come, oldest first, as it stands now."""
        return self.ledger.requests

    def enqueue(self, *replies: Reply, path: str = MESSAGES_PATH) -> None:
        """Answer the next requests to ``path`` with these, one each; a refused request uses up none."""
        self._replies[path].extend(replies)

    @property
    def pending(self) -> int:
        """Replies that are enqueued and not used yet."""
        return sum(len(replies) for replies in self._replies.values())

    async def wait_for(
        self,
        check: Callable[[Ledger], object],
        *,
        timeout: float = WAIT_SECONDS,  # noqa: ASYNC109
    ) -> None:
        """Wait until ``check(ledger)`` is true; see :meth:`Ledger.wait_for`. Works from any event loop."""
        await self.ledger.wait_for(check, timeout=timeout)

    def wait_for_sync(self, check: Callable[[Ledger], object], *, timeout: float = WAIT_SECONDS) -> None:
        """:meth:`wait_for` for code that has no event loop."""
        self.ledger.wait_for_sync(check, timeout=timeout)

    # -- starting and stopping ----------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self._start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Run in a thread of its own, on the port it had before, if it had one."""
        if self._thread is not None:
            raise RuntimeError("this fake server is running already")
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._run_in_thread(started)), name="fake-anthropic", daemon=True
        )
        self._thread.start()
        try:
            started.result(START_SECONDS)
        except BaseException:
            self._thread = None
            raise

    def stop(self) -> None:
        """Drop every connection and leave the thread. Without effect unless :meth:`start` was called."""
        if self._thread is not None:
            self._stop_thread()
            self._thread.join(START_SECONDS)
            self._thread = None

    async def _run_in_thread(self, started: Future[None]) -> None:
        loop, stopping = asyncio.get_running_loop(), asyncio.Event()
        self._stop_thread = lambda: loop.call_soon_threadsafe(stopping.set)
        try:
            await self._start()
        except OSError as exc:
            started.set_exception(exc)
            return
        started.set_result(None)
        try:
            await stopping.wait()
        finally:
            await self._stop()

    async def _start(self) -> None:
        if self._runner is not None:
            raise RuntimeError("this fake server is running already")
        self._server = _Server(self._respond_to, self.ledger)
        self._runner = web.ServerRunner(self._server, shutdown_timeout=1.0)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self.host, self.port).start()
        except OSError:
            await self._runner.cleanup()
            self._runner = self._server = None
            raise
        self.port = self._runner.addresses[0][1]

    async def _stop(self) -> None:
        runner, server, self._runner, self._server = self._runner, self._server, None, None
        if runner is None or server is None:
            return
        for site in list(runner.sites):
            await site.stop()
        self.ledger.stop_running()
        for connection in server.connections:
            if connection.transport is not None:
                connection.transport.abort()
        await asyncio.sleep(0)  # the aborted connections' handlers learn of it in the next round of the loop
        await runner.cleanup()

    # -- answering ----------------------------------------------------------------------------------------

    async def _respond_to(self, request: web.BaseRequest) -> web.StreamResponse:
        request_id = f"req_{secrets.token_hex(12)}"
        headers = {name.lower(): value for name, value in request.headers.items()}
        auth = _take_key(headers)
        entry = self.ledger.add(
            request.protocol,
            request_id=request_id,
            method=request.method,
            path=request.path,
            headers=headers,
            auth=auth,
        )
        exchange = Exchange(request, entry)
        try:
            return await self._answer(exchange)
        except asyncio.CancelledError:
            entry.finish("aborted")
            raise
        except ConnectionError:
            entry.finish("aborted")
            await for_ever()  # the loss of the connection, which is under way, cancels this

    async def _answer(self, exchange: Exchange) -> web.StreamResponse:
        try:
            return await exchange.carry_out(await self._choose(exchange))
        except ApiError as error:
            return await exchange.refuse(error)
        except ConnectionError:
            raise
        except Exception:
            logger.exception("The script of the fake Anthropic server failed in %s", exchange.entry.request_id)
            if exchange.entry.status is None:
                return await exchange.refuse(ApiError(500, message="The script of the fake server failed"))
            await exchange.cut()

    async def _choose(self, exchange: Exchange) -> Reply:
        """Choose the reply that this request gets; ``ApiError`` if it is to be refused."""
        request, entry = exchange.request, exchange.entry
        raw = await _read(request)
        if entry.auth is None:
            raise ApiError(401, message="x-api-key header is required")
        if "anthropic-version" not in entry.headers:
            raise ApiError(400, message="anthropic-version: header is required")
        if request.method == "GET" and (request.path + "/").startswith(MODELS_PATH + "/"):
            return self._queued(request.path) or self._list_models(request.path)
        if request.method != "POST" or request.path not in (MESSAGES_PATH, COUNT_TOKENS_PATH):
            raise ApiError(404, message=f"Not found: {request.method} {request.path}")
        entry.received(body := _parse(raw))
        if self.strict:
            checked = {**body, "betas": True} if "anthropic-beta" in entry.headers else body
            (check_message_request if request.path == MESSAGES_PATH else check_count_request)(checked)
        if reply := self._queued(request.path):
            return reply
        if request.path == COUNT_TOKENS_PATH:
            return Reply.body(json.dumps({"input_tokens": input_tokens(body)}))
        if self.respond is None:
            return DEFAULT_REPLY
        try:
            answer = self.respond(entry.record())
            return await answer if inspect.isawaitable(answer) else answer
        except Exception as exc:
            logger.exception("The responder of the fake Anthropic server failed in %s", entry.request_id)
            raise ApiError(500, message="The responder of the fake server failed") from exc

    def _queued(self, path: str) -> Reply | None:
        return self._replies[path].popleft() if self._replies[path] else None

    def _list_models(self, path: str) -> Reply:
        listed = [
            {
                "type": "model",
                "id": model,
                "display_name": model,
                "created_at": "2026-01-01T00:00:00Z",
                "lifecycle": "active",
            }
            for model in self.models
        ]
        if path == MODELS_PATH:
            ends = {"first_id": self.models[0], "last_id": self.models[-1]} if listed else {}
            return Reply.body(json.dumps({"data": listed, "has_more": False, **ends}))
        for model in listed:
            if path == f"{MODELS_PATH}/{model['id']}":
                return Reply.body(json.dumps(model))
        return Reply.error(404, message=f"model: {path.removeprefix(MODELS_PATH + '/')}")


class _Server(web.Server):
    """aiohttp's server, which cancels a handler whose client is gone and counts the connections."""

    def __init__(self, handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]], ledger: Ledger) -> None:
        super().__init__(handler, handler_cancellation=True, access_log=None)
        self._ledger = ledger

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        transport.set_write_buffer_limits(high=0)  # so that a drained write has left this process
        self._ledger.connected(handler)
        super().connection_made(handler, transport)

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        self._ledger.disconnected(handler)
        super().connection_lost(handler, exc)


def _take_key(headers: dict[str, str]) -> AuthStyle | None:
    """Remove the key from the headers and say how it came."""
    key, authorization = headers.pop("x-api-key", ""), headers.pop("authorization", "")
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return "bearer"
    return "x-api-key" if key.strip() else None


async def _read(request: web.BaseRequest) -> bytes:
    """Return the body; one that is too large is read to its end, so that the client gets to the refusal."""
    body, size = bytearray(), 0
    async for chunk in request.content.iter_any():
        size += len(chunk)
        if size <= MAX_BODY_BYTES:
            body += chunk
    if size > MAX_BODY_BYTES:
        raise ApiError(413, message=f"Request exceeds the maximum size of {MAX_BODY_BYTES} bytes")
    return bytes(body)


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise ApiError(400, message="The request body is not valid JSON") from None
    if not isinstance(body, dict):
        raise ApiError(400, message="The request body must be a JSON object")
    return body
