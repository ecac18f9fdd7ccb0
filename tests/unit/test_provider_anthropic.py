"""The Anthropic provider against the fake API, over HTTP and through the real SDK; its sans-I/O parts exhaustively."""

from __future__ import annotations

import asyncio
import email.utils
import gc
import json
import logging
import socket
import warnings
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming_chat.blocks import text_of
from streaming_chat.conf import ChatSettings
from streaming_chat.exceptions import TURN_ERRORS, ProviderError
from streaming_chat.providers import aclose_providers, get_provider
from streaming_chat.providers.anthropic import AnthropicProvider, deprecated_models
from streaming_chat.providers.base import Alive, Began, Ended, ProviderMessage, ProviderRequest, Usage, UsageSeen
from streaming_chat.providers.demo import DemoProvider
from streaming_chat.providers.messages_errors import parse_retry_after, response_failure
from streaming_chat.providers.messages_request import request_body, request_headers
from streaming_chat.providers.messages_stream import MessageStream
from streaming_chat.providers.sse_parser import MAX_EVENT_BYTES, SseError, SseParser
from streaming_chat.testing import (
    Block,
    Cut,
    End,
    Fail,
    FakeAnthropic,
    Gate,
    Pings,
    Raw,
    Reply,
    Stall,
)
from tests.streams import (
    BETA_SCRIPTED,
    PING,
    SCRIPTED,
    delta,
    end,
    folded,
    message_start,
    start,
    stop,
    text,
    to_sse,
    tool,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

KEY = "sk-ant-very-secret"
PROMPT = "the prompt nobody may read in a log"
ODDITIES: list[Any] = [None, True, -1, 10**30, 2.5, "", "x", [], ["x"], {}, {"type": "text"}, {"type": []}]
STREAMS = {**SCRIPTED, **BETA_SCRIPTED}


@pytest.fixture
async def server() -> AsyncIterator[FakeAnthropic]:
    async with FakeAnthropic() as running:
        yield running


@pytest.fixture
async def provider(server: FakeAnthropic) -> AsyncIterator[AnthropicProvider]:
    made = AnthropicProvider(ChatSettings(anthropic_api_key=KEY, anthropic_base_url=server.base_url))
    yield made
    await made.aclose()


def request(**fields: Any) -> ProviderRequest:
    message = ProviderMessage(role="user", blocks=[{"type": "text", "text": PROMPT}])
    return ProviderRequest(**{"model": "claude-sonnet-5-5", "max_tokens": 100, "messages": [message], **fields})


async def collect(provider: AnthropicProvider, **fields: Any) -> tuple[list[Any], ProviderError | None]:
    """All events, and the failure that ended them."""
    events: list[Any] = []
    try:
        async for event in provider.stream(request(**fields)):
            events.append(event)  # noqa: PERF401 - what came before a failure counts
    except ProviderError as error:
        return events, error
    return events, None


def read(data: bytes, sizes: Iterable[int] = ()) -> tuple[list[Any], ProviderError | None]:
    """What the reader makes of ``data`` in chunks of these sizes, and of the rest; without signs of life."""
    reader = MessageStream(model="asked", request_id="req_1")
    events: list[Any] = []
    try:
        for size in [*sizes, len(data)]:
            chunk, data = data[:size], data[size:]
            events.extend(event for event in reader.feed(chunk) if not isinstance(event, Alive))
    except ProviderError as error:
        return events, error
    return events, None


# -------------------------------------------------------------------------------------------------- what is yielded


async def test_a_stream_is_yielded_event_by_event(server: FakeAnthropic, provider: AnthropicProvider) -> None:
    server.enqueue(Reply.from_events([message_start(), PING, *text(0, "Hel", "", "lo"), *end()]))
    events, error = await collect(provider)
    assert error is None
    raw = message_start()["message"]["usage"]
    usage = Usage(input_tokens=11, output_tokens=1, cache_creation_input_tokens=2, cache_read_input_tokens=3, raw=raw)
    final = Usage(
        input_tokens=11,
        output_tokens=42,
        cache_creation_input_tokens=2,
        cache_read_input_tokens=3,
        raw={**raw, "output_tokens": 42},
    )
    assert events == [
        Began(model="claude-sonnet-5-5", request_id=server.requests[0].request_id),
        UsageSeen(usage=usage),
        Alive(),
        {"op": "start", "index": 0, "block": {"type": "text", "text": ""}},
        {"op": "append", "index": 0, "field": "text", "text": "Hel"},
        Alive(),
        {"op": "append", "index": 0, "field": "text", "text": "lo"},
        Alive(),
        UsageSeen(usage=final),
        UsageSeen(usage=final, final=True),
        Ended(stop_reason="end_turn"),
    ]


def test_usage_counts_are_totals_and_keep_what_later_events_omit() -> None:
    events, _ = read(to_sse(SCRIPTED["message_delta twice"]))
    seen = [
        (event.usage.input_tokens, event.usage.cache_read_input_tokens, event.usage.output_tokens, event.final)
        for event in events
        if isinstance(event, UsageSeen)
    ]
    assert seen == [(11, 3, 1, False), (11, 3, 20, False), (11, 30, 21, False), (11, 30, 21, True)]


def test_thinking_tokens_are_counted_apart() -> None:
    events, _ = read(to_sse(SCRIPTED["thinking"]))
    assert (events[-2].usage.output_tokens, events[-2].usage.thinking_tokens) == (9, 5)


def test_details_tell_what_the_message_says_beside_its_stop_reason() -> None:
    details = {
        name: read(to_sse(STREAMS[name]))[0][-1].details
        for name in ("stop sequence", "refusal after text", "fallback in the middle", "tool called by code", "text")
    }
    assert details == {
        "stop sequence": {"stop_sequence": ", 3"},
        "refusal after text": {"stop_details": {"type": "refusal", "category": "cyber", "explanation": "No."}},
        "fallback in the middle": {"model": "claude-opus-5-5"},
        "tool called by code": {
            "container": {"id": "container_1", "expires_at": "2026-12-01T00:00:00Z", "skills": None}
        },
        "text": {},
    }


def test_tool_input_is_shown_as_it_arrives_and_parsed_when_it_is_complete() -> None:
    events, _ = read(to_sse([message_start(), *tool(0, "", '{"a": ', "1}"), *end("tool_use")]))
    assert [event for event in events if isinstance(event, dict)] == [
        {
            "op": "start",
            "index": 0,
            "block": {"type": "tool_use", "id": "toolu_0", "name": "look", "input": {}},
        },
        {"op": "append", "index": 0, "field": "partial_json", "text": '{"a": '},
        {"op": "append", "index": 0, "field": "partial_json", "text": "1}"},
        {"op": "merge", "index": 0, "fields": {"input": {"a": 1}, "partial_json": None}},
    ]


@pytest.mark.parametrize(
    "arguments",
    ['{"a": ', '{"a": NaN}', '{"a": 1e999}', "[1]", "null", '"text"', "[" * 3000, '{"a":' * 300 + "1" + "}" * 300, " "],
)
def test_tool_input_that_is_no_object_stays_text(arguments: str) -> None:
    events, error = read(to_sse([message_start(), *tool(0, arguments), *end("max_tokens")]))
    assert error is None
    (block,) = folded(events)
    assert (block["input"], block["partial_json"]) == ({}, arguments)


def test_text_that_is_json_stays_text() -> None:
    events, _ = read(to_sse([message_start(), *text(0, '{"a": ', "1}"), *end()]))
    assert folded(events) == [{"type": "text", "text": '{"a": 1}'}]


def test_tool_input_may_hold_what_no_database_stores() -> None:
    arguments = r'{"a": "\ud83d\ude00 \ud83d \u0000", "n": 123456789012345678901234567890}'
    events, _ = read(to_sse([message_start(), *tool(0, arguments), *end("tool_use")]))
    (block,) = folded(events)
    assert block["input"] == {"a": "😀 \ufffd \ufffd", "n": 1.2345678901234568e29}


def test_a_character_in_two_halves_arrives_whole_in_every_field() -> None:
    halves = ("a\ud83d", "\ude00b")
    events, _ = read(
        to_sse(
            [
                message_start(),
                *text(0, *halves),
                start(1, type="thinking", thinking="", signature=""),
                *(delta(1, "thinking_delta", thinking=half) for half in halves),
                stop(1),
                *tool(2, '{"x": "', *halves, '"}'),
                *text(3, "never finished \ud83d"),
                *text(4, "\ude00"),
                *end(),
            ]
        )
    )
    blocks = folded(events)
    assert blocks[0]["text"] == "a😀b"
    assert blocks[1]["thinking"] == "a😀b"
    assert blocks[2]["input"] == {"x": "a😀b"}
    assert blocks[3]["text"] == "never finished \ufffd"
    assert blocks[4]["text"] == "\ufffd"


def test_unknown_blocks_are_kept_and_grow() -> None:
    events, error = read(
        to_sse(
            [
                message_start(),
                start(0, type="hologram", depth=[1, {"x": None}]),
                stop(0),
                start(1, type="connector_text", text="a"),
                delta(1, "text_delta", text="b"),
                stop(1),
                *tool(2, '{"x": 1}', type="quantum_tool_use"),
                *end(),
            ]
        )
    )
    assert error is None
    assert folded(events) == [
        {"type": "hologram", "depth": [1, {"x": None}]},
        {"type": "connector_text", "text": "ab"},
        {"type": "quantum_tool_use", "id": "toolu_2", "name": "look", "input": {"x": 1}},
    ]


def test_whatever_follows_the_end_is_ignored() -> None:
    complete = to_sse(SCRIPTED["text"])
    assert read(complete + to_sse(SCRIPTED["text"]) + b"event: error\ndata: {\n\n") == read(complete)


async def test_pings_and_bytes_that_complete_nothing_are_signs_of_life(
    server: FakeAnthropic, provider: AnthropicProvider
) -> None:
    first, gate = Gate(), Gate()
    server.enqueue(Reply.from_events([PING, first, message_start(), *text(0, "a"), *end()]).at_byte(40, gate))
    events = provider.stream(request())
    assert await anext(events) == Alive()
    first.open()
    assert await anext(events) == Alive()
    await gate.reached()
    gate.open()
    assert isinstance(await anext(events), Began)
    await events.aclose()


async def test_an_answer_in_one_piece_becomes_whole_blocks(server: FakeAnthropic, provider: AnthropicProvider) -> None:
    reply = Reply.of(
        Block.thinking("Hm", signature="s"), Block.text("a\ud83d", "\ude00\x00"), Block.tool_use("look", {"x": 1})
    )
    server.enqueue(reply)
    events, error = await collect(provider, stream=False)
    assert error is None
    record = server.requests[0]
    assert record.body["stream"] is False
    began, *ops, usage, ended = events
    assert began == Began(model="claude-sonnet-5-5", request_id=record.request_id)
    assert [op["op"] for op in ops] == ["start"] * 3
    blocks = folded(ops)
    assert blocks[:2] == [
        {"type": "thinking", "thinking": "Hm", "signature": "s"},
        {"type": "text", "text": "a😀\ufffd"},
    ]
    assert blocks[2]["input"] == {"x": 1}
    assert usage.final
    assert usage.usage.output_tokens == record.output_tokens
    assert ended == Ended(stop_reason="end_turn")


# ---------------------------------------------------------------------------------------------------- any cut, anywhere


def sizes() -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, 60), max_size=200)


