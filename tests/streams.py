"""Streams of the Messages API, written after the SDK's response types: one per feature that a chat can meet."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final

from streaming_chat.blocks import fold

Event = dict[str, Any]
Json = dict[str, Any]


def message_start(**fields: Any) -> Event:
    message: Json = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-sonnet-5-5",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {
            "input_tokens": 11,
            "cache_creation_input_tokens": 2,
            "cache_read_input_tokens": 3,
            "cache_creation": {"ephemeral_5m_input_tokens": 2, "ephemeral_1h_input_tokens": 0},
            "output_tokens": 1,
            "service_tier": "standard",
        },
    }
    return {"type": "message_start", "message": {**message, **fields}}


def start(index: Any, **block: Any) -> Event:
    return {"type": "content_block_start", "index": index, "content_block": block}


def delta(index: int, kind: str, **fields: Any) -> Event:
    return {"type": "content_block_delta", "index": index, "delta": {"type": kind, **fields}}


def stop(index: int) -> Event:
    return {"type": "content_block_stop", "index": index}


def block(index: int, start_block: Json, *deltas: Json) -> list[Event]:
    return [start(index, **start_block), *(delta(index, d.pop("type"), **d) for d in map(dict, deltas)), stop(index)]


def text(index: int, *pieces: str) -> list[Event]:
    return block(index, {"type": "text", "text": ""}, *({"type": "text_delta", "text": piece} for piece in pieces))


def tool(index: int, *pieces: str, type: str = "tool_use", name: str = "look", **fields: Any) -> list[Event]:  # noqa: A002
    begin = {"type": type, "id": f"toolu_{index}", "name": name, "input": {}, **fields}
    return block(index, begin, *({"type": "input_json_delta", "partial_json": piece} for piece in pieces))


def whole(index: int, **fields: Any) -> list[Event]:
    return block(index, fields)


def end(
    stop_reason: str = "end_turn", *, usage: Json | None = None, event: Json | None = None, **fields: Any
) -> list[Event]:
    change = {"stop_reason": stop_reason, "stop_sequence": None, **fields}
    counted = {"output_tokens": 42} if usage is None else usage
    return [{"type": "message_delta", "delta": change, "usage": counted, **(event or {})}, {"type": "message_stop"}]


PING: Final[Event] = {"type": "ping"}
CHAR_LOCATION: Final = {
    "type": "char_location",
    "cited_text": "The sky is blue.",
    "document_index": 0,
    "document_title": None,
    "start_char_index": 0,
    "end_char_index": 16,
    "file_id": None,
}
PAGE_LOCATION: Final = {
    "type": "page_location",
    "cited_text": "Grass is green.",
    "document_index": 1,
    "document_title": "Lawns",
    "start_page_number": 3,
    "end_page_number": 4,
    "file_id": "file_1",
}
CALLER: Final = {"type": "code_execution_20250825", "tool_id": "srvtoolu_1"}

SCRIPTED: Final[dict[str, list[Event]]] = {
    "text": [message_start(), *text(0, "Hel", "lo, ", "wörld 👩‍👩‍👧 \u2028 end"), *end()],
    "text, pings everywhere": [
        PING,
        message_start(),
        PING,
        start(0, type="text", text=""),
        PING,
        delta(0, "text_delta", text="a"),
        PING,
        stop(0),
        PING,
        *end(),
    ],
    "text, that starts with some": [
        message_start(),
        *block(0, {"type": "text", "text": "Al"}, {"type": "text_delta", "text": "pha"}),
        *end(),
    ],
    "text, empty deltas": [message_start(), *text(0, "", "a", "", "b", ""), *end()],
    "text, empty blocks": [message_start(), *text(0), *text(1, "x"), *end()],
    "no content": [message_start(), *end()],
    "several texts": [message_start(), *text(0, "One. "), *text(1, "Two."), *end()],
    "the same start twice": [message_start(), message_start(), *text(0, "Hello"), *end()],
    "thinking": [
        message_start(),
        *block(
            0,
            {"type": "thinking", "thinking": "", "signature": ""},
            {"type": "thinking_delta", "thinking": "Hm"},
            {"type": "thinking_delta", "thinking": ""},
            {"type": "thinking_delta", "thinking": "…\n"},
            {"type": "signature_delta", "signature": "EqQB"},
        ),
        *text(1, "Yes."),
        *end(usage={"output_tokens": 9, "output_tokens_details": {"thinking_tokens": 5}}),
    ],
    "thinking, omitted": [
        message_start(),
        *block(
            0,
            {"type": "thinking", "thinking": "", "signature": ""},
            {"type": "thinking_delta", "thinking": "", "estimated_tokens": 50},
            {"type": "signature_delta", "signature": "first"},
            {"type": "signature_delta", "signature": "second"},
        ),
        *text(1, "Yes."),
        *end(),
    ],
    "thinking, redacted": [message_start(), *whole(0, type="redacted_thinking", data="Zm9v"), *text(1, "So."), *end()],
    "tool": [
        message_start(),
        *text(0, "Let me look."),
        PING,
        *tool(1, "", '{"pla', 'ce": "Köln", "n": [1, 2.5, nul', "l]}"),
        *end("tool_use"),
    ],
    "tool without arguments": [message_start(), *tool(0, ""), *end("tool_use")],
    "tool without deltas": [message_start(), *tool(0), *end("tool_use")],
    "tool with whole arguments": [
        message_start(),
        *whole(0, type="tool_use", id="toolu_1", name="look", input={"place": "Bonn"}, caller=CALLER),
        *end("tool_use"),
    ],
    "tool, empty object": [message_start(), *tool(0, "{", "}"), *end("tool_use")],
    "tool, eager": [
        message_start(),
        *tool(0, '{"a": "x', "", 'y",\n', ' "b": {"c": [true]}}', caller={"type": "direct"}),
        *end("tool_use"),
    ],
    "tools, two": [message_start(), *tool(0, '{"a": 1}'), *tool(1, '{"b": ', "2}"), *end("tool_use")],
    "web search": [
        message_start(),
        *tool(0, "", '{"query": "new', 's"}', type="server_tool_use", name="web_search"),
        *whole(
            1,
            type="web_search_tool_result",
            tool_use_id="toolu_0",
            content=[
                {
                    "type": "web_search_result",
                    "title": "N",
                    "url": "https://a.example",
                    "encrypted_content": "x",
                    "page_age": None,
                }
            ],
        ),
        *block(
            2,
            {"type": "text", "text": "", "citations": []},
            {
                "type": "citations_delta",
                "citation": {
                    "type": "web_search_result_location",
                    "cited_text": "c",
                    "url": "https://a.example",
                    "title": None,
                    "encrypted_index": "i",
                },
            },
            {"type": "text_delta", "text": "News."},
        ),
        *text(3, " "),
        *end(
            usage={
                "input_tokens": 900,
                "output_tokens": 50,
                "server_tool_use": {"web_search_requests": 1, "web_fetch_requests": 0},
            }
        ),
    ],
    "web search that fails": [
        message_start(),
        *tool(0, '{"query": "x"}', type="server_tool_use", name="web_search"),
        *whole(
            1,
            type="web_search_tool_result",
            tool_use_id="toolu_0",
            content={"type": "web_search_tool_result_error", "error_code": "max_uses_exceeded"},
        ),
        *text(2, "Sorry."),
        *end(),
    ],
    "web fetch": [
        message_start(),
        *tool(0, '{"url": "https://a.example/x.pdf"}', type="server_tool_use", name="web_fetch"),
        *whole(
            1,
            type="web_fetch_tool_result",
            tool_use_id="toolu_0",
            content={
                "type": "web_fetch_result",
                "url": "https://a.example/x.pdf",
                "retrieved_at": "2026-11-01T00:00:00Z",
                "content": {
                    "type": "document",
                    "title": "X",
                    "citations": {"enabled": True},
                    "source": {"type": "text", "media_type": "text/plain", "data": "The sky is blue."},
                },
            },
        ),
        *block(
            2,
            {"type": "text", "text": "", "citations": None},
            {"type": "text_delta", "text": "It is "},
            {"type": "citations_delta", "citation": CHAR_LOCATION},
            {"type": "text_delta", "text": "blue."},
        ),
        *end(),
    ],
    "web fetch that fails": [
        message_start(),
        *tool(0, '{"url": "x"}', type="server_tool_use", name="web_fetch"),
        *whole(
            1,
            type="web_fetch_tool_result",
            tool_use_id="toolu_0",
            content={"type": "web_fetch_tool_result_error", "error_code": "url_not_accessible"},
        ),
        *end(),
    ],
    "citations of documents": [
        message_start(),
        *block(
            0,
            {"type": "text", "text": ""},
            {"type": "citations_delta", "citation": CHAR_LOCATION},
            {"type": "citations_delta", "citation": PAGE_LOCATION},
            {"type": "text_delta", "text": "Blue and green."},
        ),
        *end(),
    ],
    "code execution": [
        message_start(),
        *tool(0, '{"command": "ls"}', type="server_tool_use", name="bash_code_execution"),
        *whole(
            1,
            type="bash_code_execution_tool_result",
            tool_use_id="toolu_0",
            content={
                "type": "bash_code_execution_result",
                "stdout": "a\n",
                "stderr": "",
                "return_code": 0,
                "content": [{"type": "bash_code_execution_output", "file_id": "file_1"}],
            },
        ),
        *tool(2, '{"command": "create", "path": "/a"}', type="server_tool_use", name="text_editor_code_execution"),
        *whole(
            3,
            type="text_editor_code_execution_tool_result",
            tool_use_id="toolu_2",
            content={"type": "text_editor_code_execution_create_result", "is_file_update": False},
        ),
        *tool(4, '{"code": "1"}', type="server_tool_use", name="code_execution"),
        *whole(
            5,
            type="code_execution_tool_result",
            tool_use_id="toolu_4",
            content={"type": "code_execution_result", "stdout": "1", "stderr": "", "return_code": 0, "content": []},
        ),
        *whole(6, type="container_upload", file_id="file_2"),
        *text(7, "Done."),
        *end(container={"id": "container_1", "expires_at": "2026-12-01T00:00:00Z", "skills": None}),
    ],
    "memory": [
        message_start(),
        *text(0, "I will remember."),
        *tool(1, '{"command": "view", ', '"path": "/memories"}', name="memory"),
        *end("tool_use"),
    ],
    "tool search": [
        message_start(),
        *tool(0, '{"pattern": "weather"}', type="server_tool_use", name="tool_search_tool_regex"),
        *whole(
            1,
            type="tool_search_tool_result",
            tool_use_id="toolu_0",
            content={
                "type": "tool_search_tool_search_result",
                "tool_references": [{"type": "tool_reference", "tool_name": "get_weather"}],
            },
        ),
        *tool(2, '{"place": "Kiel"}', name="get_weather"),
        *end("tool_use"),
    ],
    "tool called by code": [
        message_start(
            content=[
                {"type": "tool_use", "id": "toolu_9", "name": "query", "input": {"sql": "select 1"}, "caller": CALLER}
            ],
            container={"id": "container_1", "expires_at": "2026-12-01T00:00:00Z", "skills": None},
        ),
        *end("tool_use"),
    ],
    "pause": [
        message_start(),
        *tool(0, '{"query": "x"}', type="server_tool_use", name="web_search"),
        *end("pause_turn"),
    ],
    "tool, cut off": [message_start(), *tool(0, '{"place": "Wies', "bad"), *end("max_tokens")],
    "error in the middle": [
        message_start(),
        *text(0, "Once upon"),
        start(1, type="text", text=""),
        {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
    ],
    "no end": [message_start(), *text(0, "Once upon")],
    "limit of tokens": [message_start(), *text(0, "It was a dark and"), *end("max_tokens")],
    "context window": [message_start(), *text(0, "It was"), *end("model_context_window_exceeded")],
    "stop sequence": [message_start(), *text(0, "1, 2"), *end("stop_sequence", stop_sequence=", 3")],
    "refusal after text": [
        message_start(),
        *text(0, "First, you"),
        *end("refusal", stop_details={"type": "refusal", "category": "cyber", "explanation": "No."}),
    ],
    "message_delta twice": [
        message_start(),
        *text(0, "Hi"),
        {
            "type": "message_delta",
            "delta": {"stop_reason": None, "stop_sequence": None},
            "usage": {"output_tokens": 20},
        },
        *end(usage={"input_tokens": None, "cache_read_input_tokens": 30, "output_tokens": 21}),
    ],
    "unknown event": [
        message_start(),
        {"type": "weather_report", "index": 7, "delta": []},
        *text(0, "a"),
        {"type": "fnord"},
        *end(),
    ],
    "unknown delta": [
        message_start(),
        *block(
            0,
            {"type": "text", "text": ""},
            {"type": "text_delta", "text": "a"},
            {"type": "shade_delta", "shade": "teal"},
            {"type": "text_delta", "text": "b"},
        ),
        *end(),
    ],
    "deltas that do not fit": [
        message_start(),
        *block(
            0,
            {"type": "text", "text": ""},
            {"type": "thinking_delta", "thinking": "x"},
            {"type": "signature_delta", "signature": "x"},
            {"type": "input_json_delta", "partial_json": "{}"},
            {"type": "text_delta", "text": "a"},
        ),
        *end(),
    ],
    "NUL and a lone surrogate": [message_start(), *text(0, "a\x00b", "c\udc00d", "e\ud83d", "f", "g\ud83d"), *end()],
    "a character in two halves": [message_start(), *text(0, "a \ud83d", "\ude00 b\ud83d", "", "\udc69 c"), *end()],
}
"""Streams whose message both of the SDK's accumulators can make."""

