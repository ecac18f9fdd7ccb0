"""One request and its response: carries a reply's steps out over HTTP and writes them into the ledger."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, cast

from aiohttp import web
from aiohttp.http import StreamWriter

from .errors import STATUS_OF_TYPE, ApiError
from .gate import Gate
from .ledger import Entry, Outcome
from .script import Opening, Reply, WholeBody
from .steps import PING, Cut, Delay, End, Event, Fail, Pings, Stall, Step
from .tokens import input_tokens
from .wire import Write, accumulate, plan


class Exchange:
    """One request and the response it gets."""

    def __init__(self, request: web.BaseRequest, entry: Entry) -> None:
        self.request = request
        self.entry = entry

    async def refuse(self, error: ApiError) -> web.StreamResponse:
        """Answer with an HTTP error."""
        body = json.dumps(error.body(self.entry.request_id)).encode()
        return await self._send_whole(body, "application/json", error.status, error.headers)

    async def carry_out(self, reply: Reply) -> web.StreamResponse:
        """Do what the reply says, to its end."""
        for step in reply.first_steps:
            if isinstance(step, Fail):
                raise _as_api_error(step)
            await self._take(step)
        headers = reply.options.get("headers", {})
        match reply.instead:
            case ApiError():
                raise reply.instead
            case WholeBody(content, content_type, status):
                return await self._send_whole(content, content_type, status, headers)
        body = self.entry.body or {}
        opening = Opening(self.entry.request_id.replace("req", "msg"), str(body.get("model")), input_tokens(body))
        if body.get("stream"):
            return await self._stream(plan(reply, opening), headers)
        message = await self._message(reply.steps(opening))
        sent = json.dumps(message).encode()
        text = "".join(block["text"] for block in message["content"] if block.get("type") == "text")
        return await self._send_whole(sent, "application/json", 200, headers, text)

    async def _stream(self, writes: Iterator[Write | Step], headers: Mapping[str, str]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"cache-control": "no-cache", **self._headers(headers)})
        response.headers["content-type"] = "text/event-stream; charset=utf-8"
        response.enable_chunked_encoding()
        self.entry.responded(response.status)
        await response.prepare(self.request)
        outcome: Outcome = "completed"
        for step, is_last in _marking_last(writes):
            match step:
                case Write(data, events):
                    if any(event.body.get("type") == "error" for event in events):
                        outcome = "error"
                    await self._write(data, events, outcome=outcome if is_last else None)
                case Pings(every_seconds, count):
                    sent = 0
                    while count is None or sent < count:
                        await self._write(PING.encode(), (PING,))
                        await asyncio.sleep(every_seconds)
                        sent += 1
                case End():
                    break
                case _:
                    await self._take(step)
        self.entry.finish(outcome)
        await response.write_eof()
        return response

    async def _write(
        self, data: bytes, events: tuple[Event, ...] = (), text: str = "", outcome: Outcome | None = None
    ) -> None:
        """Write to the client and to the ledger as one: no client knows what the ledger does not."""
        await asyncio.sleep(0)  # a script without waits lets others run too, and hears of its client
        with self.entry.changing():
            # The lock is safe to hold here: without draining, this write never gives up the event loop.
            await cast("StreamWriter", self.request.writer).write(data, drain=False)
            self.entry.sent(data, [event.body for event in events], text)
            if outcome is not None:
                self.entry.finish(outcome)
        await self._drain()

    async def _message(self, steps: Iterator[Step]) -> dict[str, Any]:
        """Live through the script without sending, and return the message that it amounts to."""
        events: list[Mapping[str, Any]] = []
        for step in steps:
            match step:
                case Event(body):
                    if body.get("type") == "error":
                        error = body.get("error", {})
                        raise _as_api_error(Fail(error.get("type", "api_error"), error.get("message", "")))
                    events.append(body)
                    self.entry.generated(body)
                case Fail():
                    raise _as_api_error(step)
                case Pings(every_seconds, count):
                    await (for_ever() if count is None else asyncio.sleep(every_seconds * count))
                case End():
                    break
                case _:
                    await self._take(step)
        return accumulate(events)

    async def _take(self, step: Step) -> None:
        """Take a step that is alike everywhere."""
        match step:
            case Delay(seconds):
                await asyncio.sleep(seconds)
            case Gate():
                await step.pass_through()
            case Stall():
                await for_ever()
            case Cut(reset):
                await self.cut(reset=reset)

    async def cut(self, *, reset: bool = False) -> NoReturn:
        """Lose the connection; what was written has left."""
        self.entry.finish("cut")
        if (transport := self.request.transport) is not None:
            if reset:
                connection: socket.socket = transport.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        await for_ever()

    async def _drain(self) -> None:
        """Wait until what was written has left this process."""
        await self.request.writer.drain()

    async def _send_whole(
        self, body: bytes, content_type: str, status: int, headers: Mapping[str, str], text: str = ""
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=status, headers=self._headers(headers))
        response.headers["content-type"] = content_type
        response.content_length = len(body)
        outcome: Outcome = "error" if status >= 400 else "completed"
        self.entry.responded(status)
        if not body:
            self.entry.finish(outcome)
        await response.prepare(self.request)
        await self._write(body, text=text, outcome=outcome)
        await response.write_eof()
        return response

    def _headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        return {"request-id": self.entry.request_id, **headers}


def _marking_last(steps: Iterator[Write | Step]) -> Iterator[tuple[Write | Step, bool]]:
    """Say of each step whether it is the last that does anything."""
    step = next(steps, None)
    while step is not None:
        following = next(steps, None)
        yield step, following is None or isinstance(following, End)
        step = following


def _as_api_error(step: Fail) -> ApiError:
    return ApiError(STATUS_OF_TYPE.get(step.type, 500), step.type, step.message)


async def for_ever() -> NoReturn:
    """Wait to be cancelled."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError("unreachable: nobody sets that future")