@given(st.sampled_from(sorted(STREAMS)), sizes(), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_the_chunks_that_a_stream_arrives_in_change_nothing(name: str, chunks: list[int], line_end: bytes) -> None:
    data = to_sse(STREAMS[name])
    whole, failure = read(data)
    cut, cut_failure = read(data.replace(b"\n", line_end), chunks)
    assert cut == whole
    assert repr(cut_failure) == repr(failure)


@given(st.sampled_from(sorted(STREAMS)), st.data(), sizes())
def test_a_stream_that_is_cut_gives_a_beginning_and_no_end(name: str, data: st.DataObject, chunks: list[int]) -> None:
    stream = to_sse(STREAMS[name])
    length = data.draw(st.integers(0, len(stream) - 1))
    whole, _ = read(stream)
    cut, failure = read(stream[:length], chunks)
    assert failure is None
    assert cut == whole[: len(cut)]
    assert not any(isinstance(event, Ended) for event in cut)
    text_of(folded(cut))


@given(st.sampled_from(sorted(STREAMS)), st.data())
def test_a_mangled_stream_fails_as_a_provider_error_or_not_at_all(name: str, data: st.DataObject) -> None:
    events = json.loads(json.dumps(STREAMS[name]))
    victim = events[data.draw(st.integers(0, len(events) - 1))]
    while True:
        key = data.draw(st.sampled_from(sorted(victim))) if isinstance(victim, dict) and victim else None
        if key is None or not isinstance(victim[key], dict) or data.draw(st.booleans()):
            break
        victim = victim[key]
    if key is not None:
        victim[key] = data.draw(st.sampled_from(ODDITIES))
    came, failure = read(to_sse(events))
    blocks = folded(came)
    json.dumps(blocks, allow_nan=False).encode()
    assert failure is None or failure.code in TURN_ERRORS


@given(st.binary(max_size=300))
def test_noise_is_no_answer(noise: bytes) -> None:
    events, failure = read(noise + b"\n\n")
    assert events == []
    assert failure is None or (failure.code, failure.retryable) == ("provider_error", True)


# ------------------------------------------------------------------------------------------------------- the SSE parser


@pytest.mark.parametrize(
    ("data", "events"),
    [
        (b"event: a\ndata: 1\n\n", [(b"a", b"1")]),
        (b"event:a\ndata:1\n\n", [(b"a", b"1")]),
        (b"event: a\r\ndata: 1\r\n\r\n", [(b"a", b"1")]),
        (b"event: a\rdata: 1\r\r", [(b"a", b"1")]),
        (b"event: a\r\ndata: 1\n\r\n", [(b"a", b"1")]),
        (b"\xef\xbb\xbfevent: a\ndata: 1\n\n", [(b"a", b"1")]),
        (b"data: 1\n\n", [(b"", b"1")]),
        (b"event: a\ndata: 1\ndata:\ndata: 2\n\n", [(b"a", b"1\n\n2")]),
        (b"data: 1\nevent: a\n\n", [(b"a", b"1")]),
        (b": comment\n\nevent: a\n: more\nid: 7\nretry: 1\ndata: 1\nfoo\n\n", [(b"a", b"1")]),
        (b"\n\n\n\nevent: a\ndata: 1\n\n\n\n\nevent: b\ndata: 2\n\n", [(b"a", b"1"), (b"b", b"2")]),
        (b"event: a\ndata:  1 \n\n", [(b"a", b" 1 ")]),
        (b"event: a\n\ndata: 1\n\n", [(b"", b"1")]),
        (b"event: a\ndata: 1\n", []),
        (b"event: a\ndata: \xe2\x80\xa8\x0b\x0c\x85\n\n", [(b"a", b"\xe2\x80\xa8\x0b\x0c\x85")]),
    ],
)
def test_the_parser_follows_the_standard_in_any_chunks(data: bytes, events: list[tuple[bytes, bytes]]) -> None:
    for size in range(1, len(data) + 1):
        parser = SseParser()
        found = [event for at in range(0, len(data), size) for event in parser.feed(data[at : at + size])]
        assert found == events, size


def test_the_parser_waits_for_no_event_without_end() -> None:
    parser = SseParser()
    assert parser.feed(b"event: a\ndata: 1\n\ndata: " + b"x" * MAX_EVENT_BYTES) == [(b"a", b"1")]
    with pytest.raises(SseError):
        parser.feed(b"x")
    events, failure = read(to_sse([message_start()]) + b"x" * (MAX_EVENT_BYTES + 1), [900, MAX_EVENT_BYTES])
    assert failure is not None
    assert (failure.code, failure.retryable, len(events)) == ("provider_error", False, 2)


# --------------------------------------------------------------------------------------------------------- malformed


@pytest.mark.parametrize(
    "events",
    [
        [start(1, type="text", text="")],
        [*text(0, "a"), start(0, type="text", text="")],
        [*text(0, "a"), start(2, type="text", text="")],
        [start("0", type="text", text="")],
        [start(True, type="text", text="")],
        [start(-1, type="text", text="")],
        [start(0, text="no type")],
        [{"type": "content_block_start", "index": 0, "content_block": None}],
        [{"type": "content_block_start", "index": 0}],
        [delta(0, "text_delta", text="a")],
        [*text(0, "a"), delta(0, "text_delta", text="after the stop")],
        [*text(0, "a"), delta(1, "text_delta", text="b")],
        [start(0, type="text", text=""), delta(0, "text_delta", text=["a"])],
        [start(0, type="text", text=""), {"type": "content_block_delta", "index": 0, "delta": []}],
        [stop(0)],
        [*text(0, "a"), stop(0)],
        [*text(0, "a"), message_start()],
        [message_start(id="msg_2")],
        [{"type": "message_delta", "delta": 5, "usage": {}}],
        [{"type": "message_delta", "delta": {}, "usage": [1]}],
        [{"type": "message_stop"}],
        [start(0, type="tool_result", content=json.loads("[" * 600 + "]" * 600))],
    ],
)
def test_events_that_make_no_sense_fail_and_keep_what_came(events: list[dict[str, Any]]) -> None:
    *good, _bad = [message_start(), *events]
    came, failure = read(to_sse([message_start(), *events, *end()]))
    assert failure is not None
    assert (failure.code, failure.retryable, failure.request_id) == ("provider_error", False, "req_1")
    if events != [{"type": "message_stop"}]:
        assert came == read(to_sse(good))[0]


@pytest.mark.parametrize(
    "event", [*text(0, "a"), *end(), {"type": "message_start"}, {"type": "message_start", "message": 1}]
)
def test_events_before_the_message_fail(event: dict[str, Any]) -> None:
    came, failure = read(to_sse([event]))
    assert came == []
    assert failure is not None
    assert (failure.code, failure.retryable) == ("provider_error", True)


def test_only_events_that_matter_must_be_json() -> None:
    noise = b'event: weather\ndata: <rain>\n\nevent: ping\ndata:\n\nevent: weather\ndata: ["x"]\n\n'
    assert read(to_sse([message_start()]) + noise + to_sse([*text(0, "a"), *end()]))[1] is None
    for broken in (b"event: content_block_start\ndata: {\n\n", b"data: {\n\n", b"event: message_stop\ndata: NaN\n\n"):
        came, failure = read(to_sse([message_start(), *text(0, "a")]) + broken)
        assert failure is not None
        assert failure.code == "provider_error"
        assert text_of(folded(came)) == "a"


# ----------------------------------------------------------------------------------------------------------- failures


def refused(status: int, type_: str | None = None, message: str | None = None, **more: Any) -> Reply:
    return Reply.error(status, type_, message, **more)


@pytest.mark.parametrize(
    ("reply", "code", "retryable", "retry_after_seconds"),
    [
        (refused(400), "provider_rejected", False, None),
        (refused(400, message="prompt is too long: 200001 tokens > 200000 maximum"), "provider_too_large", False, None),
        (refused(400, message="input length and `max_tokens` exceed context limit"), "provider_too_large", False, None),
        (
            refused(400, details={"error_code": "request_body_too_large_after_decoding"}),
            "provider_too_large",
            False,
            None,
        ),
        (refused(400, message="Your credit balance is too low"), "provider_quota", False, None),
        (refused(401), "provider_auth", False, None),
        (refused(402), "provider_quota", False, None),
        (refused(403), "provider_auth", False, None),
        (refused(404), "provider_model", False, None),
        (refused(408), "provider_error", True, None),
        (refused(409), "provider_error", True, None),
        (refused(413), "provider_too_large", False, None),
        (refused(418), "provider_rejected", False, None),
        (refused(422), "provider_rejected", False, None),
        (Reply.rate_limited(7), "provider_rate_limited", True, 7.0),
        (Reply.rate_limited(None), "provider_rate_limited", True, None),
        (refused(429, headers={"retry-after-ms": "1500", "retry-after": "9"}), "provider_rate_limited", True, 1.5),
        (refused(429, message="Spend limit", headers={"retry-after": "3"}), "provider_rate_limited", True, 3.0),
        (
            refused(429, details={"error_code": "ramp_limit_exceeded"}, headers={"retry-after": "3"}),
            "provider_rate_limited",
            True,
            3.0,
        ),
        (Reply.spend_limited(), "provider_quota", False, None),
        (refused(429, message="You have reached your specified usage quota"), "provider_quota", False, None),
        (
            refused(429, details={"error_code": "contract_spend_limit_reached"}, headers={"retry-after": "3"}),
            "provider_quota",
            False,
            3.0,
        ),
        (refused(429, "billing_error"), "provider_quota", False, None),
        (refused(500), "provider_error", True, None),
        (refused(500, headers={"x-should-retry": "false"}), "provider_error", False, None),
        (refused(400, headers={"x-should-retry": "true"}), "provider_rejected", True, None),
        (refused(502), "provider_error", True, None),
        (refused(503, "overloaded_error"), "provider_overloaded", True, None),
        (refused(504), "provider_error", True, None),
        (Reply.overloaded(), "provider_overloaded", True, None),
        (Reply.html(502), "provider_error", True, None),
        (Reply.html(403), "provider_auth", False, None),
        (Reply.body("[]", status=500), "provider_error", True, None),
        (Reply.html(200), "provider_error", True, None),
        (Reply.empty(), "provider_error", True, None),
        (Reply.body('{"type": "message"}'), "provider_error", True, None),
        (Reply.body(to_sse(SCRIPTED["text"]), content_type="text/plain"), "provider_error", True, None),
        (Reply.from_events([PING, End()]), "provider_error", True, None),
        (Reply.from_events([Raw(b"data: {\n\n")]), "provider_error", True, None),
        (Reply.text("x").before_headers(Cut()), "provider_unreachable", True, None),
        (Reply.text("x").before_headers(Cut(reset=True)), "provider_unreachable", True, None),
        (Reply.text("x").at_byte(0, Cut()), "provider_unreachable", True, None),
        (Reply.text("x").at_byte(90, Cut(reset=True)), "provider_unreachable", True, None),
    ],
)
async def test_a_request_that_fails_tells_how(
    reply: Reply,
    code: str,
    retryable: bool,
    retry_after_seconds: float | None,
    server: FakeAnthropic,
    provider: AnthropicProvider,
) -> None:
    server.enqueue(reply)
    events, error = await collect(provider)
    assert error is not None
    assert (error.code, error.retryable, error.retry_after_seconds) == (code, retryable, retry_after_seconds)
    assert folded(events) == []
    assert len(server.requests) == 1
    if code != "provider_unreachable":
        assert error.request_id == server.requests[0].request_id


@pytest.mark.parametrize(
    ("type_", "code", "retryable"),
    [
        ("overloaded_error", "provider_overloaded", True),
        ("rate_limit_error", "provider_rate_limited", True),
        ("api_error", "provider_error", True),
        ("timeout_error", "provider_error", True),
        ("invalid_request_error", "provider_rejected", False),
        ("request_too_large", "provider_too_large", False),
        ("authentication_error", "provider_auth", False),
        ("permission_error", "provider_auth", False),
        ("not_found_error", "provider_model", False),
        ("billing_error", "provider_quota", False),
        ("brand_new_error", "provider_error", False),
    ],
)
async def test_an_error_event_keeps_what_came(
    type_: str, code: str, retryable: bool, server: FakeAnthropic, provider: AnthropicProvider
) -> None:
    server.enqueue(Reply.text("Once upon", Fail(type_)))
    events, error = await collect(provider)
    assert error is not None
    assert (error.code, error.retryable) == (code, retryable)
    assert error.request_id == server.requests[0].request_id
    assert text_of(folded(events)) == "Once upon"


@pytest.mark.parametrize("step", [Cut(), Cut(reset=True), End()])
async def test_a_stream_that_is_lost_in_the_middle_returns_without_end(
    step: Cut | End, server: FakeAnthropic, provider: AnthropicProvider
) -> None:
    server.enqueue(Reply.text("Once upon", step, " a time"))
    events, error = await collect(provider)
    assert error is None
    assert text_of(folded(events)) == "Once upon"
    assert not any(isinstance(event, Ended) for event in events)


@pytest.mark.parametrize(
    ("reply", "code", "retryable"),
    [
        (Reply.overloaded(), "provider_overloaded", True),
        (Reply.html(), "provider_error", True),
        (Reply.body("{}"), "provider_error", True),
        (Reply.body('{"type": "error", "error": {"type": "overloaded_error"}}'), "provider_overloaded", True),
        (Reply.text("x", stop_reason=None), "provider_error", False),
        (Reply.text("x", Cut()), "provider_unreachable", True),
    ],
)
async def test_an_answer_in_one_piece_fails_as_a_whole(
    reply: Reply, code: str, retryable: bool, server: FakeAnthropic, provider: AnthropicProvider
) -> None:
    server.enqueue(reply)
    events, error = await collect(provider, stream=False)
    assert error is not None
    assert (events, error.code, error.retryable) == ([], code, retryable)


async def test_an_address_where_nobody_listens_is_unreachable() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        for address in (f"http://127.0.0.1:{unused.getsockname()[1]}", "http://nowhere.invalid", "nonsense"):
            provider = AnthropicProvider(ChatSettings(anthropic_api_key=KEY, anthropic_base_url=address))
            events, error = await collect(provider)
            await provider.aclose()
            assert error is not None
            assert (events, error.code, error.retryable) == ([], "provider_unreachable", True)


async def test_a_server_without_tls_is_unreachable(server: FakeAnthropic) -> None:
    settings = ChatSettings(anthropic_api_key=KEY, anthropic_base_url=server.base_url.replace("http", "https"))
    provider = AnthropicProvider(settings)
    events, error = await collect(provider)
    await provider.aclose()
    assert error is not None
    assert (events, error.code, error.retryable) == ([], "provider_unreachable", True)


async def test_a_read_that_nobody_watches_ends(server: FakeAnthropic) -> None:
    settings = ChatSettings(anthropic_api_key=KEY, anthropic_base_url=server.base_url, turn_timeout_seconds=0.05)
    provider = AnthropicProvider(settings)
    server.enqueue(Reply.text("a", Stall()), Reply.text("a").before_headers(Stall()))
    events, error = await collect(provider)
    assert error is None
    assert text_of(folded(events)) == "a"
    events, error = await collect(provider)
    await provider.aclose()
    assert error is not None
    assert (events, error.code) == ([], "provider_unreachable")


async def test_without_any_credential_the_site_is_not_set_up(
    server: FakeAnthropic, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ANTHROPIC_CONFIG_DIR", str(tmp_path))
    provider = AnthropicProvider(ChatSettings(anthropic_base_url=server.base_url))
    events, error = await collect(provider)
    await provider.aclose()
    assert error is not None
    assert (events, error.code, error.retryable, server.requests) == ([], "provider_auth", False, [])


async def test_options_that_no_json_can_say_are_rejected(server: FakeAnthropic, provider: AnthropicProvider) -> None:
    for oddity in (object(), float("nan")):
        events, error = await collect(provider, options={"odd": oddity})
        assert error is not None
        assert (events, error.code, error.retryable, server.requests) == ([], "provider_rejected", False, [])


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "12"}, 12.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after-ms": "250", "retry-after": "12"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "12"}, 12.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "tomorrow"}, None),
        ({"retry-after": email.utils.formatdate(1_000_090, usegmt=True)}, 90.0),
        ({"retry-after": email.utils.formatdate(999_000, usegmt=True)}, 0.0),
        (
            {
                "retry-after": email.utils.formatdate(2_000_030, usegmt=True),
                "date": email.utils.formatdate(2_000_000, usegmt=True),
            },
            30.0,
        ),
    ],
)
def test_the_provider_says_how_long_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    assert parse_retry_after(headers, now=1_000_000) == seconds


