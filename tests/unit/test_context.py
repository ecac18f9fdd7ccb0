from __future__ import annotations

from typing import Any

import pytest

from streaming_chat.blocks import Block, text_block
from streaming_chat.generation.context import merge_roles, sendable, user_hash
from streaming_chat.providers.base import ProviderMessage


def user(*texts: str) -> ProviderMessage:
    return ProviderMessage(role="user", blocks=[text_block(text) for text in texts])


def assistant(*texts: str) -> ProviderMessage:
    return ProviderMessage(role="assistant", blocks=[text_block(text) for text in texts])


@pytest.mark.parametrize(
    ("messages", "merged"),
    [
        ([], []),
        ([user("a"), assistant("b"), user("c")], [user("a"), assistant("b"), user("c")]),
        ([user("a"), user("b"), assistant("c"), assistant("d")], [user("a", "b"), assistant("c", "d")]),
        ([assistant("a"), user("b")], [user("b")]),
        ([assistant("a"), assistant("b")], []),
    ],
)
def test_roles_alternate_and_begin_with_the_user(
    messages: list[ProviderMessage], merged: list[ProviderMessage]
) -> None:
    assert merge_roles(messages) == merged


def test_merging_does_not_change_what_it_was_given() -> None:
    first, second = user("a"), user("b")
    merge_roles([first, second])
    assert first == user("a")


CALL: Block = {"type": "tool_use", "id": "t1", "name": "clock", "input": {}}
SERVER_CALL: Block = {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {}}
SERVER_RESULT: Block = {"type": "web_search_tool_result", "tool_use_id": "s1", "content": []}
SIGNED: Block = {"type": "thinking", "thinking": "hm", "signature": "abc"}


@pytest.mark.parametrize(
    ("blocks", "sent"),
    [
        ([text_block("a"), text_block(" \n"), text_block(""), {"type": "text", "text": None}], [text_block("a")]),
        ([SIGNED, text_block("a")], [SIGNED, text_block("a")]),
        ([{"type": "thinking", "thinking": "hm"}, text_block("a")], [text_block("a")]),
        ([{"type": "thinking", "thinking": "hm", "signature": ""}], []),
        ([{"type": "redacted_thinking", "data": "x"}], []),
        (
            [{"type": "redacted_thinking", "data": "x"}, text_block("a")],
            [{"type": "redacted_thinking", "data": "x"}, text_block("a")],
        ),
        ([text_block("a"), CALL], [text_block("a")]),
        ([SERVER_CALL], []),
        ([SERVER_CALL, SERVER_RESULT, text_block("a")], [SERVER_CALL, SERVER_RESULT, text_block("a")]),
        ([{**SERVER_CALL, "partial_json": '{"q'}, SERVER_RESULT], [SERVER_RESULT]),
    ],
)
def test_only_complete_blocks_are_sent_back(blocks: list[Block], sent: list[Block]) -> None:
    assert sendable(blocks) == sent


def test_thinking_of_another_provider_is_not_sent_back() -> None:
    assert sendable([SIGNED, text_block("a")], thinking=False) == [text_block("a")]
    assert sendable([SIGNED], thinking=False) == []


def test_a_users_name_for_the_provider_is_stable_and_tells_nothing() -> None:
    assert user_hash(None) is None
    assert user_hash(7) == user_hash("7") != user_hash(8)
    hashed: Any = user_hash(7)
    assert len(hashed) == 32
    assert hashed != "7"
