"""What can happen while the fake server answers: events, and all that may come between them. Sans-I/O."""

from __future__ import annotations

import itertools
import json
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

from .gate import Gate

Json: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Event:
    """One event of the stream, sent exactly as given: right, wrong or unknown.

    ``name`` is the name on the SSE ``event:`` line, by default the event's own ``type``.
    """

    body: Json
    name: str | None = None

    def encode(self) -> bytes:
        """Return the event in its Server-Sent Events form."""
        name = self.name if self.name is not None else self.body.get("type", "message")
        try:
            return f"event: {name}\ndata: {json.dumps(self.body, ensure_ascii=False)}\n\n".encode()
        except UnicodeEncodeError:  # half of a surrogate pair has no UTF-8 form, only an escaped one
            return f"event: {name}\ndata: {json.dumps(self.body)}\n\n".encode()


@dataclass(frozen=True, slots=True)
class Raw:
    """Bytes sent as they are, say an event whose JSON is broken. Skipped where no stream was asked for."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Delay:
    """Nothing happens for some seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Stall:
    """Nothing happens any more; the connection stays open."""


@dataclass(frozen=True, slots=True)
class Pings:
    """A ping every so many seconds: ``count`` of them, or for ever."""

    every_seconds: float = 0.01
    count: int | None = None


@dataclass(frozen=True, slots=True)
class Cut:
    """The connection is lost: closed in the middle of the response, or with ``reset`` by a TCP RST."""

    reset: bool = False


@dataclass(frozen=True, slots=True)
class End:
    """The response ends here, cleanly, whatever was still to come."""


@dataclass(frozen=True, slots=True)
class Fail:
    """The API gives up: an ``error`` event and the end; as an HTTP error where no stream was asked for."""

    type: str = "overloaded_error"
    message: str = "The fake server was told to fail here."

    @property
    def event(self) -> Event:
        """What a stream sends for it."""
        return Event({"type": "error", "error": {"type": self.type, "message": self.message}})


Wait: TypeAlias = Delay | Gate | Stall | Cut | Fail
Step: TypeAlias = Wait | Event | Raw | Pings | End
Piece: TypeAlias = str | Json | Step
"""Inside a block: text becomes the block's own kind of delta, a dict is a delta sent as it is."""

PING = Event({"type": "ping"})

_DELTA_OF_BLOCK = {"text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking")}
_TOOL_DELTA = ("input_json_delta", "partial_json")


def _split(text: str, chunks: int) -> list[str]:
    """Cut into so many pieces of nearly equal length (fewer, if there are not so many characters)."""
    chunks = max(1, min(chunks, len(text)))
    bounds = [len(text) * n // chunks for n in range(chunks + 1)]
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


def _new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True)
class Block:
    """One content block: how it starts, and the deltas (and steps) that fill it."""

    start: Json
    pieces: tuple[Piece, ...] = ()

    @classmethod
    def text(cls, *pieces: Piece, chunks: int | None = None, pause_seconds: float = 0) -> Self:
        """Make a text block, one delta a piece.

        Args:
            pieces: Strings; dicts, which are deltas as they are (say a ``citations_delta``); steps.
            chunks: Cut every string into so many deltas.
            pause_seconds: Time before each delta but the first.

        """
        return cls({"type": "text", "text": ""}, _paced(pieces, chunks, pause_seconds))

    @classmethod
    def thinking(cls, *pieces: Piece, signature: str | None = "signature", chunks: int | None = None) -> Self:
        """Make thinking and its signature; without pieces, thinking that the API keeps to itself."""
        signed: tuple[Piece, ...] = () if signature is None else ({"type": "signature_delta", "signature": signature},)
        return cls({"type": "thinking", "thinking": "", "signature": ""}, _paced(pieces, chunks) + signed)

    @classmethod
    def tool_use(
        cls,
        name: str,
        input: Json | None = None,  # noqa: A002 - the API's own name
        *pieces: Piece,
        id: str | None = None,  # noqa: A002 - the API's own name
        type: str = "tool_use",  # noqa: A002 - the API's own name
        chunks: int = 3,
    ) -> Self:
        """Make a tool call whose input arrives as JSON in ``chunks`` deltas after an empty one.

        ``pieces`` follow that input: pass ``None`` for ``input`` to write the partial JSON, broken or not,
        by hand.
        """
        start = {"type": type, "id": id or _new_id("toolu"), "name": name, "input": {}}
        written = _split(json.dumps(input, ensure_ascii=False), chunks) if input else []
        return cls(start, ("", *written, *pieces))

    @classmethod
    def server_tool_use(
        cls,
        name: str,
        input: Json | None = None,  # noqa: A002 - the API's own name
        *pieces: Piece,
        chunks: int = 3,
    ) -> Self:
        """Make a call of a tool that the API runs itself; its result is a :meth:`whole` block."""
        return cls.tool_use(name, input, *pieces, id=_new_id("srvtoolu"), type="server_tool_use", chunks=chunks)

    @classmethod
    def whole(cls, block: Json) -> Self:
        """Make any block that comes in one piece: a server tool's result, redacted thinking, any other."""
        return cls(block)

    def steps(self, index: int) -> Iterator[Step]:
        """Yield the block's events, and the steps between them."""
        yield Event({"type": "content_block_start", "index": index, "content_block": dict(self.start)})
        delta_type, key = _DELTA_OF_BLOCK.get(str(self.start.get("type")), _TOOL_DELTA)
        for piece in self.pieces:
            if isinstance(piece, str | Mapping):
                delta = {"type": delta_type, key: piece} if isinstance(piece, str) else piece
                yield Event({"type": "content_block_delta", "index": index, "delta": delta})
            else:
                yield piece
        yield Event({"type": "content_block_stop", "index": index})


def _paced(pieces: Iterable[Piece], chunks: int | None, pause_seconds: float = 0) -> tuple[Piece, ...]:
    paced: list[Piece] = []
    for piece in pieces:
        parts: list[Piece] = [*_split(piece, chunks)] if isinstance(piece, str) and chunks else [piece]
        for part in parts:
            if pause_seconds and paced:
                paced.append(Delay(pause_seconds))
            paced.append(part)
    return tuple(paced)
