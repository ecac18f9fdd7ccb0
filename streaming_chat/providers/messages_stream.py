"""The Messages API's answer, streamed or whole, as provider events. Sans-I/O.

The folded operations are the message that the SDK's own accumulator makes of the same events (measured over recorded
and scripted streams, ``tests/unit/test_provider_recorded.py``), with three differences: a null field is left out, what
no database stores is replaced (:func:`~streaming_chat.blocks.storable`), and tool input that is no complete JSON
object stays text, in ``partial_json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NoReturn

import orjson

from ..blocks import Block, Op, storable
from ..exceptions import ProviderError
from .base import Alive, Began, Ended, ProviderEvent, Usage, UsageSeen
from .messages_errors import event_failure
from .sse_parser import SseError, SseParser

ALIVE: Final = Alive()
_NO_PROGRESS: Final = (ALIVE,)

_MESSAGE_DETAILS: Final = ("container", "context_management", "input_transformations", "diagnostics")
_DELTA_DETAILS: Final = ("stop_sequence", "stop_details", "container")
_EVENT_DETAILS: Final = ("context_management", "input_transformations")


class MessageStream:
    """Feed it the bytes of a response; it yields what they mean.

    Args:
        model: The model that was asked, for a message that does not name its own.
        request_id: The provider's id of the request; empty if unknown.
    """

    def __init__(self, *, model: str, request_id: str) -> None:
        self.began = False
        """Whether an event of the answer has come."""
        self.ended = False
        """Whether the answer is complete; whatever follows is ignored."""
        self._model = model
        self._request_id = request_id
        self._parser = SseParser()
        self._message_id: object = None
        self._block_count = 0
        self._has_block_events = False
        self._open: dict[int, _OpenBlock] = {}
        self._usage: dict[str, Any] = {}
        self._stop_reason: str | None = None
        self._details: dict[str, Any] = {}
        self._events: Final[dict[str, Callable[[dict[str, Any]], Iterable[ProviderEvent]]]] = {
            "message_start": self._start_message,
            "content_block_start": self._start_block,
            "content_block_delta": self._grow_block,
            "content_block_stop": self._stop_block,
            "message_delta": self._grow_message,
            "message_stop": self._stop_message,
            "error": self._fail,
        }

    def feed(self, chunk: bytes) -> Iterator[ProviderEvent]:
        """What ``chunk``, cut anywhere, completes; one ``Alive`` if that is nothing.

        Raises:
            ProviderError: The provider reports a failure, or what it sends makes no sense. What was yielded before
                stays true.
        """
        try:
            events = self._parser.feed(chunk)
        except SseError:
            raise self._malformed() from None
        if not events:
            yield ALIVE
        for name, data in events:
            if self.ended:
                return
            try:
                meaning = self._take(name, data)
            except (AttributeError, LookupError, TypeError, ValueError):
                # No JSON, or a part is missing or of another type.
                if data and (not name or name.decode("latin-1") in self._events):
                    raise self._malformed() from None
                meaning = _NO_PROGRESS
            yield from meaning

    def feed_whole(self, body: bytes) -> list[ProviderEvent]:
        """The events of an answer that comes in one piece.

        Raises:
            ProviderError: It is no message, or the report of a failure.
        """
        try:
            message = load_json(body)
            if message.get("type") == "error":
                self._fail(message)
            if message["type"] != "message":
                raise self._malformed()
            events = [
                *self._start_message({"message": message}),
                *self._grow_message({"delta": message}),
                *self._stop_message({}),
            ]
        except (AttributeError, LookupError, TypeError, ValueError):
            raise self._malformed() from None
        return [event for event in events if not isinstance(event, UsageSeen) or event.final]

    def _take(self, name: bytes, data: bytes) -> Iterable[ProviderEvent]:
        try:
            event = orjson.loads(data)
        except orjson.JSONDecodeError:
            event = load_json(data)
        kind = event.get("type")
        if kind == "content_block_delta":
            return self._grow_block(event)
        if kind is None and name == b"error":
            kind = "error"
        take = self._events.get(kind)
        return _NO_PROGRESS if take is None else take(event)

    # ---------------------------------------------------------------- the message

    def _start_message(self, event: dict[str, Any]) -> Iterable[ProviderEvent]:
        message = event["message"]
        if self.began:
            # Seen in the wild: the same start twice. Anything else would mix two answers.
            if self._has_block_events or message["id"] != self._message_id:
                raise self._malformed()
            return _NO_PROGRESS
        self._message_id = message.get("id")
        if isinstance(message.get("model"), str):
            self._model = storable(message["model"])
        if isinstance(message.get("stop_reason"), str):
            self._stop_reason = storable(message["stop_reason"])
        self._note(message, _MESSAGE_DETAILS)
        blocks = [self._plain_block(block) for block in message.get("content") or ()]
        self.began = True
        events: list[ProviderEvent] = [Began(model=self._model, request_id=self._request_id)]
        for block in blocks:
            events.append(_start(self._block_count, block))
            self._block_count += 1
        events.append(self._count_usage(message.get("usage")))
        return events

    def _grow_message(self, event: dict[str, Any]) -> Iterable[ProviderEvent]:
        self._require_message()
        delta = event.get("delta") or {}
        if isinstance(delta.get("stop_reason"), str):
            self._stop_reason = storable(delta["stop_reason"])
        self._note(delta, _DELTA_DETAILS)
        self._note(event, _EVENT_DETAILS)
        return (self._count_usage(event.get("usage")),)

    def _stop_message(self, event: dict[str, Any]) -> Iterable[ProviderEvent]:
        self._require_message()
        if self._stop_reason is None:
            raise self._malformed()
        events: list[ProviderEvent] = [op for index in list(self._open) for op in self._close(index)]
        self.ended = True
        return [
            *events,
            UsageSeen(usage=usage_of(self._usage), final=True),
            Ended(stop_reason=self._stop_reason, details=self._details),
        ]

    def _count_usage(self, usage: dict[str, Any] | None) -> UsageSeen:
        # The counts are totals; what a later event omits keeps its earlier value.
        self._usage |= self._plain({key: value for key, value in (usage or {}).items() if value is not None})
        return UsageSeen(usage=usage_of(self._usage))

    def _note(self, source: dict[str, Any], fields: Iterable[str]) -> None:
        for field in fields:
            if source.get(field) is not None:
                self._details[field] = self._plain(source[field])

    # ---------------------------------------------------------------- its blocks

    def _start_block(self, event: dict[str, Any]) -> Iterable[ProviderEvent]:
        self._require_message()
        index = event["index"]
        if type(index) is not int or index != self._block_count:
            raise self._malformed()
        block = self._plain_block(event["content_block"])
        self._has_block_events = True
        self._block_count += 1
        self._open[index] = _OpenBlock(index, block)
        if block["type"] == "fallback" and isinstance(block.get("to"), dict):
            # From here on another model answers.
            self._note(block["to"], ("model",))
        return (_start(index, block),)

    def _grow_block(self, event: dict[str, Any]) -> Iterable[ProviderEvent]:
        block = self._open[event["index"]]  # LookupError: not started, or stopped already
        delta = event["delta"]
        field = block.appends.get(delta["type"])
        if field is None:
            op = block.other(delta, self._plain)
            return _NO_PROGRESS if op is None else (op,)
        text = block.append(field, delta.get(field))
        if not text:
            return _NO_PROGRESS
        return ({"op": "append", "index": block.index, "field": field, "text": text},)

    def _stop_block(self, event: dict[str, Any]) -> Iterable[ProviderEvent]:
        self._require_message()
        return self._close(event["index"]) or _NO_PROGRESS

    def _close(self, index: int) -> list[Op]:
        block = self._open.pop(index)
        ops: list[Op] = [
            {"op": "append", "index": block.index, "field": field, "text": storable(held)}
            for field, held in block.held.items()
        ]
        arguments = "".join(block.arguments)
        if arguments:
            parsed = _parse_object(arguments)
            if parsed is not None:
                fields = {"input": parsed, "partial_json": None}
                ops.append({"op": "merge", "index": block.index, "fields": fields})
        return ops

    def _plain_block(self, block: Any) -> Block:
        plain = self._plain(block)
        if not isinstance(plain, dict) or not isinstance(plain.get("type"), str):
            raise self._malformed()
        return plain

    # ---------------------------------------------------------------- failures

    def _plain(self, value: Any) -> Any:
        plain = _plain(value)
        if plain is None and value is not None:
            raise self._malformed()
        return plain

    def _require_message(self) -> None:
        if not self.began:
            raise self._malformed()

    def _fail(self, event: dict[str, Any]) -> NoReturn:
        raise event_failure(event, request_id=self._request_id or None)

    def _malformed(self) -> ProviderError:
        # An answer that has begun is paid for, and would go wrong again.
        return ProviderError(
            "provider_error",
            retryable=not self.began,
            request_id=self._request_id or None,
            may_be_billed=True,
        )


class _OpenBlock:
    """A block that has started and not stopped: which deltas fit it, and what is held back."""

    __slots__ = ("appends", "arguments", "held", "index", "others")

    def __init__(self, index: int, block: Block) -> None:
        self.index = index
        self.held: dict[str, str] = {}
        """Per field, the first half of a character whose second half is still to come."""
        self.arguments: list[str] = []
        # A known type of block takes what the SDK's accumulator lets it take; an unknown one what it has a field for.
        kind: str = block["type"]
        fitting = {
            "text_delta": ("text", kind == "text" or "text" in block),
            "thinking_delta": ("thinking", kind == "thinking" or "thinking" in block),
            "input_json_delta": ("partial_json", kind.endswith("tool_use") or "input" in block),
        }
        self.appends = {
            delta_type: field
            for delta_type, (field, fits) in fitting.items()
            if fits and isinstance(block.get(field), str | None)
        }
        others = {
            "signature_delta": kind == "thinking" or "signature" in block,
            "compaction_delta": kind == "compaction",
            "citations_delta": (kind == "text" or "citations" in block)
            and isinstance(block.get("citations"), list | None),
        }
        self.others = frozenset(delta_type for delta_type, fits in others.items() if fits)

    def append(self, field: str, text: Any) -> str:
        """What of ``text`` can be shown now."""
        if not text:
            return ""
        if not isinstance(text, str):
            raise TypeError(field)
        if field == "partial_json":
            self.arguments.append(text)
        if self.held:
            text = self.held.pop(field, "") + text
        if "\ud800" <= text[-1] <= "\udbff":
            self.held[field] = text[-1]
            text = text[:-1]
        return storable(text)  # type: ignore[no-any-return]

    def other(self, delta: dict[str, Any], plain: Callable[[Any], Any]) -> Op | None:
        """The operation of a delta that is no text; None for one that is unknown or does not fit."""
        kind = delta["type"]
        if kind not in self.others:
            return None
        if kind == "citations_delta":
            return {"op": "push", "index": self.index, "field": "citations", "value": plain(delta["citation"])}
        names = ("signature",) if kind == "signature_delta" else ("content", "encrypted_content")
        return {"op": "merge", "index": self.index, "fields": plain({name: delta.get(name) for name in names})}


def usage_of(raw: dict[str, Any]) -> Usage:
    """The API's usage, in our terms."""
    details = raw.get("output_tokens_details")
    return Usage(
        input_tokens=_count(raw.get("input_tokens")),
        output_tokens=_count(raw.get("output_tokens")),
        cache_creation_input_tokens=_count(raw.get("cache_creation_input_tokens")),
        cache_read_input_tokens=_count(raw.get("cache_read_input_tokens")),
        thinking_tokens=_count(details.get("thinking_tokens")) if isinstance(details, dict) else None,
        raw=dict(raw),
    )