@pytest.mark.parametrize("body", [None, "", "<html>", [], {"error": None}, {"error": {"type": 5, "details": []}}, 7])
def test_an_error_without_a_form_is_told_by_its_status(body: object) -> None:
    codes = [response_failure(status, body, {}).code for status in (304, 400, 401, 429, 500, 529)]
    assert codes == [
        "provider_error",
        "provider_rejected",
        "provider_auth",
        "provider_rate_limited",
        "provider_error",
        "provider_overloaded",
    ]


# -------------------------------------------------------------------------------------------------------- cancelling


async def test_cancelling_closes_the_connection(server: FakeAnthropic, provider: AnthropicProvider) -> None:
    for reply in (Reply.text("a", Stall()), Reply.text("a", Pings()), Reply.text("a").before_headers(Stall())):
        server.enqueue(reply)
        task = asyncio.create_task(collect(provider))
        await server.wait_for(lambda ledger: ledger.requests and ledger.requests[-1].body)
        record = server.requests[-1]
        if not reply.first_steps:
            await server.wait_for(lambda ledger: ledger.requests[-1].text_sent == "a")
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.wait_for(lambda ledger: ledger.requests[-1].outcome == "aborted")
        await server.wait_for(lambda ledger: ledger.open_connections == 0)
        assert server.requests[-1].request_id == record.request_id


