"""Merge the provider's many small operations into few. Sans-I/O."""

from __future__ import annotations

from ..blocks import Append, Op


class Coalescer:
    """Hold operations until the journal takes them; neighbouring appends to one field become one.

    It has no clock: the journal takes when it commits, so the more it has to do, the more is merged.
    """

    def __init__(self) -> None:
        self._ops: list[Op] = []
        self._open: Append | None = None
        self._pieces: list[str] = []
        self.size_chars = 0
        """Text held back, in characters."""

    def __bool__(self) -> bool:
        return bool(self._ops)

    def push(self, op: Op) -> None:
        """Add ``op`` after all others."""
        if op["op"] == "append":
            text = op["text"]
            self.size_chars += len(text)
            last = self._open
            if last is not None and last["index"] == op["index"] and last["field"] == op["field"]:
                self._pieces.append(text)
                return
            self._close()
            self._open = {"op": "append", "index": op["index"], "field": op["field"], "text": ""}
            self._pieces = [text]
            self._ops.append(self._open)
            return
        self._close()
        self.size_chars += 64
        self._ops.append(op)

    def take(self) -> list[Op]:
        """Everything held back, in order; nothing is held back afterwards."""
        self._close()
        ops, self._ops = self._ops, []
        self.size_chars = 0
        return ops

    def _close(self) -> None:
        if self._open is not None:
            self._open["text"] = "".join(self._pieces)
            self._open = None
            self._pieces = []
