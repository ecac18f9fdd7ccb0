"""What the fake server is to answer, step by step. Sans-I/O: the server carries the steps out.

A :class:`Reply` is made of blocks and steps. Blocks become the events that the Messages API sends for them;
steps are all that can happen in between: time passing, a gate, a lost connection, bytes that make no sense.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, TypedDict, Unpack

from .errors import ApiError
from .steps import Block, Event, Json, Piece, Step, Wait
from .tokens import carried, output_tokens

Part: TypeAlias = Block | Step | Json
"""Of a reply; a dict is an event sent as it is."""

Writes: TypeAlias = Literal["event", "whole"] | int | Sequence[int]


class Options(TypedDict, total=False):
    """What every way of making a message takes besides its content."""

    stop_reason: str | None
    """``None`` leaves it null, as no real reply does."""
    stop_sequence: str | None
    stop_details: Json | None
    usage: Json
    """Numbers that replace or join the counted ones; every event takes those it may carry."""
    model: str
    """The model that answers; by default the one that was asked."""
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Opening:
    """What a message needs to know of its request."""

    message_id: str
    model: str
    input_tokens: int


@dataclass(frozen=True, slots=True)
class WholeBody:
    """A response that is no message at all."""

    content: bytes
    content_type: str
    status: int


_ONLY_AT_THE_END = ("output_tokens", "output_tokens_details", "server_tool_use", "iterations")
_ALSO_AT_THE_END = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One scripted answer. Immutable, so that it may be enqueued any number of times.

    The class methods make one; :meth:`in_writes`, :meth:`at_byte`, :meth:`after_event` and
    :meth:`before_headers` each return a changed copy.
    """

    parts: tuple[Part, ...] = ()
    has_envelope: bool = True
    options: Options = field(default_factory=Options)
    instead: WholeBody | ApiError | None = None
    writes: Writes = "event"
    first_steps: tuple[Wait, ...] = ()
    byte_steps: tuple[tuple[int, Step], ...] = ()
    event_steps: tuple[tuple[int, Step], ...] = ()

    # -- messages -----------------------------------------------------------------------------------------

    @classmethod
    def of(cls, *parts: Part, **options: Unpack[Options]) -> Self:
        """Answer with these blocks, between the events that open and close a message."""
        return cls(parts=parts, options=options)

    @classmethod
    def text(
        cls, *pieces: Piece, chunks: int | None = None, pause_seconds: float = 0, **options: Unpack[Options]
    ) -> Self:
        """Answer with one text block; see :meth:`Block.text`."""
        return cls.of(Block.text(*pieces, chunks=chunks, pause_seconds=pause_seconds), **options)

    @classmethod
    def tool_use(cls, name: str, input: Json | None = None, **options: Unpack[Options]) -> Self:  # noqa: A002
        """Only call one tool, and stop for its result."""
        options.setdefault("stop_reason", "tool_use")
        return cls.of(Block.tool_use(name, input), **options)

    @classmethod
    def from_events(cls, events: Iterable[Json | Step], *, headers: Mapping[str, str] | None = None) -> Self:
        """Send these events as they are, say recorded ones; nothing is added before, between or after."""
        return cls(parts=tuple(events), has_envelope=False, options={"headers": headers or {}})

    @classmethod
    def from_jsonl(cls, path: Path | str) -> Self:
        """Replay a recorded stream: a file with the JSON of one event a line."""
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        return cls.from_events(json.loads(line) for line in lines if line.strip())

    # -- other responses ----------------------------------------------------------------------------------

    @classmethod
    def error(
        cls,
        status: int,
        type: str | None = None,  # noqa: A002 - the API's own name
        message: str | None = None,
        *,
        details: Json | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Self:
        """Answer with an HTTP error in the API's form; ``type`` defaults to the API's own for that status."""
        return cls(instead=ApiError(status, type, message, details=details, headers=headers or {}))

    @classmethod
    def rate_limited(cls, retry_after_seconds: float | None = 1) -> Self:
        """Answer 429: too many requests for now; ``None`` leaves out ``retry-after``."""
        headers = {} if retry_after_seconds is None else {"retry-after": f"{retry_after_seconds:g}"}
        return cls.error(429, message="This request would exceed the rate limit.", headers=headers)

    @classmethod
    def spend_limited(cls) -> Self:
        """Answer 429 that no retry helps: the organization's spend limit is reached."""
        details = {"error_code": "enforced_spend_limit_reached"}
        return cls.error(429, message="The monthly spend limit has been reached.", details=details)

    @classmethod
    def overloaded(cls) -> Self:
        """Answer 529: the API has more to do than it can."""
        return cls.error(529, message="Overloaded")

    @classmethod
    def body(cls, content: bytes | str, *, content_type: str = "application/json", status: int = 200) -> Self:
        """Answer with any body, as a proxy or a broken server might."""
        content = content.encode() if isinstance(content, str) else content
        return cls(instead=WholeBody(content, content_type, status))

    @classmethod
    def html(cls, status: int = 200) -> Self:
        """Answer with a web page where a message should be."""
        page = "<!doctype html><title>Sign in</title><p>Please sign in to this network."
        return cls.body(page, content_type="text/html; charset=utf-8", status=status)

    @classmethod
    def empty(cls, status: int = 200) -> Self:
        """Answer with a stream that is over before its first byte."""
        return cls.body(b"", content_type="text/event-stream; charset=utf-8", status=status)

    # -- refinements --------------------------------------------------------------------------------------

    def in_writes(self, sizes: Writes) -> Self:
        """Choose the writes that the stream's bytes travel in.

        Args:
            sizes: ``"event"``, the default: one write an event. ``"whole"``: as much as possible at once, up
                to the next step that takes time. A number: so many bytes a write, wherever that cuts.
                Several: these sizes in turn, again and again.

        """
        if not isinstance(sizes, str) and min([sizes] if isinstance(sizes, int) else sizes, default=0) < 1:
            raise ValueError("a write holds at least one byte")
        return replace(self, writes=sizes)

    def at_byte(self, offset: int, *steps: Step) -> Self:
        """Take the steps once exactly ``offset`` bytes of the stream have left; never, if it is shorter."""
        return replace(self, byte_steps=self.byte_steps + tuple((offset, step) for step in steps))

    def after_event(self, number: int, *steps: Step) -> Self:
        """Take the steps after so many events (0: before the first); never, if there are fewer."""
        return replace(self, event_steps=self.event_steps + tuple((number, step) for step in steps))

    def before_headers(self, *steps: Wait) -> Self:
        """Take the steps before anything is sent, the status line included."""
        return replace(self, first_steps=self.first_steps + steps)

    @property
    def event_count(self) -> int:
        """How many events the stream has if nothing stops it: what :meth:`after_event` counts."""
        return sum(isinstance(step, Event) for step in self._all_steps(Opening("", "", 0)))

    def steps(self, opening: Opening) -> Iterator[Step]:
        """Yield everything that happens after the headers, in order."""
        waiting = deque(sorted(self.event_steps, key=lambda pair: pair[0]))
        number = 0
        for step in self._all_steps(opening):
            while waiting and waiting[0][0] <= number:
                yield waiting.popleft()[1]
            yield step
            number += isinstance(step, Event)
        while waiting and waiting[0][0] <= number:
            yield waiting.popleft()[1]

    def _all_steps(self, opening: Opening) -> Iterator[Step]:
        characters = 0
        if self.has_envelope:
            yield Event({"type": "message_start", "message": self._message(opening)})
        index = 0
        for part in self.parts:
            if isinstance(part, Block):
                part_steps: Iterable[Step] = part.steps(index)
                index += 1
            else:
                part_steps = [Event(part) if isinstance(part, Mapping) else part]
            for step in part_steps:
                characters += len(carried(step.body)) if isinstance(step, Event) else 0
                yield step
        if self.has_envelope:
            yield Event(self._message_delta(opening, output_tokens(characters)))
            yield Event({"type": "message_stop"})

    def _message(self, opening: Opening) -> dict[str, Any]:
        usage = {
            "input_tokens": opening.input_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 1,
            "service_tier": "standard",
        }
        stated = self.options.get("usage", {})
        return {
            "id": opening.message_id,
            "type": "message",
            "role": "assistant",
            "model": self.options.get("model", opening.model),
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage | {key: value for key, value in stated.items() if key not in _ONLY_AT_THE_END},
        }

    def _message_delta(self, opening: Opening, tokens: int) -> dict[str, Any]:
        usage = {
            "input_tokens": opening.input_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": tokens,
        }
        stated = self.options.get("usage", {})
        delta: dict[str, Any] = {
            "stop_reason": self.options.get("stop_reason", "end_turn"),
            "stop_sequence": self.options.get("stop_sequence"),
        }
        if details := self.options.get("stop_details"):
            delta["stop_details"] = details
        at_the_end = _ONLY_AT_THE_END + _ALSO_AT_THE_END
        return {
            "type": "message_delta",
            "delta": delta,
            "usage": usage | {key: value for key, value in stated.items() if key in at_the_end},
        }
