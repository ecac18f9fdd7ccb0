from __future__ import annotations

import copy
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from streaming_chat.blocks import BlockFold, Op, fold
from streaming_chat.generation.coalescer import Coalescer


@st.composite
def fitting_ops(draw: st.DrawFn) -> list[Op]:
    ops: list[Op] = []
    blocks = 0
    for _ in range(draw(st.integers(0, 25))):
        index = draw(st.integers(0, max(0, blocks - 1)))
        text = draw(st.text(max_size=4))
        kind = draw(st.sampled_from(["start", "append", "append", "append", "push", "merge"])) if blocks else "start"
        if kind == "start":
            ops.append({"op": "start", "index": blocks, "block": {"type": "text", "text": text, "citations": [0]}})
            blocks += 1
        elif kind == "append":
            field = draw(st.sampled_from(["text", "thinking"]))
            ops.append({"op": "append", "index": index, "field": field, "text": text})
        elif kind == "push":
            ops.append({"op": "push", "index": index, "field": "citations", "value": text})
        else:
            changes: list[dict[str, Any]] = [{"text": text}, {"thinking": None}, {"citations": [text]}]
            fields = draw(st.sampled_from(changes))
            ops.append({"op": "merge", "index": index, "fields": fields})
    return ops


@given(fitting_ops(), st.sets(st.integers(0, 25)))
def test_what_is_taken_folds_to_what_was_pushed_wherever_it_is_taken(ops: list[Op], takes: set[int]) -> None:
    expected = fold(copy.deepcopy(ops))
    coalescer, live, taken = Coalescer(), BlockFold(), []
    for number, op in enumerate(ops):
        live.apply(op)  # as the engine does, with the same objects
        coalescer.push(op)
        if number in takes:
            taken += coalescer.take()
            assert not coalescer
            assert coalescer.size_chars == 0
    taken += coalescer.take()
    assert fold(taken) == expected == live.blocks()
    assert len(taken) <= len(ops)


def test_neighbouring_appends_become_one_and_others_stay_apart() -> None:
    coalescer = Coalescer()
    for text in ("Hel", "lo"):
        coalescer.push({"op": "append", "index": 0, "field": "text", "text": text})
    coalescer.push({"op": "append", "index": 0, "field": "thinking", "text": "hm"})
    coalescer.push({"op": "append", "index": 1, "field": "thinking", "text": "so"})
    coalescer.push({"op": "push", "index": 1, "field": "citations", "value": 1})
    coalescer.push({"op": "append", "index": 1, "field": "thinking", "text": "!"})
    assert coalescer.take() == [
        {"op": "append", "index": 0, "field": "text", "text": "Hello"},
        {"op": "append", "index": 0, "field": "thinking", "text": "hm"},
        {"op": "append", "index": 1, "field": "thinking", "text": "so"},
        {"op": "push", "index": 1, "field": "citations", "value": 1},
        {"op": "append", "index": 1, "field": "thinking", "text": "!"},
    ]
    assert coalescer.take() == []


def test_what_was_taken_does_not_grow_any_more() -> None:
    coalescer = Coalescer()
    coalescer.push({"op": "append", "index": 0, "field": "text", "text": "a"})
    taken = coalescer.take()
    coalescer.push({"op": "append", "index": 0, "field": "text", "text": "b"})
    assert taken == [{"op": "append", "index": 0, "field": "text", "text": "a"}]
    assert coalescer.take() == [{"op": "append", "index": 0, "field": "text", "text": "b"}]


def test_it_is_true_while_it_holds_something_and_knows_how_much_text() -> None:
    coalescer = Coalescer()
    assert not coalescer
    coalescer.push({"op": "append", "index": 0, "field": "text", "text": "abc"})
    coalescer.push({"op": "append", "index": 0, "field": "text", "text": "de"})
    assert coalescer
    assert coalescer.size_chars == 5
