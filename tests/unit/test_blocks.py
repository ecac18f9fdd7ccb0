from __future__ import annotations

import copy
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming_chat.blocks import (
    Block,
    BlockError,
    BlockFold,
    Op,
    TextReader,
    fold,
    ops_of,
    storable,
    text_block,
    text_of,
)

TEXTS = st.text(max_size=8)
FIELDS = st.sampled_from(["text", "thinking", "citations", "input"])
VALUES = st.none() | st.integers(0, 9) | TEXTS | st.lists(st.integers(0, 9), max_size=3) | st.just({"a": 1})
BLOCKS: st.SearchStrategy[Block] = st.builds(
    lambda kind, fields: {"type": kind, **fields},
    st.sampled_from(["text", "thinking", "tool_use", "of_tomorrow"]),
    st.dictionaries(FIELDS, VALUES, max_size=3),
)
OPS: st.SearchStrategy[Op] = st.one_of(
    st.builds(lambda i, b: {"op": "start", "index": i, "block": b}, st.integers(-1, 3), BLOCKS),
    st.builds(lambda i, f, t: {"op": "append", "index": i, "field": f, "text": t}, st.integers(-1, 3), FIELDS, TEXTS),
    st.builds(lambda i, f, v: {"op": "push", "index": i, "field": f, "value": v}, st.integers(-1, 3), FIELDS, VALUES),
    st.builds(
        lambda i, f: {"op": "merge", "index": i, "fields": f},
        st.integers(-1, 3),
        st.dictionaries(FIELDS, VALUES, max_size=3),
    ),
)


def plainly_applied(blocks: list[Block], op: Any) -> list[Block] | None:
    """What the module's docstring says that ``op`` does, without a thought for its cost; None: it does not fit."""
    blocks = copy.deepcopy(blocks)
    if op["op"] == "start":
        return [*blocks, op["block"]] if op["index"] == len(blocks) else None
    if not 0 <= op["index"] < len(blocks):
        return None
    block = blocks[op["index"]]
    if op["op"] == "merge":
        block |= op["fields"]
        blocks[op["index"]] = {k: v for k, v in block.items() if not (k in op["fields"] and v is None)}
        return blocks
    kind, empty = (str, "") if op["op"] == "append" else (list, [])
    before = block.get(op["field"])
    if before is None:
        before = empty
    if not isinstance(before, kind):
        return None
    block[op["field"]] = before + (op["text"] if op["op"] == "append" else [op["value"]])
    return blocks


@given(st.lists(OPS, max_size=30))
def test_folding_does_what_each_operation_says_and_a_misfit_changes_nothing(ops: list[Op]) -> None:
    given_ops = copy.deepcopy(ops)
    builder = BlockFold()
    expected: list[Block] = []
    for op in ops:
        after = plainly_applied(expected, op)
        if after is None:
            with pytest.raises(BlockError):
                builder.apply(op)
        else:
            builder.apply(op)
            expected = after
    assert builder.blocks() == expected
    assert len(builder) == len(expected)
    assert ops == given_ops, "an operation was changed by being applied"


@given(st.lists(OPS, max_size=30), st.integers(0, 30))
def test_a_fold_may_be_cut_anywhere_and_continued(ops: list[Op], cut: int) -> None:
    fitting: list[Op] = []
    builder = BlockFold()
    for op in ops:
        try:
            builder.apply(op)
        except BlockError:
            continue
        fitting.append(op)
    begun = fold(fitting[:cut])
    kept = copy.deepcopy(begun)
    assert fold(fitting[cut:], begun) == fold(fitting) == builder.blocks()
    assert begun == kept


@given(st.lists(BLOCKS, max_size=5))
def test_operations_of_blocks_build_the_same_blocks(blocks: list[Block]) -> None:
    assert fold(ops_of(blocks)) == blocks


def test_blocks_that_were_handed_out_do_not_change_any_more() -> None:
    builder = BlockFold([{"type": "text", "text": "a", "citations": [1]}])
    builder.apply({"op": "append", "index": 0, "field": "text", "text": "b"})
    before = builder.blocks()
    builder.apply({"op": "append", "index": 0, "field": "text", "text": "c"})
    builder.apply({"op": "push", "index": 0, "field": "citations", "value": 2})
    assert before == [{"type": "text", "text": "ab", "citations": [1]}]
    assert builder.blocks() == [{"type": "text", "text": "abc", "citations": [1, 2]}]