async def test_closing_the_stream_closes_the_connection(server: FakeAnthropic, provider: AnthropicProvider) -> None:
    server.enqueue(Reply.text("a", "b", Stall()))
    events = provider.stream(request())
    async for event in events:
        if isinstance(event, dict) and event["op"] == "append":
            break
    await events.aclose()
    await server.wait_for(lambda ledger: ledger.open_connections == 0)
    assert server.requests[0].outcome == "aborted"


async def test_a_failure_closes_the_connection(server: FakeAnthropic, provider: AnthropicProvider) -> None:
    server.enqueue(Reply.text("a", Raw(b"data: {\n\n"), Stall()))
    _, error = await collect(provider)
    assert error is not None
    await server.wait_for(lambda ledger: ledger.open_connections == 0)


async def test_a_connection_is_reused_by_whoever_stops_at_the_end(
    server: FakeAnthropic, provider: AnthropicProvider
) -> None:
    for _ in range(3):
        events = provider.stream(request())
        async for event in events:
            if isinstance(event, Ended):
                break
        await events.aclose()
    assert [record.connection for record in server.requests] == [1, 1, 1]


async def test_an_answer_ends_although_its_response_does_not(
    server: FakeAnthropic, provider: AnthropicProvider
) -> None:
    server.enqueue(Reply.from_events([*SCRIPTED["text"], Stall()]))
    events, error = await collect(provider)
    assert error is None
    assert isinstance(events[-1], Ended)
    await server.wait_for(lambda ledger: ledger.open_connections == 0)