BETA_SCRIPTED: Final[dict[str, list[Event]]] = {
    "mcp": [
        message_start(),
        *tool(0, "", '{"mess', 'age": "hi"}', type="mcp_tool_use", name="echo", server_name="echo"),
        *whole(
            1, type="mcp_tool_result", tool_use_id="toolu_0", is_error=False, content=[{"type": "text", "text": "hi"}]
        ),
        *text(2, "Echoed."),
        *end(),
    ],
    "compaction": [
        message_start(),
        *block(
            0,
            {"type": "compaction", "content": None},
            {"type": "compaction_delta", "content": "We spoke of trees.", "encrypted_content": "Zm9v"},
        ),
        *text(1, "So"),
        *end(event={"context_management": {"applied_edits": []}}),
    ],
    "compaction that fails": [
        message_start(),
        *block(
            0,
            {"type": "compaction", "content": None, "encrypted_content": None},
            {"type": "compaction_delta", "content": None, "encrypted_content": None},
        ),
        *text(1, "So"),
        *end(),
    ],
    "cleared tool uses": [
        message_start(),
        *text(0, "Ok"),
        *end(
            event={
                "context_management": {
                    "applied_edits": [
                        {"type": "clear_tool_uses_20250919", "cleared_tool_uses": 5, "cleared_input_tokens": 900}
                    ]
                }
            }
        ),
    ],
    "fallback in the middle": [
        message_start(),
        *text(0, "The pri"),
        *whole(1, type="fallback", **{"from": {"model": "claude-sonnet-5-5"}, "to": {"model": "claude-opus-5-5"}}),
        *text(2, "nting press."),
        *end(
            usage={
                "output_tokens": 12,
                "iterations": [
                    {
                        "type": "message",
                        "model": "claude-sonnet-5-5",
                        "input_tokens": 11,
                        "output_tokens": 4,
                        "cache_read_input_tokens": 0,
                        "cache_creation_input_tokens": 0,
                    }
                ],
            }
        ),
    ],
    "advisor": [
        message_start(),
        *tool(0, "{}", type="server_tool_use", name="advisor"),
        *whole(
            1, type="advisor_tool_result", tool_use_id="toolu_0", content={"type": "advisor_result", "text": "Wait."}
        ),
        *end(),
    ],
}
"""Streams that only the beta accumulator knows."""


def folded(events: Iterable[Any]) -> list[Json]:
    """The blocks that the operations among a provider's events make."""
    ops: list[Any] = [event for event in events if isinstance(event, dict)]
    return fold(ops)


def to_sse(events: list[Event]) -> bytes:
    """The bytes on the wire; lone surrogates as JSON escapes."""
    return b"".join(f"event: {event['type']}\ndata: {_json(event)}\n\n".encode() for event in events)


def _json(event: Event) -> str:
    try:
        dumped = json.dumps(event, ensure_ascii=False)
        dumped.encode()
    except UnicodeEncodeError:
        return json.dumps(event)
    return dumped
