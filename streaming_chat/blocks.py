"""Content blocks, and the four operations that build them. Sans-I/O.

A message is a list of content blocks in the form of the Anthropic Messages API; a text answer is
``[{"type": "text", "text": "Hello"}]``. A reply grows by operations: the provider yields them, the journal stores
them, every viewer folds them, and the stored message *is* their fold. So what a viewer was shown and what is kept
can only differ if an operation is lost, and ``seq`` finds that.

    {"op": "start",  "index": 0, "block": {"type": "text", "text": ""}}        block 0 begins
    {"op": "append", "index": 0, "field": "text", "text": "Hel"}               a string field grows
    {"op": "push",   "index": 0, "field": "citations", "value": {...}}         a list field grows
    {"op": "merge",  "index": 1, "fields": {"input": {}, "partial_json": null}}  fields are set; null removes one

A tool call whose arguments are still arriving has a ``partial_json`` field; it goes when they are complete.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

from typing_extensions import TypedDict

Block: TypeAlias = dict[str, Any]
"""A content block as the API has it; unknown types are kept as they came."""


class Start(TypedDict):
    """Begin block ``index``, which must be the next one, with the content ``block``."""

    op: Literal["start"]
    index: int
    block: Block


class Append(TypedDict):
    """Append ``text`` to the string ``field`` of block ``index``; a missing field counts as empty."""

    op: Literal["append"]
    index: int
    field: str
    text: str


class Push(TypedDict):
    """Append ``value`` to the list ``field`` of block ``index``; a missing or null field counts as empty."""

    op: Literal["push"]
    index: int
    field: str
    value: Any


class Merge(TypedDict):
    """Set ``fields`` of block ``index``; a null removes the field (RFC 7396, one level)."""

    op: Literal["merge"]
    index: int
    fields: dict[str, Any]


Op: TypeAlias = Start | Append | Push | Merge


class BlockError(ValueError):
    """An operation that does not fit the blocks so far; they are unchanged."""


class BlockFold:
    """Fold operations into blocks, at a cost per operation that does not grow with the text.

    Args:
        blocks: Where to begin; not modified. None means an empty message.
    """

    def __init__(self, blocks: Iterable[Block] | None = None) -> None:
        self._blocks: list[Block] = []
        self._parts: list[dict[str, list[str]]] = []
        for block in blocks or ():
            self._begin(block)

    def __len__(self) -> int:
        return len(self._blocks)

    def apply(self, op: Op) -> None:
        """Apply one operation.

        Raises:
            BlockError: It does not fit; nothing was changed.
        """
        if op["op"] == "start":
            if op["index"] != len(self._blocks):
                raise BlockError(f"block {op['index']} cannot start after {len(self._blocks)} blocks")
            self._begin(op["block"])
            return
        if not 0 <= op["index"] < len(self._blocks):
            raise BlockError(f"block {op['index']} has not started")
        block = self._blocks[op["index"]]
        if op["op"] == "append":
            parts = self._parts[op["index"]]
            if op["field"] not in parts:
                existing = "" if block.get(op["field"]) is None else block[op["field"]]
                if not isinstance(existing, str):
                    raise BlockError(f"{op['field']} is not text")
                parts[op["field"]] = [existing]
            parts[op["field"]].append(op["text"])
        elif op["op"] == "push":
            items = [] if block.get(op["field"]) is None else block[op["field"]]
            if not isinstance(items, list) or op["field"] in self._parts[op["index"]]:
                raise BlockError(f"{op['field']} is not a list")
            block[op["field"]] = items
            items.append(op["value"])
        else:
            for field, value in op["fields"].items():
                self._parts[op["index"]].pop(field, None)
                if value is None:
                    block.pop(field, None)
                else:
                    block[field] = list(value) if isinstance(value, list) else value  # `push` grows it in place

    def blocks(self) -> list[Block]:
        """The blocks so far, as a new list that later operations do not change."""
        result = []
        for block, parts in zip(self._blocks, self._parts, strict=True):
            for field, pieces in parts.items():
                if len(pieces) > 1:
                    pieces[:] = ["".join(pieces)]
                block[field] = pieces[0]
            result.append({key: list(value) if isinstance(value, list) else value for key, value in block.items()})
        return result

    def _begin(self, block: Block) -> None:
        # Lists are copied, because ``push`` grows them in place.
        self._blocks.append({k: list(v) if isinstance(v, list) else v for k, v in block.items()})
        self._parts.append({})


def fold(ops: Iterable[Op], blocks: Iterable[Block] | None = None) -> list[Block]:
    """The blocks that ``ops`` make of ``blocks`` (None: of an empty message).

    Raises:
        BlockError: An operation does not fit.
    """
    builder = BlockFold(blocks)
    for op in ops:
        builder.apply(op)
    return builder.blocks()


def ops_of(blocks: Iterable[Block]) -> list[Op]:
    """Operations that build ``blocks`` from nothing, for a viewer that must start over."""
    return [{"op": "start", "index": index, "block": block} for index, block in enumerate(blocks)]


def text_of(blocks: Iterable[Block]) -> str:
    """The words of a message, for search, titles and terminals.

    Neighbouring text blocks belong to one sentence (citations split them) and are joined as they are; other blocks
    between them make a paragraph.
    """
    pieces: list[str] = []
    paragraph_ended = False
    for block in blocks:
        if block.get("type") != "text":
            paragraph_ended = bool(pieces)
        elif block.get("text"):
            pieces.append("\n\n" + block["text"] if paragraph_ended else block["text"])
            paragraph_ended = False
    return "".join(pieces)


def text_block(text: str) -> Block:
    """A block that holds ``text``."""
    return {"type": "text", "text": text}


_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def storable(value: Any) -> Any:
    """``value`` with what no database stores replaced by U+FFFD: NUL and lone surrogates, at any depth.

    A high and a low surrogate that arrived apart are joined into the character they mean.
    """
    if isinstance(value, str):
        if _UNSTORABLE.search(value) is None:
            return value
        joined = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return joined.replace("\x00", "\N{REPLACEMENT CHARACTER}")
    if isinstance(value, list):
        return [storable(item) for item in value]
    if isinstance(value, dict):
        return {storable(key): storable(item) for key, item in value.items()}
    return value


class TextReader:
    """The words of a growing message, piece by piece: what :func:`text_of` gives, without reading it all again."""

    def __init__(self) -> None:
        self._types: list[bool] = []
        self._last_text_index: int | None = None

    def feed(self, op: Op) -> str:
        """The words that ``op`` adds at the end; empty for anything else."""
        if op["op"] == "start":
            self._types.append(op["block"].get("type") == "text")
            return self._words(op["index"], op["block"].get("text"))
        if op["op"] == "append" and op["field"] == "text":
            return self._words(op["index"], op["text"])
        return ""

    def _words(self, index: int, text: object) -> str:
        if not (self._types[index] and isinstance(text, str) and text):
            return ""
        before, self._last_text_index = self._last_text_index, index
        if before is None or before == index or all(self._types[before : index + 1]):
            return text
        return "\n\n" + text