async def test_closing_the_provider_ends_its_streams(server: FakeAnthropic) -> None:
    provider = AnthropicProvider(ChatSettings(anthropic_api_key=KEY, anthropic_base_url=server.base_url))
    server.enqueue(Reply.text("a", Stall()))
    task = asyncio.create_task(collect(provider))
    await server.wait_for(lambda ledger: ledger.requests and ledger.requests[-1].text_sent == "a")
    await provider.aclose()
    events, error = await task
    assert error is None
    assert not any(isinstance(event, Ended) for event in events)
    await server.wait_for(lambda ledger: ledger.open_connections == 0)


# ------------------------------------------------------------------------------------------------------- the request


async def test_the_request_is_what_the_api_takes(server: FakeAnthropic, provider: AnthropicProvider) -> None:
    _, error = await collect(
        provider,
        system="Be brief.",
        thinking={"type": "adaptive"},
        effort="low",
        stop_sequences=("END",),
        user_id="u1",
        options={
            "betas": ["one-2026-01-01", "two-2026-01-01"],
            "output_config": {"format": {"type": "json"}},
            "container": "c1",
        },
    )
    assert error is None
    record = server.requests[0]
    assert record.auth == "bearer"
    assert record.headers["anthropic-beta"] == "one-2026-01-01,two-2026-01-01"
    assert record.headers["accept-encoding"] == "identity"
    assert record.headers["x-stainless-retry-count"] == "0"
    assert record.body == {
        "container": "c1",
        "output_config": {"format": {"type": "json"}, "effort": "low"},
        "model": "claude-sonnet-5-5",
        "max_tokens": 100,
        "stream": True,
        "messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}],
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "cache_control": {"type": "ephemeral"},
        "thinking": {"type": "adaptive"},
        "stop_sequences": ["END"],
        "metadata": {"user_id": "u1"},
    }


