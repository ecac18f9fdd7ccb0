"""Server-Sent Events, read as they arrive. Sans-I/O.

The SDK's own decoder costs twice as much per event and can't be asked whether a read completed anything.
"""

from __future__ import annotations

from typing import Final, TypeAlias

SseEvent: TypeAlias = tuple[bytes, bytes]
"""Name (empty if the event has none) and data."""

MAX_EVENT_BYTES: Final = 16 * 1024 * 1024
"""Longest event that is waited for; results of server tools come in one event and may be large."""

_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


class SseError(ValueError):
    """What arrives is no event stream."""


class SseParser:
    """Feed it bytes, cut anywhere; it returns the events that they complete.

    Follows the HTML standard's rules for lines (LF, CRLF and CR), comments, several ``data`` lines and the byte
    order mark. ``id`` and ``retry`` are for clients that reconnect, and ignored. An event that no blank line has
    ended is not returned.
    """

    def __init__(self) -> None:
        self._pending = bytearray()
        self._ended_with_cr = False
        self._is_first = True

    def feed(self, chunk: bytes) -> list[SseEvent]:
        """The events that ``chunk`` completes.

        Raises:
            SseError: One event is longer than :data:`MAX_EVENT_BYTES`.
        """
        pending = self._pending
        if len(pending) > MAX_EVENT_BYTES:
            raise SseError("event too long")
        if self._ended_with_cr or b"\r" in chunk:
            chunk = self._unify_line_ends(chunk)
        searched = max(len(pending) - 1, 0)
        pending += chunk
        end = pending.rfind(b"\n\n", searched)
        if end < 0:
            return []
        complete = bytes(pending[:end])
        del pending[: end + 2]
        if self._is_first:
            self._is_first = False
            complete = complete.removeprefix(_BYTE_ORDER_MARK)
        events: list[SseEvent] = []
        for block in complete.split(b"\n\n"):
            # The form in which the API sends nearly all of them: two lines.
            name_end = block.find(b"\n")
            if (
                block.startswith(b"event: ")
                and block.startswith(b"data: ", name_end + 1)
                and block.find(b"\n", name_end + 1) < 0
            ):
                events.append((block[7:name_end], block[name_end + 7 :]))
            else:
                _parse_lines(block, events)
        return events

    def _unify_line_ends(self, chunk: bytes) -> bytes:
        if self._ended_with_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
            self._ended_with_cr = False
            if not chunk:
                return chunk
        if chunk:
            self._ended_with_cr = chunk.endswith(b"\r")
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _parse_lines(block: bytes, events: list[SseEvent]) -> None:
    name, data = b"", []
    for line in block.split(b"\n"):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"event":
            name = value
        elif field == b"data":
            data.append(value)
    if data:
        events.append((name, b"\n".join(data)))
