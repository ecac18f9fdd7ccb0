"""The gap rule, by the cases that the browser's reducer is tested with, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streaming_chat.protocol import Cursor, Frame

FIXTURES = json.loads((Path(__file__).parent.parent / "fixtures" / "cursor.json").read_text())


def frame_of(event: dict[str, Any]) -> Frame:
    """The event as the hub hands it on."""
    turn = event.get("turn", "")
    return Frame(
        event["type"],
        json.dumps(event),
        turn if isinstance(turn, str) else turn["id"],
        event.get("first", 0),
        event.get("seq", 0) if isinstance(turn, str) else turn.get("seq", 0),
        event.get("revision", 0),
    )


@pytest.mark.parametrize("case", FIXTURES["cases"], ids=lambda case: case["name"])
def test_cursor_follows_the_shared_cases(case: dict[str, Any]) -> None:
    cursor = Cursor(**case["start"])
    for step in case["steps"]:
        event = step["event"]
        if event["type"] == "snapshot":
            cursor.jump(revision=event["revision"], turn=event["turn"], seq=event["seq"])
            continue
        assert cursor.accept(frame_of(event)).value == step["verdict"], event
    assert cursor == Cursor(**case["end"])


@pytest.mark.parametrize("case", FIXTURES["tokens"], ids=lambda case: case["token"])
def test_a_token_stands_for_its_cursor(case: dict[str, Any]) -> None:
    cursor = Cursor(**case["cursor"])
    assert cursor.token() == case["token"]
    assert Cursor.parse(case["token"]) == cursor


@pytest.mark.parametrize("text", FIXTURES["not_tokens"])
def test_other_text_is_no_token(text: str) -> None:
    assert Cursor.parse(text) is None