def test_a_plain_request_holds_nothing_else() -> None:
    plain = request(prompt_caching=False, stream=False, system=" \n")
    assert request_body(plain) == {
        "model": "claude-sonnet-5-5",
        "max_tokens": 100,
        "stream": False,
        "messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}],
    }
    assert request_headers(plain) == {}


def test_caching_leaves_the_hosts_own_choice_alone() -> None:
    hour = {"type": "ephemeral", "ttl": "1h"}
    assert request_body(request(options={"cache_control": hour}))["cache_control"] == hour


def test_blocks_are_sent_as_the_api_takes_them_back() -> None:
    citation = {"type": "char_location", "document_title": None, "file_id": None, "cited_text": "x"}
    blocks: list[dict[str, Any]] = [
        {"type": "text", "text": "a\ud83d", "citations": None},
        {"type": "text", "text": "b", "citations": [citation]},
        {"type": "tool_use", "id": "t", "name": "n", "input": {"x": None}, "caller": None, "partial_json": '{"x'},
        {"type": "thinking", "thinking": "", "signature": "s"},
    ]
    before = json.dumps(blocks)
    body = request_body(request(messages=[ProviderMessage(role="assistant", blocks=blocks)]))
    assert body["messages"][0]["content"] == [
        {"type": "text", "text": "a\ufffd"},
        {
            "type": "text",
            "text": "b",
            "citations": [{"type": "char_location", "document_title": None, "cited_text": "x"}],
        },
        {"type": "tool_use", "id": "t", "name": "n", "input": {"x": None}},
        {"type": "thinking", "thinking": "", "signature": "s"},
    ]
    assert json.dumps(blocks) == before