@pytest.mark.parametrize(
    "op",
    [
        {"op": "start", "index": 2, "block": {"type": "text"}},
        {"op": "start", "index": 0, "block": {"type": "text"}},
        {"op": "append", "index": 1, "field": "text", "text": "x"},
        {"op": "append", "index": -1, "field": "text", "text": "x"},
        {"op": "append", "index": 0, "field": "citations", "text": "x"},
        {"op": "append", "index": 0, "field": "empty", "text": "x"},
        {"op": "push", "index": 0, "field": "text", "value": 1},
        {"op": "push", "index": 0, "field": "grown", "value": 1},
        {"op": "merge", "index": 7, "fields": {}},
    ],
)
def test_an_operation_that_does_not_fit_is_refused(op: Op) -> None:
    builder = BlockFold([{"type": "text", "text": "a", "citations": [1], "empty": []}])
    builder.apply({"op": "append", "index": 0, "field": "grown", "text": "y"})
    before = builder.blocks()
    with pytest.raises(BlockError):
        builder.apply(op)
    assert builder.blocks() == before


# ---------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ([], ""),
        ([text_block("one")], "one"),
        ([text_block("one"), text_block(" two")], "one two"),
        ([text_block("one"), {"type": "tool_use", "input": {}}, text_block("two")], "one\n\ntwo"),
        ([text_block("one"), {"type": "tool_use"}, text_block(""), text_block("two")], "one\n\ntwo"),
        ([text_block("one"), text_block(""), text_block("two")], "onetwo"),
        ([{"type": "thinking", "thinking": "hm"}, text_block("one")], "one"),
        ([text_block("one"), {"type": "thinking", "thinking": "hm"}], "one"),
        ([{"type": "text", "text": None}, {"type": "of_tomorrow", "text": "no"}], ""),
    ],
)
def test_text_of_joins_neighbours_and_parts_paragraphs(blocks: list[Block], words: str) -> None:
    assert text_of(blocks) == words


@st.composite
def growing_messages(draw: st.DrawFn) -> list[Op]:
    """Operations as providers send them: each block complete before the next begins."""
    ops: list[Op] = []
    for index in range(draw(st.integers(0, 5))):
        kind = draw(st.sampled_from(["text", "thinking", "tool_use", "server_tool_use"]))
        field = {"text": "text", "thinking": "thinking"}.get(kind, "partial_json")
        ops.append({"op": "start", "index": index, "block": {"type": kind, field: draw(TEXTS)}})
        ops += [{"op": "append", "index": index, "field": field, "text": t} for t in draw(st.lists(TEXTS, max_size=4))]
        if kind == "text" and draw(st.booleans()):
            ops.append({"op": "push", "index": index, "field": "citations", "value": {"cited_text": "x"}})
        if field == "partial_json":
            ops.append({"op": "merge", "index": index, "fields": {"input": {}, "partial_json": None}})
    return ops


@given(growing_messages())
def test_the_reader_gives_the_same_words_piece_by_piece(ops: list[Op]) -> None:
    reader = TextReader()
    assert "".join(reader.feed(op) for op in ops) == text_of(fold(ops))


# ---------------------------------------------------------------------------------------------------- storable

ANY_TEXT = st.text(st.characters(codec=None), max_size=12) | st.text(
    st.sampled_from("a\x00\ud83d\ude00\udfff\ud800\ufeff\N{GRINNING FACE}"), max_size=8
)


@given(st.recursive(ANY_TEXT | st.none(), lambda s: st.lists(s) | st.dictionaries(ANY_TEXT, s)))
def test_what_is_storable_can_be_written_as_json_and_holds_no_nul(value: Any) -> None:
    assert b"\\u0000" not in orjson.dumps(storable(value))


@given(st.text(st.characters(codec="utf-8", exclude_characters="\x00")))
def test_what_can_be_stored_stays_as_it_is(text: str) -> None:
    assert storable(text) == text


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a\x00b", "a\ufffdb"),
        ("\ud83d\ude00", "\N{GRINNING FACE}"),
        ("a\ud83d", "a\ufffd"),
        ("\ude00b", "\ufffdb"),
        ("\ud83dx\ude00", "\ufffdx\ufffd"),
        ({"\x00": ["\ud800", 1, None, True]}, {"\ufffd": ["\ufffd", 1, None, True]}),
    ],
)
def test_unstorable_characters_are_replaced_at_any_depth(before: Any, after: Any) -> None:
    assert storable(before) == after
