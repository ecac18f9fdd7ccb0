"""The demo provider: the same prompt always gets the same answer."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from streaming_chat.blocks import text_of
from streaming_chat.exceptions import TURN_ERRORS, ProviderError
from streaming_chat.providers import demo
from streaming_chat.providers.base import Alive, Began, Ended, ProviderMessage, ProviderRequest, UsageSeen
from streaming_chat.providers.demo import COMMANDS, ERRORS, DemoProvider
from tests.streams import folded


def request(prompt: str, **fields: Any) -> ProviderRequest:
    message = ProviderMessage(role="user", blocks=[{"type": "text", "text": prompt}])
    return ProviderRequest(**{"model": "any", "max_tokens": 100_000, "messages": [message], **fields})


async def ask(prompt: str, **fields: Any) -> tuple[list[Any], list[dict[str, Any]]]:
    """The events of an answer at full speed, and its blocks."""
    provider = DemoProvider(words_per_second=math.inf)
    events = [event async for event in provider.stream(request(prompt, **fields))]
    await provider.aclose()
    return events, folded(events)


async def gather(prompt: str, events: list[Any]) -> None:
    """Put what comes into ``events``, for an answer that does not end well."""
    async for event in DemoProvider(math.inf).stream(request(prompt)):
        events.append(event)  # noqa: PERF401 - what came counts, whatever follows


async def test_the_answer_says_what_it_is_and_echoes_the_prompt() -> None:
    events, blocks = await ask("What is a fjord?\nBriefly.")
    text = text_of(blocks)
    assert events[0].model == "demo"
    assert "no language model" in text
    assert "ANTHROPIC_API_KEY" in text
    assert "> What is a fjord?\n> Briefly." in text
    for markdown in ("## ", "\n- ", "```sh\n", "|---|", "**", "👋"):
        assert markdown in text
    assert isinstance(events[-1], Ended)
    assert events[-1] == Ended(stop_reason="end_turn")


async def test_the_same_prompt_gets_the_same_events() -> None:
    for prompt in ("Hello", "think about it", "🙂\ud83d"):
        assert await ask(prompt) == await ask(prompt)
    assert (await ask("Hello"))[1] != (await ask("Hallo"))[1]


async def test_words_come_one_by_one() -> None:
    events, blocks = await ask("Hello")
    deltas = [event["text"] for event in events if isinstance(event, dict) and event["op"] == "append"]
    assert "".join(deltas) == text_of(blocks)
    assert all(len(delta.split()) == 1 for delta in deltas)


async def test_the_first_word_comes_at_once_and_the_others_at_the_pace() -> None:
    events = DemoProvider(words_per_second=0.001).stream(request("Hello"))
    async with asyncio.timeout(5):
        while True:
            event = await anext(events)
            if isinstance(event, dict) and event["op"] == "append":
                break
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await anext(events)
    await events.aclose()


async def test_a_long_answer_is_long() -> None:
    _, blocks = await ask("Tell me a LONG story")
    assert 2000 <= len(text_of(blocks).split()) < 2200
    _, short = await ask("I belong here")
    assert len(text_of(short).split()) < 300


@pytest.mark.parametrize(
    ("prompt", "thinking", "thinks"),
    [
        ("Think!", None, True),
        ("Hello", None, False),
        ("Hello", {"type": "adaptive"}, True),
        ("Think!", {"type": "disabled"}, False),
    ],
)
async def test_it_thinks_when_asked_to(prompt: str, thinking: dict[str, Any] | None, thinks: bool) -> None:
    events, blocks = await ask(prompt, thinking=thinking)
    assert [block["type"] for block in blocks] == ["thinking", "text"][not thinks :]
    assert bool(events[-2].usage.thinking_tokens) is thinks
    if thinks:
        assert blocks[0]["thinking"]
        assert blocks[0]["signature"].startswith("demo-")


async def test_the_whole_answer_comes_at_once_if_no_stream_was_asked_for() -> None:
    streamed, expected = await ask("think")
    events, blocks = await ask("think", stream=False)
    assert blocks == expected
    assert [event["op"] for event in events[1:-2]] == ["start", "start"]
    assert [events[0], *events[-2:]] == [streamed[0], *streamed[-2:]]


async def test_a_whole_answer_takes_its_time() -> None:
    events = DemoProvider(words_per_second=0.001).stream(request("Hello", stream=False))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await anext(events)


async def test_usage_is_counted_by_length() -> None:
    events, blocks = await ask("12345678", system="1234")
    seen = [event for event in events if isinstance(event, UsageSeen)]
    assert [event.final for event in seen] == [False, True]
    assert seen[-1].usage.input_tokens == 3
    assert seen[-1].usage.output_tokens == math.ceil(len(text_of(blocks)) / 4)


async def test_it_stops_at_the_limit_of_tokens() -> None:
    events, blocks = await ask("Hello", max_tokens=20)
    assert events[-1].stop_reason == "max_tokens"
    assert 80 <= len(text_of(blocks)) <= 100


@pytest.mark.parametrize("name", ERRORS)
async def test_it_fails_on_demand(name: str) -> None:
    assert ERRORS[name] in TURN_ERRORS
    with pytest.raises(ProviderError) as caught:
        await ask(f"/error {name}")
    assert caught.value.code == ERRORS[name]
    assert caught.value.retryable == (name in {"unreachable", "rate_limited", "overloaded", "error"})


async def test_it_fails_late_on_demand() -> None:
    events: list[Any] = []
    with pytest.raises(ProviderError):
        await gather("/error overloaded late", events)
    assert text_of(folded(events))


async def test_it_is_cut_on_demand() -> None:
    events, blocks = await ask("/cut")
    assert text_of(blocks)
    assert not any(isinstance(event, Ended | UsageSeen) and getattr(event, "final", True) for event in events)
    assert (await ask("/cut", stream=False))[0] == []


async def test_it_goes_silent_on_demand() -> None:
    events: list[Any] = []
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(gather("/stall", events), 0.2)
    assert text_of(folded(events))


async def test_it_waits_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PING_SECONDS", 0.01)
    events, blocks = await ask("/wait 0.03")
    assert isinstance(events[0], Began)
    assert 3 <= events.count(Alive()) <= 4
    assert text_of(blocks)
    assert isinstance(events[-1], Ended)


@pytest.mark.parametrize(("prompt", "stop_reason"), [("/max_tokens", "max_tokens"), ("/refuse", "refusal")])
async def test_it_ends_otherwise_on_demand(prompt: str, stop_reason: str) -> None:
    events, blocks = await ask(prompt)
    assert events[-1].stop_reason == stop_reason
    assert bool(blocks) == (stop_reason == "max_tokens")


@pytest.mark.parametrize("prompt", ["/help", "/error", "/error of_mine"])
async def test_it_explains_its_commands(prompt: str) -> None:
    _, blocks = await ask(prompt)
    assert all(command in text_of(blocks) for command in COMMANDS)
    assert all(name in text_of(blocks) for name in ERRORS)


async def test_a_prompt_that_failed_before_is_not_played_again() -> None:
    # An unanswered prompt and the next one are sent as one message.
    blocks = [{"type": "text", "text": "/error provider_overloaded"}, {"type": "text", "text": "And now?"}]
    merged = ProviderRequest(model="any", max_tokens=100_000, messages=[ProviderMessage(role="user", blocks=blocks)])
    events = [event async for event in DemoProvider(words_per_second=math.inf).stream(merged)]
    assert "> And now?" in text_of(folded(events))