@pytest.mark.parametrize("name", sorted(set(SCRIPTED) - {"tool, cut off", "error in the middle", "no end"}))
async def test_what_was_answered_can_be_sent_back(
    name: str, server: FakeAnthropic, provider: AnthropicProvider
) -> None:
    blocks = [
        block
        for block in folded(read(to_sse(SCRIPTED[name]))[0])
        if block["type"] != "tool_use" and (block["type"] != "text" or block["text"].strip())
    ]
    messages = [*request().messages, *([ProviderMessage(role="assistant", blocks=blocks)] if blocks else [])]
    _, error = await collect(provider, messages=[*messages, *request().messages])
    assert error is None


async def test_a_deprecated_model_is_asked_without_a_warning(
    server: FakeAnthropic, provider: AnthropicProvider
) -> None:
    model, date = next(iter(deprecated_models().items()))
    assert date
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, error = await collect(
            provider, model=model, thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=2000
        )
    assert error is None
    assert server.requests[0].body["model"] == model


async def test_a_long_answer_in_one_piece_is_asked_for(server: FakeAnthropic, provider: AnthropicProvider) -> None:
    _, error = await collect(provider, stream=False, max_tokens=128_000)
    assert error is None


# ------------------------------------------------------------------------------------------------------------ secrets


async def test_neither_key_nor_prompt_nor_the_providers_words_are_told(
    server: FakeAnthropic, provider: AnthropicProvider, caplog: pytest.LogCaptureFixture
) -> None:
    secrets = (KEY, PROMPT, "provider's own words")
    replies = [
        Reply.error(400, message=f"provider's own words about {PROMPT}"),
        Reply.text("x").before_headers(Cut()),
        Reply.text("x", Cut()),
        Reply.text("x", Raw(f"data: {{{PROMPT}\n\n".encode())),
        Reply.text("x", Fail("api_error", f"provider's own words about {PROMPT}")),
        Reply.body(f"{{{PROMPT}"),
    ]
    with caplog.at_level(logging.INFO):
        for reply in replies:
            server.enqueue(reply)
            _, error = await collect(provider)
            told = f"{error!r} {error} {error and error.__dict__}"
            assert not any(secret in told for secret in secrets)
            assert error is None or error.__cause__ is None
            assert error is None or error.__context__ is None or error.__suppress_context__
    assert "ServerDisconnectedError" in caplog.text or "APIConnectionError" in caplog.text
    assert not any(secret in caplog.text for secret in secrets)
    assert KEY not in repr(provider)
    assert KEY not in repr(vars(provider)["_settings"])


