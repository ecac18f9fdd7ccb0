"""The fake Anthropic server, seen by the real SDK over real HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anthropic
import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming_chat.testing import (
    Block,
    Cut,
    Delay,
    End,
    Event,
    Fail,
    FakeAnthropic,
    Gate,
    Pings,
    Raw,
    Reply,
    RequestRecord,
    Stall,
)
from streaming_chat.testing.errors import ApiError
from streaming_chat.testing.rules import check_message_request
from streaming_chat.testing.script import Opening
from streaming_chat.testing.tokens import input_tokens, output_tokens
from streaming_chat.testing.wire import Write, accumulate, plan

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytest_plugins = ["streaming_chat.testing.fixtures"]

STREAMS = Path(__file__).resolve().parents[3] / "shared" / "streams"
RECORDED = sorted(STREAMS.glob("*.jsonl"))

AWKWARD = "Grüße, 世界! 👩‍👩‍👧 e\u0301 שלום a\u2028b"
HELLO = {"role": "user", "content": "Hello"}
ASK: dict[str, Any] = {"model": "claude-sonnet-5-5", "max_tokens": 100, "messages": [HELLO]}
OPENING = Opening("msg_1", "claude-sonnet-5-5", 10)


@pytest.fixture
async def server() -> AsyncIterator[FakeAnthropic]:
    async with FakeAnthropic() as fake:
        yield fake


@pytest.fixture(params=["httpx", "aiohttp"])
async def client(request: pytest.FixtureRequest, server: FakeAnthropic) -> AsyncIterator[anthropic.AsyncAnthropic]:
    http_client = anthropic.DefaultAioHttpClient() if request.param == "aiohttp" else None
    async with anthropic.AsyncAnthropic(
        api_key=server.api_key, base_url=server.base_url, max_retries=0, http_client=http_client
    ) as sdk:
        yield sdk


@pytest.fixture
def threaded() -> Iterator[FakeAnthropic]:
    with FakeAnthropic() as fake:
        yield fake


def sync_client(fake: FakeAnthropic) -> anthropic.Anthropic:
    return anthropic.Anthropic(api_key=fake.api_key, base_url=fake.base_url, max_retries=0)


async def read_text(client: anthropic.AsyncAnthropic) -> tuple[str, BaseException | None]:
    """The text that a streamed answer brought, and what it ended in."""
    text = ""
    try:
        async with await client.messages.create(stream=True, **ASK) as stream:
            async for event in stream:
                if event.type == "content_block_delta" and event.delta.type == "text_delta":
                    text += event.delta.text
    except Exception as exc:  # noqa: BLE001 - whatever the SDK lets through is what the test looks at
        return text, exc
    return text, None


def recorded_events(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def only(server: FakeAnthropic) -> RequestRecord:
    (record,) = server.requests
    return record


# -- the SDK works against it unchanged ---------------------------------------------------------------------


RICH = Reply.of(
    Block.thinking("Let me ", "see.", signature="signed"),
    Block.text("It is ", {"type": "citations_delta", "citation": {"type": "char_location", "cited_text": "x"}}, "42."),
    Block.server_tool_use("web_search", {"query": "weather in Zürich"}),
    Block.whole({"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []}),
    Block.tool_use("get_weather", {"city": "Zürich", "days": [1, 2]}, id="toolu_1"),
    stop_reason="tool_use",
    usage={"cache_read_input_tokens": 7, "output_tokens_details": {"thinking_tokens": 3}},
)


@pytest.mark.asyncio
async def test_a_streamed_message_and_the_same_message_at_once_are_equal(
    server: FakeAnthropic, client: anthropic.AsyncAnthropic
) -> None:
    server.enqueue(RICH, RICH)
    async with client.messages.stream(**ASK) as stream:
        streamed = await stream.get_final_message()
    at_once = await client.messages.create(**ASK)
    thinking, text, search, found, call = [block.to_dict() for block in at_once.content]
    assert (thinking["thinking"], thinking["signature"]) == ("Let me see.", "signed")
    assert text["text"] == "It is 42."
    assert text["citations"] == [{"type": "char_location", "cited_text": "x"}]
    assert (search["name"], search["input"]) == ("web_search", {"query": "weather in Zürich"})
    assert found["type"] == "web_search_tool_result"
    assert (call["id"], call["input"]) == ("toolu_1", {"city": "Zürich", "days": [1, 2]})
    same = {"content", "model", "role", "stop_reason", "usage"}
    without = {"content": {"__all__": {"parsed_output"}}}
    assert streamed.model_dump(include=same, exclude=without) == at_once.model_dump(include=same, exclude=without)
    assert at_once.stop_reason == "tool_use"
    assert at_once.usage.cache_read_input_tokens == 7
    assert at_once.usage.output_tokens_details is not None
    assert at_once.usage.output_tokens_details.thinking_tokens == 3


@pytest.mark.asyncio
async def test_raw_bytes_are_server_sent_events(server: FakeAnthropic, client: anthropic.AsyncAnthropic) -> None:
    server.enqueue(Reply.text("Hi"))
    async with client.messages.with_streaming_response.create(stream=True, **ASK) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["request-id"] == only(server).request_id
        body = b"".join([chunk async for chunk in response.iter_bytes()])
    assert body.startswith(b'event: message_start\ndata: {"type": "message_start"')
    assert body.endswith(b'event: message_stop\ndata: {"type": "message_stop"}\n\n')
    assert only(server).bytes_sent == len(body)


@pytest.mark.asyncio
async def test_counting_and_models(server: FakeAnthropic, client: anthropic.AsyncAnthropic) -> None:
    counted = await client.messages.count_tokens(
        model="claude-sonnet-5-5", messages=[{"role": "user", "content": "Hello"}]
    )
    assert counted.input_tokens == input_tokens(ASK) == 12
    assert [model.id async for model in client.models.list()] == ["claude-sonnet-5-5"]
    assert (await client.models.retrieve("claude-sonnet-5-5")).lifecycle == "active"
    with pytest.raises(anthropic.NotFoundError):
        await client.models.retrieve("claude-0")
    assert (await client.messages.create(**ASK)).usage.input_tokens == 12


def test_the_synchronous_client_and_a_server_in_a_thread(threaded: FakeAnthropic) -> None:
    threaded.enqueue(Reply.text(AWKWARD, chunks=5), Reply.text("twice"))
    with sync_client(threaded) as client:
        with client.messages.stream(**ASK) as stream:
            assert "".join(stream.text_stream) == AWKWARD
        assert client.messages.create(**ASK).content[0].to_dict()["text"] == "twice"
    threaded.wait_for_sync(lambda ledger: ledger.open_connections == 0)
    assert [record.outcome for record in threaded.requests] == ["completed", "completed"]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "reason",
    [
        "end_turn",
        "max_tokens",
        "stop_sequence",
        "tool_use",
        "pause_turn",
        "refusal",
        "model_context_window_exceeded",
    ],
)
async def test_every_stop_reason(server: FakeAnthropic, client: anthropic.AsyncAnthropic, reason: str) -> None:
    details = {"type": "refusal", "category": "cyber", "explanation": None} if reason == "refusal" else None
    server.enqueue(Reply.text("x", stop_reason=reason, stop_sequence="END", stop_details=details))
    async with client.messages.stream(**ASK) as stream:
        message = await stream.get_final_message()
    assert (message.stop_reason, message.stop_sequence) == (reason, "END")
    assert (message.stop_details and message.stop_details.category) == ("cyber" if details else None)


@pytest.mark.asyncio
@pytest.mark.parametrize("path", RECORDED or [None], ids=lambda path: path.stem if path else "none")
async def test_recorded_streams_arrive_as_they_are(
    server: FakeAnthropic, client: anthropic.AsyncAnthropic, path: Path | None
) -> None:
    if path is None:
        pytest.skip("no recorded streams beside this checkout (../shared/streams)")
    server.enqueue(Reply.from_jsonl(path).in_writes([1, 7, 64, 3]))
    async with client.messages.with_streaming_response.create(stream=True, **ASK) as response:
        events = [sse.json() async for sse in anthropic.AsyncStream.raw_events(response.http_response)]
    assert events == recorded_events(path)
    assert only(server).events_sent == len(events)


@pytest.mark.asyncio
async def test_a_responder_answers_what_it_was_asked(server: FakeAnthropic, client: anthropic.AsyncAnthropic) -> None:
    async def respond(request: RequestRecord) -> Reply:
        return Reply.text(f"{request.prompt}, {request.is_stream}")

    server.respond = respond
    assert await read_text(client) == ("Hello, True", None)
    server.respond = lambda request: Reply.text(request.prompt.upper())
    assert await read_text(client) == ("HELLO", None)


@pytest.mark.asyncio
async def test_a_responder_that_raises_is_an_error_of_the_api(
    server: FakeAnthropic, client: anthropic.AsyncAnthropic, caplog: pytest.LogCaptureFixture
) -> None:
    server.respond = lambda request: Reply.text(request.body["nothing"])
    with pytest.raises(anthropic.InternalServerError, match="The responder of the fake server failed"):
        await client.messages.create(**ASK)
    assert "KeyError" in caplog.text
    server.respond = lambda _: Reply.text({"type": "text_delta", "text": object()})
    assert isinstance((await read_text(client))[1], httpx2.TransportError)
    assert [record.outcome for record in server.requests] == ["error", "cut"]


# -- writes: the bytes are cut anywhere, and mean the same --------------------------------------------------


@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    sizes=st.lists(st.integers(1, 50), min_size=1),
    offsets=st.lists(st.integers(0, 1500)),
)
def test_cutting_a_stream_never_changes_its_bytes(text: str, sizes: list[int], offsets: list[int]) -> None:
    reply = Reply.text(text, chunks=3)
    whole = b"".join(write.data for write in plan(reply, OPENING) if isinstance(write, Write))
    cut = reply.in_writes(sizes)
    for offset in offsets:
        cut = cut.at_byte(offset, Delay(0))
    steps = list(plan(cut, OPENING))
    writes = [step for step in steps if isinstance(step, Write)]
    assert b"".join(write.data for write in writes) == whole
    assert all(writes)
    assert accumulate(event.body for write in writes for event in write.events)["content"] == [
        {"type": "text", "text": text}
    ]
    seen, taken = 0, []
    for step in steps:
        if isinstance(step, Write):
            seen += len(step.data)
        else:
            taken.append(seen)
    assert taken == sorted(offset for offset in offsets if offset <= len(whole))


def test_writes_have_the_sizes_that_were_asked_for() -> None:
    reply = Reply.text("abc", chunks=3)
    total = sum(len(write.data) for write in plan(reply, OPENING) if isinstance(write, Write))

    def sizes(reply: Reply) -> list[int]:
        return [len(write.data) for write in plan(reply, OPENING) if isinstance(write, Write)]

    assert len(sizes(reply)) == reply.event_count == 8
    assert sizes(reply.in_writes("whole")) == [total]
    assert sizes(reply.in_writes(1)) == [1] * total
    assert sizes(reply.in_writes([100, 3]))[:4] == [100, 3, 100, 3]
    assert len(sizes(reply.in_writes("whole").after_event(4, Delay(0)))) == 2
    with pytest.raises(ValueError, match="at least one byte"):
        reply.in_writes(0)


@pytest.mark.asyncio
@pytest.mark.parametrize("sizes", [1, 2, [1, 5, 2], "whole", "event"])
async def test_text_survives_every_way_of_cutting(
    server: FakeAnthropic, client: anthropic.AsyncAnthropic, sizes: Any
) -> None:
    server.enqueue(Reply.text(AWKWARD, chunks=4).in_writes(sizes))
    assert await read_text(client) == (AWKWARD, None)
    assert only(server).text_sent == AWKWARD


def test_accumulating_leaves_the_events_as_they_were() -> None:
    events = [step.body for step in RICH.steps(OPENING) if isinstance(step, Event)]
    before = json.dumps(events)
    assert accumulate(events) == accumulate(events)
    assert json.dumps(events) == before


def test_half_a_surrogate_pair_can_be_sent() -> None:
    event = Event({"type": "content_block_delta", "delta": {"type": "text_delta", "text": "\ud83d"}})
    assert rb"\ud83d" in event.encode()


# -- faults, as the SDK sees them ---------------------------------------------------------------------------


HTTP_ERRORS = [
    (Reply.error(400), anthropic.BadRequestError, "invalid_request_error"),
    (Reply.error(401), anthropic.AuthenticationError, "authentication_error"),
    (Reply.error(402), anthropic.PaymentRequiredError, "billing_error"),
    (Reply.error(403), anthropic.PermissionDeniedError, "permission_error"),
    (Reply.error(404), anthropic.NotFoundError, "not_found_error"),
    (Reply.error(413), anthropic.ContentTooLargeError, "request_too_large"),
    (Reply.rate_limited(3), anthropic.RateLimitError, "rate_limit_error"),
    (Reply.spend_limited(), anthropic.RateLimitError, "rate_limit_error"),
    (Reply.error(500), anthropic.InternalServerError, "api_error"),
    (Reply.error(504), anthropic.GatewayTimeoutError, "timeout_error"),
    (Reply.overloaded(), anthropic.OverloadedError, "overloaded_error"),
]


@pytest.mark.asyncio
@pytest.mark.parametrize(("reply", "raised", "type_"), HTTP_ERRORS)
async def test_http_errors(
    server: FakeAnthropic,
    client: anthropic.AsyncAnthropic,
    reply: Reply,
    raised: type[anthropic.APIStatusError],
    type_: str,
) -> None:
    server.enqueue(reply)
    with pytest.raises(raised) as caught:
        await client.messages.create(stream=True, **ASK)
    assert caught.value.type == type_
    assert caught.value.request_id == only(server).request_id
    assert caught.value.body["request_id"] == only(server).request_id  # type: ignore[index]
    assert only(server).outcome == "error"
    assert (only(server).input_tokens, only(server).output_tokens) == (0, 0)


@pytest.mark.asyncio
async def test_a_rate_limit_says_when_to_come_back_and_a_spend_limit_does_not(
    server: FakeAnthropic, client: anthropic.AsyncAnthropic
) -> None:
    server.enqueue(Reply.rate_limited(2.5), Reply.spend_limited())
    with pytest.raises(anthropic.RateLimitError) as limited:
        await client.messages.create(**ASK)
    assert limited.value.response.headers["retry-after"] == "2.5"
    with pytest.raises(anthropic.RateLimitError) as spent:
        await client.messages.create(**ASK)
    assert "retry-after" not in spent.value.response.headers
    assert spent.value.error_code == "enforced_spend_limit_reached"


@pytest.mark.asyncio
async def test_the_sdk_retries_here_as_it_does_there(server: FakeAnthropic, client: anthropic.AsyncAnthropic) -> None:
    server.enqueue(Reply.rate_limited(0), Reply.overloaded(), Reply.text("third time"))
    message = await client.with_options(max_retries=2).messages.create(**ASK)
    assert message.content[0].to_dict()["text"] == "third time"
    assert [record.status for record in server.requests] == [429, 529, 200]
    assert [record.headers["x-stainless-retry-count"] for record in server.requests] == ["0", "1", "2"]


@pytest.mark.asyncio
async def test_an_error_in_mid_stream(server: FakeAnthropic, client: anthropic.AsyncAnthropic) -> None:
    reply = Reply.text("Hel", Fail("overloaded_error", "too much"), "lo")
    server.enqueue(reply, reply)
    text, error = await read_text(client)
    assert text == "Hel"
    assert isinstance(error, anthropic.APIStatusError)
    assert (error.status_code, error.type, error.api_message) == (200, "overloaded_error", "too much")
    assert (only(server).outcome, only(server).text_sent, only(server).output_tokens) == ("error", "Hel", 1)
    with pytest.raises(anthropic.OverloadedError, match="too much"):
        await client.messages.create(**ASK)
    assert (server.requests[1].usage, server.requests[1].output_tokens) == ({}, 0)


@pytest.mark.asyncio
@pytest.mark.parametrize("reset", [False, True])
async def test_a_cut_after_each_event_leaves_exactly_the_text_before_it(
    server: FakeAnthropic, client: anthropic.AsyncAnthropic, reset: bool
) -> None:
    reply = Reply.text("abc", chunks=3)
    for number in range(reply.event_count):
        server.enqueue(reply.after_event(number, Cut(reset=reset)))
        text, error = await read_text(client)
        assert text == "abc"[: max(0, number - 2)]
        assert isinstance(error, httpx2.TransportError | anthropic.APIConnectionError)
        record = server.requests[-1]
        assert (record.outcome, record.events_sent, record.text_sent) == ("cut", number, text)


@pytest.mark.asyncio
async def test_a_cut_in_the_middle_of_a_character(server: FakeAnthropic, client: anthropic.AsyncAnthropic) -> None:
    reply = Reply.from_events([{"type": "x", "text": "é"}])
    server.enqueue(reply.at_byte(len('event: x\ndata: {"type": "x", "text": "') + 1, Cut()))
    _, error = await read_text(client)
    assert isinstance(error, httpx2.TransportError | UnicodeDecodeError)
    assert (only(server).bytes_sent, only(server).events_sent) == (39, 0)


@pytest.mark.asyncio
async def test_a_cut_comes_after_all_that_was_written(server: FakeAnthropic) -> None:
    server.enqueue(Reply.text("x" * 9_000_000).in_writes("whole").at_byte(8_000_000, Cut()))
    reader, writer = await ask_over_a_socket(server)
    assert (await reader.read()).count(b"x") > 7_990_000
    writer.close()
    assert (only(server).outcome, only(server).bytes_sent) == ("cut", 8_000_000)


@pytest.mark.asyncio
async def test_a_reset_is_one(server: FakeAnthropic) -> None:
    server.enqueue(Reply.text("a", Cut()), Reply.text("a", Cut(reset=True)))
    reader, writer = await ask_over_a_socket(server)
    assert (await reader.read()).endswith(b"\n\n\r\n")
    writer.close()
    reader, writer = await ask_over_a_socket(server)
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()


@pytest.mark.asyncio
async def test_a_cut_before_the_headers(server: FakeAnthropic, client: anthropic.AsyncAnthropic) -> None:
    server.enqueue(Reply.text("never").before_headers(Cut()))
    _, error = await read_text(client)
    assert isinstance(error, anthropic.APIConnectionError)
    assert (only(server).outcome, only(server).status, only(server).bytes_sent) == ("cut", None, 0)


@pytest.mark.asyncio
async def test_a_clean_end_without_message_stop_is_silent(
    server: FakeAnthropic, client: anthropic.AsyncAnthropic
) -> None:
    server.enqueue(Reply.text("Hel", End(), "lo"))
    async with client.messages.stream(**ASK) as stream:
        message = await stream.get_final_message()
    assert (message.content[0].to_dict()["text"], message.stop_reason) == ("Hel", None)
    assert (only(server).outcome, only(server).text_sent) == ("completed", "Hel")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("reply", "raised"),
    [
        (Reply.html(), AssertionError),
        (Reply.empty(), AssertionError),
        (Reply.of(Raw(b'event: content_block_delta\ndata: {"type":\n\n')), json.JSONDecodeError),
        (
            Reply.of({"type": "content_block_delta", "index": 7, "delta": {"type": "text_delta", "text": "x"}}),
            IndexError,
        ),
    ],
    ids=["html", "empty", "broken JSON", "wrong index"],
)
async def test_nonsense_with_status_200(
    server: FakeAnthropic, client: anthropic.AsyncAnthropic, reply: Reply, raised: type[Exception]
) -> None:
    server.enqueue(reply)
    with pytest.raises(raised):
        async with client.messages.stream(**ASK) as stream:
            await stream.get_final_message()
    assert only(server).status == 200


@pytest.mark.asyncio
async def test_a_web_page_with_an_error_status(server: FakeAnthropic, client: anthropic.AsyncAnthropic) -> None:
    server.enqueue(Reply.html(502))
    with pytest.raises(anthropic.InternalServerError) as caught:
        await client.messages.create(**ASK)
    assert caught.value.status_code == 502
    assert only(server).outcome == "error"


@pytest.mark.asyncio
async def test_what_nobody_knows_yet_is_sent(server: FakeAnthropic, client: anthropic.AsyncAnthropic) -> None:
    start = {
        "type": "message_start",
        "message": {"id": "msg_2", "usage": {"input_tokens": 99, "output_tokens": 0}},
    }
    server.enqueue(
        Reply.of(
            {"type": "from_the_future", "n": 1},
            start,
            Block.whole({"type": "hologram", "pixels": 3}),
            Block.text("a", {"type": "tint_delta", "hue": 7}, "b"),
        )
    )
    async with client.messages.with_streaming_response.create(stream=True, **ASK) as response:
        events = [sse.json() async for sse in anthropic.AsyncStream.raw_events(response.http_response)]
    assert events[1] == {"type": "from_the_future", "n": 1}
    assert events[2] == start
    assert events[3]["content_block"] == {"type": "hologram", "pixels": 3}
    assert events[7]["delta"] == {"type": "tint_delta", "hue": 7}
    assert only(server).input_tokens == input_tokens(ASK)


@pytest.mark.asyncio
async def test_pings_come_between_and_for_ever(server: FakeAnthropic, client: anthropic.AsyncAnthropic) -> None:
    server.enqueue(Reply.text("a", Pings(0, count=3), "b"), Reply.text("a", Pings(0)))
    assert await read_text(client) == ("ab", None)
    assert only(server).events_sent == 7 + 3
    async with await client.messages.create(stream=True, **ASK) as stream:
        assert (await anext(aiter(stream))).type == "message_start"
        await server.wait_for(lambda ledger: ledger.requests[-1].events_sent > 50)
    await server.wait_for(lambda ledger: ledger.requests[-1].outcome == "aborted")


@pytest.mark.asyncio
async def test_no_stream_asked_for_still_takes_its_time(
    server: FakeAnthropic, client: anthropic.AsyncAnthropic
) -> None:
    gate = Gate()
    server.enqueue(Reply.text("Hel", Pings(0, count=2), Delay(0), gate, "lo"))
    answer = asyncio.create_task(client.messages.create(**ASK))
    await gate.reached()
    assert (only(server).outcome, only(server).status, only(server).bytes_sent) == (None, None, 0)
    gate.open()
    assert (await answer).content[0].to_dict()["text"] == "Hello"
    assert only(server).text_sent == "Hello"


# -- gates and the ledger -----------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_gate_holds_the_stream_until_it_opens(server: FakeAnthropic, client: anthropic.AsyncAnthropic) -> None:
    gate = Gate()
    server.enqueue(Reply.text("a", gate, "b", gate, "c").in_writes("whole"))
    answer = asyncio.create_task(read_text(client))
    await gate.reached()
    assert (only(server).text_sent, only(server).outcome) == ("a", None)
    assert (only(server).output_tokens, only(server).input_tokens) == (1, 12)
    gate.let_through()
    await gate.reached(2)
    assert only(server).text_sent == "ab"
    gate.open()
    assert await answer == ("abc", None)
    assert (gate.arrivals, only(server).outcome) == (2, "completed")


@pytest.mark.asyncio
async def test_a_gate_of_a_server_in_a_thread_opens_from_the_test(threaded: FakeAnthropic) -> None:
    gate = Gate()
    threaded.enqueue(Reply.text("a", gate, "b"))
    async with anthropic.AsyncAnthropic(api_key="k", base_url=threaded.base_url) as client:
        answer = asyncio.create_task(read_text(client))
        await threaded.wait_for(lambda ledger: ledger.requests and ledger.requests[0].text_sent == "a")
        await gate.reached()
        gate.open()
        assert await answer == ("ab", None)


def test_a_gate_that_nothing_reaches_says_so() -> None:
    with pytest.raises(TimeoutError):
        Gate().reached_sync(timeout=0.01)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "halt",
    [Delay(3600), Stall(), Gate(), Pings(0.001), Pings(3600)],
    ids=["delay", "stall", "gate", "pings", "one ping"],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_is_noticed_wherever_the_script_stands(
    server: FakeAnthropic, client: anthropic.AsyncAnthropic, halt: Any, stream: bool
) -> None:
    server.enqueue(Reply.text("Hel", halt, "lo"))
    asking = asyncio.create_task(read_text(client) if stream else client.messages.create(**ASK))
    await server.wait_for(lambda ledger: ledger.output_tokens == 1)
    if stream:
        await server.wait_for(lambda ledger: ledger.requests[0].text_sent == "Hel")
    asking.cancel()
    await server.wait_for(lambda ledger: ledger.aborted, timeout=2)
    record = only(server)
    assert (record.outcome, record.text_sent) == ("aborted", "Hel" if stream else "")
    assert record.finished is not None
    assert record.finished >= record.started
    await server.wait_for(lambda ledger: ledger.open_connections == 0)


@pytest.mark.asyncio
async def test_a_client_that_leaves_before_the_headers_is_noticed(
    server: FakeAnthropic, client: anthropic.AsyncAnthropic
) -> None:
    gate = Gate()
    server.enqueue(Reply.overloaded().before_headers(gate))
    asking = asyncio.create_task(read_text(client))
    await gate.reached()
    asking.cancel()
    await server.wait_for(lambda ledger: ledger.aborted)
    assert (only(server).status, only(server).output_tokens) == (None, 0)


async def ask_over_a_socket(server: FakeAnthropic) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    body = json.dumps({**ASK, "stream": True}).encode()
    head = "POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: k\r\nanthropic-version: 2026-10-21\r\n"
    head += f"content-length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
    writer.write(head.encode() + body)
    await reader.readuntil(b"\r\n\r\n")
    return reader, writer


@pytest.mark.asyncio
async def test_a_client_that_does_not_read_holds_the_server_back(server: FakeAnthropic) -> None:
    server.enqueue(Reply.text(*["x" * 100_000] * 1000))
    _, writer = await ask_over_a_socket(server)
    await server.wait_for(lambda ledger: ledger.requests[0].bytes_sent > 100_000)
    writer.transport.abort()
    await server.wait_for(lambda ledger: ledger.aborted)
    assert only(server).bytes_sent < 100_000 * 1000


@pytest.mark.asyncio
async def test_the_ledger_knows_the_request_but_not_the_key(
    server: FakeAnthropic, client: anthropic.AsyncAnthropic
) -> None:
    server.enqueue(Reply.text(AWKWARD, usage={"input_tokens": 5, "output_tokens": 77, "cache_read_input_tokens": 3}))
    before = server.requests
    await read_text(client)
    record = only(server)
    assert before == []
    assert (record.method, record.path, record.auth, record.status) == ("POST", "/v1/messages", "bearer", 200)
    assert record.body == {**ASK, "stream": True}
    assert (record.prompt, record.is_stream) == ("Hello", True)
    assert server.api_key not in repr(record)
    assert record.headers["anthropic-version"] == "2026-10-21"
    assert (record.input_tokens, record.output_tokens) == (5, 77)
    assert record.usage["cache_read_input_tokens"] == 3
    assert (server.ledger.input_tokens, server.ledger.output_tokens) == (5, 77)
    with pytest.raises(AttributeError):
        record.outcome = None  # type: ignore[misc]


@pytest.mark.asyncio
async def test_kept_alive_requests_share_a_connection(server: FakeAnthropic, client: anthropic.AsyncAnthropic) -> None:
    await client.messages.create(**ASK)
    await client.messages.create(**ASK)
    assert [record.connection for record in server.requests] == [1, 1]
    assert server.ledger.open_connections == 1


@pytest.mark.asyncio
async def test_a_wait_that_fails_tells_how_things_stand(server: FakeAnthropic) -> None:
    with pytest.raises(TimeoutError, match="no request has come"):
        await server.wait_for(lambda ledger: ledger.requests, timeout=0.01)
    with pytest.raises(TimeoutError, match="0 open connections"):
        server.wait_for_sync(lambda ledger: ledger.requests, timeout=0.01)


@given(st.text())
def test_output_tokens_grow_with_the_text(text: str) -> None:
    assert output_tokens(len(text)) == max(1, (len(text) + 3) // 4)


# -- starting and stopping ----------------------------------------------------------------------------------


def test_stopping_does_not_wait_for_a_stalled_reply(threaded: FakeAnthropic) -> None:
    threaded.enqueue(Reply.text("a", Stall()))
    with sync_client(threaded) as client, client.messages.create(stream=True, **ASK) as stream:
        next(stream)
        threaded.stop()
        with pytest.raises(httpx2.TransportError):
            list(stream)
    assert only(threaded).outcome == "cut"


def test_an_outage_keeps_port_and_ledger(threaded: FakeAnthropic) -> None:
    with sync_client(threaded) as client:
        client.messages.create(**ASK)
        base_url = threaded.base_url
        threaded.stop()
        with pytest.raises(anthropic.APIConnectionError):
            client.messages.create(**ASK)
        threaded.start()
        client.messages.create(**ASK)
    assert threaded.base_url == base_url
    assert [record.outcome for record in threaded.requests] == ["completed", "completed"]


def test_a_running_server_cannot_be_started_again(threaded: FakeAnthropic) -> None:
    with pytest.raises(RuntimeError, match="running already"):
        threaded.start()


def test_a_port_that_is_taken_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        FakeAnthropic(port=taken.getsockname()[1]).start()


def test_the_command_line_serves_another_process(tmp_path: Path) -> None:
    recorded = tmp_path / "stream.jsonl"
    recorded.write_text(
        "\n".join(
            json.dumps(step.body) for step in Reply.text(AWKWARD, chunks=3).steps(OPENING) if isinstance(step, Event)
        )
    )
    command = [sys.executable, "-W", "error", "-m", "streaming_chat.testing.fake_anthropic"]
    for arguments, expected in [
        (
            ["--text", "Hello you", "--tokens-per-second", "1000", "--first-token-seconds", "0.01"],
            "Hello you",
        ),
        (["--events", str(recorded)], AWKWARD),
    ]:
        root = str(Path(__file__).resolve().parents[2])
        with subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root}
        ) as process:
            try:
                assert process.stdout is not None
                base_url = process.stdout.readline().strip()
                assert int(base_url.rpartition(":")[2]) > 0
                with (
                    anthropic.Anthropic(api_key="any", base_url=base_url) as client,
                    client.messages.stream(**ASK) as stream,
                ):
                    assert stream.get_final_text() == expected
            finally:
                process.terminate()


# -- refusals -----------------------------------------------------------------------------------------------


def post(server: FakeAnthropic, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, Any], str]:
    request = urllib.request.Request(f"{server.base_url}/v1/messages", body, headers, method="POST")
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.load(response), response.headers["request-id"]
    except urllib.error.HTTPError as response:
        with response:
            return response.code, json.load(response), response.headers["request-id"]


VERSION = {"anthropic-version": "2026-10-21"}


@pytest.mark.parametrize(
    ("headers", "auth"),
    [
        ({"x-api-key": "k"}, "x-api-key"),
        ({"authorization": "Bearer t"}, "bearer"),
        ({}, None),
        ({"x-api-key": " "}, None),
        ({"authorization": "Basic k"}, None),
    ],
)
def test_a_key_is_needed_and_its_style_recorded(
    threaded: FakeAnthropic, headers: dict[str, str], auth: str | None
) -> None:
    status, body, request_id = post(threaded, json.dumps(ASK).encode(), {**headers, **VERSION})
    assert only(threaded).auth == auth
    assert only(threaded).request_id == request_id
    assert not {"x-api-key", "authorization"} & set(only(threaded).headers)
    assert status == (200 if auth else 401)
    if not auth:
        message = "x-api-key header is required"
        error = {"type": "authentication_error", "message": message}
        assert body == {"type": "error", "error": error, "request_id": request_id}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_refused(threaded: FakeAnthropic, body: bytes) -> None:
    threaded.enqueue(Reply.text("kept"))
    status, answer, _ = post(threaded, body, {"x-api-key": "k", **VERSION})
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert threaded.pending == 1


def test_a_body_of_more_than_32_mib_is_refused(threaded: FakeAnthropic) -> None:
    status, answer, _ = post(threaded, b" " * (32 * 1024 * 1024 + 1), {"x-api-key": "k", **VERSION})
    assert (status, answer["error"]["type"]) == (413, "request_too_large")


def test_a_version_and_a_known_path_are_needed(threaded: FakeAnthropic) -> None:
    assert post(threaded, json.dumps(ASK).encode(), {"x-api-key": "k"})[0] == 400
    with sync_client(threaded) as client, pytest.raises(anthropic.NotFoundError):
        client.post("/v1/elsewhere", cast_to=object)


CALL = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}
SYSTEM = {"role": "system", "content": "It is noon."}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "ok"}


def said(*contents: Any) -> dict[str, Any]:
    roles = ["user", "assistant"]
    return {
        **ASK,
        "messages": [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)],
    }


REFUSED = {
    "model: field required": {key: value for key, value in ASK.items() if key != "model"},
    "model: must be": {**ASK, "model": ""},
    "max_tokens: field required": {key: value for key, value in ASK.items() if key != "max_tokens"},
    "max_tokens: must be an integer": {**ASK, "max_tokens": True},
    "max_tokens: must not be negative": {**ASK, "max_tokens": -1},
    "messages: field required": {key: value for key, value in ASK.items() if key != "messages"},
    "messages: at least one": {**ASK, "messages": []},
    "messages: must be a list": {**ASK, "messages": "Hello"},
    "messages.0: must be an object": {**ASK, "messages": ["Hello"]},
    "messages.0.role": {**ASK, "messages": [{"role": "tool", "content": "x"}]},
    "messages.0.content: field required": {**ASK, "messages": [{"role": "user"}]},
    "the first message must": {**ASK, "messages": [{"role": "assistant", "content": "x"}, HELLO]},
    "messages.0: all messages": said(""),
    "messages.0: text content blocks must contain": said(" \n"),
    "messages.0.content.0: text content blocks must be non-empty": said([{"type": "text", "text": ""}]),
    "messages.1: all messages": said("a", [], "b"),
    "messages.0.content.0.type": said([{"text": "x"}]),
    "takes no prefill": said("a", "b"),
    "messages.1: `tool_use` ids without": said("a", [CALL], "b"),
    "messages.1: `tool_use` ids must": said("a", [CALL, CALL], [RESULT]),
    "messages.0: `tool_result` without": said([RESULT]),
    "messages.4: `tool_result` without": said("a", [CALL], [RESULT], "b", [RESULT]),
    "tool_use.input": said("a", [{"type": "tool_use", "id": "x", "name": "f"}], "b"),
    "tool_result.tool_use_id": said([{"type": "tool_result"}]),
    "thinking.signature": said("a", [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "x"}], "b"),
    "temperature: this parameter": {**ASK, "temperature": 0},
    "top_p: this parameter": {**ASK, "top_p": 1},
    "top_k: this parameter": {**ASK, "top_k": 1},
    "tokens: extra inputs": {**ASK, "tokens": 1},
    "stream: must be": {**ASK, "stream": "yes"},
    "stop_sequences.0": {**ASK, "stop_sequences": [" "]},
    "budget_tokens": {**ASK, "thinking": {"type": "enabled", "budget_tokens": 100}},
    "system.0: must be a text block": {**ASK, "system": [{"type": "image"}]},
    "system.0: text content": {**ASK, "system": [{"type": "text", "text": ""}]},
    "at most 4 blocks": said([{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}] * 5),
}


@pytest.mark.parametrize("message", REFUSED)
def test_strict_refuses_what_the_api_refuses(message: str) -> None:
    with pytest.raises(ApiError) as caught:
        check_message_request(REFUSED[message])
    assert (caught.value.status, caught.value.type) == (400, "invalid_request_error")
    assert message in caught.value.message


@pytest.mark.parametrize(
    "body",
    [
        ASK,
        {**ASK, "max_tokens": 0},
        {**ASK, "system": "Be kind."},
        {**ASK, "system": [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}]},
        {**ASK, "thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}},
        said("a", [CALL], [RESULT, {"type": "text", "text": "and?"}]),
        said("a", [{"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {}}]),
        {**ASK, "messages": [*said("a", [CALL])["messages"], {"role": "user", "content": [RESULT]}, HELLO]},
        {**ASK, "messages": [*said("a", [CALL])["messages"], SYSTEM, {"role": "user", "content": [RESULT]}]},
        {**ASK, "messages": [HELLO, HELLO, {"role": "assistant", "content": "x"}, HELLO]},
    ],
)
def test_strict_accepts_what_the_api_accepts(body: dict[str, Any]) -> None:
    check_message_request(body)


@pytest.mark.asyncio
async def test_a_refusal_reaches_the_sdk_and_uses_up_no_reply(
    server: FakeAnthropic, client: anthropic.AsyncAnthropic
) -> None:
    server.enqueue(Reply.text("kept"))
    with pytest.raises(anthropic.BadRequestError, match="temperature: this parameter is no longer supported"):
        await client.messages.create(**ASK, extra_body={"temperature": 1})
    assert (only(server).outcome, only(server).output_tokens, server.pending) == ("error", 0, 1)
    server.strict = False
    message = await client.messages.create(**ASK, extra_body={"temperature": 1})
    assert message.content[0].to_dict()["text"] == "kept"
    server.strict = True
    with pytest.raises(anthropic.BadRequestError):
        await client.messages.count_tokens(model="m", messages=[])


# -- the fixture --------------------------------------------------------------------------------------------


def test_the_fixture_points_the_site_at_the_server(fake_anthropic: FakeAnthropic, settings: Any) -> None:
    assert settings.STREAMING_CHAT["PROVIDER"] == "anthropic"
    assert settings.STREAMING_CHAT["ANTHROPIC_API_KEY"] == fake_anthropic.api_key
    assert settings.STREAMING_CHAT["ANTHROPIC_BASE_URL"] == fake_anthropic.base_url
    with sync_client(fake_anthropic) as client:
        client.messages.create(**ASK)
    assert len(fake_anthropic.requests) == 1


def test_the_fixture_works_without_django(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["streaming_chat.testing.fixtures"]\n')
    (tmp_path / "test_it.py").write_text(
        "import sys\n"
        "def test_it(fake_anthropic):\n"
        "    assert fake_anthropic.environ['ANTHROPIC_BASE_URL'] == fake_anthropic.base_url\n"
        "    assert 'django' not in sys.modules\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "DJANGO_"))}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:django", str(tmp_path)],
        env={**environ, "PYTHONPATH": root},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 passed" in result.stdout, result.stdout