def load_json(data: bytes | str) -> Any:
    """``data`` as JSON; lone surrogates are allowed, as the API's own splitting of text can make them.

    Raises:
        ValueError: It is no JSON, or holds NaN, an infinity or too deep a nesting.
    """
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        pass
    text = data.decode("utf-8", "replace") if isinstance(data, bytes) else data
    try:
        return json.loads(text, parse_constant=_refuse, parse_int=_integer, parse_float=_finite)
    except RecursionError:
        raise ValueError("too deep") from None


def _parse_object(text: str) -> dict[str, Any] | None:
    try:
        parsed = load_json(text)
    except ValueError:
        return None
    return _plain(parsed) if isinstance(parsed, dict) else None


def _plain(value: Any) -> Any:
    """``value`` storable; None if it could not be written as JSON again."""
    try:
        plain = storable(value)
        orjson.dumps(plain)
    except (TypeError, RecursionError):
        return None
    return plain


def _start(index: int, block: Block) -> Op:
    return {"op": "start", "index": index, "block": block}


def _count(value: Any) -> int | None:
    return value if type(value) is int else None


def _refuse(constant: str) -> Any:
    raise ValueError(constant)


def _integer(digits: str) -> int | float:
    number = int(digits)
    return number if -(2**63) <= number < 2**64 else _finite(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError(digits)
    return number