# --------------------------------------------------------------------------------------------------- which provider


@pytest.fixture
async def providers() -> AsyncIterator[None]:
    yield
    await aclose_providers()


@pytest.mark.usefixtures("providers")
async def test_a_loop_has_one_provider_for_its_settings(settings: Any) -> None:
    settings.STREAMING_CHAT = {"PROVIDER": "demo"}
    first = get_provider()
    assert isinstance(first, DemoProvider)
    assert get_provider() is first
    settings.STREAMING_CHAT = {"PROVIDER": "anthropic", "ANTHROPIC_API_KEY": KEY}
    second = get_provider()
    assert isinstance(second, AnthropicProvider)
    settings.STREAMING_CHAT = {"PROVIDER": f"{__name__}.OtherProvider"}
    assert get_provider().name == "other"
    await aclose_providers()
    assert get_provider() is not first


def test_each_loop_has_its_own_provider(settings: Any) -> None:
    settings.STREAMING_CHAT = {"PROVIDER": "demo"}

    async def provider() -> Any:
        try:
            return get_provider()
        finally:
            await aclose_providers()

    assert asyncio.run(provider()) is not asyncio.run(provider())


@pytest.mark.usefixtures("providers")
@pytest.mark.parametrize("path", ["nowhere.Provider", "streaming_chat.providers.demo.Missing", "nonsense"])
async def test_a_provider_that_does_not_exist_is_a_mistake_in_the_settings(settings: Any, path: str) -> None:
    from django.core.exceptions import ImproperlyConfigured

    settings.STREAMING_CHAT = {"PROVIDER": path}
    with pytest.raises(ImproperlyConfigured, match="PROVIDER"):
        get_provider()


@pytest.mark.usefixtures("providers")
async def test_the_key_in_the_environment_chooses_anthropic(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.STREAMING_CHAT = {}
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    assert get_provider().name == "demo"
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    assert get_provider().name == "anthropic"


class OtherProvider:
    name = "other"

    async def aclose(self) -> None:
        gc.collect()
