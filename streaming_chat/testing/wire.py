"""From a reply to what a client gets: the exact writes of a stream, or the message it amounts to. Sans-I/O."""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .script import Opening, Reply
from .steps import End, Event, Fail, Json, Raw, Step


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes that go out together, and the events that end within them."""

    data: bytes
    events: tuple[Event, ...] = ()


def plan(reply: Reply, opening: Opening) -> Iterator[Write | Step]:
    """Turn a reply's stream into exact writes, with the steps that take place between them.

    Bytes never wait behind a step: what stands before it in the script has been written when it is taken.
    """
    buffer = _WriteBuffer(reply)
    for step in reply.steps(opening):
        match step:
            case Event():
                buffer.add(step.encode(), step)
            case Raw():
                buffer.add(step.data)
            case Fail():
                buffer.add(step.event.encode(), step.event)
                yield from buffer.rest()
                yield End()
            case _:
                yield from buffer.rest()
                yield step
                continue
        yield from buffer.ready()
    yield from buffer.rest()


class _WriteBuffer:
    """Bytes on their way into writes of the sizes that the reply asks for."""

    def __init__(self, reply: Reply) -> None:
        self._pending = bytearray()
        self._written = 0
        self._ends: deque[tuple[int, Event]] = deque()
        self._steps = deque(sorted(reply.byte_steps, key=lambda pair: pair[0]))
        self._writes = reply.writes
        sizes = [self._writes] if isinstance(self._writes, int) else self._writes
        self._sizes = itertools.cycle([0]) if isinstance(sizes, str) else itertools.cycle(sizes)
        self._size = next(self._sizes)

    def add(self, data: bytes, event: Event | None = None) -> None:
        self._pending += data
        if event is not None:
            self._ends.append((self._written + len(self._pending), event))

    def ready(self) -> Iterator[Write | Step]:
        """Yield the writes that are full."""
        if self._writes == "event":
            yield from self.rest()
        elif self._writes != "whole":
            while len(self._pending) >= self._size:
                yield from self._take(self._size)
                self._size = next(self._sizes)

    def rest(self) -> Iterator[Write | Step]:
        """Yield everything, full or not."""
        yield from self.ready() if self._size else ()
        yield from self._take(len(self._pending))

    def _take(self, size: int) -> Iterator[Write | Step]:
        while self._steps and self._steps[0][0] <= self._written + size:
            offset, step = self._steps.popleft()
            if offset > self._written:
                size -= offset - self._written
                yield self._write(offset - self._written)
            yield from _inserted(step)
        if size:
            yield self._write(size)

    def _write(self, size: int) -> Write:
        data = bytes(self._pending[:size])
        del self._pending[:size]
        self._written += size
        ended = []
        while self._ends and self._ends[0][0] <= self._written:
            ended.append(self._ends.popleft()[1])
        return Write(data, tuple(ended))


def _inserted(step: Step) -> Iterator[Write | Step]:
    """Take a step between two bytes; what it sends is a write of its own."""
    match step:
        case Event():
            yield Write(step.encode(), (step,))
        case Raw(data):
            yield Write(data)
        case Fail():
            yield Write(step.event.encode(), (step.event,))
            yield End()
        case _:
            yield step


def accumulate(events: Iterable[Json]) -> dict[str, Any]:
    """Build the message that a stream amounts to, as the API returns it where no stream was asked for.

    Events that fit nowhere (a delta for a block that never started, a second ``message_start``) are left out.
    """
    message: dict[str, Any] = {}
    blocks: dict[int, dict[str, Any]] = {}
    inputs: dict[int, str] = {}
    for event in events:
        kind = event.get("type")
        if kind == "message_start" and not message:
            message = {**event["message"], "usage": dict(event["message"].get("usage", {}))}
        elif kind == "content_block_start":
            blocks[event["index"]] = dict(event["content_block"])
        elif kind == "content_block_delta" and (block := blocks.get(event["index"])) is not None:
            _apply_delta(block, event["delta"])
            inputs[event["index"]] = inputs.get(event["index"], "") + event["delta"].get("partial_json", "")
        elif kind == "content_block_stop" and inputs.get(event["index"]):
            blocks[event["index"]]["input"] = _parsed_input(inputs[event["index"]])
        elif kind == "message_delta" and message:
            message.update(event.get("delta", {}))
            message["usage"] |= {key: value for key, value in event.get("usage", {}).items() if value is not None}
    message["content"] = [block for _, block in sorted(blocks.items())]
    return message


def _apply_delta(block: dict[str, Any], delta: Json) -> None:
    match delta.get("type"):
        case "text_delta":
            block["text"] = block.get("text", "") + delta["text"]
        case "thinking_delta":
            block["thinking"] = block.get("thinking", "") + delta["thinking"]
        case "signature_delta":
            block["signature"] = delta["signature"]
        case "citations_delta":
            block["citations"] = [*(block.get("citations") or []), delta["citation"]]


def _parsed_input(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # eagerly streamed tool input may be any text
        return {}
